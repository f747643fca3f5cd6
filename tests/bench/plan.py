"""What planning costs: `python -m tests.bench.plan [--quick]`.

Cases are interleaved, one repetition of each in turn, so that a slow moment of the machine meets all of
them; figures are medians. Each window is planned from its row alone: nothing is warm but the catalog.
"""

import argparse
import json
import time
from collections import defaultdict
from collections.abc import Callable
from statistics import median
from typing import Any

import numpy as np

from mixer.core.catalog import Catalog, Domain
from mixer.core.mixture import Mixture
from mixer.core.plan import Cursor, Geometry, Plan, plan_window
from mixer.core.row import ScheduleRow
from mixer.core.schedule import LineWriter, MixtureSchedule

COMMAND = "python -m tests.bench.plan"
DOMAINS = (8, 64, 576, 4_096, 65_536)
GEOMETRY = Geometry(window_steps=16, batch_rows=64)  # 1,024 slots
TARGET_MS = 2.0
TARGET_RATIO = 1.1
Case = Callable[[], object]


def catalog_of(num_domains: int, rows: int) -> Catalog:
    """So many domains of unlike sizes that hold about so many rows together."""
    rng = np.random.default_rng(num_domains)
    share_d = rng.random(num_domains) + 0.1
    rows_d = np.maximum(1, share_d / share_d.sum() * rows).astype(np.int64).tolist()
    return Catalog(2048, "byte", tuple(Domain(f"domain-{i:05}", n, f"{i}") for i, n in enumerate(rows_d)))


def mixtures_of(num_domains: int, count: int) -> list[Mixture]:
    rng = np.random.default_rng(num_domains + 1)
    weights_wd = rng.gamma(0.5, size=(count, num_domains)) + 1e-9
    return [Mixture(weights_d / weights_d.sum()) for weights_d in weights_wd]


def row_late_in(catalog: Catalog, window: int) -> ScheduleRow:
    """The row of a window after so many others of the same mixture, without deciding them."""
    mixture = Mixture.natural(catalog)
    first = MixtureSchedule(catalog, GEOMETRY).propose(mixture)
    offsets_d = (mixture.weights_d * GEOMETRY.window_slots * window).astype(np.int64)
    return ScheduleRow(window, catalog, mixture.weights_d, first.counts_d, offsets_d, np.zeros(len(catalog)))


def interleaved(cases: dict[str, Case], repetitions: int) -> dict[str, float]:
    """The median of each case in milliseconds."""
    took: dict[str, list[float]] = defaultdict(list)
    for case in cases.values():
        case()  # once for the imports and caches that a process has but once
    rng = np.random.default_rng(0)
    names = list(cases)
    for _ in range(repetitions):
        for place in rng.permutation(len(names)):
            begin = time.perf_counter()
            cases[names[place]]()
            took[names[place]].append((time.perf_counter() - begin) * 1e3)
    return {name: round(median(took[name]), 4) for name in names}


def by_domains(repetitions: int) -> dict[str, dict[str, float]]:
    """propose + append, plan, and the text line, at each number of domains."""
    cases: dict[str, Case] = {}
    for num in DOMAINS:
        schedule = MixtureSchedule(catalog_of(num, 10**9), GEOMETRY)
        mixtures = mixtures_of(num, 8)
        for mixture in mixtures:
            schedule.extend(mixture)
        rows, writer = schedule.rows[:], LineWriter.begin(schedule)

        def decide(schedule: MixtureSchedule = schedule, mixtures: list[Mixture] = mixtures) -> None:
            schedule.append(schedule.propose(mixtures[len(schedule) % len(mixtures)]))

        def plan(rows: list[ScheduleRow] = rows, turn: list[int] = [0]) -> None:  # noqa: B006  # a turn counter
            turn[0] += 1
            plan_window(rows[turn[0] % len(rows)], GEOMETRY)

        def write(writer: LineWriter = writer, row: ScheduleRow = rows[-1]) -> None:
            writer.lines(row)

        cases |= {f"{num} decide": decide, f"{num} plan": plan, f"{num} text": write}
    found = interleaved(cases, repetitions)
    return {str(num): {what: found[f"{num} {what}"] for what in ("decide", "plan", "text")} for num in DOMAINS}


