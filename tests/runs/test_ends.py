"""How a run is ended, refused and taken up again: stops, Ctrl-C, second starts, orders, bad rows and files."""

import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from mixer.control.record import read_record
from mixer.control.rundir import load_schedule
from mixer.core.errors import DataError, ResumeError, SignalError
from mixer.launch import fit, live
from mixer.run import open_rows, require_same
from tests.runs.making import STEPS, WINDOWS, Fault, Outcome, config_of, options_of, work_with

pytestmark = [pytest.mark.ray]

ROOT = Path(__file__).parents[2]
REFUSED_S = 1.0
CLEAN_S = 30.0
START_S = 300.0  # on a busy machine


def test_stopped_within_a_window_the_same_command_goes_on_to_the_same_end(texts, tmp_path, undisturbed):
    config = config_of(texts, tmp_path / "run")
    assert fit(config, open_rows(config), work=work_with([Fault(10, 0, "stop")])).ending == "stopped"
    half = Outcome.of(config)
    assert sorted(half.rows) == list(range(10))
    assert (tmp_path / "run" / "checkpoints" / f"{10:09d}").is_dir()
    changed = config_of(texts, tmp_path / "run", "checkpoint.every_windows=3", "train.max_failures=0")
    assert fit(changed, open_rows(changed), work=work_with()).ending == "finished"
    Outcome.of(config).require_same(undisturbed)
    assert Outcome.of(config).losses == undisturbed.losses  # also of the window in two parts


@pytest.mark.parametrize(
    ("override", "text"),
    [
        ("policy.smoothing=0.5", r"policy\.smoothing=0\.3, this config has 0\.5\."),
        ("train.seed=1", r"train\.seed=0, this config has 1\."),
        ("train.windows=12", r"train\.windows=10, this config has 12\."),
        ("geometry.batch_rows=16", r"batch_rows=8, this config has 16\."),
        ("geometry.seed=7", r"seed=0, this config has 7\."),
        ("controller.lag_windows=2", r"controller\.lag_windows=1, this config has 2\."),
    ],
)
def test_what_would_be_another_run_is_refused_with_both_values(texts, tmp_path, undisturbed, override, text):
    folder = tmp_path / "run"
    shutil.copytree(undisturbed.folder, folder, ignore=shutil.ignore_patterns("ray", "trace"))
    config = config_of(texts, folder, override)
    with pytest.raises(ResumeError, match=text):
        fit(config, open_rows(config))
    assert (folder / "schedule.jsonl").read_bytes() == undisturbed.schedule
    require_same(config_of(texts, folder, "train.num_workers=3", "checkpoint.keep=1"), folder)


def test_orders_on_a_live_run_are_bound_to_the_window_that_was_answered(texts, tmp_path, ray_session):
    config = config_of(texts, tmp_path / "run")
    answers = {}

    def order(status):
        if status["decided"] < 4 or answers:
            return
        with live(config.run.folder) as run:
            answers["set"] = run.call("set_weights", {"noise": 0.7}, "more noise", None, False)
            answers["pause"] = run.call("pause_policy", "look at it", answers["set"] + 2)

    assert fit(config, open_rows(config), work=work_with(pause_s={0: 0.1}), on_status=order, every_s=0.05)
    schedule, at, paused = load_schedule(config.run.folder), answers["set"], answers["pause"]
    assert paused == at + 2 < WINDOWS
    assert schedule.row(at).reason == "set: more noise"
    assert schedule.row(at).mixture.to_dict(schedule.catalog)["noise"] == pytest.approx(0.7)
    assert [schedule.row(k).reason for k in (at - 1, at + 1)] == ["policy", "policy"]
    assert {schedule.row(k).reason for k in range(paused, WINDOWS)} == {"paused: look at it"}
    assert schedule.row(WINDOWS - 1).weights_d.tolist() == schedule.row(paused - 1).weights_d.tolist()
    told = [(r["window"], r["text"]) for r in Outcome.of(config).records if r.get("what") == "order"]
    assert told == [(at, "set: more noise"), *((k, "paused: look at it") for k in range(paused, WINDOWS))]


