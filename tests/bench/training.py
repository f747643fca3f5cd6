"""What the benches of training share: a corpus, a config, the time of every window, loops that take turns."""

import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray

from mixer.config import load
from mixer.core.plan import Cursor, Geometry
from mixer.core.signal import Signal
from mixer.data.corpus import Corpus
from mixer.data.reader import Batch, WindowReader
from mixer.run import RunConfig
from mixer.training.loop import Batches
from tests.bench.corpora import random_corpus
from tests.bench.peers.runs import REPOSITORY

BYTES = 257
ROWS = {f"domain-{d}": 4_000 + 1_000 * d for d in range(8)}
MOST_LOAD = 2.5  # of others, as a bench begins
QUIET_S = 0.3  # after everything is known to be done


def corpus_of(folder: Path, row_tokens: int) -> Corpus:
    return random_corpus(folder / f"bytes-{row_tokens}", ROWS, row_tokens, vocabulary=BYTES)


def config_of(corpus: Corpus, folder: Path, model: str, *overrides: str) -> RunConfig:
    """A run under an online policy; nothing but the first weights and the last is saved, and nothing evaluated."""
    plain = [
        f"run.path={folder}",
        f"corpus.path={corpus.root}",
        "train.num_workers=2",
        "train.cpus_per_worker=0.4",
        "train.threads=1",
        "train.max_failures=0",
        "train.timeout_s=120",
        "geometry.window_steps=16",
        "policy.kind=odm",
        "checkpoint.every_windows=null",
        "evaluation.every_windows=null",
        "evaluation.at_start=false",
    ]
    return load(RunConfig, [REPOSITORY / f"configs/model/{model}.yaml"], [*plain, *overrides])


@contextmanager
def own_ray(store_bytes: int = 300_000_000) -> Iterator[None]:
    """Two CPUs; one that runs in this process is used."""
    if ray.is_initialized():
        yield
        return
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        object_store_memory=store_bytes,
        namespace="mixer",
        log_to_driver=False,
        logging_level=logging.ERROR,
    )
    try:
        yield
    finally:
        ray.shutdown()


def is_quiet() -> bool:
    """Whether a figure that is taken now is worth keeping; says so if not."""
    load = os.getloadavg()[0]
    if load >= MOST_LOAD:
        print(f"nothing will be recorded: the machine has other work (a load of {load:.1f})", file=sys.stderr)
    return load < MOST_LOAD


# ---- the time of every window ----------------------------------------------------------------------------


@dataclass
class Times:
    """Of the windows of one rank, by number: seconds, and those that the loop waited for rows."""

    steps: int  # in a window
    seconds: dict[int, float] = field(default_factory=dict[int, float])
    waited: dict[int, float] = field(default_factory=dict[int, float])

    def watch(self, make: Batches, *, block: int, between: Callable[[int], None]) -> Batches:
        """The batches of `make`; `between` is called before each `block` of windows, on nobody's account."""

        def batches(*, rank: int, world_size: int, cursor: Cursor) -> Iterator[Any]:
            inner, begun = iter(make(rank=rank, world_size=world_size, cursor=cursor)), 0.0
            window = cursor.window
            between(window)
            begun, waited = time.perf_counter(), 0.0
            while True:
                asked = time.perf_counter()
                batch = next(inner, None)
                if batch is None:
                    return
                waited += time.perf_counter() - asked
                if batch.window != window:
                    raise AssertionError(f"window {batch.window} after {window} without an end")
                yield batch
                if batch.step == self.steps - 1:
                    self.seconds[window], self.waited[window] = time.perf_counter() - begun, waited
                    window += 1
                    if window % block == 0:
                        between(window)
                    begun, waited = time.perf_counter(), 0.0

        return batches

    def of_block(self, number: int, block: int) -> tuple[float, float]:
        """Seconds a window, and seconds it waited, over a block; not of its first window, which finds the rows of
        all windows ready that were waited for before it."""
        windows = range(number * block + 1, (number + 1) * block)
        return (
            sum(self.seconds[window] for window in windows) / len(windows),
            sum(self.waited[window] for window in windows) / len(windows),
        )


class Turns:
    """Two loops in one process that run one after the other, as a list of their names says."""

    def __init__(self, order: list[str]) -> None:
        self._order, self._place = order, 0
        self._changed = threading.Condition()
        self._error: BaseException | None = None

    def take(self, name: str) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._error is not None or self._now == name)
            if self._error is not None:
                raise RuntimeError("the other loop failed") from self._error

    def give(self) -> None:
        with self._changed:
            self._place += 1
            self._changed.notify_all()

    def fail(self, error: BaseException) -> None:
        with self._changed:
            self._error = self._error or error
            self._changed.notify_all()

    @property
    def _now(self) -> str:
        return self._order[self._place] if self._place < len(self._order) else ""


# ---- without a controller --------------------------------------------------------------------------------


class Silent:
    """A sink to which nothing matters."""

    def report(self, signal: Signal, record: Mapping[str, Any] | None = None) -> None:
        pass

    def settle(self) -> None:
        pass

    def note(self, record: Mapping[str, Any]) -> None:
        pass

    def wants_stop(self) -> bool:
        return False


def in_memory(rows: Any, schedule: Any, geometry: Geometry) -> Batches:
    """The batches of the schedule's first window, again and again, all in memory before the first is asked for."""

    def batches(*, rank: int, world_size: int, cursor: Cursor) -> Iterator[Batch]:
        reader = iter(WindowReader(rows, schedule, geometry, rank=rank, world_size=world_size, windows=1))
        kept = [batch._replace(tokens=batch.tokens.copy()) for batch in reader]
        window, step = cursor.window, cursor.step
        while True:
            yield kept[step]._replace(window=window)
            window, step = (window, step + 1) if step + 1 < len(kept) else (window + 1, 0)

    return batches
