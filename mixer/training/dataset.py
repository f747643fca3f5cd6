"""The reader as PyTorch knows it: for HF Trainer, Lightning, torchtitan or a loop of one's own.

`MixtureDataset` is an `IterableDataset` that yields one rank's steps; it works under a plain
`DataLoader(dataset, batch_size=None, num_workers=0..n)`, whose batches arrive in step order for any number
of workers. `MixtureLoader` is the faster way to use workers: it moves several steps at once in the
shards' narrow type, and it knows the cursor of what was delivered, so its `state_dict` is exact.
"""

from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from mixer.data.reader import Batch, SpareArrays, WindowReader

TensorBatch = dict[str, Any]


class MixtureDataset(IterableDataset[TensorBatch]):
    """Yields dictionaries: `tokens` (rows, row_tokens) int64, `domain_index`, `row`, `length` by row, `starts`
    with `starts_offsets` (where documents start), `window` and `step`. State: the cursor of the reader.

    In loader workers the state stays with the workers; use `MixtureLoader`, or note `window` and `step`.
    """

    def __init__(self, reader: WindowReader) -> None:
        self.reader = reader

    def __iter__(self) -> Iterator[TensorBatch]:
        info = get_worker_info()
        workers, worker = (info.num_workers, info.id) if info else (1, 0)
        return map(to_tensors, self.reader.every(workers, worker))

    def state_dict(self) -> dict[str, int]:
        return self.reader.state_dict()

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.reader.load_state_dict(state)


class MixtureLoader:
    """Iterates like its dataset, with loader workers reading ahead; resumes where `load_state_dict` says."""

    def __init__(
        self, reader: WindowReader, *, num_workers: int = 0, run_steps: int = 16, prefetch_factor: int = 2
    ) -> None:
        self.reader = reader
        self._num_workers = num_workers
        self._run_steps = run_steps
        self._prefetch_factor = prefetch_factor

    def state_dict(self) -> dict[str, int]:
        """Where to go on after the last batch that was delivered."""
        return self.reader.state_dict()

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.reader.load_state_dict(state)

    def __iter__(self) -> Iterator[TensorBatch]:
        if self._num_workers == 0:
            yield from map(to_tensors, self.reader)
            return
        runs: DataLoader[Any] = DataLoader(
            _Runs(self.reader.narrowed(), self._run_steps),
            batch_size=None,
            num_workers=self._num_workers,
            prefetch_factor=self._prefetch_factor,
        )
        spare = SpareArrays(np.dtype(np.int64))
        for narrow, batches in runs:
            begin = 0
            for batch in batches:
                rows = narrow.numpy()[begin : begin + len(batch.length)]
                begin += len(rows)
                tokens = spare.take(*rows.shape)
                tokens[...] = rows
                self.reader.cursor = batch.cursor(self.reader.geometry)
                yield to_tensors(replace(batch, tokens=tokens))


class _Runs(IterableDataset[tuple[NDArray[Any], list[Batch]]]):
    """What a loader worker sends: the narrow tokens of a run of steps in one array, and all else of its batches."""

    def __init__(self, reader: WindowReader, run_steps: int) -> None:
        self._reader = reader
        self._run_steps = run_steps

    def __iter__(self) -> Iterator[tuple[NDArray[Any], list[Batch]]]:
        info = get_worker_info()
        assert info is not None, "runs are read by loader workers only"
        batches = self._reader.every(info.num_workers, info.id, self._run_steps)
        while run := list(islice(batches, self._run_steps)):
            tokens = np.concatenate([batch.tokens for batch in run])
            yield tokens, [replace(batch, tokens=tokens[:0]) for batch in run]


def to_tensors(batch: Batch) -> TensorBatch:
    """A batch as tensors that share its memory."""
    return {
        "tokens": torch.from_numpy(batch.tokens),
        "domain_index": torch.from_numpy(batch.domain_index),
        "row": torch.from_numpy(batch.row),
        "length": torch.from_numpy(batch.length),
        "starts": torch.from_numpy(batch.starts),
        "starts_offsets": torch.from_numpy(batch.starts_offsets),
        "window": batch.window,
        "step": batch.step,
    }
