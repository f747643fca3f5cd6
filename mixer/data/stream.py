"""One rank's batches through Ray Data: window numbers -> rows gathered in tasks -> batches, in order.

The rank's windows from its cursor on are cut into runs; a run is one task, which goes through its
windows one after the other. For each it asks the feed for the window's row, and so waits until that
row exists; plans, finds this rank's rows, gathers them, and hands on a block, in which small windows that are
decided already travel together (`mixer.data.decided`). Runs follow one another, never two at a time: order
is kept, and no window is asked for before the row of the one ahead of it is there.
A run that is lost with its process is read again from its first window, to the same rows.

A block is *one* row of a Ray dataset, whose columns are lists (tokens, lengths, document starts) with
all rows of its windows in them. So Ray Data neither splits nor joins blocks, no schema changes at a
window cut short by the cursor, and every list is a view of shared memory when it arrives: the one
copy that this process makes is the one that widens a step's tokens.

Ray Data's executor hands a block on in two turns of its loop, and a turn in which nothing new has come takes it a
tenth of a second. So where no further window is there yet, a block is followed by an empty one, which ends that wait.

The executor runs outside of this process (`streaming_split`); the tasks claim `num_cpus` of Ray, by
default nothing, so they start where training holds every CPU. How far tasks read ahead is bounded twice:
by the rows that exist, which is the feed's affair, and by `prefetch_windows`: the consumer writes the window
it is at into a small file, and a task asks for no row further ahead. That is why tasks run on the node of
their consumer, where the blocks are wanted anyway. Ray Data's own bound, on object store memory, would do
the same at the price of a whole core: its scheduling loop does not sleep while output waits for room.

Nothing here knows where the run stands but `cursor`. A new stream is built from it after every restart.
"""

from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import ray.data
from numpy.typing import NDArray
from ray.data.block import BlockMetadata
from ray.data.datasource import Datasource, ReadTask

from mixer.core.errors import ConfigError, MixerError
from mixer.core.plan import Cursor, Geometry
from mixer.core.ports import MixtureFeed
from mixer.data.corpus import CatalogRows
from mixer.data.decided import DecidedRows, Place
from mixer.data.reader import ArrayForm, Batch, WindowReader, cut
from mixer.data.shards import numbers
from mixer.data.tasks import Failure
from mixer.data.window import RankRows

