"""Rows for any training loop: schedule + catalog + shards -> one rank's batches, in this process.

No Ray and no torch: `mixer.training.dataset` wraps it for PyTorch, and whoever has a loop of their own
can iterate over a `WindowReader` directly. It asks the feed for a window's row, plans the window, and
copies exactly this rank's rows from the shards. The only state is the Cursor of the next step.

Every row is compared with its check value before it is handed out, so decayed storage stops a run
with the shard and row named, and never trains.
"""

import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from copy import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mixer.core.errors import DataError, ResumeError
from mixer.core.plan import Cursor, Geometry, plan_window
from mixer.core.ports import MixtureFeed
from mixer.core.schedule import MixtureSchedule
from mixer.data.corpus import CatalogRows
from mixer.data.window import WindowRows, locate_window

CHUNK_ROWS = 128  # rows copied at a time, so that they are still in cache when they are checked and widened


SPARE_ARRAYS = 4


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """One rank's rows of one step.

    `starts[starts_offsets[i] : starts_offsets[i + 1]]` are the positions in row i at which a document
    starts; text before the first of them belongs to a document that started in an earlier row.
    Positions from `length[i]` on are padding.
    """

    window: int
    step: int
    tokens: NDArray[Any]  # (rows, row_tokens) int64, or the shards' own type
    domain_index: NDArray[np.int32]  # catalog order
    row: NDArray[np.int64]  # number inside the domain
    length: NDArray[np.int32]
    starts: NDArray[np.int32]
    starts_offsets: NDArray[np.int64]

    def cursor(self, geometry: Geometry) -> Cursor:
        """Where to go on after this batch."""
        if self.step + 1 < geometry.window_steps:
            return Cursor(self.window, self.step + 1)
        return Cursor(self.window + 1, 0)


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
    ) -> None:
        geometry.rank_slots(rank, world_size)  # refuses what cannot be
        catalogs = [rows] if isinstance(rows, CatalogRows) else list(rows)
        if windows is None and isinstance(feed, MixtureSchedule):
            windows = len(feed)
        if prefetch_windows is None:  # a memory map needs no help, an object store does
            prefetch_windows = 0 if all(one.is_mapped for one in catalogs) else 1
        self.geometry = geometry
        self.cursor = Cursor()
        self.windows = windows
        self._rows = {one.catalog.fingerprint: one for one in catalogs}
        self._feed = feed
        self._rank, self._world_size = rank, world_size
        self._prefetch_windows = prefetch_windows
        self._widen = widen

    # ---- state ---------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, int]:
        """The cursor: good for any rank of any world size of the same run."""
        return self.cursor.to_dict()

    def load_state_dict(self, state: dict[str, int]) -> None:
        try:
            cursor = Cursor.from_dict(state)
        except (KeyError, TypeError, ValueError) as error:
            raise ResumeError(f"reader state {state!r} is no cursor. It needs integers window and step.") from error
        if cursor.window < 0 or not 0 <= cursor.step < self.geometry.window_steps:
            raise ResumeError(
                f"reader state {state!r} is of another run: its windows have {self.geometry.window_steps} steps, "
                "counted from 0. Use the state with the geometry it was saved under."
            )
        self.cursor = cursor

    def narrowed(self) -> "WindowReader":
        """The same reader giving tokens in the shards' own type."""
        reader = copy(self)
        reader._widen = False
        return reader

    # ---- batches -------------------------------------------------------------------------------

    def __iter__(self) -> Iterator[Batch]:
        return self.every()

    def every(self, workers: int = 1, worker: int = 0, run: int = 1) -> Iterator[Batch]:
        """Batches from the cursor on; with several workers only this one's, dealt out in runs of steps."""
        window_steps = self.geometry.window_steps
        first = self.cursor.steps(self.geometry)
        for window in self._windows_from(first // window_steps):
            begin = window.plan.window * window_steps
            steps = np.arange(max(first, begin), begin + window_steps)
            mine = steps[(steps - first) // run % workers == worker]
            for batch in _batches(window, mine - begin, self._widen):
                self.cursor = batch.cursor(self.geometry)
                yield batch

    def _windows_from(self, window: int) -> Iterator[WindowRows]:
        """Windows in order; the next ones are loaded in a thread meanwhile, where that was asked for."""
        if self._prefetch_windows == 0:
            while self.windows is None or window < self.windows:
                yield self._load(window)
                window += 1
            return
        ahead: list[Future[WindowRows]] = []
        pool = ThreadPoolExecutor(1, "mixer-reader")
        try:
            while True:
                while len(ahead) <= self._prefetch_windows and (self.windows is None or window < self.windows):
                    ahead.append(pool.submit(self._load, window))
                    window += 1
                if not ahead:
                    return
                yield ahead.pop(0).result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _load(self, window: int) -> WindowRows:
        row = self._feed.row(window)
        if (rows := self._rows.get(row.catalog.fingerprint)) is None:
            raise DataError(
                f"window {window} is bound to catalog {row.catalog.fingerprint[:12]}, and none of those given is it "
                f"({', '.join(name[:12] for name in self._rows)}). Open that catalog too."
            )
        return locate_window(plan_window(row, self.geometry), rows, self._rank, self._world_size)


def _batches(window: WindowRows, step_n: NDArray[np.int64], widen: bool) -> Iterator[Batch]:
    """The batches of some steps of a window; rows are copied and checked a chunk of steps at a time."""
    num_rows = len(window) // window.plan.geometry.window_steps
    row_tokens = window.plan.catalog.row_tokens
    per_chunk = max(1, CHUNK_ROWS // num_rows)
    place_n = (step_n[:, None] * num_rows + np.arange(num_rows)).reshape(-1)
    narrow, wide = SpareArrays(window.token_type), SpareArrays(np.dtype(np.int64))
    for first in range(0, len(step_n), per_chunk):
        steps = step_n[first : first + per_chunk].tolist()
        places = place_n[first * num_rows : (first + len(steps)) * num_rows]
        chunk = narrow.take(len(places), row_tokens)
        window.copy_tokens(places, chunk)
        for begin, step in zip(range(0, len(places), num_rows), steps, strict=True):
            tokens = chunk[begin : begin + num_rows]
            if widen:
                tokens = wide.take(num_rows, row_tokens)
                tokens[...] = chunk[begin : begin + num_rows]
            yield _batch(window, step, num_rows, tokens)


def _batch(window: WindowRows, step: int, num_rows: int, tokens: NDArray[Any]) -> Batch:
    rows = slice(step * num_rows, (step + 1) * num_rows)
    offsets = window.starts_offsets[rows.start : rows.stop + 1]
    return Batch(
        window.plan.window,
        step,
        tokens,
        window.domain_n[rows],
        window.row_n[rows],
        window.length_n[rows],
        window.starts[offsets[0] : offsets[-1]],
        offsets - offsets[0],
    )


class SpareArrays:
    """Arrays that are given out again once nobody else holds them: fresh memory costs as much as the copy."""

    def __init__(self, dtype: np.dtype[Any]) -> None:
        self._dtype = dtype
        self._arrays: list[NDArray[Any]] = []

    def take(self, num_rows: int, row_tokens: int) -> NDArray[Any]:
        for place in range(len(self._arrays)):
            # Two references are ours: the list's and the call's. Views and tensors of an array hold it too.
            if sys.getrefcount(self._arrays[place]) == 2 and len(self._arrays[place]) == num_rows:
                return self._arrays[place]
        if len(self._arrays) == SPARE_ARRAYS:
            self._arrays.pop(0)
        self._arrays.append(np.empty((num_rows, row_tokens), self._dtype))
        return self._arrays[-1]
