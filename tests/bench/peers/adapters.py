"""One function a reader: how it is driven, so that it yields batches of rows as torch.int64.

Every reader is set up as its documentation advises for speed, over the same rows and the same
weights, without end. With `seat.workers` of 1 it may use one helper of its own kind: a DataLoader
worker process, or what it has instead. Libraries are imported where they are used: no process needs
them all, and a bench runs with those that are installed. The table `READERS` is at the end.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch.utils.data import BatchSampler, DataLoader, Dataset, DistributedSampler, IterableDataset, Sampler

from tests.bench.peers import ours
from tests.bench.peers.bed import NUM_DOMAINS, ROW_TOKENS, Bed, Seat
from tests.bench.peers.corpora import STUBS

SPARE = 1.2  # LitData: how much longer than one pass over the bed no domain may run out
LIMIT = "limit"


@dataclass(frozen=True, slots=True, kw_only=True)
class Reader:
    """How one reader is run. `modules` are imported before the clock starts, so that "first batch" is
    about data and not about imports; where the first is not found, the reader is not installed.
    `stubs` is a folder put in front of the import path before that.
    """

    batches: Callable[[Bed, Seat], Iterator[torch.Tensor]]
    layout: str = "raw"
    modules: tuple[str, ...] = ()
    stubs: Path | None = None
    takes_workers: bool = True
    yields_rows: bool = True  # False: ready-made batches, nothing of the bed to check


def widened(rows: list[NDArray[np.uint16]]) -> torch.Tensor:
    """The cheapest collation that was found: each row is widened straight into its place."""
    wide = np.empty((len(rows), ROW_TOKENS), dtype=np.int64)
    for place, row in enumerate(rows):
        wide[place] = row
    return torch.from_numpy(wide)


def widened_items(items: list[dict[str, NDArray[np.uint16]]]) -> torch.Tensor:
    return widened([item["tokens"] for item in items])


def widened_table(table: pa.Table) -> torch.Tensor:
    flat = table["tokens"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
    return torch.from_numpy(flat.reshape(-1, ROW_TOKENS).astype(np.int64))


def gather(bed: Bed, seat: Seat) -> Iterator[torch.Tensor]:
    """The physical limit of one process: rows drawn in advance, then np.take into a reused buffer and
    one widening copy into another."""
    draw = np.random.default_rng([seat.seed, seat.rank])
    num_rows_d = np.array(bed.num_rows)
    domain_n = draw.choice(NUM_DOMAINS, size=400_000 // seat.batch_rows * seat.batch_rows, p=bed.weights_d)
    row_n = bed.first_row_d[domain_n] + (draw.random(len(domain_n)) * num_rows_d[domain_n]).astype(np.int64)
    row_sb = row_n.reshape(-1, seat.batch_rows)
    source = np.asarray(bed.raw())
    narrow = np.empty((seat.batch_rows, ROW_TOKENS), dtype=np.uint16)
    wide = np.empty(narrow.shape, dtype=np.int64)
    batch = torch.from_numpy(wide)
    while True:
        for row_b in row_sb:
            # mode="clip" is what lets numpy write straight into `out`
            np.take(source, row_b, axis=0, out=narrow, mode="clip")
            wide[...] = narrow
            yield batch


class _GatherStream(IterableDataset[torch.Tensor]):
    def __init__(self, bed: Bed, seat: Seat) -> None:
        self.bed = bed
        self.seat = seat

    def __iter__(self) -> Iterator[torch.Tensor]:
        # A worker sends what it yields later, so what it yields must not be written again.
        return map(torch.clone, gather(self.bed, self.seat))


def gather_in_loader(bed: Bed, seat: Seat) -> Iterator[torch.Tensor]:
    """The limit inside a torch DataLoader: what the loader alone costs everybody who uses it."""
    loader = DataLoader(_GatherStream(bed, seat), batch_size=None, num_workers=seat.workers)
    return iter(loader)


def memcpy(bed: Bed, seat: Seat) -> Iterator[torch.Tensor]:
    """Ready int64 batches copied out of 256 MiB into a reused buffer: no gather, no widening."""
    del bed
    ready = np.ones(((256 << 20) // (8 * ROW_TOKENS * seat.batch_rows), seat.batch_rows, ROW_TOKENS), np.int64)
    copy = np.ones_like(ready[0])
    batch = torch.from_numpy(copy)
    while True:
        for one in ready:
            np.copyto(copy, one)
            yield batch


class _DomainSampler(Sampler[int]):
    """This rank's share of a fresh shuffle of a domain, pass after pass."""

    def __init__(self, num_rows: int, seat: Seat, domain: int) -> None:
        self.num_rows = num_rows
        self.seat = seat
        self.domain = domain
        self.passes = 0

    def set_epoch(self, epoch: int) -> None:
        self.passes = epoch

    def __iter__(self) -> Iterator[int]:
        shuffle = torch.Generator()
        shuffle.manual_seed(self.seat.seed * 1_000_003 + self.domain * 1_009 + self.passes)
        order = torch.randperm(self.num_rows, generator=shuffle).tolist()
        return iter(order[self.seat.rank :: self.seat.world_size])

    def __len__(self) -> int:
        return len(range(self.seat.rank, self.num_rows, self.seat.world_size))


