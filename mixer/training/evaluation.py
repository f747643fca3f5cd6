"""Loss of a model on text that it is not trained on: the validation and the target corpora.

Each domain of such a corpus is a set, "validation/code" or "target/code_new". A set's rows are chosen once, by
the seed and the set's name: evenly spread over the domain, one at a random place in each of `rows` equal
stretches; all of them where there are fewer. The run's seed, mixture and progress have no say, so two runs and two
moments of a run are measured on the same rows.

Rows form the same batches for any number of ranks, and ranks take whole batches. So each row's loss is computed
alike however many ranks there are, and as losses lie on the grid of `mixer.core.signal`, the sums are too:
exactly, where the device computes a batch twice alike. All ranks call the model equally often, with batches of
one shape (filled up with rows that have no targets), as sharded and compiled models need. Nothing here talks to
other ranks: who calls adds up the sums of `measure`, in one all-reduce, and gives them to `close`.

A set's `loss` is the mean over its targets, which are those of training: by default no document's first token is
one. `bits_per_byte` is the same sum of losses in bits, over the bytes of text that these targets stand for; the
EOS has a loss and no bytes. It is None where the tokenizer does not tell bytes (`mixer.data.vocabulary`). Where a
row's loss is not finite or absurd (`mixer.training.step`), its set has no loss at all: the mean of what is left
would look better than the model is. `bad_rows` then says how many there were.
"""

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow.fs as pafs
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mixer.core.errors import ConfigError, DataError
from mixer.core.permute import key_of, mix
from mixer.core.plan import Geometry, WindowPlan
from mixer.core.signal import GRID
from mixer.data.corpus import Corpus
from mixer.data.manifest import MANIFEST, Manifest
from mixer.data.reader import Batch
from mixer.data.vocabulary import bytes_of_corpus
from mixer.data.window import RankRows, locate
from mixer.training.model import IGNORED, Documents, TokenLosses
from mixer.training.step import DomainLosses, StepRows

