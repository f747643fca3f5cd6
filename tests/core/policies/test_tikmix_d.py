import numpy as np
import pytest

from mixer.core.errors import ConfigError
from mixer.core.policies import load_policy
from tests.core.policies.guiding import guided
from tests.core.policies.making import make_influence

PLAIN = {"scale": "none", "noise_sigmas": 0.0}
BENEFIT = np.array([[1.0, 0.1], [0.2, 0.9], [0.5, 0.3]])
NOW = [0.2, 0.2, 0.6]  # floors .54 and .38


def close(found, expected, atol=1e-12):
    np.testing.assert_allclose(found, expected, rtol=0, atol=atol)


def solve(benefit=BENEFIT, now: list[float] = NOW, **options):
    return guided("tikmix_d", PLAIN | options, [make_influence(benefit)], now)[0][1]


def test_worked_answers():
    found = solve(spread=1.0, gain=1.0, entropy=0.0)
    close(found, [0.4375, 0.5625, 0.0], 5e-5)
    close(found @ BENEFIT, [0.55, 0.55], 5e-5)
    close(solve(spread=1.0, gain=1.0, entropy=0.1), [0.4242, 0.5521, 0.0237], 5e-5)
    close(solve(spread=0.0, gain=0.0, entropy=1.0), [1 / 3] * 3, 1e-6)


def test_a_degenerate_program_returns_the_start():
    alike = np.array([[1.0, 0.1], [0.2, 0.9], [0.6, 0.5]])  # every mixture gains 1.1
    assert solve(alike, spread=0.0, gain=1.0, entropy=0.0).tolist() == NOW
    assert solve(np.zeros((3, 2)), entropy=0.0).tolist() == NOW
    assert solve(np.array([[1.0, 0.0], [0.0, 1.0]]), [0.5, 0.5], spread=0.0, entropy=0.0).tolist() == [0.5, 0.5]
    assert solve(np.array([[2.0, -1.0]]), [1.0]).tolist() == [1.0]


def test_no_target_falls_below_the_mixture_in_force_unless_it_may():
    benefit = np.array([[5.0, 0.0], [0.0, 1.0]])
    kept = solve(benefit, [0.5, 0.5], spread=0.0, entropy=0.0)
    assert kept.tolist() == [0.5, 0.5]  # the gain of the one would be the other's loss
    close(solve(benefit, [0.5, 0.5], spread=0.0, entropy=0.0, keep_targets=False), [1.0, 0.0], 1e-6)


def value(weights_nd, benefit, gain, spread, entropy):
    progress, safe = weights_nd @ benefit, np.maximum(weights_nd, 1e-300)
    return gain * progress.sum(1) - spread * progress.std(1) - entropy * (safe * np.log(safe)).sum(1)


def test_the_floor_is_that_of_the_last_answer_and_not_of_the_prior():
    first, second = make_influence([[1.0, 0.0], [0.0, 0.5]]), make_influence([[0.0, 0.5], [1.0, 0.0]])
    options = PLAIN | {"spread": 0.0, "entropy": 0.0, "max_shift": 0.2, "keep_targets": False}
    found = guided("tikmix_d", options, [first], [0.5, 0.5])[0][1]
    close(found, [0.6, 0.4], 1e-9)
    floored = guided("tikmix_d", PLAIN | {"spread": 0.0, "entropy": 0.0}, [second, first], [0.5, 0.5])
    assert floored[1][1].tolist() == [0.5, 0.5]
    # Only toward the new floor of 0.6 for the first domain may the second probe's gain pull.
    loose = guided("tikmix_d", options, [first, first], [0.5, 0.5])[1][1]
    close(loose, [0.7, 0.3], 1e-9)


def test_the_largest_of_its_objective_among_all_mixtures_that_may_be():
    rng = np.random.default_rng(0)
    for _ in range(20):
        num, goals = rng.integers(2, 7), rng.integers(1, 5)
        benefit, now = rng.normal(size=(num, goals)), rng.dirichlet(np.ones(num))
        terms = dict(zip(("gain", "spread", "entropy"), rng.uniform(0.1, 1, size=3).tolist(), strict=True))
        max_shift = float(rng.uniform(0.1, 1.9))
        found = solve(benefit, now.tolist(), max_shift=max_shift, **terms)
        assert np.abs(found - now).sum() <= max_shift + 1e-9
        assert ((found - now) @ benefit).min() >= -1e-5
        others = rng.dirichlet(np.full(num, 0.5), size=3000)
        near = found + rng.choice([1e-3, 1e-2, 0.1], size=(3000, 1)) * (others - found)
        others = np.concatenate([others, near, [now]])
        may = (np.abs(others - now).sum(1) <= max_shift) & (((others - now) @ benefit).min(1) >= 0)
        assert value(found[None], benefit, **terms)[0] >= value(others[may], benefit, **terms).max() - 1e-5


