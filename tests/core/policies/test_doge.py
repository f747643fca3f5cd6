import numpy as np
import pytest

from mixer.core.errors import ConfigError
from mixer.core.policies import load_policy
from tests.core.policies.guiding import guided
from tests.core.policies.making import influence_of, make_influence

DOMAINS = np.array([[1.0, 0.0, 0.0], [0.6, 0.8, 0.0], [0.0, 0.0, 2.0]])
EQUAL = [1 / 3] * 3
ITSELF = {"toward": "domains"}


def close(found, expected, atol=1e-12):
    np.testing.assert_allclose(found, expected, rtol=0, atol=atol)


def test_the_domains_as_their_own_targets_worked_by_hand():
    probe = influence_of(DOMAINS, np.zeros((1, 3)), rate=5e-4)
    state, weights = guided("doge", ITSELF, [probe], EQUAL)[0]
    close(state["score_d"], [2.25e-4, 2.25e-4, 0.0], 1e-9)  # sums (.6, .6, 0) over a mean norm of 4/3
    close(weights, [0.335824, 0.335824, 0.328352], 5e-7)


def test_targets_count_by_their_weights_and_sum_up():
    targets = np.array([[1.0, 0.0, 0.0], [0.0, 1.0, 0.5]])
    probe = influence_of(DOMAINS, targets, rate=0.01)
    norm = 4 / 3 + 1e-6
    state, _ = guided("doge", {}, [probe], EQUAL)[0]
    close(state["score_d"], 0.01 * np.array([1.0, 1.4, 1.0]) / norm)
    state, _ = guided("doge", {"target_weights": {"goal0": 3.0}}, [probe], EQUAL)[0]
    close(state["score_d"], 0.01 * np.array([1.5, 0.9 + 0.4, 0.5]) / norm)


def test_scores_are_clipped_and_the_learning_rate_is_in_the_exponent():
    probe = influence_of(np.diag([1.0, 10.0, 1.0]), [[-8.0, 8.0, 4.0]], rate=0.01)
    state, weights = guided("doge", {}, [probe], EQUAL)[0]  # -2, 20, 1 by the mean norm of 4
    score = 0.01 * np.array([0.0, 5.0, 1.0])
    close(state["score_d"], score, 1e-7)
    close(weights, np.exp(score / 0.01) / np.exp(score / 0.01).sum(), 1e-6)
    state, _ = guided("doge", {"least": -1.5, "most": 30.0}, [probe], EQUAL)[0]
    close(state["score_d"], 0.01 * np.array([-1.5, 20.0, 1.0]), 1e-6)
    tenth = guided("doge", {}, [influence_of(DOMAINS, [[1.0, 1, 1]], rate=0.0)], [0.5, 0.3, 0.2])[0][1]
    close(tenth, [0.5, 0.3, 0.2])


def test_products_below_their_noise_are_as_the_mixture_in_force():
    error = np.array([[0.0, 0.4, 0.0], [0.4, 0.0, 0.0], [0.0, 0.0, 0.0]])
    probe = make_influence(np.zeros((3, 1)), gram_dd=DOMAINS @ DOMAINS.T, gram_error_dd=error, rate=1.0)
    state, _ = guided("doge", ITSELF, [probe], EQUAL)[0]
    # .6 is less than two sigmas from its columns' mean of 1.6 / 3
    close(state["score_d"], np.array([1.6 / 3, 1.6 / 3, 0.0]) / (4 / 3 + 1e-6))


def test_the_mean_of_all_answers_is_kept():
    probe = influence_of(DOMAINS, [[1.0, 0.0, 0.0]], rate=0.05)
    found = guided("doge", {}, [probe, None, probe, probe], EQUAL)
    close(found[3][0]["average_d"], (found[0][1] + found[2][1] + found[3][1]) / 3)


def test_without_a_gram_matrix_there_are_no_norms_and_the_last_answer_stands():
    found = guided("doge", {}, [make_influence([[1.0], [2.0], [0.0]])], [0.5, 0.3, 0.2])
    assert found[0][1].tolist() == [0.5, 0.3, 0.2]


@pytest.mark.parametrize(
    "options",
    [{"toward": "me"}, {"mu": 0.0}, {"least": 1.0, "most": 0.0}, {"smoothing": 1.0}, {"noise_sigmas": -1.0}],
)
def test_values_out_of_range_are_refused(options):
    with pytest.raises(ConfigError, match="policy." + next(iter(options))):
        load_policy("doge", options)
    with pytest.raises(ConfigError, match="toward=domains has no targets"):
        load_policy("doge", {"toward": "domains", "target_weights": {"a": 1.0}})