LEG_RUNS = 256  # runs that one Ray dataset lists; a new one is begun behind them
LEAST_AHEAD_WINDOWS, MOST_TOGETHER_WINDOWS = 8, 64
LEAST_RUN_WINDOWS, RUN_BYTES = 256, 1 << 30  # of tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamingOptions:
    """How a rank's windows travel through Ray Data. Nothing here changes which rows they hold."""

    prefetch_windows: int | None = None  # how far beyond the window that is consumed rows are asked for and gathered
    block_mb: float = 8.0  # of tokens: small windows that are decided already travel together up to this size
    num_cpus: float = 0.0  # that Ray reserves for the task of a rank; 0 starts also where training holds all
    run_windows: int | None = None  # windows read by one task, and again if it is lost

    def __post_init__(self) -> None:
        for key in ("prefetch_windows", "run_windows"):
            if (value := getattr(self, key)) is not None and value < 1:
                raise ConfigError(f"{key} is {value}; it must be at least 1.")
        for key in ("num_cpus", "block_mb"):
            if (value := getattr(self, key)) < 0:
                raise ConfigError(f"{key} is {value}; it must be at least 0.")

    def windows_in_run(self, window_bytes: int) -> int:
        """Every task reads the catalogs, and a saved schedule, before its first window."""
        return self.run_windows or max(LEAST_RUN_WINDOWS, RUN_BYTES // window_bytes)

    def reach(self, window_bytes: int) -> tuple[int, int]:
        """How many windows ahead of the consumer are read, and how many of them travel together."""
        most = min(MOST_TOGETHER_WINDOWS, max(1, int(self.block_mb * 2**20) // window_bytes))
        ahead = self.prefetch_windows or max(LEAST_AHEAD_WINDOWS, 3 * most)
        return ahead, max(1, min(most, ahead // 3))


class WindowStream:
    """This rank's batches from the cursor on, the same as a `WindowReader` gives; every `iter` goes on from there.

    `rows` are the catalogs the schedule may name; `feed` is pickled to the tasks and asked there. `windows`
    is where to stop: the end of a saved schedule by default, nowhere with a live feed. Ray must run.
    Closing the iterator, or dropping it, ends what runs behind it.
    """

    def __init__(
        self,
        rows: CatalogRows | Sequence[CatalogRows],
        feed: MixtureFeed,
        geometry: Geometry,
        *,
        rank: int = 0,
        world_size: int = 1,
        cursor: Cursor | None = None,
        windows: int | None = None,
        options: StreamingOptions | None = None,
        widen: bool = True,
        form: ArrayForm | None = None,
    ) -> None:
        self._reader = WindowReader(rows, feed, geometry, rank=rank, world_size=world_size, windows=windows)
        self._reader.cursor = cursor or Cursor()  # refuses what cannot be
        self._at = self._reader.cursor
        self._options = options or StreamingOptions()
        self._run_windows = self._options.windows_in_run(self._reader.window_bytes)
        self._widen = widen
        self._form = form or ArrayForm()

    @property
    def cursor(self) -> Cursor:
        """The next step to be read."""
        return self._at

    def __iter__(self) -> Generator[Batch, None, None]:
        geometry, windows = self._reader.geometry, self._reader.windows
        with Place(self._at.window) as place:
            shared = ray.put(_Reading(self._reader, place.path, *self._options.reach(self._reader.window_bytes)))
            yield from self._legs(shared, place, geometry, windows)

    def _legs(self, shared: Any, place: Place, geometry: Geometry, windows: int | None) -> Iterator[Batch]:
        while windows is None or self._at.window < windows:
            end = self._at.window + LEG_RUNS * self._run_windows
            with closing(self._tables(shared, end if windows is None else min(end, windows))) as tables:
                for table in tables:
                    for i in range(table.num_rows):
                        rows = _Block.of(table, i, geometry, self._reader.step_rows)
                        place.move(rows.first_step // geometry.window_steps)
                        for batch in cut(rows, rows.step_n, rows.take_tokens, widen=self._widen, form=self._form):
                            self._at = Cursor(batch.window, batch.step).after(1, geometry)
                            if batch.step == 0:
                                place.move(batch.window)
                            yield batch

    def _tables(self, shared: Any, end: int) -> Generator[pa.Table, None, None]:
        """The blocks from the cursor up to a window."""
        runs: list[tuple[int, int, int]] = []
        for first in range(self._at.window, end, self._run_windows):
            start = max(self._at.steps(self._reader.geometry), first * self._reader.geometry.window_steps)
            runs.append((first, min(first + self._run_windows, end), start))
        dataset = ray.data.read_datasource(
            _Windows([partial(_read_run, shared, *run) for run in runs]),
            num_cpus=self._options.num_cpus,
            concurrency=1,
            label_selector={"ray.io/node-id": ray.get_runtime_context().get_node_id()},
            override_num_blocks=len(runs),
        )
        context = dataset.context  # a copy, this dataset's own
        context.enable_progress_bars = context.print_on_execution_start = False
        context.target_max_block_size = 1  # so a block, which is one row, is handed on as soon as it is there
        context.execution_options.preserve_order = True
        split: Any = dataset.streaming_split(1)[0]
        # With any prefetch here Ray would hold a block back until the one behind it is there, whose row may be
        # decided only after this one was trained. The next block is asked for before this one is handed on anyway.
        tables: Any = iter(split.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0))
        try:
            yield from tables
        finally:
            tables.close()


class _Windows(Datasource):
    """Runs of windows, a task each."""

    def __init__(self, runs: list[Callable[[], Iterator[pa.Table]]]) -> None:
        self._runs = runs

    def get_name(self) -> str:
        return "Windows"

    def estimate_inmemory_data_size(self) -> int | None:
        return None

    def get_read_tasks(self, parallelism: int, *_: Any, **__: Any) -> list[ReadTask]:
        nothing_known = BlockMetadata(num_rows=None, size_bytes=None, input_files=None, exec_stats=None)
        return [ReadTask(run, nothing_known) for run in self._runs]


@dataclass(frozen=True, slots=True)
class _Reading:
    """What every task of a stream needs to know."""

    reader: WindowReader
    place: str
    ahead: int
    most: int  # windows that travel together


def _read_run(shared: Any, first_window: int, stop_window: int, start_step: int) -> Iterator[pa.Table]:
    """In a task: the blocks of a run of windows, from `start_step` on."""
    reading: Any = ray.get(shared)
    reader: WindowReader = reading.reader
    windows = range(first_window, stop_window)
    pool = ThreadPoolExecutor(1, "mixer-stream")  # of an object store rows are fetched while others are handed on
    try:
        with DecidedRows(reader.feed, reading.place, windows, ahead=reading.ahead, most=reading.most) as decided:

            def gather() -> RankRows | None:
                group = decided.next_group()
                return reader.gather(group) if group else None

            coming = pool.submit(gather)
            while (rows := coming.result()) is not None:
                coming = pool.submit(gather)
                table = _to_table(rows, max(start_step, rows.first_step))
                yield table
                if not coming.done():
                    yield table.schema.empty_table()
    except MixerError as error:
        yield _failed(Failure.of(error), reader.layout.token_type)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _to_table(rows: RankRows, start_step: int) -> pa.Table:
    low = (start_step - rows.first_step) * rows.step_rows
    offsets = rows.starts_offsets[low:]
    return _table(
        start_step,
        rows.copy_tokens(np.arange(low, len(rows))).reshape(-1),
        rows.domain_n[low:],
        rows.row_n[low:],
        rows.length_n[low:],
        rows.starts[offsets[0] :],
        offsets - offsets[0],
    )


def _failed(failure: Failure, token_type: np.dtype[Any]) -> pa.Table:
    nothing = np.empty(0, np.int32)
    return _table(
        0,
        nothing.astype(token_type),
        nothing,
        nothing.astype(np.int64),
        nothing,
        nothing,
        nothing.astype(np.int64),
        failure,
    )


def _table(
    start_step: int,
    tokens: NDArray[Any],
    domain_n: NDArray[np.int32],
    row_n: NDArray[np.int64],
    length_n: NDArray[np.int32],
    starts: NDArray[np.int32],
    starts_offsets: NDArray[np.int64],
    failure: Failure | None = None,
) -> pa.Table:
    lists = {
        "tokens": tokens,
        "domain": domain_n,
        "row": row_n,
        "length": length_n,
        "starts": starts,
        "starts_offsets": starts_offsets,
    }
    columns: dict[str, pa.Array] = {
        "step": pa.array([start_step], pa.int64()),
        "kind": pa.array([failure.kind if failure else None], pa.string()),
        "text": pa.array([failure.text if failure else None], pa.string()),
    }
    for name, values in lists.items():
        columns[name] = pa.LargeListArray.from_arrays(pa.array([0, len(values)], pa.int64()), pa.array(values))
    return pa.table(columns)


@dataclass(frozen=True, slots=True, eq=False)
class _Block:
    """A block as it arrived: views of shared memory."""

    geometry: Geometry
    step_rows: int
    first_step: int
    tokens: NDArray[Any]
    domain_n: NDArray[np.int32]
    row_n: NDArray[np.int64]
    length_n: NDArray[np.int32]
    starts: NDArray[np.int32]
    starts_offsets: NDArray[np.int64]

    @classmethod
    def of(cls, table: pa.Table, i: int, geometry: Geometry, step_rows: int) -> "_Block":
        kind = table.column("kind")[i].as_py()
        if kind is not None:
            raise Failure(kind, table.column("text")[i].as_py()).to_error()

        def flat(name: str) -> NDArray[Any]:
            return numbers(table.column(name)[i].values)

        length_n = flat("length")
        return cls(
            geometry=geometry,
            step_rows=step_rows,
            first_step=table.column("step")[i].as_py(),
            tokens=flat("tokens").reshape(len(length_n), -1),
            domain_n=flat("domain"),
            row_n=flat("row"),
            length_n=length_n,
            starts=flat("starts").copy(),  # handed out as views, which would hold the whole block
            starts_offsets=flat("starts_offsets"),
        )

    @property
    def step_n(self) -> NDArray[np.int64]:
        return np.arange(len(self.length_n) // self.step_rows)

    def take_tokens(self, places: NDArray[np.int64]) -> NDArray[Any]:
        return self.tokens[places[0] : places[-1] + 1]
