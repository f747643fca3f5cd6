"""The first half of preparation: a unit of raw text -> its tokens on disk, and what packing needs.

A unit's staging is three files named by the unit's key, a hash of all that its content depends on:

    <key>.tokens            the ids, nothing else
    <key>.documents.arrow   one row a document: which part and record of the unit, how many tokens,
                            and the metadata that rows will be given a reduced value of
    <key>.json              written last: the pieces, what was skipped, and size and sha256 of the others

Documents are gathered into sections of some million tokens, so memory does not grow with a unit; in
a section they are sorted (stably) by side (training or validation) and group. A piece is what one
section holds of one side and group: neighbouring tokens, neighbouring documents. Laying the pieces
of a group end to end, in order of units and sections, gives the group's stream of tokens.
"""

import contextlib
import hashlib
import json
import os
import secrets
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
from numpy.typing import NDArray

from mixer.core.errors import DataError
from mixer.data import tokens as tokenizers
from mixer.data.packing import order_by_group
from mixer.data.reading import Reading
from mixer.data.shards import dtype_for
from mixer.data.sources import MetadataOptions, Slice, SourceFile, SourceOptions
from mixer.data.storage import TEMPORARY_SUFFIX, Storage, local_path, put

SECTION_TOKENS = 1 << 23
ENCODE_CHARS = 1 << 20  # documents are given to the tokenizer this much at a time
READ_BYTES = 8 << 20
MAX_OPEN = 256
TRAIN, VALIDATION = 0, 1

Group = tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Part:
    """A slice of one of the domain's files."""

    file: SourceFile
    slice: Slice


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """What one task reads."""

    key: str
    where: str  # for messages, e.g. domains.code
    options: SourceOptions
    parts: tuple[Part, ...]
    validation_share: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """What all units have in common."""

    storage: Storage
    staging: str  # a folder, as path or URI
    tokenizer: str | None  # the tokenizer.json's content; None: bytes
    eos: str | None
    metadata: Mapping[str, MetadataOptions]
    seed: int  # of the choice of validation documents

    @property
    def group_keys(self) -> tuple[str, ...]:
        return tuple(key for key, one in self.metadata.items() if one.group)

    @property
    def reduced_keys(self) -> tuple[str, ...]:
        return tuple(key for key, one in self.metadata.items() if not one.group)


@dataclass(frozen=True, slots=True)
class Piece:
    """Neighbouring documents of one side and group in one section of a unit's staging."""

    side: int
    group: Group
    section: int
    first_token: int  # in the tokens file
    num_tokens: int
    first_document: int  # in the section
    num_documents: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Staged:
    """What became of a unit."""

    key: str
    pieces: tuple[Piece, ...]
    skipped: dict[str, int]
    num_records: tuple[int, ...]  # of each part: lines passed, so that later ranges know their line numbers
    files: dict[str, tuple[int, str]] = field(default_factory=dict)  # suffix -> bytes, sha256

    def to_json(self) -> str:
        return json.dumps(asdict(self), ensure_ascii=True)

    @classmethod
    def from_json(cls, text: str) -> "Staged":
        value = json.loads(text)
        pieces = tuple(Piece(**{**piece, "group": tuple(piece["group"])}) for piece in value["pieces"])
        files = {suffix: (size, sha256) for suffix, (size, sha256) in value["files"].items()}
        return cls(
            key=value["key"],
            pieces=pieces,
            skipped=value["skipped"],
            num_records=tuple(value["num_records"]),
            files=files,
        )

    @property
    def num_tokens(self) -> int:
        return sum(piece.num_tokens for piece in self.pieces)


def key_of(content: object) -> str:
    """A name for whatever depends on this content and nothing else."""
    text = json.dumps(content, sort_keys=True, ensure_ascii=True, separators=(",", ":"), default=asdict)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def is_validation(text: str, share: float, seed: int) -> bool:
    """Decided by the text alone, so that equal documents fall on the same side."""
    if share <= 0:
        return False
    digest = hashlib.blake2b(text.encode(), digest_size=8, key=seed.to_bytes(8, "little", signed=True)).digest()
    return int.from_bytes(digest, "little") < share * 2.0**64


def stage_unit(unit: Unit, context: Context) -> Staged:
    """Tokenize a unit, or find that an earlier run did and that its files are whole."""
    filesystem, root = context.storage.locate(context.staging)
    found = find_staged(filesystem, root, unit.key)
    if found is not None:
        return found
    tokenizer = tokenizers.from_text(context.tokenizer, context.eos)
    with contextlib.ExitStack() as stack:
        ids_sink = stack.enter_context(Sink(filesystem, f"{root}/{unit.key}.tokens"))
        documents_sink = stack.enter_context(Sink(filesystem, f"{root}/{unit.key}.documents.arrow"))
        writer = _Writer(context, unit.validation_share, tokenizer, ids_sink, documents_sink)
        reading = Reading(context.storage, unit.options, context.metadata, unit.where)
        num_records: list[int] = []
        for number, part in enumerate(unit.parts):
            for document in reading.documents(part.file, part.slice):
                writer.add(number, document.record, document.text, document.values)
            num_records.append(reading.num_records)
        writer.close()
    staged = Staged(
        key=unit.key,
        pieces=tuple(writer.pieces),
        skipped=dict(sorted(reading.skipped.items())),
        num_records=tuple(num_records),
        files={
            ".tokens": (ids_sink.size, ids_sink.sha256),
            ".documents.arrow": (documents_sink.size, documents_sink.sha256),
        },
    )
    put(filesystem, root, f"{unit.key}.json", staged.to_json().encode())
    return staged


