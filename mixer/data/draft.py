"""One domain of one corpus between the two halves of preparation: all its pieces, in their order.

Once every unit is counted, a row's place is arithmetic; here that arithmetic becomes jobs.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from mixer.core.errors import DataError
from mixer.data.assembly import Span, UnitPiece
from mixer.data.manifest import DomainInfo, FileInfo
from mixer.data.packing import cut_shards, num_rows_of, pieces_between
from mixer.data.shards import ShardInfo
from mixer.data.sources import SourceFile, SourceOptions
from mixer.data.staging import TRAIN, Group, Staged, Unit

MAX_GROUPS = 100_000  # each pads one row; more means that the key was not meant to group


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """One domain of the config with its files, cut into units."""

    corpus: str  # train or targets
    name: str
    options: SourceOptions
    files: tuple[SourceFile, ...]
    units: tuple[Unit, ...]  # keyed without the tokenizer; see `_with_tokenizer`
    key: str = ""  # of all that its part of a corpus depends on

    @property
    def label(self) -> str:
        return f"{self.corpus}/{self.name}"


class Draft:
    """One domain of one corpus while it is put together: the pieces of all units, by group."""

    def __init__(self, source: Source, side: int, staged: Mapping[str, Staged], row_tokens: int) -> None:
        self.source = source
        self.corpus = source.corpus if side == TRAIN else "validation"
        self.row_tokens = row_tokens
        self.skipped: Counter[str] = Counter()
        pieces: dict[Group, list[UnitPiece]] = {}
        for unit in source.units:
            one = staged[unit.key]
            for piece in one.pieces:
                if piece.side == side:
                    pieces.setdefault(piece.group, []).append((unit.key, piece))
            if side == TRAIN:
                self.skipped.update(one.skipped)
        if len(pieces) > MAX_GROUPS:
            raise DataError(
                f"domain {source.name!r} has {len(pieces)} groups; at most {MAX_GROUPS} are allowed, as each "
                "pads a row. Group by a key with fewer values."
            )
        self.pieces = dict(sorted(pieces.items()))
        self.tokens_g = np.array(
            [sum(p.num_tokens for _, p in of_group) for of_group in self.pieces.values()], np.int64
        )
        self.rows_g = num_rows_of(self.tokens_g, row_tokens)
        self.num_documents = sum(p.num_documents for _, p in self.all_pieces())
        self.parts = self._parts(staged)

    def all_pieces(self) -> Iterator[UnitPiece]:
        for of_group in self.pieces.values():
            yield from of_group

    def spans(self, shard_rows: int) -> list[tuple[Span, ...]]:
        """Per shard, which tokens of which pieces its rows are."""
        groups = list(self.pieces.items())
        ends = [np.cumsum([piece.num_tokens for _, piece in of_group]) for _, of_group in groups]
        documents = np.array([piece.num_documents for _, piece in self.all_pieces()], np.int64)
        first_document = np.concatenate([[0], np.cumsum(documents)])
        first_piece = np.concatenate([[0], np.cumsum([len(of_group) for _, of_group in groups])])
        shards: list[tuple[Span, ...]] = []
        for row_spans in cut_shards(self.rows_g, shard_rows):
            spans: list[Span] = []
            for one in row_spans:
                group, of_group = groups[one.group]
                start = one.start * self.row_tokens
                stop = min(one.stop * self.row_tokens, int(self.tokens_g[one.group]))
                first, last = pieces_between(ends[one.group], start, stop)
                before = int(ends[one.group][first - 1]) if first else 0
                spans.append(
                    Span(
                        group=group,
                        pieces=tuple(of_group[first:last]),
                        skip=start - before,
                        num_tokens=stop - start,
                        first_document=int(first_document[first_piece[one.group] + first]),
                    )
                )
            shards.append(tuple(spans))
        return shards

    def entry(self, shards: tuple[ShardInfo, ...], documents_file: FileInfo) -> DomainInfo:
        rows, tokens = int(self.rows_g.sum()), int(self.tokens_g.sum())
        return DomainInfo(
            rows=rows,
            documents=self.num_documents,
            tokens=tokens,
            padding=rows * self.row_tokens - tokens,
            skipped=dict(self.skipped),
            sources=tuple(file.shown for file in self.source.files),
            shards=shards,
            documents_file=documents_file,
        )

    def _parts(self, staged: Mapping[str, Staged]) -> dict[str, tuple[tuple[int, int], ...]]:
        """Per unit and part: the number of its file, and which record of the file it begins with."""
        passed: Counter[int] = Counter()
        parts: dict[str, tuple[tuple[int, int], ...]] = {}
        for unit in self.source.units:
            of_unit: list[tuple[int, int]] = []
            for part, num_records in zip(unit.parts, staged[unit.key].num_records, strict=True):
                file = part.slice.file
                of_unit.append((file, passed[file]))
                passed[file] += num_records
            parts[unit.key] = tuple(of_unit)
        return parts