def torchdata(bed: Bed, seat: Seat) -> Iterator[torch.Tensor]:
    """torchdata.nodes: MultiNodeWeightedSampler over one memory map a domain. Its worker is the
    Prefetcher thread. It leaves sharding over ranks to the samplers."""
    from torchdata import nodes

    sources: dict[str, Any] = {}
    for domain, num_rows in enumerate(bed.num_rows):
        sampler = nodes.SamplerWrapper(_DomainSampler(num_rows, seat, domain))
        sources[str(domain)] = nodes.Mapper(sampler, bed.raw_domain(domain).__getitem__)
    weights = {str(domain): float(weight) for domain, weight in enumerate(bed.weights_d)}
    mixed = nodes.MultiNodeWeightedSampler(
        sources,
        weights,
        stop_criteria=nodes.StopCriteria.CYCLE_FOREVER,
        rank=seat.rank,
        world_size=seat.world_size,
        seed=seat.seed,
    )
    node: Any = nodes.Mapper(nodes.Batcher(mixed, seat.batch_rows, drop_last=True), widened)
    if seat.workers:
        node = nodes.Prefetcher(node, prefetch_factor=4)
    return iter(nodes.Loader(node))


def megatron(bed: Bed, seat: Seat) -> Iterator[torch.Tensor]:
    """Megatron-style blending: the compiled index of megatron-core, and the semantics of its sampler.

    A row is named by (dataset, place in the dataset), both looked up in arrays made in advance by
    `build_blending_indices`; rank r takes its slice of every consecutive global batch. Left out, in
    its favour: labels, masks and position ids that GPTDataset makes for every row.
    """
    blend = _Blend(bed, seat)
    while True:
        sampler = _ConsecutiveBatches(len(blend), seat)
        yield from DataLoader(blend, batch_sampler=sampler, num_workers=seat.workers)