def by_rows(repetitions: int) -> dict[str, float]:
    """The same 576 domains with 10^6 to 10^12 rows."""
    cases: dict[str, Case] = {}
    for power in (6, 7, 8, 9, 10, 11, 12):
        row = row_late_in(catalog_of(576, 10**power), 3)
        cases[f"10^{power}"] = lambda row=row: plan_window(row, GEOMETRY)
    return interleaved(cases, repetitions)


def by_position(repetitions: int) -> dict[str, float]:
    """The same 576 domains, 10^12 rows: the first window, the millionth and those between."""
    catalog = catalog_of(576, 10**12)
    cases: dict[str, Case] = {}
    for window in (0, 10**3, 10**6, 9 * 10**8):
        row = row_late_in(catalog, window)
        cases[f"window {window}"] = lambda row=row: plan_window(row, GEOMETRY)
    return interleaved(cases, repetitions)


class VirtualFeed:
    """A run over 10^12 rows whose rows are made when asked for, like those of a long schedule at hand."""

    def __init__(self, catalog: Catalog) -> None:
        self.catalog = catalog

    def row(self, window: int) -> ScheduleRow:
        return row_late_in(self.catalog, window)


def resume(repetitions: int) -> dict[str, float]:
    """From a cursor to the rows of its step: at the start and at 90 % of one pass over 10^12 rows."""
    catalog = catalog_of(576, 10**12)
    windows = 10**12 // GEOMETRY.window_slots
    late = Cursor(window=windows * 9 // 10, step=7)

    def first_batch(cursor: Cursor) -> Case:
        def ask() -> object:
            window = Plan(VirtualFeed(catalog), GEOMETRY).window(cursor.window)
            part = window.slots(cursor.step)
            return window.domain_n[part], window.row_n[part]

        return ask

    return interleaved({"fresh": first_batch(Cursor()), "at 90 %": first_batch(late)}, repetitions)


def publish(**figure: Any) -> None:
    """Record a figure where the project keeps them, and show it."""
    print(json.dumps(figure, ensure_ascii=False))
    try:
        from tests.bench.record import record
    except ImportError:
        return
    record(**figure, peers={}, command=COMMAND)


def main() -> None:
    parser = argparse.ArgumentParser(description="What planning costs")
    parser.add_argument("--quick", action="store_true", help="a tenth of the repetitions")
    repetitions = 30 if parser.parse_args().quick else 300
    domains = by_domains(repetitions // 3)
    for what, figure in [
        ("plan", "plan a window"),
        ("decide", "decide a window"),
        ("text", "write a window"),
    ]:
        times = {num: domains[num][what] for num in domains}
        publish(
            figure=f"{figure} of 1,024 slots, by number of domains",
            value=times,
            unit="ms",
            target=f"<= {TARGET_MS:.0f} ms at 4,096 domains",
            met=times["4096"] <= TARGET_MS,
        )
    total = {num: round(sum(parts.values()), 4) for num, parts in domains.items()}
    publish(
        figure="decide, write and plan a window of 1,024 slots, by number of domains",
        value=total,
        unit="ms",
        target=f"<= {TARGET_MS:.0f} ms at 4,096 domains",
        met=total["4096"] <= TARGET_MS,
    )
    for figure, times in [
        ("plan a window, by rows in the corpus", by_rows(repetitions)),
        ("plan a window of 10^12 rows, by position in the run", by_position(repetitions)),
    ]:
        first, last = next(iter(times.values())), max(list(times.values())[1:])
        publish(
            figure=figure,
            value=times | {"most / first": round(last / first, 3)},
            unit="ms",
            target=f"flat: none takes more than {TARGET_RATIO} of the first",
            met=last / first <= TARGET_RATIO,
        )
    times = resume(repetitions)
    ratio = round(times["at 90 %"] / times["fresh"], 3)
    publish(
        figure="first plan after resuming at 90 % / first plan of a fresh run, 10^12 rows",
        value=times | {"ratio": ratio},
        unit="ms, and their ratio",
        target=f"ratio <= {TARGET_RATIO}",
        met=ratio <= TARGET_RATIO,
    )


if __name__ == "__main__":
    main()