@pytest.mark.parametrize("lag", [0, 1])
def test_a_controller_that_refuses_to_go_on_ends_the_run_while_all_wait_for_rows(texts, tmp_path, ray_session, lag):
    absurd = [f"controller.lag_windows={lag}", "controller.max_mean_loss=1e-6", "controller.max_held=2"]
    config = config_of(texts, tmp_path / "run", *absurd)
    with pytest.raises(SignalError, match=rf"last 2 windows were held, and so would be window {3 + lag}: .* mean loss"):
        fit(config, open_rows(config), work=work_with())
    assert len(load_schedule(config.run.folder)) == 3 + lag


def test_people_order_from_processes_of_their_own_however_they_spell_the_folder(texts, tmp_path, ray_session):
    config = config_of(texts, tmp_path / "run", "train.windows=8", "train.num_workers=1")
    (tmp_path / "beside").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "run")
    done, go = {}, tmp_path / "go"

    def order(status):
        if status["decided"] == 4 and not done:
            done["set"] = verb(tmp_path / "beside", "set", "../link", "noise=0.5", "--why", "more noise")
            done["pause"] = verb(tmp_path / "beside", "pause-policy", "../link", "--why", "look", "--window", "6")
            done["resume"] = verb(tmp_path / "beside", "resume-policy", "../run", "--window", "7")
            done["late"] = verb(tmp_path / "beside", "set", "../link", "noise=0.1", "--window", "3")
            go.touch()

    hold = Fault(2 * STEPS + 1, 0, "call", partial(wait_until_there, go))  # two signals decide four windows
    assert fit(config, open_rows(config), work=work_with([hold]), on_status=order).ending == "finished"
    said = {name: one.stdout + one.stderr for name, one in done.items()}
    assert [one.returncode for one in done.values()] == [0, 0, 0, 2], said
    assert said["set"].splitlines()[0] == "ordered for window 4"
    assert said["set"].splitlines()[1].endswith("mixer show schedule ../link --windows 4")
    assert said["pause"] == "the policy is paused from window 6\n"
    assert said["resume"] == "the policy decides again from window 7\n"
    assert "window 3 cannot be ordered" in said["late"]
    schedule = load_schedule(config.run.folder)
    assert [row.reason for row in schedule][3:] == ["policy", "set: more noise", "policy", "paused: look", "policy"]
    assert schedule.row(4).mixture.to_dict(schedule.catalog)["noise"] == pytest.approx(0.5)
    over = verb(tmp_path / "beside", "pause-policy", "../link")
    assert over.returncode == 2
    assert "../link is not being run: there is no live.json" in over.stderr


def verb(folder, *args):
    """`mixer ...` in that folder."""
    command = [sys.executable, "-m", "mixer.cli", *args]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=START_S, check=False
    )


def wait_until_there(path):
    deadline = time.monotonic() + START_S
    while not path.exists():
        assert time.monotonic() < deadline, path
        time.sleep(0.05)


def test_a_bad_row_stops_the_run_by_rule_and_is_named(texts, tmp_path, undisturbed):
    config = config_of(texts, tmp_path / "run", "step.bad_loss=stop")
    assert fit(config, open_rows(config), work=work_with(bad_step=6)).ending == "bad_loss"
    half = Outcome.of(config)
    assert sorted(half.rows) == list(range(8))  # to the end of its window
    place, row, _ = half.rows[6][4].split(":")  # the last rank's first
    name = load_schedule(config.run.folder).catalog.names[int(place)]
    (told,) = [record for record in half.records if record.get("what") == "bad_rows"]
    assert told["window"] == 1
    assert told["text"] == f"1 steps were left out; rows without a usable loss: {name} row {row} in step 2"
    skipping = config_of(texts, tmp_path / "run", "step.bad_loss=skip")
    assert fit(skipping, open_rows(skipping), work=work_with(bad_step=14)).ending == "finished"
    run = Outcome.of(config)
    assert sorted(run.rows) == list(range(WINDOWS * STEPS))
    windows = [record for record in run.records if record["kind"] == "window"]
    assert [record["skipped_steps"] for record in windows] == [0, 1, 0, 1, *[0] * 6]
    assert [sum(record["bad_rows_d"].values()) for record in windows] == [0, 1, 0, 1, *[0] * 6]


