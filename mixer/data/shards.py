"""The shard format: write rows, read rows by number. Nothing here knows of corpora or catalogs.

A shard is one Arrow IPC *file*, uncompressed, with one record batch, of one domain's rows:

    length          int32         tokens of the row that are text, EOS included; the rest is padding
    starts          list<int32>   where in the row a document starts (0 only if one starts there)
    first_document  int64         document number, within the domain, of the token at position 0
    check           uint64        wrapping sum of the row's bytes seen as little-endian 64-bit words
    <metadata>      string, int64 or float64, one column for each configured key, by name
    tokens          fixed_size_list<uint16 or uint32>[row_tokens], last

Tokens lie last and uncompressed, so row r is the bytes from `tokens_offset + r * row_bytes` on: a
view into a memory map on local disk, one ranged read from an object store. All else is small and
lies before them and is called the head. A shard proves itself in three steps, each when it is due: size
and schema when it is opened; the head against the manifest's sha256 when it is first used; a row's
tokens against `check` whenever they are read. So neither a flipped byte nor another shard under the
same name can train. `check` is a sum: it guards against decay; against malice there is the sha256
of the whole file, which `mixer corpus verify` compares.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from types import MappingProxyType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
from numpy.typing import NDArray

from mixer.core.errors import ConfigError, DataError
from mixer.data.storage import READ_ERRORS, KeptFile, local_path, put

FORMAT = 1
FORMAT_KEY = b"mixer.shard"
MAGIC = b"ARROW1"
END_MARK = b"\xff\xff\xff\xff\0\0\0\0"
FIXED_COLUMNS = ("length", "starts", "first_document", "check", "tokens")
METADATA_TYPES: Mapping[str, pa.DataType] = MappingProxyType(
    {"string": pa.string(), "int64": pa.int64(), "float64": pa.float64()}
)
TAIL_BYTES = 4 + len(MAGIC)  # the footer's length, then the magic
SHOWN_ROWS = 8  # how many rows an error names
DAMAGED = "It was damaged or replaced: restore it, or prepare the domain again"


def dtype_for(vocab_size: int) -> str:
    """The narrowest token type that the vocabulary fits."""
    if not 0 < vocab_size <= 1 << 32:
        raise ConfigError(f"a vocabulary of {vocab_size} tokens; shards hold 1 to {1 << 32}. Use another tokenizer.")
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """What every shard of a corpus has in common; the schema follows from it."""

    row_tokens: int
    dtype: str  # uint16 or uint32
    metadata: Mapping[str, str] = field(default_factory=dict)  # key -> string, int64 or float64

    def __post_init__(self) -> None:
        if self.dtype not in ("uint16", "uint32"):
            raise ConfigError(f"tokens of type {self.dtype!r}; shards hold uint16 or uint32. Use one of these.")
        if self.row_tokens < 1 or self.row_tokens % 4:
            raise ConfigError(
                f"row_tokens={self.row_tokens}; it must be a positive multiple of 4, so that a row is whole "
                f"64-bit words. Use {max(4, round(self.row_tokens / 4) * 4)}."
            )
        for key, kind in self.metadata.items():
            if not key or not key.isprintable() or key in FIXED_COLUMNS:
                raise ConfigError(
                    f"metadata key {key!r} is empty, not printable or one of {', '.join(FIXED_COLUMNS)}. Rename it."
                )
            if kind not in METADATA_TYPES:
                raise ConfigError(
                    f"metadata key {key!r} has type {kind!r}; shards hold "
                    f"{', '.join(METADATA_TYPES)}. Use one of these."
                )

    @property
    def token_type(self) -> np.dtype[Any]:
        return np.dtype(self.dtype).newbyteorder("<")

    @property
    def row_bytes(self) -> int:
        return self.row_tokens * self.token_type.itemsize

    @property
    def schema(self) -> pa.Schema:
        return _schema(self.row_tokens, self.dtype, tuple(sorted(self.metadata.items())))


@lru_cache(maxsize=64)
def _schema(row_tokens: int, dtype: str, metadata: tuple[tuple[str, str], ...]) -> pa.Schema:
    fields: list[tuple[str, pa.DataType]] = [
        ("length", pa.int32()),
        ("starts", pa.list_(pa.int32())),
        ("first_document", pa.int64()),
        ("check", pa.uint64()),
        *((key, METADATA_TYPES[kind]) for key, kind in metadata),
        ("tokens", pa.list_(pa.uint16() if dtype == "uint16" else pa.uint32(), row_tokens)),
    ]
    return pa.schema(fields, metadata={FORMAT_KEY: str(FORMAT).encode()})


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardInfo:
    """What a manifest says about one shard. `path` is relative to the corpus root."""

    path: str
    rows: int
    bytes: int
    sha256: str  # of the whole file
    head_sha256: str  # of all that lies before the tokens: compared once per opened shard, before any row is used
    tokens_offset: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """What goes into a shard. A metadata value may be null; nothing else may."""

    tokens: np.ndarray  # (n, row_tokens) uint16 or uint32
    length: np.ndarray  # (n,) int32
    starts: pa.Array  # (n,) list<int32>
    first_document: np.ndarray  # (n,) int64
    metadata: Mapping[str, pa.Array] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def layout(self) -> Layout:
        kinds = {type_: kind for kind, type_ in METADATA_TYPES.items()}
        return Layout(
            row_tokens=self.tokens.shape[1],
            dtype=self.tokens.dtype.name,
            metadata={key: kinds.get(column.type, str(column.type)) for key, column in self.metadata.items()},
        )


def check_rows(tokens: np.ndarray) -> NDArray[np.uint64]:
    """Per row, the wrapping sum of its bytes seen as little-endian 64-bit words."""
    words = np.ascontiguousarray(tokens).view("<u8")
    return words.sum(axis=1, dtype=np.uint64)


def faulty_row(rows: Rows) -> tuple[int, str] | None:
    """The first row whose length, starts or document number cannot be, and why."""
    if len(rows) == 0:
        return None
    row_tokens = rows.tokens.shape[1]
    length = np.asarray(rows.length, dtype=np.int64)
    first_document = np.asarray(rows.first_document, dtype=np.int64)
    starts, row_of_start, _ = flat_starts(rows.starts)
    rules: list[tuple[NDArray[np.intp], str]] = [
        (np.flatnonzero((length < 1) | (length > row_tokens)), f"its length is not in 1..{row_tokens}"),
        (np.flatnonzero(first_document < 0), "its first document is negative"),
        (
            row_of_start[np.flatnonzero((starts < 0) | (starts >= length[row_of_start]))],
            "a document starts outside of its text",
        ),
        (
            row_of_start[1:][(np.diff(starts) <= 0) & (np.diff(row_of_start) == 0)],
            "its document starts do not ascend",
        ),
    ]
    found = [(int(bad[0]), why) for bad, why in rules if len(bad)]
    return min(found, key=lambda fault: fault[0]) if found else None


def numbers(array: pa.Array) -> NDArray[Any]:
    """A view of an array of numbers without nulls. Arrow's own conversion would first import pandas."""
    dtype = np.dtype(str(array.type))
    return np.frombuffer(array.buffers()[1] or b"", dtype, len(array), array.offset * dtype.itemsize)


