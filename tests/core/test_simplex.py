import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from mixer.core.simplex import Floats, onto_box, onto_box_near, relative


def array(*values: float) -> Floats:
    return np.array(values, dtype=np.float64)


def test_a_floor_takes_from_the_others_in_their_ratios() -> None:
    # 0.9 is left for the first two, which share it as 6 : 3.
    w = onto_box([array(0.6, 0.3, 0.02), np.ones(3)], np.full(3, 0.1), np.ones(3))
    np.testing.assert_allclose(w, [0.6, 0.3, 0.1], rtol=0, atol=1e-15)


def test_a_cap_gives_to_the_others_in_their_ratios() -> None:
    w = onto_box([array(0.8, 0.15, 0.05), np.ones(3)], np.zeros(3), array(0.6, 1.0, 1.0))
    np.testing.assert_allclose(w, [0.6, 0.3, 0.1], rtol=0, atol=1e-15)


def test_what_a_cap_frees_may_drive_another_domain_to_its_cap() -> None:
    # 0.5 is free after the first; in ratios 3 : 2 that is 0.3 and 0.2, but the second may have 0.28 only.
    w = onto_box([array(0.9, 0.06, 0.04), np.ones(3)], np.zeros(3), array(0.5, 0.28, 1.0))
    np.testing.assert_allclose(w, [0.5, 0.28, 0.22], rtol=0, atol=1e-15)


def test_floor_and_cap_together() -> None:
    # c * q with c = 1.5 for the two in the middle: 0.5 + 0.225 + 0.15 + 0.125 = 1
    w = onto_box([array(0.7, 0.15, 0.1, 0.05), np.ones(4)], array(0, 0, 0, 0.125), array(0.5, 1, 1, 1))
    np.testing.assert_allclose(w, [0.5, 0.225, 0.15, 0.125], rtol=0, atol=1e-15)


def test_zeros_stay_at_their_floors_while_the_others_can_take_the_mass() -> None:
    w = onto_box([array(1, 1, 0), np.ones(3)], array(0, 0, 0.2), np.ones(3))
    np.testing.assert_allclose(w, [0.4, 0.4, 0.2], rtol=0, atol=1e-15)


def test_zeros_share_what_the_others_cannot_take_in_the_next_ratios() -> None:
    ratios = [array(1, 0, 0, 0), array(9, 3, 1, 0), np.ones(4)]
    w = onto_box(ratios, np.zeros(4), array(0.6, 1, 1, 1))
    np.testing.assert_allclose(w, [0.6, 0.3, 0.1, 0], rtol=0, atol=1e-15)
    w = onto_box(ratios, np.zeros(4), array(0.6, 0.1, 0.1, 1))
    np.testing.assert_allclose(w, [0.6, 0.1, 0.1, 0.2], rtol=0, atol=1e-15)


def test_zeros_are_the_limit_of_tiny_weights() -> None:
    q, shape = array(0.7, 0, 0.3, 0, 0), array(0.1, 0.1, 0.2, 0.25, 0.35)
    hi = array(0.3, 0.2, 0.2, 0.3, 0.3)
    exact = onto_box([q, shape, np.ones(5)], np.zeros(5), hi)
    tiny = onto_box([np.where(q > 0, q, 1e-14 * shape), np.ones(5)], np.zeros(5), hi)
    np.testing.assert_allclose(exact, tiny, rtol=0, atol=1e-12)


def test_ratios_over_all_magnitudes() -> None:
    # The tiny ones count though they are 300 orders of magnitude apart: everything before them is capped.
    q = relative(array(1.0, 1e-100, 1e-200, 1e-300, 3e-300, 1e-310))
    w = onto_box([q, np.ones(6)], np.zeros(6), array(0.2, 0.2, 0.2, 1, 1, 1))
    np.testing.assert_allclose(w, [0.2, 0.2, 0.2, 0.1, 0.3, 0], rtol=1e-14)


def test_trust_region_worked_by_hand() -> None:
    # p = (1/2, 1/4, 1/4), q = (0.1, 0.6, 0.3), at most 0.2 of change: 0.1 up, 0.1 down. Down goes the
    # first alone, to 0.4. Up with a = 7/12: a * q = (.., 0.35, 0.175), so only the second rises, to 0.35.
    w = onto_box_near([array(0.1, 0.6, 0.3), np.ones(3)], np.zeros(3), np.ones(3), array(0.5, 0.25, 0.25), 0.2)
    np.testing.assert_allclose(w, [0.4, 0.35, 0.25], rtol=0, atol=1e-15)
    # At most 0.6: 0.3 up. a = 8/9 gives (.., 0.5333, 0.2667), and both rise: 0.2833 + 0.0167 = 0.3.
    w = onto_box_near([array(0.1, 0.6, 0.3), np.ones(3)], np.zeros(3), np.ones(3), array(0.5, 0.25, 0.25), 0.6)
    np.testing.assert_allclose(w, [0.2, 8 / 15, 4 / 15], rtol=0, atol=1e-15)


