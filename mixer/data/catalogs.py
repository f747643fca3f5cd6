"""Catalog files: the rows of a corpus under other names. Small, and never a copy of a token.

A domain is a list of spans (shard, start, stop), shards numbered as in the corpus. A file reads:

    {"format": 1, "corpus": "<fingerprint>", "made_by": {...}, "sources": {"<source domain>": ["<sha256>", ...]},
     "domains": {"<name>": {"rows": 812, "spans": [[0, 0, 64], [3, 16, 80]]}, ...}, "check": "<sha256>"}

Long lists of spans are packed into text by `pack`. `sources` is there to say *which* shard differs when a
catalog is opened against another corpus. Everything that makes catalogs reads the small columns beside
the tokens only; rows keep the corpus's order within a domain.
"""

import base64
import hashlib
import json
import math
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.fs as pafs
import pyarrow.json
import pyarrow.parquet
from numpy.typing import NDArray

from mixer.core.errors import ConfigError, DataError
from mixer.data.corpus import START, STOP, CatalogRows, Corpus, count_rows, merge_spans
from mixer.data.shards import READ_ERRORS, put

FORMAT = 1
READABLE_SPANS = 32  # up to so many are written as JSON numbers
SPAN_NUMBERS = 3
NULL_NAME = "none"
EMPTY_NAME = "empty"
READ_THREADS = 8
KEYS = ("format", "corpus", "made_by", "sources", "domains", "check")

Spans = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """Which rows a new catalog takes, and under which names. All that is set applies together."""

    by: tuple[
        str, ...
    ] = ()  # metadata keys whose values, joined by "/", name the domains; else the source's name
    within_source: bool = False  # put the source domain's name before the values
    score: str | None = None  # a metadata column of numbers to select by
    cut: float | None = None  # keep rows with score >= cut, or < cut for keep="below"
    keep: str = "above"
    top_share: float | None = None  # of every new domain keep this share of its rows, by score
    rows: str | None = None  # a file that lists rows; only these are taken

    def __post_init__(self) -> None:
        if self.within_source and not self.by:
            raise ConfigError(
                "within_source without by: domains are then the sources already. Name keys with --by."
            )
        if len(set(self.by)) < len(self.by):
            raise ConfigError(f"by={','.join(self.by)} names a key twice. Name each once.")
        if self.keep not in ("above", "below"):
            raise ConfigError(f"keep={self.keep!r}; it is above or below.")
        chosen = (self.cut is not None) + (self.top_share is not None)
        if self.score is None and chosen:
            raise ConfigError("a cut or top_share without a score column. Name the column with --score.")
        if self.score is not None and chosen != 1:
            raise ConfigError(
                f"score={self.score} needs exactly one of cut and top_share; {chosen} are given."
            )
        if self.cut is not None and not math.isfinite(self.cut):
            raise ConfigError(f"cut={self.cut}; it must be a finite number.")
        if self.top_share is not None and not 0 < self.top_share <= 1:
            raise ConfigError(f"top_share={self.top_share}; it must be above 0 and at most 1.")
        if self.top_share is not None and self.keep != "above":
            raise ConfigError("keep=below goes with cut, not with top_share. Use a cut.")
        if not self.by and self.score is None and self.rows is None:
            raise ConfigError("nothing to select by. Give --by KEYS, --score COLUMN or --rows FILE.")

    def to_dict(self) -> dict[str, Any]:
        given = {name: getattr(self, name) for name in self.__slots__}
        return {name: list(value) if name == "by" else value for name, value in given.items() if value}


@dataclass(slots=True)
class _Taken:
    """Rows taken from one shard, in order: their number, the new domain's number, and their score."""

    shard: int
    row_n: NDArray[np.int64]
    name_n: NDArray[np.int64]
    score_n: NDArray[np.float64] | None


@dataclass(slots=True)
class _Names:
    """New domain names in order of first use, and what each was made from."""

    number: dict[str, int] = field(default_factory=dict)
    origin: dict[str, tuple[Any, ...]] = field(default_factory=dict)

    def add(self, name: str, origin: tuple[Any, ...]) -> int:
        if self.origin.setdefault(name, origin) != origin:
            raise DataError(
                f"two groups of rows, {self.origin[name]} and {origin}, would both be domain {name!r}. "
                "Name fewer keys with --by, or rename the values."
            )
        return self.number.setdefault(name, len(self.number))


