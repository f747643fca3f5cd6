"""Controller: signals in, one schedule row per window out. It decides every window once.

Row k is bound when the signal of window k - 1 - lag_windows has been folded, and depends on the signals of windows
0 .. k-1-lag_windows and on no others, whatever else has arrived. The first lag_windows + 1 rows carry the prior, or
what the policy says of them if it measures nothing (`NEEDS` is empty) and so has no need to wait.
Folding a signal and committing its row are one act: policy state and row are durable (see `RunDir.commit`) before
the row can be read, so a restart finds either both or neither, and asks for the signal again (`next_signal`).
Signals that came too early wait in memory only: whoever reports keeps a signal until `next_signal` has passed it.

A signal that cannot be true, or a policy's answer that is no mixture, leaves the policy's state as it was and
holds the mixture of the row before (`reason: held`). After `max_held` such rows on end the run is stopped.

People's orders are kept in the run folder when they are given, each bound to a window nobody has decided: its row
is `set: <why>`, or `paused: <why>` from a pause to its end. Orders too go through the guard rails. While paused
the policy still learns from signals; only its answers are not used.
"""

import logging
import threading
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mixer.control.rundir import RunDir
from mixer.core.catalog import Catalog
from mixer.core.errors import ConfigError, ResumeError, ScheduleError, SignalError
from mixer.core.mixture import Mixture
from mixer.core.plan import Geometry
from mixer.core.ports import Policy, Setting, State
from mixer.core.rails import GuardRails, Progress
from mixer.core.row import ScheduleRow
from mixer.core.signal import Signal

logger = logging.getLogger(__name__)

FORK = "fork"  # the reason of the rows that a fork begins with; the signals of its source decide them


@dataclass(frozen=True, slots=True, kw_only=True)
class ControllerOptions:
    lag_windows: int = 1
    max_mean_loss: float = 100.0  # nats a token; a larger mean cannot be a loss of this model
    max_held: int = 100  # held rows on end, after which the run is stopped
    max_waiting: int = 1000  # early signals kept

    def __post_init__(self) -> None:
        if self.lag_windows < 0 or self.max_held < 1 or self.max_waiting < 0:
            raise ConfigError(
                f"lag_windows={self.lag_windows}, max_held={self.max_held}, max_waiting={self.max_waiting}; "
                "they need to be at least 0, 1 and 0."
            )
        if not self.max_mean_loss > 0:
            raise ConfigError(f"max_mean_loss={self.max_mean_loss}; it needs to be above 0.")


class Receipt(Enum):
    """What became of a signal."""

    FOLDED = "folded"
    WAITING = "waiting"  # for those of the windows before it
    REPEATED = "repeated"  # known already, or of a window that decides nothing any more: nothing changed


def unasked(policy: Policy, setting: Setting, window: int) -> NDArray[np.float64]:
    """What a policy that measures nothing says of a window, before any signal."""
    zeros = np.zeros(len(setting.catalog), dtype=np.int64)
    nothing = Signal(
        window=window,
        catalog=setting.catalog.fingerprint,
        loss_sum_d=zeros.astype(np.float64),
        tokens_d=zeros,
        rows_d=zeros,
        bad_rows_d=zeros,
    )
    return policy.update(policy.start(replace(setting, first_window=0)), nothing)[1]


