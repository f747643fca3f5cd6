"""Fork: a run folder that goes on from a checkpoint of another run, and decides for itself from there on.

The windows that the checkpoint has begun keep their rows, byte for byte; so rows and model fit. What follows is one
of two things:

*A fork* has another policy, catalog, prior, or other rules. The next `lag_windows` + 1 rows are decided at once with
the reason `fork`: they carry the prior as the first rows of a run do, by default the mixture in force, carried over
to the catalog. The policy starts anew at the first of them, F (`Setting.start_window`), whose signal is also
the first one wanted: signals of the windows before F, such as the one the checkpoint stands in the middle of, are
those of rows that somebody else decided, and change nothing. The rest of `controller` holds as at the start of a run.

*A plain branch* changes nothing. The signals of the windows that the checkpoint has trained whole are in the source's
journal; a controller in the new folder folds them again, and so comes to the policy's state and to the rows decided
from them. They must be the source's own, byte for byte, or the branch is refused. The first signal wanted is that of
the checkpoint's window, which whoever goes on from the checkpoint reports whole. A source that is a fork itself is
folded from its fork on.

Where domains of the new catalog have the name and content of old ones they go on at the row where they stopped, all
others begin at their first row (see `MixtureSchedule.propose`).

Everything is built in a hidden folder beside the target and renamed at the end: a crash leaves no half run, and the
next attempt clears what it left. The source is only read, also while its run goes on.

`origin.json` of the new folder: "kind" ("fork"), "source", "steps", "plain", "window" (F, the window at which the
policy in force started; 0 if it did so with the run), "lag_windows", and "prior" by name (null if F is 0).
"""

import logging
import math
import os
import shutil
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from mixer.control.controller import FORK, Controller, ControllerOptions, unasked
from mixer.control.fence import sync_folder
from mixer.control.journal import Journal, read_journal
from mixer.control.measured import from_record
from mixer.control.rundir import RunDir, building, load_orders, load_origin, load_schedule
from mixer.core import plan
from mixer.core.catalog import Catalog
from mixer.core.errors import ConfigError, ResumeError, ScheduleError, SignalError
from mixer.core.mixture import Mixture
from mixer.core.plan import Cursor
from mixer.core.ports import Policy, Setting
from mixer.core.rails import GuardRails, Progress
from mixer.core.schedule import MixtureSchedule, pack_d, unpack_d
from mixer.core.signal import Signal

logger = logging.getLogger(__name__)

SHOWN = 8  # windows that an error text spells out


def prepare_fork(
    source: Path,
    target: Path,
    *,
    cursor: Cursor,
    policy: Policy,
    options: ControllerOptions,
    rails: GuardRails,
    planned_windows: int | None = None,
    targets: tuple[str, ...] = (),
    catalog: Catalog | None = None,
    prior: Mixture | None = None,
    plain: bool = False,
    checkpoint: Path | None = None,
    config: str | None = None,
) -> MixtureSchedule:
    """Make `target` a run folder that goes on from the source's checkpoint of `cursor`; returns its schedule.

    `policy` to `targets` are what the folder's controller is opened with later, and so is `prior`: by
    default `prior_at` the cursor. `catalog` is by default the one in force there. A plain branch takes no other
    catalog, and needs the prior of the source's controller. `checkpoint` is by default the folder of the cursor's
    steps, `config` the source's.
    """
    found = _Source(source, cursor, checkpoint)
    deciding = _Deciding(policy=policy, options=options, rails=rails, planned_windows=planned_windows, targets=targets)
    found.check(target, deciding)
    config = found.config if config is None else config
    with building(target) as rundir:
        if plain:
            if prior is None or (catalog and catalog.fingerprint != found.schedule.last_catalog.fingerprint):
                raise ConfigError(
                    "a plain branch goes on as its source does: it needs the prior of the source's controller, and "
                    "takes no other catalog. Give the prior, or fork."
                )
            _branch(found, rundir, deciding, prior, config)
        else:
            catalog = catalog or found.catalog
            _fork(found, rundir, deciding, catalog, prior or prior_at(found.schedule, cursor, catalog), config)
        _write_history(found, rundir, plain)
        _link_checkpoint(found.checkpoint, rundir.path / "checkpoints" / found.checkpoint.name)
        return rundir.schedule


