"""The controller of a run as a Ray actor.

A shell: it opens the run folder, and decides through `Controller`. Ray restarts it when its process dies, and then
it is made from the run folder alone; its clients (`mixer.control.client`) wait so long.

Asking for rows does not poll: the call waits in the actor until the row exists, and brings all that exist from
there on. Catalogs travel once each, by their fingerprint.

Everything that a run's people may want to know passes through here too, into the journal; and the tracker, which
reads the journal, lives in this process. Only this process writes into the run folder (checkpoints apart).
"""

import asyncio
import contextlib
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import ray

from mixer.control.client import ControllerClient, to_plain
from mixer.control.controller import Controller, ControllerOptions
from mixer.control.fence import write_whole
from mixer.control.journal import Journal, read_journal
from mixer.control.report import write_report
from mixer.control.rundir import RunDir
from mixer.control.tracker import Tracker, TrackerOptions, open_tracker
from mixer.core.catalog import Catalog
from mixer.core.errors import ResumeError, ScheduleError
from mixer.core.mixture import Mixture
from mixer.core.plan import Geometry
from mixer.core.ports import Policy, State
from mixer.core.rails import GuardRails
from mixer.core.row import ScheduleRow
from mixer.core.schedule import MixtureSchedule
from mixer.core.signal import Signal

logger = logging.getLogger(__name__)

NAMESPACE = "mixer"
ROWS_AT_ONCE = 64
ENDINGS = ("finished", "stopped", "bad_loss")  # events by which the workers say how they ended
WAIT_S = 20.0  # a question for rows waits so long in the actor before it is asked anew
CALLS_AT_ONCE = 10_000  # every rank's reader may wait for a row


@dataclass(frozen=True, slots=True, kw_only=True)
class Charge:
    """All that a run's actor needs to begin or to go on, and that outlives the actor's process."""

    folder: Path
    options: ControllerOptions
    policy: Policy | None  # None: a saved schedule is followed, and nothing is decided
    catalog: Catalog
    geometry: Geometry
    prior: Mixture
    rails: GuardRails
    planned_windows: int | None
    config: str = ""
    tracker: TrackerOptions = field(default_factory=TrackerOptions)
    takeover: bool = False


def actor_name(folder: Path) -> str:
    """One actor a run folder."""
    return f"run {folder}"


def start_actor(charge: Charge) -> Any:
    """The run's actor, on this node, opened; refuses at once if somebody else owns the run."""
    here = ray.get_runtime_context().get_node_id()
    make: Any = ray.remote(ControllerActor)
    try:
        actor = make.options(
            name=actor_name(charge.folder),
            namespace=NAMESPACE,
            num_cpus=0,
            max_restarts=-1,
            max_concurrency=CALLS_AT_ONCE,
            label_selector={"ray.io/node-id": here},
        ).remote(charge)
    except ValueError as error:  # the name is taken
        raise ResumeError(f"{charge.folder} is being run on this cluster already. Wait for it, or stop it.") from error
    ControllerClient(actor).open()
    return actor


def find_actor(folder: Path) -> Any:
    try:
        return ray.get_actor(actor_name(folder), namespace=NAMESPACE)
    except ValueError as error:
        raise ScheduleError(f"{folder} is not being run on this cluster. Name another run or address.") from error


class ControllerActor:
    """One run. Every method opens the run first, if this process has not: it may be a new one."""

    def __init__(self, charge: Charge) -> None:
        self._charge = charge
        self._opening = threading.Lock()
        self._run: _Run | None = None
        self._changed = asyncio.Event()
        self._stop = self._closed = False
        self._failure: tuple[str, str] | None = None

    def _opened(self) -> "_Run":
        with self._opening:
            if self._closed:
                raise ScheduleError(f"the run of {self._charge.folder} has been closed. Start it again to go on.")
            if self._run is None:
                self._run = _Run(self._charge)
            return self._run

    async def _in_thread(self, call: Any, *args: Any) -> Any:
        """What writes to disk must not hold up those who wait for rows."""
        run = await asyncio.to_thread(self._opened)
        before = len(run.schedule)
        answer = await asyncio.to_thread(call, run, *args)
        if len(run.schedule) != before:
            self._wake()
        return answer

    def _wake(self) -> None:
        event, self._changed = self._changed, asyncio.Event()
        event.set()

    async def open(self) -> int:
        return await self._in_thread(lambda run: len(run.schedule))

    async def rows(self, window: int) -> list[tuple[Any, ...]]:
        """The rows from `window` on, as many as exist; none if it does not exist within WAIT_S."""
        run = await asyncio.to_thread(self._opened)
        deadline = time.monotonic() + WAIT_S
        while run.row_or_none(window) is None:
            left = deadline - time.monotonic()
            if left <= 0:
                return []
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), left)
        last = min(len(run.schedule), window + ROWS_AT_ONCE)
        return [to_plain(run.schedule.row(k)) for k in range(window, last)]

    async def catalog(self, fingerprint: str) -> Catalog:
        run = await asyncio.to_thread(self._opened)
        schedule = run.schedule
        for end in [len(schedule), *reversed(schedule.switches)]:  # the last row of each stretch under one catalog
            if end and (catalog := schedule.row(end - 1).catalog).fingerprint == fingerprint:
                return catalog
        raise ScheduleError(f"no window of the run has catalog {fingerprint[:12]}. It belongs to another run.")

    async def report(self, signal: Signal, record: Mapping[str, Any]) -> tuple[int, bool]:
        """The next signal wanted, and whether the run should stop."""
        return await self._in_thread(_Run.report, signal, record), self._stop

    async def note(self, records: list[Mapping[str, Any]]) -> bool:
        await self._in_thread(_Run.note, records)
        return self._stop

    async def set_weights(self, weights: dict[str, float], why: str, window: int | None, hold: bool) -> int:
        """The window that the weights are bound to."""
        return await self._in_thread(lambda run: run.decider.set_weights(weights, why, window=window, hold=hold))

    async def pause_policy(self, why: str, window: int | None) -> int:
        return await self._in_thread(lambda run: run.decider.pause_policy(why, window=window))

    async def resume_policy(self, why: str, window: int | None) -> int:
        return await self._in_thread(lambda run: run.decider.resume_policy(why, window=window))

    async def stop(self, why: str) -> None:
        """Ask the workers to save and to end."""
        self._stop = True
        await self.note([{"kind": "event", "what": "stop", "text": why}])

    async def fail(self, kind: str, text: str) -> None:
        """The run cannot go on; workers that are started again end at once with the same error."""
        self._failure = self._failure or (kind, text)

    async def failure(self) -> tuple[str, str] | None:
        return self._failure

    async def status(self) -> dict[str, Any]:
        run = await asyncio.to_thread(self._opened)
        return run.status() | {"failure": self._failure, "stop": self._stop}

    async def close(self, patience_s: float) -> int:
        """Let go of the run; returns how many records the tracker has not sent."""
        self._closed, run, self._run = True, self._run, None
        return await asyncio.to_thread(run.close, patience_s) if run is not None else 0

    async def pid(self) -> int:
        return os.getpid()