class Controller:
    """The run's only decider; a plain class, safe to call from several threads."""

    def __init__(
        self,
        options: ControllerOptions,
        policy: Policy,
        rundir: RunDir,
        catalog: Catalog,
        geometry: Geometry,
        prior: Mixture,
        *,
        rails: GuardRails,
        planned_windows: int | None = None,
        targets: tuple[str, ...] = (),
        config: str = "",
    ) -> None:
        """Begin the run of `rundir`, or go on with it where its schedule ends."""
        self.options = options
        self.planned_windows = planned_windows
        self.counts: Counter[str] = Counter()  # signals by what became of them, and what was wrong
        self.trouble = ""  # why a row was held, the last time
        self._policy = policy
        self._rundir = rundir
        self._rules = rails.bind(catalog, prior)
        self._prior = prior
        self._waiting: dict[int, Signal] = {}
        self._changed = threading.Condition(threading.RLock())
        setting = Setting(
            catalog=catalog,
            prior=prior,
            window_slots=geometry.window_slots,
            window_steps=geometry.window_steps,
            first_window=options.lag_windows + 1,
            planned_windows=planned_windows,
            targets=targets,
        )
        if rundir.is_begun:
            rundir.schedule.check_resume(catalog, geometry)
            self._check_lag()
        else:
            self._state: State = policy.start(setting)
            self._rules.check(Progress.start(catalog, geometry.window_slots, self._slots_left(0, geometry)))
            rundir.begin(catalog, geometry, config)
        self._orders = rundir.orders()
        found = rundir.state()
        self._state = found[1] if found else policy.start(setting)
        with self._changed:
            while self.next_window <= options.lag_windows and not self.is_complete:
                if policy.NEEDS:
                    self._commit(self._state, self._prior, reason="prior")
                else:
                    self._commit(self._state, unasked(policy, setting, self.next_window), reason="policy")

    def _check_lag(self) -> None:
        last, lag = self._rundir.schedule.last, self.options.lag_windows
        origin = self._rundir.origin() or {}
        if last is not None and last.reason == FORK:
            if lag != (found := origin.get("lag_windows")):
                raise ResumeError(
                    f"resume refused: the run was forked with lag_windows={found}, this config has {lag}. "
                    "Use the run's lag."
                )
        elif last is not None and last.signals_through != max(last.window - 1 - lag, -1):
            raise ResumeError(
                f"resume refused: window {last.window} of the run depends on signals through {last.signals_through}, "
                f"lag_windows={lag} would make it {max(last.window - 1 - lag, -1)}. Use the run's lag."
            )

    # ---- what is decided ----------------------------------------------------------------------------

    @property
    def next_window(self) -> int:
        """The first window that is not decided."""
        return len(self._rundir.schedule)

    @property
    def state(self) -> State:
        """The policy's, after the last decision."""
        return self._state

    @property
    def next_signal(self) -> int:
        """The first window whose signal is still wanted; all before are in the schedule for good."""
        return max(self.next_window - 1 - self.options.lag_windows, 0)

    @property
    def is_complete(self) -> bool:
        planned = self.planned_windows
        return planned is not None and self.next_window >= planned

    def row_or_none(self, window: int) -> ScheduleRow | None:
        """The window's row, or None as long as it is not decided.

        Waits for nobody, not even for a row that is being written: the schedule is only appended to, and what stands
        in it is durable.
        """
        planned, decided = self.planned_windows, self.next_window
        if window < 0 or (planned is not None and window >= max(planned, decided)):
            raise ScheduleError(f"window {window} is not planned; the run has windows 0 to {(planned or 0) - 1}.")
        return self._rundir.schedule.row(window) if window < decided else None

    def row(self, window: int) -> ScheduleRow:
        with self._changed:
            while (row := self.row_or_none(window)) is None:
                self._changed.wait()
            return row

    # ---- signals ------------------------------------------------------------------------------------

    def report(self, signal: Signal) -> Receipt:
        """Take the signal of one window; folds it, and those that waited for it, if its turn has come."""
        with self._changed:
            if signal.window < self.next_signal or self.is_complete:
                self.counts["repeated"] += 1
                return Receipt.REPEATED
            if signal.window >= self.next_window:
                raise SignalError(
                    f"a signal of window {signal.window}, which is not decided; window {self.next_window} comes next. "
                    "It belongs to another run."
                )
            row = self._rundir.schedule.row(signal.window)
            if signal.catalog != row.catalog.fingerprint or len(signal.loss_sum_d) != len(row.catalog):
                raise SignalError(
                    f"a signal of window {signal.window} under catalog {signal.catalog[:12]}; the window has catalog "
                    f"{row.catalog.fingerprint[:12]}. It belongs to another run."
                )
            if signal.window in self._waiting:  # the first one counts; perhaps the disk can be written by now
                self.counts["repeated"] += 1
            self._waiting.setdefault(signal.window, signal)
            while not self.is_complete and (due := self._waiting.get(self.next_signal)) is not None:
                self._fold(due)
                del self._waiting[due.window]  # after the commit: a disk that fails costs no signal
            if signal.window < self.next_signal or self.is_complete:
                return Receipt.FOLDED
            if len(self._waiting) > self.options.max_waiting:
                del self._waiting[signal.window]
            return Receipt.WAITING

    def _fold(self, signal: Signal) -> None:
        state, previous = self._state, self._last_mixture()
        wrong, answer = self._judge(signal), None
        if wrong is None:
            state, answer = self._policy.update(self._state, signal)
            if any(not np.isfinite(v).all() for v in state.values() if np.issubdtype(v.dtype, np.floating)):
                state, answer, wrong = self._state, None, "the policy's state would not be finite"
        order = self._order(self.next_window)
        if order is not None:
            proposal = previous if order["weights"] is None else self._named(order["weights"])
            self._commit(state, proposal, reason=order["reason"])
            return
        if answer is not None:
            try:
                self._commit(state, answer, reason="policy")
                return
            except SignalError as error:
                wrong = f"the policy's answer: {error}"
        self.counts["held"] += 1
        self.trouble = f"signal of window {signal.window}: {wrong}"
        logger.warning("window %d is held: signal of window %d: %s", self.next_window, signal.window, wrong)
        self._refuse_persistent(wrong)
        self._commit(self._state, previous, reason="held")

    def _judge(self, signal: Signal) -> str | None:
        """What makes a signal one that cannot be used; rows that are merely bad are counted."""
        names = self._rundir.schedule.row(signal.window).catalog.names
        for place in np.flatnonzero(signal.bad_rows_d).tolist():
            self.counts[f"bad rows of {names[place]}"] += int(signal.bad_rows_d[place])
            logger.warning("window %d: %d rows of %s had no finite loss", signal.window, signal.bad_rows_d[place],
                           names[place])  # fmt: skip
        loss_d = signal.loss_d
        absurd_d = (loss_d > self.options.max_mean_loss) | (loss_d < 0) | ((signal.tokens_d == 0) & (signal.rows_d > 0))
        if absurd_d.any():
            place = int(np.argmax(absurd_d))
            self.counts[f"absurd loss of {names[place]}"] += 1
            return f"{names[place]} has a mean loss of {loss_d[place]} over {signal.tokens_d[place]} tokens"
        if not signal.tokens_d.any():
            self.counts["empty"] += 1
            return "it holds no token"
        return None

    def _refuse_persistent(self, wrong: str | None) -> None:
        last, most = self.next_window, self.options.max_held
        if last >= most and all(self._rundir.schedule.row(k).reason == "held" for k in range(last - most, last)):
            raise SignalError(
                f"the last {most} windows were held, and so would be window {last}: {wrong}. The run does not learn "
                "what to mix. Correct the model's loss, or raise max_held."
            )

    # ---- people's orders ----------------------------------------------------------------------------

    def set_weights(
        self, weights: Mapping[str, float], why: str, *, window: int | None = None, hold: bool = False
    ) -> int:
        """Bind these weights to a window nobody has decided, by default the next; returns it.

        Domains that are not named share the rest as in the last row. With `hold` the policy is paused from the
        window after it, so that the weights stay; else it goes on from them.
        """
        with self._changed:
            mixture = self._last_mixture().holding(self._rundir.schedule.last_catalog, weights)
            named = mixture.to_dict(self._rundir.schedule.last_catalog)
            window = self._give({"kind": "set", "weights": named, "reason": f"set: {why}"}, window)
            if hold and window + 1 != self.planned_windows:
                self._give({"kind": "pause", "weights": None, "reason": f"paused: {why}"}, window + 1)
            return window

    def pause_policy(self, why: str, *, window: int | None = None) -> int:
        """From that window on every row repeats the one before it."""
        return self._give({"kind": "pause", "weights": None, "reason": f"paused: {why}"}, window)

    def resume_policy(self, why: str = "", *, window: int | None = None) -> int:
        return self._give({"kind": "resume", "weights": None, "reason": f"resumed: {why}"}, window)

    def _give(self, order: dict[str, Any], window: int | None) -> int:
        with self._changed:
            window = self.next_window if window is None else window
            planned = self.planned_windows
            if window < self.next_window or (planned is not None and window >= planned):
                end = "on" if planned is None else f"to {planned - 1}"
                raise ScheduleError(
                    f"window {window} cannot be ordered; those from {self.next_window} {end} can. "
                    "What is decided stays decided."
                )
            orders = [*self._orders, order | {"window": window}]
            self._rundir.write_orders(orders)
            self._orders = orders
            return window

    def _order(self, window: int) -> dict[str, Any] | None:
        """The order in force: weights for this very window, else a pause that was not ended; later ones win."""
        exact = [order for order in self._orders if order["kind"] == "set" and order["window"] == window]
        if exact:
            return exact[-1]
        begun = [order for order in self._orders if order["kind"] != "set" and order["window"] <= window]
        last = max(begun, key=lambda order: order["window"], default=None)
        for order in begun:
            if last is not None and order["window"] == last["window"]:
                last = order
        return last if last is not None and last["kind"] == "pause" else None

    # ---- rows ---------------------------------------------------------------------------------------

    def _commit(self, state: State, proposal: Mixture | NDArray[np.float64], *, reason: str) -> None:
        schedule = self._rundir.schedule
        window = len(schedule)
        progress = Progress.before(schedule, self._slots_left(window, schedule.geometry))
        mixture = self._rules.apply(
            proposal, previous=schedule.last.mixture if schedule.last else None, progress=progress
        )
        row = schedule.propose(
            mixture,
            limit_d=self._rules.rows_left(progress),
            signals_through=max(window - 1 - self.options.lag_windows, -1),
            reason=reason,
        )
        self._rundir.commit(row, state)
        self._state = state
        self.counts["decided"] += 1
        logger.info("window %d: %s", window, reason)
        self._changed.notify_all()

    def _slots_left(self, window: int, geometry: Geometry) -> int | None:
        planned = self.planned_windows
        return None if planned is None else max(planned - window, 1) * geometry.window_slots

    def _last_mixture(self) -> Mixture:
        last = self._rundir.schedule.last
        return last.mixture if last else self._prior

    def _named(self, weights: Mapping[str, float]) -> Mixture:
        return Mixture.from_dict(self._rundir.schedule.last_catalog, weights)
