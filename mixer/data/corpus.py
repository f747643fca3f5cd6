"""A corpus: its manifest, its shards, and where any row of any catalog lies.

Rows are found by arithmetic: a catalog's domains are lists of spans (shard, start, stop), all spans lie
in one cumulative array in catalog order, and a search in it turns (domain, row) into (shard, row). So
a domain may be a whole source, a topic or a selection by scores, and no token is ever copied for it.
"""

import hashlib
import json
import os
import threading
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
from numpy.typing import NDArray

from mixer.core.catalog import Catalog, Domain
from mixer.core.errors import DataError
from mixer.data import documents, shards
from mixer.data.manifest import MANIFEST, Manifest, parse_manifest
from mixer.data.shards import Shard, ShardInfo
from mixer.data.storage import READ_ERRORS, Storage, local_path

MAX_OPEN_SHARDS = 16_384  # each is a memory map, of which Linux grants a process 65,530
OPEN_THREADS = 16
SHARD, START, STOP = 0, 1, 2  # the columns of spans_s3

Check = Literal["shards", "sizes", "none"]


class Document(NamedTuple):
    """Where a token comes from."""

    domain: str  # the source domain
    number: int  # of the document within the source domain
    source: str
    record: int  # line, row or record number in `source`


class Corpus:
    """An opened corpus. Immutable; pickles as its manifest and place, and opens shards when they are used."""

    def __init__(self, manifest: Manifest, filesystem: pafs.FileSystem, root: str, *, drop_empty: bool = False):
        self.manifest = manifest
        self.filesystem = filesystem
        self.root = root.rstrip("/")
        self.drop_empty = drop_empty
        self.shards: tuple[ShardInfo, ...] = tuple(
            shard for domain in manifest.domains.values() for shard in domain.shards
        )
        self.shard_domains: tuple[str, ...] = tuple(
            name for name, domain in manifest.domains.items() for _ in domain.shards
        )
        self._open: dict[int, Shard] = {}
        self._documents: dict[str, pa.Table] = {}
        self._lock = threading.Lock()

    @classmethod
    def open(
        cls,
        uri: str | os.PathLike[str],
        *,
        storage: Storage | None = None,
        filesystem: pafs.FileSystem | None = None,
        check: Check | None = None,
        drop_empty: bool = False,
    ) -> "Corpus":
        """Read the manifest and refuse a corpus that is not what it says.

        `check` "shards" opens every shard (the default on local disk), "sizes" compares what the store
        lists (the default elsewhere), "none" leaves it to the first use. With `filesystem`, `uri` is a
        path in it. Domains without rows are refused when the catalog is asked for, unless `drop_empty`.
        """
        if filesystem is None:
            filesystem, root = (storage or Storage()).locate(os.fspath(uri))
        else:
            root = os.fspath(uri)
        corpus = cls(read_manifest(filesystem, root), filesystem, root, drop_empty=drop_empty)
        is_local = local_path(filesystem, root) is not None
        check = check or ("shards" if is_local else "sizes")
        if is_local:
            corpus._refuse_links_out()
        if check == "shards":
            with ThreadPoolExecutor(OPEN_THREADS) as pool:
                list(pool.map(corpus.shard, range(len(corpus.shards))))
        elif check == "sizes":
            corpus._require_sizes()
        return corpus

    def __getstate__(self) -> dict[str, Any]:
        kept = ("manifest", "filesystem", "root", "drop_empty")
        return {name: self.__dict__[name] for name in kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        drop_empty = state.pop("drop_empty")
        self.__init__(**state, drop_empty=drop_empty)

    @property
    def fingerprint(self) -> str:
        return self.manifest.fingerprint

    @cached_property
    def by_source(self) -> "CatalogRows":
        """The catalog of source domains, with the place of its rows."""
        spans: dict[str, NDArray[np.int64]] = {}
        number = 0
        for name, domain in self.manifest.domains.items():
            numbers = np.arange(number, number + len(domain.shards), dtype=np.int64)
            number += len(domain.shards)
            rows = np.array([shard.rows for shard in domain.shards], dtype=np.int64)
            spans[name] = np.stack([numbers, np.zeros_like(rows), rows], axis=1)
        empty = [name for name, domain in self.manifest.domains.items() if domain.rows == 0]
        if empty and not self.drop_empty:
            raise DataError(
                f"domain {', '.join(map(repr, empty))} of {self.root} has no rows; every domain needs "
                "at least one. Give it text and prepare again, or drop it when the corpus is opened."
            )
        return CatalogRows(self, {name: spans_s3 for name, spans_s3 in spans.items() if name not in empty})

    @property
    def catalog(self) -> Catalog:
        return self.by_source.catalog

    def locate(
        self, domain_n: NDArray[np.integer], row_n: NDArray[np.integer]
    ) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        return self.by_source.locate(domain_n, row_n)

    def document_of(self, domain: int | str, row: int, position: int) -> Document:
        return self.by_source.document_of(domain, row, position)

    def shard(self, number: int) -> Shard:
        """The shard of that number, opened once and kept open."""
        shard = self._open.get(number)
        if shard is None:
            shard = self.open_shard(number)
            with self._lock:
                while len(self._open) >= MAX_OPEN_SHARDS:
                    self._open.pop(next(iter(self._open)))
                self._open[number] = shard
        return shard

    def open_shard(self, number: int) -> Shard:
        """The shard of that number, for the caller alone: it is closed when the caller drops it."""
        info, domain = self.shards[number], self.shard_domains[number]
        return shards.open(self.filesystem, self.root, info, self.manifest.layout, domain=domain)

    def documents(self, domain: str) -> pa.Table:
        """The documents of a source domain, by number; read once and kept."""
        if domain not in self._documents:
            info = self.manifest.domains[domain].documents_file
            if info is None:
                raise DataError(f"domain {domain!r} of {self.root} lists no documents. Prepare the corpus again.")
            self._documents[domain] = documents.read(self.filesystem, self.root, info)
        return self._documents[domain]

    def files(self) -> Iterable[tuple[str, str, int]]:
        """Every file that the manifest lists: domain, path, bytes."""
        for name, domain in self.manifest.domains.items():
            for shard in domain.shards:
                yield name, shard.path, shard.bytes
            if domain.documents_file is not None:
                yield name, domain.documents_file.path, domain.documents_file.bytes

    def _refuse_links_out(self) -> None:
        root = local_path(self.filesystem, self.root)
        assert root is not None
        inside = os.path.realpath(root) + os.sep
        for name, path, _ in self.files():
            real = os.path.realpath(root / path)
            if not real.startswith(inside):
                raise DataError(
                    f"{root / path} of domain {name!r} is a link to {real}, outside of the corpus {root}. "
                    "Files must lie under the corpus root: copy it there."
                )

    def _require_sizes(self) -> None:
        if local_path(self.filesystem, self.root) is None:
            listed = self.filesystem.get_file_info(pafs.FileSelector(self.root, recursive=True))
        else:
            listed = self.filesystem.get_file_info([f"{self.root}/{path}" for _, path, _ in self.files()])
        size_of = {info.path: info.size for info in listed if info.type == pafs.FileType.File}
        for name, path, num_bytes in self.files():
            size = size_of.get(f"{self.root}/{path}")
            if size != num_bytes:
                found = "is missing" if size is None else f"has {size} bytes; the manifest says {num_bytes}"
                raise DataError(
                    f"{self.root}/{path} of domain {name!r} {found}. Restore it, or prepare the domain again."
                )


class CatalogRows:
    """A catalog over a corpus, and where its rows lie: by domain, spans (n, 3) of shard, start, stop."""

    def __init__(self, corpus: Corpus, spans: Mapping[str, NDArray[np.int64]]) -> None:
        self.corpus = corpus
        sha_n = np.array([bytes.fromhex(shard.sha256) for shard in corpus.shards], dtype="V32")
        merged = {name: merge_spans(spans_s3) for name, spans_s3 in spans.items()}
        manifest = corpus.manifest
        self.catalog = Catalog(
            manifest.layout.row_tokens,
            str(manifest.tokenizer),
            tuple(Domain(name, count_rows(part), content_of(sha_n, part)) for name, part in merged.items()),
        )
        self.spans_s3 = np.concatenate([merged[name] for name in self.catalog.names])
        num_spans_d = [len(merged[name]) for name in self.catalog.names]
        self._first_span_d = np.concatenate([[0], np.cumsum(num_spans_d, dtype=np.int64)])
        _require_disjoint(self)
        # The k-th row of the catalog, counted over all domains in order, lies in the last span that
        # begins at or before k.
        self._begin_s = _begins(self.spans_s3[:, STOP] - self.spans_s3[:, START])
        self._base_d = _begins(self.catalog.num_rows_d)
        self._shift_s = self.spans_s3[:, START] - self._begin_s
        self._shard_s = self.spans_s3[:, SHARD].astype(np.int32)

    @property
    def shards(self) -> Sequence[ShardInfo]:
        return self.corpus.shards

    @property
    def is_mapped(self) -> bool:
        """Whether tokens are memory-mapped; else they are fetched from an object store."""
        return local_path(self.corpus.filesystem, self.corpus.root) is not None

    def shard(self, number: int) -> Shard:
        return self.corpus.shard(number)

    def spans_of(self, domain: int) -> NDArray[np.int64]:
        return self.spans_s3[self._first_span_d[domain] : self._first_span_d[domain + 1]]

    def locate(
        self, domain_n: NDArray[np.integer], row_n: NDArray[np.integer]
    ) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """Shard number and row in it, of rows by domain number and row number in the domain."""
        domain_n, row_n = np.asarray(domain_n, dtype=np.int64), np.asarray(row_n, dtype=np.int64)
        num_domains = len(self.catalog)
        bad = (domain_n < 0) | (domain_n >= num_domains)
        bad |= (row_n < 0) | (row_n >= self.catalog.num_rows_d[np.where(bad, 0, domain_n)])
        if bad.any():
            first = int(np.flatnonzero(bad)[0])
            domain, row = int(domain_n[first]), int(row_n[first])
            if not 0 <= domain < num_domains:
                raise DataError(f"domain number {domain} of {num_domains}. Use the catalog that the rows belong to.")
            name, num_rows = self.catalog.names[domain], int(self.catalog.num_rows_d[domain])
            raise DataError(
                f"row {row} of domain {name!r}, which has {num_rows}. Use the catalog that the rows belong to."
            )
        place_n = self._base_d[domain_n] + row_n
        span_n = np.searchsorted(self._begin_s, place_n, side="right") - 1
        return self._shard_s[span_n], place_n + self._shift_s[span_n]

    def document_of(self, domain: int | str, row: int, position: int) -> Document:
        """Which document of which source file the token at `position` of a row belongs to."""
        number = domain if isinstance(domain, int) else self.catalog.index.get(domain, -1)
        shard_n, place_n = self.locate(np.array([number]), np.array([row]))
        shard, place = self.corpus.shard(int(shard_n[0])), int(place_n[0])
        length = int(shard.length[place])
        if not 0 <= position < length:
            raise DataError(
                f"position {position} of row {row} of domain {domain!r}, which has {length} tokens of text. "
                "Ask for a position in the text: what follows it is padding."
            )
        starts = np.asarray(shard.starts[place].values)
        before = int(np.searchsorted(starts, position, side="right"))
        begins_there = len(starts) > 0 and starts[0] == 0
        document = int(shard.first_document[place]) + before - int(begins_there)
        source_domain = self.corpus.shard_domains[int(shard_n[0])]
        table = self.corpus.documents(source_domain)
        sources = self.corpus.manifest.domains[source_domain].sources
        if not 0 <= document < table.num_rows:
            raise DataError(
                f"row {row} of domain {domain!r} holds document {document}; {source_domain!r} lists "
                f"{table.num_rows}. Run `mixer corpus verify`."
            )
        file = table.column("file")[document].as_py()
        source = sources[file] if 0 <= file < len(sources) else f"(source {file}, not listed)"
        return Document(source_domain, document, source, table.column("record")[document].as_py())


def read_manifest(filesystem: pafs.FileSystem, root: str) -> Manifest:
    where = f"{root}/{MANIFEST}"
    try:
        with filesystem.open_input_stream(where, compression=None) as stream:
            text = stream.read().decode()
        value = json.loads(text, object_pairs_hook=_refuse_double_keys)
    except FileNotFoundError as error:
        raise DataError(
            f"{where} is missing: this is no corpus, or its preparation was not finished. Run `mixer prepare`."
        ) from error
    except (ValueError, RecursionError, *READ_ERRORS) as error:
        raise DataError(f"{where} is not a manifest: {error}. Restore it, or prepare the corpus again.") from error
    try:
        return parse_manifest(value)
    except DataError as error:
        raise DataError(f"{root}: {error}") from error


def merge_spans(spans_s3: NDArray[np.int64]) -> NDArray[np.int64]:
    """The same rows in the same order in as few spans as can be: one form for one content."""
    spans_s3 = np.asarray(spans_s3, dtype=np.int64).reshape(-1, 3)
    spans_s3 = spans_s3[spans_s3[:, STOP] > spans_s3[:, START]]
    if len(spans_s3) == 0:
        return spans_s3
    joined = (spans_s3[1:, SHARD] == spans_s3[:-1, SHARD]) & (spans_s3[1:, START] == spans_s3[:-1, STOP])
    first = np.flatnonzero(np.concatenate([[True], ~joined]))
    last = np.append(first[1:], len(spans_s3)) - 1
    return np.column_stack([spans_s3[first, SHARD], spans_s3[first, START], spans_s3[last, STOP]])


def count_rows(spans_s3: NDArray[np.int64]) -> int:
    return int((spans_s3[:, STOP] - spans_s3[:, START]).sum())


def content_of(sha_n: np.ndarray, spans_s3: NDArray[np.int64]) -> str:
    """What a domain's rows are, wherever they lie: sha256 over (shard's sha256, start, stop) of its spans."""
    records = np.empty(len(spans_s3), dtype=[("sha", "V32"), ("start", "<i8"), ("stop", "<i8")])
    records["sha"] = sha_n[spans_s3[:, SHARD]]
    records["start"] = spans_s3[:, START]
    records["stop"] = spans_s3[:, STOP]
    return hashlib.sha256(records.tobytes()).hexdigest()


def _begins(num_d: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.concatenate([[0], np.cumsum(num_d[:-1], dtype=np.int64)]).astype(np.int64)


def _require_disjoint(rows: CatalogRows) -> None:
    """No row twice: neither in two domains nor in one."""
    spans_s3 = rows.spans_s3
    order = np.lexsort((spans_s3[:, START], spans_s3[:, SHARD]))
    before, after = spans_s3[order[:-1]], spans_s3[order[1:]]
    double = np.flatnonzero((before[:, SHARD] == after[:, SHARD]) & (after[:, START] < before[:, STOP]))
    if len(double):
        pair = order[double[0]], order[double[0] + 1]
        names = [rows.catalog.names[int(np.searchsorted(rows._first_span_d, s, side="right")) - 1] for s in pair]
        shard, row = after[double[0], SHARD], after[double[0], START]
        raise DataError(
            f"row {row} of shard {rows.shards[int(shard)].path} is in domain {names[0]!r} and again in "
            f"{names[1]!r}. A row belongs to one domain of a catalog: take it out of the other."
        )


def _refuse_double_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} stands there twice")
    return value
