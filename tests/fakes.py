"""Small real things for tests: a corpus whose tokens say which row of which domain they are."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs

from mixer.core.row import ScheduleRow
from mixer.core.schedule import MixtureSchedule
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
from mixer.data.shards import METADATA_TYPES, Layout, Rows

FAKE_VOCAB = 1 << 20
FAKE_EOS = FAKE_VOCAB - 1
FAKE_MAX_ROWS = 1 << 12  # tokens hold the domain's number above these bits and the row's number in them


def fake_token(domain: int, row: int) -> int:
    """The value of every text token of a row: its domain (place among all names) and its row, in one."""
    return domain * FAKE_MAX_ROWS + row


def make_corpus(
    path: Path | str,
    num_rows: Mapping[str, int],
    *,
    row_tokens: int = 16,
    seed: int = 0,
    shard_rows: int = 64,
    metadata: Mapping[str, Mapping[str, Sequence[object]]] | None = None,
    filesystem: pafs.FileSystem | None = None,
) -> Corpus:
    """Write a real corpus of `num_rows[domain]` rows each, and open it.

    Token 0 .. length-1 of row r of domain d is `fake_token(d, r)` except at the ends of documents, where
    it is EOS (never token 0); then padding. `metadata[key][domain]` lists a value per row. At most 4,096 rows
    and 255 domains.
    """
    filesystem = filesystem or pafs.LocalFileSystem()
    root = str(path)
    metadata = metadata or {}
    kinds = {key: _kind(columns) for key, columns in metadata.items()}
    layout = Layout(row_tokens=row_tokens, dtype="uint32", metadata=kinds)
    domains: dict[str, DomainInfo] = {}
    for number, name in enumerate(sorted(num_rows)):
        assert num_rows[name] <= FAKE_MAX_ROWS
        rng = np.random.default_rng([seed, number])
        columns = {
            key: pa.array(metadata[key][name], METADATA_TYPES[kind]) if num_rows[name] else None
            for key, kind in kinds.items()
        }
        domains[name] = _write_domain(
            filesystem, root, name, number, num_rows[name], row_tokens, shard_rows, columns, rng
        )
    tokenizer = TokenizerInfo(kind="byte", identity="fa" * 8, vocab_size=FAKE_VOCAB, eos=FAKE_EOS)
    write_manifest(filesystem, root, Manifest(layout=layout, tokenizer=tokenizer, domains=domains))
    return Corpus.open(root, filesystem=filesystem, drop_empty=True)


def _write_domain(
    filesystem: pafs.FileSystem,
    root: str,
    name: str,
    number: int,
    num_rows: int,
    row_tokens: int,
    shard_rows: int,
    columns: Mapping[str, pa.Array],
    rng: np.random.Generator,
) -> DomainInfo:
    if num_rows == 0:
        return DomainInfo(rows=0, documents=0, tokens=0, padding=0)
    tokens, length, starts, first_document, document_tokens = _pack(number, num_rows, row_tokens, rng)
    infos = []
    for first in range(0, num_rows, shard_rows):
        part = slice(first, min(first + shard_rows, num_rows))
        rows = Rows(
            tokens=tokens[part],
            length=length[part],
            starts=pa.array(starts[part], pa.list_(pa.int32())),
            first_document=first_document[part],
            metadata={key: column[part.start : part.stop] for key, column in columns.items()},
        )
        infos.append(shards.write(filesystem, root, shard_path(name, len(infos)), rows))
    num_documents = len(document_tokens)
    record = np.arange(num_documents) // 2
    file = np.arange(num_documents) % 2
    listed = documents.write(
        filesystem, root, documents_path(name), file=file, record=record, tokens=np.array(document_tokens)
    )
    return DomainInfo(
        rows=num_rows,
        documents=num_documents,
        tokens=int(length.sum()),
        padding=int(num_rows * row_tokens - length.sum()),
        sources=(f"{name}/a.jsonl", f"{name}/b.jsonl"),
        shards=tuple(infos),
        documents_file=listed,
    )


def _pack(
    number: int, num_rows: int, row_tokens: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, list[list[int]], np.ndarray, list[int]]:
    """Documents of random lengths laid end to end over the rows; some rows are cut short and padded."""
    tokens = np.full((num_rows, row_tokens), FAKE_EOS, np.uint32)
    length = np.full(num_rows, row_tokens, np.int32)
    first_document = np.zeros(num_rows, np.int64)
    starts: list[list[int]] = [[] for _ in range(num_rows)]
    document_tokens: list[int] = []
    left = 0  # tokens of the last document still to be written
    for row in range(num_rows):
        ends_short = row == num_rows - 1 or rng.random() < 0.1  # the last document of the row ends with it
        place = 0
        first_document[row] = len(document_tokens) - (left > 0)
        limit = row_tokens if not ends_short else int(rng.integers(2, row_tokens + 1))
        while place < limit:
            if left == 0:
                left = int(rng.integers(2, 2 * row_tokens))
                document_tokens.append(left)
                starts[row].append(place)
            if ends_short and left > limit - place:
                document_tokens[-1] -= left - (limit - place)
                left = limit - place
            taken = min(left, limit - place)
            tokens[row, place : place + taken] = fake_token(number, row)
            place += taken
            left -= taken
            if left == 1:  # so that no row begins with an EOS
                left += 1
                document_tokens[-1] += 1
            if left == 0:
                tokens[row, place - 1] = FAKE_EOS
        length[row] = place
    return tokens, length, starts, first_document, document_tokens


def _kind(columns: Mapping[str, Sequence[object]]) -> str:
    types = {type(value) for values in columns.values() for value in values if value is not None}
    return {str: "string", int: "int64", float: "float64"}[next(iter(types))] if types else "string"


class ShownRows:
    """A schedule of which only the first rows are shown, and the windows that were asked for; to be a Ray actor."""

    def __init__(self, schedule: MixtureSchedule, shown: int) -> None:
        self._schedule = schedule
        self._shown = shown
        self._asked: list[int] = []
        self._ahead = 0

    def row(self, window: int) -> ScheduleRow | None:
        if window not in self._asked:
            self._asked.append(window)
        self._ahead = max(self._ahead, window - self._shown)
        return self._schedule.row(window) if window < self._shown else None

    def show(self, rows: int) -> None:
        self._shown = rows

    def asked(self) -> list[int]:
        return self._asked

    def most_ahead(self) -> int:
        """How far a window that was asked for ever lay beyond the first that was not shown."""
        return self._ahead


class ActorFeed:
    """A feed whose rows an actor has; asks until it gets one."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    def row(self, window: int) -> ScheduleRow:
        import ray

        row: Any = None
        while row is None:
            row = ray.get(self._actor.row.remote(window))
            time.sleep(0.005 if row is None else 0)
        return row


def stream_processes(root: int) -> list[str]:
    """The processes below `root` that work for a stream through Ray Data, by name."""
    parents, names = {}, {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                names[int(entry.name)] = (entry / "cmdline").read_bytes().split(b"\0")[0].decode()
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
    found = []
    for number, name in names.items():
        above = number
        while above not in (0, root):
            above = parents.get(above, 0)
        if above and name.startswith(("ray::SplitCoordinator", "ray::ReadWindows")):
            found.append(name)
    return found
