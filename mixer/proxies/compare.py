"""A comparison: the same model on the same rows under several policies, at equal training tokens, a few seeds each.

    <run.path>/<label>/<seed>/        each run's folder, a run as any other: report, show and evaluate read it
    <run.path>/compare.json           all numbers that follow from the runs (`mixer.proxies.verdict`)
    <run.path>/times.json             those that a clock gave: seconds of training and of probes
    <run.path>/compare.md, *.png      the same for people
    <run.path>/owner.json, *.lock     the fence: a comparison has one driver

A seed sets the model's first weights and the order of rows. Every run is evaluated before its first step, every
`evaluation.every_windows` and at its end; what counts are the sets of the targets. Runs are not told to a tracker.

The same command goes on with what is missing, and with more seeds or policies than before. A run that is finished is
not done again; one that was cut off goes on from its newest checkpoint, and `compare.json` has the bytes that it would
have had. A folder whose runs were of other options is refused before anything is trained.
"""

import logging
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from mixer import config as configs
from mixer.control.fence import Fence
from mixer.control.journal import read_journal
from mixer.control.rundir import load_schedule
from mixer.core.errors import ConfigError, ResumeError
from mixer.core.ports import Setting
from mixer.core.rails import Progress as Place
from mixer.data.corpus import CatalogRows
from mixer.proxies.contenders import Contender, config_of
from mixer.proxies.lanes import Job, Lanes
from mixer.proxies.told import Told, read_run
from mixer.proxies.verdict import Race, Runs, judge
from mixer.run import (
    RunConfig,
    make_policy,
    make_prior,
    make_reference,
    plan_length,
    require_measured,
    require_same,
    target_names,
)

logger = logging.getLogger(__name__)

STOP = ".stop"
FIXED = ("geometry", "evaluation")  # sections that a run may differ in when it goes on, and a comparison may not


