"""The documents in raw files.

What happens to a bad document is a fixed rule, the same everywhere:

    text missing or null, empty, only white space, not UTF-8     skipped, and counted under that name
    a line that is not JSON, a text that is not a string         refused, naming file and record,
                                                                 or skipped if `bad_records: skip`
    a metadata key missing (or null, or NaN)                     its default, or refused if it has none
    a damaged file (truncated, broken compression)               refused, naming the file
"""

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from mixer.core.errors import DataError
from mixer.data.sources import (
    READ_ERRORS,
    MetadataOptions,
    Slice,
    SourceFile,
    SourceOptions,
    cast_value,
    first_line,
    is_utf8,
)
from mixer.data.storage import Storage

READ_BYTES = 4 << 20
PARQUET_BATCH_ROWS = 512
UNDECODABLE = "surrogateescape"  # gives a text that `is_utf8` refuses
BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True)
class Document:
    """A usable document: where it was, its text, and its metadata in the order of the config."""

    record: int
    text: str
    values: tuple[Any, ...]


class Reading:
    """The documents of slices, one after the other; counts what it skips and the records it passes."""

    def __init__(
        self,
        storage: Storage,
        options: SourceOptions,
        metadata: Mapping[str, MetadataOptions],
        where: str,
    ) -> None:
        self.skipped: Counter[str] = Counter()
        self.num_records = 0  # of the slice read last; line numbers of a range count from its start
        self._storage = storage
        self._options = options
        self._metadata = metadata
        self._where = where

    def documents(self, file: SourceFile, part: Slice) -> Iterator[Document]:
        self.num_records = 0
        self._refuse_changed(file)
        read = {"parquet": self._parquet, "jsonl": self._jsonl, "text": self._text}[file.format]
        try:
            yield from read(file, part)
        except READ_ERRORS as error:
            raise DataError(
                f"{self._where}: {file.shown} cannot be read to its end ({first_line(error)}). "
                "It is damaged or out of reach: restore it, or leave it out."
            ) from error

    def _refuse_changed(self, file: SourceFile) -> None:
        info = file.filesystem(self._storage).get_file_info(file.path)
        if info.type != pafs.FileType.File:
            raise DataError(f"{self._where}: {file.shown} is gone since the work began. Restore it and run again.")
        if (info.size, info.mtime_ns or 0) != (file.size, file.mtime_ns):
            raise DataError(f"{self._where}: {file.shown} was changed since the work began. Run again.")

    def _usable(self, text: Any, at: str) -> TypeGuard[str]:
        if text is None:
            self.skipped["null"] += 1
        elif not isinstance(text, str):
            self._bad_record("wrong_type", f"{at}: {self._options.text!r} is {type(text).__name__}, not a string")
        elif not text:
            self.skipped["empty"] += 1
        elif text.isspace():
            self.skipped["blank"] += 1
        elif not is_utf8(text):
            self.skipped["invalid_utf8"] += 1
        else:
            return True
        return False

    def _bad_record(self, reason: str, found: str) -> None:
        if self._options.bad_records == "refuse":
            raise DataError(f"{self._where}: {found}. Mend the file, or set `bad_records: skip` for this domain.")
        self.skipped[reason] += 1

    def _values(self, fields: Mapping[str, Any], at: str) -> tuple[Any, ...]:
        if not self._metadata:
            return ()
        return tuple(self._value(key, one, fields.get(key), at) for key, one in self._metadata.items())

    def _value(self, key: str, one: MetadataOptions, found: Any, at: str) -> Any:
        if found is None or (isinstance(found, float) and math.isnan(found)):
            if one.default is None:
                raise DataError(
                    f"{self._where}: {at} has no metadata {key!r}. Give it one, or set metadata.{key}.default."
                )
            found = one.default
        value = cast_value(found, one.kind)
        if value is None:
            raise DataError(
                f"{self._where}: {at} has metadata {key}={found!r}; needed a value of type {one.kind}. "
                f"Mend the file, or change metadata.{key}."
            )
        return value

    def _parquet(self, file: SourceFile, part: Slice) -> Iterator[Document]:
        with file.filesystem(self._storage).open_input_file(file.path) as stream:
            reader = pq.ParquetFile(stream)
            present = [key for key in self._metadata if key in reader.schema_arrow.names]
            columns = [self._options.text, *present]
            stop = reader.num_row_groups if part.stop is None else part.stop
            record = sum(reader.metadata.row_group(group).num_rows for group in range(part.start))
            for group in range(part.start, stop):
                try:
                    for batch in reader.iter_batches(
                        PARQUET_BATCH_ROWS, row_groups=[group], columns=columns, use_threads=False
                    ):
                        yield from self._parquet_batch(file, batch, record)
                        record += batch.num_rows
                except READ_ERRORS as error:
                    raise DataError(
                        f"{self._where}: row group {group} of {file.shown} cannot be read "
                        f"({first_line(error)}). Restore the file, or leave it out."
                    ) from error

    def _parquet_batch(self, file: SourceFile, batch: pa.RecordBatch, record: int) -> Iterator[Document]:
        column = batch.column(self._options.text)
        try:
            texts = column.to_pylist()
        except UnicodeDecodeError:
            raw = _plain_array(column).cast(pa.large_binary()).to_pylist()
            texts = [None if one is None else one.decode(errors=UNDECODABLE) for one in raw]
        fields = {key: batch.column(key).to_pylist() for key in self._metadata if key in batch.schema.names}
        for place, text in enumerate(texts):
            at = f"{file.shown}, row {record + place}"
            if self._usable(text, at):
                values = self._values({key: column[place] for key, column in fields.items()}, at)
                yield Document(record + place, text, values)

    def _jsonl(self, file: SourceFile, part: Slice) -> Iterator[Document]:
        for number, line in enumerate(self._lines(file, part)):
            self.num_records = number + 1
            if not line or line.isspace():
                continue
            at = self._line_name(file, part, number)
            try:
                value: Any = json.loads(line.decode())
            except UnicodeDecodeError:
                self.skipped["invalid_utf8"] += 1
                continue
            except (ValueError, RecursionError) as error:
                self._bad_record("invalid_json", f"{at} is not JSON ({first_line(error)})")
                continue
            if not isinstance(value, dict):
                self._bad_record("wrong_type", f"{at} is {type(value).__name__}, not an object")
            elif self._options.text not in value:
                self.skipped["missing"] += 1
            elif self._usable(value[self._options.text], at):
                yield Document(number, value[self._options.text], self._values(value, at))

    def _text(self, file: SourceFile, part: Slice) -> Iterator[Document]:
        if self._options.split == "file":
            with self._open(file, 0) as stream:
                blocks: Iterator[bytes] = iter([stream.read().removeprefix(BOM)])
        elif self._options.split == "lines":
            blocks = (line.removesuffix(b"\r") for line in self._lines(file, part))
        else:
            blocks = _blocks(self._lines(file, part))
        for number, block in enumerate(blocks):
            self.num_records = number + 1
            text = block.decode(errors=UNDECODABLE)
            at = f"{file.shown}, {self._options.split} {number}"
            if self._usable(text, at):
                yield Document(number, text, self._values({}, at))

    def _open(self, file: SourceFile, start: int) -> pa.NativeFile:
        filesystem = file.filesystem(self._storage)
        if file.compression is not None:
            return filesystem.open_input_stream(file.path, compression=file.compression)
        stream = filesystem.open_input_file(file.path)
        stream.seek(start)
        return stream

    def _lines(self, file: SourceFile, part: Slice) -> Iterator[bytes]:
        """The lines that start in the slice, without their line ends."""
        start = max(0, part.start - 1)
        with self._open(file, start) as stream:
            lines = lines_of(stream, start, part.stop)
            first = next(lines, None)
            if first is None:
                return
            if part.start == 0:
                yield first.removeprefix(BOM)
            # Otherwise `first` began before the slice (or is the empty rest of such a line): not ours.
            yield from lines

    @staticmethod
    def _line_name(file: SourceFile, part: Slice, number: int) -> str:
        after = f" after byte {part.start}" if part.start else ""
        return f"{file.shown}, line {number + 1}{after}"


def lines_of(stream: Any, position: int, stop: int | None) -> Iterator[bytes]:
    """The lines that start before `stop`, of a stream that stands at `position`."""
    open_line: list[bytes] = []  # a long line comes in many reads; joined once
    while chunk := stream.read(READ_BYTES):
        parts = chunk.split(b"\n")
        if len(parts) == 1:
            open_line.append(chunk)
            continue
        parts[0] = b"".join([*open_line, parts[0]])
        open_line = [parts.pop()]
        for line in parts:
            if stop is not None and position >= stop:
                return
            yield line
            position += len(line) + 1
        if stop is not None and position >= stop:
            return
    last = b"".join(open_line)
    if last and (stop is None or position < stop):
        yield last


def _blocks(lines: Iterator[bytes]) -> Iterator[bytes]:
    block: list[bytes] = []
    for line in lines:
        if line.strip():
            block.append(line.removesuffix(b"\r"))
        elif block:
            yield b"\n".join(block)
            block = []
    if block:
        yield b"\n".join(block)


def _plain_array(column: Any) -> Any:
    return column.dictionary_decode() if pa.types.is_dictionary(column.type) else column
