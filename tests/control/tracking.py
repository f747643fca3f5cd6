"""A run's folder with a journal, and what has arrived of it, for the tests of trackers."""

import sqlite3
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from mixer.control.journal import Journal
from mixer.control.tracker import MemoryTracker, Tracker, TrackerOptions
from mixer.core.catalog import Catalog, Domain
from mixer.core.mixture import Mixture
from mixer.core.plan import Geometry
from mixer.core.schedule import MixtureSchedule, pack_d
from tests.core.policies.making import make_catalog

CATALOG = make_catalog(16, 64, 640)
STEPS = 4
WINDOWS = 400
CONFIG = """\
run: runs/a
geometry: {window_steps: 4, batch_rows: 8}
tracker: {uri: "https://user:pa@ss@tracker.example/x?api_key=hush&y=1", token: hidden, parent: null}
domains: {web/news: 1.5, code: 2}
names: [a, b]
"""

Row = tuple[str, int, int, float]  # key, step, time in ms, value


def make_schedule(windows: int = WINDOWS, catalog: Catalog = CATALOG, rows: int = 8) -> MixtureSchedule:
    """The weights move from window to window; from the third on each row depends on the signal two before."""
    schedule = MixtureSchedule(catalog, Geometry(window_steps=STEPS, batch_rows=rows, seed=3))
    for window in range(windows):
        weights = np.arange(1.0, len(catalog) + 1) + window % 3
        reason = "held: not finite" if window == 3 else "policy"
        schedule.extend(Mixture(weights / weights.sum()), signals_through=max(window - 2, -1), reason=reason)
    return schedule


def many(domains: int) -> Catalog:
    return Catalog(16, "fake", tuple(Domain(f"domain/{i:05}", 1000 + i, f"content {i}") for i in range(domains)))


def window_record(window: int, catalog: Catalog = CATALOG) -> dict:
    rng = np.random.default_rng(window)
    tokens_d = rng.integers(0, 100, len(catalog))
    loss_sum_d = np.where(tokens_d > 0, tokens_d * rng.integers(1, 8, len(catalog)) / 4, 0.0)
    return {
        "kind": "window",
        "window": window,
        "time": 1_700_000_000.25 + window,
        "steps": STEPS * (window + 1),
        "tokens": 1000 * (window + 1),
        "seconds": 2.0,
        "data_wait_s": 0.25,
        "tokens_per_s": 500.0 + window,
        "mfu": None if window % 2 else 0.4,
        "rate": 0.001,
        "grad_norm": 1.5,
        "loss": 3.25,
        "skipped_steps": 0,
        "world_size": 2,
        "loss_sum": pack_d(loss_sum_d, catalog),
        "tokens_d": pack_d(tokens_d, catalog),
        "rows_d": pack_d(tokens_d // 10, catalog),
        "bad_rows_d": pack_d(np.full(len(catalog), window % 2), catalog),
    }


def records_of(window: int) -> list[dict]:
    """What a run writes for a window."""
    found: list[dict] = [window_record(window)]
    moment = {"window": window, "time": 1_700_000_000.5 + window}
    found.append({"kind": "policy", **moment, "values": {"rate": 0.5 + window, "reward/a": 0.25, "reward/b": None}})
    if window % 4 == 0:
        sets = {"target/code_new": {"loss": 2.0 + window, "bits_per_byte": 0.75, "tokens": 9}, "validation/a": {}}
        found.append({"kind": "evaluation", "steps": STEPS * (window + 1), "tokens": 5, **moment, "sets": sets})
    return found


def event(what: str, time: float = 1_700_000_000.0) -> dict:
    return {"kind": "event", "time": time, "what": what, "text": "", "window": None, "steps": None}


def make_run(folder: Path, windows: int = 0) -> Journal:
    folder.mkdir(parents=True)
    (folder / "run.yaml").write_text(CONFIG)
    (folder / "catalog.json").write_text("{}\n")
    (folder / "schedule.jsonl").write_text("{}\n")
    journal = Journal(folder / "journal.jsonl")
    add(journal, 0, windows)
    return journal


def add(journal: Journal, begin: int, end: int) -> None:
    for window in range(begin, end):
        for record in records_of(window):
            assert journal.append(record)


def expected(folder: Path, schedule: MixtureSchedule) -> list[Row]:
    """All that a tracker has to show of a journal."""
    other = folder.with_name(f"{folder.name} read again")
    other.mkdir()
    (other / "journal.jsonl").write_bytes((folder / "journal.jsonl").read_bytes())
    (other / "run.yaml").write_text(CONFIG)
    tracker = MemoryTracker(TrackerOptions(), other, schedule)
    return sorted((m.key, m.step, m.time_ms, m.value) for m in tracker.store.metrics)


def rows_in(database: Path, run_id: str | None) -> list[Row]:
    """Every metric that the store has of a run, once for each time it is there."""
    connection = sqlite3.connect(database)
    try:
        found = connection.execute(
            "select key, step, timestamp, value from metrics where run_uuid = ? and not is_nan", (run_id,)
        ).fetchall()
    finally:
        connection.close()
    return sorted(found)


def wait_for(condition: Callable[[], object], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.01)


def settle(tracker: Tracker, seconds: float = 60) -> None:
    wait_for(lambda: not tracker.behind, seconds)
