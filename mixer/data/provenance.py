"""What was trained at which step, by computation: schedule + catalog say which rows, the corpus which documents.

Nothing is logged for it, so it can be asked of any step of any run, at once, long after and for any number of
ranks. Rows are found from the schedule alone; documents need the corpus.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from mixer.core.catalog import Catalog
from mixer.core.errors import ScheduleError
from mixer.core.mixture import unknown_domain
from mixer.core.plan import Cursor, Geometry, plan_window
from mixer.core.row import ScheduleRow
from mixer.core.schedule import MixtureSchedule
from mixer.data.corpus import CatalogRows, Document


class PlannedRow(NamedTuple):
    """A row of a step. `slot` counts within the whole step, whatever the rank."""

    slot: int
    domain: str
    row: int  # number inside the domain
    turn: int  # which pass over the domain, from 0


class Given(NamedTuple):
    """What a domain gave in some steps of one window: its `first`-th row ever and those after it."""

    window: int
    first_step: int
    num_steps: int
    weight: float
    first: int
    num_rows: int
    passes: float  # over the domain, when they were given


class Part(NamedTuple):
    """Positions `begin` to `end` - 1 of a row are the tokens of a document from its token `offset` on."""

    document: Document
    begin: int
    end: int
    offset: int
    tokens: int  # of the whole document, with its EOS


def row_of_step(schedule: MixtureSchedule, step: int) -> tuple[ScheduleRow, int]:
    """The schedule's row that a step lies in, and which of its steps it is."""
    windows, geometry = len(schedule), schedule.geometry
    if not 0 <= step < windows * geometry.window_steps:
        raise ScheduleError(
            f"step {step} is not decided; the schedule has {windows} windows of {geometry.window_steps} steps, "
            f"which are steps 0 to {windows * geometry.window_steps - 1}. Ask for one of them."
        )
    cursor = Cursor.at(step, geometry)
    return schedule.row(cursor.window), cursor.step


def rows_of_step(schedule: MixtureSchedule, step: int, rank: int = 0, world_size: int = 1) -> list[PlannedRow]:
    """The rows of one step in the order of its slots; those of one rank if there are several."""
    row, inside = row_of_step(schedule, step)
    plan = plan_window(row, schedule.geometry)
    slots = plan.slots(inside, rank, world_size)
    names, begin = row.catalog.names, inside * schedule.geometry.batch_rows
    return [
        PlannedRow(slot - begin, names[plan.domain_n[slot]], int(plan.row_n[slot]), int(plan.pass_n[slot]))
        for slot in range(slots.start, slots.stop)
    ]


def given_in(schedule: MixtureSchedule, begin_step: int, end_step: int, domain: str) -> list[Given]:
    """What a domain gave from one step up to before another, window by window; nothing where no catalog has it."""
    if end_step <= begin_step:
        raise ScheduleError(f"steps {begin_step}:{end_step} are none. Give a first step and one beyond the last.")
    (first, _), (last, _) = row_of_step(schedule, begin_step), row_of_step(schedule, end_step - 1)
    geometry = schedule.geometry
    found: list[Given] = []
    known: dict[str, Catalog] = {}
    for window in range(first.window, last.window + 1):
        row = schedule.row(window)
        known[row.catalog.fingerprint] = row.catalog
        if (place := row.catalog.index.get(domain)) is None:
            continue
        low = max(begin_step - window * geometry.window_steps, 0)
        high = min(end_step - window * geometry.window_steps, geometry.window_steps)
        before, num = _rows_within(row, geometry, place, low, high)
        nth = int(row.offsets_d[place]) + before
        found.append(
            Given(
                window=window,
                first_step=window * geometry.window_steps + low,
                num_steps=high - low,
                weight=float(row.weights_d[place]),
                first=nth,
                num_rows=num,
                passes=(nth + num) / int(row.catalog.num_rows_d[place]),
            )
        )
    if not found:
        names = sorted({name for catalog in known.values() for name in catalog.names})
        raise ScheduleError(f"steps {begin_step}:{end_step} know no such domain: {unknown_domain(domain, names)}")
    return found


def totals_in(schedule: MixtureSchedule, begin_step: int, end_step: int) -> dict[str, int]:
    """How many rows each domain gave from one step up to before another."""
    geometry = schedule.geometry
    totals: dict[str, int] = {}
    (first, _), (last, _) = row_of_step(schedule, begin_step), row_of_step(schedule, end_step - 1)
    for window in range(first.window, last.window + 1):
        row = schedule.row(window)
        low = max(begin_step - window * geometry.window_steps, 0)
        high = min(end_step - window * geometry.window_steps, geometry.window_steps)
        if (low, high) == (0, geometry.window_steps):
            counts_d = row.counts_d
        else:
            part = slice(low * geometry.batch_rows, high * geometry.batch_rows)
            counts_d = np.bincount(plan_window(row, geometry).domain_n[part], minlength=len(row.catalog))
        for name, count in zip(row.catalog.names, counts_d.tolist(), strict=True):
            totals[name] = totals.get(name, 0) + count
    return totals


def _rows_within(row: ScheduleRow, geometry: Geometry, place: int, low: int, high: int) -> tuple[int, int]:
    """How many rows a domain gives in a window before step `low`, and from there up to before `high`."""
    if (low, high) == (0, geometry.window_steps):
        return 0, int(row.counts_d[place])
    mine_n = plan_window(row, geometry).domain_n == place
    begin, end = low * geometry.batch_rows, high * geometry.batch_rows
    return int(mine_n[:begin].sum()), int(mine_n[begin:end].sum())


def documents_of(rows: CatalogRows, domain: str, row: int) -> list[Part]:
    """The documents in a row of a domain, in the order of their tokens."""
    number = rows.catalog.index.get(domain, -1)
    shard_n, place_n = rows.locate(np.array([number]), np.array([row]))
    shard_number, place = int(shard_n[0]), int(place_n[0])
    shard = rows.shard(shard_number)
    starts = np.asarray(shard.starts[place].values).tolist()
    length = int(shard.length[place])
    begins = starts if starts[:1] == [0] else [0, *starts]
    parts: list[Part] = []
    for begin, end in zip(begins, [*begins[1:], length], strict=True):
        document = rows.document_of(number, row, begin)
        offset = 0 if begin in starts else sum(_back_to_start(rows, shard_number, place))
        tokens = rows.corpus.documents(document.domain).column("tokens")[document.number].as_py()
        parts.append(Part(document, begin, end, offset, tokens))
    return parts


def _back_to_start(rows: CatalogRows, shard_number: int, place: int) -> Iterator[int]:
    """How many tokens of the document at a row's begin lie in each row before it, back to where it starts."""
    corpus = rows.corpus
    shard = rows.shard(shard_number)
    while True:
        place -= 1
        if place < 0:
            if shard_number == 0 or corpus.shard_domains[shard_number - 1] != corpus.shard_domains[shard_number]:
                return  # the first row of a domain begins a document, so no sound corpus comes here
            shard_number -= 1
            shard = rows.shard(shard_number)
            place = len(shard) - 1
        starts = np.asarray(shard.starts[place].values)
        yield int(shard.length[place]) - (int(starts[-1]) if len(starts) else 0)
        if len(starts):
            return


def knows(rows: CatalogRows, catalog: Catalog, domain: str) -> bool:
    """Whether a corpus has the very rows that a run's catalog calls by this name."""
    place, other = catalog.index.get(domain), rows.catalog.index.get(domain)
    if place is None or other is None:
        return False
    return catalog.domains[place].content == rows.catalog.domains[other].content
