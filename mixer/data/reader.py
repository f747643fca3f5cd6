"""Rows for any training loop: schedule + catalog + shards -> one rank's batches, in this process.

No Ray and no torch: `mixer.training.dataset` wraps it for PyTorch, and whoever has a loop of their own
can iterate over a `WindowReader` directly. It asks the feed for a window's row, plans the window, and
copies exactly this rank's rows from the shards. The only state is the Cursor of the next step.

Every row is compared with its check value before it is handed out, so decayed storage stops a run
with the shard and row named, and never trains.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from copy import copy
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mixer.core.errors import DataError, ResumeError
from mixer.core.plan import Cursor, Geometry, plan_windows
from mixer.core.ports import MixtureFeed
from mixer.core.row import ScheduleRow
from mixer.core.schedule import MixtureSchedule
from mixer.data.corpus import CatalogRows
from mixer.data.shards import Layout
from mixer.data.window import RankRows, WindowRows, locate

CHUNK_ROWS = 128  # rows copied at a time, so that they are still in cache when they are checked and widened
AHEAD_SLOTS = 8192  # small windows of a saved schedule are planned together up to so many slots
SPARE_ARRAYS = 4


class Batch(NamedTuple):
    """One rank's rows of one step.

    `starts[starts_offsets[i] : starts_offsets[i + 1]]` are the positions in row i at which a document
    starts; text before the first of them belongs to a document that started in an earlier row.
    Positions from `length[i]` on are padding.
    """

    window: int
    step: int
    tokens: Any  # (rows, row_tokens) int64, or the shards' own type
    domain_index: Any  # (rows,) int32, catalog order
    row: Any  # (rows,) int64, number inside the domain
    length: Any  # (rows,) int32
    starts: Any  # int32
    starts_offsets: Any  # (rows + 1,) int64

    def cursor(self, geometry: Geometry) -> Cursor:
        """Where to go on after this batch."""
        if self.step + 1 < geometry.window_steps:
            return Cursor(self.window, self.step + 1)
        return Cursor(self.window + 1, 0)


@dataclass(frozen=True, slots=True)
class ArrayForm:
    """How batches hold their arrays: as numpy's, unless `split` and `one` make something else of them."""

    split: Callable[[NDArray[Any]], Sequence[Any]] = list  # a stack of arrays into its parts
    one: Callable[[NDArray[Any]], Any] = np.asarray


