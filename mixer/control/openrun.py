"""OpenRun: what one process has open of a run. Who decides, what is written down, and who is told.

Everything that a run's people may want to know passes through here, into the journal; and the tracker, which
reads the journal, lives in this process. Only this process writes into the run folder (checkpoints apart), and all
of it within the owner's fence: who was replaced writes nothing any more, whatever it is.
"""

import contextlib
import json
import logging
import time
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mixer.control.controller import FORK, Controller, ControllerOptions
from mixer.control.fence import read_owner, write_whole
from mixer.control.journal import ENDINGS, GOES_ON, KINDS, Journal, read_back
from mixer.control.measured import to_record
from mixer.control.report import write_report
from mixer.control.rundir import RunDir
from mixer.control.tracker import Tracker, TrackerOptions, open_tracker
from mixer.core.catalog import Catalog
from mixer.core.errors import MixerError, ScheduleError
from mixer.core.mixture import Mixture
from mixer.core.plan import Geometry
from mixer.core.ports import Policy, State
from mixer.core.rails import GuardRails
from mixer.core.row import ScheduleRow
from mixer.core.schedule import MixtureSchedule
from mixer.core.signal import Signal

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Charge:
    """All that is needed to begin a run or to go on with it, and that outlives its owner's process."""

    folder: Path
    options: ControllerOptions
    policy: Policy | None  # None: a saved schedule is followed, and nothing is decided
    catalog: Catalog
    geometry: Geometry
    prior: Mixture
    rails: GuardRails
    planned_windows: int | None
    targets: tuple[str, ...] = ()
    config: str = ""
    tracker: TrackerOptions = field(default_factory=TrackerOptions)
    holder: str = field(default_factory=lambda: uuid.uuid4().hex)  # who has the run, also when it is started again
    takeover: int | None = None  # epoch of an owner that may be replaced though it seems to live


@dataclass(frozen=True, slots=True)
class Heard:
    """What matters of a journal as far as it goes."""

    last: Mapping[str, dict[str, Any]] = field(default_factory=dict[str, dict[str, Any]])  # newest record of each kind
    working: bool = False  # whether workers were started since the driver was
    ending: str = ""  # how the run ended, unless it goes on

    def after(self, record: dict[str, Any]) -> "Heard":
        working, ending = _working(record), _ending(record)
        return Heard(
            {**self.last, record["kind"]: record} if record["kind"] in KINDS else self.last,
            self.working if working is None else working,
            self.ending if ending is None else ending,
        )

    @classmethod
    def of(cls, newest_first: Iterable[dict[str, Any]]) -> "Heard":
        """The same as `after` of all records one after the other, from as few of the newest as tell it."""
        last: dict[str, dict[str, Any]] = {}
        working: bool | None = None
        ending: str | None = None
        for record in newest_first:
            if record["kind"] in KINDS:
                last.setdefault(record["kind"], record)
            working = _working(record) if working is None else working
            ending = _ending(record) if ending is None else ending
            if working is not None and ending is not None and last.keys() == KINDS:
                break
        return cls(last, bool(working), ending or "")


def _working(record: Mapping[str, Any]) -> bool | None:
    """None where a record does not tell."""
    if record["kind"] == "event" and record.get("what") in ("begun", "workers"):
        return record["what"] == "workers"
    return True if record["kind"] == "window" else None  # workers have reported it


def _ending(record: Mapping[str, Any]) -> str | None:
    """None where a record does not tell; what trains has not ended."""
    if record["kind"] == "event" and record.get("what") in (*ENDINGS, *GOES_ON):
        return record["what"] if record["what"] in ENDINGS else ""
    return "" if record["kind"] == "window" else None


