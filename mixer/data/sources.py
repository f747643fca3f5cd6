"""Raw text: which files a domain has, and how they are cut into units of work.

Formats: Parquet, JSON lines and text, the latter two plain, gzip or zstd; on local disk or in an
object store. A unit is some tens of megabytes of one domain: row groups of a Parquet file, a byte
range of a plain file of lines (a line belongs to the range it starts in), or neighbouring whole
files. Units follow from the inputs and the options alone, never from how many tasks run at once.
"""

import fnmatch
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from mixer.core.catalog import Domain
from mixer.core.errors import ConfigError, DataError
from mixer.data.storage import Storage

FORMATS = ("auto", "parquet", "jsonl", "text")
SPLITS = ("file", "lines", "blank")
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
EXTENSIONS = {
    ".parquet": "parquet",
    ".pq": "parquet",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
}
FOOTER_THREADS = 16
READ_ERRORS = (OSError, pa.ArrowException, EOFError)


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceOptions:
    """The raw files of one domain."""

    files: tuple[str, ...] = ()  # paths or URIs; *, ?, [..] and ** are patterns
    format: str = "auto"  # parquet, jsonl or text; auto goes by the file's name
    text: str = "text"  # the column or field that holds a document
    split: str = "file"  # of text files: one document a file, a line, or a block between blank lines
    bad_records: str = "refuse"  # refuse or skip: lines that are not JSON, texts that are not strings

    def __post_init__(self) -> None:
        for name, value, choices in (
            ("format", self.format, FORMATS),
            ("split", self.split, SPLITS),
            ("bad_records", self.bad_records, ("refuse", "skip")),
        ):
            if value not in choices:
                raise ConfigError(f"{name}={value!r}; needed one of {', '.join(choices)}. Choose one.")


@dataclass(frozen=True, slots=True, kw_only=True)
class MetadataOptions:
    """A field of every document that its rows carry.

    A grouping key is never mixed within a row. Any other key is a number, and a row's value is the
    mean (weighted by tokens), smallest or largest of its documents' values.
    """

    group: bool = False
    reduce: str = "mean"  # mean, min or max; of keys that do not group
    type: str | None = None  # string or int64 for a grouping key (string if not given), else float64
    default: str | float | None = None  # for documents without it; none: such a document is refused

    def __post_init__(self) -> None:
        if self.reduce not in ("mean", "min", "max"):
            raise ConfigError(f"reduce={self.reduce!r}; needed one of mean, min, max. Choose one.")
        allowed = ("string", "int64") if self.group else ("float64",)
        if self.type is not None and self.type not in allowed:
            raise ConfigError(
                f"type={self.type!r} with group={self.group}; needed {' or '.join(allowed)}. "
                "Only strings and whole numbers can group, and only numbers can be reduced."
            )
        if self.default is not None and cast_value(self.default, self.kind) is None:
            raise ConfigError(f"default={self.default!r}; needed a value of type {self.kind}. Change it.")

    @property
    def kind(self) -> str:
        return self.type or ("string" if self.group else "float64")


@dataclass(frozen=True, slots=True)
class SourceFile:
    """One input file as it was when the work was planned."""

    scheme: str  # of its file system; none: this machine's
    path: str  # within its file system
    shown: str  # as the config's pattern names it
    size: int
    mtime_ns: int
    format: str
    compression: str | None

    def filesystem(self, storage: Storage) -> pafs.FileSystem:
        # The bucket alone: a path may hold marks that mean something else in an address.
        return storage.locate(f"{self.scheme}://{self.path.split('/')[0]}" if self.scheme else self.path)[0]


@dataclass(frozen=True, slots=True)
class Slice:
    """A part of a file: byte range or row groups start..stop-1; `stop` is None for a whole file."""

    file: int
    start: int = 0
    stop: int | None = None


# --- which files -----------------------------------------------------------------------------


def found_in(folder: str, storage: Storage) -> dict[str, dict[str, SourceOptions]]:
    """What a folder has in `train/` and in `targets/`: a folder of files, or files up to their first dot, is a name.

    Names that begin with a dot or a low line are passed over.
    """
    filesystem, path = storage.locate(folder)
    found: dict[str, dict[str, SourceOptions]] = {"train": {}, "targets": {}}
    for corpus, of_corpus in found.items():
        try:
            infos = filesystem.get_file_info(pafs.FileSelector(f"{path}/{corpus}", allow_not_found=True))
        except READ_ERRORS as error:
            raise DataError(f"{folder}/{corpus} cannot be listed: {first_line(error)}. Correct the path.") from error
        for info in sorted(infos, key=lambda info: info.base_name):
            if info.base_name.startswith((".", "_")):
                continue
            is_folder = info.type == pafs.FileType.Directory
            name = Domain(info.base_name if is_folder else info.base_name.partition(".")[0], 1, "").name
            file = f"{folder.rstrip('/')}/{corpus}/{info.base_name}" + ("/*" if is_folder else "")
            of_corpus[name] = SourceOptions(files=(*of_corpus.get(name, SourceOptions()).files, file))
    if not found["train"]:
        raise DataError(f"{folder} has nothing in train/; needed train/<domain>/<files>. Correct prepare.folder.")
    return found


