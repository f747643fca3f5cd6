"""One proxy: a small run of its own under a fixed mixture, and the file that says what came of it.

    <swarm>/proxies/<run>/            a run folder as any other: report, show and train read it
    <swarm>/proxies/<run>/result.json its rows of the table, once it is finished

A proxy that was killed goes on from its newest checkpoint, and has the losses that it would have had. What is finished
is not done again: the result names the swarm it is of, and one of another swarm is refused.
"""

import hashlib
import json
import logging
import math
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from mixer import config as configs
from mixer.alone import run_alone
from mixer.control.fence import write_whole
from mixer.control.journal import read_journal
from mixer.control.rundir import load_schedule
from mixer.core.catalog import Catalog
from mixer.core.errors import ConfigError, DataError, MixerError, ResumeError
from mixer.core.rails import GuardRails
from mixer.data.corpus import CatalogRows
from mixer.proxies.options import SwarmOptions
from mixer.proxies.reference import mean_weights
from mixer.proxies.table import MIXTURES, RunTable
from mixer.run import RunConfig, deciding, plan_length

logger = logging.getLogger(__name__)

FORMAT = 1
RESULT = "result.json"
LOOK_EVERY_S = 0.5  # between looks for the file that asks to stop
LENGTH = ("windows", "tokens")  # of which a run has one
PATIENCE_S = 30.0  # for the tracker at the end of a proxy


@dataclass(frozen=True, slots=True)
class Task:
    """What one task is sent."""

    run: str
    config: RunConfig
    identity: Mapping[str, Any]  # of the swarm, with this run's mixture alone
    points: int
    keep_checkpoints: bool
    stop: Path  # a file that asks all proxies to save themselves and to end


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a task ended. `lost` is said by who runs tasks, of one that did not come back."""

    ending: Literal["finished", "stopped", "failed", "lost"]
    text: str = ""


# ---- what a proxy is ---------------------------------------------------------------------------------------


def proxy_of(config: RunConfig, options: SwarmOptions, catalog: Catalog) -> RunConfig:
    """What all proxies share: the configuration with the overrides, and what makes it a proxy."""
    plain = configs.to_plain(config)
    train = options.overrides.get("train")
    if isinstance(train, Mapping) and any(train.get(key) is not None for key in LENGTH):
        plain["train"] |= dict.fromkeys(LENGTH)
    if "model" in options.overrides:
        plain["pretrained"] = None
    plain |= {"rails": configs.to_plain(GuardRails()), "policy": {"kind": "fixed"}, "prior": "natural"}
    plain |= {"prepare": None, "swarm": None}
    plain["evaluation"]["at_start"] = False
    plain["checkpoint"] |= {"every_windows": None, "keep": 2, "keep_every_windows": None}
    proxy = configs.build(RunConfig, _merged(plain, options.overrides), "")
    train = replace(
        proxy.train,
        num_workers=1,
        cpus_per_worker=max(options.cpus_per_run, 1.0),
        gpu=options.gpus_per_run > 0,
        strategy="ddp",
    )
    corpus = config.corpus
    if not corpus.path and config.prepare is not None:  # where `open_rows` finds it
        corpus = replace(corpus, path=f"{config.prepare.output.rstrip('/')}/train", storage=config.prepare.storage)
    proxy = replace(proxy, train=train, corpus=corpus)
    windows = plan_length(proxy, catalog)
    if windows % options.points:
        near = [n for n in range(1, windows + 1) if windows % n == 0]
        raise ConfigError(
            f"swarm.points={options.points} of proxies of {windows} windows do not fall between windows. Use one of "
            f"{', '.join(map(str, near[:12]))}, or another length by swarm.overrides.train.windows."
        )
    every = windows // options.points
    return replace(
        proxy,
        evaluation=replace(proxy.evaluation, every_windows=every),
        checkpoint=replace(proxy.checkpoint, every_windows=proxy.checkpoint.every_windows or every),
    )


def _merged(low: dict[str, Any], high: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(low)
    for key, value in high.items():
        before = merged.get(key)
        merged[key] = _merged(before, value) if isinstance(before, dict) and isinstance(value, Mapping) else value
    return merged


def identity_of(
    proxy: RunConfig, options: SwarmOptions, rows: CatalogRows, weights_of: Mapping[str, NDArray[np.float64]]
) -> dict[str, Any]:
    """What makes runs comparable, by dotted key, and each run's mixture as a digest."""
    identity = {key: value for key, value in deciding(proxy).items() if key.partition(".")[0] != "policy"}
    plain = configs.to_plain(proxy)
    identity |= {f"geometry.{key}": value for key, value in plain["geometry"].items()}
    identity |= {f"evaluation.{key}": plain["evaluation"][key] for key in ("rows", "seed", "sets")}
    identity |= {"corpus": rows.corpus.fingerprint, "catalog": rows.catalog.fingerprint, "swarm.points": options.points}
    return identity | {MIXTURES: {run: digest(weights_d) for run, weights_d in weights_of.items()}}


def digest(weights_d: NDArray[np.float64]) -> str:
    return hashlib.sha256(weights_d.astype("<f8").tobytes()).hexdigest()[:16]