def prior_at(schedule: MixtureSchedule, cursor: Cursor, catalog: Catalog) -> Mixture:
    """The mixture a fork begins with unless another is asked for: the one in force, over its catalog."""
    row = schedule.row(max(begun_windows(cursor) - 1, 0))
    return carried_over(row.mixture, row.catalog, catalog)


def begun_windows(cursor: Cursor) -> int:
    """How many windows have been trained in, whole or in part."""
    return cursor.window + (cursor.step > 0)


def carried_over(mixture: Mixture, before: Catalog, after: Catalog) -> Mixture:
    """A mixture over another catalog: new names get their natural share of it, known ones share the rest as before."""
    if before.names == after.names:
        return mixture
    natural_d = Mixture.natural(after).weights_d
    known_d = np.array([name in before.index for name in after.names])
    weights_d = np.array([mixture.weights_d[before.index[n]] if n in before.index else 0.0 for n in after.names])
    if not (held := math.fsum(weights_d)):  # nothing to keep a ratio of
        return Mixture(natural_d)
    weights_d = np.where(known_d, weights_d * (math.fsum(natural_d[known_d]) / held), natural_d)
    return Mixture(weights_d / math.fsum(weights_d))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Deciding:
    """What decides in the new folder: arguments of its `Controller`."""

    policy: Policy
    options: ControllerOptions
    rails: GuardRails
    planned_windows: int | None
    targets: tuple[str, ...]


class _Source:
    """The run that is forked, as far as the checkpoint goes. Only read."""

    def __init__(self, path: Path, cursor: Cursor, checkpoint: Path | None) -> None:
        self.path = path
        self.cursor = cursor
        self.schedule = load_schedule(path)
        text = (path / "schedule.jsonl").read_bytes()
        self.text = text[: text.rfind(b"\n") + 1]  # a torn line is none
        self.geometry = self.schedule.geometry
        self.steps = cursor.steps(self.geometry)
        self.begun = begun_windows(cursor)
        self.checkpoint = checkpoint or path / "checkpoints" / f"{self.steps:09d}"
        self.origin: dict[str, Any] = load_origin(path) or {}

    @property
    def catalog(self) -> Catalog:
        """In force where the checkpoint stands."""
        return self.schedule.row(max(self.begun - 1, 0)).catalog

    @property
    def config(self) -> str:
        path = self.path / "run.yaml"
        return path.read_text("utf-8") if path.exists() else ""

    @property
    def start_window(self) -> int:
        """Where the policy of the run started."""
        return int(self.origin.get("window", 0))

    @cached_property
    def records(self) -> list[dict[str, Any]]:
        """What the journal says up to the checkpoint."""
        kept: list[dict[str, Any]] = []
        beyond = False
        for _, record in read_journal(self.path / "journal.jsonl"):
            kind, steps = record["kind"], record.get("steps")
            if kind in ("window", "policy"):
                beyond |= kind == "window" and record["window"] >= self.cursor.window
                keep = record["window"] < self.cursor.window
            elif kind == "evaluation":
                keep = steps <= self.steps if steps is not None else record["window"] < self.cursor.window
            else:  # an event need not name its step; its place among the windows does
                keep = not beyond and (steps is None or steps <= self.steps)
            if keep:
                kept.append(record)
        return kept

    def check(self, target: Path, deciding: _Deciding) -> None:
        schedule, planned = self.schedule, deciding.planned_windows

        def refuse(what: str) -> None:
            raise ResumeError(f"fork of {self.path} refused: {what}")

        if os.path.lexists(target):
            refuse(f"{target} is there already. Name a folder that is not.")
        if schedule.plan_version != plan.VERSION:
            refuse(
                f"it was planned by version {schedule.plan_version} of the plan, this is {plan.VERSION}. Use the "
                "release that began the run."
            )
        if not 0 <= self.cursor.step < self.geometry.window_steps:
            refuse(f"a window has {self.geometry.window_steps} steps, none is {self.cursor.step}. Correct the cursor.")
        if not schedule or self.begun > len(schedule):
            refuse(
                f"the checkpoint of step {self.steps} has begun {self.begun} windows, of which the schedule has "
                f"{len(schedule)}. Use the folder with the checkpoint's own schedule."
            )
        if not self.checkpoint.is_dir():
            folder = self.checkpoint.parent
            there = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
            refuse(f"there is no checkpoint {self.checkpoint}, only {there[:SHOWN]}. Fork at a step that has one.")
        if planned is not None and planned <= self.begun:
            refuse(f"{self.begun} windows have begun and {planned} are planned. Plan more, or fork earlier.")


