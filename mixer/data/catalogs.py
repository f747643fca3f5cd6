"""Catalog files: the rows of a corpus under other names. Small, and never a copy of a token.

A domain is a list of spans (shard, start, stop), shards numbered as in the corpus. A file reads:

    {"format": 1, "corpus": "<fingerprint>", "made_by": {...},
     "sources": {"<source domain>": ["<sha256>", ...]},
     "domains": {"<name>": {"rows": 812, "spans": [[0, 0, 64], [3, 16, 80]]}, ...}, "check": "<sha256>"}

Long lists of spans are packed into text by `pack`. `sources` is there to say *which* shard differs when a
catalog is opened against another corpus.
"""

import base64
import hashlib
import json
import os
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.fs as pafs
from numpy.typing import NDArray

from mixer.core.errors import DataError
from mixer.data.corpus import START, STOP, CatalogRows, Corpus, count_rows
from mixer.data.storage import put

FORMAT = 1
READABLE_SPANS = 32  # up to so many are written as JSON numbers
SPAN_NUMBERS = 3
MAX_SPANS = 1 << 40
KEYS = ("format", "corpus", "made_by", "sources", "domains", "check")

Spans = NDArray[np.int64]


def save_catalog(rows: CatalogRows, path: str | os.PathLike[str], made_by: Mapping[str, Any] | None = None) -> None:
    """Write a catalog file, whole or not at all."""
    target = Path(path).absolute()
    put(pafs.LocalFileSystem(), str(target.parent), target.name, _text(to_dict(rows, made_by)).encode())