def test_equal_domains_get_equal_weights_and_many_domains_are_no_trouble():
    rng = np.random.default_rng(1)
    benefit = np.repeat(rng.normal(size=(250, 5)), 2, axis=0)
    found = guided("tikmix_d", {"noise_sigmas": 0.0}, [make_influence(benefit)], [1 / 500] * 500)[0][1]
    assert found[::2].tolist() == found[1::2].tolist()
    assert found.max() > 0.02
    assert found.sum() == pytest.approx(1.0)


def test_no_order_of_the_domains_changes_a_bit():
    rng = np.random.default_rng(2)
    benefits, order = rng.normal(size=(3, 40, 4)), rng.permutation(40)
    now = rng.integers(1, 9, size=40) / 1024.0  # so that it sums up exactly in any order
    now[-1] = now[order[0]] = 0.0
    now[-1] = 1.0 - now.sum()
    for options in ({"entropy": 0.05}, {"max_shift": 0.3}, {"memory": 0.5, "noise": "shrink"}):
        probes = [[make_influence(one[o], error_dt=0.1) for one in benefits] for o in (np.arange(40), order)]
        plain, moved = (
            guided("tikmix_d", options, one, prior.tolist())
            for one, prior in zip(probes, (now, now[order]), strict=True)
        )
        for left, right in zip(plain, moved, strict=True):
            assert left[1][order].tolist() == right[1].tolist()


def test_targets_count_by_their_weights():
    benefit = np.array([[1.0, 0.0], [0.0, 1.0]])
    # Without spread and floors w = softmax(2 u_t / entropy); a target of weight 0 is none at all.
    for weight, power in ((3.0, [1.5, 0.5]), (0.0, [0.0, 1.0])):
        options = {"target_weights": {"goal0": weight}, "spread": 0.0, "keep_targets": False, "entropy": 0.5}
        share = np.exp(np.array(power) / 0.5)
        close(solve(benefit, [0.5, 0.5], **options), share / share.sum(), 1e-6)


def test_an_uneven_gain_costs_by_the_deviation_of_weighted_targets():
    # Weights 3/4 and 1/4, P = w: std = sqrt(3)/4 |w0 - w1|, and 2 (3/4 w0 + 1/4 w1) is the gain.
    benefit = np.array([[1.0, 0.0], [0.0, 1.0]])
    for spread, expected in ((1.1, [1.0, 0.0]), (1.2, [0.5, 0.5])):  # half of w0 - w1 against sqrt(3)/4 of it
        options = {"target_weights": {"goal0": 3.0}, "spread": spread, "keep_targets": False, "entropy": 0.0}
        close(solve(benefit, [0.4, 0.6], **options), expected, 1e-3)


def test_the_scale_of_a_target_does_not_matter_by_columns():
    found = guided("tikmix_d", {}, [make_influence(BENEFIT)], NOW)[0][1]
    for scale in ([1e-9, 1.0], [1e6, 1e-6]):
        close(guided("tikmix_d", {}, [make_influence(BENEFIT * scale)], NOW)[0][1], found, 1e-6)


def test_it_decides_anew_when_a_probe_came_and_tracks_the_stability_of_rankings():
    reverse = make_influence(-BENEFIT)
    found = guided("tikmix_d", {}, [None, make_influence(BENEFIT), None, reverse, make_influence(-2 * BENEFIT)], NOW)
    assert found[0][1].tolist() == NOW
    assert found[1][1].tolist() == found[2][1].tolist() != found[3][1].tolist()
    assert [float(state["stability"]) for state, _ in found] == pytest.approx([1.0, 1.0, 1.0, -1.0, 1.0])
    state = found[1][0]
    assert (state["progress_t"] >= -1e-9).all()
    assert state["progress_t"].max() > 0.01


def test_benefits_below_their_noise_do_not_move_it_from_its_entropy():
    quiet = make_influence(BENEFIT, error_dt=10.0)
    assert guided("tikmix_d", {"entropy": 0.0}, [quiet], NOW)[0][1].tolist() == NOW


@pytest.mark.parametrize(
    "options",
    [{"gain": -1.0}, {"entropy": np.inf}, {"max_shift": 0.0}, {"smoothing": 1.0}, {"memory": 1.0}, {"scale": "rows"}],
)
def test_values_out_of_range_are_refused(options):
    with pytest.raises(ConfigError, match="policy." + next(iter(options))):
        load_policy("tikmix_d", options)
    with pytest.raises(ConfigError, match="all 0"):
        load_policy("tikmix_d", {"gain": 0.0, "spread": 0.0, "entropy": 0.0})
