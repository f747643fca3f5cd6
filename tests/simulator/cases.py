"""What every policy is for, in a world where its assumption holds: options, objective, and the regret it may have.

Regret is the share that was missed of what there was to gain over the natural mixture:
    (J(p) - J(p*)) / (J(natural) - J(p*))
p is what the run was trained on, all windows from the first on, or the last window's weights (`judged`), where a
method goes on exploring or goes round its goal; p* is the best constant mixture within the guard rails.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal

import numpy as np

from mixer.core.mixture import Mixture
from mixer.core.policies import load_policy
from tests.simulator.drive import GEOMETRY, RAILS, Run, run
from tests.simulator.world import Floats, MixingWorld, OwnLawWorld, Sensor, World, best, catalog_of, least_worst

WINDOWS = 300
ROWS = WINDOWS * GEOMETRY.window_slots
NUM_ROWS = (900_000, 100_000, 60_000, 2_000_000, 200_000)
NUM = len(NUM_ROWS)
TARGET_PULL = [[5, 1, 0.5, 0, 1], [0.6, 4, 1, 0, 0.3], [0.4, 0.6, 6, 0.1, 0.8]]  # d3 is of no use to any target
OWN_PULL = np.diag([3.6, 3.0, 4.0, 2.5, 2.0])
SETS = NUM + len(TARGET_PULL)
ALL = MixingWorld(
    num_rows=NUM_ROWS, targets=("code", "math", "prose"), floor_s=np.full(SETS, 1.5), height_s=np.full(SETS, -0.5),
    pull_sd=np.concatenate([OWN_PULL + 0.4, np.array(TARGET_PULL)]),
)  # fmt: skip
OWN = MixingWorld(
    num_rows=NUM_ROWS, targets=(), floor_s=np.full(NUM, 1.5), height_s=np.full(NUM, -0.5), pull_sd=OWN_PULL
)
LAWS = np.array([[2.5, 0.8, 0.3], [3.0, 0.7, 0.35], [2.0, 1.0, 0.2], [1.0, 1.2, 0.25], [3.5, 0.6, 0.4]])
OWN_LAWS = OwnLawWorld(num_rows=NUM_ROWS, law_d3=LAWS)
GOAL = np.array([0.3, 0.25, 0.2, 0.1, 0.15])  # where all domains are equally far above their references
REFERENCE = OWN.losses(GOAL, ROWS) - 0.1
NAMES = catalog_of(ALL).names
REFERENCES = dict(zip(NAMES, REFERENCE.tolist(), strict=True))
SKILL_ETA, SPREAD = 0.5, 0.1


@dataclass(frozen=True, kw_only=True)
class Goal:
    """An objective by name: its value at a mixture after all rows, and how its best mixture is found."""

    words: str
    world: World
    value: Callable[[Floats], float]
    losses: Callable[[Floats], Floats] | None = None  # of which the value is the largest

    def best(self) -> Floats:
        low, high = RAILS.floor, RAILS.cap
        return best(self.value, NUM, low, high) if self.losses is None else least_worst(self.losses, NUM, low, high)


def targets_mean(p: Floats) -> float:
    return float(ALL.losses(p, ROWS)[NUM:].mean())


def validation_mean(p: Floats) -> float:
    return float(OWN.losses(p, ROWS).mean())


def gaps(p: Floats) -> Floats:
    return OWN.losses(p, ROWS) - REFERENCE


def skill_potential(p: Floats) -> float:
    """Whose gradient vanishes where p is proportional to prior * exp(3 eta losses(p)): KL - 3 eta sum_i int L_i."""
    prior = Mixture.natural(catalog_of(OWN)).weights_d
    pull, height = np.diag(OWN_PULL), math.exp(-0.5) * (1.0 + ROWS / OWN.half_rows) ** -OWN.alpha
    integral = (1.5 + (NUM - 1) * height) * p + height * (1.0 - np.exp(-pull * p)) / pull
    return float((p * np.log(np.maximum(p, 1e-300) / prior)).sum() - 3 * SKILL_ETA * integral.sum())


def spread_mean(p: Floats) -> float:
    return validation_mean(p) + SPREAD * float((p * np.log(np.maximum(p, 1e-300))).sum())


TARGETS = Goal(words="mean target loss", world=ALL, value=targets_mean)
LOG_TARGETS = Goal(
    words="mean log target loss", world=ALL, value=lambda p: float(np.log(ALL.losses(p, ROWS)[NUM:]).mean())
)
VALIDATION = Goal(words="mean loss of the domains", world=OWN, value=validation_mean)
WORST_GAP = Goal(words="largest gap to a reference", world=OWN, value=lambda p: float(gaps(p).max()), losses=gaps)
SKILLS = Goal(words="its own: KL(p, prior) less eta times losses", world=OWN, value=skill_potential)
SPREAD_OUT = Goal(words="mean loss of the domains - spread * entropy", world=OWN, value=spread_mean)


@dataclass(frozen=True, kw_only=True)
class Case:
    kind: str
    goal: Goal
    options: dict[str, Any] = field(default_factory=dict)
    judged: Literal["run", "last"] = "run"
    most: float | None = 0.05  # the regret it may have; None: it has no such goal, and is shown for comparison
    excess: bool = False
    why: str = ""

    def sensor(self, noise: float = 0.0, seed: int = 0) -> Sensor:
        world = self.goal.world
        reference_d = REFERENCE if self.excess else None
        return Sensor(world=world, catalog=catalog_of(world), noise=noise, seed=seed, reference_d=reference_d)


CASES = {
    f"{case.kind}{' ' + case.why if case.why else ''}": case
    for case in (
        Case(kind="natural", goal=TARGETS, most=None),
        Case(kind="uniform", goal=TARGETS, most=None),
        Case(kind="odm", goal=TARGETS, most=None),
        Case(kind="ado", goal=TARGETS, most=None, options={"refit_windows": 40}),
        Case(kind="ftrl", goal=TARGETS),
        Case(kind="dga", goal=TARGETS),
        Case(kind="doge", goal=TARGETS),
        Case(kind="tikmix_d", goal=TARGETS),
        Case(kind="bids_balance", goal=TARGETS, options={"base": "previous", "rate": 0.3}),
        Case(kind="quad_ucb", goal=TARGETS),
        Case(kind="grape", goal=LOG_TARGETS, most=0.08),  # it equalises progress, which this mean is not
        Case(kind="pilot", goal=TARGETS),
        Case(kind="aioli", goal=TARGETS, judged="last", why="(targets)",
             options={"losses": "target", "ema": None, "eta": 5.0}),
        Case(kind="aioli", goal=VALIDATION, why="(domains)", options={"ema": None, "eta": 5.0}),
        Case(kind="rnb", goal=SPREAD_OUT, judged="last", options={"scale": "none", "spread": SPREAD * NUM}),
        Case(kind="pike", goal=VALIDATION),
        Case(kind="skill_it", goal=SKILLS, judged="last", options={"eta": SKILL_ETA}),
        Case(kind="shearing", goal=WORST_GAP, options={"reference": REFERENCES}),
        Case(kind="doremi", goal=WORST_GAP, excess=True),
    )
}  # fmt: skip


@cache
def best_of(words: str) -> tuple[float, float]:
    """The objective at its best mixture, and at the natural one."""
    goal = next(case.goal for case in CASES.values() if case.goal.words == words)
    return goal.value(goal.best()), goal.value(Mixture.natural(catalog_of(goal.world)).weights_d)


def regret(goal: Goal, p: Floats) -> float:
    least, natural = best_of(goal.words)
    return (goal.value(p) - least) / (natural - least)


def regrets(case: Case, found: Run) -> dict[str, float]:
    return {"run": regret(case.goal, found.share_d), "last": regret(case.goal, found.weights_wd[-1])}


def played(case: Case, *, noise: float = 0.0, seed: int = 0) -> Run:
    return run(load_policy(case.kind, case.options), case.sensor(noise, seed), WINDOWS)
