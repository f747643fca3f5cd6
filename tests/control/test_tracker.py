"""One suite for all trackers, and what is particular to MLflow with a store of its own: an SQLite file."""

import json
import logging
import os
import random
import shutil
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from mixer.control.fence import Fence
from mixer.control.journal import Journal
from mixer.control.tracker import MemoryStore, MemoryTracker, MlflowTracker, NoTracker, TrackerOptions, open_tracker
from mixer.core.errors import ConfigError
from tests.control.making import bytes_of
from tests.control.tracking import (
    CONFIG,
    add,
    event,
    expected,
    make_run,
    make_schedule,
    many,
    records_of,
    rows_in,
    settle,
    wait_for,
    window_record,
)

SCHEDULE = make_schedule()


@pytest.fixture(scope="module")
def database(tmp_path_factory) -> Path:
    """A database that MLflow has made, to be copied: making one takes seconds."""
    mlflow = pytest.importorskip("mlflow")
    path = tmp_path_factory.mktemp("database") / "mlflow.db"
    mlflow.MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


class Memory:
    def __init__(self, folder: Path, _: Path) -> None:
        self.store = MemoryStore()

    def open(self, options: TrackerOptions, folder: Path, schedule=SCHEDULE) -> MemoryTracker:
        return MemoryTracker(options, folder, schedule, self.store)

    def rows(self, folder: Path):
        return sorted((m.key, m.step, m.time_ms, m.value) for m in self.store.metrics)

    def params(self, folder: Path):
        return self.store.params

    def tags(self, folder: Path):
        return self.store.tags

    def status(self, folder: Path):
        return self.store.status

    def files(self, folder: Path):
        return self.store.files


class Mlflow:
    def __init__(self, folder: Path, database: Path) -> None:
        self.database = folder / "mlflow.db"
        shutil.copyfile(database, self.database)

    def open(self, options: TrackerOptions, folder: Path, schedule=SCHEDULE) -> MlflowTracker:
        return MlflowTracker(options, folder, schedule)

    def run_id(self, folder: Path) -> str:
        return json.loads((folder / "tracker.json").read_text())["run_id"]

    def run(self, folder: Path) -> Any:
        import mlflow

        return mlflow.MlflowClient(f"sqlite:///{self.database}").get_run(self.run_id(folder))

    def rows(self, folder: Path):
        return rows_in(self.database, self.run_id(folder))

    def params(self, folder: Path):
        return self.run(folder).data.params

    def tags(self, folder: Path):
        return self.run(folder).data.tags

    def status(self, folder: Path):
        return self.run(folder).info.status

    def files(self, folder: Path):
        place = Path(self.run(folder).info.artifact_uri.removeprefix("file://"))
        return {path.relative_to(place).as_posix(): path.read_bytes() for path in place.rglob("*") if path.is_file()}


@pytest.fixture(params=[Memory, Mlflow])
def home(request, tmp_path, database) -> Any:
    return request.param(tmp_path, database)


@pytest.fixture
def folder(tmp_path) -> Path:
    return tmp_path / "a"


@pytest.fixture
def sqlite(tmp_path, database) -> Mlflow:
    return Mlflow(tmp_path, database)


# ---- all trackers --------------------------------------------------------------------------------


def test_everything_arrives_once_however_it_was_woken(home, folder):
    journal = make_run(folder, 2)
    tracker = home.open(TrackerOptions(), folder)
    settle(tracker)
    for window in range(2, 6):
        add(journal, window, window + 1)
        journal.append(event("checkpoint"))
        tracker.wake()
        tracker.wake()
    tracker.close(30)
    assert tracker.behind == 0
    rows = home.rows(folder)
    assert rows == expected(folder, SCHEDULE)
    assert ("train/tokens_per_s", 12, 1_700_000_002_250, 502.0) in rows
    assert ("eval/target/code_new/loss", 20, 1_700_000_004_500, 6.0) in rows
    assert ("policy/rate", 24, 1_700_000_005_500, 5.5) in rows


