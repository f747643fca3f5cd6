"""LLM-Shearing's dynamic batch loading (arXiv 2310.06694): every domain is to reach its reference loss together.

After every evaluation, with d_i = validation loss - reference loss of domain i:
    `signed`:   w <- softmax(log w + eta * d)               as the released code does
    `clipped`:  w <- softmax(log w + eta * max(d, 0))       as we remember the paper's text
    w <- (1 - c) w + c / n
from the prior, with eta = 1 and c = 1e-4. References come from a scaling law of the model's size, on the same
validation rows and tokenizer. What it minimises is the largest of all d.

The rule integrates: a reference that cannot be reached adds d to a log weight for ever, and the way back is as
long. So log(w_i / prior_i) is held to +-`max_log_change`; the released code has no such limit.
Other departures: a domain whose loss an evaluation lacks keeps its weight while the others share theirs anew;
evaluations come by windows (released: every 50 steps while pruning, 400 after).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from mixer.core.errors import ConfigError
from mixer.core.mirror import smooth, step
from mixer.core.policies._named import by_name
from mixer.core.ports import Setting, State
from mixer.core.signal import Signal
from mixer.core.simplex import onto_box


@dataclass(frozen=True, slots=True, kw_only=True)
class Shearing:
    NEEDS: ClassVar[frozenset[str]] = frozenset({"evaluation"})
    reference: Mapping[str, float] = field(default_factory=dict[str, float])
    form: Literal["signed", "clipped"] = "signed"
    eta: float = 1.0
    smoothing: float = 1e-4  # c
    max_log_change: float = 6.0  # e^6 is 400 times

    def __post_init__(self) -> None:
        if self.form not in ("signed", "clipped"):
            raise ConfigError(f"policy.form={self.form!r}; it needs to be signed or clipped.")
        if not 0 < self.eta < np.inf:
            raise ConfigError(f"policy.eta={self.eta!r}; it needs to be above 0.")
        if not 0 <= self.smoothing <= 1:
            raise ConfigError(f"policy.smoothing={self.smoothing!r}; it needs to be 0 to 1.")
        if not 0 < self.max_log_change <= 600:
            raise ConfigError(f"policy.max_log_change={self.max_log_change!r}; it needs to be above 0, at most 600.")

    def start(self, setting: Setting) -> State:
        catalog = setting.catalog
        if not self.reference:
            raise ConfigError(
                f"policy 'shearing' has no reference losses of the {len(catalog)} domains. "
                f"Set them by name, as in policy.reference.{catalog.names[0]}=2.1."
            )
        return {
            "reference_d": by_name(catalog, "reference", self.reference),
            "names": np.array(catalog.names),
            "prior_d": setting.prior.weights_d,
            "weights_d": setting.prior.weights_d,
        }

    def update(self, state: State, signal: Signal) -> tuple[State, NDArray[np.float64]]:
        weights_d = state["weights_d"]
        if signal.evaluation is None:
            return state, weights_d
        gap_d = signal.evaluation.at("validation", state["names"].tolist()) - state["reference_d"]
        live_d = np.isfinite(gap_d) & (weights_d > 0)
        if not live_d.any():
            return state, weights_d
        gap_s = gap_d[live_d] if self.form == "signed" else np.maximum(gap_d[live_d], 0.0)
        mass = weights_d[live_d].sum()
        moved_d = weights_d.copy()
        with np.errstate(over="ignore"):
            score_s = np.clip(self.eta * gap_s, -1e300, 1e300)
        moved_d[live_d] = mass * step(weights_d[live_d] / mass, score_s)
        moved_d = smooth(self._held(moved_d, state["prior_d"]), self.smoothing)
        return state | {"weights_d": moved_d}, moved_d

    def _held(self, weights_d: NDArray[np.float64], prior_d: NDArray[np.float64]) -> NDArray[np.float64]:
        """The nearest weights of which none is further from the prior than allowed."""
        factor = np.exp(self.max_log_change)
        lo_d, hi_d = prior_d / factor, np.minimum(prior_d * factor, 1.0)
        if (weights_d >= lo_d).all() and (weights_d <= hi_d).all():
            return weights_d
        return onto_box((weights_d, prior_d), lo_d, hi_d)
