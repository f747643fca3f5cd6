"""The step of mirror descent, and what is remembered of answers."""

import numpy as np
import pytest

from mixer.core import mirror
from mixer.core.errors import ConfigError


def close(found, expected, atol=1e-12):
    np.testing.assert_allclose(found, expected, rtol=0, atol=atol)


def test_step_by_hand():
    moved = mirror.step(np.array([0.5, 0.3, 0.2]), np.array([0.2, -0.1, 0.05]))
    close(mirror.smooth(moved, 1e-4), [0.559020, 0.248498, 0.192483], 5e-7)
    close(mirror.step(np.array([0.5, 0.25, 0.25]), np.log([1.0, 4.0, 1.0]), 0.5), [0.4, 0.4, 0.2])


def test_a_step_is_the_maximum_of_score_less_divergence():
    rng = np.random.default_rng(0)
    base, score = rng.dirichlet(np.ones(6)), rng.normal(size=6)

    def value(w):
        return 0.7 * score @ w - (w * np.log(w / base)).sum()

    best = mirror.step(base, score, 0.7)
    for _ in range(200):
        assert value(best) >= value(0.99 * best + 0.01 * rng.dirichlet(np.ones(6)))


def test_what_is_added_to_all_scores_changes_nothing_and_no_score_overflows():
    base = np.array([0.5, 0.3, 0.2])
    close(mirror.step(base, np.array([1.0, 2.0, 3.0])), mirror.step(base, np.array([1.0, 2.0, 3.0]) - 1e3))
    for score, expected in (([1e308, 0.0, -1e308], [1, 0, 0]), ([1e308, 1e308, 0.0], [0.625, 0.375, 0])):
        for rate in (1.0, 1e10):
            close(mirror.step(base, np.array(score), rate), expected, 1e-11)


def test_no_weight_vanishes_for_good_but_what_the_base_leaves_out_stays_out():
    low = mirror.step(np.array([0.5, 0.5, 0.0]), np.array([0.0, -1e4, 1e4]))
    close(low, [1.0 - 1e-12, 1e-12, 0.0], 1e-15)
    assert low[2] == 0.0
    assert mirror.step(low, np.array([0.0, 60.0, 0.0]))[1] > 0.99


def test_smoothing():
    close(mirror.smooth(np.array([1.0, 0.0, 0.0, 0.0]), 0.2), [0.85, 0.05, 0.05, 0.05])
    close(mirror.smooth(np.array([0.7, 0.3]), 0.0), [0.7, 0.3], 0)


def test_no_order_of_the_domains_changes_a_bit():
    rng = np.random.default_rng(1)
    for size in (2, 3, 17, 500):
        base, score, order = rng.dirichlet(np.ones(size)), rng.normal(size=size) * 10, rng.permutation(size)
        moved = mirror.step(base, score, 0.3)[order]
        assert moved.tolist() == mirror.step(base[order], score[order], 0.3).tolist()


def test_bases_and_the_mean_of_answers():
    prior, one, two = np.array([0.5, 0.5]), np.array([0.6, 0.4]), np.array([0.2, 0.8])
    state = mirror.begin(prior)
    for base in mirror.BASES:
        assert mirror.base_of(state, base).tolist() == [0.5, 0.5]
    state = mirror.answered(mirror.answered(state, one), two)
    close(mirror.base_of(state, "previous"), two)
    close(mirror.base_of(state, "prior"), prior)
    close(mirror.base_of(state, "average"), [0.4, 0.6])  # of the answers; the prior was none
    assert int(state["updates"]) == 2
    with pytest.raises(ConfigError, match="policy.base='last'"):
        mirror.check_base("last")