class OpenRun:
    """One owner's hold on a run folder: `Controller`, journal and tracker together."""

    def __init__(self, charge: Charge, *, again: bool = False, where: Mapping[str, Any] | None = None) -> None:
        """`again`: another process had the run under this charge until now, which may be cut off rather than dead: then
        the fence stops it. `where` is written down for people's commands on a live run."""
        self._charge = charge
        takeover = charge.takeover
        if again and (before := read_owner(charge.folder)) and before.holder == charge.holder:
            takeover = before.epoch
        self._rundir = RunDir(charge.folder, holder=charge.holder, takeover=takeover)
        try:
            self._controller: Controller | None = None
            if charge.policy is not None:
                self._controller = Controller(
                    charge.options,
                    charge.policy,
                    self._rundir,
                    charge.catalog,
                    charge.geometry,
                    charge.prior,
                    rails=charge.rails,
                    planned_windows=charge.planned_windows,
                    targets=charge.targets,
                    config=charge.config,
                )
            else:
                self._rundir.schedule.check_resume(charge.catalog, charge.geometry)
            self._journal = Journal(charge.folder / "journal.jsonl", self._rundir.fence)
            self._heard = Heard.of(read_back(self._journal.path))
            if where is not None:
                with contextlib.suppress(OSError), self._rundir.fence.writing():
                    write_whole(charge.folder / "live.json", (json.dumps(where) + "\n").encode())
            self._tracker: Tracker = open_tracker(charge.tracker, charge.folder, self.schedule, self._rundir.fence)
            if again:
                self.note([{"kind": "event", "what": "restart", "text": "the controller"}])
            if self._controller is not None:
                self._make_up(self._controller)
        except BaseException:
            self._rundir.close()
            raise

    @property
    def schedule(self) -> MixtureSchedule:
        return self._rundir.schedule

    def row_or_none(self, window: int) -> ScheduleRow | None:
        if self._controller is not None:
            return self._controller.row_or_none(window)
        return self.schedule.row(window)

    def report(self, signal: Signal, record: Mapping[str, Any]) -> int:
        following = signal.window + 1
        decided = len(self.schedule)
        if self._controller is not None:
            self._controller.report(signal)
            following = self._controller.next_signal if not self._controller.is_complete else following
        if record:
            self.note([{**record, **to_record(signal, self.schedule.row(signal.window).catalog)}])
        if self._controller is not None and (new := self._rows(decided)):
            self._tell_rows(new, self._controller.trouble)
            self._tell_policy(self._controller)
        return following

    def _rows(self, begin: int) -> list[ScheduleRow]:
        return [self.schedule.row(k) for k in range(begin, len(self.schedule))]

    def _tell_rows(self, rows: Iterable[ScheduleRow], trouble: str) -> None:
        """Those that the policy did not decide."""
        for row in rows:
            if what := _happening(row):
                text = trouble if what == "held" else row.reason
                self.note([{"kind": "event", "what": what, "text": text, "window": row.window}])

    def _tell_policy(self, controller: Controller) -> None:
        """Where it stands after the newest signal that was folded."""
        last = self.schedule.last
        if last and (values := policy_values(controller.state, last.catalog)):
            self.note([{"kind": "policy", "window": last.signals_through, "values": values}])

    def _make_up(self, controller: Controller) -> None:
        """Tell what the process before this one was to tell of its last rows, if it was lost before it did."""
        last, heard = self.schedule.last, self._heard.last
        if last is None or last.signals_through < 0 or last.reason == FORK:
            return
        trained = heard["window"]["window"] if "window" in heard else -1
        one_call = last.window - controller.options.lag_windows  # at most so many rows are decided at once
        rows = self._rows(max(trained + 1, one_call))
        if any(map(_happening, rows)):
            told = {(record.get("what"), record.get("window")) for record in read_back(self._journal.path)}
            missing = [row for row in rows if (_happening(row), row.window) not in told]
            self._tell_rows(missing, "the controller was lost before it could say why")
        known = heard["policy"]["window"] if "policy" in heard else -1
        if last.signals_through > known and not self._rundir.lost_states:  # else the state is an older one
            self._tell_policy(controller)

    def note(self, records: list[Mapping[str, Any]]) -> None:
        for record in records:
            whole = {"time": time.time(), **record}
            if whole["kind"] == "event":
                again = whole["what"] == "workers" and self._heard.working
                whole = {"window": None, "steps": None, **whole} | ({"what": "restart"} if again else {})
            if self._journal.append(whole):
                self._heard = self._heard.after(whole)
        if records:
            self._tracker.wake()

    @property
    def decider(self) -> Controller:
        if self._controller is None:
            raise ScheduleError("the run follows a saved schedule: nobody decides, so nothing can be ordered.")
        return self._controller

    def status(self) -> dict[str, Any]:
        last = self.schedule.last
        return {
            "folder": str(self._charge.folder),
            "planned_windows": self._charge.planned_windows,
            "decided": len(self.schedule),
            "weights": dict(zip(last.catalog.names, last.weights_d.tolist(), strict=True)) if last else {},
            "last": dict(self._heard.last),
            "ending": self._heard.ending,
            "counts": dict(self._controller.counts) if self._controller is not None else {},
            "behind": self._tracker.behind,
        }

    def close(self, patience_s: float, *, report: bool = True) -> int:
        """Writes the report, so that the tracker can send it, and gives the tracker that long to catch up."""
        self._journal.close()
        try:
            if report:
                self._rundir.fence.check()
                write_report(self._charge.folder, fence=self._rundir.fence)
        except ScheduleError as error:
            logger.warning("the report of %s was not written: %s", self._charge.folder, error)
        except Exception:
            logger.warning("the report of %s was not written; `mixer report` tries again", self._charge.folder,
                           exc_info=True)  # fmt: skip
        self._tracker.close(patience_s)
        behind = self._tracker.behind
        with contextlib.suppress(OSError, MixerError), self._rundir.fence.writing():
            (self._charge.folder / "live.json").unlink(missing_ok=True)
        self._rundir.close()
        return behind


def _happening(row: ScheduleRow) -> str:
    """The event that a row is, if the policy did not decide it."""
    return "held" if row.reason == "held" else "order" if row.reason.startswith(("set:", "paused:")) else ""


def policy_values(state: State, catalog: Catalog) -> dict[str, float]:
    """A policy's state as numbers with names: what is single, and what is by domain (`..._d`)."""
    values: dict[str, float] = {}
    for key, value in state.items():
        if value.ndim == 0:
            values[key] = float(value)
        elif value.shape == (len(catalog),) and key.endswith("_d"):
            values |= {f"{key[:-2]}/{name}": float(one) for name, one in zip(catalog.names, value, strict=True)}
    return {key: value for key, value in values.items() if np.isfinite(value)}