class _Blend(Dataset[torch.Tensor]):
    def __init__(self, bed: Bed, seat: Seat) -> None:
        from megatron.core.datasets import helpers_cpp  # pyright: ignore[reportAttributeAccessIssue]

        size = sum(bed.num_rows)
        self.dataset_n = np.zeros(size, dtype=np.int16)
        self.place_n = np.zeros(size, dtype=np.int64)
        helpers_cpp.build_blending_indices(self.dataset_n, self.place_n, bed.weights_d, NUM_DOMAINS, size, False)
        needed_d = np.bincount(self.dataset_n, minlength=NUM_DOMAINS)
        self.rows = [bed.raw_domain(domain) for domain in range(NUM_DOMAINS)]
        self.order = []
        for num_rows, needed, domain in zip(bed.num_rows, needed_d, range(NUM_DOMAINS), strict=True):
            shuffle = np.random.default_rng([seat.seed, domain])
            passes = [shuffle.permutation(num_rows) for _ in range(-(-int(needed) // num_rows))]
            self.order.append(np.concatenate(passes))

    def __len__(self) -> int:
        return len(self.dataset_n)

    def __getitem__(self, number: int) -> torch.Tensor:
        dataset = self.dataset_n[number]
        row = self.order[dataset][self.place_n[number]]
        return torch.from_numpy(self.rows[dataset][row].astype(np.int64))


class _ConsecutiveBatches(Sampler[list[int]]):
    def __init__(self, num_rows: int, seat: Seat) -> None:
        self.num_rows = num_rows
        self.seat = seat

    def __iter__(self) -> Iterator[list[int]]:
        everyone = self.seat.batch_rows * self.seat.world_size
        mine = self.seat.rank * self.seat.batch_rows
        for start in range(mine, self.num_rows - everyone + 1, everyone):
            yield list(range(start, start + self.seat.batch_rows))


def litdata(bed: Bed, seat: Seat) -> Iterator[torch.Tensor]:
    """CombinedStreamingDataset over token chunks. Small domains are upsampled by `subsample` above
    one, because the combination ends with its first exhausted member."""
    import litdata
    from litdata.streaming.item_loader import TokensLoader

    if seat.world_size > 1:
        torch.distributed.init_process_group("gloo")  # how it learns of its rank
    wanted_d = bed.weights_d * sum(bed.num_rows)
    members = [
        litdata.StreamingDataset(
            str(bed.folder("litdata") / str(domain)),
            item_loader=TokensLoader(block_size=ROW_TOKENS),
            shuffle=True,
            drop_last=True,
            seed=seat.seed,
            subsample=max(1.0, float(np.ceil(SPARE * wanted_d[domain] / bed.num_rows[domain]))),
        )
        for domain in range(NUM_DOMAINS)
    ]
    mixed = litdata.CombinedStreamingDataset(
        members, weights=bed.weights_d.tolist(), iterate_over_all=False, seed=seat.seed
    )
    loader = litdata.StreamingDataLoader(
        mixed,
        batch_size=seat.batch_rows,
        num_workers=seat.workers,
        collate_fn=lambda rows: torch.stack(rows).to(torch.int64),
        drop_last=True,
    )
    while True:
        yield from loader


def mosaic(bed: Bed, seat: Seat) -> Iterator[torch.Tensor]:
    """MosaicML Streaming with one stream a domain and `proportion` weights. A torchvision stub
    stands in for a package that it imports and this bench does not need."""
    import streaming

    streams = [
        streaming.Stream(local=str(bed.folder("mds") / str(domain)), proportion=float(weight))
        for domain, weight in enumerate(bed.weights_d)
    ]
    dataset = streaming.StreamingDataset(
        streams=streams,
        shuffle=True,
        batch_size=seat.batch_rows,
        shuffle_seed=seat.seed,
        num_canonical_nodes=1,
    )
    loader = streaming.StreamingDataLoader(
        dataset,
        batch_size=seat.batch_rows,
        num_workers=seat.workers,
        collate_fn=widened_items,
        drop_last=True,
    )
    while True:
        yield from loader


def hf_map(bed: Bed, seat: Seat) -> Iterator[torch.Tensor]:
    """Hugging Face `interleave_datasets` over shuffled datasets with random access, a batch at a time
    as an Arrow table: the fastest of the formats and samplers that were tried."""
    import datasets

    datasets.disable_progress_bars()
    members = [
        datasets.load_from_disk(str(bed.folder("hf") / str(domain))).shuffle(seed=seat.seed + domain)
        for domain in range(NUM_DOMAINS)
    ]
    mixed: Any = datasets.interleave_datasets(
        members,  # pyright: ignore[reportArgumentType] - load_from_disk may also give a dict; not here
        probabilities=bed.weights_d.tolist(),
        seed=seat.seed,
        stopping_strategy="all_exhausted",
    ).with_format("arrow")
    mine = DistributedSampler(mixed, seat.world_size, seat.rank, shuffle=False, drop_last=True)
    batch_sampler: Any = BatchSampler(mine, seat.batch_rows, drop_last=True)
    loader = DataLoader(
        mixed, batch_size=None, sampler=batch_sampler, num_workers=seat.workers, collate_fn=widened_table
    )
    while True:
        yield from loader


def hf_iterable(bed: Bed, seat: Seat) -> Iterator[torch.Tensor]:
    """Hugging Face `interleave_datasets` over iterable datasets. Not shuffled, in its favour."""
    import datasets
    from datasets.distributed import split_dataset_by_node

    datasets.disable_progress_bars()
    members = []
    for domain, num_rows in enumerate(bed.num_rows):
        member: Any = datasets.load_from_disk(str(bed.folder("hf") / str(domain))).with_format("numpy")
        members.append(member.to_iterable_dataset(num_shards=min(16, num_rows)).repeat(None))
    mixed = datasets.interleave_datasets(
        members,
        probabilities=bed.weights_d.tolist(),
        seed=seat.seed,
        stopping_strategy="all_exhausted",
    )
    if seat.world_size > 1:
        mixed = split_dataset_by_node(mixed, rank=seat.rank, world_size=seat.world_size)
    loader = DataLoader(mixed, batch_size=seat.batch_rows, num_workers=seat.workers, collate_fn=widened_items)
    return iter(loader)


def grain_records(bed: Bed, seat: Seat) -> Iterator[torch.Tensor]:
    """grain over ArrayRecord, its own format."""
    import grain

    places = [bed.folder("arrayrecord") / f"{domain}.arrayrecord" for domain in range(NUM_DOMAINS)]
    return _grain([grain.sources.ArrayRecordDataSource(str(place)) for place in places], bed, seat)


def grain_mapped(bed: Bed, seat: Seat) -> Iterator[torch.Tensor]:
    """grain over memory maps instead of ArrayRecord: what its mixing and batching alone cost."""
    return _grain([_MappedRows(bed, domain) for domain in range(NUM_DOMAINS)], bed, seat)


def _grain(sources: list[Any], bed: Bed, seat: Seat) -> Iterator[torch.Tensor]:
    """Shuffled, repeated, mixed and batched by index, read ahead by two threads."""
    import grain

    members = [
        grain.MapDataset.source(source).seed(seat.seed + domain).shuffle().repeat()
        for domain, source in enumerate(sources)
    ]
    mixed = grain.MapDataset.mix(members, weights=bed.weights_d.tolist())
    if seat.world_size > 1:
        mixed = mixed[seat.rank :: seat.world_size]
    batched = mixed.batch(seat.batch_rows, drop_remainder=True, batch_fn=_widened_records)
    stream = batched.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=64))
    if seat.workers:
        stream = stream.mp_prefetch(grain.MultiprocessingOptions(num_workers=seat.workers))
    for batch in stream:
        yield torch.from_numpy(batch)


def _widened_records(records: Any) -> NDArray[np.int64]:
    wide = np.empty((len(records), ROW_TOKENS), dtype=np.int64)
    for place, record in enumerate(records):
        wide[place] = np.frombuffer(record, np.uint16) if isinstance(record, bytes) else record
    return wide


class _MappedRows:
    """A memory map as a random-access source of grain; opened anew in every process."""

    def __init__(self, bed: Bed, domain: int) -> None:
        self.bed = bed
        self.domain = domain
        self.rows = bed.raw_domain(domain)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.bed, self.domain)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> NDArray[np.uint16]:
        return self.rows[number]


READERS: dict[str, Reader] = {
    LIMIT: Reader(batches=gather, takes_workers=False),
    "memcpy": Reader(batches=memcpy, takes_workers=False, yields_rows=False),
    "limit-in-loader": Reader(batches=gather_in_loader),
    **{
        way: Reader(batches=batches, layout="mixer", takes_workers=way != "mixer-reader")
        for way, batches in ours.WAYS.items()
    },
    "torchdata": Reader(batches=torchdata, modules=("torchdata.nodes",)),
    "megatron": Reader(batches=megatron, modules=("megatron.core", "megatron.core.datasets.helpers_cpp")),
    "litdata": Reader(batches=litdata, layout="litdata", modules=("litdata",)),
    "hf-map": Reader(batches=hf_map, layout="hf", modules=("datasets", "datasets.distributed")),
    "hf-iterable": Reader(batches=hf_iterable, layout="hf", modules=("datasets", "datasets.distributed")),
    "grain-mapped": Reader(batches=grain_mapped, modules=("grain",)),
    "grain": Reader(batches=grain_records, layout="arrayrecord", modules=("grain",)),
    "mosaic": Reader(batches=mosaic, layout="mds", modules=("streaming",), stubs=STUBS),
}