def find_files(options: SourceOptions, storage: Storage, where: str) -> list[SourceFile]:
    """All files of a domain, sorted by name."""
    if not options.files:
        raise ConfigError(f"{where} names no files. Set its `files`.")
    found: list[SourceFile] = []
    for pattern in options.files:
        scheme, mark, _ = pattern.partition("://")
        scheme = scheme if mark and scheme != "file" else ""
        filesystem, path = _locate_pattern(pattern, storage)
        try:
            infos = [info for info in _expand(filesystem, path) if info.type == pafs.FileType.File]
        except READ_ERRORS as error:
            raise DataError(
                f"{where}: {pattern} cannot be listed: {first_line(error)}. See that it can be read."
            ) from error
        if not infos:
            raise DataError(f"{where}: no file matches {pattern}. Correct the pattern, or make the files.")
        relative = not mark and not os.path.isabs(pattern)
        for info in infos:
            shown = f"{scheme}://{info.path}" if scheme else os.path.relpath(info.path) if relative else info.path
            kind, compression = _kind_of(info.path, options.format, where)
            found.append(SourceFile(scheme, info.path, shown, info.size, info.mtime_ns or 0, kind, compression))
    return sorted(found, key=lambda file: file.shown)


def _locate_pattern(pattern: str, storage: Storage) -> tuple[pafs.FileSystem, str]:
    """As `Storage.locate`, for a text whose marks (*, ?, [) are not part of an address."""
    parts = pattern.split("/")
    fixed = next((place for place, part in enumerate(parts) if _is_pattern(part)), len(parts))
    if "://" not in pattern or fixed == len(parts):
        return storage.locate(pattern)
    filesystem, root = storage.locate("/".join(parts[:fixed]))
    return filesystem, "/".join([root, *parts[fixed:]])


def refuse_doubles(files: Mapping[str, Sequence[SourceFile]]) -> None:
    """A file may be in one domain, once: else its text would be trained twice unseen."""
    owner: dict[str, str] = {}
    for where, of_domain in files.items():
        for file in of_domain:
            identity = f"{file.scheme}://{file.path}" if file.scheme else os.path.realpath(file.path)
            if identity in owner:
                other = owner[identity]
                text = f"twice in {where}" if other == where else f"in {other} and in {where}"
                raise DataError(f"{file.shown} is {text}. A file belongs to one domain, once: change the patterns.")
            owner[identity] = where


def _kind_of(path: str, chosen: str, where: str) -> tuple[str, str | None]:
    base, extension = os.path.splitext(path.lower())
    compression = COMPRESSIONS.get(extension)
    if compression:
        extension = os.path.splitext(base)[1]
    kind = chosen if chosen != "auto" else EXTENSIONS.get(extension, "text")
    if kind == "parquet" and compression:
        raise DataError(f"{where}: {path} is a compressed Parquet file, which nothing reads. Decompress it.")
    return kind, compression


def _expand(filesystem: pafs.FileSystem, pattern: str) -> list[pafs.FileInfo]:
    """The paths that a pattern stands for; one folder is listed at a time, so `**` alone walks trees."""
    if not _is_pattern(pattern):
        return [filesystem.get_file_info(pattern)]
    parts = pattern.split("/")
    fixed = next(place for place, part in enumerate(parts) if _is_pattern(part))
    folders = ["/".join(parts[:fixed])]
    for place in range(fixed, len(parts)):
        part, is_last = parts[place], place == len(parts) - 1
        if part == "**":
            if is_last:
                return [i for folder in folders for i in _list(filesystem, folder, recursive=True)]
            folders += [
                info.path
                for folder in list(folders)
                for info in _list(filesystem, folder, recursive=True)
                if info.type == pafs.FileType.Directory
            ]
            folders = sorted(set(folders))
            continue
        matched = [
            info
            for folder in folders
            for info in _list(filesystem, folder)
            if fnmatch.fnmatchcase(os.path.basename(info.path), part) and _is_seen(info.path, part)
        ]
        if is_last:
            return matched
        folders = [info.path for info in matched if info.type == pafs.FileType.Directory]
    return []


def _is_pattern(part: str) -> bool:
    return any(mark in part for mark in "*?[")


def _is_seen(path: str, part: str) -> bool:
    return part.startswith(".") or not os.path.basename(path).startswith(".")


def _list(filesystem: pafs.FileSystem, folder: str, *, recursive: bool = False) -> list[pafs.FileInfo]:
    selector = pafs.FileSelector(folder or "/", recursive=recursive, allow_not_found=True)
    infos = filesystem.get_file_info(selector)
    return sorted((i for i in infos if _is_seen(i.path, "")), key=lambda info: info.path)


