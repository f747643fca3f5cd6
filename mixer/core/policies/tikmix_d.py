"""TiKMiX-D (arXiv 2508.17677): the mixture of the largest, most even gain by the group influence of this very model.

    maximise   gain * sum_t P_t(w)  -  spread * std_t(P_t(w))  +  entropy * H(w),       P_t(w) = sum_i w_i B[i, t]
    such that  no target does worse than under the mixture in force: P_t(w) >= P_t(w_now)

with each column of B divided by its deviation. `max_shift` bounds the L1 distance from the mixture in force, beside
the rails' own bound: influence is a statement about small changes. Target weights u multiply P_t by len(targets) * u_t
in the sum and weigh the deviation. Where no mixture is better (a degenerate program included), the answer stays.

It decides when a probe came and at no other time, and tracks how stable the rankings of domains are (`stability`:
Spearman's correlation with the probe before), since the later version of the paper rests on their being so; how often
to probe is the run's affair. What is below its noise counts as the mixture in force (`mixer.core.benefit`), and with
`memory` above 0 successive probes are averaged while the ranking holds.

Departures. We know the headline and the definition of group influence, not the method's section: the three terms are
our recollection, their coefficients (1, 1, 0.1) are ours, and so is the normalisation by columns. The paper's solver
is of the SLSQP kind; ours solves the same program in its dual (`mixer.core.balance`): few numbers, whatever the count
of domains. Which layers, rows and curvature make up B is the probe's affair. Not the paper's code.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from mixer.core.balance import Program, balanced
from mixer.core.benefit import Noise, Reading, Scale, require_targets
from mixer.core.errors import ConfigError
from mixer.core.mirror import Floats, answered, begin, check_share, smooth, total_t
from mixer.core.ports import Setting, State
from mixer.core.signal import Signal


@dataclass(frozen=True, slots=True, kw_only=True)
class TikmixD:
    NEEDS: ClassVar[frozenset[str]] = frozenset({"influence"})
    gain: float = 1.0
    spread: float = 1.0
    entropy: float = 0.1
    keep_targets: bool = True  # the Pareto floor
    max_shift: float | None = None
    smoothing: float = 0.0
    target_weights: Mapping[str, float] = field(default_factory=dict[str, float])
    scale: Scale = "columns"
    noise: Noise = "zero"
    noise_sigmas: float = 2.0
    memory: float = 0.0
    min_stability: float = 0.5

    def __post_init__(self) -> None:
        for key, value in (("gain", self.gain), ("spread", self.spread), ("entropy", self.entropy)):
            if not 0 <= value < np.inf:
                raise ConfigError(f"policy.{key}={value!r}; it needs to be a finite number, 0 or more.")
        if not self.gain + self.spread + self.entropy > 0:
            raise ConfigError("policy.gain, spread and entropy are all 0. Raise one: there is nothing to maximise.")
        if self.max_shift is not None and not 0 < self.max_shift <= 2:
            raise ConfigError(f"policy.max_shift={self.max_shift!r}; it needs to be above 0 and at most 2, or null.")
        check_share("smoothing", self.smoothing)
        assert self.reading  # its options are judged as they are read

    @property
    def reading(self) -> Reading:
        return Reading.of(self)

    def start(self, setting: Setting) -> State:
        require_targets("tikmix_d", setting)
        state = begin(setting.prior.weights_d) | self.reading.start(setting)
        return state | {"progress_t": np.zeros(len(setting.targets))}

    def update(self, state: State, signal: Signal) -> tuple[State, NDArray[np.float64]]:
        found = signal.influence
        if found is None:
            return state, state["weights_d"]
        read = self.reading.read(state, found.benefit_dt, found.benefit_error_dt)
        if read is None:
            return state, state["weights_d"]
        state, benefits = read
        weights_d = smooth(self._solved(benefits.value_dt, state), self.smoothing)
        progress_t = total_t((weights_d - state["weights_d"])[:, None] * benefits.value_dt)  # as predicted
        return answered(state, weights_d) | {"progress_t": progress_t}, weights_d

    def _solved(self, value_dt: Floats, state: State) -> Floats:
        """The program's answer, for the domains in an order of their numbers and not of their names.

        A solver's sums depend on the order of their terms in the last bits, and its steps on those.
        """
        counts_t = state["target_t"] > 0
        order_d = np.lexsort((state["weights_d"], *value_dt[:, counts_t].T))
        program = Program(
            benefit_dt=value_dt[order_d][:, counts_t],
            start_d=state["weights_d"][order_d],
            target_t=state["target_t"][counts_t],
            gain=self.gain,
            spread=self.spread,
            entropy=self.entropy,
            keep_targets=self.keep_targets,
            max_shift=self.max_shift,
        )
        weights_d = np.empty(len(order_d))
        weights_d[order_d] = balanced(program)
        return weights_d
