"""The table of a swarm: exact in and out, whole or not, and of one swarm only."""

import itertools
import os
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mixer.core.errors import DataError, ResumeError
from mixer.proxies.table import RunTable, append, merge, read_table, write_table

IDENTITY = {"model.dim": 16, "corpus": "abc", "mixtures": {"00000": "aa", "00001": "bb", "00002": "cc"}}


def rows_of(run: str, *, points=(0.5, 1.0), shift=0.0, identity=None, domains=("a/b", "c")) -> RunTable:
    """Numbers that no rounding survives: thirds, and a loss that is missing."""
    number = int(run)
    progress_r = np.array(points)
    return RunTable(
        domains=domains,
        run_r=(run,) * len(points),
        progress_r=progress_r,
        tokens_r=(progress_r * 3000).astype(np.int64),
        weights_rd=np.stack([np.full(len(points), (number + 1) / 7), np.full(len(points), 1 - (number + 1) / 7)], 1),
        losses={
            "validation/c": np.array([1 / 3 + number + shift, np.nan])[: len(points)],
            "target/x": 2 / 3 + number + progress_r,
        },
        identity=IDENTITY if identity is None else identity,
    )


def same(one: RunTable, other: RunTable) -> None:
    assert (one.domains, one.run_r, one.quantity) == (other.domains, other.run_r, other.quantity)
    assert dict(one.identity) == dict(other.identity)
    for name in ("progress_r", "tokens_r", "weights_rd"):
        assert getattr(one, name).tobytes() == getattr(other, name).tobytes()
        assert getattr(one, name).dtype == getattr(other, name).dtype
    assert one.losses.keys() == other.losses.keys()
    for name in one.losses:
        np.testing.assert_array_equal(one.losses[name], other.losses[name])


def test_every_number_comes_back(tmp_path):
    path = tmp_path / "swarm.parquet"
    write_table(path, rows_of("00001"))
    found = read_table(path)
    same(found, rows_of("00001"))
    assert found.losses["validation/c"][0] == 1 / 3 + 1 and np.isnan(found.losses["validation/c"][1])
    assert pq.read_table(path).column_names == [
        *("run", "progress", "tokens", "weight/a/b", "weight/c", "loss/target/x", "loss/validation/c")
    ]
    assert pq.read_table(path).column("loss/validation/c").null_count == 1


def test_the_order_of_appending_leaves_no_trace(tmp_path):
    runs = ["00000", "00001", "00002"]
    texts = []
    for number, order in enumerate(itertools.permutations(runs)):
        path = tmp_path / f"{number}.parquet"
        for run in order:
            append(path, rows_of(run))
            append(path, rows_of(run))  # what is said twice is in it once
        texts.append(path.read_bytes())
    assert len(set(texts)) == 1
    found = read_table(path)
    assert found.keys == [(run, tokens) for run in runs for tokens in (1500, 3000)]
    assert found.runs == tuple(runs) and found.points == (0.5, 1.0)


def test_a_run_may_get_rows_later_and_keeps_those_it_has(tmp_path):
    path = tmp_path / "swarm.parquet"
    append(path, rows_of("00002", points=(0.5,)))
    append(path, rows_of("00002"))
    append(path, rows_of("00000", points=(1.0,)))
    write_table(path, read_table(path).take([2, 0, 1]))
    assert read_table(path).keys == [("00000", 3000), ("00002", 1500), ("00002", 3000)]


def test_one_row_told_in_two_ways_is_refused_with_both(tmp_path):
    path = tmp_path / "swarm.parquet"
    append(path, rows_of("00001"))
    before = path.read_bytes()
    with pytest.raises(DataError, match=r"loss/validation/c=1\.33.* for run 00001 after 1500 tokens.*1\.58"):
        append(path, rows_of("00001", shift=0.25))
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("identity", "words"),
    [
        (IDENTITY | {"model.dim": 32}, "model.dim=16; this one has 32"),
        (IDENTITY | {"corpus": "xyz"}, "corpus=abc; this one has xyz"),
        ({key: value for key, value in IDENTITY.items() if key != "corpus"}, "corpus=abc; this one has None"),
        (IDENTITY | {"mixtures": {"00000": "aa", "00001": "b2"}}, "run 00001 with mixture bb; this swarm gives it b2"),
    ],
)
def test_rows_of_another_swarm_are_refused_with_both_values(tmp_path, identity, words):
    path = tmp_path / "swarm.parquet"
    append(path, rows_of("00000"))
    with pytest.raises(ResumeError, match=words):
        append(path, rows_of("00002", identity=identity))
    same(read_table(path), rows_of("00000"))


def test_a_swarm_may_grow(tmp_path):
    path = tmp_path / "swarm.parquet"
    append(path, rows_of("00001"))
    more = IDENTITY | {"mixtures": IDENTITY["mixtures"] | {"00003": "dd"}}
    append(path, rows_of("00003", identity=more))
    assert read_table(path).identity["mixtures"] == {"00000": "aa", "00001": "bb", "00002": "cc", "00003": "dd"}
    with pytest.raises(ResumeError, match="domains a/b, c; these rows are loss of a, b"):
        append(path, rows_of("00004", domains=("a", "b")))


def test_a_failed_write_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "swarm.parquet"
    append(path, rows_of("00000"))
    before = path.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(DataError, match="No space left on device"):
        append(path, rows_of("00001"))
    assert path.read_bytes() == before and [one.name for one in tmp_path.iterdir()] == ["swarm.parquet"]


def test_what_is_no_table_is_refused(tmp_path):
    path = tmp_path / "swarm.parquet"
    with pytest.raises(DataError, match="is not there"):
        read_table(path)
    path.write_bytes(b"PAR1 and no more")
    with pytest.raises(DataError, match="is no table of a swarm"):
        read_table(path)
    pq.write_table(pa.table({"run": ["00000"]}), path)
    with pytest.raises(DataError, match=r"no mixer\.swarm"):
        read_table(path)
    with pytest.raises(DataError, match=r"run 00000 after 1500 tokens stands in the table twice"):
        replace(merge(rows_of("00000"), rows_of("00001")), run_r=("00000", "00001", "00000", "00001"))
    with pytest.raises(DataError, match=r"a table of 2 rows and 2 domains with weights \(2, 2\), tokens \(1,\)"):
        replace(rows_of("00000"), tokens_r=np.array([1]))


def test_moments_and_sets_are_chosen_by_name():
    table = merge(rows_of("00000"), rows_of("00001", points=(0.5, 1.0)))
    last = table.at(1.0)
    assert last.run_r == ("00000", "00001") and last.tokens_r.tolist() == [3000, 3000]
    np.testing.assert_array_equal(last.loss_rs(["target/x"]), [[2 / 3 + 1], [2 / 3 + 1 + 1]])
    assert table.loss_rs().shape == (4, 2)
    with pytest.raises(DataError, match=r"no rows at progress 0\.25. It has them at 0\.5, 1"):
        table.at(0.25)
    with pytest.raises(DataError, match="no set target/y. It has target/x, validation/c"):
        table.loss_rs(["target/y"])
