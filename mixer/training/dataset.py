"""The reader as PyTorch knows it: for HF Trainer, Lightning, torchtitan or a loop of one's own.

`MixtureDataset` is an `IterableDataset` that yields one rank's steps; it works under a plain
`DataLoader(dataset, batch_size=None, num_workers=0..n)`, whose batches arrive in step order for any number
of workers. `MixtureLoader` is the faster way to use workers: it moves several steps at once in the
shards' narrow type, and it knows the cursor of what was delivered, so its `state_dict` is exact.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from mixer.data.reader import ArrayForm, Batch, SpareArrays, WindowReader

TensorBatch = dict[str, Any]
RUN_BYTES = 4 << 20  # of narrow tokens that a loader worker sends at once
MOST_RUN_STEPS = 64


def _unbind(stack: NDArray[Any]) -> tuple[torch.Tensor, ...]:
    return torch.from_numpy(stack).unbind()


TENSORS = ArrayForm(split=_unbind, one=torch.from_numpy)


class MixtureDataset(IterableDataset[TensorBatch]):
    """Yields dictionaries: `tokens` (rows, row_tokens) int64, `domain_index`, `row`, `length` by row, `starts`
    with `starts_offsets` (where documents start), `window` and `step`. State: the cursor of the reader.

    In loader workers the state stays with the workers; use `MixtureLoader`, or note `window` and `step`.
    """

    def __init__(self, reader: WindowReader) -> None:
        self.reader = reader.reading(form=TENSORS)

    def __iter__(self) -> Iterator[TensorBatch]:
        info = get_worker_info()
        workers, worker = (info.num_workers, info.id) if info else (1, 0)
        return map(Batch._asdict, self.reader.every(workers, worker))

    def state_dict(self) -> dict[str, int]:
        return self.reader.state_dict()

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.reader.load_state_dict(state)


class MixtureLoader:
    """Iterates like its dataset, with loader workers reading ahead; resumes where `load_state_dict` says."""

    def __init__(
        self, reader: WindowReader, *, num_workers: int = 0, run_steps: int | None = None, prefetch_factor: int = 2
    ) -> None:
        self.reader = reader.reading(form=TENSORS)
        self._num_workers = num_workers
        self._run_steps = run_steps or max(1, min(MOST_RUN_STEPS, RUN_BYTES // reader.step_bytes))
        self._prefetch_factor = prefetch_factor

    def state_dict(self) -> dict[str, int]:
        """Where to go on after the last batch that was delivered."""
        return self.reader.state_dict()

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.reader.load_state_dict(state)

    def __iter__(self) -> Iterator[TensorBatch]:
        if self._num_workers == 0:
            return map(Batch._asdict, self.reader)
        return self._from_workers()

    def _from_workers(self) -> Iterator[TensorBatch]:
        runs: DataLoader[Any] = DataLoader(
            _Runs(self.reader.reading(widen=False, form=ArrayForm()), self._run_steps),
            batch_size=None,
            num_workers=self._num_workers,
            prefetch_factor=self._prefetch_factor,
        )
        spare = SpareArrays(np.dtype(np.int64))
        for tokens, rest in runs:
            narrow = tokens.numpy()
            begin = 0
            for batch in rest.batches:
                rows = narrow[begin : begin + len(batch.length)]
                begin += len(rows)
                wide = spare.take(*rows.shape)
                wide[...] = rows
                self.reader.cursor = batch.cursor(self.reader.geometry)
                yield Batch(batch.window, batch.step, *map(torch.from_numpy, (wide, *batch[3:])))._asdict()


@dataclass(frozen=True, slots=True)
class _Rest:
    """All of a run's batches but the tokens. Not a type that loaders look into, so it travels as it is."""

    batches: list[Batch]


class _Runs(IterableDataset[tuple[NDArray[Any], _Rest]]):
    """What a loader worker sends: the narrow tokens of a run of steps in one array, and the rest."""

    def __init__(self, reader: WindowReader, run_steps: int) -> None:
        self._reader = reader
        self._run_steps = run_steps

    def __iter__(self) -> Iterator[tuple[NDArray[Any], _Rest]]:
        info = get_worker_info()
        assert info is not None, "runs are read by loader workers only"
        batches = self._reader.every(info.num_workers, info.id, self._run_steps)
        while run := list(islice(batches, self._run_steps)):
            tokens = np.concatenate([batch.tokens for batch in run])
            yield tokens, _Rest([batch._replace(tokens=None) for batch in run])