class _Run:
    """What the actor's process has open."""

    def __init__(self, charge: Charge) -> None:
        self._charge = charge
        # The process that Ray restarted this one for may be cut off rather than dead: then the fence stops it.
        context: Any = ray.get_runtime_context()
        again = bool(context.was_current_actor_reconstructed)
        self._rundir = RunDir(charge.folder, takeover=charge.takeover or again)
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
                    config=charge.config,
                )
            else:
                self._rundir.schedule.check_resume(charge.catalog, charge.geometry)
            self._journal = Journal(charge.folder / "journal.jsonl")
            self._last: dict[str, dict[str, Any]] = {}
            self._begun = False  # whether workers were started since the driver was
            self._ending = ""
            for _, record in read_journal(charge.folder / "journal.jsonl"):
                self._keep(record)
            self._say_where()
            self._tracker: Tracker = open_tracker(charge.tracker, charge.folder, self.schedule)
            if again:
                self.note([{"kind": "event", "what": "restart", "text": "the controller"}])
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
        self.note([record] if record else [])
        new = [self.schedule.row(k) for k in range(decided, len(self.schedule))]
        told = [row for row in new if self._controller and row.reason not in ("policy", "prior")]
        for row in told:
            assert self._controller is not None
            what, why = ("held", self._controller.trouble) if row.reason == "held" else ("order", row.reason)
            self.note([{"kind": "event", "what": what, "text": why, "window": row.window}])
        if new and self._controller is not None:
            values = policy_values(self._controller.state, self.schedule.last_catalog)
            self.note([{"kind": "policy", "window": signal.window, "values": values}] if values else [])
        return following

    def _keep(self, record: dict[str, Any]) -> None:
        self._last[record["kind"]] = record
        what = record["what"] if record["kind"] == "event" else ""
        if what in ("begun", "workers"):
            self._begun = what == "workers"
        if what in ENDINGS:
            self._ending = what

    def note(self, records: list[Mapping[str, Any]]) -> None:
        for record in records:
            whole = {"time": time.time(), **record}
            if whole["kind"] == "event":
                again = whole["what"] == "workers" and self._begun
                whole = {"window": None, "steps": None, **whole} | ({"what": "restart"} if again else {})
            if self._journal.append(whole):
                self._keep(whole)
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
            "last": dict(self._last),
            "ending": self._ending,
            "counts": dict(self._controller.counts) if self._controller is not None else {},
            "behind": self._tracker.behind,
        }

    def _say_where(self) -> None:
        """For people's commands on a live run."""
        context = ray.get_runtime_context()
        where = {
            "address": context.gcs_address,
            "namespace": NAMESPACE,
            "actor": actor_name(self._charge.folder),
            "pid": os.getpid(),
            "host": socket.gethostname(),
        }
        with contextlib.suppress(OSError):
            write_whole(self._charge.folder / "live.json", (json.dumps(where) + "\n").encode())

    def close(self, patience_s: float) -> int:
        """Writes the report, so that the tracker can send it, and gives the tracker that long to catch up."""
        self._journal.close()
        try:
            write_report(self._charge.folder)
        except Exception:
            logger.warning("the report of %s was not written; `mixer report` tries again", self._charge.folder,
                           exc_info=True)  # fmt: skip
        self._tracker.close(patience_s)
        behind = self._tracker.behind
        with contextlib.suppress(OSError):
            (self._charge.folder / "live.json").unlink(missing_ok=True)
        self._rundir.close()
        return behind


def policy_values(state: State, catalog: Catalog) -> dict[str, float]:
    """A policy's state as numbers with names: what is single, and what is by domain (`..._d`)."""
    values: dict[str, float] = {}
    for key, value in state.items():
        if value.ndim == 0:
            values[key] = float(value)
        elif value.shape == (len(catalog),) and key.endswith("_d"):
            values |= {f"{key[:-2]}/{name}": float(one) for name, one in zip(catalog.names, value, strict=True)}
    return {key: value for key, value in values.items() if np.isfinite(value)}
