"""A whole run in this process: how it ended is told, it goes on afterwards, and a replay is followed."""

import pytest

from mixer.alone import run_alone
from mixer.branch import make_replay
from mixer.control.journal import read_journal
from mixer.control.record import read_record
from mixer.run import open_rows
from tests.runs.making import config_of, make_texts


def test_what_it_failed_of_is_told_and_it_goes_on_and_is_repeated(tmp_path):
    make_texts(tmp_path)
    config = config_of(tmp_path, tmp_path / "run", "train.windows=3", "geometry.window_steps=2")
    rows = open_rows(config)

    def fail(record):
        if record["kind"] == "window" and record["window"] == 1:
            raise ZeroDivisionError("in the middle")

    with pytest.raises(ZeroDivisionError):
        run_alone(config, rows, on_record=fail)
    end = read_record(tmp_path / "run").end
    assert end is not None
    assert (end["what"], end["text"]) == ("failed", "in the middle")
    assert run_alone(config, rows) == "finished"
    assert read_record(tmp_path / "run").status == "finished"
    records = [record for _, record in read_journal(tmp_path / "run" / "journal.jsonl")]
    assert [record["window"] for record in records if record["kind"] == "window"] == [0, 1, 2]
    assert "restart" not in [record.get("what") for record in records]
    made = make_replay(
        tmp_path / "run", config_of(tmp_path, tmp_path / "again", "train.windows=3", "geometry.window_steps=2")
    )
    assert run_alone(made.config, made.rows) == "finished"
    again = read_record(tmp_path / "again")
    assert again.policy == {}
    assert [one["loss"] for one in again.windows.values()] == [
        one["loss"] for one in read_record(tmp_path / "run").windows.values()
    ]
