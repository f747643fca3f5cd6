"""What a run folder says, read by anybody at any time and without owning it: for reports, views and tables.

Only `schedule.jsonl` must be there: a replay has no policy, a run that has just begun has no journal, a fork may
have windows that were trained elsewhere. What is missing is empty here, never an error. A schedule file alone is
a record too.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from mixer.control.description import flat, redacted
from mixer.control.journal import ENDINGS, GOES_ON, read_journal
from mixer.control.rundir import load_origin
from mixer.core.catalog import Catalog
from mixer.core.errors import ScheduleError
from mixer.core.plan import Geometry
from mixer.core.schedule import MixtureSchedule, read, unpack_d

FAULTS = ("restart", "preemption")  # events after which a run has to come back


@dataclass(slots=True)
class Record:
    """A run as its files tell it. `windows`, `policy` are by window; the other lists stand in order of time."""

    folder: Path
    schedule: MixtureSchedule
    config: str = ""  # the text of run.yaml, without secrets
    options: dict[str, str] = field(default_factory=dict[str, str])  # those of it that say something, by dotted key
    origin: dict[str, Any] = field(default_factory=dict[str, Any])  # what it was made from, if a replay or a fork
    is_live: bool = False  # a process says that it can be reached
    windows: dict[int, dict[str, Any]] = field(default_factory=dict[int, dict[str, Any]])
    policy: dict[int, dict[str, Any]] = field(default_factory=dict[int, dict[str, Any]])
    evaluations: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    influence: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    events: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    @property
    def geometry(self) -> Geometry:
        return self.schedule.geometry

    @property
    def planned_windows(self) -> int | None:
        """How many windows the run is to have, as its config says."""
        options, geometry = self.options, self.geometry
        if (windows := whole(options.get("train.windows"))) is not None:
            return windows
        if (tokens := whole(options.get("train.tokens"))) is not None:
            return max(1, math.ceil(tokens / (geometry.window_slots * self.schedule.catalog.row_tokens)))
        return len(self.schedule) if self.origin.get("kind") == "replay" else None

    @property
    def made_from(self) -> str:
        """What it is a replay or a fork of; empty for a run of its own."""
        kind, source = self.origin.get("kind"), str(self.origin.get("source", ""))
        if not kind:
            return ""
        steps = self.origin.get("steps")
        return (
            f"{kind} of {source}"
            + (f" at step {steps}" if steps is not None else "")
            + (", stretched" if self.origin.get("stretched") else "")
        )

    @property
    def trained_windows(self) -> int:
        return max(self.windows, default=-1) + 1

    @property
    def tokens(self) -> int:
        """Targets trained so far."""
        return int(self.windows[max(self.windows)].get("tokens") or 0) if self.windows else 0

    @property
    def steps(self) -> int:
        return int(self.windows[max(self.windows)].get("steps") or 0) if self.windows else 0

    @property
    def times(self) -> list[float]:
        """Every moment that the journal names, sorted."""
        lists = (self.windows.values(), self.policy.values(), self.evaluations, self.influence, self.events)
        return sorted(float(one["time"]) for records in lists for one in records if one.get("time") is not None)

    @property
    def duration_s(self) -> float:
        times = self.times
        return times[-1] - times[0] if times else 0.0

    @property
    def end(self) -> dict[str, Any] | None:
        """The event that ended the run, unless it went on afterwards."""
        telling = [event for event in self.events if event.get("what") in (*ENDINGS, *GOES_ON)]
        return telling[-1] if telling and telling[-1]["what"] in ENDINGS else None

    @property
    def status(self) -> str:
        if self.end is not None:
            return str(self.end["what"])
        if self.is_live:
            return "running"
        return "not finished" if self.events or self.windows else "schedule only"

    @property
    def faults(self) -> list[dict[str, Any]]:
        return [event for event in self.events if event.get("what") in FAULTS]

    @property
    def faults_survived(self) -> int:
        """Faults after which the run trained another window, or came to its end."""
        proofs = [float(one["time"]) for one in self.windows.values() if one.get("time") is not None]
        proofs += [float(event["time"]) for event in self.events if event.get("what") == "finished"]
        last = max(proofs, default=-math.inf)
        return sum(float(event["time"]) < last for event in self.faults)

    def measured(self, window: int, key: str) -> NDArray[Any] | None:
        """A per-domain field of a window's record, in the order of the window's catalog."""
        value = self.windows[window].get(key) if window in self.windows else None
        if value is None or window >= len(self.schedule):
            return None
        kind = np.float64 if key == "loss_sum" else np.int64
        return unpack_d(value, self.schedule.row(window).catalog, kind)


def read_record(path: str | Path) -> Record:
    """The record of a run folder, or of a schedule file alone."""
    return Follower(path).look()


class Follower:
    """A record that is kept up to date: `look` reads what was added since the last one."""

    def __init__(self, path: str | Path) -> None:
        self._path = Path(path)
        self._alone = self._path.is_file()
        self._file = self._path if self._alone else self._path / "schedule.jsonl"
        self._record: Record | None = None
        self._size = -1  # of the schedule, when it was last read
        self._told = 0  # bytes of the journal that are in the record

    def look(self) -> Record:
        journal = self._path / "journal.jsonl"
        told = journal.stat().st_size if not self._alone and journal.is_file() else 0
        if self._record is None or told < self._told:  # another journal than before
            self._size, self._told = -1, 0
            config = self._config()
            self._record = Record(self._path, self._schedule(), redacted(config), options_of(config))
            self._record.origin = {} if self._alone else load_origin(self._path) or {}
        elif self._file.stat().st_size != self._size:
            self._record.schedule = self._schedule()
        record = self._record
        record.is_live = not self._alone and (self._path / "live.json").is_file()
        if told > self._told:
            for end, one in read_journal(journal, self._told):
                take(record, one)
                self._told = end
        return record

    def _schedule(self) -> MixtureSchedule:
        if not self._file.is_file():
            raise ScheduleError(
                f"{self._file} is missing, so {self._path} holds no run. Name a run's folder, or a schedule."
            )
        data = self._file.read_bytes()
        self._size = len(data)
        return read(data, thorough=False).schedule

    def _config(self) -> str:
        file = self._path / "run.yaml"
        return file.read_text("utf-8") if not self._alone and file.is_file() else ""


def take(record: Record, one: Mapping[str, Any]) -> None:
    """Add one record of the journal."""
    value = dict(one)
    match value.get("kind"):
        case "window":
            record.windows.setdefault(int(value["window"]), value)
            if isinstance(value.get("influence"), Mapping):
                _take_influence(record, int(value["window"]), value["influence"])
        case "policy":
            record.policy.setdefault(int(value["window"]), value)
        case "evaluation":
            record.evaluations.append(value)
        case "event":
            record.events.append(value)


def _take_influence(record: Record, window: int, value: Mapping[str, Any]) -> None:
    """The matrix as people read it: by domain, then by target."""
    if window in {known["window"] for known in record.influence}:
        return
    try:
        catalog = record.schedule.row(window).catalog
        targets = [str(target) for target in value["targets"]]
        benefit_td = [unpack_d(value["benefit"][target], catalog, np.float64).tolist() for target in targets]
        error_td = [unpack_d(value["error"][target], catalog, np.float64).tolist() for target in targets]
    except (ScheduleError, KeyError, TypeError, ValueError, AttributeError):
        return  # a journal that says more than its schedule, or is damaged: it is not the truth
    by_name = {
        "matrix": dict(zip(catalog.names, map(list, zip(*benefit_td, strict=True)), strict=True)) if targets else {},
        "error": dict(zip(catalog.names, map(list, zip(*error_td, strict=True)), strict=True)) if targets else {},
    }
    record.influence.append({"window": window, "targets": targets, "metric": value.get("metric"), **by_name})


def number(value: Any) -> float:
    """A number of a record; NaN where it is null or none."""
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan


def whole(text: str | None) -> int | None:
    return int(text) if text is not None and text.lstrip("-").isdigit() else None


def options_of(config: str) -> dict[str, str]:
    """The options of a run.yaml by dotted key, as text and without secrets; `mixer.config` reads it in earnest."""
    try:
        found = flat(yaml.safe_load(config) or {})
    except yaml.YAMLError:
        return {}
    return {key: text for key, text in found.items() if text not in ("null", "{}", "[]", "")}


def happenings(record: Record) -> list[dict[str, Any]]:
    """What happened, in order: the journal's events, and what the schedule alone tells of mixtures."""
    told = {(event.get("what"), event.get("window")) for event in record.events}
    found = [dict(event) for event in record.events]
    for window, what, text in _decided(record.schedule):
        if (what, window) not in told:
            time = record.windows.get(window, {}).get("time")
            found.append({"time": time, "what": what, "text": text, "window": window, "steps": None})
    known = sorted(
        (one["window"], one["time"]) for one in found if one["time"] is not None and one["window"] is not None
    )

    def order(one: dict[str, Any]) -> tuple[float, float]:
        if one["time"] is not None:
            return float(one["time"]), 0.0
        before = [time for window, time in known if window <= one["window"]]
        return (before[-1] if before else -math.inf), float(one["window"])

    return sorted(found, key=order)


