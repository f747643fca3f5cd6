"""R&B, regroup and balance (arXiv 2505.00358), the balancing: weights from the Gram matrix of the domains' gradients.

    w = softmax(Gamma p / spread)          that is, the largest  <w, Gamma p> + spread * entropy(w)

where Gamma[i, j] = <g_i, g_j>, and p is what the model is judged by, as shares of the domains themselves: so it needs
no target text. Every answer starts anew from uniform weights (`base: prior`: from the prior).

`scale` makes `spread` mean the same for any model: `mean` divides Gamma by the mean of its diagonal, `cosine` takes
the cosines (gradients of no certain length then count as unknown), `none` is the paper's. Diagonals are without bias.

Departures. Regrouping is not here: that is another catalog of the corpus. The paper collects gradients while it
trains, of the last layers; which layers and rows is the probe's affair. Entries below their noise are taken to be as
the mixture in force (`mixer.core.benefit`). `memory` averages Gamma p over probes; the paper knows none. We know the
idea from the paper's abstract; the formula is our recollection of it, and the paper's spread is not known to us.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from mixer.core.benefit import Noise, Reading
from mixer.core.errors import ConfigError
from mixer.core.mirror import (
    TINY,
    Floats,
    answered,
    begin,
    check_above_zero,
    check_share,
    normalised,
    smooth,
    step,
    total,
    total_t,
)
from mixer.core.mixture import unknown_domain
from mixer.core.ports import Setting, State
from mixer.core.signal import Signal


@dataclass(frozen=True, slots=True, kw_only=True)
class Rnb:
    NEEDS: ClassVar[frozenset[str]] = frozenset({"gram"})
    spread: float = 0.5
    scale: Literal["mean", "cosine", "none"] = "mean"
    base: Literal["uniform", "prior"] = "uniform"
    judged_by: Mapping[str, float] = field(default_factory=dict[str, float])  # p by name, others 0; without: uniform
    smoothing: float = 0.0
    memory: float = 0.0
    noise: Noise = "zero"
    noise_sigmas: float = 2.0

    def __post_init__(self) -> None:
        check_above_zero("spread", self.spread)
        check_share("smoothing", self.smoothing)
        check_share("memory", self.memory)
        if self.scale not in ("mean", "cosine", "none"):
            raise ConfigError(f"policy.scale={self.scale!r}; it needs to be mean, cosine or none.")
        if self.base not in ("uniform", "prior"):
            raise ConfigError(f"policy.base={self.base!r}; it needs to be uniform or prior.")
        for name, share in self.judged_by.items():
            if not 0 <= share < np.inf:
                raise ConfigError(f"policy.judged_by.{name}={share!r}; it needs to be a finite number, 0 or more.")
        if self.judged_by and not any(self.judged_by.values()):
            raise ConfigError("policy.judged_by is 0 for every domain. Give one of them some share.")
        assert self._reading  # its options are judged as they are read

    @property
    def _reading(self) -> Reading:
        return Reading(scale="none", noise=self.noise, noise_sigmas=self.noise_sigmas)

    def start(self, setting: Setting) -> State:
        names = setting.catalog.names
        for name in self.judged_by:
            if name not in setting.catalog.index:
                raise ConfigError(f"policy.judged_by names the {unknown_domain(name, names)}")
        judged_d = (
            np.array([self.judged_by.get(name, 0.0) for name in names]) if self.judged_by else np.ones(len(names))
        )
        own = {
            "judged_d": normalised(judged_d / judged_d.max()),
            "score_d": np.zeros(len(names)),
            "probes": np.array(0, dtype=np.int64),
        }
        return begin(setting.prior.weights_d) | own

    def update(self, state: State, signal: Signal) -> tuple[State, NDArray[np.float64]]:
        found = signal.influence
        if found is None or found.gram_dd is None:
            return state, state["weights_d"]
        size_d = self._sizes(found.gram_dd)
        gram_dd = found.gram_dd / size_d[:, None] / size_d
        error_dd = np.zeros_like(gram_dd) if found.gram_error_dd is None else found.gram_error_dd
        if not np.isfinite(gram_dd[:, state["judged_d"] > 0]).any():
            return state, state["weights_d"]
        read = self._reading.once(state["weights_d"], gram_dd, error_dd / size_d[:, None] / size_d)
        score_d = total_t((read.relative_dt * state["judged_d"]).T)
        if int(state["probes"]):
            score_d = self.memory * state["score_d"] + (1.0 - self.memory) * score_d
        base_d = state["prior_d"] if self.base == "prior" else np.full(len(score_d), 1.0 / len(score_d))
        weights_d = smooth(step(base_d, score_d, 1.0 / self.spread), self.smoothing)
        probes = np.array(int(state["probes"]) + 1, dtype=np.int64)
        return answered(state, weights_d) | {"score_d": score_d, "probes": probes}, weights_d

    def _sizes(self, gram_dd: Floats) -> Floats:
        """By what rows and columns are divided; NaN where the length is not known."""
        square_d = np.diagonal(gram_dd)
        if self.scale == "cosine":
            return np.sqrt(np.where(square_d > TINY, square_d, np.nan))
        known_d = np.isfinite(square_d)
        mean = total(square_d[known_d]) / max(int(known_d.sum()), 1) if self.scale == "mean" else 1.0
        return np.full(len(square_d), np.sqrt(mean) if mean > TINY else np.nan)
