"""GRAPE, group robust multi-target adaptive pretraining (arXiv 2505.20380): domains follow the targets, and the
targets' weights follow whatever improves least.

With a the domains' weights, z the targets', both stepping at a probe, and gradients of the logarithms of the targets'
losses (the released variant `map`):

    a_i <- a_i * exp(lr / mu_domains * sum_t z_t <g_i, grad L_t> / L_t) / norm
    z_t <- z_t * exp(-lr / mu_targets * sum_i a_i <g_i, grad L_t> / L_t) / norm           with the new a

z begins at the target weights given (equal ones without) and is in the state as `task_t`. lr is the learning rate in
force.

Departures. The released code steps a every 10 and z every 100 steps, on single batches, each gradient clipped to norm
1. Here both step at a probe, or z at every `target_every`-th. Clipping cannot be done from inner products; instead the
whole matrix is divided by its deviation (`scale: all`), which keeps the targets' proportions (`scale: none`: raw
products). What is below its noise moves nothing: a domain then counts as the mixture in force, a target's progress as
that of all targets. `target_smoothing` mixes z with equal weights; the paper has none. The variants with a running
mean of losses, and with gaps, are not here.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from mixer.core.benefit import Benefits, Noise, Reading, Scale, require_targets
from mixer.core.errors import ConfigError
from mixer.core.mirror import Floats, answered, begin, check_above_zero, check_share, smooth, step, total, total_t
from mixer.core.ports import Setting, State
from mixer.core.signal import Signal


@dataclass(frozen=True, slots=True, kw_only=True)
class Grape:
    NEEDS: ClassVar[frozenset[str]] = frozenset({"influence"})
    mu_domains: float = 1e-3
    mu_targets: float = 1e-4
    target_every: int = 1
    smoothing: float = 0.0
    target_smoothing: float = 0.0
    target_weights: Mapping[str, float] = field(default_factory=dict[str, float])
    scale: Scale = "all"
    noise: Noise = "zero"
    noise_sigmas: float = 2.0
    memory: float = 0.0
    min_stability: float = 0.5

    def __post_init__(self) -> None:
        check_above_zero("mu_domains", self.mu_domains)
        check_above_zero("mu_targets", self.mu_targets)
        check_share("smoothing", self.smoothing)
        check_share("target_smoothing", self.target_smoothing)
        if self.target_every < 1:
            raise ConfigError(f"policy.target_every={self.target_every}; it needs to be at least 1 probe.")
        assert self.reading  # its options are judged as they are read

    @property
    def reading(self) -> Reading:
        return Reading.of(self)

    def start(self, setting: Setting) -> State:
        require_targets("grape", setting)
        state = begin(setting.prior.weights_d) | self.reading.start(setting)
        return state | {"task_t": state["target_t"].copy(), "score_d": np.zeros(len(setting.catalog))}

    def update(self, state: State, signal: Signal) -> tuple[State, NDArray[np.float64]]:
        found = signal.influence
        if found is None:
            return state, state["weights_d"]
        read = self.reading.read(state, found.benefit_dt, found.benefit_error_dt, found.target_loss_t)
        if read is None:
            return state, state["weights_d"]
        state, benefits = read
        score_d = (benefits.relative_dt * state["task_t"]).sum(1)
        weights_d = smooth(step(state["weights_d"], score_d, found.rate / self.mu_domains), self.smoothing)
        if int(state["probes"]) % self.target_every == 0:
            state |= {"task_t": self._tasks(state, benefits, weights_d, found.rate)}
        return answered(state, weights_d) | {"score_d": score_d}, weights_d

    def _tasks(self, state: State, benefits: Benefits, weights_d: Floats, rate: float) -> Floats:
        """The targets' next weights; those that the new mixture does more for lose some."""
        task_t = state["task_t"]
        seen_t = state["known_dt"].any(0) & (task_t > 0)
        progress_t = total_t(weights_d[:, None] * benefits.value_dt)
        error_t = np.sqrt(total_t((weights_d[:, None] * benefits.error_dt) ** 2))
        mean = total((task_t * progress_t)[seen_t]) / total(task_t[seen_t])
        ahead_t = self.reading.heard(np.where(seen_t, progress_t - mean, 0.0), error_t)
        return smooth(step(task_t, -ahead_t, rate / self.mu_targets), self.target_smoothing)
