"""A swarm: many proxies at once, each on a mixture of its own, and their losses in one table.

    <run.path>/swarm.json          what the swarm is: written first, and a start under other options is refused by it
    <run.path>/proxies/<run>/      each proxy's run folder, see `mixer.proxies.proxy`
    <run.path>/swarm.parquet       what came of them, see `mixer.proxies.table`; grows as they finish
    <run.path>/tracker.json        the parent run at the tracker, of which the proxies' runs are the children
    <run.path>/owner.json, *.lock  the fence: a swarm has one driver

The same command goes on with what is missing. Nothing that is finished is done again; a proxy that was cut off goes on
from its newest checkpoint; the table has the same bytes whatever was killed and when. What a proxy is depends on the
configuration, the corpus and its mixture alone, so a larger swarm may be asked for later where its generator begins
with the same mixtures (regmix does not, nor does climb).
"""

import json
import logging
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from mixer import config as configs
from mixer.control.fence import Fence, write_whole
from mixer.control.parent import ParentRun
from mixer.control.tracker import uri_of
from mixer.core.catalog import Catalog
from mixer.core.errors import ConfigError, DataError, MixerError
from mixer.data.corpus import CatalogRows
from mixer.proxies.options import SwarmOptions
from mixer.proxies.proxy import RESULT, Outcome, Task, identity_of, only, proxy_of, read_result, run_proxy
from mixer.proxies.rounds import num_runs, rounds
from mixer.proxies.table import TABLE, RunTable, append, joined, read_table, write_table
from mixer.proxies.tasks import Tasks
from mixer.run import RunConfig
from mixer.training.evaluation import Evaluator

logger = logging.getLogger(__name__)

