"""Runs made of saved ones: a schedule repeated, a run forked at one of its checkpoints.

Both only make the folder of the new run, with its config in `run.yaml`; `mixer.launch.fit` trains it like any other,
and finds out from the folder what it is.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mixer import config as configs
from mixer.control.fence import require_free
from mixer.control.fork import begun_windows, prepare_fork, prior_at
from mixer.control.journal import Journal
from mixer.control.replay import REPLAY, prepare_replay
from mixer.control.rundir import load_origin, load_schedule
from mixer.core.errors import ResumeError
from mixer.core.plan import Cursor
from mixer.core.schedule import MixtureSchedule
from mixer.data.corpus import CatalogRows
from mixer.run import RunConfig, differences, make_policy, make_prior, open_rows, plan_length, target_names
from mixer.training import checkpoint
from mixer.training.checkpoint_folder import Record

DECIDES = ("policy", "prior", "rails", "controller", "train.windows", "train.tokens")


@dataclass(frozen=True, slots=True)
class Made:
    """A run folder that can be trained."""

    config: RunConfig
    rows: CatalogRows
    text: str  # what it is


# ---- replay ------------------------------------------------------------------------------------------------


def make_replay(source: Path, config: RunConfig, *, stretch: bool = False) -> Made:
    """The config's folder as one that repeats the schedule of `source`, a run or a schedule file.

    A folder that does so already is left as it is, to be gone on with. Without a length of its own the config
    takes the schedule's.
    """
    saved, folder, rows = load_schedule(source), config.run.folder, open_rows(config)
    if config.train.windows is None and config.train.tokens is None:
        config = replace(config, train=replace(config.train, windows=len(saved)))
    if (folder / "schedule.jsonl").exists():
        origin = load_origin(folder) or {}
        if (origin.get("kind"), origin.get("source")) != (REPLAY, str(source.absolute())):
            raise ResumeError(
                f"replay refused: {folder} holds a run that is no replay of {source.absolute()}. "
                "Name another folder with run.path=..."
            )
        return Made(config, rows, _replay_text(source, saved, load_schedule(folder), origin["stretched"]))
    if folder.exists():
        require_free(folder)
    schedule = prepare_replay(
        source,
        folder,
        rows.catalog,
        config.geometry,
        plan_length(config, rows.catalog),
        stretch=stretch,
        config=configs.to_text(config),
    )
    text = _replay_text(source, saved, schedule, bool((load_origin(folder) or {})["stretched"]))
    with Journal(folder / "journal.jsonl") as journal:
        journal.append({"kind": "event", "time": time.time(), "what": "replay", "text": text,
                        "window": 0, "steps": 0})  # fmt: skip
    return Made(config, rows, text)


def _replay_text(source: Path, saved: MixtureSchedule, schedule: MixtureSchedule, stretched: bool) -> str:
    old, new = saved.geometry.window_slots, schedule.geometry.window_slots
    if stretched:
        return (
            f"the schedule of {source}, stretched from {len(saved)} windows of {old} rows to {len(schedule)} of {new}"
        )
    return f"the schedule of {source}, exact: {len(schedule)} windows of {new} rows"


# ---- fork --------------------------------------------------------------------------------------------------


def make_fork(
    source: Path,
    target: Path,
    at_step: int,
    *,
    policy: Path | None = None,
    catalog: Path | None = None,
    overrides: Sequence[str] = (),
) -> Made:
    """`target` as a run that goes on from the source's newest checkpoint at or before `at_step`.

    Where nothing is changed of what decides, it is a plain branch: the policy goes on from the state it had there.
    Else it starts anew from the mixture in force. Another catalog can come into force only where a window begins,
    and so only checkpoints that stand there are looked at.
    """
    given = [f"corpus.catalog={catalog}"] if catalog else []
    before, config = _configs(source, policy, [*overrides, *given])
    schedule = load_schedule(source)
    if config.geometry != schedule.geometry:
        raise ResumeError(
            f"fork of {source} refused: it has {schedule.geometry}, this config {config.geometry}. Row order depends "
            "on it. Keep it, or replay the schedule with --stretch."
        )
    rows = open_rows(config)
    found, cursor = _checkpoint(source, schedule, at_step, rows)
    in_force = schedule.row(max(begun_windows(cursor) - 1, 0)).catalog
    changed = {key for key, _, _ in differences(before, config)}
    same_rows = rows.catalog.fingerprint == in_force.fingerprint
    plain = same_rows and not any(_within(key, DECIDES) for key in changed)
    if not plain and not any(_within(key, ("prior",)) for key in changed):
        config = replace(config, prior=prior_at(schedule, cursor, rows.catalog).to_dict(rows.catalog))
    config = replace(config, run=replace(config.run, path=str(target.absolute())))
    config = _nested(config, source, target)
    prepare_fork(
        source,
        target,
        cursor=cursor,
        policy=make_policy(config),
        options=config.controller,
        rails=config.rails,
        planned_windows=plan_length(config, rows.catalog),
        targets=target_names(config, rows),
        catalog=rows.catalog,
        prior=make_prior(config, rows.catalog),
        plain=plain,
        checkpoint=found,
        config=configs.to_text(config),
    )
    what = "a plain branch of" if plain else "a fork of"
    where = f"window {cursor.window}" + (f", step {cursor.step}" if cursor.step else "")
    return Made(config, rows, f"{what} {source} at its checkpoint of {int(found.name)} steps ({where})")


def _configs(source: Path, policy: Path | None, overrides: Sequence[str]) -> tuple[RunConfig, RunConfig]:
    """The source's, and that of its fork; options of one kind of policy are not those of another."""
    saved, files = source / "run.yaml", [policy] if policy else []
    before = configs.load(RunConfig, [saved])
    config = configs.load(RunConfig, [saved, *files], overrides)
    if policy or config.policy.get("kind") != before.policy.get("kind"):
        its = configs.load(RunConfig, files, [one for one in overrides if one.startswith("policy.")])
        config = replace(config, policy=its.policy)
    return before, config


def _checkpoint(source: Path, schedule: MixtureSchedule, at_step: int, rows: CatalogRows) -> tuple[Path, Cursor]:
    """The newest that the fork can begin with."""
    folder, most = source / "checkpoints", at_step
    while (found := checkpoint.find(folder, most)) is not None:
        cursor = Record.read(found).cursor
        in_force = schedule.row(max(begun_windows(cursor) - 1, 0)).catalog
        if cursor.step == 0 or rows.catalog.fingerprint == in_force.fingerprint:
            return found, cursor
        most = int(found.name) - 1
    there = ", ".join(str(int(path.name)) for path in sorted(folder.glob("[0-9]*"))) if folder.is_dir() else ""
    raise ResumeError(
        f"fork of {source} refused: no checkpoint at or before step {at_step} can be used; there are those of "
        f"{there or 'no'} steps. Another catalog needs one at the start of a window. Name a later step, or keep more "
        "of them with checkpoint.keep_every_windows."
    )


def _within(key: str, sections: Sequence[str]) -> bool:
    return any(key == section or key.startswith(f"{section}.") for section in sections)


def _nested(config: RunConfig, source: Path, target: Path) -> RunConfig:
    """Where both runs are in one tracker the fork's belongs to the source's."""
    try:
        parent = json.loads((source / "tracker.json").read_text("utf-8"))["run_id"]
    except (OSError, ValueError, KeyError):
        return config
    one_place = config.tracker.uri or target.absolute().parent == source.absolute().parent
    if not parent or not one_place or config.tracker.kind == "none":
        return config
    return replace(config, tracker=replace(config.tracker, parent=parent))
