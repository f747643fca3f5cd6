"""Read a whole corpus again and name everything that is not as its manifest says.

One fault does not hide the next: every check adds its lines. Shards are read by several threads, one
shard at a time each; hashing and the sums release the interpreter.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from mixer.core.errors import DataError
from mixer.data.corpus import Corpus
from mixer.data.manifest import TOKENIZER, DomainInfo, tokenizer_identity
from mixer.data.shards import Rows, check_rows, faulty_row, flat_starts
from mixer.data.storage import READ_ERRORS

SHOWN_ROWS = 5
SLICE_ROWS = 2048
MAX_THREADS = 8

Progress = Callable[[int, int], None]  # bytes done, bytes in all


@dataclass(slots=True)
class _Facts:
    """What one shard says of its domain's documents, and what is wrong with the shard."""

    faults: list[str] = field(default_factory=list)
    tokens: int = 0
    rows: int = 0
    begun_n: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))  # documents that start here
    part_document_n: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    part_tokens_n: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))


def verify(corpus: Corpus, *, threads: int = 2, progress: Progress | None = None) -> list[str]:
    """All differences between a corpus and its manifest, one line each, in the order of the manifest."""
    total = sum(num_bytes for _, _, num_bytes in corpus.files())
    done = 0
    facts: dict[int, _Facts] = {}
    with ThreadPoolExecutor(min(threads, MAX_THREADS)) as pool:
        jobs = {pool.submit(_verify_shard, corpus, number): number for number in range(len(corpus.shards))}
        for job in as_completed(jobs):
            number = jobs[job]
            facts[number] = job.result()
            done += corpus.shards[number].bytes
            if progress:
                progress(done, total)
    lines = list(_verify_tokenizer(corpus))
    number = 0
    for name, domain in corpus.manifest.domains.items():
        parts = [facts[number + place] for place in range(len(domain.shards))]
        number += len(domain.shards)
        for part in parts:
            lines += part.faults
        lines += _verify_domain(corpus, name, domain, parts)
        if progress and domain.documents_file:
            done += domain.documents_file.bytes
            progress(done, total)
    return lines


def _verify_shard(corpus: Corpus, number: int) -> _Facts:
    info = corpus.shards[number]
    where = f"domain {corpus.shard_domains[number]!r}: {info.path}"
    facts = _Facts()
    size, sha256 = _hash(corpus, info.path, facts.faults, where)
    if sha256 is None:
        return facts
    if size != info.bytes:
        facts.faults.append(f"{where} has {size} bytes; the manifest says {info.bytes}")
        return facts
    if sha256 != info.sha256:
        facts.faults.append(f"{where} has sha256 {sha256[:16]}...; the manifest says {info.sha256[:16]}...")
    try:
        shard = corpus.open_shard(number)
        tokens = shard.read(0, len(shard))
        _verify_rows(
            corpus,
            where,
            shard.columns([n for n in shard.layout.schema.names if n != "tokens"]),
            tokens,
            facts,
        )
    except (DataError, *READ_ERRORS) as error:
        facts.faults.append(str(error))
    return facts


def _verify_rows(corpus: Corpus, where: str, small: pa.RecordBatch, tokens: np.ndarray, facts: _Facts) -> None:
    """Check values, lengths, starts, padding and the range of tokens of one shard."""
    small.validate(full=True)
    nulls = [name for name in ("length", "starts", "first_document", "check") if small.column(name).null_count]
    if nulls:
        facts.faults.append(f"{where} has empty values in {', '.join(nulls)}")
        return
    length = small.column("length").to_numpy()
    starts = small.column("starts")
    first_document = small.column("first_document").to_numpy()
    rows = Rows(tokens=tokens, length=length, starts=starts, first_document=first_document)
    facts.faults += _verify_tokens(corpus, where, rows, small.column("check").to_numpy())
    fault = faulty_row(rows)
    if fault is not None:
        facts.faults.append(f"{where} row {fault[0]}: {fault[1]}")
        return
    facts.rows = len(tokens)
    facts.tokens = int(length.sum(dtype=np.int64))
    _collect_documents(rows, facts)


def _verify_tokens(corpus: Corpus, where: str, rows: Rows, check: NDArray[np.uint64]) -> Iterator[str]:
    """Check values, range and padding, a slice of rows at a time to spare memory."""
    tokenizer = corpus.manifest.tokenizer
    place = np.arange(rows.tokens.shape[1])
    wrong = np.zeros((3, len(rows)), dtype=bool)
    for first in range(0, len(rows), SLICE_ROWS):
        part = slice(first, first + SLICE_ROWS)
        tokens = rows.tokens[part]
        wrong[0, part] = check_rows(tokens) != check[part]
        wrong[1, part] = tokens.max(axis=1) >= tokenizer.vocab_size
        is_short = rows.length[part] < len(place)
        short = tokens[is_short]
        is_padding = place >= rows.length[part][is_short, None]
        wrong[2, part][is_short] = (is_padding & (short != tokenizer.eos)).any(axis=1)
    yield from _name_rows(where, np.flatnonzero(wrong[0]), "does not add up to its check value")
    outside = f"has tokens outside of the vocabulary of {tokenizer.vocab_size}"
    yield from _name_rows(where, np.flatnonzero(wrong[1]), outside)
    yield from _name_rows(where, np.flatnonzero(wrong[2]), "has padding that is not EOS")