def flat_starts(starts: pa.Array) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """All starts in one array, the row each belongs to, and where each row's begin (n + 1 offsets)."""
    offset = np.asarray(starts.offsets, dtype=np.int64)
    flat = np.asarray(starts.values, dtype=np.int64)[offset[0] : offset[-1]]
    offset = offset - offset[0]
    row_of_start = np.repeat(np.arange(len(starts), dtype=np.int64), np.diff(offset))
    return flat, row_of_start, offset


def write(filesystem: pafs.FileSystem, root: str, path: str, rows: Rows) -> ShardInfo:
    """Write one shard, whole or not at all, and say what a manifest must know of it.

    The same rows give the same bytes. On local disk: temporary file, fsync, rename. An object store
    shows an object only when its upload is complete.
    """
    layout = rows.layout
    _refuse_unwritable(path, rows)
    columns = [
        pa.array(np.asarray(rows.length, dtype=np.int32)),
        rows.starts,
        pa.array(np.asarray(rows.first_document, dtype=np.int64)),
        pa.array(check_rows(rows.tokens)),
        *(column for _, column in sorted(rows.metadata.items())),
        pa.FixedSizeListArray.from_arrays(pa.array(np.ascontiguousarray(rows.tokens).reshape(-1)), layout.row_tokens),
    ]
    batch = pa.record_batch(columns, schema=layout.schema)
    counter = pa.MockOutputStream()
    _write_batch(counter, batch)
    content = pa.allocate_buffer(counter.size())
    _write_batch(pa.FixedSizeBufferWriter(content), batch)
    tokens_offset = _tokens_offset(content)
    info = ShardInfo(
        path=path,
        rows=len(rows),
        bytes=content.size,
        sha256=hashlib.sha256(content).hexdigest(),
        head_sha256=hashlib.sha256(content[:tokens_offset]).hexdigest(),
        tokens_offset=tokens_offset,
    )
    put(filesystem, root, path, content)
    return info


