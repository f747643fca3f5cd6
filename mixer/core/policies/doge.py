"""DoGE, domain reweighting with generalisation estimation (arXiv 2310.15393): up with domains whose gradients align.

    s_i = sum_t A[i, t];       s_i <- clip(lr * s_i / (mean_k |g_k| + 1e-6), lr * least, lr * most)
    w <- smooth(w * exp(s / mu) / norm, smoothing)

A is the domains' products with the targets' gradients. `toward: domains` makes the domains themselves the targets,
from their Gram matrix, and drops each one's product with itself, as the authors' code does. lr is the learning rate
in force, so the schedule anneals the mixing as well. Norms are without bias. With target weights u each product
counts len(targets) * u_t times, so that equal weights make the plain sum. `average_d` of the state is the mean of all
answers, which is what the paper trains the large model on.

Departures. The code clips each domain's gradient to norm 5 before anything else; from inner products of means alone
this cannot be done after the fact, so long gradients count fully here (what `most` bounds is the score). The code
updates at every step of a proxy whose batches hold all domains, and sums gradients by the new weights; here after each
probe of the run at hand, whose rows are drawn by the weights. The probe's metric may be the optimizer's, and what is
below its noise is taken to be as good as the mixture in force (`mixer.core.benefit`). Numbers from the release.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from mixer.core.benefit import Noise, Reading, require_targets, target_weights
from mixer.core.errors import ConfigError
from mixer.core.influence import Influence
from mixer.core.mirror import Floats, answered, begin, check_above_zero, check_share, smooth, step, total, total_t
from mixer.core.ports import Setting, State
from mixer.core.signal import Signal


@dataclass(frozen=True, slots=True, kw_only=True)
class Doge:
    NEEDS: ClassVar[frozenset[str]] = frozenset({"influence", "gram"})
    toward: Literal["targets", "domains"] = "targets"
    mu: float = 0.01
    least: float = 0.0
    most: float = 5.0
    smoothing: float = 0.0
    target_weights: Mapping[str, float] = field(default_factory=dict[str, float])
    noise: Noise = "zero"
    noise_sigmas: float = 2.0

    def __post_init__(self) -> None:
        if self.toward not in ("targets", "domains"):
            raise ConfigError(f"policy.toward={self.toward!r}; it needs to be targets or domains.")
        if self.toward == "domains" and self.target_weights:
            raise ConfigError("policy.target_weights are given, and toward=domains has no targets. Leave one out.")
        check_above_zero("mu", self.mu)
        check_share("smoothing", self.smoothing)
        if not -np.inf < self.least < self.most < np.inf:
            raise ConfigError(f"policy.least={self.least!r}, most={self.most!r}; least needs to be below most.")
        assert self._reading  # its options are judged as they are read

    @property
    def _reading(self) -> Reading:
        options = {"scale": "none", "noise": self.noise, "noise_sigmas": self.noise_sigmas}
        return Reading(target_weights=self.target_weights, **options)  # type: ignore[arg-type]  # judged by Reading

    def start(self, setting: Setting) -> State:
        if self.toward == "targets":
            require_targets("doge", setting)
        own = {
            "target_t": target_weights(self.target_weights, setting.targets),
            "score_d": np.zeros(len(setting.catalog)),
        }
        return begin(setting.prior.weights_d) | own

    def update(self, state: State, signal: Signal) -> tuple[State, NDArray[np.float64]]:
        found = signal.influence
        if found is None or found.gram_dd is None:
            return state, state["weights_d"]
        score_d, norm = self._scores(state, found), _mean_norm(found.gram_dd)
        if score_d is None or norm is None:
            return state, state["weights_d"]
        score_d = found.rate * np.clip(score_d / (norm + 1e-6), self.least, self.most)
        weights_d = smooth(step(state["weights_d"], score_d, 1.0 / self.mu), self.smoothing)
        return answered(state, weights_d) | {"score_d": score_d}, weights_d

    def _scores(self, state: State, found: Influence) -> Floats | None:
        """Each domain's sum of products; None if nothing was measured."""
        products_dt, error_dt, target_t = found.benefit_dt, found.benefit_error_dt, state["target_t"]
        if self.toward == "domains":
            assert found.gram_dd is not None
            products_dt, target_t = found.gram_dd, np.full(len(found.gram_dd), 1.0 / len(found.gram_dd))
            error_dt = np.zeros_like(products_dt) if found.gram_error_dd is None else found.gram_error_dd
        if not np.isfinite(products_dt[:, target_t > 0]).any():
            return None
        counted_dt = self._reading.once(state["weights_d"], products_dt, error_dt).value_dt * (target_t * len(target_t))
        if self.toward == "domains":
            np.fill_diagonal(counted_dt, 0.0)
        return total_t(counted_dt.T)


def _mean_norm(gram_dd: Floats) -> float | None:
    square_d = np.diagonal(gram_dd)
    known_d = np.isfinite(square_d)
    return total(np.sqrt(np.maximum(square_d[known_d], 0.0))) / int(known_d.sum()) if known_d.any() else None