def _decided(schedule: MixtureSchedule) -> Iterator[tuple[int, str, str]]:
    """(window, what, text): catalog switches, and stretches that were held, ordered or paused."""
    before = schedule.catalog
    begin, reason = 0, ""
    for row in schedule:
        if row.catalog.fingerprint != before.fingerprint:
            yield row.window, "catalog", "; ".join(before.differences(row.catalog)[:5])
            before = row.catalog
        if row.reason != reason:
            yield from _stretch(begin, row.window, reason)
            begin, reason = row.window, row.reason
    yield from _stretch(begin, len(schedule), reason)


def _stretch(begin: int, end: int, reason: str) -> Iterator[tuple[int, str, str]]:
    if reason == "held":
        yield begin, "held", f"the mixture was held for {end - begin} windows"
    elif reason.startswith(("set:", "paused:", "resumed:")):
        yield begin, "order", reason + (f" ({end - begin} windows)" if end - begin > 1 else "")


def catalogs_of(schedule: MixtureSchedule) -> list[tuple[int, Catalog]]:
    """The catalogs of a schedule, each with the window that it begins with."""
    found = [(0, schedule.row(0).catalog if len(schedule) else schedule.catalog)]
    return found + [(window, schedule.row(window).catalog) for window in schedule.switches]
