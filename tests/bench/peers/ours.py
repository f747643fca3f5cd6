"""Our own reader in the bench: the corpus in our format, and the reader over it.

The only file of the bench that knows `mixer`.
"""

from collections.abc import Iterator
from pathlib import Path

import torch

from tests.bench.peers.bed import Bed, Seat

MODULES = ("mixer.data.reader",)
WINDOW_STEPS = 64


def write_corpus(bed: Bed, folder: Path) -> None:
    """The bed's rows as shards of our format with a manifest."""
    raise NotImplementedError


def batches(bed: Bed, seat: Seat) -> Iterator[torch.Tensor]:
    """`mixer.data.reader.WindowReader` over memory-mapped shards; its worker is a DataLoader's."""
    raise NotImplementedError
