"""DGA, dynamic gradient alignment (arXiv 2410.02498): weights follow the alignment with a specific target's gradient.

    a_i = sum_t u_t <g_i, G_t>;     v <- v * exp(rate * a) / norm;     w = average * w + (1 - average) * v

After every probe: v is the mirror step, w its running average over probes, which is the answer. Both begin at the
prior.

Departures. The paper has one specific set and one batch a domain, and takes the plain inner product; here targets
are weighted, alignment is what the probe measured (its metric may be the optimizer's), relative to the mixture in
force and without what is below its noise (`mixer.core.benefit`). A difference that is common to all domains leaves v
as it is. By default columns are divided by their deviations, since `rate` means nothing else across models; the
paper's product is `scale: none`. We know the paper's idea from its abstract; the form of the running average and its
coefficients are our recollection. Updates come with probes, not every so many steps.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from mixer.core.benefit import Noise, Reading, Scale, require_targets
from mixer.core.mirror import answered, begin, check_above_zero, check_share, smooth, step
from mixer.core.ports import Setting, State
from mixer.core.signal import Signal


@dataclass(frozen=True, slots=True, kw_only=True)
class Dga:
    NEEDS: ClassVar[frozenset[str]] = frozenset({"influence"})
    rate: float = 0.5
    average: float = 0.5  # of the old answer; 0: the step itself is the answer
    smoothing: float = 0.0
    target_weights: Mapping[str, float] = field(default_factory=dict[str, float])
    scale: Scale = "columns"
    noise: Noise = "zero"
    noise_sigmas: float = 2.0
    memory: float = 0.0
    min_stability: float = 0.5

    def __post_init__(self) -> None:
        check_above_zero("rate", self.rate)
        check_share("average", self.average)
        check_share("smoothing", self.smoothing)
        assert self.reading  # its options are judged as they are read

    @property
    def reading(self) -> Reading:
        return Reading.of(self)

    def start(self, setting: Setting) -> State:
        require_targets("dga", setting)
        prior_d = setting.prior.weights_d
        own = {"step_d": prior_d.copy(), "score_d": np.zeros(len(prior_d))}
        return begin(prior_d) | self.reading.start(setting) | own

    def update(self, state: State, signal: Signal) -> tuple[State, NDArray[np.float64]]:
        found = signal.influence
        if found is None:
            return state, state["weights_d"]
        read = self.reading.read(state, found.benefit_dt, found.benefit_error_dt)
        if read is None:
            return state, state["weights_d"]
        state, benefits = read
        score_d = (benefits.relative_dt * state["target_t"]).sum(1)
        step_d = smooth(step(state["step_d"], score_d, self.rate), self.smoothing)
        weights_d = self.average * state["weights_d"] + (1.0 - self.average) * step_d
        return answered(state, weights_d) | {"step_d": step_d, "score_d": score_d}, weights_d
