"""Whole runs in this process: gone on with, and measured, without a trace."""

import pytest

from mixer.alone import run_alone
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
