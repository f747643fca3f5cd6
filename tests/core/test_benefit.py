"""What policies make of a probe: centre, noise, scale, memory, target weights."""

from typing import Any

import numpy as np
import pytest
from scipy import stats

from mixer.core.benefit import Reading, spearman, target_weights
from mixer.core.errors import ConfigError, SignalError
from mixer.core.mirror import begin
from tests.core.policies.making import make_catalog, make_setting, make_targets

NAN = np.nan
PLAIN = {"scale": "none", "noise_sigmas": 0.0}


def close(found, expected, atol=1e-12):
    np.testing.assert_allclose(found, expected, rtol=0, atol=atol)


def begun(reading, weights, targets=1):
    setting = make_setting(make_catalog(*[1] * len(weights)), weights, targets=make_targets(targets))
    return begin(setting.prior.weights_d) | reading.start(setting)


def read(reading, weights, benefit, error: Any = 0.0, **more):
    benefit = np.array(benefit, dtype=np.float64)
    found = reading.read(
        begun(reading, weights, benefit.shape[1]), benefit, np.array(np.broadcast_to(error, benefit.shape)), **more
    )
    assert found is not None
    return found[1]


def test_the_weighted_mean_is_subtracted():
    found = read(Reading(**PLAIN), [0.5, 0.3, 0.2], [[1.0], [2.0], [5.0]])
    close(found.relative_dt.ravel(), [-1.1, -0.1, 2.9])
    close(found.value_dt.ravel(), [1.0, 2.0, 5.0])


def test_what_is_below_its_noise_is_the_mean():
    # The mean is 2.1; errors of the differences are (1 - w_i) s_i.
    error, noise = [[0.5], [0.5], [2.0]], np.array([0.25, 0.35, 1.6])
    weights, benefit = [0.5, 0.3, 0.2], [[1.0], [2.0], [5.0]]
    # 1.1 is 4.4 of its sigmas, 0.1 is 0.29, 2.9 is 1.8
    close(read(Reading(scale="none"), weights, benefit, error).relative_dt.ravel(), [-1.1, 0.0, 0.0])
    close(read(Reading(scale="none"), weights, benefit, error).value_dt.ravel(), [1.0, 2.1, 2.1])
    one = Reading(scale="none", noise_sigmas=1.0)
    close(read(one, weights, benefit, error).relative_dt.ravel(), [-1.1, 0.0, 2.9])
    shrunk = read(Reading(scale="none", noise="shrink", noise_sigmas=1.0), weights, benefit, error)
    left = [1 - noise[0] ** 2 / 1.1**2, 0.0, 1 - noise[2] ** 2 / 2.9**2]
    close(shrunk.relative_dt.ravel(), np.array([-1.1, -0.1, 2.9]) * left)
    unknown = read(Reading(scale="none"), weights, benefit, NAN)  # a probe of one part: nobody knows its noise
    close(unknown.relative_dt.ravel(), [-1.1, -0.1, 2.9])


def test_one_noisy_domain_does_not_hide_the_others():
    found = read(Reading(scale="none"), [0.25] * 4, [[1.0], [2.0], [3.0], [2.0]], [[0.1], [0.1], [0.1], [100.0]])
    close(found.relative_dt.ravel(), [-1.0, 0.0, 1.0, 0.0])


def test_a_worthless_domain_is_known_to_be_worthless():
    found = read(Reading(scale="none"), [0.25] * 4, [[10.0], [11.0], [9.0], [0.1]], 0.5)
    assert found.relative_dt[3, 0] == pytest.approx(0.1 - 7.525)


def test_what_was_not_measured_is_the_mean_of_what_was():
    found = read(Reading(**PLAIN), [0.5, 0.3, 0.2], [[1.0, NAN], [NAN, NAN], [5.0, NAN]])
    close(found.relative_dt, [[1 - 15 / 7, 0], [0, 0], [5 - 15 / 7, 0]])
    close(found.value_dt, [[1, 0], [15 / 7, 0], [5, 0]])
    only_without_weight = read(Reading(**PLAIN), [1.0, 0.0, 0.0], [[NAN], [1.0], [2.0]])
    close(only_without_weight.relative_dt.ravel(), [0.0, -0.5, 0.5])
    reading = Reading(target_weights={"goal1": 0.0})
    nothing = np.array([[NAN, 1.0], [NAN, 2.0]])
    assert reading.read(begun(reading, [0.5, 0.5], 2), nothing, nothing) is None  # the other target does not count


def test_scales():
    benefit = [[3.0, 40.0], [1.0, 0.0]]  # deviations 1 and 20
    close(read(Reading(scale="columns"), [0.5, 0.5], benefit).relative_dt, [[1, 1], [-1, -1]])
    root = np.sqrt((1 + 400) / 2)
    close(read(Reading(scale="all"), [0.5, 0.5], benefit).relative_dt, np.array([[1, 20], [-1, -20]]) / root)
    close(read(Reading(scale="columns"), [0.9, 0.1], benefit).relative_dt, [[0.2, 0.2], [-1.8, -1.8]])
    losses = read(Reading(**PLAIN), [0.5, 0.5], benefit, loss_t=np.array([2.0, 4.0]))
    close(losses.relative_dt, [[0.5, 5], [-0.5, -5]])
    close(read(Reading(), [0.5, 0.5], [[0.7], [0.7]]).relative_dt, [[0], [0]])


