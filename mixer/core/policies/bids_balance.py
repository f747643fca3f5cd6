"""BIDS at the level of domains (arXiv 2501.12147): the most under-represented target is served first.

Columns of B become z-scores A. Domains are taken one by one, each time the one that lifts some target the furthest
above what those taken already give it on average:

    argmax over the rest of  max_t (A[i, t] - mean over the taken of A[k, t])          the first: the largest A of all

and their order makes the weights, by one mirror step from the base:

    score_i = 1 - 2 rank_i / (D - 1);      w = base * exp(rate * score) / norm

so that the first domain gains what the last one loses, whatever the benefits' sizes. Domains of equal claim are taken
together and share the mean of their ranks. A target of weight 0 has no say; other target weights multiply the lift.

Departures. BIDS picks a subset of rows by the influence on single validation instances; rows within a domain are all
one here, instances are targets, and there is no subset but a tilt. We know the idea from the paper's abstract; the
greedy rule is our recollection. What is below its noise has the score of the mixture in force (`mixer.core.benefit`).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from mixer.core.benefit import Noise, Reading, require_targets
from mixer.core.mirror import (
    Base,
    Floats,
    answered,
    base_of,
    begin,
    check_above_zero,
    check_base,
    check_share,
    smooth,
    step,
    total_t,
)
from mixer.core.ports import Setting, State
from mixer.core.signal import Signal

TIE = 1e-9  # standard deviations


@dataclass(frozen=True, slots=True, kw_only=True)
class BidsBalance:
    NEEDS: ClassVar[frozenset[str]] = frozenset({"influence"})
    rate: float = 1.0
    base: Base = "prior"
    smoothing: float = 0.0
    target_weights: Mapping[str, float] = field(default_factory=dict[str, float])
    noise: Noise = "zero"
    noise_sigmas: float = 2.0
    memory: float = 0.0
    min_stability: float = 0.5

    def __post_init__(self) -> None:
        check_above_zero("rate", self.rate)
        check_base(self.base)
        check_share("smoothing", self.smoothing)
        assert self._reading  # its options are judged as they are read

    @property
    def _reading(self) -> Reading:
        return Reading(
            target_weights=self.target_weights,
            scale="columns",
            noise=self.noise,
            noise_sigmas=self.noise_sigmas,
            memory=self.memory,
            min_stability=self.min_stability,
        )

    def start(self, setting: Setting) -> State:
        require_targets("bids_balance", setting)
        state = begin(setting.prior.weights_d) | self._reading.start(setting)
        return state | {"rank_d": np.zeros(len(setting.catalog))}

    def update(self, state: State, signal: Signal) -> tuple[State, NDArray[np.float64]]:
        found = signal.influence
        if found is None:
            return state, state["weights_d"]
        read = self._reading.read(state, found.benefit_dt, found.benefit_error_dt)
        if read is None:
            return state, state["weights_d"]
        state, benefits = read
        centred_dt = benefits.relative_dt - total_t(benefits.relative_dt) / len(benefits.relative_dt)
        rank_d = ranks(centred_dt, state["target_t"])
        score_d = 1.0 - 2.0 * rank_d / max(len(rank_d) - 1, 1) if len(rank_d) > 1 else np.zeros(1)
        weights_d = smooth(step(base_of(state, self.base), score_d, self.rate), self.smoothing)
        return answered(state, weights_d) | {"rank_d": rank_d}, weights_d


def ranks(score_dt: Floats, target_t: Floats) -> Floats:
    """In which place each domain is taken, from 0; ties at the mean of their places."""
    score_dt = score_dt[:, target_t > 0]
    say_t = target_t[target_t > 0] / target_t.max()
    rank_d, waiting_d = np.zeros(len(score_dt)), np.ones(len(score_dt), dtype=np.bool_)
    taken_t, taken = np.zeros(len(say_t)), 0
    while waiting_d.any():
        lift_d = ((score_dt - taken_t / max(taken, 1)) * say_t).max(1)
        now_d = waiting_d & (lift_d >= lift_d[waiting_d].max() - TIE)
        count = int(now_d.sum())
        rank_d[now_d] = taken + (count - 1) / 2
        taken_t, taken = taken_t + total_t(score_dt[now_d]), taken + count
        waiting_d &= ~now_d
    return rank_d
