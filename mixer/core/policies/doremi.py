"""DoReMi (arXiv 2305.10429) in its online form: weight moves to domains whose loss exceeds a reference model's.

After every window, with lambda_i the mean over the domain's tokens of max(loss - reference loss, 0):
    w <- softmax(log w + eta * lambda);    w <- (1 - c) w + c / K;    mean <- the mean of all w so far
from a uniform w. A domain without rows in a window keeps its last lambda, before its first row `unseen_excess`.

The excess comes from workers with a reference model (`Signal.excess_d`, each token held to 0 before the average, as
the paper has it), else from `reference`, losses by domain: max(mean loss - reference, 0), held to 0 after the
average. Those are other dynamics: tokens below their reference then pay for those above. Both given, the workers'
is used. What it minimises is the largest excess of all domains.

Departures from paper and released code: this is the rule of the small proxy run, whose rows are drawn uniformly and
whose loss is weighted, put on the run itself: w is what rows are drawn by, and no loss is weighted. An update is a
window, not a step. c is 1e-3, as in the released run script (the code's default is 1e-4). `unseen_excess` is 0; the
released code begins with the log of the vocabulary's size. `answer: mean` gives the mean over all updates, which is
DoReMi's result for the large run, in place of the latest w.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from mixer.core.errors import ConfigError
from mixer.core.mirror import smooth, step
from mixer.core.policies._named import NeedsByOptions, by_name
from mixer.core.ports import Setting, State
from mixer.core.signal import Signal


@dataclass(frozen=True, slots=True, kw_only=True)
class Doremi:
    NEEDS = NeedsByOptions({"excess"}, lambda policy: {"loss"} if policy.reference else {"excess"})
    eta: float = 1.0
    smoothing: float = 1e-3  # c
    reference: Mapping[str, float] = field(default_factory=dict[str, float])  # without: from the workers
    answer: Literal["last", "mean"] = "last"
    unseen_excess: float = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.eta < np.inf:
            raise ConfigError(f"policy.eta={self.eta!r}; it needs to be above 0.")
        if not 0 < self.smoothing <= 1:
            raise ConfigError(f"policy.smoothing={self.smoothing!r}; it needs to be above 0 and at most 1.")
        if self.answer not in ("last", "mean"):
            raise ConfigError(f"policy.answer={self.answer!r}; it needs to be last or mean.")
        if not 0 <= self.unseen_excess < np.inf:
            raise ConfigError(f"policy.unseen_excess={self.unseen_excess!r}; it needs to be 0 or more nats.")

    def start(self, setting: Setting) -> State:
        num = len(setting.catalog)
        reference_d = by_name(setting.catalog, "reference", self.reference) if self.reference else np.zeros(num)
        return {
            "reference_d": reference_d,
            "excess_d": np.full(num, float(self.unseen_excess)),
            "weights_d": np.full(num, 1.0 / num),
            "mean_d": np.full(num, 1.0 / num),
            "updates": np.array(0, dtype=np.int64),
        }

    def update(self, state: State, signal: Signal) -> tuple[State, NDArray[np.float64]]:
        if signal.excess_sum_d is not None:
            measured_d = signal.excess_d
        elif self.reference:
            measured_d = signal.loss_d - state["reference_d"]
        else:
            return state, self._answer(state)
        excess_d = np.where(np.isfinite(measured_d), np.maximum(measured_d, 0.0), state["excess_d"])
        weights_d = smooth(step(state["weights_d"], excess_d, self.eta), self.smoothing)
        updates = int(state["updates"]) + 1
        after = state | {
            "excess_d": excess_d,
            "weights_d": weights_d,
            "mean_d": state["mean_d"] + (weights_d - state["mean_d"]) / updates,
            "updates": np.array(updates, dtype=np.int64),
        }
        return after, self._answer(after)

    def _answer(self, state: State) -> NDArray[np.float64]:
        return state["weights_d" if self.answer == "last" else "mean_d"]
