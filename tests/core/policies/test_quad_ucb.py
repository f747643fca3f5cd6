import numpy as np
import pytest

from mixer.core.errors import ConfigError
from mixer.core.policies import load_policy
from mixer.core.policies.quad_ucb import upper_bounds
from tests.core.policies.guiding import guided
from tests.core.policies.making import make_catalog, make_influence, make_setting, make_signal, make_targets

PLAIN = {"scale": "none", "noise_sigmas": 0.0, "smoothing": 0.0}


def close(found, expected, atol=1e-12):
    np.testing.assert_allclose(found, expected, rtol=0, atol=atol)


def test_bounds_worked_by_hand():
    found = upper_bounds(np.array([0.5, 0.4, 0.1]), np.array([10.0, 5.0, 1.0]), 1.0)
    close(found, [1.244659, 1.453108, 2.454820], 5e-7)


def rows(catalog, window, counts, influence=None):
    """A signal in which each domain gave so many rows."""
    signal = make_signal(catalog, window, influence=influence)
    signal.rows_d[:] = counts
    return signal


def test_the_largest_bounds_share_the_weights_in_the_prior_s_ratios():
    catalog, prior = make_catalog(1, 1, 1), [0.5, 0.3, 0.2]
    policy = load_policy("quad_ucb", PLAIN | {"arms": 2})
    state = policy.start(make_setting(catalog, prior, targets=make_targets(1)))
    state, weights = policy.update(state, rows(catalog, 0, [9, 1, 0]))
    assert weights.tolist() == prior
    close(state["pulls_d"], [1 + 1.8, 1.2, 1.0])
    state, weights = policy.update(state, rows(catalog, 1, [5, 5, 0], make_influence([[1.2], [1.0], [1.1]])))
    pulls = np.array([1 + 1.8 + 1.0, 1.2 + 1.0, 1.0])
    close(state["pulls_d"], pulls)
    reward = np.array([1.2, 1.0, 1.1]) - 1.12
    close(state["reward_d"], reward)
    close(state["bound_d"], reward + np.sqrt(2 * np.log(7.0) / pulls))
    close(weights, [0.0, 0.6, 0.4])
    state, weights = policy.update(state, rows(catalog, 2, [0, 6, 4], make_influence([[1.0], [1.0], [1.0]])))
    close(state["reward_d"], reward / 2)


def test_rewards_may_be_forgotten_and_all_domains_get_something():
    probes = [make_influence([[1.0], [0.0]]), make_influence([[0.0], [1.0]]), make_influence([[0.0], [1.0]])]
    options = PLAIN | {"arms": 1, "forget": 0.5, "explore": 0.0, "smoothing": 0.2}
    found = guided("quad_ucb", options, probes, [0.5, 0.5])
    close(found[0][1], [0.9, 0.1])
    first, second = np.array([0.5, -0.5]), np.array([-0.1, 0.9])  # relative to the mixture in force
    close(found[1][0]["reward_d"], 0.5 * first + 0.5 * second)


def test_a_bandit_pulls_the_better_arms_more_and_no_arm_less_than_the_logarithm_asks():
    means, explore = np.array([0.1, 0.9, 0.5]), 0.4
    catalog = make_catalog(1, 1, 1)
    policy = load_policy("quad_ucb", PLAIN | {"arms": 1, "explore": explore})
    state = policy.start(make_setting(catalog, targets=make_targets(1)))
    rng = np.random.default_rng(0)
    weights = np.full(3, 1 / 3)
    for window in range(1000):
        probe = make_influence(means[:, None] + 0.1 * rng.normal(size=(3, 1)))
        state, weights = policy.update(state, rows(catalog, window, np.rint(weights * 1000), probe))
    worst, best, middle = state["pulls_d"].tolist()
    assert best > 900 > middle > worst
    # An arm is pulled until its bound is that of the best: T = 2 explore^2 ln n / gap^2, here 3.5 and 13.8.
    for pulls, gap in ((worst, 0.8), (middle, 0.4)):
        assert 0.8 < pulls / (2 * explore**2 * np.log(1000) / gap**2) < 1.5


def test_equal_bounds_at_the_edge_are_all_taken_and_one_domain_is_enough():
    for arms in (1, 2, 0.5):
        found = guided("quad_ucb", PLAIN | {"arms": arms}, [make_influence([[1.0]] * 4)], [0.4, 0.3, 0.2, 0.1])[0][1]
        close(found, [0.4, 0.3, 0.2, 0.1])
    assert guided("quad_ucb", {}, [make_influence([[1.0]])], [1.0])[0][1].tolist() == [1.0]
    none = guided("quad_ucb", PLAIN | {"arms": 1, "explore": 0.0}, [make_influence([[0.0], [1.0]])], [1.0, 0.0])[0][1]
    assert none.tolist() == [0.0, 1.0]  # chosen without any prior


@pytest.mark.parametrize(
    "options", [{"arms": 0.0}, {"arms": 2.5}, {"explore": -1.0}, {"forget": 1.0}, {"smoothing": 1.0}]
)
def test_values_out_of_range_are_refused(options):
    with pytest.raises(ConfigError, match="policy." + next(iter(options))):
        load_policy("quad_ucb", options)
