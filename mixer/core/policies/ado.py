"""ADO, adaptive data optimization (arXiv 2410.11820): a loss law per domain, and weight where the loss still falls.

Of every domain's training losses so far a law L(D) = exp(e) + exp(a) / D^alpha is fitted (`mixer.core.power_law`).
In every window, with prior mu, h the running mean of realised shares and pi_mean that of preferences:
    h       <- (1 - 0.1) h + 0.1 (shares of rows in this window)
    slope_i  = max(alpha_i, 0.05) (L_i(D) - exp(e_i)) / D
    rho_i    proportional to mu_i h_i^0.5 slope_i, with a floor of 0.01
    pi       = 0.9 pi_mean + 0.1 rho;     pi_mean <- pi_mean + (rho - pi_mean) / (t + 1)
pi is the answer. D counts samples of 1,024 tokens, for which the fit's limits are made.

`released`, as the authors' code does: D is what *all* domains gave, the same for each. The floor is
max(rho, 0.01) / sum, after which the smallest entries lie below 0.01: a slip that we keep under this name.
`paper`, as we remember the text: D is what the domain itself gave, and the floor holds (an exact projection).

It has no target and no goal of all domains together, either: it follows how fast each domain's own loss falls. Falling
learning rates and repeated rows make it fall as well.

Departures: updates are windows, not steps (t, the coefficients and the periods count windows; released: laws fitted
every 1,000 steps from step 1,000 on). The history holds at most `history` windows: when it is full, every second one
is dropped and every second one to come left out, and so on. Released code filters 101 steps and then fits
every tenth; we filter `filter_windows` windows, which are means already. `starts` picks the best of the released
grid of 512 starts, and the law before is one more; null follows all. h is updated before rho is made; papers and
ports differ there.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from mixer.core.errors import ConfigError
from mixer.core.ports import Setting, State
from mixer.core.power_law import SAMPLE_TOKENS, filtered, fitted, predicted
from mixer.core.signal import Signal
from mixer.core.simplex import onto_box

Floats = NDArray[np.float64]

LEAST_ALPHA = 0.05
MAX_LOSS = 100.0  # of a window; beyond any real one


@dataclass(frozen=True, slots=True, kw_only=True)
class Ado:
    NEEDS: ClassVar[frozenset[str]] = frozenset({"loss"})
    form: Literal["released", "paper"] = "released"
    warmup_windows: int = 10  # answered with the prior
    skipped_windows: int = 2  # that no law is fitted to
    refit_windows: int = 5
    history: int = 256
    filter_windows: int = 11
    starts: int | None = 4
    floor: float = 0.01
    credit: float = 0.5  # the power of h
    memory: float = 0.1  # the part of h that is new
    preference: float = 0.1  # the part of pi that is rho

    def __post_init__(self) -> None:
        if self.form not in ("released", "paper"):
            raise ConfigError(f"policy.form={self.form!r}; it needs to be released or paper.")
        least = {"warmup_windows": 5, "skipped_windows": 0, "refit_windows": 1, "history": 16, "filter_windows": 1}
        for key, value in least.items():
            if getattr(self, key) < value:
                raise ConfigError(f"policy.{key}={getattr(self, key)}; it needs to be at least {value}.")
        if self.starts is not None and self.starts < 1:
            raise ConfigError(f"policy.starts={self.starts}; it needs to be at least 1, or null for all.")
        for key in ("floor", "credit", "memory", "preference"):
            if not 0 <= getattr(self, key) <= 1:
                raise ConfigError(f"policy.{key}={getattr(self, key)!r}; it needs to be 0 to 1.")

    def start(self, setting: Setting) -> State:
        num, prior_d = len(setting.catalog), setting.prior.weights_d
        window_samples = setting.window_slots * setting.catalog.row_tokens / SAMPLE_TOKENS
        return {
            "start_window": np.array(setting.start_window, dtype=np.int64),
            "window_samples": np.array(window_samples),
            "row_samples": np.array(setting.catalog.row_tokens / SAMPLE_TOKENS),
            "prior_d": prior_d,
            "credit_d": prior_d,  # h
            "mean_d": prior_d,  # pi_mean
            "own_d": prior_d * window_samples * setting.start_window,  # samples that each domain gave
            "loss_d": np.zeros(num),  # the last one of each
            "known_d": np.zeros(num, dtype=np.bool_),
            # The history: so many entries, one of every so many windows.
            "entries": np.array(0, dtype=np.int64),
            "stride": np.array(1, dtype=np.int64),
            "time_h": np.zeros(self.history, dtype=np.int64),
            "own_hd": np.zeros((self.history, num)),
            "loss_hd": np.zeros((self.history, num)),
            "fitted_at": np.array(-1, dtype=np.int64),
            "law_d3": np.zeros((num, 3)),
            "has_law_d": np.zeros(num, dtype=np.bool_),
            "weights_d": prior_d,
        }

    def update(self, state: State, signal: Signal) -> tuple[State, Floats]:
        time = signal.window - int(state["start_window"]) + 1
        state = self._recorded(state, signal, time)
        if time > self.warmup_windows:
            due = int(state["fitted_at"]) < 0 or time >= int(state["fitted_at"]) + self.refit_windows
            if due:
                state = self._refitted(state, time)
            if state["has_law_d"].any():
                state = self._preferred(state, signal.window, time)
        return state, state["weights_d"]

    def _recorded(self, state: State, signal: Signal, time: int) -> State:
        loss_d, known_d = signal.loss_d, np.isfinite(signal.loss_d)
        own_d = state["own_d"] + signal.rows_d * float(state["row_samples"])
        after = state | {"own_d": own_d}
        if signal.rows_d.any():
            share_d = signal.rows_d / signal.rows_d.sum()
            after["credit_d"] = (1.0 - self.memory) * state["credit_d"] + self.memory * share_d
        if not known_d.any():
            return after
        unseen = float(np.clip(loss_d[known_d], 0.0, MAX_LOSS).mean())
        before_d = np.where(state["known_d"], state["loss_d"], unseen)
        loss_d = np.where(known_d, np.clip(loss_d, 0.0, MAX_LOSS), before_d)
        after |= {"loss_d": loss_d, "known_d": state["known_d"] | known_d}
        entries, stride = int(state["entries"]), int(state["stride"])
        if time <= self.skipped_windows or (time - 1) % stride:
            return after
        entry = {"time_h": time, "own_hd": own_d, "loss_hd": loss_d}
        history = {key: state[key] for key in entry}
        if entries == self.history:
            stride *= 2
            stays_h = (state["time_h"] - 1) % stride == 0
            entries = int(stays_h.sum())
            for key, old in history.items():
                history[key] = np.concatenate([old[stays_h], np.zeros_like(old[~stays_h])])
            after |= {"stride": np.array(stride, dtype=np.int64)} | history
        if entries < self.history and (time - 1) % stride == 0:
            for key, value in entry.items():
                after[key] = history[key].copy()
                after[key][entries] = value
            entries += 1
        return after | {"entries": np.array(entries, dtype=np.int64)}

    def _refitted(self, state: State, time: int) -> State:
        entries, law_d3, has_law_d = int(state["entries"]), state["law_d3"].copy(), state["has_law_d"].copy()
        all_h = float(state["window_samples"]) * (int(state["start_window"]) + state["time_h"])
        for domain in range(len(has_law_d)):
            samples_h = all_h if self.form == "released" else state["own_hd"][:, domain]
            loss_h = filtered(state["loss_hd"][:entries, domain], self.filter_windows)
            before = law_d3[domain] if has_law_d[domain] else None
            law = fitted(samples_h[:entries], loss_h, starts=self.starts, before=before)
            if law is not None:
                law_d3[domain], has_law_d[domain] = law, True
        return state | {"law_d3": law_d3, "has_law_d": has_law_d, "fitted_at": np.array(time, dtype=np.int64)}

    def _preferred(self, state: State, window: int, time: int) -> State:
        whole = float(state["window_samples"]) * (window + 1)
        samples_d = np.full(len(state["own_d"]), whole) if self.form == "released" else np.maximum(state["own_d"], 1.0)
        law_d3, has_law_d = state["law_d3"], state["has_law_d"]
        falls_d = np.maximum(law_d3[:, 2], LEAST_ALPHA) * (predicted(law_d3, samples_d) - np.exp(law_d3[:, 1]))
        slope_d = falls_d / samples_d
        slope_d = np.where(has_law_d, slope_d, slope_d[has_law_d].mean())
        rho_d = state["prior_d"] * state["credit_d"] ** self.credit * slope_d
        if not (np.isfinite(rho_d).all() and rho_d.sum() > 0):
            return state
        rho_d = self._floored(rho_d / rho_d.sum())
        return state | {
            "weights_d": (1.0 - self.preference) * state["mean_d"] + self.preference * rho_d,
            "mean_d": state["mean_d"] + (rho_d - state["mean_d"]) / (time + 1),
        }

    def _floored(self, rho_d: Floats) -> Floats:
        if self.form == "released":
            floored_d = np.maximum(rho_d, self.floor)
            return floored_d / floored_d.sum()
        low_d = np.full(len(rho_d), min(self.floor, 1.0 / len(rho_d)))
        return onto_box((rho_d, np.ones(len(rho_d))), low_d, np.ones(len(rho_d)))