@pytest.mark.parametrize("harm", ["damaged", "removed"])
def test_a_shard_that_goes_bad_stops_the_run_and_restored_it_ends_the_same(texts, tmp_path, undisturbed, harm):
    shutil.copytree(texts, tmp_path / "texts")
    (shard,) = (tmp_path / "texts" / "train" / "shards" / "noise").iterdir()
    kept = shard.read_bytes()
    config = config_of(tmp_path / "texts", tmp_path / "run", "train.max_failures=2")
    faults = [Fault(9, 0, "call", partial(HARMS[harm], shard))]
    if harm == "removed":  # who has it open can still read it
        faults.append(Fault(14, 1, "rank"))
    with pytest.raises(DataError, match=r"noise") as caught:
        fit(config, open_rows(config), work=work_with(faults))
    print(caught.value)
    assert shard.name in str(caught.value)
    assert "Traceback" not in str(caught.value)
    end = read_record(tmp_path / "run").end
    assert end is not None
    assert (end["what"], end["text"]) == ("failed", str(caught.value))
    shard.write_bytes(kept)
    assert fit(config, open_rows(config), work=work_with()).ending == "finished"
    assert read_record(tmp_path / "run").status == "finished"
    Outcome.of(config).require_same(undisturbed)


def damage(shard):
    """In place, as storage that decays."""
    data = bytearray(shard.read_bytes())
    for place in range(len(data) // 8, len(data) * 7 // 8, 16):
        data[place] ^= 1
    with open(shard, "r+b") as file:
        file.write(data)


HARMS = {"damaged": damage, "removed": os.unlink}


# ---- a process of its own ----------------------------------------------------------------------------------


@pytest.fixture
def start():
    """Starts `mixer train`, in a group of its own, which Ctrl-C on a terminal would reach whole."""
    started = []

    def start(options):
        process = subprocess.Popen(
            [sys.executable, "-m", "jobs.train", *options],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:  # where the test failed; what it left ends by itself
        if process.poll() is None:
            process.kill()


def test_ctrl_c_saves_and_ends_cleanly_and_second_starts_are_refused(texts, tmp_path, undisturbed, start):
    folder = tmp_path / "run"
    options = options_of(texts, folder, "run.num_cpus=2", "run.object_store_mb=100")
    # Before the first step: as soon as there is something of the run.
    first = start(options)
    wait_for(folder / "live.json", first)
    out = interrupt(first, (0, 130))
    assert not list(folder.glob("trace/*.txt")) or "goes on from here" in out
    # In the middle.
    second = start(options)
    wait_for(lambda: (folder / "journal.jsonl").read_text().count('"kind":"window"') >= 2, second)
    config = config_of(texts, folder)
    rows, begin = open_rows(config), time.monotonic()
    with pytest.raises(ResumeError, match=r"belongs to pid \d+ on .* since"):
        fit(config, rows)
    took_s = time.monotonic() - begin
    print(f"the second start was refused after {took_s * 1e3:.1f} ms")
    assert took_s < REFUSED_S
    out = interrupt(second, (0,))
    assert "stopped after" in out
    assert "the same command goes on from here" in out
    assert "stopped" in [record.get("what") for record in Outcome.of(config).records]
    # To the end.
    third = start(options)
    out, _ = third.communicate(timeout=300)
    assert third.returncode == 0
    assert "finished after 40 steps" in out
    Outcome.of(config).require_same(undisturbed)


def interrupt(process, codes):
    """What Ctrl-C does; nothing of the process may be left a while later."""
    family = descendants(process.pid)
    assert family
    os.killpg(process.pid, signal.SIGINT)
    out, _ = process.communicate(timeout=300)
    assert process.returncode in codes, out
    deadline = time.monotonic() + CLEAN_S
    while left := [one for one in family if identity(one[0]) == one]:
        assert time.monotonic() < deadline, left
        time.sleep(0.2)
    return out


def identity(pid):
    """The number of a process, and when it began; None if it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else (pid, fields[19])


def descendants(pid):
    parents = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        parents.setdefault(int(fields[1]), []).append(int(folder.name))
    found, todo = [], [pid]
    while todo:
        children = parents.get(todo.pop(), [])
        todo += children
        found += [one for child in children if (one := identity(child))]
    return found


def wait_for(what, process):
    deadline = time.monotonic() + START_S
    there = what.exists if isinstance(what, Path) else what
    while True:
        try:
            if there():
                return
        except OSError:
            pass
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, what
        time.sleep(0.05)
