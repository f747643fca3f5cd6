"""ODM, online data mixing (arXiv 2312.02406): domains are the arms of a bandit, a domain's loss its reward.

With K domains, L_i the mean loss of domain i in the window, t the steps trained with it (counted from where the
policy starts), and
    eps_t = min(1 / K, sqrt(ln K / (K t)))
`released`, as the authors' code does (SmoothedMeanWeightUpdater):
    R_i <- s R_i + (1 - s) exp(L_i);   w_i = (1 - K eps_t) R_i / sum_j R_j + eps_t
`paper`, the text's EXP3-like rule:
    R_i <- s R_i + (1 - s) L_i / pi_i;   w_i = (1 - K eps_t) softmax(eps_prev R)_i + eps_t
where pi_i is the weight that this policy asked for when the window was decided, and eps_prev the eps of the
update before. Domains without tokens keep their R. Only losses are asked about: a hard or noisy domain is paid
as well as a useful one.

Departures: one update a window, not a step; losses are held to [0, max_loss] before exp; pi_i is taken before the
guard rails; there is no warm-up (the prior is in force for the first windows).
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from mixer.core.errors import ConfigError
from mixer.core.ports import Setting, State
from mixer.core.signal import Signal


@dataclass(frozen=True, slots=True, kw_only=True)
class Odm:
    NEEDS: ClassVar[frozenset[str]] = frozenset({"loss"})
    form: Literal["released", "paper"] = "released"
    smoothing: float = 0.9
    max_loss: float = 20.0  # nats; uniform guesses over 65,536 tokens cost 11

    def __post_init__(self) -> None:
        if self.form not in ("released", "paper"):
            raise ConfigError(f"policy.form={self.form!r}; it needs to be released or paper.")
        if not 0 <= self.smoothing < 1:
            raise ConfigError(f"policy.smoothing={self.smoothing!r}; it needs to be at least 0 and below 1.")
        if not 0 < self.max_loss <= 100:
            raise ConfigError(f"policy.max_loss={self.max_loss!r}; it needs to be above 0 and at most 100 nats.")

    def start(self, setting: Setting) -> State:
        num = len(setting.catalog)
        return {
            "reward_d": np.zeros(num),
            "epsilon": np.array(1.0 / num),
            "start_window": np.array(setting.start_window, dtype=np.int64),
            "window_steps": np.array(setting.window_steps, dtype=np.int64),
            # What each of the windows between a decision and its signal was decided with, by window % first_window.
            "pi_wd": np.tile(setting.prior.weights_d, (setting.first_window, 1)),
        }

    def update(self, state: State, signal: Signal) -> tuple[State, NDArray[np.float64]]:
        reward_d, before, pi_wd = state["reward_d"].copy(), float(state["epsilon"]), state["pi_wd"].copy()
        num, loss_d, place = len(reward_d), signal.loss_d, signal.window % len(pi_wd)
        time = (signal.window - int(state["start_window"]) + 1) * int(state["window_steps"])
        epsilon = min(1.0 / num, math.sqrt(math.log(num) / (num * time)))
        seen_d = np.isfinite(loss_d) & (pi_wd[place] > 0)
        loss_s = np.clip(loss_d[seen_d], 0.0, self.max_loss)
        gain_s = np.exp(loss_s) if self.form == "released" else loss_s / pi_wd[place][seen_d]
        reward_d[seen_d] = self.smoothing * reward_d[seen_d] + (1.0 - self.smoothing) * gain_s
        if self.form == "paper":
            power_d = np.exp(before * (reward_d - reward_d.max()))
        else:
            power_d = reward_d if reward_d.any() else np.ones(num)
        weights_d = (1.0 - num * epsilon) * (power_d / power_d.sum()) + epsilon
        pi_wd[place] = weights_d = weights_d / weights_d.sum()
        return state | {"reward_d": reward_d, "epsilon": np.array(epsilon), "pi_wd": pi_wd}, weights_d
