import numpy as np
import pytest

from mixer.core.errors import DataError
from mixer.proxies import laws
from mixer.proxies.laws import fit_exp_linear, fit_linear, fit_own_share, fit_power, fit_powers
from tests.proxies.worlds import ExpWorld


@pytest.mark.parametrize("seed", range(4))
def test_exp_linear_finds_the_law_that_made_the_losses(seed):
    world = ExpWorld.drawn(seed, domains=8)
    weights_rd = world.mixtures(64, seed)
    for target, loss_r in enumerate(world.losses(weights_rd).values()):
        law = fit_exp_linear(weights_rd, loss_r)
        assert law.log_floor == pytest.approx(world.log_floor_t[target], abs=2e-3)
        np.testing.assert_allclose(law.slope_d, world.slope_td[target], rtol=0, atol=0.02)
        np.testing.assert_allclose(law.predict(weights_rd), loss_r, rtol=0, atol=1e-4)


def test_exp_linear_is_not_moved_by_a_run_that_diverged():
    world = ExpWorld.drawn(3, domains=6)
    weights_rd = world.mixtures(64, 3)
    loss_r = world.losses(weights_rd)["target/0"].copy()
    loss_r[5] += 4.0
    law = fit_exp_linear(weights_rd, loss_r)
    np.testing.assert_allclose(law.slope_d, world.slope_td[0], rtol=0, atol=0.15)


def test_the_gradient_of_the_huber_loss_is_exact():
    rng = np.random.default_rng(0)
    weights_rd, loss_r = rng.dirichlet(np.ones(4), 30), rng.uniform(2.0, 3.0, 30)
    fit = laws.ExpLinearLoss(weights_rd, loss_r, 0.3)
    at = np.array([0.3, -0.5, 0.2, 0.1, -1.0])
    steps = 1e-6 * np.eye(5)
    slope = [(fit(at + step)[0] - fit(at - step)[0]) / 2e-6 for step in steps]
    np.testing.assert_allclose(fit(at)[1], slope, rtol=0, atol=1e-6)


def test_linear_is_least_squares():
    rng = np.random.default_rng(0)
    weights_rd = rng.dirichlet(np.ones(4), 30)
    law = fit_linear(weights_rd, weights_rd @ np.array([1.0, 2.0, 3.0, 4.0]))
    np.testing.assert_allclose(law.loss_d, [1, 2, 3, 4], rtol=0, atol=1e-10)


def test_fewer_runs_than_coefficients_are_refused_with_both_numbers():
    rng = np.random.default_rng(0)
    weights_rd = rng.dirichlet(np.ones(6), 6)
    with pytest.raises(DataError, match=r"6 usable runs for the 7 coefficients of the law 'exp_linear'.*Train more"):
        fit_exp_linear(weights_rd, np.ones(6) + rng.random(6))
    with pytest.raises(DataError, match=r"5 usable runs for the 6 coefficients of the law 'linear'"):
        fit_linear(weights_rd[:5], np.ones(5))
    with pytest.raises(DataError, match="law of positive losses"):
        fit_exp_linear(rng.dirichlet(np.ones(3), 9), -rng.random(9))


def test_powers_find_the_law_and_share_alpha():
    x = np.geomspace(1e3, 1e6, 12)
    law = fit_power(x, 2.0 + 30.0 * x**-0.4)
    assert (law.floor, law.scale, law.alpha) == pytest.approx((2.0, 30.0, 0.4), rel=1e-5)
    curves = [1.5 + 8.0 * x**-0.25, 2.5 + 20.0 * x**-0.25, 3.0 - 2.0 * x**-0.25]
    found = fit_powers([x] * 3, curves)
    assert {law.alpha for law in found} == {found[0].alpha}
    assert [law.scale for law in found] == pytest.approx([8.0, 20.0, -2.0], rel=1e-4)
    with pytest.raises(DataError, match="needs 3 at different places"):
        fit_power(x[:2], curves[0][:2])
    with pytest.raises(DataError, match="finite"):
        fit_power(x[:3], np.array([1.0, np.nan, 2.0]))


def test_own_share_finds_the_law_over_weights_and_tokens():
    weight, s = (one.ravel() for one in np.meshgrid([0.02, 0.1, 0.3, 0.7], [0.2, 0.4, 0.6, 0.8, 1.0]))
    law = fit_own_share(weight, s, (0.8 * s**-0.5 + 1.7) * weight**-0.06)
    assert (law.alpha, law.beta, law.fall, law.floor) == pytest.approx((0.06, 0.5, 0.8, 1.7), rel=1e-4)
    at_end = s == 1.0  # one place only: the scale is what can be known
    law = fit_own_share(weight[at_end], s[at_end], 2.5 * weight[at_end] ** -0.06)
    assert (law.alpha, law.scale(1.0), law.fall) == pytest.approx((0.06, 2.5, 0.0), rel=1e-6)
