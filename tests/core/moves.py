"""Ways in which weights move from window to window, for the sweeps: mild, wild and hostile ones."""

from collections.abc import Callable

import numpy as np

from mixer.core.mixture import Mixture
from mixer.core.schedule import MixtureSchedule
from tests.core.making import relative

Generator = np.random.Generator
Move = Callable[[MixtureSchedule, Generator], Mixture]  # the next mixture; may look at all that was decided


def size_of(schedule: MixtureSchedule) -> int:
    return len(schedule.last_catalog)


def carries(schedule: MixtureSchedule) -> np.ndarray:
    return schedule.rows[-1].next_carry_d if schedule.rows else np.zeros(size_of(schedule))


def constant(schedule: MixtureSchedule, rng: Generator) -> Mixture:
    return schedule.rows[-1].mixture if schedule.rows else relative(rng.random(size_of(schedule)) + 1e-9)


def random(schedule: MixtureSchedule, rng: Generator) -> Mixture:
    return relative(rng.random(size_of(schedule)) ** 3 + 1e-12)


def sparse(schedule: MixtureSchedule, rng: Generator) -> Mixture:
    num = size_of(schedule)
    weights_d = np.zeros(num)
    weights_d[rng.choice(num, int(rng.integers(1, min(num, 5) + 1)), replace=False)] = rng.random() + 0.01
    return relative(weights_d)


def one_hot(schedule: MixtureSchedule, rng: Generator) -> Mixture:
    return relative(np.arange(size_of(schedule)) == rng.integers(size_of(schedule)))


def walk(schedule: MixtureSchedule, rng: Generator) -> Mixture:
    num = size_of(schedule)
    before_d = schedule.rows[-1].weights_d if schedule.rows else np.full(num, 1.0 / num)
    return relative((before_d + 1e-9) * np.exp(rng.normal(0, 0.3, num)))


def spiky(schedule: MixtureSchedule, rng: Generator) -> Mixture:
    weights_d = rng.random(size_of(schedule)) * 0.01 + 1e-6
    weights_d[rng.integers(len(weights_d))] += float(rng.choice([0.0, 1.0, 100.0]))
    return relative(weights_d)


def nearly_one(schedule: MixtureSchedule, rng: Generator) -> Mixture:
    """Sums that miss 1 by as much as is allowed."""
    weights_d = rng.random(size_of(schedule)) + 1e-9
    return Mixture(weights_d / weights_d.sum() * (1.0 + rng.choice([-9e-10, 9e-10])))


def halving(schedule: MixtureSchedule, rng: Generator) -> Mixture:
    """Looks at the carries and gives all weight to the half of the live domains that are owed most."""
    num = size_of(schedule)
    live_d = schedule.rows[-1].weights_d > 0.5 / num if schedule.rows else np.ones(num, dtype=bool)
    if live_d.sum() <= 1:
        return relative(np.ones(num))
    order = np.argsort(-np.where(live_d, carries(schedule), -np.inf), kind="stable")
    weights_d = np.zeros(num)
    weights_d[order[: (int(live_d.sum()) + 1) // 2]] = 1.0
    return relative(weights_d)


def owed_only(schedule: MixtureSchedule, rng: Generator) -> Mixture:
    """Nothing but what is owed already gets weight: those who were given ahead can never pay."""
    owed_d = carries(schedule) > rng.uniform(0, 0.5)
    if not owed_d.any():
        return relative(np.ones(len(owed_d)))
    return relative(owed_d * (1.0 + (0.01 * rng.random(len(owed_d)))))


def ahead_only(schedule: MixtureSchedule, rng: Generator) -> Mixture:
    """Only who was given ahead gets weight: those who are owed wait for ever."""
    ahead_d = carries(schedule) < 0
    return relative(ahead_d if ahead_d.any() else np.ones(len(ahead_d)))


MILD: list[Move] = [constant, random, walk, spiky, nearly_one]
WILD: list[Move] = [sparse, one_hot]
HOSTILE: list[Move] = [halving, owed_only, ahead_only]


def any_of(schedule: MixtureSchedule, rng: Generator) -> Mixture:
    """Another way in every window."""
    moves = MILD + WILD + HOSTILE
    return moves[int(rng.integers(len(moves)))](schedule, rng)


ALL: list[Move] = [*MILD, *WILD, *HOSTILE, any_of]
