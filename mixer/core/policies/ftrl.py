"""Mirror descent toward targets, follow the regularised leader: the plain form of what the others do in their ways.

    score_i = sum_t u_t C[i, t];      w <- smooth(base * exp(rate * score) / norm)

with u the target weights and C the benefits as `mixer.core.benefit` reads them: relative to the mixture in force,
without what is below its noise. The score may be chosen: `mean` is the one above; `log` takes the benefits to the
logarithms of the targets' losses, so that a target counts by its relative progress; `worst` is the mean with the
target weights multiplied by exp(-progress_t / worst_spread), where progress_t = sum_i w_i B[i, t]: it leans to the
targets that the mixture in force does least for.

From the `previous` answer scores add up over probes, and a domain that is somewhat better keeps on growing; the rate
is then how far one probe moves. From the `prior` or the `average` answer they do not add up, and the rate is how far
from there the mixture may go. `smoothing` keeps domains from vanishing: their gradients are measured at any weight,
but a weight of nearly 0 takes long to come back.

No paper: exponentiated gradient is textbook. The weights here are those before the guard rails.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from mixer.core.benefit import Benefits, Noise, Reading, Scale, require_targets
from mixer.core.errors import ConfigError
from mixer.core.mirror import (
    Base,
    Floats,
    answered,
    base_of,
    begin,
    check_above_zero,
    check_base,
    check_share,
    normalised,
    smooth,
    step,
    total_t,
)
from mixer.core.ports import Setting, State
from mixer.core.signal import Signal

SCORES = ("mean", "log", "worst")


@dataclass(frozen=True, slots=True, kw_only=True)
class Ftrl:
    NEEDS: ClassVar[frozenset[str]] = frozenset({"influence"})
    score: Literal["mean", "log", "worst"] = "mean"
    rate: float = 0.5
    base: Base = "previous"
    smoothing: float = 0.0
    worst_spread: float = 1.0
    target_weights: Mapping[str, float] = field(default_factory=dict[str, float])
    scale: Scale = "columns"
    noise: Noise = "zero"
    noise_sigmas: float = 2.0
    memory: float = 0.0
    min_stability: float = 0.5

    def __post_init__(self) -> None:
        if self.score not in SCORES:
            raise ConfigError(f"policy.score={self.score!r}; it needs to be one of {', '.join(SCORES)}.")
        check_above_zero("rate", self.rate)
        check_above_zero("worst_spread", self.worst_spread)
        check_base(self.base)
        check_share("smoothing", self.smoothing)
        assert self.reading  # its options are judged as they are read

    @property
    def reading(self) -> Reading:
        return Reading.of(self)

    def start(self, setting: Setting) -> State:
        require_targets("ftrl", setting)
        state = begin(setting.prior.weights_d) | self.reading.start(setting)
        return state | {"score_d": np.zeros(len(setting.catalog))}

    def update(self, state: State, signal: Signal) -> tuple[State, NDArray[np.float64]]:
        found = signal.influence
        if found is None:
            return state, state["weights_d"]
        loss_t = found.target_loss_t if self.score == "log" else None
        read = self.reading.read(state, found.benefit_dt, found.benefit_error_dt, loss_t)
        if read is None:
            return state, state["weights_d"]
        state, benefits = read
        score_d = (benefits.relative_dt * self._leaning(state, benefits)).sum(1)
        weights_d = smooth(step(base_of(state, self.base), score_d, self.rate), self.smoothing)
        return answered(state, weights_d) | {"score_d": score_d}, weights_d

    def _leaning(self, state: State, benefits: Benefits) -> Floats:
        if self.score != "worst":
            return state["target_t"]
        progress_t = total_t(state["weights_d"][:, None] * benefits.value_dt)
        return normalised(step(state["target_t"], -progress_t, 1.0 / self.worst_spread))
