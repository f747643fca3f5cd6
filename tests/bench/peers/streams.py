"""One measured consumer of one rank, fed by one system through its own way of spreading rows over ranks.

Order of events: import; start Ray where it is needed; build the system and take the first batch (timed); go on
to 100 batches, whose rows are kept; warm up; the timed window, which does nothing but take batches. Then
the rows that were kept are compared with the source, token by token, and their shares with the weights.

    python -m tests.bench.peers.streams '{"system": ..., "root": ..., "answer": ..., ...}'
"""

import json
import logging
import os
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from tests.bench.peers.bed import NUM_DOMAINS, ROW_TOKENS, Bed, Seat
from tests.bench.peers.processes import cpu_by_process

FIRST_BATCHES = 100
OBJECT_STORE_BYTES = 2 << 30
PARQUET = "parquet"

Batches = Iterator[NDArray[np.int64]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """What the bench asks a consumer to do."""

    system: str
    root: str
    answer: str  # file the answer goes to
    window_steps: int = 0  # 0: the system knows no windows
    rank: int = 0
    world_size: int = 2
    warm_s: float = 1.0
    window_s: float = 3.0

    @property
    def windows(self) -> int:
        """More than a thousand million tokens a second would get through."""
        tokens = (self.warm_s + self.window_s + 2) * 1e9
        return FIRST_BATCHES + int(tokens / (self.window_steps * self.seat.batch_rows * ROW_TOKENS))

    @property
    def seat(self) -> Seat:
        return Seat(rank=self.rank, world_size=self.world_size)


class Live:
    """A feed as in a run: nothing of it says which rows there are."""

    def __init__(self, schedule: Any) -> None:
        self._schedule = schedule

    def row(self, window: int) -> Any:
        return self._schedule.row(window)


def window_stream(bed: Bed, order: Order) -> Batches:
    """`WindowStream` with a feed that is asked window by window."""
    from mixer.core.mixture import Mixture
    from mixer.core.plan import Geometry
    from mixer.core.schedule import MixtureSchedule
    from mixer.data.corpus import Corpus
    from mixer.data.stream import WindowStream

    rows = Corpus.open(bed.folder("mixer")).by_source
    batch_rows = order.seat.batch_rows * order.world_size
    geometry = Geometry(window_steps=order.window_steps, batch_rows=batch_rows, seed=order.seat.seed)
    weights = {str(domain): float(weight) for domain, weight in enumerate(bed.weights_d)}
    mixture = Mixture.from_dict(rows.catalog, weights)
    schedule = MixtureSchedule(rows.catalog, geometry).extend(mixture, order.windows)
    stream = WindowStream(
        rows, Live(schedule), geometry, rank=order.rank, world_size=order.world_size, windows=order.windows
    )
    with closing(iter(stream)) as batches:
        for batch in batches:
            yield batch.tokens


def _datasets(bed: Bed) -> list[Any]:
    """Read with Ray's older Parquet source: the newer one, its default, starts actors that read footers, for every
    dataset and in every pass again, which on few cores takes most of a minute."""
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.use_datasource_v2 = False
    return [ray.data.read_parquet(str(bed.folder(PARQUET) / str(domain))) for domain in range(NUM_DOMAINS)]


def rows_of(table: pa.Table) -> NDArray[np.uint16]:
    """The rows of a batch, without a copy where they lie in one piece."""
    column = table["tokens"]
    array = column.chunk(0) if column.num_chunks == 1 else pa.concat_arrays(column.chunks)
    first = array.offset * ROW_TOKENS * 2
    return np.frombuffer(array.buffers()[1], np.uint16, len(array) * ROW_TOKENS, first).reshape(-1, ROW_TOKENS)


def endless(splits: list[Any], rank: int, rows: int) -> Iterator[pa.Table]:
    """A rank's batches, pass after pass. A pass begins only once all ranks have come, and what one of them does not
    take holds up the others; so the others take theirs too, as cheaply as can be: whole blocks, unread."""
    for place, split in enumerate(splits):
        if place != rank:
            threading.Thread(target=_drain, args=(split,), daemon=True).start()
    while True:
        yield from splits[rank].iter_batches(batch_size=rows, batch_format="pyarrow")


def _drain(split: Any) -> None:
    while True:
        for _ in split.iter_batches(batch_size=None, batch_format="pyarrow"):
            pass


def dataset_mix(bed: Bed, order: Order) -> Batches:
    """`Dataset.mix` of a dataset a domain, then `streaming_split`; begun again where it ends."""
    first, *others = _datasets(bed)
    splits = first.mix(*others, weights=bed.weights_d.tolist()).streaming_split(order.world_size, equal=False)
    for table in endless(splits, order.rank, order.seat.batch_rows):
        if len(table) == order.seat.batch_rows:
            yield rows_of(table).astype(np.int64)


def dataset_per_domain(bed: Bed, order: Order) -> Batches:
    """A dataset a domain, each split over the ranks; the consumer draws the domain of every row."""
    splits = [dataset.streaming_split(order.world_size, equal=False) for dataset in _datasets(bed)]

    def rows(of_domain: list[Any]) -> Iterator[NDArray[np.uint16]]:
        for table in endless(of_domain, order.rank, 256):
            yield from rows_of(table)

    waiting = [rows(of_domain) for of_domain in splits]
    draw = np.random.default_rng([order.seat.seed, order.rank])
    while True:
        wide = np.empty((order.seat.batch_rows, ROW_TOKENS), np.int64)
        for place, domain in enumerate(draw.choice(NUM_DOMAINS, order.seat.batch_rows, p=bed.weights_d)):
            wide[place] = next(waiting[domain])
        yield wide


def mosaic(bed: Bed, order: Order) -> Batches:
    """StreamingDataset with `proportion` by stream in its DataLoader. Each rank is a node of its own: they do not wait
    for each other, and none of them looks for the other's shared memory."""
    import torch.distributed as dist

    from tests.bench.peers import adapters

    sys.path.insert(0, str(adapters.STUBS))
    names = {"RANK": order.rank, "WORLD_SIZE": order.world_size, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}
    os.environ.update({name: str(value) for name, value in names.items()})
    dist.init_process_group("gloo", init_method=f"file://{order.answer}.group", rank=0, world_size=1)
    for batch in adapters.mosaic(bed, order.seat):
        yield batch.numpy()


@dataclass(frozen=True, slots=True, kw_only=True)
class System:
    batches: Callable[[Bed, Order], Batches]
    layout: str
    module: str  # what it cannot do without
    title: str
    has_windows: bool = False
    world_size: int = 2


SYSTEMS = {
    "stream": System(batches=window_stream, layout="mixer", module="ray", title="WindowStream", has_windows=True),
    "mosaic": System(batches=mosaic, layout="mds", module="streaming", title="MosaicML Streaming"),
    "mix": System(batches=dataset_mix, layout=PARQUET, module="ray", title="Ray Dataset.mix and streaming_split"),
    "mix-alone": System(
        batches=dataset_mix, layout=PARQUET, module="ray", title="Ray Dataset.mix, one rank", world_size=1
    ),
    "per-domain-alone": System(
        batches=dataset_per_domain, layout=PARQUET, module="ray", title="a Ray dataset a domain, one rank", world_size=1
    ),
    "per-domain": System(
        batches=dataset_per_domain,
        layout=PARQUET,
        module="ray",
        title="a Ray dataset a domain, each split over 2 ranks",
    ),
}


def measure(order: Order) -> dict[str, Any]:
    bed = Bed.load(Path(order.root))
    begin = time.perf_counter()
    batches = SYSTEMS[order.system].batches(bed, order)
    kept = [next(batches)]
    first_batch_s = time.perf_counter() - begin
    if kept[0].shape != (order.seat.batch_rows, ROW_TOKENS) or kept[0].dtype != np.int64:
        raise ValueError(f"{order.system} gave {kept[0].dtype} {kept[0].shape}")
    warm = time.perf_counter() + order.warm_s
    while len(kept) < FIRST_BATCHES:
        kept.append(next(batches).astype(np.int64))
    while time.perf_counter() < warm:
        next(batches)
    count, before, start = 0, cpu_by_process(), time.perf_counter()
    while (now := time.perf_counter()) < start + order.window_s:
        next(batches)
        count += 1
    cpu = sum(seconds - before.get(process, 0) for process, seconds in cpu_by_process().items())
    tokens = count * order.seat.batch_rows * ROW_TOKENS
    return {
        "first_batch_s": first_batch_s,
        "tokens_per_s": tokens / (now - start),
        "cpu_s_per_m_tokens": cpu / max(tokens, 1) * 1e6,
        **compare(kept, bed),
    }


def compare(batches: list[NDArray[np.int64]], bed: Bed) -> dict[str, Any]:
    """How far shares are off the weights, how many batches hold one domain only, how many rows are not the source's."""
    tokens = np.concatenate(batches)
    domain_n, row_n = tokens[:, 0], tokens[:, 1] + (tokens[:, 2] << 16)
    source = bed.raw()
    wrong = int((tokens != source[bed.first_row_d[domain_n] + row_n]).any(axis=1).sum())
    share_d = np.bincount(domain_n, minlength=NUM_DOMAINS) / len(domain_n)
    domain_bb = domain_n.reshape(len(batches), -1)
    return {
        "rows_wrong": wrong,
        "share_off": float(np.abs(share_d - bed.weights_d).max()),
        "one_domain": float((domain_bb == domain_bb[:, :1]).all(axis=1).mean()),
    }


def start_ray() -> None:
    import ray

    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        object_store_memory=OBJECT_STORE_BYTES,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )


def main(text: str) -> None:
    warnings.filterwarnings("ignore")
    order = Order(**json.loads(text))
    answer: dict[str, Any]
    if SYSTEMS[order.system].module == "ray":
        start_ray()
    try:
        answer = measure(order)
    except Exception as error:  # whatever a peer raises is its result, told to the bench
        answer = {"error": f"{type(error).__name__}: {error}"}
    unfinished = Path(f"{order.answer}.unfinished")
    unfinished.write_text(json.dumps(answer))
    unfinished.rename(order.answer)
    if SYSTEMS[order.system].module == "ray":
        import ray

        ray.shutdown()


if __name__ == "__main__":
    main(sys.argv[1])
    sys.stdout.flush()
    os._exit(0)  # some of these leave threads behind that would hold up a plain exit
