"""The run at the tracker that others belong to: created once for a folder, and never in the way."""

import json
import logging

import pytest

from mixer.control.parent import ParentRun
from mixer.control.tracker import TrackerOptions


def test_a_parent_whose_creation_was_never_answered_is_found_again(tmp_path):
    mlflow = pytest.importorskip("mlflow")
    uri = f"sqlite:///{tmp_path / 'store.db'}"
    options = TrackerOptions(uri=uri)
    folder = tmp_path / "s"
    folder.mkdir()
    run_id = ParentRun(options, folder, {"mixer.kind": "swarm"}).run_id
    noted = json.loads((folder / "tracker.json").read_text())
    assert noted["run_id"] == run_id
    (folder / "tracker.json").write_text(json.dumps(noted | {"run_id": None}))
    assert ParentRun(options, folder, {"mixer.kind": "swarm"}).run_id == run_id
    client = mlflow.MlflowClient(uri)
    experiment = client.get_experiment_by_name("mixer").experiment_id
    assert [run.info.run_id for run in client.search_runs([experiment])] == [run_id]
    other = TrackerOptions(uri=f"sqlite:///{tmp_path / 'other.db'}")
    assert ParentRun(other, folder, {}).run_id not in (None, run_id)


def test_a_tracker_that_is_away_stops_nothing(tmp_path, caplog):
    options = TrackerOptions(uri="http://127.0.0.1:1/", timeout_s=1.0)
    with caplog.at_level(logging.WARNING):
        parent = ParentRun(options, tmp_path, {})
        parent.close("FINISHED", (tmp_path / "nothing",))
    assert parent.run_id is None
    assert "does not take the run" in caplog.text and str(tmp_path) in caplog.text
    assert ParentRun(TrackerOptions(kind="none"), tmp_path, {}).run_id is None