def test_trust_region_with_a_cap() -> None:
    # 0.1 may go up, the second is full at 0.28, so 0.07 goes to the third.
    hi = array(1, 0.28, 1)
    w = onto_box_near([array(0.1, 0.6, 0.3), np.ones(3)], np.zeros(3), hi, array(0.5, 0.25, 0.25), 0.2)
    np.testing.assert_allclose(w, [0.4, 0.28, 0.32], rtol=0, atol=1e-15)


@pytest.mark.parametrize("max_shift", [0.0, 1e-16, 1e-13])
def test_no_change_allowed(max_shift: float) -> None:
    p = array(0.5, 0.25, 0.25)
    w = onto_box_near([array(0.1, 0.6, 0.3), np.ones(3)], np.zeros(3), np.ones(3), p, max_shift)
    assert w.tolist() == p.tolist()


def random_problem(seed: int, num_domains: int) -> tuple[Floats, Floats, Floats, Floats, float]:
    random = np.random.default_rng(seed)
    q = random.dirichlet(np.full(num_domains, 0.7)) + 1e-3
    inside = random.dirichlet(np.ones(num_domains))
    lo = inside * random.uniform(0, 1, num_domains)
    hi = inside + random.uniform(0, 1, num_domains) * (1 - inside)
    p = onto_box([random.dirichlet(np.ones(num_domains)), np.ones(num_domains)], lo, hi)
    return q, lo, hi, p, float(random.uniform(0.05, 1.0))


@pytest.mark.parametrize("seed", range(40))
def test_a_generic_solver_finds_the_same(seed: int) -> None:
    """SLSQP on the least KL divergence, with the L1 rule split into increases u and decreases v."""
    num_domains = 2 + seed % 5
    q, lo, hi, p, max_shift = random_problem(seed, num_domains)
    w = onto_box_near([q, np.ones(num_domains)], lo, hi, p, max_shift)

    def moved(uv: Floats) -> Floats:
        return p + uv[:num_domains] - uv[num_domains:]

    def divergence(uv: Floats) -> float:
        x = np.maximum(moved(uv), 1e-15)
        return float((x * np.log(x / q)).sum())

    found = minimize(
        divergence,
        np.zeros(2 * num_domains),
        method="SLSQP",
        bounds=[(0.0, float(room)) for room in np.concatenate([hi - p, p - lo])],
        constraints=[
            {"type": "eq", "fun": lambda uv: moved(uv).sum() - 1.0},
            {"type": "ineq", "fun": lambda uv: max_shift - uv.sum()},
        ],
        options={"maxiter": 500, "ftol": 1e-14},
    )
    generic: Floats = moved(found.x)
    assert (w * np.log(w / q)).sum() <= divergence(found.x) + 1e-9, f"seed {seed}: the solver did better"
    np.testing.assert_allclose(w, generic, rtol=0, atol=2e-4, err_msg=f"seed {seed}")


@settings(deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 300))
def test_conditions_of_the_minimum(seed: int, num_domains: int) -> None:
    """With one a and one b >= a: who rises is at min(a * q, hi), who falls is at max(b * q, lo)."""
    q, lo, hi, p, max_shift = random_problem(seed, num_domains)
    w = onto_box_near([q, np.ones(num_domains)], lo, hi, p, max_shift)
    assert (lo <= w).all() and (w <= hi).all() and abs(w.sum() - 1) <= 1e-13
    assert np.abs(w - p).sum() <= max_shift + 1e-13
    ratio = w / q
    up, down = w > p, w < p
    binds = np.abs(w - p).sum() > max_shift - 1e-9
    free_up, free_down = up & (w < hi), down & (w > lo)
    # w_i / q_i is one value for all that rise freely and one for all that fall freely (one if no rule binds);
    # stuck ones (at a bound, or staying at p) are on the side of that value which the condition names.
    least_a = np.max(ratio[up], initial=0.0)  # a is at least this, as w = min(a * q, hi) where w rises
    most_b = np.min(ratio[down], initial=np.inf)
    assert least_a <= most_b * (1 + 1e-9)
    if free_up.any():
        a = ratio[free_up].mean()
        np.testing.assert_allclose(ratio[free_up], a, rtol=1e-9)
        assert (ratio[~up & (w < hi)] >= a * (1 - 1e-9)).all(), "one that stays would rather rise"
    if free_down.any():
        b = ratio[free_down].mean()
        np.testing.assert_allclose(ratio[free_down], b, rtol=1e-9)
        assert (ratio[~down & (w > lo)] <= b * (1 + 1e-9)).all(), "one that stays would rather fall"
    if not binds and free_up.any() and free_down.any():
        np.testing.assert_allclose(ratio[free_up].mean(), ratio[free_down].mean(), rtol=1e-9)
