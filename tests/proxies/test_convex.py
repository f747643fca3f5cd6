import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mixer.proxies.convex import Exponentials, Quadratic, gap, minimise
from tests.proxies.worlds import ExpWorld

SLOPES = np.array([[-2.0, 0.5, 0.0], [0.3, -1.5, 0.2]])
PRIOR = np.array([0.2, 0.3, 0.5])


def pulled(kl=0.1):
    return Exponentials(weight_m=np.array([0.5, 0.5]), slope_md=SLOPES, pull=kl, prior_d=PRIOR)


def test_exponentials_with_a_pull_to_the_prior():
    found = minimise(pulled(), np.ones(3), PRIOR)
    np.testing.assert_allclose(found.weights_d, [0.511392, 0.470571, 0.018037], rtol=0, atol=5e-7)
    assert found.value == pytest.approx(0.579505, abs=5e-7)
    assert found.gap < 1e-10


def test_the_same_under_caps():
    found = minimise(pulled(), np.full(3, 0.5), PRIOR)
    np.testing.assert_allclose(found.weights_d, [0.5, 0.479472, 0.020528], rtol=0, atol=5e-7)
    assert found.weights_d.max() <= 0.5
    assert found.gap < 1e-10


def test_gradient_and_curvature_are_those_of_the_value():
    objective, x, step = pulled(), np.array([0.5, 0.3, 0.2]), 1e-6
    for place in range(3):
        to = np.zeros(3)
        to[place] = step
        slope = (objective.value(x + to) - objective.value(x - to)) / (2 * step)
        assert objective.gradient(x)[place] == pytest.approx(slope, abs=1e-8)
        curve = (objective.gradient(x + to) - objective.gradient(x - to)) / (2 * step)
        np.testing.assert_allclose(objective.hessian(x)[place], curve, rtol=0, atol=1e-7)


def test_the_gap_is_exact_for_a_line_and_a_bound_for_a_curve():
    gradient = np.array([3.0, 1.0, 2.0])
    # best within the caps: 0.6 of the second, 0.4 of the third
    assert gap(gradient, np.array([0.5, 0.5, 0.0]), np.array([0.5, 0.6, 0.9])) == pytest.approx(2.0 - 1.4)
    objective, least = pulled(), minimise(pulled(), np.ones(3), PRIOR).value
    for x in (PRIOR, np.array([0.1, 0.1, 0.8]), np.array([0.9, 0.05, 0.05])):
        assert objective.value(x) - least <= gap(objective.gradient(x), x, np.ones(3))


def test_a_line_ends_in_the_cheapest_corner():
    found = minimise(
        Quadratic(gain_d=np.array([3.0, 1.0, 1.0, 2.0]), curve_dd=np.zeros((4, 4))),
        np.array([0.4, 1, 1, 1]),
        np.ones(4) / 4,
    )
    np.testing.assert_allclose(found.weights_d, [0.4, 0, 0, 0.6], rtol=0, atol=1e-8)


def test_equal_gains_and_no_covariance_end_in_equal_weights_whatever_the_start():
    for start in ([1.0, 0, 0, 0], [0.1, 0.2, 0.3, 0.4]):
        found = minimise(Quadratic(gain_d=np.ones(4), curve_dd=np.eye(4)), np.ones(4), np.array(start))
        np.testing.assert_allclose(found.weights_d, np.full(4, 0.25), rtol=0, atol=1e-9)


def test_caps_that_leave_one_mixture_and_domains_that_are_closed():
    found = minimise(pulled(), np.array([0.2, 0.3, 0.5]), PRIOR)
    assert found.weights_d.tolist() == [0.2, 0.3, 0.5]
    found = minimise(pulled(), np.array([0.0, 1.0, 1.0]), PRIOR)
    assert found.weights_d[0] == 0.0
    assert found.gap < 1e-10
    found = minimise(pulled(), np.array([0.0, 1.0, 0.0]), PRIOR)
    assert found.weights_d.tolist() == [0.0, 1.0, 0.0]


@pytest.mark.parametrize("seed", range(8))
def test_another_solver_finds_nothing_better(seed):
    world = ExpWorld.drawn(seed, domains=5 + seed)
    cap_d = np.minimum(1.0, 3.0 * world.prior_d)
    targets = len(world.log_floor_t)
    objective = Exponentials(weight_m=np.full(targets, 1 / targets), slope_md=world.slope_td)
    found = minimise(objective, cap_d, world.prior_d)
    assert found.gap < 1e-8
    assert float(world.total(found.weights_d)[0]) <= float(world.total(world.minimum(cap_d))[0]) + 1e-9


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 12), st.floats(1.0, 5.0), st.sampled_from([0.0, 0.01, 0.3]))
def test_the_answer_is_a_mixture_within_the_caps_and_proves_itself(seed, domains, room, kl):
    rng = np.random.default_rng(seed)
    slope_md = rng.normal(-0.5, 2.0, (3, domains))
    prior_d = rng.dirichlet(np.ones(domains)) * 0.999 + 0.001 / domains
    cap_d = np.minimum(1.0, room * prior_d + 1e-9)
    objective = Exponentials(weight_m=rng.random(3), slope_md=slope_md, pull=kl, prior_d=prior_d)
    found = minimise(objective, cap_d, prior_d)
    assert (found.weights_d >= 0).all()
    assert (found.weights_d <= cap_d).all()
    assert abs(found.weights_d.sum() - 1.0) < 1e-12
    assert found.gap <= 1e-7 * (1.0 + abs(found.value))