def find_staged(filesystem: pafs.FileSystem, root: str, key: str) -> Staged | None:
    """The unit's staging, if all of it is there and is what was written."""
    try:
        with filesystem.open_input_stream(f"{root}/{key}.json", compression=None) as stream:
            staged = Staged.from_json(stream.read().decode())
        for suffix, wanted in staged.files.items():
            if size_and_sha256(filesystem, f"{root}/{key}{suffix}") != wanted:
                return None
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return staged if staged.key == key else None


def size_and_sha256(filesystem: pafs.FileSystem, path: str) -> tuple[int, str]:
    size, digest = 0, hashlib.sha256()
    with filesystem.open_input_stream(path, compression=None) as stream:
        while chunk := stream.read(READ_BYTES):
            size += len(chunk)
            digest.update(chunk)
    return size, digest.hexdigest()


class Sink:
    """A file written piecemeal that appears under its name only when it is whole."""

    def __init__(self, filesystem: pafs.FileSystem, path: str) -> None:
        self.size = 0
        self._digest = hashlib.sha256()
        self._path = path
        self._local = local_path(filesystem, path)
        try:
            if self._local is None:
                self._stream: Any = filesystem.open_output_stream(path, compression=None)
            else:
                self._local.parent.mkdir(parents=True, exist_ok=True)
                name = f".{self._local.name}.{secrets.token_hex(6)}{TEMPORARY_SUFFIX}"
                self._temporary = self._local.with_name(name)
                self._stream = self._temporary.open("xb")
        except OSError as error:
            raise self._error(error) from error

    def write(self, content: Any) -> None:
        view = memoryview(content).cast("B")
        try:
            self._stream.write(view)
        except OSError as error:
            raise self._error(error) from error
        self.size += view.nbytes
        self._digest.update(view)

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()

    def as_stream(self) -> "_Unclosed":
        """For Arrow, which closes what it writes to: the sink must stay open until it is given its name."""
        return _Unclosed(self)

    def __enter__(self) -> "Sink":
        return self

    def __exit__(self, kind: object, value: object, trace: object) -> None:
        try:
            if self._local is None:
                if kind is None:
                    self._stream.close()  # an object appears at the end of its upload
                return
            if kind is None:
                self._stream.flush()
                os.fsync(self._stream.fileno())
            self._stream.close()
            if kind is None:
                self._temporary.replace(self._local)
        except OSError as error:
            raise self._error(error) from error
        finally:
            if self._local is not None:
                self._temporary.unlink(missing_ok=True)

    def _error(self, error: OSError) -> DataError:
        return DataError(
            f"cannot write {self._path}: {error}. It needs a writable place with enough space; "
            "run again when there is, and what is already done will be kept."
        )


def documents_schema(reduced_keys: tuple[str, ...]) -> pa.Schema:
    fields = [("part", pa.int32()), ("record", pa.int64()), ("tokens", pa.int64())]
    return pa.schema([*fields, *((f"value_{n}", pa.float64()) for n in range(len(reduced_keys)))])


