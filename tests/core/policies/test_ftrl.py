import numpy as np
import pytest

from mixer.core.errors import ConfigError
from mixer.core.policies import load_policy
from tests.core.policies.guiding import guided
from tests.core.policies.making import make_catalog, make_influence, make_setting

PRIOR = [0.5, 0.3, 0.2]
PLAIN = {"scale": "none", "noise_sigmas": 0.0, "rate": 1.0}
ONE = make_influence(np.log([[1.0], [2.0], [4.0]]))


def close(found, expected):
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)


def test_worked_by_hand_from_each_base():
    twice = [ONE, ONE]
    first = np.array([0.5, 0.6, 0.8]) / 1.9
    previous = guided("ftrl", PLAIN, twice, PRIOR)
    close(previous[0][1], first)
    close(previous[1][1], np.array([0.5, 1.2, 3.2]) / 4.9)
    close(previous[1][0]["average_d"], (previous[0][1] + previous[1][1]) / 2)
    prior = guided("ftrl", PLAIN | {"base": "prior"}, twice, PRIOR)
    close(prior[1][1], first)
    average = guided("ftrl", PLAIN | {"base": "average"}, [ONE] * 3, PRIOR)
    base = (average[0][1] + average[1][1]) / 2
    close(average[2][1], base * [1, 2, 4] / (base * [1, 2, 4]).sum())
    smoothed = guided("ftrl", PLAIN | {"smoothing": 0.3}, [ONE], PRIOR)
    close(smoothed[0][1], 0.7 * first + 0.1)


def test_targets_count_by_their_weights():
    probe = make_influence(np.log([[1.0, 9.0], [4.0, 1.0]]), targets=["code", "math"])
    options = PLAIN | {"target_weights": {"code": 3.0}}
    found = guided("ftrl", options, [probe], [0.5, 0.5])[0][1]
    close(found, np.array([9**0.25, 4**0.75]) / (9**0.25 + 4**0.75))
    with pytest.raises(ConfigError, match="names 'cod'"):
        guided("ftrl", PLAIN | {"target_weights": {"cod": 3.0}}, [probe], [0.5, 0.5])


def test_log_counts_relative_progress():
    probe = make_influence(np.log([[1.0, 9.0], [4.0, 1.0]]), target_loss_t=[0.5, 2.0])
    found = guided("ftrl", PLAIN | {"score": "log"}, [probe], [0.5, 0.5])[0][1]
    close(found, np.array([9**0.25, 4.0]) / (9**0.25 + 4.0))


def test_worst_leans_to_the_target_that_the_mixture_does_least_for():
    # Progress in force: (2, 1); target weights become (1, e) / (1 + e).
    probe = make_influence([[3.0, 0.0], [1.0, 2.0]])
    state, found = guided("ftrl", PLAIN | {"score": "worst"}, [probe], [0.5, 0.5])[0]
    lean = np.array([1.0, np.e]) / (1 + np.e)
    score = np.array([1.0, -1.0]) * lean[0] + np.array([-1.0, 1.0]) * lean[1]
    close(state["score_d"], score)
    close(found, np.exp(score) / np.exp(score).sum())


def test_without_a_probe_the_prior_then_the_last_answer_and_no_update_counted():
    found = guided("ftrl", PLAIN, [None, ONE, None, make_influence([[np.nan]] * 3)], PRIOR)
    assert found[0][1].tolist() == PRIOR
    assert found[2][1].tolist() == found[1][1].tolist() == found[3][1].tolist()
    assert int(found[3][0]["updates"]) == 1


def test_a_run_without_targets_is_refused():
    with pytest.raises(ConfigError, match="policy 'ftrl' moves weights toward targets, and the run has none"):
        load_policy("ftrl").start(make_setting(make_catalog(1, 1)))


@pytest.mark.parametrize(
    "options",
    [{"score": "best"}, {"rate": 0.0}, {"base": "last"}, {"smoothing": 1.0}, {"worst_spread": 0.0}, {"scale": "rows"}],
)
def test_values_out_of_range_are_refused(options):
    with pytest.raises(ConfigError, match="policy." + next(iter(options))):
        load_policy("ftrl", options)
