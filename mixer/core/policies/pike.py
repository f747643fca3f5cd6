"""PiKE, positive gradient interactions (arXiv 2502.06244): shares from the norms and the noise of gradients.

    w_k <- w_k * exp(norm_rate * |g_k|^2 - noise_rate / (2 b) * sigma_k^2) / norm

with sigma_k^2 the variance of one row's gradient and b the rows of a step. It asks for no targets: where gradients of
domains rarely oppose each other, a long and sure gradient promises the largest fall of the loss.

`scale: mean` divides norms and variances by the mean norm, so that the rates mean the same for any model; `none` is
the paper's. Norms are without bias, and one below its noise is taken to be the mean. `fairness` f above 0 multiplies a
domain's exponent by (L_k / mean L)^f, so that domains that lag behind count more.

Departures. We know the idea from the paper's abstract; the update and its two rates are our recollection, the form of
the fair variant is ours, and the paper's coefficients are not known to us. It prefers long gradients, also where they
are of no use; nothing here knows targets.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from mixer.core.benefit import Noise, Reading
from mixer.core.errors import ConfigError
from mixer.core.influence import Influence
from mixer.core.mirror import TINY, Floats, answered, begin, check_share, smooth, step, total
from mixer.core.ports import Setting, State
from mixer.core.signal import Signal


@dataclass(frozen=True, slots=True, kw_only=True)
class Pike:
    NEEDS: ClassVar[frozenset[str]] = frozenset({"gram"})
    norm_rate: float = 0.1
    noise_rate: float = 0.1
    batch_rows: int = 512  # of a step
    scale: Literal["mean", "none"] = "mean"
    fairness: float = 0.0
    smoothing: float = 0.0
    noise: Noise = "zero"
    noise_sigmas: float = 2.0

    def __post_init__(self) -> None:
        for key, value in (("norm_rate", self.norm_rate), ("noise_rate", self.noise_rate), ("fairness", self.fairness)):
            if not 0 <= value < np.inf:
                raise ConfigError(f"policy.{key}={value!r}; it needs to be a finite number, 0 or more.")
        if self.batch_rows < 1:
            raise ConfigError(f"policy.batch_rows={self.batch_rows}; it needs to be at least 1.")
        if self.scale not in ("mean", "none"):
            raise ConfigError(f"policy.scale={self.scale!r}; it needs to be mean or none.")
        check_share("smoothing", self.smoothing)
        assert self._reading  # its options are judged as they are read

    @property
    def _reading(self) -> Reading:
        return Reading(scale="none", noise=self.noise, noise_sigmas=self.noise_sigmas)

    def start(self, setting: Setting) -> State:
        nothing_d = np.zeros(len(setting.catalog))
        own = {"norm_d": nothing_d, "noise_d": nothing_d.copy(), "score_d": nothing_d.copy()}
        return begin(setting.prior.weights_d) | own

    def update(self, state: State, signal: Signal) -> tuple[State, NDArray[np.float64]]:
        found = signal.influence
        if found is None or found.gram_dd is None:
            return state, state["weights_d"]
        square_d = np.diagonal(found.gram_dd)
        if not np.isfinite(square_d).any():
            return state, state["weights_d"]
        error_d = np.zeros_like(square_d) if found.gram_error_dd is None else np.diagonal(found.gram_error_dd)
        read = self._reading.once(state["weights_d"], square_d[:, None], error_d[:, None])
        norm_d = np.maximum(read.value_dt[:, 0], 0.0)
        noise_d = _filled(np.full_like(norm_d, np.nan) if found.noise_d is None else found.noise_d)
        if self.scale == "mean":
            mean = total(norm_d) / len(norm_d)
            if mean <= TINY:
                return state, state["weights_d"]
            norm_d, noise_d = norm_d / mean, noise_d / mean
        score_d = self.norm_rate * norm_d - self.noise_rate / (2.0 * self.batch_rows) * noise_d
        score_d = score_d * self._fair(found)
        weights_d = smooth(step(state["weights_d"], score_d), self.smoothing)
        return answered(state, weights_d) | {"norm_d": norm_d, "noise_d": noise_d, "score_d": score_d}, weights_d

    def _fair(self, found: Influence) -> Floats:
        loss_d = _filled(np.where(found.loss_d > 0, found.loss_d, np.nan))
        mean = total(loss_d) / len(loss_d)
        return (loss_d / mean) ** self.fairness if self.fairness > 0 and mean > 0 else np.ones(len(loss_d))


def _filled(values_d: Floats) -> Floats:
    """What is not known as the mean of what is; 0 if nothing is."""
    known_d = np.isfinite(values_d)
    return np.where(known_d, values_d, total(values_d[known_d]) / max(int(known_d.sum()), 1))
