import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mixer.core.simplex import onto_box
from mixer.proxies import draws


def test_draws_have_the_moments_of_a_dirichlet_distribution():
    alpha = np.array([0.05, 0.6, 2.0, 0.0])
    drawn = draws.dirichlet(np.random.default_rng(0), np.tile(alpha, (40_000, 1)))
    mean, total = alpha / alpha.sum(), alpha.sum()
    np.testing.assert_allclose(drawn.mean(axis=0), mean, rtol=0, atol=0.006)
    np.testing.assert_allclose(drawn.var(axis=0), mean * (1 - mean) / (total + 1), rtol=0.05, atol=1e-12)
    np.testing.assert_allclose(drawn.sum(axis=1), 1.0, rtol=0, atol=1e-12)
    assert (drawn[:, 3] == 0).all()


def test_tiny_concentrations_give_corners_and_no_nan():
    drawn = draws.dirichlet(np.random.default_rng(1), np.full((2000, 5), 1e-4))
    assert np.isfinite(drawn).all()
    assert (drawn.max(axis=1) > 0.99).mean() > 0.99
    np.testing.assert_allclose(drawn.mean(axis=0), 0.2, rtol=0, atol=0.04)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 9), st.floats(1.0, 4.0))
def test_caps_are_kept_by_the_nearest_mixture(seed, domains, room):
    rng = np.random.default_rng(seed)
    prior_d = rng.dirichlet(np.ones(domains))
    cap_d = np.minimum(1.0, prior_d * room)
    drawn_rd = rng.dirichlet(np.full(domains, 0.7), 20)
    kept_rd = draws.within_caps(drawn_rd, cap_d, prior_d)
    assert (kept_rd >= 0).all()
    assert (kept_rd <= cap_d).all()
    np.testing.assert_allclose(kept_rd.sum(axis=1), 1.0, rtol=0, atol=1e-9)
    for drawn_d, kept_d in zip(drawn_rd, kept_rd, strict=True):
        exact_d = onto_box((drawn_d, np.ones(domains)), np.zeros(domains), cap_d)
        np.testing.assert_allclose(kept_d, exact_d, rtol=0, atol=1e-9)


def test_zeros_get_only_what_the_others_cannot_take():
    kept = draws.within_caps(np.array([[1.0, 0.0, 0.0]]), np.array([0.4, 1.0, 1.0]), np.array([0.2, 0.6, 0.2]))
    np.testing.assert_allclose(kept, [[0.4, 0.45, 0.15]], rtol=0, atol=1e-5)
    kept = draws.within_caps(np.array([[0.7, 0.3, 0.0]]), np.array([0.4, 1.0, 1.0]), np.array([0.2, 0.6, 0.2]))
    np.testing.assert_allclose(kept, [[0.4, 0.6, 0.0]], rtol=0, atol=1e-12)


def test_the_best_draws_are_the_same_in_one_piece_or_many(monkeypatch):
    stream_rd = np.random.default_rng(0).random((1000, 3))

    def run():
        place = [0]

        def draw(count):
            place[0] += count
            return stream_rd[place[0] - count : place[0]]

        return draws.best_draws(draw, lambda w: w[:, 0], num_draws=1000, num_best=7)

    whole, scores = run()
    assert scores.tolist() == np.sort(stream_rd[:, 0])[:7].tolist()
    monkeypatch.setattr(draws, "AT_ONCE", 64)
    assert run()[0].tobytes() == whole.tobytes()


def test_the_simulation_is_the_mean_of_the_best():
    prior = np.array([0.5, 0.3, 0.2])
    slope = np.array([1.0, 0.0, -1.0])
    found = draws.simulated(
        np.random.default_rng(5), prior, np.ones(3), lambda w: w @ slope, num_draws=4000, num_best=16
    )
    drawn = draws.dirichlet(np.random.default_rng(5), np.tile(prior, (4000, 1)))
    expected = drawn[np.argsort(drawn @ slope, kind="stable")[:16]].mean(axis=0)
    assert found.tolist() == pytest.approx(expected.tolist(), abs=1e-15)
    assert found[2] > 0.99


def test_the_search_comes_close_to_a_minimum_inside():
    best = np.array([0.55, 0.25, 0.15, 0.05])

    def score(weights_rd):
        return ((weights_rd - best) ** 2).sum(axis=1)

    uniform = np.full(4, 0.25)
    found = draws.searched(np.random.default_rng(0), uniform, np.ones(4), score, num_draws=3000, num_best=32)
    assert np.abs(found - best).sum() < 0.02
    near = draws.searched(
        np.random.default_rng(0), uniform, np.ones(4), score, num_draws=3000, num_best=3000, near=1e-3
    )
    assert np.abs(near - best).sum() < 0.02


def test_the_search_answers_its_start_if_nothing_is_better():
    start = np.array([0.5, 0.5])
    found = draws.searched(
        np.random.default_rng(0), start, np.ones(2), lambda w: np.abs(w - start).sum(axis=1), num_draws=50, num_best=50
    )
    assert found.tolist() == [0.5, 0.5]