@dataclass(frozen=True, slots=True)
class Entry:
    """One run of a comparison."""

    label: str
    seed: int
    config: RunConfig

    @property
    def name(self) -> str:
        return f"{self.label}/{self.seed}"

    @property
    def folder(self) -> Path:
        return self.config.run.folder


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """A comparison as it was asked for."""

    base: RunConfig
    rows: CatalogRows
    contenders: Sequence[Contender]
    seeds: int
    reference: str = "natural"

    def __post_init__(self) -> None:
        if self.seeds < 1:
            raise ConfigError(f"seeds={self.seeds}; it must be at least 1.")
        labels = [one.label for one in self.contenders]
        if self.reference not in labels:
            raise ConfigError(
                f"the others are compared with {self.reference!r}, which is none of {', '.join(labels)}. Add it to the "
                "policies, or name another with --reference."
            )

    @property
    def folder(self) -> Path:
        return self.base.run.folder

    @property
    def windows(self) -> int:
        return plan_length(self.base, self.rows.catalog)

    @property
    def moments(self) -> list[int]:
        """The windows before which runs are evaluated."""
        every = self.base.evaluation.every_windows
        if every is None:
            raise ConfigError("evaluation.every_windows is null, so there would be no curves. Set it to some windows.")
        return sorted({*range(0, self.windows, every), self.windows})

    @property
    def window_tokens(self) -> int:
        return self.base.geometry.window_slots * self.rows.catalog.row_tokens

    @property
    def targets(self) -> tuple[str, ...]:
        names = target_names(self.base, self.rows)
        if not names:
            raise ConfigError(
                f"there is no target to compare on: evaluation.sets={list(self.base.evaluation.sets)}, and beside "
                f"{self.rows.corpus.root} lies no such corpus. Prepare some (prepare.targets), and keep targets in "
                "evaluation.sets."
            )
        return names

    def entries(self) -> list[Entry]:
        """All runs, every policy's first seed before the second of any."""
        return [
            Entry(one.label, seed, config_of(self.base, one, self.folder, seed))
            for seed in range(self.seeds)
            for one in self.contenders
        ]


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a comparison is."""

    finished: int
    failed: int
    runs: int
    windows: int  # trained, of all runs
    planned: int
    going: Mapping[str, int]  # runs that were begun, and windows of each
    last: str = ""  # the run that ended last, and how


@dataclass(frozen=True, slots=True)
class Comparison:
    """How it ended, and what came of it, if anything did."""

    ending: Literal["finished", "stopped"]
    race: Race | None = None
    verdict: Mapping[str, Any] | None = None
    times: Mapping[str, Any] | None = None
    left_out: Mapping[str, str] | None = None  # runs, and why


def compare(
    asked: Asked, lanes: Lanes | None, on_progress: Callable[[Progress], None] = lambda progress: None
) -> Comparison:
    """Train what is missing (nothing without lanes) and compare what is there.

    Runs that failed are left out and named. SIGINT or SIGTERM asks the runs to save themselves and to end; a second
    one is a KeyboardInterrupt.
    """
    entries, targets, moments = asked.entries(), asked.targets, asked.moments
    _check(asked, entries, targets)
    folder = asked.folder
    folder.mkdir(parents=True, exist_ok=True)
    fence = Fence(folder)
    try:
        (folder / STOP).unlink(missing_ok=True)
        failed: dict[str, str] = {}
        if lanes is not None:
            failed = _train(asked, entries, moments, lanes, on_progress)
            if (folder / STOP).exists():
                (folder / STOP).unlink()
                return Comparison("stopped")
        told: dict[str, Told] = {}
        for entry in entries:
            found = read_run(entry.folder, targets, moments)
            if isinstance(found, str):
                failed.setdefault(entry.name, found)
            else:
                told[entry.name] = found
        return _judged(asked, entries, told, failed)
    finally:
        fence.close()


# ---- before ------------------------------------------------------------------------------------------------


def _check(asked: Asked, entries: Sequence[Entry], targets: tuple[str, ...]) -> None:
    """Refuse what could not be trained, before anything is."""
    for entry in entries:
        if entry.seed == 0:
            try:
                _check_policy(entry.config, asked.rows, targets)
            except ConfigError as error:
                raise type(error)(f"policy {entry.label}: {error}") from error
        if (entry.folder / "schedule.jsonl").exists():
            _require_same(entry, asked.rows)


def _check_policy(config: RunConfig, rows: CatalogRows, targets: tuple[str, ...]) -> None:
    policy, catalog, prior = make_policy(config), rows.catalog, make_prior(config, rows.catalog)
    require_measured(config, policy, targets)
    make_reference(config, rows.corpus)
    slots, windows = config.geometry.window_slots, plan_length(config, catalog)
    config.rails.bind(catalog, prior).check(Place.start(catalog, slots, windows * slots))
    policy.start(
        Setting(
            catalog=catalog,
            prior=prior,
            window_slots=slots,
            window_steps=config.geometry.window_steps,
            first_window=config.controller.lag_windows + 1,
            planned_windows=windows,
            targets=targets,
        )
    )


def _require_same(entry: Entry, rows: CatalogRows) -> None:
    require_same(entry.config, entry.folder)
    held = configs.load(RunConfig, [entry.folder / "run.yaml"])
    for name in FIXED:
        old, new = (configs.to_plain(config)[name] for config in (held, entry.config))
        for key in old:
            if old[key] != new[key]:
                raise ResumeError(
                    f"{entry.folder} has {name}.{key}={old[key]}, this comparison {new[key]}. Its runs would not be "
                    f"measured alike. Use {old[key]}, or compare in another folder with run.path=..."
                )
    found = load_schedule(entry.folder).catalog.fingerprint
    if found != rows.catalog.fingerprint:
        raise ResumeError(
            f"{entry.folder} was trained on other rows: its catalog has the fingerprint {found}, this one "
            f"{rows.catalog.fingerprint}. Compare in another folder with run.path=..."
        )


# ---- runs --------------------------------------------------------------------------------------------------


def _train(
    asked: Asked,
    entries: Sequence[Entry],
    moments: Sequence[int],
    lanes: Lanes,
    on_progress: Callable[[Progress], None],
) -> dict[str, str]:
    """The runs that are not finished; returns those that failed, and why."""
    missing = [entry for entry in entries if read_run(entry.folder, asked.targets, moments) == "not finished"]
    watch = _Watch(missing, (len(entries) - len(missing)) * asked.windows)
    failed: dict[str, str] = {}
    ended, last = len(entries) - len(missing), ""

    def tell() -> None:
        done = ended - len(failed)
        planned = len(entries) * asked.windows
        on_progress(Progress(done, len(failed), len(entries), watch.look(), planned, dict(watch.going), last))

    stop = asked.folder / STOP
    jobs = [Job(entry.name, entry.config, stop) for entry in missing]
    tell()
    with _stopping(stop):
        for found in lanes.run(jobs, stop):
            if found is not None:
                number, outcome = found
                name, last = missing[number].name, f"{missing[number].name} {outcome.ending}"
                if outcome.ending in ("failed", "lost"):
                    failed[name] = outcome.text
                    logger.warning("%s %s: %s", name, outcome.ending, outcome.text)
                watch.end(name)
                ended += outcome.ending != "stopped"
            tell()
    return failed


class _Watch:
    """How many windows the runs have trained, by what is added to their journals."""

    def __init__(self, entries: Sequence[Entry], windows: int) -> None:
        self.going: dict[str, int] = {}
        self._windows = windows
        self._entries = {entry.name: entry for entry in entries}
        self._told = dict.fromkeys(self._entries, 0)
        self._trained = dict.fromkeys(self._entries, 0)

    def look(self) -> int:
        for name, entry in self._entries.items():
            path = entry.folder / "journal.jsonl"
            if not path.exists() or path.stat().st_size == self._told[name]:
                continue
            for end, record in read_journal(path, self._told[name]):
                self._told[name] = end
                if record["kind"] == "window":
                    self._trained[name] = max(self._trained[name], record["window"] + 1)
            self.going[name] = self._trained[name]
        return self._windows + sum(self._trained.values())

    def end(self, name: str) -> None:
        self.look()
        self.going.pop(name, None)
        self._windows += self._trained[name]
        for of_entry in (self._entries, self._told, self._trained):
            del of_entry[name]


@contextmanager
def _stopping(file: Path) -> Iterator[None]:
    """SIGINT and SIGTERM write the file that asks all runs to end; the second one is a KeyboardInterrupt."""

    def take(number: int, _: object) -> None:
        if file.exists():
            raise KeyboardInterrupt
        file.touch()

    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.signal(number, take) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# ---- after -------------------------------------------------------------------------------------------------


def _judged(
    asked: Asked, entries: Sequence[Entry], told: Mapping[str, Told], left_out: Mapping[str, str]
) -> Comparison:
    runs: dict[str, Runs] = {}
    times: dict[str, Any] = {}
    for contender in asked.contenders:
        mine = {one.seed: told[one.name] for one in entries if one.label == contender.label and one.name in told}
        if mine:
            runs[contender.label] = Runs(
                seeds=tuple(mine),
                loss_set=np.array([one.loss_et for one in mine.values()]),
                final_sd=np.array([one.final_d for one in mine.values()]),
                mean_sd=np.array([one.mean_d for one in mine.values()]),
                probe_tokens_s=np.array([one.probe_tokens for one in mine.values()]),
                held_s=np.array([one.held for one in mine.values()]),
                cost_tokens=contender.cost_tokens,
            )
            times[contender.label] = {
                "train_s": float(np.mean([one.train_s for one in mine.values()])),
                "probe_s": float(np.mean([one.probe_s for one in mine.values()])),
            }
    left_out = dict(sorted(left_out.items()))
    if asked.reference not in runs:
        if not left_out:
            raise AssertionError("no run of the reference, and none was left out")
        why = next((text for name, text in left_out.items() if name.startswith(f"{asked.reference}/")), "")
        raise ConfigError(
            f"no run of {asked.reference!r}, with which the others are compared, can be used: {why}. The same command "
            "tries again."
        )
    race = Race(
        reference=asked.reference,
        targets=asked.targets,
        domains=asked.rows.catalog.names,
        floor_d=_floor_d(asked),
        tokens_e=np.array(asked.moments, dtype=np.float64) * asked.window_tokens,
        runs=runs,
    )
    reference = times[asked.reference]
    for one in times.values():
        one["times_reference"] = (one["train_s"] + one["probe_s"]) / (reference["train_s"] + reference["probe_s"])
    return Comparison("finished", race, judge(race) | {"left_out": left_out}, times, left_out)


def _floor_d(asked: Asked) -> NDArray[np.float64]:
    """Each domain's least weight by the comparison's own guard rails, as a run begins."""
    catalog, slots = asked.rows.catalog, asked.base.geometry.window_slots
    rails = asked.base.rails.bind(catalog, make_prior(asked.base, catalog))
    return rails.bounds(Place.start(catalog, slots, asked.windows * slots))[0]