def test_a_next_tracker_goes_on_where_the_last_one_was(home, folder):
    journal = make_run(folder, 3)
    home.open(TrackerOptions(), folder).close(30)
    before = home.rows(folder)
    add(journal, 3, 5)
    tracker = home.open(TrackerOptions(), folder)
    add(journal, 5, 7)
    tracker.close(30)
    assert home.rows(folder) == expected(folder, SCHEDULE)
    assert set(before) < set(home.rows(folder))
    assert ("tokens/a", 28, 1_700_000_006_250) in {row[:3] for row in home.rows(folder)}


def test_by_domain_for_every_so_many_windows_only(home, folder):
    make_run(folder, 8)
    home.open(TrackerOptions(every_windows=4), folder).close(30)
    rows = home.rows(folder)
    assert {step for key, step, _, _ in rows if key.startswith(("weight/", "tokens/", "policy/reward"))} == {16, 32}
    assert {step for key, step, _, _ in rows if key == "train/loss"} == set(range(4, 36, 4))


def test_thousands_of_domains_are_shown_less_often(home, folder):
    catalog = many(600)
    schedule = make_schedule(6, catalog, rows=600)
    journal = make_run(folder)
    for window in range(6):
        journal.append(window_record(window, catalog))
    home.open(TrackerOptions(), folder, schedule).close(60)
    rows = home.rows(folder)
    assert {step for key, step, _, _ in rows if "/domain_x2F_" in key} == {12, 24}
    assert len([key for key, step, _, _ in rows if key.startswith("tokens/") and step == 24]) == 600
    assert {step for key, step, _, _ in rows if key == "train/loss"} == set(range(4, 28, 4))


def test_what_the_run_is(home, folder):
    make_run(folder).append(event("begun"))
    options = TrackerOptions(tags={"team": "x", "why?": "https://me:pw@there/"}, parent="0123456789abcdef")
    home.open(options, folder).close(30)
    params, tags = home.params(folder), home.tags(folder)
    assert params == {
        "run": "runs/a",
        "geometry.window_steps": "4",
        "geometry.batch_rows": "8",
        "tracker.uri": "https://***@tracker.example/x?api_key=***&y=1",
        "tracker.token": "***",
        "tracker.parent": "null",
        "domains.web_x2F_news": "1.5",
        "domains.code": "2",
        "names": '["a", "b"]',
    }
    assert tags["mixer.catalog"] == SCHEDULE.catalog.fingerprint
    assert tags["mlflow.parentRunId"] == "0123456789abcdef"
    assert tags["team"] == "x" and tags["why_x3F_"] == "https://***@there/"
    assert tags["mixer.run"] == json.loads((folder / "tracker.json").read_text())["run"]
    asked = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    commit = subprocess.run(asked, capture_output=True, text=True, check=False)
    if commit.returncode == 0:
        assert tags["mixer.commit"] == tags["mlflow.source.git.commit"] == commit.stdout.strip()


def test_long_values_are_cut(home, folder):
    make_run(folder)
    (folder / "run.yaml").write_text(json.dumps({"long": "x" * 10_000, "deep": {"n" * 300: 1}, "empty": {}, "no": ""}))
    home.open(TrackerOptions(tags={"long": "y" * 9000}), folder).close(30)
    params = home.params(folder)
    assert params["long"] == "x" * 5999 + "…" and len(params) == 4
    assert home.tags(folder)["long"] == "y" * 4999 + "…"


def test_files_arrive_whole_and_without_secrets(home, folder):
    make_run(folder, 1)
    (folder / "report" / "inner").mkdir(parents=True)
    (folder / "report" / "weights.png").write_bytes(b"\x89PNG")
    (folder / "report" / "index.html").write_text("<p>")
    (folder / "report" / "draft.txt").write_text("no")
    home.open(TrackerOptions(), folder).close(30)
    files = home.files(folder)
    assert files.keys() == {"schedule.jsonl", "catalog.json", "run.yaml", "report/weights.png", "report/index.html"}
    assert files["schedule.jsonl"] == b"{}\n" and files["report/weights.png"] == b"\x89PNG"
    assert b"hidden" not in files["run.yaml"] and b"pa@ss" not in files["run.yaml"] and b"hush" not in files["run.yaml"]
    assert b"geometry: {window_steps: 4, batch_rows: 8}" in files["run.yaml"]


