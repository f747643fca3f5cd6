"""What `record` writes `figures` reads; a record that lacks something is refused by name."""

import json
import re

import numpy as np
import pytest

from tests.bench import figures
from tests.bench.record import machine, record

GOOD = {
    "figure": "plan cost",
    "value": 1.5,
    "unit": "ms",
    "target": "<= 2",
    "met": True,
    "peers": {},
    "command": "make bench",
    "date": "2026-01-01",
    "machine": "2 cores",
}


def put(folder, name, content):
    (folder / name).write_text(json.dumps(content))


def test_a_recorded_figure_is_read_back_with_date_and_machine(tmp_path):
    path = record(
        figure="Reader, one process: M tokens/s",
        value=np.float64(512.25),
        unit="M tokens/s",
        target=">= half of the limit",
        met=np.True_,  # type: ignore[arg-type]  # what a comparison of arrays gives
        peers={"torchdata": np.float32(0.5), "limit": {"median": 1000}},
        command="python -m tests.bench.run reader",
        results=tmp_path,
    )
    assert path.name == "reader-one-process-m-tokens-s.json"
    (entry,) = figures.read_figures(tmp_path)
    assert entry["value"] == 512.25
    assert entry["met"] is True
    assert entry["peers"] == {"torchdata": 0.5, "limit": {"median": 1000}}
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", entry["date"])
    assert entry["machine"] == machine()
    assert re.match(r"\d+ cores, \d+ GiB, .+, Python 3\.\d+\.\d+$", entry["machine"])


def test_recording_again_replaces_and_leaves_nothing_else(tmp_path):
    for value in (1, 2):
        record(
            figure="a",
            value=value,
            unit="s",
            target="<= 2",
            met=True,
            peers={},
            command="x",
            results=tmp_path,
        )
    assert [entry["value"] for entry in figures.read_figures(tmp_path)] == [2]
    assert [file.name for file in tmp_path.iterdir()] == ["a.json"]


def test_what_cannot_be_written_leaves_the_old_record(tmp_path):
    record(figure="a", value=1, unit="s", target="<= 2", met=True, peers={}, command="x", results=tmp_path)
    with pytest.raises(TypeError, match="a object in a figure"):
        record(
            figure="a",
            value=1,
            unit="s",
            target="",
            met=True,
            peers={"b": object()},
            command="x",
            results=tmp_path,
        )
    assert [entry["value"] for entry in figures.read_figures(tmp_path)] == [1]


def test_the_table_shows_unmet_targets_first(tmp_path, capsys):
    put(tmp_path, "a.json", [GOOD, {**GOOD, "figure": "zeta", "met": False, "peers": {"x": 0.123456, "y": 2}}])
    put(tmp_path, "b.json", {**GOOD, "figure": "beta", "value": {"p50": 1, "p99": 2.5}})
    assert figures.main(tmp_path) == 0
    assert capsys.readouterr().out == (
        "met  figure     value           unit  target  peers          date\n"
        "---  ---------  --------------  ----  ------  -------------  ----------\n"
        "NO   zeta       1.5             ms    <= 2    x 0.1235, y 2  2026-01-01\n"
        "yes  beta       p50 1, p99 2.5  ms    <= 2    -              2026-01-01\n"
        "yes  plan cost  1.5             ms    <= 2    -              2026-01-01\n"
        "\n"
        "3 figures, 1 of them short of their target\n"
    )


def test_no_figures_are_a_table_too(tmp_path, capsys):
    assert figures.main(tmp_path) == 0
    assert capsys.readouterr().out.endswith("0 figures, 0 of them short of their target\n")


@pytest.mark.parametrize("key", sorted(GOOD))
def test_every_key_is_needed(tmp_path, capsys, key):
    put(tmp_path, "a.json", {k: v for k, v in GOOD.items() if k != key})
    assert figures.main(tmp_path) == 1
    assert f"lacks {key}." in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ({**GOOD, "met": "yes"}, "a.json: 'plan cost' has met='yes', of the wrong type"),
        ({**GOOD, "value": True}, "has value=True, of the wrong type"),
        ({**GOOD, "value": None}, "has value=None, of the wrong type"),
        ({**GOOD, "peers": []}, "has peers=[], of the wrong type"),
        ({**GOOD, "note": ""}, "has note beyond figure, value"),
        ([GOOD, GOOD], "a.json records 'plan cost', which a.json records too"),
        (3, "a.json holds a int; needed an object"),
    ],
)
def test_a_wrong_record_is_refused(tmp_path, capsys, content, text):
    put(tmp_path, "a.json", content)
    assert figures.main(tmp_path) == 1
    assert text in capsys.readouterr().err


def test_a_file_that_is_not_json_is_refused(tmp_path, capsys):
    (tmp_path / "a.json").write_text("{")
    assert figures.main(tmp_path) == 1
    assert "a.json is not JSON" in capsys.readouterr().err


def test_the_records_of_the_project_are_complete():
    figures.read_figures()