ABOUT, STOP, PROXIES = "swarm.json", "stop", "proxies"
NAMED = 5  # failed proxies that an error names


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a swarm is."""

    finished: int
    failed: int
    runs: int
    last: str = ""  # the proxy that ended last, and how


@dataclass(frozen=True, slots=True)
class Finish:
    ending: Literal["finished", "stopped"]
    table: RunTable | None  # None while no proxy is finished
    path: Path
    progress: Progress


class FailedError(MixerError):
    """Proxies that failed, after all others are done."""


# ---- the driver ----------------------------------------------------------------------------------------------


def run_swarm(
    config: RunConfig,
    rows: CatalogRows,
    tasks: Tasks,
    *,
    on_progress: Callable[[Progress], None] = lambda progress: None,
    work: Callable[..., Outcome] = run_proxy,
) -> Finish:
    """Begin the swarm, or go on with it, until every proxy is done or somebody stops it.

    An error at the end names the proxies that failed; the table has all others by then. SIGINT or SIGTERM asks the
    proxies to save themselves and to end, a second one is a KeyboardInterrupt.
    """
    options = options_of(config)
    proxy, folder = proxy_of(config, options, rows.catalog), config.run.folder
    coming = rounds(config, options, rows.catalog, folder / TABLE)
    weights_of = next(coming)
    _require_sets(proxy, rows)
    folder.mkdir(parents=True, exist_ok=True)
    fence = Fence(folder)
    try:
        identity = _begin(folder, config, identity_of(proxy, options, rows, weights_of))
        (folder / STOP).unlink(missing_ok=True)
        parent = ParentRun(config.tracker, folder, {"mixer.kind": "swarm", "mixer.corpus": rows.corpus.fingerprint})
        progress = Progress(0, 0, num_runs(options))
        try:
            while True:
                jobs = _jobs(config, proxy, identity, weights_of, rows.catalog, parent.run_id)
                finish = _drive(folder, jobs, identity, tasks, partial(work, rows=rows), on_progress, progress)
                following = next(coming, None) if finish.ending == "finished" else None
                if following is None:
                    break
                weights_of, progress = following, finish.progress
                identity = _begin(folder, config, identity_of(proxy, options, rows, weights_of))
        except BaseException as error:
            parent.close("FAILED" if isinstance(error, Exception) else "KILLED", _files(folder))
            raise
        parent.close("FINISHED" if finish.ending == "finished" else "KILLED", _files(folder))
        return finish
    finally:
        fence.close()


def options_of(config: RunConfig) -> SwarmOptions:
    if config.swarm is None:
        raise ConfigError(
            "the configuration has no section `swarm`, so nobody knows what a proxy is. Set one, as in swarm.runs=64 "
            "swarm.overrides.model.dim=64 swarm.overrides.train.windows=16."
        )
    return config.swarm


def _require_sets(proxy: RunConfig, rows: CatalogRows) -> None:
    if not Evaluator.beside(rows.corpus, proxy.evaluation).sets:
        raise ConfigError(
            f"there is nothing to measure proxies on: evaluation.sets={list(proxy.evaluation.sets)}, and beside "
            f"{rows.corpus.root} lies no such corpus. Prepare targets or a validation share with the corpus."
        )


def _begin(folder: Path, config: RunConfig, identity: dict[str, Any]) -> dict[str, Any]:
    """The identity, as it is from now on; refused if the folder is of another swarm."""
    about, table = folder / ABOUT, folder / TABLE
    try:
        identity = joined(json.loads(about.read_text("utf-8"))["identity"], identity, str(about))
    except FileNotFoundError:
        pass
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{about} cannot be read: {error!r}. Restore it, or name another run.path.") from error
    if table.exists():
        found = read_table(table)
        identity = joined(found.identity, identity, str(table))
        write_table(table, replace(found, identity=identity))  # of a swarm that has grown
    value = {"format": 1, "identity": identity}
    write_whole(about, (json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode())
    write_whole(folder / "swarm.yaml", configs.to_text(config).encode())
    return identity


def _files(folder: Path) -> tuple[Path, ...]:
    return tuple(path for path in (folder / TABLE,) if path.exists())


def _jobs(
    config: RunConfig,
    proxy: RunConfig,
    identity: dict[str, Any],
    weights_of: Mapping[str, NDArray[np.float64]],
    catalog: Catalog,
    parent: str | None,
) -> list[Task]:
    folder, options = config.run.folder, options_of(config)
    uri = None if config.tracker.kind == "none" else uri_of(config.tracker, folder)
    jobs: list[Task] = []
    for run, weights_d in weights_of.items():
        tags = {"mixer.kind": "proxy", "mixer.proxy": run} | dict(config.tracker.tags)
        one = replace(
            proxy,
            run=replace(config.run, path=str(folder / PROXIES / run)),
            policy={"kind": "fixed", "weights": dict(zip(catalog.names, weights_d.tolist(), strict=True))},
            tracker=replace(
                config.tracker, uri=uri, parent=parent, name=f"{config.tracker.name or folder.name}/{run}", tags=tags
            ),
        )
        jobs.append(Task(run, one, only(identity, run), options.points, options.keep_checkpoints, folder / STOP))
    return jobs


def _drive(
    folder: Path,
    jobs: list[Task],
    identity: dict[str, Any],
    tasks: Tasks,
    work: Callable[[Task], Outcome],
    on_progress: Callable[[Progress], None],
    before: Progress,
) -> Finish:
    """One round."""
    table = folder / TABLE
    known = set(read_table(table).runs) if table.exists() else set[str]()
    missing: list[Task] = []
    for job in jobs:
        result = None if job.run in known else read_result(job.config.run.folder, job.identity)
        if result is not None:
            append(table, replace(result, identity=identity))
            known.add(job.run)
        elif job.run not in known:
            missing.append(job)
    failed: dict[str, str] = {}
    progress = replace(before, finished=before.finished + len(jobs) - len(missing))
    on_progress(progress)
    with _stopping(folder / STOP):
        for number, outcome in tasks.run(work, missing, folder / STOP):
            job = missing[number]
            if outcome.ending == "finished":
                result = read_result(job.config.run.folder, job.identity)
                if result is None:
                    outcome = Outcome("lost", f"there is no {RESULT} in {job.config.run.folder}")
                else:
                    append(table, replace(result, identity=identity))
                    known.add(job.run)
            if outcome.ending in ("failed", "lost"):
                failed[job.run] = outcome.text
                logger.warning("proxy %s %s: %s", job.run, outcome.ending, outcome.text)
            done = before.finished + sum(one.run in known for one in jobs)
            progress = Progress(done, len(failed), before.runs, f"{job.run} {outcome.ending}")
            on_progress(progress)
    if failed:
        raise _failed(failed, before.runs, table)
    ending = "finished" if progress.finished == before.finished + len(jobs) else "stopped"
    return Finish(ending, read_table(table) if table.exists() else None, table, progress)


def _failed(failed: dict[str, str], runs: int, table: Path) -> FailedError:
    named = "; ".join(f"{run}: {text}" for run, text in sorted(failed.items())[:NAMED])
    more = f"; and {len(failed) - NAMED} more" if len(failed) > NAMED else ""
    return FailedError(
        f"{len(failed)} of {runs} proxies failed and are left out of {table} ({named}{more}). The same command tries "
        "them again; --fit goes without them."
    )


@contextmanager
def _stopping(file: Path) -> Iterator[None]:
    """SIGINT and SIGTERM write the file that asks all proxies to end; the second one is a KeyboardInterrupt."""

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
