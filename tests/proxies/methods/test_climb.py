from typing import Any

import numpy as np
import pytest

from mixer.core.errors import ConfigError
from mixer.proxies.methods.climb import Climb
from tests.proxies.worlds import ExpWorld, weights_of

SMALL: dict[str, Any] = {"num_draws": 4000, "num_top": 200, "num_best": 16}


def climbed(world, climb, setting, noise=0.0):
    """The table after all rounds."""
    weights_rd = climb.next_mixtures(None, setting)
    while len(weights_rd) < sum(climb.rounds):
        table = world.measured(weights_rd, setting.seed, noise)
        weights_rd = np.concatenate([weights_rd, climb.next_mixtures(table, setting)])
    return world.measured(weights_rd, setting.seed, noise)


def ends(seed):
    """The true losses of proposals after 64, 32 and 16 runs, and after 112 at once, above the world's minimum."""
    world = ExpWorld.drawn(seed, domains=10, targets=3, spread=3.0)
    setting = world.setting(seed=seed, folds=0)
    least = float(world.total(world.minimum())[0])
    found = []
    for rounds in ((64, 32, 16), (112,)):
        climb = Climb(rounds=rounds, **SMALL)
        proposal = climb.propose(climbed(world, climb, setting, noise=0.005), setting)
        found.append(float(world.total(weights_of(proposal, world.names))[0]) - least)
    return found


def compared(seeds):
    rounds, at_once = np.array([ends(seed) for seed in seeds]).T
    assert np.median(rounds) < np.median(at_once)
    assert np.median(rounds - at_once) < 0
    return np.median(rounds), np.median(at_once)


def test_rounds_of_runs_end_better_than_as_many_at_once():
    compared(range(3))


@pytest.mark.slow
def test_rounds_of_runs_end_better_than_as_many_at_once_in_the_median_of_twenty_worlds():
    rounds, at_once = compared(range(20))
    assert rounds < 0.7 * at_once


def test_a_later_round_lies_where_the_losses_are_low():
    world = ExpWorld.drawn(1, domains=6)
    climb, setting = Climb(rounds=(40, 10), regressor="exp_linear", **SMALL), world.setting()
    first_rd = climb.next_mixtures(None, setting)
    assert first_rd.shape == (40, 6)
    second_rd = climb.next_mixtures(world.measured(first_rd), setting)
    assert second_rd.shape == (10, 6)
    assert world.total(second_rd).max() < np.quantile(world.total(first_rd), 0.05)
    apart = np.abs(second_rd[:, None] - np.concatenate([first_rd, second_rd])[None]).sum(axis=2)
    assert np.sort(apart, axis=1)[:, 1].min() >= climb.least_distance  # the nearest is itself


def test_the_round_is_known_by_the_runs_that_are_done():
    world = ExpWorld.drawn(1, domains=4)
    climb, setting = Climb(rounds=(20, 5, 3), regressor="exp_linear", **SMALL), world.setting(folds=0)
    for runs, count in ((20, 5), (23, 5), (25, 3)):
        assert len(climb.next_mixtures(world.table(runs), setting)) == count
    with pytest.raises(ConfigError, match="round 3 of 3: 28 runs of 28 are done already. Propose"):
        climb.next_mixtures(world.table(28), setting)
    notes = climb.propose(world.table(25), setting).notes
    assert "3 of 28 runs are not done yet" in notes
    assert climb.next_mixtures(None, setting).tobytes() == climb.next_mixtures(None, setting).tobytes()


def test_rounds_keep_the_caps():
    world = ExpWorld.drawn(2, domains=5)
    cap_d = np.minimum(1.0, 1.5 * world.prior_d)
    setting = world.setting(caps=dict(zip(world.names, cap_d.tolist(), strict=True)))
    climb = Climb(rounds=(30, 10), regressor="linear", **SMALL)
    table = climbed(world, climb, setting)
    assert (table.weights_rd <= cap_d).all()
    np.testing.assert_allclose(table.weights_rd.sum(axis=1), 1.0, rtol=0, atol=1e-9)


def test_options_that_make_no_sense_are_refused():
    with pytest.raises(ConfigError, match="rounds="):
        Climb(rounds=())
    with pytest.raises(ConfigError, match="num_top=0"):
        Climb(num_top=0)