def open(filesystem: pafs.FileSystem, root: str, info: ShardInfo, layout: Layout, *, domain: str = "") -> "Shard":
    """Open a shard, or refuse it if it is not the file that the manifest promised.

    Compared are size, magic, schema, row count and the place of the tokens; the content is compared
    row by row when read (`Shard.confirm`), and as a whole by `mixer corpus verify`.
    """
    return Shard(filesystem, root, info, layout, domain)


class Shard:
    """One open shard: tokens by row number, and the small columns beside them. Read-only.

    On local disk everything is a view of one memory map, which holds no file descriptor. On an object
    store `read` fetches exactly the bytes of its rows, and `columns` fetches no tokens.
    """

    def __init__(
        self, filesystem: pafs.FileSystem, root: str, info: ShardInfo, layout: Layout, domain: str = ""
    ) -> None:
        self.info = info
        self.layout = layout
        self.domain = domain
        self._where = f"{root}/{info.path}"
        self._buffer: pa.Buffer | None = None
        self._file: pa.NativeFile | None = None
        self._kept: dict[int, Any] = {}  # parts of a remote file that need not be fetched twice, by first byte
        local = local_path(filesystem, self._where)
        try:
            if local is not None:
                with pa.memory_map(str(local)) as file:
                    self._require_size(file.size())
                    # Arrow keeps the whole mapping alive through any buffer of it, also when the file is
                    # closed; but it asks the kernel to load what is read, so one byte must do.
                    first = file.read_buffer(1)
                    self._buffer = pa.foreign_buffer(first.address, info.bytes, base=first)
            else:
                self._file = file = filesystem.open_input_file(self._where)
                self._require_size(file.size())
        except FileNotFoundError as error:
            raise self._error("is missing", "Restore it, or prepare the domain again") from error
        except READ_ERRORS as error:
            raise self._error(f"cannot be opened: {_first_line(error)}", "See that it can be read") from error
        self._require_layout()

    def __len__(self) -> int:
        return self.info.rows

    @property
    def is_mapped(self) -> bool:
        return self._buffer is not None

    @cached_property
    def tokens(self) -> np.ndarray:
        """(n, row_tokens), read-only, without a copy; only where `is_mapped`."""
        assert self._buffer is not None, "tokens of a remote shard are read by ranges: use read or take"
        flat = np.frombuffer(
            self._buffer,
            self.layout.token_type,
            self.info.rows * self.layout.row_tokens,
            self.info.tokens_offset,
        )
        return flat.reshape(self.info.rows, self.layout.row_tokens)

    def read(self, start: int, stop: int) -> np.ndarray:
        """The tokens of rows start..stop-1: a view of the map, or exactly those bytes fetched."""
        if not 0 <= start <= stop <= self.info.rows:
            raise self._error(f"has {self.info.rows} rows; asked for {start}..{stop}", "Ask for rows that exist")
        if self._file is None:
            return self.tokens[start:stop]
        first_byte = self.info.tokens_offset + start * self.layout.row_bytes
        try:
            content = self._bytes_at(first_byte, (stop - start) * self.layout.row_bytes)
        except READ_ERRORS as error:
            found = f"rows {start}..{stop} cannot be read: {_first_line(error)}"
            raise self._error(found, "See that it can be read") from error
        return np.frombuffer(content, self.layout.token_type).reshape(stop - start, self.layout.row_tokens)

    def take(self, row_n: NDArray[np.integer], out: np.ndarray | None = None) -> np.ndarray:
        """The tokens of any rows, in that order. From an object store, neighbouring rows come in one read."""
        if out is None:
            out = np.empty((len(row_n), self.layout.row_tokens), self.layout.token_type)
        if len(row_n) == 0:
            return out
        if row_n.min() < 0 or row_n.max() >= self.info.rows:
            asked = f"{row_n.min()}..{row_n.max()}"
            raise self._error(f"has {self.info.rows} rows; asked for {asked}", "Ask for rows that exist")
        if self._file is None:  # mode "clip" spares a second copy, and there is nothing to clip
            return np.take(self.tokens, row_n, axis=0, out=out, mode="clip")
        wanted, place_n = np.unique(row_n, return_inverse=True)
        cuts = np.flatnonzero(np.diff(wanted) > 1) + 1
        runs = [self.read(int(run[0]), int(run[-1]) + 1) for run in np.split(wanted, cuts)]
        return np.take(np.concatenate(runs), place_n, axis=0, out=out, mode="clip")

    def columns(self, names: Sequence[str]) -> pa.RecordBatch:
        """Columns by name, in the order asked; fetches no others, so no tokens unless they are named."""
        try:
            schema = self.layout.schema
            places = sorted(schema.get_field_index(name) for name in names)
            assert not places or places[0] >= 0, f"{names} of {schema.names}"
            options = pa.ipc.IpcReadOptions(included_fields=places)
            batch = pa.ipc.open_file(self._source(), options=options).get_batch(0)
        except READ_ERRORS as error:
            raise self._error(
                f"columns {', '.join(names)} cannot be read: {_first_line(error)}", "Restore it"
            ) from error
        return batch.select(list(names))

    @cached_property
    def _small(self) -> pa.RecordBatch:
        head = self._bytes_at(0, self.info.tokens_offset)
        if hashlib.sha256(head).hexdigest() != self.info.head_sha256:
            raise self._error("has other columns beside its tokens than the manifest promised", DAMAGED)
        self._kept[0] = head
        return self.columns([name for name in self.layout.schema.names if name != "tokens"])

    @cached_property
    def length(self) -> NDArray[np.int32]:
        return self._numbers("length")

    @cached_property
    def first_document(self) -> NDArray[np.int64]:
        return self._numbers("first_document")

    @cached_property
    def check(self) -> NDArray[np.uint64]:
        return self._numbers("check")

    @cached_property
    def starts(self) -> pa.Array:
        return self._small.column("starts")

    @cached_property
    def starts_flat(self) -> NDArray[np.int32]:
        """All starts, one after the other; row r's are `starts_flat[starts_offsets[r] : starts_offsets[r + 1]]`."""
        return numbers(self.starts.values)

    @cached_property
    def starts_offsets(self) -> NDArray[np.int32]:
        return numbers(self.starts.offsets)

    def metadata(self, key: str) -> pa.Array:
        return self._small.column(key)

    def confirm(self, row_n: NDArray[np.integer], tokens: np.ndarray) -> None:
        """Refuse tokens that are not what was written as these rows."""
        bad = np.flatnonzero(check_rows(tokens) != self.check[row_n])
        if len(bad):
            rows = ", ".join(str(row) for row in row_n[bad[:SHOWN_ROWS]].tolist())
            rows += f" and {len(bad) - SHOWN_ROWS} more" if len(bad) > SHOWN_ROWS else ""
            raise self._error(
                f"row {rows}: the tokens do not add up to the row's check value",
                "Run `mixer corpus verify`, then restore it",
            )

    def _source(self) -> Any:
        if self._file is None:
            return pa.BufferReader(self._buffer)
        return pa.PythonFile(KeptFile(self._file, self.info.bytes, self._kept), mode="r")

    def _numbers(self, name: str) -> Any:
        column = self._small.column(name)
        if column.null_count:
            raise self._error(f"has {column.null_count} empty values in {name!r}", "Restore it")
        return numbers(column)

    def _require_size(self, size: int) -> None:
        if size != self.info.bytes:
            raise self._error(
                f"has {size} bytes; the manifest says {self.info.bytes}",
                "It was cut or replaced: restore it, or prepare the domain again",
            )

    def _require_layout(self) -> None:
        info = self.info
        end = info.tokens_offset + info.rows * self.layout.row_bytes
        try:
            # All behind the tokens is a few hundred bytes, so a remote shard is known after one small read.
            tail = bytes(self._bytes_at(end, info.bytes - end)) if 0 < end < info.bytes else b""
            self._kept[end] = tail
            head = bytes(self._bytes_at(0, len(MAGIC))) if self._file is None else MAGIC
            if head != MAGIC or tail[-len(MAGIC) :] != MAGIC:
                raise self._error(f"begins with {head!r} and ends with {tail[-6:]!r}: not an Arrow file", DAMAGED)
            reader = pa.ipc.open_file(self._source())
            self._require_schema(reader.schema)
        except READ_ERRORS as error:
            raise self._error(f"is not a readable Arrow file: {_first_line(error)}", DAMAGED) from error
        footer_bytes = int.from_bytes(tail[-TAIL_BYTES : -len(MAGIC)], "little")
        if reader.num_record_batches != 1 or len(tail) != len(END_MARK) + footer_bytes + TAIL_BYTES:
            rows = (info.bytes - TAIL_BYTES - footer_bytes - len(END_MARK) - info.tokens_offset) / self.layout.row_bytes
            raise self._error(
                f"has {rows:g} rows in {reader.num_record_batches} batches from byte {info.tokens_offset}; "
                f"the manifest says {info.rows} in one",
                DAMAGED,
            )

    def _require_schema(self, found: pa.Schema) -> None:
        version = (found.metadata or {}).get(FORMAT_KEY, b"").decode(errors="replace")
        if version.isdigit() and int(version) > FORMAT:
            raise self._error(
                f"has format {version}; this version reads up to {FORMAT}", "Use a newer version of mixer"
            )
        needed = self.layout.schema
        if not found.equals(needed, check_metadata=True):
            raise self._error(
                f"has another schema than the manifest: found {_schema_text(found)}; needed {_schema_text(needed)}",
                DAMAGED,
            )

    def _bytes_at(self, offset: int, num_bytes: int) -> Any:
        if self._buffer is not None:
            return self._buffer.slice(offset, num_bytes)
        assert self._file is not None
        content = self._file.read_at(num_bytes, offset)
        if len(content) != num_bytes:
            raise self._error(f"gave {len(content)} of {num_bytes} bytes from byte {offset} on", DAMAGED)
        return content

    def _error(self, found: str, what_to_do: str) -> DataError:
        of = f" of domain {self.domain!r}" if self.domain else ""
        return DataError(f"shard {self._where}{of} {found}. {what_to_do}.")