def open_catalog(corpus: Corpus, path: str | os.PathLike[str]) -> CatalogRows:
    """Read a catalog file. Refused: one that is damaged, or was made for another corpus."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DataError(f"catalog {path} is missing. Give the path of a file that `mixer catalog` wrote.") from error
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"catalog {path} cannot be read: {error}. Make it again with `mixer catalog`.") from error
    try:
        return from_dict(corpus, value)
    except DataError as error:
        raise DataError(f"catalog {path}: {error}") from error


def to_dict(rows: CatalogRows, made_by: Mapping[str, Any] | None = None) -> dict[str, Any]:
    domains: dict[str, Any] = {}
    for number, domain in enumerate(rows.catalog.domains):
        spans_s3 = rows.spans_of(number)
        written = spans_s3.tolist() if len(spans_s3) <= READABLE_SPANS else pack(spans_s3)
        domains[domain.name] = {"rows": domain.num_rows, "spans": written}
    value: dict[str, Any] = {
        "format": FORMAT,
        "corpus": rows.corpus.fingerprint,
        "made_by": dict(made_by or {}),
        "sources": _sources(rows.corpus),
        "domains": domains,
    }
    return value | {"check": _check(value)}


def from_dict(corpus: Corpus, value: object) -> CatalogRows:
    """A catalog from the content of its file, every part of it checked."""
    if not isinstance(value, dict) or not isinstance(value.get("format"), int):
        raise DataError("this is not a catalog file. Make it with `mixer catalog`.")
    if value["format"] > FORMAT:
        raise DataError(f"it has format {value['format']}; this version reads up to {FORMAT}. Use a newer mixer.")
    damaged = "It was edited or damaged: make it again with `mixer catalog`."
    if set(value) != set(KEYS) or value["check"] != _check({key: value[key] for key in KEYS[:-1]}):
        raise DataError(f"its content does not match its check value. {damaged}")
    if value["corpus"] != corpus.fingerprint:
        lines = _differences(value["sources"], _sources(corpus)) or ["counts or tokenizer differ"]
        raise DataError(
            f"it was made for corpus {str(value['corpus'])[:16]}, this one is {corpus.fingerprint[:16]}: "
            f"{'; '.join(lines)}. Open that corpus, or make the catalog again for this one."
        )
    rows_of_shard = np.array([shard.rows for shard in corpus.shards], dtype=np.int64)
    spans: dict[str, Spans] = {}
    try:
        for name, entry in value["domains"].items():
            written = entry["spans"]
            part = (
                unpack(written, int(rows_of_shard.sum()))
                if isinstance(written, str)
                else np.array(written, dtype=np.int64).reshape(-1, 3)
            )
            good = (part >= 0).all() and (part[:, START] < part[:, STOP]).all()
            if (
                not good
                or (part[:, 0] >= len(rows_of_shard)).any()
                or (part[:, STOP] > rows_of_shard[part[:, 0]]).any()
            ):
                raise DataError(f"domain {name!r} lists rows that no shard has. {damaged}")
            if count_rows(part) != entry["rows"]:
                raise DataError(f"domain {name!r} lists {count_rows(part)} rows and says {entry['rows']}. {damaged}")
            spans[name] = part
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise DataError(f"its domains cannot be read: {error!r}. {damaged}") from error
    return CatalogRows(corpus, spans)


def pack(spans_s3: Spans) -> str:
    """Spans as text: differences from span to span, little-endian int64, zlib if that is shorter, base64.

    In (shard step, gap since the last stop, length) most numbers of an ordered list are small or equal.
    """
    spans_s3 = np.asarray(spans_s3, dtype=np.int64)
    numbers = np.empty_like(spans_s3)
    numbers[:, 0] = np.diff(spans_s3[:, 0], prepend=0)
    same_shard = np.concatenate([[False], spans_s3[1:, 0] == spans_s3[:-1, 0]])
    numbers[:, 1] = spans_s3[:, START] - np.where(same_shard, np.roll(spans_s3[:, STOP], 1), 0)
    numbers[:, 2] = spans_s3[:, STOP] - spans_s3[:, START]
    raw = np.ascontiguousarray(numbers.T).astype("<i8").tobytes()
    small = zlib.compress(raw, 6)
    kind, content = ("z", small) if len(small) < len(raw) else ("r", raw)
    return f"{kind}{len(spans_s3)}:{base64.b64encode(content).decode()}"


def unpack(text: str, max_spans: int = MAX_SPANS) -> Spans:
    """The spans that `pack` wrote; `DataError` for anything else."""
    try:
        head, _, body = text.partition(":")
        kind, num_spans = head[:1], int(head[1:])
        if not 0 <= num_spans <= max_spans:
            raise ValueError(f"{num_spans} spans where there can be {max_spans}")
        num_bytes = num_spans * SPAN_NUMBERS * 8
        content = base64.b64decode(body, validate=True)
        if kind == "z":  # never more than was announced: a small file must not fill the memory
            content = zlib.decompressobj().decompress(content, num_bytes + 1)
        if kind not in ("z", "r") or len(content) != num_bytes:
            raise ValueError(f"{kind!r} with {len(content)} bytes for {num_spans} spans")
    except (ValueError, zlib.error) as error:
        raise DataError(
            f"packed spans cannot be read: {error}. Make the catalog again with `mixer catalog`."
        ) from error
    numbers = np.frombuffer(content, "<i8").reshape(SPAN_NUMBERS, num_spans).T
    spans_s3 = np.empty((num_spans, SPAN_NUMBERS), dtype=np.int64)
    spans_s3[:, 0] = np.cumsum(numbers[:, 0])
    # Starts and stops within a shard are a running sum of gaps and lengths, begun anew at each shard.
    run = np.cumsum(numbers[:, 1] + numbers[:, 2])
    new_shard = np.concatenate([[True], numbers[1:, 0] != 0])[:num_spans]
    first = np.maximum.accumulate(np.where(new_shard, np.arange(num_spans), 0))
    base = np.concatenate([[0], run])[first]
    spans_s3[:, STOP] = run - base
    spans_s3[:, START] = spans_s3[:, STOP] - numbers[:, 2]
    return spans_s3


def _text(value: Mapping[str, Any]) -> str:
    """JSON for people: a line for each domain."""
    lines: list[str] = []
    for key, part in value.items():
        if isinstance(part, dict) and part:
            inner = ",\n  ".join(f"{json.dumps(name)}: {json.dumps(entry)}" for name, entry in part.items())
            lines.append(f"{json.dumps(key)}: {{\n  {inner}}}")
        else:
            lines.append(f"{json.dumps(key)}: {json.dumps(part)}")
    return "{" + ",\n ".join(lines) + "}\n"


def _sources(corpus: Corpus) -> dict[str, list[str]]:
    return {name: [shard.sha256 for shard in d.shards] for name, d in corpus.manifest.domains.items()}


def _differences(before: Mapping[str, Sequence[str]], after: Mapping[str, Sequence[str]]) -> list[str]:
    lines = [f"domain {name!r} is not in it" for name in before if name not in after]
    lines += [f"domain {name!r} is new" for name in after if name not in before]
    for name in before:
        if name not in after or list(before[name]) == list(after[name]):
            continue
        pairs: Iterable[tuple[str, str]] = zip(before[name], after[name], strict=False)
        changed = [place for place, (one, other) in enumerate(pairs) if one != other]
        if changed:
            lines.append(f"shard {changed[0]} of domain {name!r} has other content")
        else:
            lines.append(f"domain {name!r} had {len(before[name])} shards and has {len(after[name])}")
    return lines


def _check(value: Mapping[str, Any]) -> str:
    text = json.dumps(value, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