def only(identity: Mapping[str, Any], run: str) -> dict[str, Any]:
    """An identity that knows of one run."""
    return dict(identity) | {MIXTURES: {run: identity[MIXTURES][run]}}


# ---- what a task does --------------------------------------------------------------------------------------


def run_proxy(
    task: Task, *, rows: CatalogRows, on_record: Callable[[Mapping[str, Any]], None] = lambda record: None
) -> Outcome:
    """Train the proxy from where it stands, and leave its result. What trying again would not change is an outcome."""
    folder = task.config.run.folder
    try:
        if read_result(folder, task.identity) is not None:
            return Outcome("finished")
        for _ in range(2):
            ending = run_alone(task.config, rows, stop=_Stop(task.stop), on_record=on_record, patience_s=PATIENCE_S)
            if ending == "stopped":
                return Outcome("stopped")
            if ending != "finished":
                return Outcome("failed", f"{ending}: a step had no finite loss; {folder}/journal.jsonl names the rows")
            if (found := _measured(task, rows.catalog)) is not None:
                _write_result(folder, task, found)
                if not task.keep_checkpoints:
                    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
                return Outcome("finished")
            logger.warning("%s is trained anew: its journal lacks some of its evaluations", folder)
            shutil.rmtree(folder)
        return Outcome("failed", f"{folder}/journal.jsonl lacks evaluations, though the proxy was trained twice")
    except MixerError as error:
        return Outcome("failed", " ".join(str(error).split()))


class _Stop:
    """Whether the file is there; looked for from time to time only."""

    def __init__(self, path: Path) -> None:
        self._path, self._found, self._next_s = path, False, 0.0

    def __call__(self) -> bool:
        now_s = time.monotonic()
        if not self._found and now_s >= self._next_s:
            self._found, self._next_s = self._path.exists(), now_s + LOOK_EVERY_S
        return self._found


def _measured(task: Task, catalog: Catalog) -> list[dict[str, Any]] | None:
    """The run's rows as the table wants them; None if an evaluation is missing."""
    folder, config = task.config.run.folder, task.config
    windows = plan_length(config, catalog)
    every = windows // task.points
    wanted = range(every, windows + 1, every)
    sets = {
        record["window"]: record["sets"]
        for _, record in read_journal(folder / "journal.jsonl")
        if record["kind"] == "evaluation" and record["window"] in wanted
    }
    if len(sets) < task.points:
        return None
    schedule = load_schedule(folder)
    window_tokens = config.geometry.window_slots * catalog.row_tokens
    return [
        {
            "progress": done / windows,
            "tokens": done * window_tokens,
            "weights": dict(zip(catalog.names, _weights(schedule, done), strict=True)),
            "losses": {name: one.get("loss") for name, one in sets[done].items()},
        }
        for done in wanted
    ]


def _weights(schedule: Any, done: int) -> list[float]:
    return mean_weights(schedule.row(window) for window in range(done)).tolist()


# ---- the result ----------------------------------------------------------------------------------------------


def _write_result(folder: Path, task: Task, rows: list[dict[str, Any]]) -> None:
    value = {"format": FORMAT, "run": task.run, "identity": dict(task.identity), "rows": rows}
    write_whole(folder / RESULT, (json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode())


def read_result(folder: Path, identity: Mapping[str, Any]) -> RunTable | None:
    """The rows that a proxy left in its folder, if it is finished; refused if they are of another swarm."""
    path = folder / RESULT
    try:
        value = json.loads(path.read_text("utf-8"))
        if value["format"] != FORMAT:
            raise DataError(f"{path} has format {value['format']}; this mixer reads {FORMAT}. Remove {folder}.")
        held: Mapping[str, Any] = value["identity"]
        keys = sorted(held.keys() | identity.keys())
        other = next((key for key in keys if held.get(key) != identity.get(key)), None)
        table = _table(value)
    except FileNotFoundError:
        return None
    except (OSError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{path} is no result of a proxy: {error!r}. Remove {folder} to train it anew.") from error
    if other is not None:
        raise ResumeError(
            f"{path} is of a swarm with {other}={held.get(other)}; this one has {identity.get(other)}. Use the old "
            "value, or another folder with run.path=..."
        )
    return table


def _table(value: Mapping[str, Any]) -> RunTable:
    rows = value["rows"]
    domains = tuple(rows[0]["weights"])
    sets = sorted({name for row in rows for name in row["losses"]})

    def loss(row: Mapping[str, Any], name: str) -> float:
        found = row["losses"].get(name)
        return math.nan if found is None else found

    return RunTable(
        domains=domains,
        run_r=(value["run"],) * len(rows),
        progress_r=np.array([row["progress"] for row in rows], dtype=np.float64),
        tokens_r=np.array([row["tokens"] for row in rows], dtype=np.int64),
        weights_rd=np.array([[row["weights"][name] for name in domains] for row in rows], dtype=np.float64),
        losses={name: np.array([loss(row, name) for row in rows], dtype=np.float64) for name in sets},
        identity=value["identity"],
    )