class _Writer:
    """Gathers documents, encodes some at a time, writes a section when it is full."""

    def __init__(
        self, context: Context, share: float, tokenizer: tokenizers.Tokenizer, ids: Sink, documents: Sink
    ) -> None:
        self.pieces: list[Piece] = []
        self._share = share
        self._seed = context.seed
        self._tokenizer = tokenizer
        self._ids = ids
        self._dtype = np.dtype(dtype_for(tokenizer.vocab_size))
        self._group_places = [n for n, one in enumerate(context.metadata.values()) if one.group]
        self._reduced_places = [n for n, one in enumerate(context.metadata.values()) if not one.group]
        self._schema = documents_schema(context.reduced_keys)
        self._documents_sink = documents
        self._arrow = pa.ipc.new_file(pa.PythonFile(documents.as_stream(), mode="w"), self._schema)
        self._num_sections = 0
        self._num_written = 0
        self._texts: list[str] = []
        self._num_chars = 0
        self._clear()

    def _clear(self) -> None:
        self._encoded: list[NDArray[Any]] = []
        self._num_tokens = 0
        self._lengths: list[NDArray[np.int64]] = []
        self._part: list[int] = []
        self._record: list[int] = []
        self._side_and_group: list[tuple[int, Group]] = []
        self._values: list[tuple[float, ...]] = []

    def add(self, part: int, record: int, text: str, values: tuple[Any, ...]) -> None:
        self._texts.append(text)
        self._num_chars += len(text)
        self._part.append(part)
        self._record.append(record)
        if self._share or values:
            side = VALIDATION if is_validation(text, self._share, self._seed) else TRAIN
            self._side_and_group.append((side, tuple(values[n] for n in self._group_places)))
            if self._reduced_places:
                self._values.append(tuple(values[n] for n in self._reduced_places))
        if self._num_chars >= ENCODE_CHARS:
            self._encode()
            if self._num_tokens >= SECTION_TOKENS:
                self._write_section()

    def close(self) -> None:
        self._encode()
        self._write_section()
        self._arrow.close()

    def _encode(self) -> None:
        if self._texts:
            ids, lengths = self._tokenizer.encode(self._texts)
            self._encoded.append(ids)
            self._lengths.append(lengths)
            self._num_tokens += len(ids)
            self._texts, self._num_chars = [], 0

    def _write_section(self) -> None:
        if not self._lengths:
            return
        ids = np.concatenate(self._encoded) if len(self._encoded) > 1 else self._encoded[0]
        self._encoded = []
        length = np.concatenate(self._lengths)
        columns = [np.array(self._part, np.int32), np.array(self._record, np.int64), length]
        columns += [np.array(column, np.float64) for column in zip(*self._values, strict=True)]
        names: list[tuple[int, Group]] = [(TRAIN, ())]
        code = np.zeros(len(length), np.int64)
        if self._side_and_group:
            names = sorted(set(self._side_and_group))
            place = {name: number for number, name in enumerate(names)}
            code = np.fromiter((place[one] for one in self._side_and_group), np.int64, len(length))
        if len(names) > 1:
            order, token_order = order_by_group(code, length)
            ids = ids[token_order]
            columns = [column[order] for column in columns]
        tokens_g = np.bincount(code, weights=length, minlength=len(names)).astype(np.int64).tolist()
        documents_g = np.bincount(code, minlength=len(names)).tolist()
        first_document = 0
        for (side, group), num_tokens, num_documents in zip(names, tokens_g, documents_g, strict=True):
            self.pieces.append(
                Piece(
                    side,
                    group,
                    self._num_sections,
                    self._num_written,
                    num_tokens,
                    first_document,
                    num_documents,
                )
            )
            self._num_written += num_tokens
            first_document += num_documents
        self._ids.write(ids.astype(self._dtype.newbyteorder("<"), copy=False))
        self._arrow.write_batch(pa.record_batch([pa.array(column) for column in columns], schema=self._schema))
        self._num_sections += 1
        self._clear()


class _Unclosed:
    """A sink as Arrow wants it, without the closing."""

    closed = False

    def __init__(self, sink: Sink) -> None:
        self._sink = sink

    def write(self, content: Any) -> int:
        self._sink.write(content)
        return len(content)

    def flush(self) -> None: ...

    def close(self) -> None: ...


class StagedFiles:
    """Reads back what `stage_unit` wrote, by pieces: views of memory maps, or ranged reads."""

    def __init__(self, filesystem: pafs.FileSystem, root: str, dtype: str) -> None:
        self._filesystem = filesystem
        self._root = root
        self._dtype = np.dtype(dtype).newbyteorder("<")
        self._open: OrderedDict[str, Any] = OrderedDict()  # the ones used last; a system grants so many maps

    def tokens(self, key: str, start: int, count: int) -> NDArray[Any]:
        """`count` tokens of a unit from its token number `start` on."""
        size = self._dtype.itemsize
        file = self._remembered(f"{key}.tokens", self._open_file)
        content = file.read_at(count * size, start * size)
        if len(content) != count * size:
            raise DataError(f"{self._root}/{key}.tokens is shorter than it was. Run again.")
        return np.frombuffer(content, self._dtype)

    def documents(self, key: str, piece: Piece) -> pa.RecordBatch:
        reader = self._remembered(f"{key}.documents.arrow", lambda name: pa.ipc.open_file(self._open_file(name)))
        return reader.get_batch(piece.section).slice(piece.first_document, piece.num_documents)

    def _remembered(self, name: str, make: Callable[[str], Any]) -> Any:
        if name not in self._open:
            self._open[name] = make(name)
            if len(self._open) > MAX_OPEN:
                self._open.popitem(last=False)
        self._open.move_to_end(name)
        return self._open[name]

    def _open_file(self, name: str) -> Any:
        path = f"{self._root}/{name}"
        local = local_path(self._filesystem, path)
        try:
            if local is None:
                return self._filesystem.open_input_file(path)
            return pa.memory_map(str(local))
        except OSError as error:
            raise DataError(f"{path} is gone since it was written ({error}). Run again.") from error
