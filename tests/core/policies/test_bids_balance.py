import numpy as np
import pytest

from mixer.core.errors import ConfigError
from mixer.core.policies import load_policy
from mixer.core.policies.bids_balance import ranks
from tests.core.policies.guiding import guided
from tests.core.policies.making import make_influence

INFLUENCE = np.array([[9.0, 1.0, 0.0], [8.0, 2.0, 0.0], [1.0, 3.0, 1.0], [0.0, 2.0, 4.0]])
EQUAL = [0.25] * 4


def close(found, expected, atol=1e-12):
    np.testing.assert_allclose(found, expected, rtol=0, atol=atol)


def test_worked_by_hand():
    state, weights = guided("bids_balance", {}, [make_influence(INFLUENCE)], EQUAL)[0]
    assert state["rank_d"].tolist() == [1.0, 3.0, 2.0, 0.0]  # 3, 0, 2, and what is left
    power = np.exp([1 / 3, -1.0, -1 / 3, 1.0])
    close(weights, power / power.sum())


def test_claims_are_measured_from_the_mean_of_the_taken():
    # a has the largest; c then lifts by 0; from the mean (2.5, 4) of both d loses 1 and b 1.5, from their sum 5 and 4.
    benefit = np.array([[5.0, 4.0], [1.0, 0.0], [0.0, 4.0], [0.0, 3.0]])
    assert ranks(benefit, np.array([0.5, 0.5])).tolist() == [0.0, 3.0, 1.0, 2.0]


def test_columns_count_alike_whatever_their_scale_and_the_prior_is_tilted():
    for scale in ([1e6, 1e-6, 1.0], [1.0, 1.0, 1e3]):
        prior = [0.4, 0.3, 0.2, 0.1]
        state, weights = guided("bids_balance", {"rate": 0.5}, [make_influence(INFLUENCE * scale)], prior)[0]
        assert state["rank_d"].tolist() == [1.0, 3.0, 2.0, 0.0]
        power = np.array(prior) * np.exp(0.5 * np.array([1 / 3, -1.0, -1 / 3, 1.0]))
        close(weights, power / power.sum())


def test_targets_by_weight():
    only_first = {"target_weights": {"goal1": 0.0, "goal2": 0.0}}
    state, _ = guided("bids_balance", only_first, [make_influence(INFLUENCE)], EQUAL)[0]
    assert state["rank_d"].tolist() == [0.0, 1.0, 2.0, 3.0]


def test_equal_claims_share_their_ranks():
    alike = np.array([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
    assert ranks(alike, np.array([0.5, 0.5])).tolist() == [0.5, 0.5, 2.0]
    nearly = np.array([[0.1 + 0.2], [0.3], [0.0]])  # equal but for rounding
    assert ranks(nearly, np.array([1.0])).tolist() == [0.5, 0.5, 2.0]
    state, weights = guided("bids_balance", {}, [make_influence(np.full((4, 2), 0.7))], [0.4, 0.3, 0.2, 0.1])[0]
    assert state["rank_d"].tolist() == [1.5] * 4
    close(weights, [0.4, 0.3, 0.2, 0.1])


def test_what_is_below_its_noise_has_no_claim():
    error = np.zeros((4, 3))
    error[3] = 100.0
    state, _ = guided("bids_balance", {}, [make_influence(INFLUENCE, error_dt=error)], EQUAL)[0]
    assert state["rank_d"].tolist()[3] > 0
    state, _ = guided("bids_balance", {}, [make_influence([[1.0, 2.0]])], [1.0])[0]
    assert state["weights_d"].tolist() == [1.0]


@pytest.mark.parametrize("options", [{"rate": 0.0}, {"base": "last"}, {"smoothing": 1.0}, {"noise": "drop"}])
def test_values_out_of_range_are_refused(options):
    with pytest.raises(ConfigError, match="policy." + next(iter(options))):
        load_policy("bids_balance", options)
