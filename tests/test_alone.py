"""Whole runs in this process: gone on with, and measured, without a trace."""

import pytest

from mixer.alone import run_alone
from mixer.branch import make_replay
from mixer.control.journal import read_journal
from mixer.control.record import read_record
from mixer.core.errors import ConfigError, ResumeError
from mixer.run import open_rows
from tests.runs.making import WINDOWS, Outcome, config_of, make_texts


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    make_texts(folder)
    return folder


@pytest.fixture(scope="module")
def undisturbed(texts, tmp_path_factory):
    config = config_of(texts, tmp_path_factory.mktemp("run") / "undisturbed")
    assert run_alone(config, open_rows(config)) == "finished"
    return Outcome.of(config)


def test_stopped_anywhere_it_goes_on_to_the_same_end(texts, tmp_path, undisturbed):
    config = config_of(texts, tmp_path / "run")
    for _ in range(3):
        asked = iter([False] * 13 + [True] * 1000)
        assert run_alone(config, open_rows(config), stop=lambda asked=asked: next(asked)) == "stopped"
    assert run_alone(config, open_rows(config)) == "finished"
    found = Outcome.of(config)
    found.require_same(undisturbed)
    assert found.losses == undisturbed.losses
    assert len(found.losses) == WINDOWS
    other = config_of(texts, tmp_path / "run", "geometry.seed=5")
    with pytest.raises(ResumeError, match="seed"):
        run_alone(other, open_rows(other))


def test_probes_leave_no_trace_in_what_is_trained(texts, tmp_path, undisturbed):
    options = ["influence.always=true", "influence.every_windows=2", "influence.rows=4", "influence.parts=2"]
    config = config_of(texts, tmp_path / "run", *options)
    seen = []
    assert run_alone(config, open_rows(config), on_record=seen.append) == "finished"
    Outcome.of(config).require_same(undisturbed)
    assert Outcome.of(config).losses == undisturbed.losses
    measured = read_record(tmp_path / "run").influence
    assert [one["window"] for one in measured] == list(range(0, WINDOWS, 2))
    assert [one["window"] for one in seen if "probe_tokens" in one] == list(range(0, WINDOWS, 2))
    assert all(len(one["matrix"]) == 3 for one in measured)


def test_a_policy_is_refused_that_asks_for_what_is_not_measured(texts, tmp_path):
    without = ["evaluation.every_windows=null", "policy={kind: skill_it}"]
    config = config_of(texts, tmp_path / "run", *without)
    with pytest.raises(ConfigError, match=r"learns from evaluations, but evaluation\.every_windows is null"):
        run_alone(config, open_rows(config))


def test_what_it_failed_of_is_told_and_it_goes_on_and_is_repeated(texts, tmp_path):
    config = config_of(texts, tmp_path / "run", "train.windows=3", "geometry.window_steps=2")
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
        tmp_path / "run", config_of(texts, tmp_path / "again", "train.windows=3", "geometry.window_steps=2")
    )
    assert run_alone(made.config, made.rows) == "finished"
    again = read_record(tmp_path / "again")
    assert again.policy == {}
    assert [one["loss"] for one in again.windows.values()] == [
        one["loss"] for one in read_record(tmp_path / "run").windows.values()
    ]


@pytest.mark.parametrize("override", ["influence.metric=ekfac", "influence.harvest=true"])
def test_what_a_run_does_not_keep_between_probes_is_refused(texts, tmp_path, override):
    config = config_of(texts, tmp_path / "run", "influence.always=true", override)
    with pytest.raises(ConfigError, match=r"influence\.\w+=\w+: whole runs do not keep what that needs yet"):
        run_alone(config, open_rows(config))
