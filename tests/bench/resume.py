"""First batch after a resume at 90 % of a run, against the first batch of a fresh one.

Each is a process of its own, as after a crash; what it times goes from nothing (imports excepted) to the
first batch: opening the corpus, reading the schedule as far as it was written, planning, copying.

    python -m tests.bench.resume [--folder DIR]
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from mixer.core.mixture import Mixture
from mixer.core.plan import Cursor, Geometry
from mixer.core.schedule import MixtureSchedule, read
from mixer.data.corpus import Corpus
from mixer.data.reader import WindowReader
from tests.bench.corpora import random_corpus
from tests.bench.record import record

GEOMETRY = Geometry(window_steps=16, batch_rows=64)
NUM_ROWS = {f"domain-{d}": 40_000 + 27_000 * d for d in range(8)}  # 1,076,000 rows
ROW_TOKENS = 128
REPETITIONS = 15


def first_batch(corpus: str, schedule: str, steps: int) -> float:
    begin = time.perf_counter()
    opened = Corpus.open(corpus)
    saved = read(Path(schedule).read_bytes(), thorough=False).schedule
    reader = WindowReader(opened.by_source, saved, saved.geometry)
    reader.cursor = Cursor.at(steps, saved.geometry)
    batch = next(iter(reader))
    assert batch.tokens.shape == (GEOMETRY.batch_rows, ROW_TOKENS)
    return time.perf_counter() - begin


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where the corpus is kept between runs (default: a new one)")
    parser.add_argument("--once", nargs=3, metavar=("CORPUS", "SCHEDULE", "STEPS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.once:
        corpus, schedule, steps = options.once
        print(json.dumps(first_batch(corpus, schedule, int(steps))))
        return 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        corpus = random_corpus(folder / "resume", NUM_ROWS, ROW_TOKENS)
        catalog = corpus.catalog
        windows = int(catalog.num_rows_d.sum()) // GEOMETRY.window_slots
        late = windows * 9 // 10
        natural = Mixture.natural(catalog)
        fresh, resumed = folder / "fresh.jsonl", folder / "resumed.jsonl"
        schedule = MixtureSchedule(catalog, GEOMETRY).extend(natural)
        fresh.write_text(schedule.to_text())
        resumed.write_text(schedule.extend(natural, late).to_text())
        seconds: dict[str, list[float]] = {"fresh": [], "resumed": []}
        for _ in range(REPETITIONS):
            for name, path, window in (("fresh", fresh, 0), ("resumed", resumed, late)):
                steps = window * GEOMETRY.window_steps
                command = [sys.executable, "-m", "tests.bench.resume", "--once", corpus.root, str(path), str(steps)]
                seconds[name].append(float(subprocess.run(command, check=True, capture_output=True).stdout))
    ratios = [after / before for after, before in zip(seconds["resumed"], seconds["fresh"], strict=True)]
    median = {name: statistics.median(values) for name, values in seconds.items()}
    print(f"fresh {median['fresh'] * 1e3:.1f} ms")
    print(f"resumed at window {late} of {windows} {median['resumed'] * 1e3:.1f} ms")
    ratio = statistics.median(ratios)
    print(f"ratio {ratio:.3f} (median of {REPETITIONS} pairs; {min(ratios):.2f} to {max(ratios):.2f})")
    record(
        figure="resume at 90 %: first batch against a fresh reader's",
        value=round(ratio, 3),
        unit="ratio",
        target="<= 1.1",
        met=ratio <= 1.1,
        peers={"fresh_ms": round(median["fresh"] * 1e3, 1), "resumed_ms": round(median["resumed"] * 1e3, 1)},
        command="python -m tests.bench.resume",
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
