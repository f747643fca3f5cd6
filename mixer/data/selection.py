"""New catalogs from a corpus: by metadata, by a list of rows, by a score. Reads no token.

Only the small columns beside the tokens are read, one shard after the other; what is kept in memory
are the runs of rows taken (and a score a row, for `top_share`). Rows keep the corpus's order.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.json as pajson
import pyarrow.parquet as paparquet
from numpy.typing import NDArray

from mixer.core.errors import ConfigError, DataError
from mixer.data.corpus import CatalogRows, Corpus, merge_spans
from mixer.data.storage import READ_ERRORS

NULL_NAME = "none"
EMPTY_NAME = "empty"
READ_THREADS = 8
LIST_COLUMNS = ("domain", "shard", "row", "name")

Spans = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """Which rows a new catalog takes, and under which names. All that is set applies together."""

    by: tuple[str, ...] = ()  # metadata keys whose values, joined by "/", name the domains; else the source's name
    within_source: bool = False  # put the source domain's name before the values
    score: str | None = None  # a metadata column of numbers to select by
    cut: float | None = None  # keep rows with score >= cut, or < cut for keep="below"
    keep: str = "above"
    top_share: float | None = None  # of every new domain keep this share of its rows, by score
    rows: str | None = None  # a file that lists rows; only these are taken

    def __post_init__(self) -> None:
        if self.within_source and not self.by:
            raise ConfigError("within_source without by: domains are then the sources already. Name keys with --by.")
        if len(set(self.by)) < len(self.by):
            raise ConfigError(f"by={','.join(self.by)} names a key twice. Name each once.")
        if self.keep not in ("above", "below"):
            raise ConfigError(f"keep={self.keep!r}; it is above or below.")
        chosen = (self.cut is not None) + (self.top_share is not None)
        if self.score is None and chosen:
            raise ConfigError("a cut or top_share without a score column. Name the column with --score.")
        if self.score is not None and chosen != 1:
            raise ConfigError(f"score={self.score} needs exactly one of cut and top_share; {chosen} are given.")
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
        if self.cut is None:
            del given["keep"]
        given["by"] = list(self.by)
        return {name: value for name, value in given.items() if value not in (None, False, [])}


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
    listed = None if selection.rows is None else _listed_rows(corpus, selection.rows, selection.by)
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
            f"no row of {corpus.root} is selected by {json.dumps(selection.to_dict())}. A catalog needs at "
            "least one: select less strictly."
        )
    return CatalogRows(corpus, spans)


def _take(corpus: Corpus, selection: Selection, listed: "_Listed | None", names: _Names) -> Iterator[_Taken]:
    """Per shard the rows that pass list and cut, with their new domain."""
    _require_columns(corpus, selection)
    wanted = [*selection.by, *([selection.score] if selection.score else [])]
    numbers = range(len(corpus.shards)) if listed is None else sorted(listed.rows_of)
    with ThreadPoolExecutor(READ_THREADS) as pool:
        for number, columns in _read_ahead(pool, corpus, numbers, wanted):
            num_rows = corpus.shards[number].rows
            row_n = np.arange(num_rows, dtype=np.int64) if listed is None else listed.rows_of[number]
            given = None if listed is None or listed.names_of is None else listed.names_of[number]
            score_n = None
            if selection.score is not None:
                score_n = columns[selection.score].cast(pa.float64()).to_numpy(zero_copy_only=False)[row_n]
                good = np.isfinite(score_n)  # a row without a score is never selected by it
                if selection.cut is not None:
                    good &= (score_n >= selection.cut) == (selection.keep == "above")
                else:  # which rows are on top is known when all have been seen
                    score_n = np.where(good, score_n, -np.inf)
                    good = np.ones_like(good)
                row_n, score_n = row_n[good], score_n[good]
                given = None if given is None else given[good]
            name_n = _name_rows(corpus, selection, number, columns, row_n, given, names)
            yield _Taken(number, row_n, name_n, score_n)


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
    if len(row_n) == 0:
        return row_n
    if not selection.by:
        if given is None:
            return np.full(len(row_n), names.add(source, (source,)), dtype=np.int64)
        values, place_n = np.unique(given, return_inverse=True)
        return np.array([names.add(str(value), ("listed", str(value))) for value in values], np.int64)[place_n]
    code_n = np.zeros(len(row_n), dtype=np.int64)
    chosen: list[tuple[Any, ...]] = [()]  # the values behind each code
    for key in selection.by:
        encoded = columns[key].take(pa.array(row_n)).dictionary_encode(null_encoding="encode")
        values = encoded.dictionary.to_pylist()
        joint_n = code_n * len(values) + np.asarray(encoded.indices, dtype=np.int64)
        joints, code_n = np.unique(joint_n, return_inverse=True)
        chosen = [(*chosen[joint // len(values)], values[joint % len(values)]) for joint in joints.tolist()]
    number_of_code = np.empty(len(chosen), dtype=np.int64)
    for code, values in enumerate(chosen):
        prefix = (source,) if selection.within_source else ()
        name = "/".join([*prefix, *(_value_name(value) for value in values)])
        number_of_code[code] = names.add(name, (*prefix, *values))
    return number_of_code[code_n]


def _value_name(value: Any) -> str:
    if value is None:
        return NULL_NAME
    return str(value).strip() or EMPTY_NAME


def _read_ahead(
    pool: ThreadPoolExecutor, corpus: Corpus, numbers: Sequence[int], keys: Sequence[str]
) -> Iterator[tuple[int, dict[str, pa.Array]]]:
    """Columns of the shards in order, as many at once as there are threads, so that memory stays bounded."""
    for first in range(0, len(numbers), READ_THREADS):
        some = numbers[first : first + READ_THREADS]
        yield from zip(some, pool.map(lambda number: _columns(corpus, number, keys), some), strict=True)


def _columns(corpus: Corpus, number: int, keys: Sequence[str]) -> dict[str, pa.Array]:
    if not keys:
        return {}
    shard = corpus.open_shard(number)
    return {key: shard.metadata(key) for key in keys}


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
            raise ConfigError(f"by={key}: its values are float64, one domain for each number. Use --score {key}.")
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


def _listed_rows(corpus: Corpus, path: str, by: Sequence[str]) -> _Listed:
    """Read a list of rows: columns `domain` or `shard` (its path or number), `row`, and perhaps `name`."""
    table = _read_table(path)
    if "row" not in table.column_names or ("domain" in table.column_names) == ("shard" in table.column_names):
        raise DataError(
            f"row list {path} has the columns {', '.join(table.column_names)}; needed row and one of domain "
            "and shard, and name if wanted. Rename its columns."
        )
    if "name" in table.column_names and by:
        raise ConfigError(
            f"row list {path} names domains itself, and by={','.join(by)} does too. Leave out one of them."
        )
    if table.num_rows == 0:
        raise DataError(f"row list {path} lists no rows. A catalog needs at least one.")
    nulls = [name for name in table.column_names if table.column(name).null_count]
    if nulls or not pa.types.is_integer(table.schema.field("row").type):
        raise DataError(f"row list {path}: empty values in {nulls} or rows that are no whole numbers. Mend the list.")
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
            f"row list {path}: lines {min(at) + 1} and {max(at) + 1} name the same row, {place_n[double[0]]} "
            f"of {corpus.shards[int(shard_n[double[0]])].path}. A row belongs to one domain: take one out."
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
            known = [name for name in paparquet.read_schema(path).names if name in LIST_COLUMNS]
            return paparquet.read_table(path, columns=known)
        if suffix in (".arrow", ".feather"):
            with pa.memory_map(path) as source:
                table = pa.ipc.open_file(source).read_all()
        elif suffix == ".csv":
            table = pacsv.read_csv(path)
        elif suffix in (".jsonl", ".json"):
            table = pajson.read_json(path)
        else:
            raise ConfigError(f"row list {path}: its suffix says no format. Use .parquet, .arrow, .csv or .jsonl.")
    except FileNotFoundError as error:
        raise DataError(f"row list {path} is missing. Give the path of a list of rows.") from error
    except READ_ERRORS as error:
        raise DataError(
            f"row list {path} cannot be read: {error}. Write it as Parquet, Arrow, CSV or JSON lines."
        ) from error
    return table.select([name for name in table.column_names if name in LIST_COLUMNS])
