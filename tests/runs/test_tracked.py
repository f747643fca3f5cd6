"""A whole run as MLflow shows it, though its controller is killed in the middle."""

import json
import sqlite3

import pytest

from mixer.control.rundir import load_schedule
from mixer.control.tracker import MlflowTracker
from mixer.launch import fit
from mixer.run import open_rows
from tests.control.tracking import expected, rows_in
from tests.runs.making import STEPS, Fault, Outcome, config_of, work_with

pytestmark = [pytest.mark.ray, pytest.mark.faults]

NUM = 5  # windows


def test_every_number_of_a_run_is_there_once(texts, tmp_path, ray_session):
    pytest.importorskip("mlflow")
    options = (f"train.windows={NUM}", "train.num_workers=1", "evaluation.every_windows=2", "tracker.kind=mlflow")
    config = config_of(texts, tmp_path / "run", *options)
    finish = fit(config, open_rows(config), work=work_with([Fault(2 * STEPS + 1, 0, "controller")]))
    assert finish.ending == "finished"
    folder, schedule = config.run.folder, load_schedule(config.run.folder)
    assert "restart" in Outcome.of(config).events
    MlflowTracker(config.tracker, folder, schedule).close(120)  # what a busy machine did not send in time
    run_id = json.loads((folder / "tracker.json").read_text())["run_id"]
    found = rows_in(tmp_path / "mlflow.db", run_id)
    assert found == expected(folder, schedule)
    assert [step for key, step, _, _ in found if key == "train/loss"] == [STEPS * (k + 1) for k in range(NUM)]
    assert [step for key, step, _, _ in found if key == "weight/noise"] == [STEPS * (k + 1) for k in range(NUM)]
    assert {key.split("/")[0] for key, *_ in found} >= {"train", "weight", "share", "loss", "policy", "eval", "control"}
    connection = sqlite3.connect(tmp_path / "mlflow.db")
    assert connection.execute("select status from runs where lifecycle_stage = 'active'").fetchall() == [("FINISHED",)]
    connection.close()
