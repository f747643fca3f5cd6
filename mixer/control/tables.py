"""A run's schedule, catalogs and cursor as tables for a terminal."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from mixer.control.record import Record, catalogs_of
from mixer.control.wording import shorten
from mixer.core.catalog import Catalog
from mixer.core.errors import ConfigError
from mixer.core.plan import Cursor
from mixer.core.schedule import MixtureSchedule

SHOWN_WINDOWS = 40  # of a schedule that is shown whole
SHOWN_DOMAINS = 60


def table(heads: Sequence[str], lines: Sequence[Sequence[str]], *, words: Sequence[int] = (0,)) -> list[str]:
    """Columns as wide as they must be; those in `words` begin at the left, the others end at the right."""
    widths = [max(len(line[i]) for line in [heads, *lines]) for i in range(len(heads))]
    return [
        "  ".join(
            cell.ljust(width) if i in words else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in [heads, *lines]
    ]


def part_of(text: str | None, end: int, what: str) -> range | None:
    """`A:B`, `A:`, `:B` or `A` as a range within 0 to `end`; None for no text."""
    if text is None:
        return None
    first, mark, last = text.partition(":")
    try:
        begin = int(first) if first else 0
        stop = (int(last) if last else end) if mark else begin + 1
    except ValueError as error:
        raise ConfigError(f"{what} {text!r} is no range. Write A:B, of which B is the first one beyond.") from error
    if not 0 <= begin < stop <= end:
        raise ConfigError(f"{what} {text} is not within 0:{end}, or empty. Write A:B, of which B is the first beyond.")
    return range(begin, stop)


# ---- schedule ------------------------------------------------------------------------------------


def schedule_lines(schedule: MixtureSchedule, windows: range | None = None, width: int = 120) -> list[str]:
    """Weights over time, a line a window: all that are asked for, else as many as fit, evenly spread."""
    if not len(schedule):
        return ["no window is decided yet"]
    chosen = list(windows) if windows is not None else _spread(len(schedule))
    rows = [schedule.row(window) for window in chosen]
    catalogs = {row.catalog.fingerprint: row.catalog for row in rows}
    names = sorted({name for catalog in catalogs.values() for name in catalog.names})
    reason = min(28, max(len("reason"), *(len(row.reason) for row in rows)))
    shown = _fitting(names, _largest(rows, names), width - len("window") - reason - len("lag") - 4)
    heads = ["window", "reason", "lag", *(shorten(name, 10) for name in shown), *(["others"] if shown != names else [])]
    lines: list[list[str]] = []
    for row in rows:
        weights = dict(zip(row.catalog.names, row.weights_d.tolist(), strict=True))
        cells = [f"{100 * weights[name]:.2f}%" if name in weights else "–" for name in shown]
        if shown != names:
            rest = math.fsum(weight for name, weight in weights.items() if name not in shown)
            cells.append(f"{100 * rest:.2f}%")
        lag = str(row.window - 1 - row.signals_through)
        lines.append([str(row.window), shorten(row.reason, reason), lag, *cells])
    notes = [
        f"from window {window}: another catalog, {catalog.fingerprint[:12]}"
        for window, catalog in catalogs_of(schedule)[1:]
        if chosen[0] < window <= chosen[-1]
    ]
    if len(chosen) < len(schedule) and windows is None:
        notes.append(f"{len(chosen)} of {len(schedule)} windows; --windows A:B shows all between")
    return [*table(heads, lines, words=(1,)), *notes]


def schedule_values(schedule: MixtureSchedule, windows: range | None = None) -> Iterator[dict[str, Any]]:
    """The same by name and without rounding, a mapping a window."""
    for window in windows if windows is not None else range(len(schedule)):
        row = schedule.row(window)
        names = row.catalog.names
        yield {
            "window": window,
            "reason": row.reason,
            "signals_through": row.signals_through,
            "lag": window - 1 - row.signals_through,
            "catalog": row.catalog.fingerprint,
            "weights": dict(zip(names, row.weights_d.tolist(), strict=True)),
            "counts": dict(zip(names, row.counts_d.tolist(), strict=True)),
        }


def _spread(num: int) -> list[int]:
    return sorted({round(i * (num - 1) / max(1, SHOWN_WINDOWS - 1)) for i in range(SHOWN_WINDOWS)})


def _fitting(names: Sequence[str], largest: Sequence[str], width: int) -> list[str]:
    """All names if their columns fit, else as many of the largest as do beside one for the others; at least one."""

    def wide(some: Sequence[str]) -> int:
        return sum(2 + max(len("100.00%"), len(shorten(name, 10))) for name in some)

    if wide(names) <= width:
        return list(names)
    num = len(largest) - 1
    while num > 1 and wide(largest[:num]) + 9 > width:
        num -= 1
    return sorted(largest[:num])


def _largest(rows: Sequence[Any], names: Sequence[str]) -> list[str]:
    most = dict.fromkeys(names, 0.0)
    for row in rows:
        for name, weight in zip(row.catalog.names, row.weights_d.tolist(), strict=True):
            most[name] = max(most[name], weight)
    return sorted(names, key=lambda name: -most[name])


# ---- catalogs ------------------------------------------------------------------------------------


def catalog_lines(schedule: MixtureSchedule) -> list[str]:
    """Every catalog of a run, and how each differs from the one before."""
    lines: list[str] = []
    before: Catalog | None = None
    for window, catalog in catalogs_of(schedule):
        rows = int(catalog.num_rows_d.sum())
        lines += [
            *([""] if lines else []),
            f"from window {window}: catalog {catalog.fingerprint}",
            f"{len(catalog)} domains, {rows:,} rows of {catalog.row_tokens} tokens; tokenizer {catalog.tokenizer}",
        ]
        if before is not None:
            lines += [f"  {difference}" for difference in before.differences(catalog)]
        cells = [
            [d.name, f"{d.num_rows:,}", f"{d.num_rows * catalog.row_tokens:,}", f"{d.num_rows / rows:.2%}",
             d.content[:12]] for d in catalog.domains
        ]  # fmt: skip
        lines += table(["domain", "rows", "positions", "natural", "content"], cells, words=(0, 4))
        before = catalog
    return lines


# ---- cursor --------------------------------------------------------------------------------------


def cursor_lines(record: Record, checkpoint_steps: int | None) -> list[str]:
    """Where a run would go on, and what the window there will be made of."""
    schedule, geometry = record.schedule, record.geometry
    cursor = Cursor.at(checkpoint_steps or 0, geometry)
    if checkpoint_steps is None:
        lines = ["no checkpoint: a start would train from step 0"]
    else:
        place = f"step {cursor.step} of window {cursor.window}"
        lines = [f"newest checkpoint: after step {checkpoint_steps:,}, so the next is {place}"]
    lines.append(f"trained so far: {record.trained_windows:,} windows, {record.steps:,} steps")
    planned = record.planned_windows
    lines.append(f"decided: {len(schedule):,} windows" + (f" of {planned:,}" if planned else ""))
    window = max(cursor.window, record.trained_windows)
    if planned is not None and window >= planned:
        return [*lines, "the run is complete"]
    if window >= len(schedule):
        last = schedule.last
        lag = 0 if last is None else last.window - 1 - last.signals_through
        wanted = window - 1 - lag
        return [*lines, f"window {window} comes next; it is decided when the signal of window {wanted} is there"]
    row = schedule.row(window)
    lines.append(f"window {window} comes next, decided ({row.reason}) from the signals through {row.signals_through}:")
    places = np.argsort(-row.weights_d, kind="stable")[:SHOWN_DOMAINS].tolist()
    cells: list[list[str]] = []
    for place in sorted(places):
        first, count, num = (int(values[place]) for values in (row.offsets_d, row.counts_d, row.catalog.num_rows_d))
        passes = f"{first / num:.3f}"
        cells.append([row.catalog.names[place], f"{row.weights_d[place]:.2%}", f"{count:,}", f"{first:,}", passes])
    lines += table(["domain", "weight", "rows", "given before", "passes before"], cells)
    if (left := len(row.catalog) - len(places)) > 0:
        lines.append(f"and {left} more domains")
    return lines
