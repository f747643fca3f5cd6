"""A whole run in this process alone, without Ray: for small models, proxies and experiments.

It is the run of `mixer train` in all but where it runs: the same loop, controller, guard rails, schedule, journal and
checkpoints, in a folder that reports, replays, forks and `mixer train` itself read alike. Rows come from the
`WindowReader`. What is missing is what only a cluster has: several workers, and somebody who starts them again.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from mixer.control.fence import require_free
from mixer.control.openrun import OpenRun
from mixer.control.replay import REPLAY
from mixer.control.rundir import load_origin
from mixer.core.errors import ScheduleError
from mixer.core.plan import Cursor
from mixer.core.row import ScheduleRow
from mixer.core.signal import Signal
from mixer.data.corpus import CatalogRows
from mixer.data.reader import WindowReader
from mixer.run import Job, RunConfig, make_charge, make_parts, plan_length, require_same
from mixer.training import loop


class _Desk:
    """Feed and sink of a run that decides in its own process."""

    def __init__(self, run: OpenRun, stop: Callable[[], bool], on_record: Callable[[Mapping[str, Any]], None]) -> None:
        self._run, self._stop, self._on_record = run, stop, on_record

    def row(self, window: int) -> ScheduleRow:
        row = self._run.row_or_none(window)
        if row is None:
            raise ScheduleError(f"window {window} is not decided, and nobody is left to decide it. Report the run.")
        return row

    def report(self, signal: Signal, record: Mapping[str, Any] | None = None) -> None:
        self._run.report(signal, record or {})
        if record:
            self._on_record(record)

    def note(self, record: Mapping[str, Any]) -> None:
        self._run.note([record])
        self._on_record(record)

    def settle(self) -> None: ...

    def wants_stop(self) -> bool:
        return self._stop()


def run_alone(
    config: RunConfig,
    rows: CatalogRows,
    *,
    stop: Callable[[], bool] = lambda: False,
    on_record: Callable[[Mapping[str, Any]], None] = lambda record: None,
    report: bool = False,
    patience_s: float = 10.0,
) -> str:
    """Begin the run, or go on with it, until it ends; returns how: finished, stopped or bad_loss.

    `stop` is asked before every step; `on_record` sees what goes to the journal. `report` writes the pictures too.
    """
    folder = config.run.folder
    if folder.exists():
        require_free(folder)
    follows = False
    if (folder / "schedule.jsonl").exists():
        require_same(config, folder)
        follows = (load_origin(folder) or {}).get("kind") == REPLAY
    folder.mkdir(parents=True, exist_ok=True)
    absolute = replace(config, run=replace(config.run, path=str(folder)), train=replace(config.train, num_workers=1))
    run = OpenRun(make_charge(absolute, rows, follows=follows))
    try:
        run.note([{"kind": "event", "what": "begun", "text": f"alone in process {os.getpid()}"}])
        desk = _Desk(run, stop, on_record)
        parts = make_parts(Job(absolute, rows, desk, None, plan_length(config, rows.catalog)), desk)

        def batches(*, rank: int, world_size: int, cursor: Cursor) -> Iterator[Any]:
            windows = parts.planned_windows
            reader = WindowReader(rows, desk, config.geometry, rank=rank, world_size=world_size, windows=windows)
            reader.cursor = cursor
            return iter(reader)

        return loop.train_here(replace(parts, batches=batches))
    except Exception as error:
        run.note([{"kind": "event", "what": "failed", "text": str(error) or repr(error)}])
        raise
    finally:
        run.close(patience_s, report=report)
