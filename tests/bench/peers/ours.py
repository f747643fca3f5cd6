"""Our own reader in the bench: the bed's rows in our format, and the reader over them.

The only file of the bench that knows `mixer`. Ours does more than the others: it compares every row
with its check value, hands out where documents start, and asks for a mixture window by window.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import torch
from torch.utils.data import DataLoader

from mixer.core.mixture import Mixture
from mixer.core.plan import Geometry
from mixer.core.schedule import GrowingSchedule, MixtureSchedule
from mixer.data import documents, shards
from mixer.data.corpus import Corpus
from mixer.data.manifest import (
    DomainInfo,
    Manifest,
    TokenizerInfo,
    documents_path,
    shard_path,
    write_manifest,
)
from mixer.data.reader import WindowReader
from mixer.data.shards import Layout, Rows
from mixer.training.dataset import MixtureDataset, MixtureLoader
from tests.bench.peers.bed import NUM_DOMAINS, ROW_TOKENS, Bed, Seat

SHARD_ROWS = 16_384  # 64 MiB, as the chunks of the others
WINDOW_SLOTS = 8192
VOCABULARY = 1 << 16


def write_corpus(bed: Bed, folder: Path) -> None:
    """A corpus of our format, in which every row is a document."""
    disk, root = pafs.LocalFileSystem(), str(folder)
    domains: dict[str, DomainInfo] = {}
    for domain, num_rows in enumerate(bed.num_rows):
        name, tokens = str(domain), bed.tokens_of(domain)
        infos = []
        for first in range(0, num_rows, SHARD_ROWS):
            part = tokens[first : first + SHARD_ROWS]
            rows = Rows(
                tokens=part,
                length=np.full(len(part), ROW_TOKENS, dtype=np.int32),
                starts=pa.array([[0]] * len(part), pa.list_(pa.int32())),
                first_document=np.arange(first, first + len(part)),
            )
            infos.append(shards.write(disk, root, shard_path(name, len(infos)), rows))
        listed = documents.write(
            disk,
            root,
            documents_path(name),
            file=np.zeros(num_rows, dtype=np.int32),
            record=np.arange(num_rows),
            tokens=np.full(num_rows, ROW_TOKENS),
        )
        domains[name] = DomainInfo(
            rows=num_rows,
            documents=num_rows,
            tokens=num_rows * ROW_TOKENS,
            padding=0,
            sources=("noise",),
            shards=tuple(infos),
            documents_file=listed,
        )
    tokenizer = TokenizerInfo(kind="byte", identity="00" * 8, vocab_size=VOCABULARY, eos=VOCABULARY - 1)
    layout = Layout(row_tokens=ROW_TOKENS, dtype="uint16")
    write_manifest(disk, root, Manifest(layout=layout, tokenizer=tokenizer, domains=domains))


def open_reader(bed: Bed, seat: Seat) -> WindowReader:
    """A reader of windows of 8,192 rows over all ranks, without end: each next mixture is asked for."""
    rows = Corpus.open(bed.folder("mixer")).by_source
    batch_rows = seat.batch_rows * seat.world_size
    geometry = Geometry(window_steps=WINDOW_SLOTS // batch_rows, batch_rows=batch_rows, seed=seat.seed)
    mixture = Mixture.from_dict(
        rows.catalog, {str(domain): float(bed.weights_d[domain]) for domain in range(NUM_DOMAINS)}
    )
    feed = GrowingSchedule(MixtureSchedule(rows.catalog, geometry), lambda window: mixture)
    return WindowReader(rows, feed, geometry, rank=seat.rank, world_size=seat.world_size)


def alone(bed: Bed, seat: Seat) -> Iterator[torch.Tensor]:
    """`WindowReader` without PyTorch's shell: of all that it hands out only the tokens become a tensor."""
    return (torch.from_numpy(batch.tokens) for batch in open_reader(bed, seat))


def with_own_loader(bed: Bed, seat: Seat) -> Iterator[torch.Tensor]:
    """`MixtureLoader`, the way that the documentation advises."""
    loader = MixtureLoader(open_reader(bed, seat), num_workers=seat.workers)
    return (batch["tokens"] for batch in loader)


def in_torch_loader(bed: Bed, seat: Seat) -> Iterator[torch.Tensor]:
    """`MixtureDataset` under a plain torch DataLoader, for loops that make their own."""
    dataset = MixtureDataset(open_reader(bed, seat))
    loader = DataLoader(dataset, batch_size=None, num_workers=seat.workers)
    return (batch["tokens"] for batch in loader)


WAYS: dict[str, Callable[[Bed, Seat], Iterator[torch.Tensor]]] = {
    "mixer-reader": alone,
    "mixer": with_own_loader,
    "mixer-in-loader": in_torch_loader,
}