Precision = Literal["float32", "bfloat16"]
SETS: Mapping[str, str] = {"validation": "validation", "targets": "target"}  # corpus -> first part of its sets' names
LOSS, TOKENS, ROWS, BAD_ROWS, BYTES = range(5)  # the lines of the sums

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationOptions:
    """When a run is evaluated, and on how much."""

    every_windows: int | None = 16  # None: never
    rows: int | None = 256  # of a set; None: all
    batch_rows: int = 16  # of a rank, computed at once
    sets: tuple[str, ...] = ("validation", "targets")  # corpora beside the one that is trained
    at_start: bool = True  # also before the first step
    seed: int = 0  # of the choice of rows

    def __post_init__(self) -> None:
        for name in ("every_windows", "rows", "batch_rows"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ConfigError(
                    f"{name}={value}; it must be at least 1{'' if name == 'batch_rows' else ', or null'}."
                )
        unknown = [name for name in self.sets if name not in SETS]
        if unknown or len(set(self.sets)) < len(self.sets):
            raise ConfigError(f"sets={list(self.sets)}; needed different ones of {', '.join(SETS)}.")


@contextmanager
def evaluating(model: nn.Module, device: torch.device | str, precision: Precision) -> Iterator[None]:
    """Without dropout, gradients or any trace: modes and random states are afterwards as they were."""
    device = torch.device(device)
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        with (
            torch.no_grad(),
            torch.random.fork_rng([device] if device.type == "cuda" else []),
            torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"),
        ):
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def corpora_beside(train: Corpus, sets: Sequence[str]) -> dict[str, Corpus]:
    """Those of the corpora that lie in the folder of the trained one; a line in the log for each that does not."""
    folder = train.root.rpartition("/")[0]
    corpora: dict[str, Corpus] = {}
    for name in sets:
        root = f"{folder}/{name}"
        if train.filesystem.get_file_info(f"{root}/{MANIFEST}").type == pafs.FileType.NotFound:
            log.warning("there is no corpus %s: nothing is evaluated on %s", root, name)
        else:
            corpora[name] = Corpus.open(root, filesystem=train.filesystem, drop_empty=True)
    return corpora


def choose_rows(num_rows: int, most: int | None, key: int) -> NDArray[np.int64]:
    """Row numbers in order: one of each of `most` equal stretches, at a place that the key decides."""
    num = num_rows if most is None else min(most, num_rows)
    begin_n = np.arange(num + 1, dtype=np.int64) * num_rows // max(1, num)
    random_n = mix(np.full(num, key, dtype=np.uint64), np.arange(num, dtype=np.int64))
    return begin_n[:-1] + (random_n % np.diff(begin_n).astype(np.uint64)).astype(np.int64)


class _Rows(NamedTuple):
    """Rows of one corpus that are computed at once."""

    corpus: str
    set_n: NDArray[np.int64]  # which set
    domain_n: NDArray[np.int64]
    row_n: NDArray[np.int64]


class Evaluator:
    """Measures models on fixed rows of corpora, by set. `like` is the manifest of the corpus that is trained."""

    def __init__(
        self,
        corpora: Mapping[str, Corpus],
        options: EvaluationOptions | None = None,
        *,
        like: Manifest | None = None,
        cross_document_targets: bool = False,
    ) -> None:
        self.options = options or EvaluationOptions()
        self.corpora = {name: corpora[name] for name in self.options.sets if name in corpora}
        self._cross_document_targets = cross_document_targets
        self._kept: dict[int, RankRows] = {}  # of batches that came from an object store
        for corpus in self.corpora.values():
            like = like or corpus.manifest
            refuse_other(like, corpus)
        self._row_tokens = like.layout.row_tokens if like else 0
        first = next(iter(self.corpora.values()), None)
        self._bytes_v = None if first is None else bytes_of_corpus(first)
        self.sets: tuple[str, ...] = ()
        self._batches: list[_Rows] = []
        for name, corpus in self.corpora.items():
            self._add(name, corpus)

    @classmethod
    def beside(
        cls, train: Corpus, options: EvaluationOptions | None = None, *, cross_document_targets: bool = False
    ) -> "Evaluator":
        """On the corpora that were prepared together with the one that is trained, as far as they exist."""
        options = options or EvaluationOptions()
        corpora = corpora_beside(train, options.sets)
        return cls(corpora, options, like=train.manifest, cross_document_targets=cross_document_targets)

    def _add(self, name: str, corpus: Corpus) -> None:
        catalog = corpus.catalog
        labels = [f"{SETS[name]}/{domain}" for domain in catalog.names]
        chosen = [
            choose_rows(int(num_rows), self.options.rows, key_of("evaluation", self.options.seed, label))
            for label, num_rows in zip(labels, catalog.num_rows_d, strict=True)
        ]
        domain_n = np.repeat(np.arange(len(labels)), [len(rows) for rows in chosen])
        row_n = np.concatenate(chosen)
        for first in range(0, len(row_n), self.options.batch_rows):
            part = slice(first, first + self.options.batch_rows)
            self._batches.append(_Rows(name, domain_n[part] + len(self.sets), domain_n[part], row_n[part]))
        self.sets += tuple(labels)

    @property
    def num_rows(self) -> int:
        return sum(len(batch.row_n) for batch in self._batches)

    # ---- measuring -----------------------------------------------------------------------------

    def measure(
        self,
        model: nn.Module,
        *,
        rank: int = 0,
        world_size: int = 1,
        device: torch.device | str = "cpu",
        precision: Precision = "float32",
        on_rows: Callable[[int], None] = lambda done: None,
    ) -> Tensor:
        """This rank's sums, int64, (5, sets): losses in grid points, tokens, rows, bad rows, bytes.

        `on_rows` is told how many of `num_rows` all ranks have done.
        """
        if not 0 <= rank < world_size:
            raise ConfigError(f"rank {rank} of {world_size}; it must be 0 to {world_size - 1}.")
        losses = DomainLosses(len(self.sets), device)
        bytes_d = torch.zeros(1, len(self.sets), dtype=torch.int64, device=device)
        with evaluating(model, device, precision):
            for first in range(0, len(self._batches), world_size):
                rows = self._read(first + rank) if first + rank < len(self._batches) else self._nothing()
                bytes_b = self._bytes(rows.target_bs).to(device)
                num_rows = len(rows.domain_b)
                rows = _fill(rows, self.options.batch_rows).to(device)
                out: TokenLosses = model(rows.tokens_bs, rows.documents, rows.target_bs)
                loss_b = out.loss_bs.double().sum(1)[:num_rows]
                bad = losses.add(rows, loss_b, (rows.target_bs >= 0).sum(1)[:num_rows])
                bytes_d[0].index_add_(0, rows.domain_b, bytes_b * ~bad)
                on_rows(min((first + world_size) * self.options.batch_rows, self.num_rows))
        return torch.cat([losses.sums, bytes_d])

    def close(self, sums: Tensor) -> dict[str, dict[str, Any]]:
        """What was measured, by set, of sums that were added up over the ranks."""
        values = sums.cpu().numpy()
        if values.shape != (5, len(self.sets)):
            raise ConfigError(f"sums of shape {values.shape}; needed {(5, len(self.sets))}. Give what measure gives.")
        return {name: self._close(values[:, number].tolist()) for number, name in enumerate(self.sets)}

    def _close(self, sums: list[int]) -> dict[str, Any]:
        nats, sound = sums[LOSS] / GRID, sums[TOKENS] > 0 and not sums[BAD_ROWS]
        has_bytes = sound and self._bytes_v is not None and sums[BYTES] > 0
        result: dict[str, Any] = {
            "loss": nats / sums[TOKENS] if sound else None,
            "bits_per_byte": nats / math.log(2) / sums[BYTES] if has_bytes else None,
            "tokens": sums[TOKENS],
        }
        return result | ({"bad_rows": sums[BAD_ROWS]} if sums[BAD_ROWS] else {})

    # ---- rows ----------------------------------------------------------------------------------

    def _read(self, number: int) -> StepRows:
        batch = self._batches[number]
        rows = self._kept.get(number) or self._locate(number)
        found = Batch(
            window=0,
            step=0,
            tokens=rows.copy_tokens(np.arange(len(batch.row_n))).astype(np.int64),
            domain_index=batch.set_n,
            row=batch.row_n,
            length=rows.length_n,
            starts=rows.starts,
            starts_offsets=rows.starts_offsets,
        )
        return StepRows.of(found, cross_document_targets=self._cross_document_targets)

    def _locate(self, number: int) -> RankRows:
        batch = self._batches[number]
        corpus = self.corpora[batch.corpus]
        geometry = Geometry(window_steps=1, batch_rows=len(batch.row_n))
        domain_n = batch.domain_n.astype(np.int32)
        plan = WindowPlan(0, corpus.catalog, geometry, domain_n, batch.row_n, np.zeros_like(batch.row_n))
        rows = locate([plan], corpus.by_source, 0, 1)
        if not corpus.by_source.is_mapped:  # what was fetched once is fetched for good
            self._kept[number] = rows
        return rows

    def _nothing(self) -> StepRows:
        flat = torch.zeros(0, self._row_tokens, dtype=torch.int64)
        none = torch.zeros(0, dtype=torch.int64)
        return StepRows(flat, flat, Documents(flat.int(), flat), none, none, 0, 0)

    def _bytes(self, target_bs: Tensor) -> Tensor:
        if self._bytes_v is None:
            return torch.zeros(len(target_bs), dtype=torch.int64)
        table = torch.from_numpy(self._bytes_v)
        return torch.where(target_bs >= 0, table[target_bs.clamp_min(0)], 0).sum(1)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_kept": {}}


def refuse_other(like: Manifest, corpus: Corpus) -> None:
    """Refuse a corpus that the model of another one cannot be measured on."""
    found = corpus.manifest
    if found.tokenizer != like.tokenizer:
        raise DataError(
            f"{corpus.root} was made with tokenizer {found.tokenizer} (EOS {found.tokenizer.eos}); training has "
            f"{like.tokenizer} (EOS {like.tokenizer.eos}). Prepare both in one run of mixer prepare."
        )
    if found.layout.row_tokens != like.layout.row_tokens:
        raise DataError(
            f"{corpus.root} has rows of {found.layout.row_tokens} tokens; training has {like.layout.row_tokens}. "
            "Prepare both in one run of mixer prepare."
        )


def _fill(rows: StepRows, num_rows: int) -> StepRows:
    """So many rows, the last of them without text or targets; the others keep their domains."""
    missing, size = num_rows - len(rows.tokens_bs), rows.tokens_bs.shape[1]
    zeros = torch.zeros(missing, size, dtype=torch.int64)
    position = torch.arange(size).expand(missing, size)
    return rows._replace(
        tokens_bs=torch.cat([rows.tokens_bs, zeros]),
        target_bs=torch.cat([rows.target_bs, torch.full_like(zeros, IGNORED)]),
        documents=Documents(
            torch.cat([rows.documents.document_bs, zeros.int()]), torch.cat([rows.documents.position_bs, position])
        ),
    )
