"""The parts of the bench of streams work on a tiny corpus, and its figures are what `record` takes."""

from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from tests.bench import stream_peers
from tests.bench.figures import read_figures
from tests.bench.peers import corpora, streams
from tests.bench.peers.bed import Bed
from tests.bench.peers.streams import SYSTEMS, Order
from tests.bench.record import record


@pytest.fixture(scope="module")
def bed(tmp_path_factory: pytest.TempPathFactory) -> Bed:
    bed = Bed.of_size(tmp_path_factory.mktemp("bed"), 4)
    bed.save()
    for layout in ("raw", "mixer", "parquet"):
        corpora.build(bed, layout)
    return bed


@pytest.mark.ray
@pytest.mark.slow
def test_the_stream_delivers_the_source_in_its_shares(bed: Bed, ray_session: ModuleType) -> None:
    order = Order(system="stream", root=str(bed.root), answer="", window_steps=16, rank=1, warm_s=0.0, window_s=0.1)
    answer = streams.measure(order)
    assert answer["rows_wrong"] == 0
    assert answer["share_off"] < 0.02  # a rank has half of the rows of every step
    assert answer["tokens_per_s"] > 0


def test_rows_come_out_of_parquet_as_they_went_in(bed: Bed) -> None:
    table = pq.read_table(bed.folder("parquet") / "6")
    np.testing.assert_array_equal(streams.rows_of(table), bed.tokens_of(6))
    np.testing.assert_array_equal(streams.rows_of(table.slice(3, 5)), bed.tokens_of(6)[3:8])


def test_what_is_not_of_the_source_is_seen(bed: Bed) -> None:
    rows = np.array([bed.tokens_of(3)[:8], bed.tokens_of(5)[:8]]).astype(np.int64)
    same = streams.compare(list(rows), bed)
    assert same == {"rows_wrong": 0, "share_off": pytest.approx(0.5 - bed.weights_d[3]), "one_domain": 1.0}
    rows[1, 4, 2000] ^= 1
    assert streams.compare(list(rows), bed)["rows_wrong"] == 1


def answer(repetition: int, speed: float, **more: Any) -> dict[str, Any]:
    known = {"cpu_s_per_m_tokens": 0.01, "first_batch_s": 3.0, "share_off": 0.002, "one_domain": 0.0}
    return {"repetition": repetition, "rank": 0, "tokens_per_s": speed, **known, **more}


def test_ratios_are_taken_within_a_repetition_and_failures_are_shown(tmp_path: Path) -> None:
    found = {
        ("stream", 16): [answer(0, 50e6), answer(1, 100e6)],
        ("mosaic", 0): [answer(0, 10e6), answer(1, 10e6)],
        ("mix", 0): [answer(1, 40e6), {"repetition": 0, "rank": 0, "error": "hung"}],
        ("per-domain", 0): [{"repetition": 0, "rank": 0, "error": "hung"}],
    }
    assert stream_peers.ratio(found["stream", 16], found["mosaic", 0]) == 7.5
    assert stream_peers.ratio(found["stream", 16], found["mix", 0]) == 2.5
    assert stream_peers.ratio(found["stream", 16], found["per-domain", 0]) is None
    assert "hung" in stream_peers.table(found)
    for figure in stream_peers.figures(found):
        record(command="x", results=tmp_path, **figure)
    by_name = {figure["figure"].partition(": ")[2][:5]: figure for figure in read_figures(tmp_path)}
    assert by_name["token"]["value"] == {"16": 75.0}
    assert by_name["token"]["met"] is True
    assert by_name["token"]["peers"][SYSTEMS["per-domain"].title] == "hung"
    assert by_name["share"]["met"] is False  # no nearer than the others