# --- what is checked before any work ---------------------------------------------------------


def check_parquet(
    storage: Storage,
    files: Sequence[SourceFile],
    options: SourceOptions,
    metadata: Mapping[str, MetadataOptions],
    where: str,
) -> list[pq.FileMetaData]:
    """Read every footer and compare its schema with what the config names; refuse before any work."""
    with ThreadPoolExecutor(FOOTER_THREADS) as pool:
        footers = list(pool.map(lambda file: _footer(file.filesystem(storage), file, where), files))
    for file, footer in zip(files, footers, strict=True):
        schema = footer.schema.to_arrow_schema()
        wrong = [] if _is_text(schema, options.text) else [options.text]
        wrong += [
            key
            for key, one in metadata.items()
            if not (_fits(schema, key, one.kind) or (key not in schema.names and one.default is not None))
        ]
        if wrong:
            needed = ", ".join([f"{options.text}: string", *(f"{key}: {one.kind}" for key, one in metadata.items())])
            found = ", ".join(f"{item.name}: {item.type}" for item in schema)
            raise DataError(
                f"{where}: {file.shown} does not have {', '.join(map(repr, wrong))} as needed. "
                f"Found the columns [{found}]; needed [{needed}]. Correct the config, or the file."
            )
    return footers


def _footer(filesystem: pafs.FileSystem, file: SourceFile, where: str) -> pq.FileMetaData:
    try:
        with filesystem.open_input_file(file.path) as stream:
            return pq.read_metadata(stream)
    except (*READ_ERRORS, ValueError) as error:
        raise DataError(
            f"{where}: {file.shown} is not a whole Parquet file ({first_line(error)}). Restore it, or leave it out."
        ) from error


def _plain(type_: pa.DataType) -> pa.DataType:
    return type_.value_type if pa.types.is_dictionary(type_) else type_


def _is_text(schema: pa.Schema, name: str) -> bool:
    return schema.names.count(name) == 1 and _fits(schema, name, "string")


def _fits(schema: pa.Schema, name: str, kind: str) -> bool:
    if schema.names.count(name) != 1:
        return False
    found = _plain(schema.field(name).type)
    types = pa.types
    if kind == "string":
        return types.is_string(found) or types.is_large_string(found) or types.is_string_view(found)
    return types.is_integer(found) or (kind == "float64" and types.is_floating(found))


# --- units -----------------------------------------------------------------------------------


def cut_units(
    files: Sequence[SourceFile],
    options: SourceOptions,
    unit_bytes: int,
    footers: Mapping[int, pq.FileMetaData],
) -> list[tuple[Slice, ...]]:
    """The files in order, cut where they may be cut, and put together while they are small."""
    units: list[tuple[Slice, ...]] = []
    gathered: list[Slice] = []
    gathered_bytes = 0
    for number, file in enumerate(files):
        for part, part_bytes in _cut_file(number, file, options, unit_bytes, footers.get(number)):
            if gathered and gathered_bytes + part_bytes > unit_bytes:
                units.append(tuple(gathered))
                gathered, gathered_bytes = [], 0
            gathered.append(part)
            gathered_bytes += part_bytes
    if gathered:
        units.append(tuple(gathered))
    return units


def _cut_file(
    number: int, file: SourceFile, options: SourceOptions, unit_bytes: int, footer: pq.FileMetaData | None
) -> Iterator[tuple[Slice, int]]:
    if footer is not None:
        start, gathered = 0, 0
        for group in range(footer.num_row_groups):
            size = footer.row_group(group).total_byte_size
            if gathered and gathered + size > unit_bytes:
                yield Slice(number, start, group), gathered
                start, gathered = group, 0
            gathered += size
        if footer.num_row_groups > start:
            yield Slice(number, start, footer.num_row_groups), gathered
    elif _is_cut_by_bytes(file, options) and file.size > unit_bytes:
        for start in range(0, file.size, unit_bytes):
            stop = min(start + unit_bytes, file.size)
            yield Slice(number, start, stop), stop - start
    else:
        yield Slice(number), file.size


def _is_cut_by_bytes(file: SourceFile, options: SourceOptions) -> bool:
    return file.compression is None and (file.format == "jsonl" or options.split == "lines")


# --- values ---------------------------------------------------------------------------


def is_utf8(text: str) -> bool:
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def cast_value(value: Any, kind: str) -> Any:
    """The value as its metadata type, or None if it is not of that type; nothing is guessed."""
    if kind == "string":
        return value if isinstance(value, str) and is_utf8(value) else None
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    if kind == "int64":
        whole = int(value) if math.isfinite(value) and value == int(value) else None
        return whole if whole is not None and -(1 << 63) <= whole < 1 << 63 else None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:
        return None


def first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
