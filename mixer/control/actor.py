"""The controller of a run as a Ray actor.

A shell: it opens the run folder, and decides through `Controller`. Ray restarts it when its process dies, and then
it is made from the run folder alone; its clients (`mixer.control.client`) wait so long.

Asking for rows does not poll: the call waits in the actor until the row exists, and brings all that exist from
there on. Catalogs travel once each, by their fingerprint.

What its process has open of the run is an `OpenRun`.
"""

import asyncio
import contextlib
import logging
import os
import socket
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray

from mixer.control.client import ControllerClient, to_plain
from mixer.control.openrun import Charge, OpenRun
from mixer.core import errors
from mixer.core.catalog import Catalog
from mixer.core.errors import MixerError, ResumeError, ScheduleError
from mixer.core.signal import Signal

logger = logging.getLogger(__name__)

NAMESPACE = "mixer"
ROWS_AT_ONCE = 64
WAIT_S = 20.0  # a question for rows waits so long in the actor before it is asked anew
CALLS_AT_ONCE = 10_000  # every rank's reader may wait for a row


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


def find_actor(name: str) -> Any:
    """By the name that the actor wrote into the live.json of its run."""
    try:
        return ray.get_actor(name, namespace=NAMESPACE)
    except ValueError as error:
        raise ScheduleError(f"nobody called {name!r} is on this cluster. Name another run or address.") from error


class ControllerActor:
    """One run. Every method opens the run first, if this process has not: it may be a new one."""

    def __init__(self, charge: Charge) -> None:
        self._charge = charge
        self._opening = threading.Lock()
        self._run: OpenRun | None = None
        self._changed = asyncio.Event()
        self._stop = self._closed = False
        self._failure: tuple[str, str] | None = None

    def _opened(self) -> "OpenRun":
        with self._opening:
            if self._closed:
                raise ScheduleError(f"the run of {self._charge.folder} has been closed. Start it again to go on.")
            if self._run is None:
                context: Any = ray.get_runtime_context()
                again = bool(context.was_current_actor_reconstructed)
                self._run = OpenRun(self._charge, again=again, where=self._where(context))
            return self._run

    def _where(self, context: Any) -> dict[str, Any]:
        return {
            "address": context.gcs_address,
            "namespace": NAMESPACE,
            "actor": actor_name(self._charge.folder),
            "pid": os.getpid(),
            "host": socket.gethostname(),
        }

    async def _in_thread(self, call: Any, *args: Any) -> Any:
        """What writes to disk must not hold up those who wait for rows."""
        run = await self._open_run()
        before = len(run.schedule)
        try:
            return await asyncio.to_thread(call, run, *args)
        finally:
            if len(run.schedule) != before:
                self._wake()

    async def _open_run(self) -> "OpenRun":
        """At once where it is open: who asks for rows that exist waits for no write and for no free thread."""
        return self._run or await asyncio.to_thread(self._opened)

    def _wake(self) -> None:
        event, self._changed = self._changed, asyncio.Event()
        event.set()

    async def open(self) -> int:
        return await self._in_thread(lambda run: len(run.schedule))

    async def rows(self, window: int) -> list[tuple[Any, ...]]:
        """The rows from `window` on, as many as exist; none if it does not exist within WAIT_S. Raises the error that
        the run fails with."""
        run = await self._open_run()
        deadline = time.monotonic() + WAIT_S
        while run.row_or_none(window) is None:
            if self._failure is not None:
                kind, text = self._failure
                raise getattr(errors, kind, MixerError)(text)
            left = deadline - time.monotonic()
            if left <= 0:
                return []
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), left)
        last = min(len(run.schedule), window + ROWS_AT_ONCE)
        return [to_plain(run.schedule.row(k)) for k in range(window, last)]

    async def catalog(self, fingerprint: str) -> Catalog:
        run = await self._open_run()
        schedule = run.schedule
        for end in [len(schedule), *reversed(schedule.switches)]:  # the last row of each stretch under one catalog
            if end and (catalog := schedule.row(end - 1).catalog).fingerprint == fingerprint:
                return catalog
        raise ScheduleError(f"no window of the run has catalog {fingerprint[:12]}. It belongs to another run.")

    async def report(self, signal: Signal, record: Mapping[str, Any]) -> tuple[int, bool]:
        """The next signal wanted, and whether the run should stop."""
        return await self._in_thread(OpenRun.report, signal, record), self._stop

    async def note(self, records: list[Mapping[str, Any]]) -> bool:
        await self._in_thread(OpenRun.note, records)
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
        self._wake()

    async def failure(self) -> tuple[str, str] | None:
        return self._failure

    async def status(self) -> dict[str, Any]:
        run = await self._open_run()
        return run.status() | {"failure": self._failure, "stop": self._stop}

    async def close(self, patience_s: float) -> int:
        """Let go of the run; returns how many records the tracker has not sent."""
        self._closed, run, self._run = True, self._run, None
        return await asyncio.to_thread(run.close, patience_s) if run is not None else 0

    async def pid(self) -> int:
        return os.getpid()
