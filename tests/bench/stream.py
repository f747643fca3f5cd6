"""One rank's batches through Ray Data: tokens a second, overhead a window, CPU time over all processes.

Nobody trains here: batches are taken as fast as they come. "live" asks a feed window by window, as a run
does, and every row is there; "lag" is shown the row of the window after the next only once the consumer is at
the next, as in a run with a lag of one window, so that no two windows travel together; "saved" reads a schedule.

    python -m tests.bench.stream [--folder DIR] [--seconds S] [--steps 16 256] [--no-record]
"""

import argparse
import logging
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import ray

from mixer.core.mixture import Mixture
from mixer.core.plan import Geometry
from mixer.core.ports import MixtureFeed
from mixer.core.row import ScheduleRow
from mixer.core.schedule import MixtureSchedule
from mixer.data.corpus import Corpus
from mixer.data.decided import Place
from mixer.data.reader import Batch, WindowReader
from mixer.data.stream import StreamingOptions, WindowStream
from tests.bench.corpora import random_corpus
from tests.bench.peers.processes import cpu_by_process
from tests.bench.record import record

STEPS = (16, 64, 256, 1024)
BATCH_ROWS, ROW_TOKENS = 8, 2048
NUM_ROWS = {f"domain-{d}": 3_000 + 1_000 * d for d in range(8)}
WARM_WINDOWS = 8
LAG = 1
AIM_TOKENS_S, AIM_OVERHEAD_S, AIM_CPU_S = 150e6, 0.010, 0.02
COMMAND = "python -m tests.bench.stream"


class Live:
    """A feed as in a run: nothing of it says which rows there are."""

    def __init__(self, schedule: MixtureSchedule) -> None:
        self._schedule = schedule

    def row(self, window: int) -> ScheduleRow:
        return self._schedule.row(window)


class Lagging:
    """A feed that shows no row further than `LAG` beyond the window the consumer is at, which is told by a file."""

    def __init__(self, schedule: MixtureSchedule, path: str) -> None:
        self._schedule = schedule
        self._path = path

    def row(self, window: int) -> ScheduleRow:
        consumed_1 = np.memmap(self._path, np.int64, "r")
        while window > consumed_1[0] + LAG:
            time.sleep(0.0005)
        return self._schedule.row(window)


def telling(batches: Iterator[Batch], place: Place) -> Iterator[Batch]:
    for batch in batches:
        if batch.step == 0:
            place.move(batch.window)
        yield batch


def measure(batches: Iterator[Batch], steps: int, seconds: float) -> dict[str, float]:
    """Seconds and CPU seconds a window of `steps`, and tokens a second; whole windows, after some to warm up."""
    begin = time.perf_counter()
    next(batches)
    first_s = time.perf_counter() - begin
    for _ in islice(batches, steps * WARM_WINDOWS - 1):
        pass
    windows, begin, before = 0, time.perf_counter(), cpu_by_process()
    while (taken := time.perf_counter() - begin) < seconds:
        assert sum(1 for _ in islice(batches, steps)) == steps
        windows += 1
    tokens = windows * steps * BATCH_ROWS * ROW_TOKENS
    cpu = sum(seconds - before.get(process, 0) for process, seconds in cpu_by_process().items())
    return {
        "window_s": taken / windows,
        "tokens_s": tokens / taken,
        "cpu_s_per_m_tokens": cpu / tokens * 1e6,
        "first_s": first_s,
    }