def select(corpus: Corpus, selection: Selection) -> CatalogRows:
    """Make a catalog of the rows that a selection takes."""
    names = _Names()
    listed = None if selection.rows is None else _listed_rows(corpus, selection.rows)
    taken = [part for part in _take(corpus, selection, listed, names) if len(part.row_n)]
    spans: dict[str, Spans] = {}
    if selection.top_share is not None and taken:
        taken = _top(taken, selection.top_share, len(names.number))
    if taken:
        parts = [_spans_of(part) for part in taken]
        name_s = np.concatenate([part[0] for part in parts])
        spans_s3 = np.concatenate([part[1] for part in parts])
        order = np.argsort(name_s, kind="stable")
        cuts = np.searchsorted(name_s[order], np.arange(len(names.number) + 1))
        for name, number in names.number.items():
            own = merge_spans(spans_s3[order[cuts[number] : cuts[number + 1]]])
            if len(own):
                spans[name] = own
    if not spans:
        raise DataError(
            f"no row of {corpus.root} is selected by {json.dumps(selection.to_dict())}. A catalog needs at least one: "
            "select less strictly."
        )
    return CatalogRows(corpus, spans)


def save_catalog(
    rows: CatalogRows, path: str | os.PathLike[str], made_by: Mapping[str, Any] | None = None
) -> None:
    """Write a catalog file, whole or not at all."""
    value = to_dict(rows, made_by)
    target = Path(path).absolute()
    put(
        pafs.LocalFileSystem(), str(target.parent), target.name, (json.dumps(value, indent=1) + "\n").encode()
    )