def _collect_documents(rows: Rows, facts: _Facts) -> None:
    """Which documents begin here, and how many tokens of which document the shard holds."""
    flat, row_of_start, offset = flat_starts(rows.starts)
    length = rows.length.astype(np.int64)
    num_starts = np.diff(offset)
    begins = np.zeros(len(length), dtype=bool)
    has = np.flatnonzero(num_starts)
    begins[has] = flat[offset[has]] == 0
    rank = np.arange(len(flat)) - offset[row_of_start]
    facts.begun_n = rows.first_document[row_of_start] + rank + ~begins[row_of_start]
    # Each start's part of the row ends at the next start, or with the text.
    ends = np.append(flat[1:], 0)
    is_last = rank == num_starts[row_of_start] - 1
    ends = np.where(is_last, length[row_of_start], ends)
    carried = np.flatnonzero(~begins)  # rows that begin inside of a document
    carried_stop = length.copy()
    carried_stop[has] = flat[offset[has]]
    facts.part_document_n = np.concatenate([facts.begun_n, rows.first_document[carried]])
    facts.part_tokens_n = np.concatenate([ends - flat, carried_stop[carried]])


def _verify_domain(corpus: Corpus, name: str, domain: DomainInfo, parts: list[_Facts]) -> Iterator[str]:
    """Counts, and the documents file against what the shards hold."""
    where = f"domain {name!r}"
    complete = all(part.rows for part in parts)
    row_tokens = corpus.manifest.layout.row_tokens
    tokens = sum(part.tokens for part in parts)
    if complete and tokens != domain.tokens:
        yield f"{where} has {tokens} tokens; the manifest says {domain.tokens}"
    if complete and domain.rows * row_tokens - tokens != domain.padding:
        yield f"{where} has {domain.rows * row_tokens - tokens} padding; the manifest says {domain.padding}"
    info = domain.documents_file
    if info is None:
        return
    faults: list[str] = []
    size, sha256 = _hash(corpus, info.path, faults, f"{where}: {info.path}")
    yield from faults
    if sha256 is not None and (size, sha256) != (info.bytes, info.sha256):
        yield (
            f"{where}: {info.path} has {size} bytes, sha256 {sha256[:16]}; the manifest says {info.bytes}, "
            f"{info.sha256[:16]}"
        )
    try:
        table = corpus.documents(name)
        table.validate(full=True)
    except (DataError, *READ_ERRORS) as error:
        if not faults:
            yield str(error)
        return
    if table.num_rows != domain.documents:
        yield f"{where}: {info.path} lists {table.num_rows} documents; the manifest says {domain.documents}"
        return
    if any(column.null_count for column in table.columns):
        yield f"{where}: {info.path} has empty values"
        return
    file_n = table.column("file").to_numpy()
    if len(file_n) and not (file_n.min() >= 0 and file_n.max() < len(domain.sources)):
        yield f"{where}: {info.path} names sources outside of the {len(domain.sources)} in the manifest"
    if complete and parts:
        yield from _compare_documents(f"{where}: {info.path}", table.column("tokens").to_numpy(), parts)


def _compare_documents(where: str, listed_n: NDArray[np.int64], parts: list[_Facts]) -> Iterator[str]:
    begun = np.concatenate([part.begun_n for part in parts])
    document = np.concatenate([part.part_document_n for part in parts])
    if len(document) and not (document.min() >= 0 and document.max() < len(listed_n)):
        yield f"{where} lists {len(listed_n)} documents; the shards hold number {int(document.max())}"
        return
    times = np.bincount(begun, minlength=len(listed_n))
    bad = np.flatnonzero(times != 1)
    if len(bad):
        yield f"{where}: document {int(bad[0])} starts {int(times[bad[0]])} times ({len(bad)} such)"
    held = np.zeros(len(listed_n), dtype=np.int64)
    np.add.at(held, document, np.concatenate([part.part_tokens_n for part in parts]))
    bad = np.flatnonzero(held != listed_n)
    if len(bad):
        first = int(bad[0])
        found = f"{listed_n[first]} tokens, in the shards {held[first]} ({len(bad)} such)"
        yield f"{where}: document {first} has {found}"


def _verify_tokenizer(corpus: Corpus) -> Iterator[str]:
    """A tokenizer.json must be the one that the manifest names."""
    tokenizer = corpus.manifest.tokenizer
    if tokenizer.kind != "hf":
        return
    try:
        with corpus.filesystem.open_input_stream(f"{corpus.root}/{TOKENIZER}", compression=None) as stream:
            identity = tokenizer_identity(stream.read().decode(), tokenizer.eos)
    except FileNotFoundError:
        yield f"{TOKENIZER} is missing"
    except (json.JSONDecodeError, AttributeError, *READ_ERRORS) as error:
        yield f"{TOKENIZER} cannot be read: {error}"
    else:
        if identity != tokenizer.identity:
            yield f"{TOKENIZER} is tokenizer {identity[:16]}; the manifest says {tokenizer.identity[:16]}"


def _hash(corpus: Corpus, path: str, faults: list[str], where: str) -> tuple[int, str | None]:
    """Size and sha256 of a file, or None and a fault."""
    digest = hashlib.sha256()
    size = 0
    try:
        with corpus.filesystem.open_input_stream(f"{corpus.root}/{path}", compression=None) as stream:
            while block := stream.read(1 << 23):
                digest.update(block)
                size += len(block)
    except FileNotFoundError:
        faults.append(f"{where} is missing")
        return 0, None
    except READ_ERRORS as error:
        faults.append(f"{where} cannot be read: {error}")
        return 0, None
    return size, digest.hexdigest()


def _name_rows(where: str, bad: NDArray[np.intp], what: str) -> Iterator[str]:
    for row in bad[:SHOWN_ROWS].tolist():
        yield f"{where} row {row} {what}"
    if len(bad) > SHOWN_ROWS:
        yield f"{where} and {len(bad) - SHOWN_ROWS} rows more: {what}"