class WindowReader:
    """This rank's batches from the cursor on; every `iter` goes on from where `cursor` stands.

    `rows` are the catalogs the schedule may name (one, or several where it switches). `windows` is where
    to stop: the end of a saved schedule by default, nowhere with a live feed. Yielded arrays are the
    caller's to keep; their memory is used again only once nobody holds it.
    """

    def __init__(
        self,
        rows: CatalogRows | Sequence[CatalogRows],
        feed: MixtureFeed,
        geometry: Geometry,
        *,
        rank: int = 0,
        world_size: int = 1,
        windows: int | None = None,
        prefetch_windows: int | None = None,
        widen: bool = True,
        form: ArrayForm | None = None,
    ) -> None:
        geometry.rank_slots(rank, world_size)  # refuses what cannot be
        catalogs = [rows] if isinstance(rows, CatalogRows) else list(rows)
        if windows is None and isinstance(feed, MixtureSchedule):
            windows = len(feed)
        is_mapped = all(one.is_mapped for one in catalogs)
        if prefetch_windows is None:  # a memory map needs no help, an object store does
            prefetch_windows = 0 if is_mapped else 1
        self.geometry = geometry
        self.windows = windows
        self._start = Cursor()
        self._done: tuple[int, int] | None = None  # window and step last handed out since then
        self._rows = {one.catalog.fingerprint: one for one in catalogs}
        self._feed = feed
        self._rank, self._world_size = rank, world_size
        self._prefetch_windows = prefetch_windows
        self._together = 1
        if isinstance(feed, MixtureSchedule) and is_mapped:  # what exists may be planned ahead
            self._together = max(1, AHEAD_SLOTS // geometry.window_slots)
        self._widen = widen
        self._form = form or ArrayForm()

    def reading(
        self,
        *,
        widen: bool | None = None,
        form: ArrayForm | None = None,
        feed: MixtureFeed | None = None,
        windows: int | None = None,
    ) -> "WindowReader":
        """The same reader giving other types of tokens or of all arrays, asking another feed, or reading less far."""
        reader = copy(self)
        reader._feed = feed or self._feed
        reader.windows = self.windows if windows is None else windows
        reader._widen = self._widen if widen is None else widen
        reader._form = form or self._form
        return reader

    @property
    def step_rows(self) -> int:
        """This rank's rows of a step."""
        slots = self.geometry.rank_slots(self._rank, self._world_size)
        return slots.stop - slots.start

    @property
    def layout(self) -> Layout:
        """Of the shards."""
        return next(iter(self._rows.values())).corpus.manifest.layout

    @property
    def step_bytes(self) -> int:
        """What a step's tokens take in the shards' own type."""
        return self.step_rows * self.layout.row_bytes

    @property
    def feed(self) -> MixtureFeed:
        return self._feed

    @property
    def window_bytes(self) -> int:
        """What this rank's tokens of a window take in the shards' own type."""
        return self.geometry.window_steps * self.step_bytes

    # ---- state ---------------------------------------------------------------------------------

    @property
    def cursor(self) -> Cursor:
        """The next step to be read."""
        if self._done is None:
            return self._start
        window, step = self._done
        return Cursor(window, step + 1) if step + 1 < self.geometry.window_steps else Cursor(window + 1, 0)

    @cursor.setter
    def cursor(self, cursor: Cursor) -> None:
        if cursor.window < 0 or not 0 <= cursor.step < self.geometry.window_steps:
            raise ResumeError(
                f"{cursor} is of another run: windows here have {self.geometry.window_steps} steps, counted from 0. "
                "Use the state with the geometry it was saved under."
            )
        self._start, self._done = cursor, None

    def state_dict(self) -> dict[str, int]:
        """The cursor: good for any rank of any world size of the same run."""
        return self.cursor.to_dict()

    def load_state_dict(self, state: dict[str, int]) -> None:
        try:
            self.cursor = Cursor.from_dict(state)
        except (KeyError, TypeError, ValueError) as error:
            raise ResumeError(f"reader state {state!r} is no cursor. It needs integers window and step.") from error

    # ---- batches -------------------------------------------------------------------------------

    def __iter__(self) -> Iterator[Batch]:
        return self.every()

    def every(self, workers: int = 1, worker: int = 0, run: int = 1) -> Iterator[Batch]:
        """Batches from the cursor on; with several workers only this one's, dealt out in runs of steps."""
        first = self.cursor.steps(self.geometry)
        for rows in self.stretches(first // self.geometry.window_steps):
            begin = rows.first_step
            steps = np.arange(max(first, begin), begin + len(rows) // rows.step_rows)
            mine = steps[(steps - first) // run % workers == worker]
            for batch in cut(rows, mine - begin, rows.copy_tokens, widen=self._widen, form=self._form):
                self._done = batch[:2]
                yield batch

    def stretches(self, window: int) -> Iterator[RankRows]:
        """Windows in order, some at a time; the next are loaded in a thread meanwhile where that was asked for."""
        if self._prefetch_windows == 0:
            while self.windows is None or window < self.windows:
                rows, window = self._load(window)
                yield rows
            return
        ahead: list[Future[tuple[RankRows, int]]] = []
        pool = ThreadPoolExecutor(1, "mixer-reader")
        try:
            while True:
                while len(ahead) <= self._prefetch_windows and (self.windows is None or window < self.windows):
                    ahead.append(pool.submit(self._load, window, 1))
                    window += 1
                if not ahead:
                    return
                yield ahead.pop(0).result()[0]
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _load(self, window: int, most: int | None = None) -> tuple[RankRows, int]:
        """The rows of this window and, if they are there, of some more; and the window after them."""
        first = self._feed.row(window)
        chosen: list[ScheduleRow] = [first]
        while len(chosen) < (most or self._together) and (self.windows is None or window + len(chosen) < self.windows):
            row = self._feed.row(window + len(chosen))
            if row.catalog.fingerprint != first.catalog.fingerprint:
                break
            chosen.append(row)
        return self.gather(chosen), window + len(chosen)

    def gather(self, chosen: Sequence[ScheduleRow]) -> RankRows:
        """This rank's rows of consecutive windows of one catalog."""
        first = chosen[0]
        if (rows := self._rows.get(first.catalog.fingerprint)) is None:
            raise DataError(
                f"window {first.window} is bound to catalog {first.catalog.fingerprint[:12]}, and none of those given "
                f"is it ({', '.join(name[:12] for name in self._rows)}). Open that catalog too."
            )
        return locate(plan_windows(chosen, self.geometry), rows, self._rank, self._world_size)


def cut(
    rows: WindowRows,
    step_n: NDArray[np.int64],
    take_tokens: Callable[[NDArray[np.int64]], NDArray[Any]],
    *,
    widen: bool,
    form: ArrayForm,
) -> Iterator[Batch]:
    """The batches of some steps, counted from the first of `rows`; tokens are taken a chunk of steps at a time."""
    window_steps, num_rows = rows.geometry.window_steps, rows.step_rows
    split, one = form.split, form.one
    place_nb = step_n[:, None] * num_rows + np.arange(num_rows)
    first_n = rows.starts_offsets[step_n * num_rows]
    offsets_nb = rows.starts_offsets[step_n[:, None] * num_rows + np.arange(num_rows + 1)] - first_n[:, None]
    small = zip(
        ((rows.first_step + step_n) // window_steps).tolist(),
        ((rows.first_step + step_n) % window_steps).tolist(),
        split(rows.domain_n[place_nb]),
        split(rows.row_n[place_nb]),
        split(rows.length_n[place_nb]),
        split(offsets_nb),
        first_n.tolist(),
        (first_n + offsets_nb[:, -1]).tolist(),
        strict=True,
    )
    per_chunk = max(1, CHUNK_ROWS // num_rows)
    wide = SpareArrays(np.dtype(np.int64))
    for first in range(0, len(step_n), per_chunk):
        chunk = take_tokens(place_nb[first : first + per_chunk].reshape(-1))
        for begin in range(0, len(chunk), num_rows):
            window, step, domain, row, length, offsets, low, high = next(small)
            tokens = chunk[begin : begin + num_rows]
            if widen:
                wider = wide.take(num_rows, tokens.shape[1])
                wider[...] = tokens
                tokens = wider
            yield Batch(window, step, one(tokens), domain, row, length, one(rows.starts[low:high]), offsets)


class SpareArrays:
    """Arrays that are given out again once nobody else holds them: fresh memory costs as much as the copy."""

    def __init__(self, dtype: np.dtype[Any]) -> None:
        self._dtype = dtype
        self._arrays: list[NDArray[Any]] = []

    def take(self, num_rows: int, row_tokens: int) -> NDArray[Any]:
        for array in self._arrays:
            # Three references are ours: the list's, this loop's, the call's. Views and tensors of an array hold it too.
            if sys.getrefcount(array) == 3 and len(array) == num_rows:
                return array
        if len(self._arrays) == SPARE_ARRAYS:
            self._arrays.pop(0)
        self._arrays.append(np.empty((num_rows, row_tokens), self._dtype))
        return self._arrays[-1]