def _refuse_unwritable(path: str, rows: Rows) -> None:
    n = len(rows)
    sizes = {
        "length": len(rows.length),
        "starts": len(rows.starts),
        "first_document": len(rows.first_document),
    }
    sizes |= {key: len(column) for key, column in rows.metadata.items()}
    uneven = {name: size for name, size in sizes.items() if size != n}
    if n == 0 or uneven:
        raise DataError(
            f"shard {path}: {n} rows of tokens, but {uneven or 'none to write'}. All need one size above 0."
        )
    if rows.starts.type != pa.list_(pa.int32()) or rows.starts.null_count:
        raise DataError(f"shard {path}: starts of type {rows.starts.type}; needs list<int32> without nulls.")
    fault = faulty_row(rows)
    if fault:
        raise DataError(f"shard {path}: row {fault[0]} cannot be written: {fault[1]}. Mend what packs the rows.")


def _write_batch(sink: Any, batch: pa.RecordBatch) -> None:
    options = pa.ipc.IpcWriteOptions(compression=None, use_threads=False)
    with pa.ipc.new_file(sink, batch.schema, options=options) as writer:
        writer.write_batch(batch)


def _tokens_offset(content: pa.Buffer) -> int:
    """Where in the file's content the tokens lie, told from addresses: Arrow reads without copying."""
    column = pa.ipc.open_file(pa.BufferReader(content)).get_batch(0).column("tokens")
    values = column.values.buffers()[1]
    return int(values.address - content.address)


def _schema_text(schema: pa.Schema) -> str:
    kinds = ", ".join(
        f"{item.name}: {item.type}" + (f" {dict(item.metadata)}" if item.metadata else "") for item in schema
    )
    return f"[{kinds}] with metadata {dict(schema.metadata or {})}"


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
