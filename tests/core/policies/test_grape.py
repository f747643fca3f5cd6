import numpy as np
import pytest

from mixer.core.errors import ConfigError
from mixer.core.policies import load_policy
from tests.core.policies.guiding import guided
from tests.core.policies.making import influence_of, make_influence

PLAIN = {"mu_domains": 1.0, "mu_targets": 1.0, "scale": "none", "noise_sigmas": 0.0}
DOMAINS, TARGETS = [[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]], [[1.0, 0.0], [0.0, 2.0]]
PROBE = influence_of(DOMAINS, TARGETS, target_loss_t=[2.0, 1.0], rate=1.0)
PRIOR = [0.5, 0.3, 0.2]


def close(found, expected, atol=1e-12):
    np.testing.assert_allclose(found, expected, rtol=0, atol=atol)


def test_worked_by_hand():
    state, weights = guided("grape", PLAIN, [PROBE], PRIOR)[0]
    close(weights, [0.297840, 0.378316, 0.323845], 1e-6)
    close(state["task_t"], [0.749036, 0.250964], 5e-7)


def test_the_next_probe_goes_by_the_targets_new_weights():
    first, (state, weights) = guided("grape", PLAIN, [PROBE, PROBE], PRIOR)
    score = np.array([[0.5, 0.0], [0.0, 2.0], [0.5, 2.0]]) @ first[0]["task_t"]
    expected = first[1] * np.exp(score)
    close(weights, expected / expected.sum())
    close(state["score_d"], score - first[1] @ score)


def test_targets_may_step_less_often_and_be_held_near_equal():
    found = guided("grape", PLAIN | {"target_every": 2}, [PROBE, None, PROBE], PRIOR)
    assert found[0][0]["task_t"].tolist() == [0.5, 0.5] != found[2][0]["task_t"].tolist()
    state = guided("grape", PLAIN | {"target_smoothing": 0.5}, [PROBE], PRIOR)[0][0]
    close(state["task_t"], [0.25 + 0.5 * 0.749036, 0.25 + 0.5 * 0.250964], 5e-7)


def test_rates_are_the_learning_rate_by_mu():
    probe = influence_of(DOMAINS, TARGETS, target_loss_t=[2.0, 1.0], rate=1e-3)
    found = guided("grape", PLAIN | {"mu_domains": 1e-3, "mu_targets": 1e-3}, [probe], PRIOR)[0]
    close(found[1], [0.297840, 0.378316, 0.323845], 1e-6)
    close(found[0]["task_t"], [0.749036, 0.250964], 5e-7)


def test_a_target_begins_with_its_weight_and_one_that_was_not_measured_keeps_it():
    options = PLAIN | {"target_weights": {"goal0": 3.0}}
    benefit = np.array([[1.0, np.nan], [0.0, np.nan], [1.0, np.nan]])
    state, _ = guided("grape", options, [make_influence(benefit, rate=1.0)], PRIOR)[0]
    close(state["task_t"], [0.75, 0.25])


def test_progress_below_its_noise_moves_no_target():
    noisy = {"mu_domains": 1.0, "mu_targets": 1.0, "scale": "none"}
    probe = influence_of(DOMAINS, TARGETS, target_loss_t=[2.0, 1.0], rate=1.0, error_dt=[[0.0, 0.0]] * 3)
    assert guided("grape", noisy, [probe], PRIOR)[0][0]["task_t"][0] > 0.7
    probe = influence_of(DOMAINS, TARGETS, target_loss_t=[2.0, 1.0], rate=1.0, error_dt=[[5.0, 5.0]] * 3)
    state, weights = guided("grape", noisy, [probe], PRIOR)[0]
    close(state["task_t"], [0.5, 0.5])
    close(weights, PRIOR)


def test_the_scale_of_gradients_does_not_matter_by_default():
    options = {"noise_sigmas": 0.0}
    found = [
        guided("grape", options, [influence_of(np.array(DOMAINS) * s, TARGETS)], PRIOR)[0] for s in (1.0, 1e6, 1e-6)
    ]
    for state, weights in found[1:]:
        close(weights, found[0][1], 1e-9)
        close(state["task_t"], found[0][0]["task_t"], 1e-9)


@pytest.mark.parametrize(
    "options", [{"mu_domains": 0.0}, {"mu_targets": -1.0}, {"target_every": 0}, {"target_smoothing": 1.0}]
)
def test_values_out_of_range_are_refused(options):
    with pytest.raises(ConfigError, match="policy." + next(iter(options))):
        load_policy("grape", options)