@pytest.mark.parametrize(
    ("events", "status"),
    [
        (["begun"], "RUNNING"),
        (["begun", "finished", "checkpoint"], "FINISHED"),
        (["begun", "stopped"], "KILLED"),
        (["begun", "stopped", "resumed"], "RUNNING"),
        (["begun", "bad_loss"], "FAILED"),
        (["begun", "failed"], "FAILED"),
        (["begun", "failed", "begun"], "RUNNING"),
        (["begun", "bad_loss", "begun", "resumed", "finished"], "FINISHED"),
        (["begun", "finished", "restart"], "FINISHED"),  # of the controller, when all was done
    ],
)
def test_the_runs_status_follows_its_events(home, folder, events, status):
    journal = make_run(folder)
    for what in events:
        journal.append(event(what))
    home.open(TrackerOptions(), folder).close(30)
    assert home.status(folder) == status
    if isinstance(home, Mlflow):
        assert home.run(folder).info.end_time == (None if status == "RUNNING" else 1_700_000_000_000)


def test_damage_is_left_out(home, folder, caplog):
    journal = make_run(folder, 3)
    text = (folder / "journal.jsonl").read_bytes().replace(b'"window":1,', b'"window":"one",')
    (folder / "journal.jsonl").write_bytes(text + b'{"kind":"window","wind')
    (folder / "run.yaml").write_text("a: [1")
    journal.close()
    tracker = home.open(TrackerOptions(), folder)
    tracker.close(30)
    assert {step for key, step, _, _ in home.rows(folder) if key == "train/loss"} == {4, 12}
    assert home.params(folder) == {} and "no parameters" in caplog.text


def test_a_journal_that_was_lost_sends_nothing_again(home, folder):
    make_run(folder, 4).close()
    home.open(TrackerOptions(), folder).close(30)
    before = home.rows(folder)
    (folder / "journal.jsonl").unlink()
    with Journal(folder / "journal.jsonl") as journal:
        add(journal, 3, 5)
        home.open(TrackerOptions(), folder).close(30)
    found = home.rows(folder)
    assert len(set(found)) == len(found) and set(before) < set(found)
    assert {step for key, step, _, _ in found if key == "train/loss"} == {4, 8, 12, 16, 20}


# ---- MLflow --------------------------------------------------------------------------------------


def test_the_history_that_mlflow_gives_is_the_whole_one(sqlite, folder):
    import mlflow

    make_run(folder, 30)
    tracker = sqlite.open(TrackerOptions(), folder)
    tracker.close(30)
    client = mlflow.MlflowClient(f"sqlite:///{sqlite.database}")
    history = client.get_metric_history(tracker.run_id or "", "weight/b")
    wanted = [row for row in expected(folder, SCHEDULE) if row[0] == "weight/b"]
    assert sorted((m.key, m.step, m.timestamp, m.value) for m in history) == wanted and len(wanted) == 30