# ---- a fork ------------------------------------------------------------------------------------------------


def _fork(found: _Source, rundir: RunDir, deciding: _Deciding, catalog: Catalog, prior: Mixture, config: str) -> None:
    """The rows that have begun, and those that the new policy cannot have a say in."""
    if len(prior) != len(catalog):
        raise ConfigError(f"a prior of {len(prior)} weights for a catalog of {len(catalog)} domains.")
    _check_tokens(found.catalog, catalog)
    geometry, options, planned = found.geometry, deciding.options, deciding.planned_windows
    setting = Setting(
        catalog=catalog,
        prior=prior,
        window_slots=geometry.window_slots,
        window_steps=geometry.window_steps,
        first_window=options.lag_windows + 1,
        start_window=found.begun,
        planned_windows=planned,
        targets=deciding.targets,
    )
    state = deciding.policy.start(setting)
    kept = found.schedule.head(found.begun)
    _require_same(found, kept.to_text().encode())
    origin = _origin(found, False, found.begun, options.lag_windows, pack_d(prior.weights_d, catalog))
    rundir.begin(kept.catalog, geometry, config, schedule=kept, state=state, origin=origin)
    through = kept.last.signals_through if kept.last else -1
    previous = carried_over(kept.last.mixture, kept.last.catalog, catalog) if kept.last else None
    rules = deciding.rails.bind(catalog, prior)
    for window in range(found.begun, found.begun + options.lag_windows + 1):
        if planned is not None and window >= planned:
            break
        slots_left = None if planned is None else (planned - window) * geometry.window_slots
        progress = Progress.before(rundir.schedule, slots_left, catalog)
        if window == found.begun:
            rules.check(progress)
        proposal = prior if deciding.policy.NEEDS else unasked(deciding.policy, setting, window)
        previous = rules.apply(proposal, previous=previous, progress=progress)
        row = rundir.schedule.propose(
            previous, catalog=catalog, limit_d=rules.rows_left(progress), signals_through=through, reason=FORK
        )
        rundir.commit(row, state)


def _check_tokens(before: Catalog, after: Catalog) -> None:
    for key in ("row_tokens", "tokenizer"):
        if (old := getattr(before, key)) != (new := getattr(after, key)):
            raise ResumeError(
                f"fork refused: the run has {key}={old}, this catalog has {new}. The model was trained on the first. "
                "Use a corpus of the same, or start a new run."
            )


def _origin(found: _Source, plain: bool, window: int, lag_windows: int, prior: Any) -> dict[str, Any]:
    return {
        "kind": FORK,
        "source": str(found.path.absolute()),
        "steps": found.steps,
        "plain": plain,
        "window": window,
        "lag_windows": lag_windows,
        "prior": prior,
    }


# ---- a plain branch ----------------------------------------------------------------------------------------