def run(corpus: Corpus, what: str, steps: int, seconds: float, options: StreamingOptions) -> dict[str, float]:
    geometry = Geometry(window_steps=steps, batch_rows=BATCH_ROWS, seed=1)
    windows = int((seconds + 5) * 1e9 / (steps * BATCH_ROWS * ROW_TOKENS)) + WARM_WINDOWS
    schedule = MixtureSchedule(corpus.catalog, geometry).extend(Mixture.natural(corpus.catalog), min(windows, 8_000))
    feed: MixtureFeed = schedule if what == "saved" else Live(schedule)
    if what == "lag":
        with Place(0) as place:
            feed = Lagging(schedule, place.path)
            stream = iter(WindowStream(corpus.by_source, feed, geometry, windows=len(schedule), options=options))
            with closing(stream):
                return measure(telling(stream, place), steps, seconds)
    if what == "reader":
        batches: Any = iter(WindowReader(corpus.by_source, feed, geometry, windows=len(schedule)))
    else:
        batches = iter(WindowStream(corpus.by_source, feed, geometry, windows=len(schedule), options=options))
    try:
        return measure(batches, steps, seconds)
    finally:
        batches.close()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where the corpus is kept between runs (default: a new one)")
    parser.add_argument("--seconds", type=float, default=3.0, help="measured, per kind and size of window")
    parser.add_argument("--steps", type=int, nargs="+", default=list(STEPS))
    parser.add_argument("--kinds", nargs="+", default=["reader", "live", "lag", "saved"])
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--prefetch-windows", type=int)
    parser.add_argument("--block-mb", type=float, default=StreamingOptions().block_mb)
    parser.add_argument("--no-record", action="store_true")
    options = parser.parse_args()
    streaming = StreamingOptions(prefetch_windows=options.prefetch_windows, block_mb=options.block_mb)
    found: dict[tuple[str, int], list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        corpus = random_corpus((options.folder or Path(temporary)) / "stream", NUM_ROWS, ROW_TOKENS)
        ray.init(
            address="local",
            num_cpus=2,
            include_dashboard=False,
            object_store_memory=1_000_000_000,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
        for _ in range(options.rounds):
            for steps in options.steps:
                for what in options.kinds:
                    result = run(corpus, what, steps, options.seconds, streaming)
                    found.setdefault((what, steps), []).append(result)
                    shown = "  ".join(f"{key} {value:.4g}" for key, value in result.items())
                    print(f"{what:6} {steps:5} steps  {shown}", flush=True)
        ray.shutdown()
    if not options.no_record:
        publish(found)
    return 0


def publish(found: dict[tuple[str, int], list[dict[str, float]]]) -> None:
    def median(what: str, steps: int, key: str) -> float:
        return statistics.median(result[key] for result in found[what, steps])

    def by_steps(what: str, key: str, scale: float, digits: int) -> dict[str, float]:
        return {str(steps): round(median(what, steps, key) * scale, digits) for kind, steps in found if kind == what}

    most = max(steps for _, steps in found)
    step_s = median("live", most, "window_s") / most

    def overhead_of(what: str) -> dict[str, float]:
        return {
            str(steps): round((median(what, steps, "window_s") - steps * step_s) * 1e3, 2)
            for kind, steps in found
            if kind == what and steps < most
        }

    overhead = overhead_of("live")
    speed = by_steps("live", "tokens_s", 1e-6, 1)
    record(
        figure="stream through Ray Data: tokens of one rank, by steps of 8 rows a window",
        value=speed,
        unit="M tokens/s",
        target=f">= {AIM_TOKENS_S / 1e6:.0f} at 256 steps",
        met=speed.get("256", 0) >= AIM_TOKENS_S / 1e6,
        peers={
            "a saved schedule": by_steps("saved", "tokens_s", 1e-6, 1),
            "a lag of one window, so each travels alone": by_steps("lag", "tokens_s", 1e-6, 1),
            "WindowReader in the training process": by_steps("reader", "tokens_s", 1e-6, 1),
        },
        command=COMMAND,
    )
    record(
        figure="stream through Ray Data: overhead a window, by steps of 8 rows",
        value=overhead,
        unit=f"ms beyond what its steps take in windows of {most}",
        target=f"<= {AIM_OVERHEAD_S * 1e3:.0f} ms",
        met=max(overhead.values()) <= AIM_OVERHEAD_S * 1e3,
        peers={"a lag of one window, so each travels alone": overhead_of("lag")},
        command=COMMAND,
    )
    cpu = by_steps("live", "cpu_s_per_m_tokens", 1, 4)
    record(
        figure="stream through Ray Data: CPU seconds over all processes, by steps of 8 rows a window",
        value=cpu,
        unit="s per M tokens",
        target=f"< {AIM_CPU_S}",
        met=max(cpu.values()) < AIM_CPU_S,
        peers={
            "a saved schedule": by_steps("saved", "cpu_s_per_m_tokens", 1, 4),
            "a lag of one window, so each travels alone": by_steps("lag", "cpu_s_per_m_tokens", 1, 4),
            "WindowReader in the training process": by_steps("reader", "cpu_s_per_m_tokens", 1, 4),
        },
        command=COMMAND,
    )


if __name__ == "__main__":
    raise SystemExit(main())