def test_the_store_lies_beside_the_run_and_so_do_its_artifacts(sqlite, folder, monkeypatch, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    make_run(folder, 1)
    tracker = sqlite.open(TrackerOptions(experiment="mine", name="first"), folder)
    tracker.close(30)
    run = sqlite.run(folder)
    assert run.info.run_name == "first"
    assert run.info.artifact_uri == f"file://{tmp_path}/mlartifacts/{tracker.run_id}/artifacts"
    assert not list((tmp_path / "elsewhere").iterdir())


def test_a_changed_config_does_not_block_what_comes_after(sqlite, folder):
    journal = make_run(folder, 1)
    sqlite.open(TrackerOptions(), folder).close(30)
    position = json.loads((folder / "tracker.json").read_text())
    (folder / "tracker.json").write_text(json.dumps(position | {"described": False}))
    (folder / "run.yaml").write_text("run: other\nnew: 1\n")
    add(journal, 1, 2)
    sqlite.open(TrackerOptions(), folder).close(30)
    assert sqlite.rows(folder) == expected(folder, SCHEDULE)
    assert sqlite.params(folder)["run"] == "runs/a" and sqlite.params(folder)["new"] == "1"


def test_another_tracker_gets_everything(sqlite, folder, tmp_path, database):
    make_run(folder, 3)
    sqlite.open(TrackerOptions(), folder).close(30)
    other = tmp_path / "other.db"
    shutil.copyfile(database, other)
    tracker = sqlite.open(TrackerOptions(uri=f"sqlite:///{other}"), folder)
    tracker.close(30)
    assert rows_in(other, tracker.run_id) == expected(folder, SCHEDULE)


def test_a_process_that_was_replaced_stops_sending_and_its_successor_goes_on(sqlite, folder, caplog):
    journal = make_run(folder, 3)
    first = Fence(folder)
    old = MlflowTracker(TrackerOptions(), folder, SCHEDULE, first)
    settle(old)
    second = Fence(folder, takeover=first.owner.epoch)
    add(journal, 3, 5)
    files, rows = bytes_of(folder), sqlite.rows(folder)
    assert {step for key, step, _, _ in rows if key == "train/loss"} == {4, 8, 12}
    begin = time.monotonic()
    old.wake()
    old.close(60)
    assert time.monotonic() - begin < 30  # its thread has ended by itself
    assert bytes_of(folder) == files
    assert sqlite.rows(folder) == rows
    said = [entry.getMessage() for entry in caplog.records if entry.levelno >= logging.WARNING]
    assert len(said) == 1 and "taken over by pid" in said[0]
    new = MlflowTracker(TrackerOptions(), folder, SCHEDULE, second)
    new.close(60)
    assert sqlite.rows(folder) == expected(folder, SCHEDULE)
    first.close()
    second.close()


def test_no_tracker_and_bad_options(folder):
    tracker = open_tracker(TrackerOptions(kind="none"), folder, SCHEDULE)
    tracker.wake()
    tracker.close(1)
    assert isinstance(tracker, NoTracker) and tracker.behind == 0
    bad: dict[str, Any]
    for bad in ({"every_windows": 0}, {"artifacts_every_windows": 0}, {"timeout_s": 0}, {"experiment": ""}):
        with pytest.raises(ConfigError, match=f"{next(iter(bad))}"):
            TrackerOptions(**bad)


def test_tracking_is_light_until_it_begins():
    code = "import sys, mixer.control.tracker, mixer.control.journal; print('mlflow' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


@pytest.mark.parametrize(
    "uri", ["sqlite:////proc/no/such.db", "gopher://x:secret-word@y", "http://user:secret-word@127.0.0.1:9"]
)
def test_a_bad_address_costs_one_warning_and_nothing_else(folder, uri, caplog):
    journal = make_run(folder, 2)
    begin = time.monotonic()
    tracker = MlflowTracker(TrackerOptions(uri=uri, max_pause_s=0.01), folder, SCHEDULE)
    assert time.monotonic() - begin < 1
    wait_for(lambda: "does not take the run" in caplog.text)
    for window in range(2, 5):
        add(journal, window, window + 1)
        tracker.wake()
    assert tracker.behind == 12
    begin = time.monotonic()
    tracker.close(0.3)
    assert time.monotonic() - begin < 2
    warned = [entry.getMessage() for entry in caplog.records if entry.name == "mixer.control.tracker"]
    assert len([text for text in warned if "does not take" in text]) == 1
    assert "12 records" in warned[-1]
    assert "secret-word" not in caplog.text


def test_a_deleted_run_is_not_begun_again(sqlite, folder, caplog):
    import mlflow

    journal = make_run(folder, 1)
    tracker = sqlite.open(TrackerOptions(max_pause_s=0.05), folder)
    settle(tracker)
    client = mlflow.MlflowClient(f"sqlite:///{sqlite.database}")
    client.delete_run(tracker.run_id or "")
    add(journal, 1, 2)
    tracker.wake()
    wait_for(lambda: "does not take the run" in caplog.text)
    assert tracker.behind == 2
    client.restore_run(tracker.run_id or "")
    settle(tracker)
    tracker.close(10)
    assert sqlite.rows(folder) == expected(folder, SCHEDULE)


# ---- what is not known to have arrived -----------------------------------------------------------


class Uncertain:
    """Makes calls of MLflow's client do all, half or nothing of their work, and fail in any case."""

    def __init__(self, monkeypatch, rng: random.Random, often: float) -> None:
        import mlflow

        self.rng, self.often, self.failed = rng, often, 0
        for name in ("log_batch", "create_run", "create_experiment", "update_run", "get_run", "search_runs"):
            self.wrap(monkeypatch, mlflow.MlflowClient, name)

    def wrap(self, monkeypatch, client: Any, name: str) -> None:
        call = getattr(client, name)

        def uncertain(this, *args, **kwargs):
            if self.rng.random() > self.often:
                return call(this, *args, **kwargs)
            self.failed += 1
            part = self.rng.choice(["none", "half", "all"])
            if metrics := kwargs.get("metrics"):
                kwargs["metrics"] = metrics[: {"none": 0, "half": len(metrics) // 2, "all": len(metrics)}[part]]
            if part != "none":
                call(this, *args, **kwargs)
            raise ConnectionError("no answer")

        monkeypatch.setattr(client, name, uncertain)


@pytest.mark.parametrize("seed", range(3))
def test_whatever_became_of_a_request_all_is_there_once(sqlite, folder, monkeypatch, seed):
    uncertain = Uncertain(monkeypatch, random.Random(seed), 0.4)
    monkeypatch.setattr("mixer.control.tracker.FIRST_PAUSE_S", 0.001)
    monkeypatch.setattr("mixer.control.tracker.METRICS_A_REQUEST", 40)
    monkeypatch.setattr("mixer.control.outbox.BATCH_METRICS", 150)
    journal = make_run(folder, 10)
    tracker = sqlite.open(TrackerOptions(max_pause_s=0.01), folder)
    settle(tracker)
    add(journal, 10, 20)
    journal.append(event("finished"))
    tracker.close(60)
    monkeypatch.undo()
    assert uncertain.failed > 5
    assert sqlite.rows(folder) == expected(folder, SCHEDULE)
    assert sqlite.status(folder) == "FINISHED"
    connection = sqlite3.connect(sqlite.database)
    assert connection.execute("select count(*) from runs where lifecycle_stage = 'active'").fetchone() == (1,)
    connection.close()


def test_a_store_that_keeps_what_it_is_given_twice(folder, monkeypatch, tmp_path):
    """MLflow's files: no request is whole or not at all there, and the same row twice is two rows."""
    import mlflow

    def found() -> list:
        client = mlflow.MlflowClient(uri)
        keys = {row[0] for row in wanted}
        histories = [client.get_metric_history(tracker.run_id or "", key) for key in keys]
        return sorted((m.key, m.step, m.timestamp, m.value) for history in histories for m in history)

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    uri = (tmp_path / "files").as_uri()
    make_run(folder, 12)
    wanted = expected(folder, SCHEDULE)
    with monkeypatch.context() as faults:
        Uncertain(faults, random.Random(5), 0.3)
        faults.setattr("mixer.control.tracker.FIRST_PAUSE_S", 0.001)
        faults.setattr("mixer.control.outbox.BATCH_METRICS", 150)
        tracker = MlflowTracker(TrackerOptions(uri=uri, max_pause_s=0.01), folder, SCHEDULE)
        tracker.close(60)
        assert tracker.behind == 0
    assert found() == wanted
    position = json.loads((folder / "tracker.json").read_text())  # as a process leaves it that dies before noting
    (folder / "tracker.json").write_text(json.dumps(position | {"offset": 0, "last": {}, "tokens": {}}))
    tracker = MlflowTracker(TrackerOptions(uri=uri), folder, SCHEDULE)
    assert tracker.behind == 27
    tracker.close(60)
    assert tracker.behind == 0 and found() == wanted


def test_a_run_that_came_late_is_taken_back(sqlite, folder):
    """The first request to create the run was given up, and is carried out after the second."""
    import mlflow

    make_run(folder, 2)
    tracker = sqlite.open(TrackerOptions(), folder)
    settle(tracker)
    position = json.loads((folder / "tracker.json").read_text())
    client = mlflow.MlflowClient(f"sqlite:///{sqlite.database}")
    experiment = client.get_run(tracker.run_id or "").info.experiment_id
    double = client.create_run(experiment, tags={"mixer.run": position["run"]}).info.run_id
    other = client.create_run(experiment, tags={"mixer.run": "another"}).info.run_id
    tracker.close(30)
    assert client.get_run(double).info.lifecycle_stage == "active"  # it was created once: nobody looks
    (folder / "tracker.json").write_text(json.dumps(position | {"attempts": 2}))
    sqlite.open(TrackerOptions(), folder).close(30)
    assert client.get_run(double).info.lifecycle_stage == "deleted"
    assert client.get_run(other).info.lifecycle_stage == "active"
    assert sqlite.rows(folder) == expected(folder, SCHEDULE)
    empty = folder.with_name("empty")
    make_run(empty)
    tracker = sqlite.open(TrackerOptions(), empty)
    wait_for(lambda: tracker.run_id)
    tracker.close(30)
    position = json.loads((empty / "tracker.json").read_text())
    (empty / "tracker.json").write_text(json.dumps(position | {"attempts": 2}))
    sqlite.open(TrackerOptions(), empty).close(30)
    assert client.get_run(tracker.run_id or "").info.lifecycle_stage == "active"  # not a double of itself


KILLED = """
import os, random, signal, sys, threading, time
import mlflow
import mlflow.store.tracking.sqlalchemy_store
from pathlib import Path
from mixer.control import outbox, tracker
from tests.control.tracking import make_schedule

folder, schedule = Path(sys.argv[1]), make_schedule()
CALLS = [(mlflow.MlflowClient, "log_batch"), (outbox, "write_whole"), (os, "replace"), (None, "")]


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def live(number):
    "Killed before or after the n-th of some call, or at any moment."
    outbox.BATCH_METRICS, tracker.METRICS_A_REQUEST = 60, 25
    rng = random.Random(number)
    owner, name = rng.choice(CALLS) if number > 1 else (mlflow.MlflowClient, "create_run")
    if owner is None:
        threading.Timer(rng.uniform(0.02, 0.5), die).start()
    else:
        call, left, before = getattr(owner, name), rng.randrange(8) if number > 1 else 0, number % 2 == 0

        def killed(*args, **kwargs):
            nonlocal left
            left -= 1
            if left < 0 and before:
                die()
            result = call(*args, **kwargs)
            if left < 0:
                die()
            return result

        setattr(owner, name, killed)
    tracker.MlflowTracker(tracker.TrackerOptions(), folder, schedule)
    time.sleep(60)


for number in range(int(sys.argv[2])):
    if (child := os.fork()) == 0:
        live(number)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
tracker.MlflowTracker(tracker.TrackerOptions(), folder, schedule).close(60)
"""


def test_killed_at_any_moment_all_is_there_once(sqlite, folder, tmp_path):
    make_run(folder, 100)
    done = subprocess.run(
        [sys.executable, "-c", KILLED, folder, "12"],
        capture_output=True,
        check=False,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "MLFLOW_DISABLE_TELEMETRY": "true"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["-9"] * 12
    assert sqlite.rows(folder) == expected(folder, SCHEDULE)
    connection = sqlite3.connect(sqlite.database)
    assert connection.execute("select count(*) from runs").fetchone() == (1,)
    connection.close()


def test_a_position_that_cannot_be_noted_costs_nothing(sqlite, folder, monkeypatch, caplog):
    journal = make_run(folder, 1)
    tracker = sqlite.open(TrackerOptions(), folder)
    settle(tracker)

    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as full:
        full.setattr("mixer.control.outbox.write_whole", refuse)
        add(journal, 1, 3)
        tracker.wake()
        settle(tracker)
    assert "No space left" in caplog.text
    tracker = sqlite.open(TrackerOptions(), folder)  # knows nothing of those two windows
    assert tracker.behind >= 0
    add(journal, 3, 4)
    tracker.close(30)
    assert sqlite.rows(folder) == expected(folder, SCHEDULE)


def test_logging_of_others_goes_on(sqlite, folder, caplog):
    make_run(folder, 1)
    sqlite.open(TrackerOptions(), folder).close(30)
    assert not logging.getLogger("mixer.control.tracker").disabled
    assert records_of(0)[0]["window"] == 0 and CONFIG.startswith("run:")