def test_a_column_of_equals_is_not_blown_up_to_rounding_errors():
    found = read(Reading(noise_sigmas=0.0), [0.1, 0.2, 0.7], [[0.7, 1.0]] * 2 + [[0.7, 2.0]])
    assert np.abs(found.relative_dt[:, 0]).max() < 1e-15


def test_the_scale_of_a_column_does_not_matter_by_columns():
    rng = np.random.default_rng(0)
    benefit, error = rng.normal(size=(5, 2)), rng.uniform(0.1, 0.9, size=(5, 2))
    found = [
        read(Reading(), [0.1, 0.2, 0.3, 0.2, 0.2], benefit * s, error * s).relative_dt for s in (1.0, [1e-140, 1e140])
    ]
    close(found[0], found[1], 1e-9)


def test_memory_averages_while_the_ranking_is_stable_and_begins_anew_else():
    reading = Reading(memory=0.8, **PLAIN)
    state = begun(reading, [0.25] * 4, 3)
    first = np.array([[1.0, 1.0, 1.0], [2.0, 2.0, 2.0], [3.0, 3.0, 3.0], [4.0, NAN, 4.0]])
    second = np.array([[2.0, 3.0, NAN], [3.0, 2.0, 3.0], [4.0, 1.0, 2.0], [NAN, 7.0, 1.0]])  # one ranking is the same
    for benefit in (first, second):
        found = reading.read(state, benefit, np.full((4, 3), 0.5))
        assert found is not None
        state = found[0]
    close(state["benefit_dt"], [[1.2, 3.0, 0.0], [2.2, 2.0, 3.0], [3.2, 1.0, 2.0], [4.0, 7.0, 1.0]])
    kept = 0.5 * np.sqrt(0.64 + 0.04)
    close(state["error_dt"], [[kept, 0.5, 0.0], [kept, 0.5, 0.5], [kept, 0.5, 0.5], [0.5, 0.5, 0.5]])
    assert float(state["stability"]) == pytest.approx(-1 / 3)  # 1, -1 and -1
    assert state["known_dt"].tolist() == [[True, True, False], *[[True] * 3] * 3]
    assert int(state["probes"]) == 2
    forgets = Reading(**PLAIN)
    state = begun(forgets, [0.25] * 4, 3)
    for benefit in (first, second):
        found = forgets.read(state, benefit, np.zeros((4, 3)))
        assert found is not None
        state = found[0]
    close(state["benefit_dt"], np.where(np.isnan(second), 0.0, second))
    assert state["known_dt"].tolist() == (~np.isnan(second)).tolist()


def test_spearman_agrees_with_scipy():
    rng = np.random.default_rng(0)
    for size in (2, 3, 10, 100):
        one, other = rng.integers(0, 1 + size // 2, size=(2, size)).astype(float)
        if np.ptp(one) and np.ptp(other):
            assert spearman(one, other) == pytest.approx(stats.spearmanr(one, other)[0])
    assert spearman(np.array([1.0]), np.array([2.0])) == 1.0
    assert spearman(np.array([1.0, 1.0]), np.array([2.0, 2.0])) == 1.0
    assert spearman(np.array([1.0, 1.0]), np.array([2.0, 3.0])) == 0.0


def test_read_once_it_remembers_nothing():
    benefit, weights = np.array([[1.0, NAN], [2.0, 1.0], [5.0, 3.0]]), np.array([0.5, 0.3, 0.2])
    for reading in (Reading(), Reading(scale="all", noise="shrink"), Reading(**PLAIN)):
        state = begun(reading, weights.tolist(), 2)
        found = reading.read(state, benefit, np.full((3, 2), 0.3))
        assert found is not None
        once = reading.once(weights, benefit, np.full((3, 2), 0.3))
        for key in ("relative_dt", "value_dt", "error_dt"):
            assert getattr(once, key).tolist() == getattr(found[1], key).tolist()


def test_target_weights_go_by_name():
    close(target_weights({"b": 3.0}, ("a", "b")), [0.25, 0.75])
    close(target_weights({}, ("a", "b", "c")), [1 / 3] * 3)
    assert target_weights({}, ()).shape == (0,)
    with pytest.raises(ConfigError, match="names 'mat', which is no target. The nearest target of the run is 'math'"):
        target_weights({"mat": 1.0}, ("code", "math"))
    with pytest.raises(ConfigError, match="The run has no targets"):
        target_weights({"mat": 1.0}, ())
    with pytest.raises(ConfigError, match="0 for every target: a, b"):
        target_weights({"a": 0.0, "b": 0.0}, ("a", "b"))


@pytest.mark.parametrize(
    "options",
    [
        {"scale": "rows"},
        {"noise": "drop"},
        {"noise_sigmas": -1.0},
        {"memory": 1.0},
        {"min_stability": 2.0},
        {"target_weights": {"a": -1.0}},
        {"target_weights": {"a": NAN}},
    ],
)
def test_values_out_of_range_are_refused(options):
    with pytest.raises(ConfigError, match="policy." + next(iter(options))):
        Reading(**options)


def test_a_probe_of_other_targets_is_refused():
    reading = Reading()
    with pytest.raises(SignalError, match="a probe of 3 targets; the policy began with 1"):
        reading.read(begun(reading, [0.5, 0.5]), np.zeros((2, 3)), np.zeros((2, 3)))