def _branch(found: _Source, rundir: RunDir, deciding: _Deciding, prior: Mixture, config: str) -> None:
    """Come to the source's state and rows by folding what it measured."""
    if found.origin.get("kind") == "replay":
        raise ResumeError(
            f"plain branch of {found.path} refused: it repeats a schedule and decides nothing. Replay it."
        )
    if found.begun < found.start_window:
        raise ResumeError(
            f"plain branch of {found.path} refused: it is a fork itself, at window {found.start_window}, and the "
            f"checkpoint is of window {found.cursor.window}. Branch off {found.origin.get('source')}."
        )
    geometry, catalog, lag = found.geometry, found.catalog, deciding.options.lag_windows
    kept, state = found.schedule.head(0), None
    if (packed := found.origin.get("prior")) is not None:
        kept = found.schedule.head(min(found.start_window + lag + 1, len(found.schedule)))
        catalog = kept.last_catalog
        setting = Setting(
            catalog=catalog,
            prior=Mixture(unpack_d(packed, catalog, np.float64)),
            window_slots=geometry.window_slots,
            window_steps=geometry.window_steps,
            first_window=lag + 1,
            start_window=found.start_window,
            planned_windows=deciding.planned_windows,
            targets=deciding.targets,
        )
        state = deciding.policy.start(setting)
    signals = _signals(found)
    origin = _origin(found, True, found.start_window, lag, packed)
    rundir.begin(kept.catalog, geometry, config, schedule=kept, state=state, origin=origin)
    rundir.write_orders(load_orders(found.path))
    controller = Controller(
        deciding.options,
        deciding.policy,
        rundir,
        catalog,
        geometry,
        prior,
        rails=deciding.rails,
        planned_windows=deciding.planned_windows,
        targets=deciding.targets,
    )
    for signal in signals:
        if not controller.is_complete:
            controller.report(signal)
    _require_same(found, (rundir.path / "schedule.jsonl").read_bytes())


def _signals(found: _Source) -> list[Signal]:
    """What the source's policy was shown before the checkpoint, in order and without a gap."""
    records = {record["window"]: record for record in found.records if record["kind"] == "window"}
    wanted = range(found.start_window, found.cursor.window)
    if missing := [window for window in wanted if window not in records]:
        more = f" and {len(missing) - SHOWN} more" if len(missing) > SHOWN else ""
        raise ResumeError(
            f"plain branch of {found.path} refused: its journal lacks the windows "
            f"{', '.join(map(str, missing[:SHOWN]))}{more} of {wanted.start} to {wanted.stop - 1}, without which the "
            "policy's state cannot be found. Restore journal.jsonl, or fork with a policy that starts anew."
        )
    return [_signal(found, records[window]) for window in wanted]


def _signal(found: _Source, record: dict[str, Any]) -> Signal:
    window = record["window"]
    catalog = found.schedule.row(window).catalog
    try:
        return from_record(record, window, catalog)
    except (KeyError, TypeError, ValueError, AttributeError, SignalError) as error:
        raise ResumeError(
            f"plain branch of {found.path} refused: the journal's record of window {window} holds no signal: "
            f"{error!r}. Restore journal.jsonl, or fork with a policy that starts anew."
        ) from error


def _require_same(found: _Source, made: bytes) -> None:
    """The text of rows made again must be the source's, as far as both go."""
    if found.text.startswith(made) or made.startswith(found.text):
        return
    pairs = zip(found.text.splitlines(), made.splitlines(), strict=False)
    number = next((number for number, (theirs, ours) in enumerate(pairs, start=1) if theirs != ours), 0)
    raise ResumeError(
        f"plain branch of {found.path} refused: line {number} of the schedule does not come out as it was. Policy, "
        "rails, lag, prior and planned windows need to be the source's. Use them, or fork."
    )


# ---- the folder --------------------------------------------------------------------------------------------


def _write_history(found: _Source, rundir: RunDir, plain: bool) -> None:
    """The source's records up to the checkpoint, and where the story parts from it."""
    words = "a plain branch of" if plain else "forked from"
    event = {
        "kind": "event",
        "time": time.time(),
        "what": "forked",
        "text": f"{words} {found.path.absolute()} at step {found.steps}; {len(rundir.schedule)} windows are decided",
        "window": found.cursor.window,
        "steps": found.steps,
    }
    with Journal(rundir.path / "journal.jsonl") as journal:
        for record in [*found.records, event]:
            journal.append(record)
        if journal.lost:
            raise ScheduleError(
                f"{journal.path} cannot be written: {journal.lost} records lost. Make room, and try again."
            )


def _link_checkpoint(checkpoint: Path, copy: Path) -> None:
    """The same files under another name where the disk can do that, else copies; whole checkpoints never change."""
    shutil.copytree(checkpoint, copy, copy_function=_link)
    for folder, _, _ in os.walk(copy.parent):
        sync_folder(Path(folder))


def _link(source: str, copy: str) -> None:
    try:
        os.link(source, copy)
    except OSError as error:
        logger.debug("%s is copied: %s", source, error)
        shutil.copyfile(source, copy)
        with open(copy, "rb") as file:
            os.fsync(file.fileno())
