"""Catalog files and what makes them: rows under other names, each once, and found without reading tokens."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as paparquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jobs import catalog as job
from mixer.core.errors import ConfigError, DataError
from mixer.data.catalogs import from_dict, open_catalog, pack, save_catalog, to_dict, unpack
from mixer.data.corpus import CatalogRows, Corpus, merge_spans
from mixer.data.selection import Selection, select
from mixer.data.storage import Storage
from tests.fakes import fake_token, make_corpus

NUM_ROWS = {"code": 40, "web": 150}
TOPICS = {
    "code": [("python", "c")[row % 2] for row in range(40)],
    "web": [("sport", "science", None)[row // 10 % 3] for row in range(150)],
}
LEVELS = {"code": [row // 20 for row in range(40)], "web": [row % 2 for row in range(150)]}
SCORES = {
    "code": [row / 40 for row in range(40)],
    "web": [None if row % 5 == 0 else float("nan") if row % 5 == 1 else (row * 7 % 150) / 150 for row in range(150)],
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    metadata = {"topic": TOPICS, "level": LEVELS, "quality": SCORES}
    return make_corpus(tmp_path_factory.mktemp("corpus"), NUM_ROWS, metadata=metadata)


def rows_of(rows: CatalogRows) -> dict[str, list[tuple[str, int]]]:
    """All rows of each domain as (source domain, row), read from their tokens."""
    sources = sorted(NUM_ROWS)
    token_of = {fake_token(d, r): (sources[d], r) for d in range(2) for r in range(NUM_ROWS[sources[d]])}
    found: dict[str, list[tuple[str, int]]] = {}
    for number, domain in enumerate(rows.catalog.domains):
        row_n = np.arange(domain.num_rows)
        shard_n, place_n = rows.locate(np.full(domain.num_rows, number), row_n)
        tokens = [rows.corpus.shard(s).tokens[p, 0] for s, p in zip(shard_n, place_n, strict=True)]
        found[domain.name] = [token_of[int(token)] for token in tokens]
    return found


def expected(name_of: Callable[[str, int], str | None]) -> dict[str, list[tuple[str, int]]]:
    found: dict[str, list[tuple[str, int]]] = {}
    for source in sorted(NUM_ROWS):
        for row in range(NUM_ROWS[source]):
            name = name_of(source, row)
            if name is not None:
                found.setdefault(name, []).append((source, row))
    return found


def scored(source: str, row: int) -> float | None:
    value = SCORES[source][row]
    return None if value is None or np.isnan(value) else value


def test_by_metadata_names_domains_by_values(corpus: Corpus) -> None:
    rows = select(corpus, Selection(by=("topic",)))
    assert rows_of(rows) == expected(lambda source, row: TOPICS[source][row] or "none")
    rows = select(corpus, Selection(by=("topic", "level"), within_source=True))
    assert rows_of(rows) == expected(lambda s, r: f"{s}/{TOPICS[s][r] or 'none'}/{LEVELS[s][r]}")


@pytest.mark.parametrize("keep", ["above", "below"])
def test_a_cut_keeps_one_side_and_no_row_without_a_score(corpus: Corpus, keep: str) -> None:
    def name(source: str, row: int) -> str | None:
        score = scored(source, row)
        return source if score is not None and (score >= 0.4) == (keep == "above") else None

    assert rows_of(select(corpus, Selection(score="quality", cut=0.4, keep=keep))) == expected(name)


def test_top_share_takes_the_best_of_every_new_domain(corpus: Corpus) -> None:
    rows = rows_of(select(corpus, Selection(by=("topic",), score="quality", top_share=0.3)))
    for name, everything in expected(lambda source, row: TOPICS[source][row] or "none").items():
        ranked = sorted(
            (row for row in everything if scored(*row) is not None),
            key=lambda row: (-(scored(*row) or 0.0), everything.index(row)),
        )
        wanted = min(len(ranked), int(np.ceil(len(everything) * 0.3 - 1e-9)))
        assert rows[name] == sorted(ranked[:wanted])


def test_a_whole_domain_selected_is_the_domain_itself(corpus: Corpus) -> None:
    rows = select(corpus, Selection(score="level", cut=-1.0))
    assert rows.catalog == corpus.catalog
    assert rows.catalog.fingerprint == corpus.catalog.fingerprint


LIST = {"domain": ["web", "code", "web", "web"], "row": [149, 3, 0, 1], "name": ["b", "a", "a", "a"]}


@pytest.mark.parametrize("kind", ["parquet", "arrow", "csv", "jsonl"])
def test_a_row_list_names_rows_in_any_format(corpus: Corpus, tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"rows.{kind}"
    write_list(path, LIST)
    rows = select(corpus, Selection(rows=str(path)))
    assert rows_of(rows) == {"a": [("code", 3), ("web", 0), ("web", 1)], "b": [("web", 149)]}
    write_list(path, {key: LIST[key] for key in ("domain", "row")})
    rows = select(corpus, Selection(rows=str(path)))
    assert rows_of(rows) == {"code": [("code", 3)], "web": [("web", 0), ("web", 1), ("web", 149)]}
    rows = select(corpus, Selection(rows=str(path), by=("level",), score="quality", cut=0.0))
    assert rows_of(rows) == {
        name: [row for row in listed if scored(*row) is not None]
        for name, listed in {"0": [("code", 3)], "1": [("web", 149)]}.items()
    }


def test_a_row_list_by_shard(corpus: Corpus, tmp_path: Path) -> None:
    write_list(tmp_path / "a.csv", {"shard": ["shards/web/00001.arrow", "shards/code/00000.arrow"], "row": [2, 39]})
    assert rows_of(select(corpus, Selection(rows=str(tmp_path / "a.csv")))) == {
        "code": [("code", 39)],
        "web": [("web", 66)],
    }
    write_list(tmp_path / "b.parquet", {"shard": [2, 0], "row": [2, 39]})
    assert rows_of(select(corpus, Selection(rows=str(tmp_path / "b.parquet")))) == {
        "code": [("code", 39)],
        "web": [("web", 66)],
    }


def write_list(path: Path, columns: dict[str, list[Any]]) -> None:
    table = pa.table(columns)
    if path.suffix == ".parquet":
        paparquet.write_table(table, path)
    elif path.suffix == ".arrow":
        with pa.ipc.new_file(str(path), table.schema) as writer:
            writer.write_table(table)
    elif path.suffix == ".csv":
        pacsv.write_csv(table, path)
    else:
        path.write_text("".join(json.dumps(line) + "\n" for line in table.to_pylist()))


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"domain": ["web"], "place": [1]}, "has the columns domain; needed row and one of domain"),
        ({"domain": ["web"], "shard": [0], "row": [1]}, "needed row and one of domain"),
        ({"domain": ["wep"], "row": [1]}, "line 1: domain 'wep' is not in .*code, web"),
        ({"domain": ["web"], "row": [150]}, "row 150 of domain 'web', which has 150"),
        ({"domain": ["web"], "row": [-1]}, "row -1 of domain 'web'"),
        ({"domain": ["web"], "row": ["x"]}, "no whole numbers"),
        (
            {"domain": ["web", "code", "web"], "row": [7, 7, 7]},
            "lines 1 and 3 name the same row, 7 of shards/web",
        ),
        ({"domain": ["web", "web"], "row": [7, 7], "name": ["a", "b"]}, "name the same row"),
        (
            {"shard": ["shards/web/00009.arrow"], "row": [1]},
            "row 1 of shard 'shards/web/00009.arrow' is not in",
        ),
        ({"shard": [0], "row": [64]}, "row 64 of shard 0 is not in"),
        ({"domain": pa.array([], pa.string()), "row": pa.array([], pa.int64())}, "lists no rows"),
    ],
)
def test_a_bad_row_list_is_refused(corpus: Corpus, tmp_path: Path, columns: dict[str, Any], message: str) -> None:
    write_list(tmp_path / "rows.parquet", columns)
    with pytest.raises(DataError, match=message):
        select(corpus, Selection(rows=str(tmp_path / "rows.parquet")))


def test_unreadable_row_lists_are_refused(corpus: Corpus, tmp_path: Path) -> None:
    (tmp_path / "rows.parquet").write_bytes(b"PAR1 no more")
    with pytest.raises(DataError, match="cannot be read"):
        select(corpus, Selection(rows=str(tmp_path / "rows.parquet")))
    with pytest.raises(DataError, match="is missing"):
        select(corpus, Selection(rows=str(tmp_path / "none.csv")))
    with pytest.raises(ConfigError, match="its suffix says no format"):
        select(corpus, Selection(rows=str(tmp_path / "rows.txt")))
    write_list(tmp_path / "named.csv", LIST)
    with pytest.raises(ConfigError, match="names domains itself"):
        select(corpus, Selection(rows=str(tmp_path / "named.csv"), by=("topic",)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "nothing to select by"),
        ({"by": ("topic", "topic")}, "names a key twice"),
        ({"score": "quality"}, "exactly one of cut and top_share; 0"),
        ({"score": "quality", "cut": 0.1, "top_share": 0.1}, "exactly one of cut and top_share; 2"),
        ({"cut": 0.1}, "without a score column"),
        ({"score": "quality", "cut": float("nan")}, "finite number"),
        ({"score": "quality", "top_share": 1.5}, "above 0 and at most 1"),
        ({"score": "quality", "top_share": 0.5, "keep": "below"}, "keep=below goes with cut"),
        ({"within_source": True, "score": "quality", "cut": 0.1}, "within_source without by"),
        ({"by": ("tpoic",)}, "'tpoic' is no metadata key .*level, quality, topic"),
        ({"by": ("quality",)}, "one domain for each number"),
        ({"score": "topic", "cut": 0.1}, "its values are text"),
    ],
)
def test_bad_selections_are_refused(corpus: Corpus, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        select(corpus, Selection(**options))


def test_a_selection_of_nothing_is_refused(corpus: Corpus) -> None:
    with pytest.raises(DataError, match=r"no row of .* is selected by .*quality"):
        select(corpus, Selection(score="quality", cut=9.0))


def test_two_groups_under_one_name_are_refused(tmp_path: Path) -> None:
    values = {"a": {"d": ["x/y", "x"]}, "b": {"d": ["z", "y/z"]}}
    corpus = make_corpus(tmp_path, {"d": 2}, metadata=values)
    with pytest.raises(DataError, match=r"\('x/y', 'z'\) and \('x', 'y/z'\), would both be domain 'x/y/z'"):
        select(corpus, Selection(by=("a", "b")))


def test_a_catalog_file_restores_the_catalog(corpus: Corpus, tmp_path: Path) -> None:
    for selection in (Selection(by=("topic", "level")), Selection(score="quality", top_share=0.5)):
        rows = select(corpus, selection)
        save_catalog(rows, tmp_path / "c.json", selection.to_dict())
        again = open_catalog(corpus, tmp_path / "c.json")
        assert again.catalog == rows.catalog
        np.testing.assert_array_equal(again.spans_s3, rows.spans_s3)
        assert again.document_of(0, 0, 0) == rows.document_of(0, 0, 0)
    text = (tmp_path / "c.json").read_text()
    assert json.loads(text)["made_by"] == {"score": "quality", "top_share": 0.5}


def test_small_lists_are_readable_and_long_ones_packed(corpus: Corpus, tmp_path: Path) -> None:
    domains = to_dict(select(corpus, Selection(by=("level",))))["domains"]
    assert domains["0"]["spans"].startswith("z")
    domains = to_dict(select(corpus, Selection(by=("topic",))))["domains"]
    assert domains["sport"]["spans"][:2] == [[1, 0, 10], [1, 30, 40]]


def changed(change: Callable[[dict[str, Any]], None], *, sign: bool = False) -> Callable[[dict[str, Any]], None]:
    def apply(value: dict[str, Any]) -> None:
        change(value)
        if sign:
            rest = {key: part for key, part in value.items() if key != "check"}
            text = json.dumps(rest, sort_keys=True, separators=(",", ":"))
            value["check"] = hashlib.sha256(text.encode()).hexdigest()

    return apply


def spans(value: dict[str, Any], part: Any) -> None:
    value["domains"]["sport"]["spans"] = part


BAD_FILES: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "newer": (changed(lambda v: v.update(format=2)), "format 2; this version reads up to 1"),
    "edited": (changed(lambda v: v["domains"]["sport"].update(rows=3)), "does not match its check value"),
    "key gone": (changed(lambda v: v.pop("sources")), "does not match its check value"),
    "no format": (changed(lambda v: v.pop("format")), "not a catalog file"),
    "rows lie": (
        changed(lambda v: v["domains"]["sport"].update(rows=3), sign=True),
        "lists 50 rows and says 3",
    ),
    "past the end": (
        changed(lambda v: spans(v, [[0, 0, 50]]), sign=True),
        "'sport' lists rows that no shard has",
    ),
    "no such shard": (changed(lambda v: spans(v, [[99, 0, 50]]), sign=True), "lists rows that no shard has"),
    "negative": (changed(lambda v: spans(v, [[0, -50, 0]]), sign=True), "lists rows that no shard has"),
    "turned": (changed(lambda v: spans(v, [[0, 9, 4]]), sign=True), "lists rows that no shard has"),
    "no spans": (changed(lambda v: spans(v, [[0, 9]]), sign=True), "cannot be read"),
    "text": (changed(lambda v: spans(v, "z1:!!"), sign=True), "packed spans cannot be read"),
    "bomb": (
        changed(lambda v: spans(v, pack(np.array([[0, 0, 1]] * 999)).replace("z999", "z1")), sign=True),
        "packed",
    ),
    "huge count": (
        changed(lambda v: spans(v, "z99999999999999999999:AA=="), sign=True),
        "packed spans cannot be read",
    ),
    "double": (
        changed(lambda v: v["domains"].update(again=dict(v["domains"]["sport"])), sign=True),
        "row 0 of shard shards/web/00000.arrow is in domain '(again|sport)' and again in '(again|sport)'",
    ),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_bad_catalog_file_is_refused_with_one_clear_error(corpus: Corpus, tmp_path: Path, case: str) -> None:
    change, message = BAD_FILES[case]
    value = json.loads(json.dumps(to_dict(select(corpus, Selection(by=("topic",))))))
    change(value)
    (tmp_path / "c.json").write_text(json.dumps(value))
    with pytest.raises(DataError, match=message) as caught:
        open_catalog(corpus, tmp_path / "c.json")
    assert str(tmp_path / "c.json") in str(caught.value)


def test_a_torn_or_missing_catalog_file_is_refused(corpus: Corpus, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is missing"):
        open_catalog(corpus, tmp_path / "c.json")
    save_catalog(select(corpus, Selection(by=("topic",))), tmp_path / "c.json")
    content = (tmp_path / "c.json").read_bytes()
    for stop in range(0, len(content) - 2, 97):
        (tmp_path / "c.json").write_bytes(content[:stop])
        with pytest.raises(DataError, match="cannot be read"):
            open_catalog(corpus, tmp_path / "c.json")


@pytest.mark.parametrize(
    ("num_rows", "seed", "message"),
    [
        ({"code": 40, "web": 150}, 1, "shard 0 of domain 'code' has other content; shard 0 of domain 'web'"),
        ({"code": 40, "web": 151}, 0, "shard 2 of domain 'web' has other content"),
        ({"code": 40}, 0, "domain 'web' is not in it"),
        ({"code": 40, "web": 150, "zoo": 3}, 0, "domain 'zoo' is new"),
    ],
)
def test_a_catalog_of_another_corpus_is_refused_by_what_differs(
    tmp_path: Path, num_rows: dict[str, int], seed: int, message: str
) -> None:
    corpus = make_corpus(tmp_path / "one", NUM_ROWS)
    value = to_dict(CatalogRows(corpus, {"all": corpus.by_source.spans_s3}))
    other = make_corpus(tmp_path / "other", num_rows, seed=seed)
    with pytest.raises(DataError, match=message):
        from_dict(other, value)


def test_selecting_in_a_store_fetches_no_tokens(s3: Any) -> None:
    metadata = {"topic": TOPICS, "quality": SCORES}
    made = make_corpus("corpora/select", NUM_ROWS, row_tokens=256, metadata=metadata, filesystem=s3.filesystem)
    corpus = Corpus.open("s3://corpora/select", storage=Storage(endpoint=s3.endpoint, region="us-east-1"))
    s3.log.clear()
    rows = select(corpus, Selection(by=("topic",), score="quality", top_share=0.3))
    fetched = sum(size for path, _, size in s3.gets() if path.endswith(".arrow"))
    tokens = sum(made.manifest.layout.row_bytes * shard.rows for shard in made.shards)
    assert fetched == sum(shard.bytes for shard in made.shards) - tokens
    assert len([path for path, _, _ in s3.gets()]) == 2 * len(made.shards)
    assert len(rows.catalog) == 5


small_rows = st.lists(st.tuples(st.sampled_from("abcd"), st.integers(0, 3), st.none() | st.floats(0, 1)), min_size=1)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(one=small_rows, other=small_rows, keys=st.sampled_from([("t",), ("u",), ("u", "t")]), within=st.booleans())
def test_domains_partition_the_rows_exactly(
    tmp_path_factory: pytest.TempPathFactory,
    one: list[Any],
    other: list[Any],
    keys: tuple[str, ...],
    within: bool,
) -> None:
    """Any metadata: every row is in the one domain that its values name, in order, and once."""
    given_rows = {"one": one, "other": other}
    metadata = {
        key: {name: [row[place] for row in rows] for name, rows in given_rows.items()}
        for place, key in enumerate(("t", "u", "s"))
    }
    if not any(row[2] is not None for row in one + other):
        del metadata["s"]
    num_rows = {name: len(rows) for name, rows in given_rows.items()}
    corpus = make_corpus(tmp_path_factory.mktemp("c"), num_rows, metadata=metadata, shard_rows=8)
    rows = from_dict(corpus, to_dict(select(corpus, Selection(by=keys, within_source=within))))
    wanted: dict[str, list[int]] = {}
    for number, name in enumerate(("one", "other")):
        for row, values in enumerate(given_rows[name]):
            parts = [str(values["tu".index(key)]) for key in keys]
            wanted.setdefault("/".join([name, *parts] if within else parts), []).append(fake_token(number, row))
    found: dict[str, list[int]] = {}
    for number, domain in enumerate(rows.catalog.domains):
        shard_n, place_n = rows.locate(np.full(domain.num_rows, number), np.arange(domain.num_rows))
        found[domain.name] = [
            int(corpus.shard(s).tokens[p, 0]) for s, p in zip(shard_n.tolist(), place_n.tolist(), strict=True)
        ]
    assert found == wanted


span_lists = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 1 << 40), st.integers(1, 1 << 40)), max_size=60)


@settings(deadline=None)
@given(span_lists)
def test_packed_spans_come_back(parts: list[tuple[int, int, int]]) -> None:
    spans_s3 = np.array([(shard, start, start + n) for shard, start, n in parts], np.int64).reshape(-1, 3)
    np.testing.assert_array_equal(unpack(pack(spans_s3)), spans_s3)


def test_packing_regular_spans_pays() -> None:
    n = 100_000
    start = np.arange(n) * 128
    text = pack(np.column_stack([np.zeros(n, np.int64), start, start + 64]))
    assert len(text) < n / 20


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 9), st.integers(0, 3)), max_size=30))
def test_merged_spans_hold_the_same_rows_in_order(parts: list[tuple[int, int, int]]) -> None:
    def rows(spans_s3: np.ndarray) -> list[tuple[int, int]]:
        return [(int(shard), row) for shard, start, stop in spans_s3 for row in range(start, stop)]

    spans_s3 = np.array([(shard, start, start + n) for shard, start, n in parts], np.int64).reshape(-1, 3)
    merged = merge_spans(spans_s3)
    assert rows(merged) == rows(spans_s3)
    joined = (merged[1:, 0] == merged[:-1, 0]) & (merged[1:, 1] == merged[:-1, 2])
    assert not joined.any()


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 6), min_size=190, max_size=190), st.integers(0, 2**32 - 1))
def test_locate_agrees_with_walking_the_spans(corpus: Corpus, names: list[int], seed: int) -> None:
    """Any partition of all rows into up to seven domains, against a list."""
    walk: dict[str, list[tuple[int, int]]] = {}
    place = 0
    for number, shard in enumerate(corpus.shards):
        for row in range(shard.rows):
            walk.setdefault(f"d{names[place]}", []).append((number, row))
            place += 1
    rows = CatalogRows(corpus, {name: np.array([(s, r, r + 1) for s, r in listed]) for name, listed in walk.items()})
    rng = np.random.default_rng(seed)
    domain_n = rng.integers(0, len(rows.catalog), 64)
    row_n = (rng.random(64) * rows.catalog.num_rows_d[domain_n]).astype(np.int64)
    shard_n, place_n = rows.locate(domain_n, row_n)
    wanted = [walk[rows.catalog.names[d]][r] for d, r in zip(domain_n, row_n, strict=True)]
    assert list(zip(shard_n.tolist(), place_n.tolist(), strict=True)) == wanted


def test_the_catalog_job_writes_and_shows(corpus: Corpus, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "by.json"
    arguments = [corpus.root, "--out", str(out), "--by", "topic,level", "--within-source"]
    assert job.main([*arguments, "--score", "quality", "--cut", "0.5"]) == 0
    written = capsys.readouterr().out
    assert job.main([corpus.root, "--show", str(out)]) == 0
    assert capsys.readouterr().out == written
    rows = open_catalog(corpus, out)
    assert f"{len(rows.catalog)} domains hold {rows.catalog.num_rows_d.sum()} of the corpus's 190 rows" in written
    with pytest.raises(ConfigError, match="give one of --out"):
        job.main([corpus.root, "--by", "topic"])
