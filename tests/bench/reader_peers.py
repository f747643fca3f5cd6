"""Our reader against the readers people use today, on the same tokens, in one run.

    python -m tests.bench.reader_peers [--quick] [--readers limit,torchdata,...] [--out JSON] [--record]

Every reader delivers batches of 8 rows of 2,048 tokens as torch.int64, from 8 domains of very
different sizes, in shares proportional to the square root of the size. It does so in processes of
its own, one and two of them, without and with one helper (a DataLoader worker, or the reader's own
prefetcher). Repetitions are interleaved: every reader once, then every reader again, so that a
machine that slows down slows everybody. A reader's share of the limit is taken within a repetition,
against the limit with as many processes (the limit has no helper); the table shows medians.

`limit` is a numpy gather of known rows from a memory map into reused buffers; `memcpy` copies ready
batches; `limit-in-loader` is the limit behind a torch DataLoader, which is as fast as anything there
can be. A reader that is not installed is left out, with a line that says so. Rows that differ from
the source in a single token make the run fail.
"""

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path

from tests.bench.peers.adapters import LIMIT, READERS
from tests.bench.peers.bed import Bed
from tests.bench.peers.report import figures, summary, table
from tests.bench.peers.runs import QUICK, REPOSITORY, Bench, Run, build, run


def missing(reader: str) -> str | None:
    """The module that a reader needs and this environment lacks."""
    for module in READERS[reader].modules[:1]:
        try:
            if find_spec(module) is None:
                return module
        except ModuleNotFoundError:  # the package above it
            return module
    return None


def measure(bed: Bed, bench: Bench, readers: list[str], tell: Callable[[str], None]) -> list[Run]:
    """Every reader in every setting once, then all again. The limit is in every round."""
    build(bed, dict.fromkeys(READERS[reader].layout for reader in ("limit", *readers)))
    runs: list[Run] = []
    for repetition in range(bench.repetitions):
        for processes, workers in bench.settings:
            for reader in dict.fromkeys((LIMIT, *readers)):
                if workers and reader != LIMIT and not READERS[reader].takes_workers:
                    continue
                one = run(reader, bed, bench, processes=processes, workers=workers, repetition=repetition)
                runs.append(one)
                result = one.error.strip() or f"{one.mtok_per_s:.1f} Mtok/s"
                tell(f"repetition {repetition}, {processes} x {workers} workers, {reader}: {result}")
    return runs


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m tests.bench.reader_peers",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--quick", action="store_true", help="a few MB, once, short: does everything work?")
    made.add_argument("--readers", help=f"some of {','.join(READERS)}; default: all that are installed")
    made.add_argument("--megabytes", type=int, help="size of the token corpus")
    made.add_argument("--repetitions", type=int)
    made.add_argument("--seconds", type=float, help="length of the timed window")
    made.add_argument("--settings", help="processes:workers, as in 1:0,2:0,1:1")
    made.add_argument("--data", type=Path, default=REPOSITORY / "data/reader-peers", help="corpora are kept here")
    made.add_argument("--out", type=Path, help="write all runs, the summary and the figures as JSON")
    made.add_argument("--record", action="store_true", help="write the figures to tests/bench/results")
    return made


def chosen(given: argparse.Namespace) -> Bench:
    bench = QUICK if given.quick else Bench()
    if given.megabytes:
        bench = replace(bench, megabytes=given.megabytes)
    if given.repetitions:
        bench = replace(bench, repetitions=given.repetitions)
    if given.seconds:
        bench = replace(bench, window_s=given.seconds)
    if given.settings:
        pairs = [setting.split(":") for setting in given.settings.split(",")]
        bench = replace(bench, settings=tuple((int(processes), int(workers)) for processes, workers in pairs))
    return bench


def main(argv: list[str] | None = None) -> int:
    made = parser()
    given = made.parse_args(argv)
    bench = chosen(given)
    readers = given.readers.split(",") if given.readers else list(READERS)
    if unknown := [reader for reader in readers if reader not in READERS]:
        made.error(f"no reader {', '.join(unknown)}. There are {', '.join(READERS)}.")
    for reader in readers:
        if lacks := missing(reader):
            print(f"{reader} is left out: {lacks} is not installed", flush=True)
    readers = [reader for reader in readers if not missing(reader)]

    bed = Bed.of_size(given.data / f"{bench.megabytes}MB", bench.megabytes)
    begin = time.monotonic()
    runs = measure(bed, bench, readers, lambda text: print(text, file=sys.stderr, flush=True))
    lines = summary(runs)
    print(table(lines))
    print(f"\n{len(runs)} runs in {time.monotonic() - begin:.0f} s")

    command = f"python -m tests.bench.reader_peers {' '.join(sys.argv[1:] if argv is None else argv)}".strip()
    if given.out:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        whole = {
            "command": command,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} CPUs",
            "bench": asdict(bench),
            "lines": [asdict(line) for line in lines],
            "runs": [asdict(one) for one in runs],
            "figures": figures(lines),
        }
        given.out.write_text(json.dumps(whole, indent=1))
    if given.record:
        from tests.bench.record import record

        for figure in figures(lines):
            record(command=command, **figure)
    return int(any(line.is_wrong or line.error for line in lines))


if __name__ == "__main__":
    sys.exit(main())
