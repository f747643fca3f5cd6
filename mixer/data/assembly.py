"""The second half of preparation: staged tokens -> shards and documents files.

A shard's rows are known before any of them is read: the token counts of all pieces say where each
row's tokens lie. So every task makes one shard from ranges of the staging, and no task depends on
another one.
"""

import itertools
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs

from mixer.data import shards
from mixer.data.documents import SCHEMA as DOCUMENTS_SCHEMA
from mixer.data.manifest import FileInfo
from mixer.data.packing import RowDocuments, place_documents, reduce_over_rows
from mixer.data.shards import Layout, Rows, ShardInfo
from mixer.data.staging import Group, Piece, Sink, StagedFiles, key_of, size_and_sha256
from mixer.data.storage import Storage, put

DOCUMENTS_BATCH = 1 << 16

UnitPiece = tuple[str, Piece]  # the unit's key, and a piece of its staging


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """Neighbouring rows of one group: `num_tokens` tokens, from token `skip` of the first piece on."""

    group: Group
    pieces: tuple[UnitPiece, ...]
    skip: int
    num_tokens: int
    first_document: int  # number, within the domain, of the first piece's first document


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardJob:
    """All that one shard is made of."""

    storage: Storage
    root: str  # of the corpus
    staging: str
    path: str
    layout: Layout
    eos: int
    group_keys: tuple[str, ...]
    reductions: tuple[tuple[str, str], ...]  # key, how; in the order of the staging's value columns
    spans: tuple[Span, ...]

    @property
    def key(self) -> str:
        return key_of(
            [
                self.path,
                self.eos,
                self.group_keys,
                self.reductions,
                asdict(self)["spans"],
                self.layout.row_tokens,
                self.layout.dtype,
                dict(self.layout.metadata),
            ]
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class DocumentsJob:
    """All documents of a domain, in their order, with the source file and first record of every part."""

    storage: Storage
    root: str
    staging: str
    path: str
    dtype: str
    pieces: tuple[UnitPiece, ...]
    parts: dict[str, tuple[tuple[int, int], ...]]  # unit key -> per part: file number, record it begins with


def write_shard(job: ShardJob) -> ShardInfo:
    """Assemble and write a shard, or find that an earlier run did and that it is whole."""
    filesystem, root = job.storage.locate(job.root)
    staging_filesystem, staging = job.storage.locate(job.staging)
    note = f"shard-{job.key}.json"
    found = _find_shard(staging_filesystem, f"{staging}/{note}", filesystem, root)
    if found is not None:
        return found
    rows = assemble(job, StagedFiles(staging_filesystem, staging, job.layout.dtype))
    info = shards.write(filesystem, root, job.path, rows)
    put(staging_filesystem, staging, note, json.dumps(asdict(info)).encode())
    return info


def _find_shard(
    staging_filesystem: pafs.FileSystem, note: str, filesystem: pafs.FileSystem, root: str
) -> ShardInfo | None:
    try:
        with staging_filesystem.open_input_stream(note, compression=None) as stream:
            info = ShardInfo(**json.loads(stream.read().decode()))
        whole = size_and_sha256(filesystem, f"{root}/{info.path}") == (info.bytes, info.sha256)
    except (OSError, ValueError, TypeError):
        return None
    return info if whole else None


def assemble(job: ShardJob, staged: StagedFiles) -> Rows:
    row_tokens = job.layout.row_tokens
    rows_s = [-(-span.num_tokens // row_tokens) for span in job.spans]
    tokens = np.empty((sum(rows_s), row_tokens), np.dtype(job.layout.dtype))
    placed: list[RowDocuments] = []
    values: dict[str, list[Any]] = {key: [] for key, _ in job.reductions}
    row = 0
    for span, num_rows in zip(job.spans, rows_s, strict=True):
        flat = tokens[row : row + num_rows].reshape(-1)
        flat[span.num_tokens :] = job.eos
        done, skip = 0, span.skip
        for key, piece in span.pieces:
            count = min(piece.num_tokens - skip, span.num_tokens - done)
            flat[done : done + count] = staged.tokens(key, piece.first_token + skip, count)
            done, skip = done + count, 0
        assert done == span.num_tokens, f"{done} of {span.num_tokens} tokens"
        documents = [staged.documents(key, piece) for key, piece in span.pieces]
        length = np.concatenate([one.column("tokens").to_numpy() for one in documents])
        one = place_documents(length, span.skip, span.num_tokens, row_tokens)
        one.first_document[:] += span.first_document
        placed.append(one)
        for number, (key, how) in enumerate(job.reductions):
            value = np.concatenate([one.column(f"value_{number}").to_numpy() for one in documents])
            values[key].append(reduce_over_rows(value, length, span.skip, span.num_tokens, row_tokens, how))
        row += num_rows
    metadata = {key: pa.array(np.concatenate(parts)) for key, parts in values.items()}
    for place, key in enumerate(job.group_keys):
        per_row = itertools.chain.from_iterable(
            itertools.repeat(span.group[place], count) for span, count in zip(job.spans, rows_s, strict=True)
        )
        metadata[key] = pa.array(per_row, shards.METADATA_TYPES[job.layout.metadata[key]])
    before = np.cumsum([0, *(len(one.starts) for one in placed)])
    offset = [one.offset[:-1] + start for one, start in zip(placed, before[:-1], strict=True)]
    return Rows(
        tokens=tokens,
        length=np.concatenate([one.length for one in placed]),
        starts=pa.ListArray.from_arrays(
            pa.array(np.append(np.concatenate(offset), before[-1]).astype(np.int32)),
            pa.array(np.concatenate([one.starts for one in placed])),
        ),
        first_document=np.concatenate([one.first_document for one in placed]),
        metadata=metadata,
    )


def write_documents(job: DocumentsJob) -> FileInfo:
    """Write a domain's documents file, some ten thousand documents at a time."""
    filesystem, root = job.storage.locate(job.root)
    staged = StagedFiles(*job.storage.locate(job.staging), job.dtype)
    with (
        Sink(filesystem, f"{root}/{job.path}") as sink,
        pa.ipc.new_file(pa.PythonFile(sink.as_stream(), mode="w"), DOCUMENTS_SCHEMA) as writer,
    ):
        for batch in _in_batches(_document_columns(job, staged)):
            writer.write_batch(batch)
    return FileInfo(path=job.path, bytes=sink.size, sha256=sink.sha256)


def _document_columns(job: DocumentsJob, staged: StagedFiles) -> Iterator[pa.RecordBatch]:
    for key, piece in job.pieces:
        found = staged.documents(key, piece)
        file_and_record = np.array(job.parts[key], np.int64)[found.column("part").to_numpy()]
        yield pa.record_batch(
            [
                pa.array(file_and_record[:, 0].astype(np.int32)),
                pa.array(file_and_record[:, 1] + found.column("record").to_numpy()),
                found.column("tokens"),
            ],
            schema=DOCUMENTS_SCHEMA,
        )


def _in_batches(parts: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """The same rows in batches of one size, whatever the sizes they come in."""
    waiting: list[pa.RecordBatch] = []
    num_waiting = 0
    for part in parts:
        waiting.append(part)
        num_waiting += part.num_rows
        if num_waiting >= DOCUMENTS_BATCH:
            whole = pa.Table.from_batches(waiting).combine_chunks().to_batches()[0]
            cut = num_waiting - num_waiting % DOCUMENTS_BATCH
            for start in range(0, cut, DOCUMENTS_BATCH):
                yield whole.slice(start, DOCUMENTS_BATCH)
            waiting, num_waiting = [whole.slice(cut)], num_waiting - cut
    if num_waiting:
        yield pa.Table.from_batches(waiting).combine_chunks().to_batches()[0]
