"""The controller's client, in workers and in the tasks that read rows: a `MixtureFeed` and a `SignalSink`.

While the actor is being restarted its clients wait and ask again, for at most `patience_s`; then the run ends with
an error, since rows cannot be had any more. Signals and notes are sent behind the caller's back, in order; a
signal is kept until the controller wants later ones only.
"""

import queue
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError

from mixer.core.catalog import Catalog
from mixer.core.errors import MixerError, ScheduleError
from mixer.core.row import ScheduleRow
from mixer.core.signal import Signal

KEPT_ROWS = 64


def to_plain(row: ScheduleRow) -> tuple[Any, ...]:
    """A row as it travels: with its catalog's fingerprint, since a catalog may be large and is mostly known."""
    return (
        row.window,
        row.catalog.fingerprint,
        row.weights_d,
        row.counts_d,
        row.offsets_d,
        row.carry_d,
        row.signals_through,
        row.reason,
    )


class ControllerClient:
    """Pickles as the actor's handle."""

    def __init__(self, actor: Any, *, patience_s: float = 300.0) -> None:
        self._actor, self._patience_s = actor, patience_s
        self._rows: dict[int, ScheduleRow] = {}
        self._catalogs: dict[str, Catalog] = {}
        self._sender: _Sender | None = None

    def __reduce__(self) -> Any:
        return _client, (self._actor, self._patience_s)

    # ---- feed

    def row(self, window: int) -> ScheduleRow:
        deadline = time.monotonic() + self._patience_s
        while window not in self._rows:
            # While the actor answers, an undecided window is nothing to lose patience over.
            found = self.call("rows", window, deadline=deadline)
            deadline = time.monotonic() + self._patience_s
            for number, fingerprint, *values in found:
                self._rows[number] = ScheduleRow(number, self._catalog(fingerprint), *values)
        for old in [k for k in self._rows if k < window - KEPT_ROWS]:
            del self._rows[old]
        return self._rows[window]

    def _catalog(self, fingerprint: str) -> Catalog:
        if fingerprint not in self._catalogs:
            self._catalogs[fingerprint] = self.call("catalog", fingerprint)
        return self._catalogs[fingerprint]

    # ---- sink

    @property
    def _sending(self) -> "_Sender":
        if self._sender is None:
            self._sender = _Sender(self)
        return self._sender

    def report(self, signal: Signal, record: Mapping[str, Any] | None = None) -> None:
        self._sending.put(signal, {"time": time.time(), **(record or {})} if record else {})

    def note(self, record: Mapping[str, Any]) -> None:
        self._sending.put(None, {"time": time.time(), **record})

    def settle(self) -> None:
        self._sending.settle()

    def wants_stop(self) -> bool:
        return self._sending.stop

    # ---- questions

    def open(self) -> None:
        self.call("open")

    def fail(self, error: MixerError) -> None:
        self.call("fail", type(error).__name__, str(error))

    def failure(self) -> tuple[str, str] | None:
        return self.call("failure")

    def call(self, method: str, *args: Any, deadline: float | None = None) -> Any:
        """Ask the actor; while it is being restarted, wait and ask again."""
        deadline = deadline or time.monotonic() + self._patience_s
        wait_s = 0.05
        while True:
            try:
                return ray.get(getattr(self._actor, method).remote(*args))
            except RayTaskError as error:
                cause = getattr(error, "cause", None)
                raise cause if isinstance(cause, MixerError) else error from None
            except RayActorError as error:
                if time.monotonic() > deadline:
                    raise ScheduleError(
                        f"the run's controller has not answered for {self._patience_s:.0f} s: {error}. "
                        "Start the run again; it goes on where its schedule ends."
                    ) from error
            time.sleep(wait_s)
            wait_s = min(wait_s * 2, 1.0)


def _client(actor: Any, patience_s: float) -> ControllerClient:
    return ControllerClient(actor, patience_s=patience_s)


class _Sender:
    """Sends in order, behind the loop's back; keeps a signal until the controller wants later ones only."""

    def __init__(self, client: ControllerClient) -> None:
        self.stop = False
        self._client = client
        self._queue: queue.SimpleQueue[tuple[Signal | None, dict[str, Any]]] = queue.SimpleQueue()
        self._kept: dict[int, tuple[Signal, dict[str, Any]]] = {}
        self._error: BaseException | None = None
        self._idle = threading.Condition()
        self._waiting = 0  # put and not yet taken by the actor
        threading.Thread(target=self._send, name="mixer-signals", daemon=True).start()

    def put(self, signal: Signal | None, record: dict[str, Any]) -> None:
        self._raise()
        with self._idle:
            self._waiting += 1
        self._queue.put((signal, record))

    def settle(self) -> None:
        with self._idle:
            self._idle.wait_for(lambda: self._error is not None or (not self._waiting and not self._kept))
        self._raise()

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _send(self) -> None:
        try:
            while True:
                try:
                    signal, record = self._queue.get(timeout=1.0)
                except queue.Empty:
                    self.stop |= self._client.call("note", [])
                    if self._kept:
                        self._report_kept()
                    continue
                if signal is None:
                    self.stop |= self._client.call("note", [record])
                else:
                    self._kept[signal.window] = (signal, record)
                    self._report_kept()
                with self._idle:
                    self._waiting -= 1
                    self._idle.notify_all()
        except BaseException as error:  # whatever it is, the loop raises it
            with self._idle:
                self._error = error
                self._idle.notify_all()
            # The loop may be waiting for rows that nobody will decide now.
            with suppress(Exception):
                self._client.fail(
                    error if isinstance(error, MixerError) else MixerError(f"a signal was lost: {error!r}")
                )

    def _report_kept(self) -> None:
        for window in sorted(self._kept):
            following, stop = self._client.call("report", *self._kept[window])
            self.stop |= stop
            for known in [k for k in self._kept if k < following]:
                del self._kept[known]
        with self._idle:
            self._idle.notify_all()