def open_catalog(corpus: Corpus, path: str | os.PathLike[str]) -> CatalogRows:
    """Read a catalog file. Refused: one that is damaged, or was made for another corpus."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DataError(
            f"catalog {path} is missing. Give the path of a file that `mixer catalog` wrote."
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(
            f"catalog {path} cannot be read: {error}. Make it again with `mixer catalog`."
        ) from error
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
        raise DataError(
            f"it has format {value['format']}; this version reads up to {FORMAT}. Use a newer mixer."
        )
    damaged = "It was edited or damaged: make it again with `mixer catalog`."
    if set(value) != set(KEYS) or value["check"] != _check({key: value[key] for key in KEYS[:-1]}):
        raise DataError(f"its content does not match its check value. {damaged}")
    if value["corpus"] != corpus.fingerprint:
        lines = _differences(value["sources"], _sources(corpus)) or ["counts or tokenizer differ"]
        raise DataError(
            f"it was made for corpus {str(value['corpus'])[:16]}..., this one is {corpus.fingerprint[:16]}...: "
            f"{'; '.join(lines)}. Open that corpus, or make the catalog again for this one."
        )
    rows_of_shard = np.array([shard.rows for shard in corpus.shards], dtype=np.int64)
    spans: dict[str, Spans] = {}
    try:
        for name, entry in value["domains"].items():
            written = entry["spans"]
            part = (
                unpack(written)
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
                raise DataError(
                    f"domain {name!r} lists {count_rows(part)} rows and says {entry['rows']}. {damaged}"
                )
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


def unpack(text: str) -> Spans:
    """The spans that `pack` wrote; `DataError` for anything else."""
    try:
        head, _, body = text.partition(":")
        kind, num_spans = head[:1], int(head[1:])
        num_bytes = num_spans * SPAN_NUMBERS * 8
        content = base64.b64decode(body, validate=True)
        if kind == "z":  # never more than was announced: a small file must not fill the memory
            content = zlib.decompressobj().decompress(content, num_bytes + 1)
        if kind not in ("z", "r") or num_spans < 0 or len(content) != num_bytes:
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


def _take(corpus: Corpus, selection: Selection, listed: "_Listed | None", names: _Names) -> Iterator[_Taken]:
    """Per shard the rows that pass list and cut, with their new domain."""
    _require_columns(corpus, selection)
    wanted = [*selection.by, *([selection.score] if selection.score else [])]
    numbers = range(len(corpus.shards)) if listed is None else sorted(listed.rows_of)
    with ThreadPoolExecutor(READ_THREADS) as pool:
        for number, columns in zip(
            numbers, pool.map(lambda n: _columns(corpus, n, wanted), numbers), strict=True
        ):
            num_rows = corpus.shards[number].rows
            row_n = np.arange(num_rows, dtype=np.int64) if listed is None else listed.rows_of[number]
            score_n = None
            if selection.score is not None:
                score_n = columns[selection.score].cast(pa.float64()).to_numpy(zero_copy_only=False)[row_n]
                good = np.isfinite(score_n)  # rows without a score are never selected by it
                if selection.cut is not None:
                    above = score_n >= selection.cut
                    good &= above if selection.keep == "above" else ~above
                elif selection.top_share is not None:
                    score_n = np.where(good, score_n, -np.inf)
                    good = np.ones_like(good)
                row_n, score_n = row_n[good], score_n[good]
            given = None if listed is None or listed.names_of is None else listed.names_of[number]
            if given is not None and selection.score is not None:
                given = given[good]
            yield _Taken(
                number, row_n, _name_rows(corpus, selection, number, columns, row_n, given, names), score_n
            )


def _name_rows(
    corpus: Corpus,
    selection: Selection,
    number: int,
    columns: Mapping[str, pa.Array],
    row_n: NDArray[np.int64],
    given: np.ndarray | None,
    names: _Names,
) -> NDArray[np.int64]:
    """The number of the new domain of each row."""
    source = corpus.shard_domains[number]
    if not selection.by:
        if given is None:
            return np.full(len(row_n), names.add(source, (source,)) if len(row_n) else 0, dtype=np.int64)
        values, place_n = np.unique(given, return_inverse=True)
        return np.array([names.add(str(value), ("listed", str(value))) for value in values], np.int64)[
            place_n
        ]
    code_n = np.zeros(len(row_n), dtype=np.int64)
    values_k: list[list[Any]] = []
    for key in selection.by:
        encoded = pc.dictionary_encode(columns[key].take(pa.array(row_n)), null_encoding="encode")
        values = encoded.dictionary.to_pylist()
        code_n = code_n * max(1, len(values)) + np.asarray(encoded.indices, dtype=np.int64)
        values_k.append(values)
    codes, place_n = np.unique(code_n, return_inverse=True)
    number_of_code = np.empty(len(codes), dtype=np.int64)
    for place, code in enumerate(codes.tolist()):
        chosen: list[Any] = []
        for values in reversed(values_k):
            code, at = divmod(code, max(1, len(values)))  # noqa: PLW2901  the digits of a mixed-radix number
            chosen.insert(0, values[at])
        parts = [source] if selection.within_source else []
        parts += [_value_name(value) for value in chosen]
        origin = ((source,) if selection.within_source else ()) + tuple(chosen)
        number_of_code[place] = names.add("/".join(parts), origin)
    return number_of_code[place_n]


def _value_name(value: Any) -> str:
    if value is None:
        return NULL_NAME
    return str(value).strip() or EMPTY_NAME


def _columns(corpus: Corpus, number: int, keys: Sequence[str]) -> dict[str, pa.Array]:
    return {key: corpus.shard(number).metadata(key) for key in keys} if keys else {}


def _require_columns(corpus: Corpus, selection: Selection) -> None:
    kinds = corpus.manifest.layout.metadata
    for key in (*selection.by, *((selection.score,) if selection.score else ())):
        if key not in kinds:
            raise ConfigError(
                f"{key!r} is no metadata key of {corpus.root}; it has {', '.join(sorted(kinds)) or 'none'}. "
                "Use one of these, or prepare the corpus with that key."
            )
    for key in selection.by:
        if kinds[key] == "float64":
            raise ConfigError(
                f"by={key}: its values are float64, one domain for each number. Use --score {key}."
            )
    if selection.score and kinds[selection.score] == "string":
        raise ConfigError(f"score={selection.score}: its values are text. Use --by {selection.score}.")


def _top(taken: list[_Taken], share: float, num_names: int) -> list[_Taken]:
    """Of every domain the share of rows with the highest scores; equal scores in corpus order."""
    name_n = np.concatenate([part.name_n for part in taken])
    score_n = np.concatenate([part.score_n for part in taken if part.score_n is not None])
    order = np.lexsort((np.arange(len(name_n)), -score_n, name_n))
    num_d = np.bincount(name_n, minlength=num_names)
    first_d = np.cumsum(num_d) - num_d
    rank_n = np.empty(len(name_n), dtype=np.int64)
    rank_n[order] = np.arange(len(name_n)) - first_d[name_n[order]]
    wanted_d = np.ceil(num_d * share - 1e-9)  # so that 0.3 of 10 rows are 3, not 4
    good_n = (rank_n < wanted_d[name_n]) & (score_n > -np.inf)
    kept: list[_Taken] = []
    start = 0
    for part in taken:
        good = good_n[start : start + len(part.row_n)]
        start += len(part.row_n)
        kept.append(_Taken(part.shard, part.row_n[good], part.name_n[good], None))
    return [part for part in kept if len(part.row_n)]


def _spans_of(part: _Taken) -> tuple[NDArray[np.int64], Spans]:
    """Runs of neighbouring rows with one name: the name of each run, and its span."""
    breaks = (np.diff(part.row_n) != 1) | (np.diff(part.name_n) != 0)
    first = np.flatnonzero(np.concatenate([[True], breaks]))
    last = np.append(first[1:], len(part.row_n)) - 1
    shard = np.full(len(first), part.shard, dtype=np.int64)
    return part.name_n[first], np.column_stack([shard, part.row_n[first], part.row_n[last] + 1])


@dataclass(slots=True)
class _Listed:
    """The rows of a list, by shard, ascending, with their names where the list has any."""

    rows_of: dict[int, NDArray[np.int64]]
    names_of: dict[int, np.ndarray] | None


def _listed_rows(corpus: Corpus, path: str) -> _Listed:
    """Read a list of rows: columns `domain` and `row`, or `shard` (its path or number) and `row`; `name` optional."""
    table = _read_table(path)
    if "row" not in table.column_names or ("domain" in table.column_names) == ("shard" in table.column_names):
        raise DataError(
            f"row list {path} has the columns {', '.join(table.column_names)}; needed row and one of domain and shard, "
            "and name if wanted. Rename its columns."
        )
    if table.num_rows == 0:
        raise DataError(f"row list {path} lists no rows. A catalog needs at least one.")
    nulls = [name for name in table.column_names if table.column(name).null_count]
    if nulls or not pa.types.is_integer(table.schema.field("row").type):
        raise DataError(
            f"row list {path}: empty values in {nulls} or rows that are no whole numbers. Mend the list."
        )
    row_n = table.column("row").cast(pa.int64()).to_numpy()
    if "domain" in table.column_names:
        shard_n, place_n = _by_domain(corpus, path, table.column("domain").to_pylist(), row_n)
    else:
        shard_n, place_n = _by_shard(corpus, path, table.column("shard").to_pylist(), row_n), row_n
    order = np.lexsort((place_n, shard_n))
    shard_n, place_n = shard_n[order], place_n[order]
    double = np.flatnonzero((np.diff(shard_n) == 0) & (np.diff(place_n) == 0))
    if len(double):
        at = order[double[0]], order[double[0] + 1]
        raise DataError(
            f"row list {path}: lines {min(at) + 1} and {max(at) + 1} name the same row, {place_n[double[0]]} of "
            f"{corpus.shards[int(shard_n[double[0]])].path}. A row belongs to one domain once: take one out."
        )
    numbers, first = np.unique(shard_n, return_index=True)
    stops = np.append(first[1:], len(shard_n))
    pieces = [(int(n), slice(a, b)) for n, a, b in zip(numbers, first, stops, strict=True)]
    names_of = None
    if "name" in table.column_names:
        name_n = np.array(table.column("name").to_pylist(), dtype=object).astype(str)[order]
        names_of = {number: name_n[piece] for number, piece in pieces}
    return _Listed({number: place_n[piece] for number, piece in pieces}, names_of)


def _by_domain(
    corpus: Corpus, path: str, domains: list[Any], row_n: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    index = corpus.catalog.index
    for line, name in enumerate(domains):
        if name not in index:
            raise DataError(
                f"row list {path}, line {line + 1}: domain {name!r} is not in {corpus.root}, which has "
                f"{', '.join(corpus.catalog.names[:20])}. Use its names."
            )
    domain_n = np.array([index[name] for name in domains], dtype=np.int64)
    try:
        shard_n, place_n = corpus.locate(domain_n, row_n)
    except DataError as error:
        raise DataError(f"row list {path}: {error}") from error
    return shard_n.astype(np.int64), place_n


def _by_shard(corpus: Corpus, path: str, shards: list[Any], row_n: NDArray[np.int64]) -> NDArray[np.int64]:
    number_of: dict[Any, int] = {shard.path: number for number, shard in enumerate(corpus.shards)}
    number_of |= {number: number for number in range(len(corpus.shards))}
    for line, (shard, row) in enumerate(zip(shards, row_n.tolist(), strict=True)):
        if shard not in number_of or not 0 <= row < corpus.shards[number_of[shard]].rows:
            raise DataError(
                f"row list {path}, line {line + 1}: row {row} of shard {shard!r} is not in {corpus.root}. "
                "Use shard paths (or numbers) and row numbers of this corpus."
            )
    return np.array([number_of[shard] for shard in shards], dtype=np.int64)


def _read_table(path: str) -> pa.Table:
    """A Parquet, Arrow, CSV or JSON-lines file by its suffix, the known columns only."""
    suffix = Path(path).suffix.lower()
    try:
        if suffix == ".parquet":
            known = [
                name
                for name in pa.parquet.read_schema(path).names
                if name in ("domain", "shard", "row", "name")
            ]
            return pa.parquet.read_table(path, columns=known)
        if suffix in (".arrow", ".feather"):
            with pa.memory_map(path) as source:
                table = pa.ipc.open_file(source).read_all()
        elif suffix == ".csv":
            table = pa.csv.read_csv(path)
        elif suffix in (".jsonl", ".json"):
            table = pa.json.read_json(path)
        else:
            raise ConfigError(
                f"row list {path}: its suffix says no format. Use .parquet, .arrow, .csv or .jsonl."
            )
    except FileNotFoundError as error:
        raise DataError(f"row list {path} is missing. Give the path of a list of rows.") from error
    except READ_ERRORS as error:
        raise DataError(
            f"row list {path} cannot be read: {error}. Write it as Parquet, Arrow, CSV or JSON lines."
        ) from error
    return table.select([name for name in table.column_names if name in ("domain", "shard", "row", "name")])


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
