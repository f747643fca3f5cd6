"""The controller without Ray: a script of signals, restarts anywhere, and the schedule byte for byte."""

import os
import subprocess
import sys
import threading
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest

from mixer.control.controller import Receipt
from mixer.control.rundir import RunDir
from mixer.core.errors import ConfigError, ResumeError, ScheduleError, SignalError
from mixer.core.policies import load_policy
from mixer.core.rails import GuardRails
from mixer.core.schedule import MixtureSchedule
from tests.control.making import CATALOG, PLANNED, open_controller, signals, text_of, undisturbed
from tests.core.policies.making import make_signal

ROOT = Path(__file__).parents[2]


def drive(folder, controller, script=None):
    """Report in order until the run is complete, as a loop does."""
    script = script or signals()
    while not controller.is_complete:
        controller.report(script[controller.next_signal])


@pytest.mark.parametrize("lag", [0, 1, 3])
def test_a_restart_between_any_two_signals_leaves_no_trace(tmp_path, lag):
    expected = undisturbed(tmp_path / "whole", lag_windows=lag)
    restarted = tmp_path / "restarted"
    for _ in range(PLANNED + 1):
        with RunDir(restarted) as rundir:
            controller = open_controller(rundir, lag_windows=lag)
            if not controller.is_complete:
                controller.report(signals()[controller.next_signal])
    assert text_of(restarted) == expected


@pytest.mark.parametrize("seed", range(25))
def test_any_order_of_arrival_with_doubles_and_restarts_gives_one_schedule(tmp_path, seed):
    lag = seed % 4
    expected = undisturbed(tmp_path / "whole", lag_windows=lag)
    rng, script, disturbed = np.random.default_rng(seed), signals(), tmp_path / "disturbed"
    rundir = RunDir(disturbed)
    controller = open_controller(rundir, lag_windows=lag)
    for _ in range(2000):
        if controller.is_complete:
            break
        if rng.random() < 0.1:
            rundir.close()
            rundir = RunDir(disturbed)
            controller = open_controller(rundir, lag_windows=lag)
        controller.report(script[int(rng.integers(0, controller.next_window))])
    assert controller.is_complete, f"seed {seed}"
    rundir.close()
    assert text_of(disturbed) == expected, f"seed {seed}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Follows:
    """Answers with a decaying sum of all losses it was shown, so that every signal is seen in every later row."""

    NEEDS: ClassVar[frozenset[str]] = frozenset({"loss"})

    def start(self, setting):
        return {"loss_d": np.zeros(3)}

    def update(self, state, signal):
        loss_d = 0.5 * state["loss_d"] + signal.loss_d
        return {"loss_d": loss_d}, loss_d


@pytest.mark.parametrize("lag", [0, 1, 2, 5])
def test_a_row_depends_on_the_signals_that_the_lag_allows_and_no_others(tmp_path, lag):
    options = {"lag_windows": lag, "policy": Follows(), "rails": GuardRails()}
    base = MixtureSchedule.from_text(undisturbed(tmp_path / "base", **options))
    for row in base:
        assert row.signals_through == max(row.window - 1 - lag, -1)
        assert row.reason == ("prior" if row.window <= lag else "policy")
        if row.window <= lag:
            np.testing.assert_allclose(row.weights_d, 1 / 3, rtol=0, atol=1e-12)
    for changed in range(PLANNED):
        script = signals()
        script[changed] = make_signal(CATALOG, changed, [1.0, 1.0, 9.0])
        with RunDir(tmp_path / str(changed)) as rundir:
            drive(rundir.path, open_controller(rundir, **options), script)
            same = [np.array_equal(row.weights_d, base.row(row.window).weights_d) for row in rundir.schedule]
        assert [window for window, equal in enumerate(same) if not equal] == list(range(changed + 1 + lag, PLANNED))


def test_rows_exist_as_far_as_the_lag_and_early_signals_wait(tmp_path):
    with RunDir(tmp_path) as rundir:
        controller = open_controller(rundir, lag_windows=2)
        assert controller.next_window == 3
        assert controller.row_or_none(3) is None
        script = signals()
        assert controller.report(script[2]) is Receipt.WAITING
        assert controller.report(script[1]) is Receipt.WAITING
        assert controller.next_window == 3
        assert controller.report(script[0]) is Receipt.FOLDED
        assert controller.next_window == 6
        before = text_of(tmp_path)
        assert controller.report(script[0]) is Receipt.REPEATED
        assert controller.report(make_signal(CATALOG, 1, [9.0, 9.0, 1.0])) is Receipt.REPEATED
        assert text_of(tmp_path) == before
        assert controller.counts["repeated"] == 2


def test_rows_are_read_while_another_one_is_written_and_that_one_not_before_it_is_durable(tmp_path, monkeypatch):
    with RunDir(tmp_path) as rundir:
        controller = open_controller(rundir)
        seen: list[tuple[bool, bool]] = []

        def ask() -> None:
            seen.append((controller.row_or_none(1) is not None, controller.row_or_none(2) is not None))

        def fsync(number: int, real=os.fsync) -> None:
            thread = threading.Thread(target=ask, daemon=True)  # as somebody else asks, in the middle of the write
            thread.start()
            thread.join(10)
            assert not thread.is_alive(), "who asks for a row waits for a disk"
            real(number)

        monkeypatch.setattr(os, "fsync", fsync)
        controller.report(signals()[0])
        monkeypatch.undo()
        assert len(seen) >= 3
        assert set(seen) == {(True, False)}
        assert controller.row_or_none(2) is not None


def test_signals_of_other_runs_are_refused(tmp_path):
    with RunDir(tmp_path) as rundir:
        controller = open_controller(rundir)
        with pytest.raises(SignalError, match="not decided"):
            controller.report(signals()[2])
        other = signals()[0]
        with pytest.raises(SignalError, match="under catalog"):
            controller.report(type(other)(window=0, catalog="x" * 64, loss_sum_d=other.loss_sum_d,
                tokens_d=other.tokens_d, rows_d=other.rows_d, bad_rows_d=other.bad_rows_d))  # fmt: skip


@pytest.mark.parametrize(
    ("losses", "count"),
    [
        ([1e6, 2.0, 2.0], "absurd loss of a"),
        ([2.0, -1.0, 2.0], "absurd loss of b"),
        ([float("nan")] * 3, "bad rows of c"),
        ([None, None, None], "empty"),
    ],
)
def test_signals_that_cannot_be_true_are_counted_named_and_held(tmp_path, losses, count):
    script = signals()
    script[4] = make_signal(CATALOG, 4, losses)
    with RunDir(tmp_path) as rundir:
        controller = open_controller(rundir)
        drive(tmp_path, controller, script)
        rows = rundir.schedule.rows
        assert [row.window for row in rows if row.reason == "held"] == [6]
        assert rows[6].weights_d.tolist() == rows[5].weights_d.tolist()
        assert controller.counts[count] == 1
        assert controller.counts["held"] == 1


def test_a_domain_whose_rows_were_bad_does_not_hold_the_others(tmp_path):
    script = signals()
    script[4] = make_signal(CATALOG, 4, [float("inf"), 2.0, 3.0])
    with RunDir(tmp_path) as rundir:
        controller = open_controller(rundir)
        drive(tmp_path, controller, script)
        assert rundir.schedule.row(6).reason == "policy"
        assert controller.counts["bad rows of a"] == 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Says:
    """A policy that gives a fixed answer, be it a mixture or not."""

    NEEDS: ClassVar[frozenset[str]] = frozenset({"loss"})
    answer: tuple[float, ...]

    def start(self, setting):
        return {}

    def update(self, state, signal):
        return state, np.array(self.answer)


@pytest.mark.parametrize("answer", [(float("nan"), 1.0, 1.0), (-1.0, 1.0, 1.0), (0.0, 0.0, 0.0), (1.0, 1.0)])
def test_a_policy_that_slips_is_held_and_in_the_end_stopped(tmp_path, answer):
    with RunDir(tmp_path) as rundir:
        controller = open_controller(rundir, policy=Says(answer=answer), max_held=3)
        with pytest.raises(SignalError, match="last 3 windows were held"):
            drive(tmp_path, controller)
        assert [row.reason for row in rundir.schedule] == ["prior"] * 2 + ["held"] * 3
    with RunDir(tmp_path) as rundir, pytest.raises(SignalError, match="last 3 windows"):
        drive(tmp_path, open_controller(rundir, policy=Says(answer=answer), max_held=3))


def test_the_rails_hold_for_every_policy_and_rows_are_not_given_beyond_their_epochs(tmp_path):
    rails = GuardRails(floor=0.05, max_shift=0.2, epochs={"a": 1.0})
    with RunDir(tmp_path) as rundir:
        drive(tmp_path, open_controller(rundir, policy=Says(answer=(1.0, 0.0, 0.0)), rails=rails))
        rows = rundir.schedule.rows
    assert rows[-1].next_offsets_d[0] <= 50
    assert all((row.weights_d[1:] >= 0.05 - 1e-12).all() for row in rows)
    for before, after in pairwise(rows):
        assert np.abs(after.weights_d - before.weights_d).sum() <= 0.2 + 1e-9


def test_rules_that_cannot_hold_to_the_end_are_refused_before_anything_is_written(tmp_path):
    with RunDir(tmp_path) as rundir:
        with pytest.raises(ConfigError):
            open_controller(rundir, rails=GuardRails(floor=0.3, epochs={"a": 0.1}))
        assert not rundir.is_begun


def test_orders_become_rows_with_their_reason_and_survive_restarts(tmp_path):
    for name in ("whole", "restarted"):
        rundir = RunDir(tmp_path / name)
        controller = open_controller(rundir, rails=GuardRails())
        for _ in range(PLANNED):
            if controller.next_window == 4:
                assert controller.set_weights({"a": 0.2, "b": 0.3, "c": 0.5}, "more c", window=5) == 5
                assert controller.pause_policy("look", window=7) == 7
                assert controller.resume_policy(window=10) == 10
            if name == "restarted":
                rundir.close()
                rundir = RunDir(tmp_path / name)
                controller = open_controller(rundir, rails=GuardRails())
            if not controller.is_complete:
                controller.report(signals()[controller.next_signal])
        rows = rundir.schedule.rows
        rundir.close()
        assert [row.reason for row in rows[4:]] == [
            "policy", "set: more c", "policy", "paused: look", "paused: look", "paused: look", "policy", "policy",
        ]  # fmt: skip
        np.testing.assert_allclose(rows[5].weights_d, [0.2, 0.3, 0.5], rtol=0, atol=1e-12)
        assert rows[7].weights_d.tolist() == rows[6].weights_d.tolist() == rows[9].weights_d.tolist()
    assert text_of(tmp_path / "whole") == text_of(tmp_path / "restarted")


def test_what_is_decided_cannot_be_ordered_and_the_end_is_the_end(tmp_path):
    with RunDir(tmp_path) as rundir:
        controller = open_controller(rundir)
        with pytest.raises(ScheduleError, match="window 1 cannot be ordered"):
            controller.pause_policy("late", window=1)
        with pytest.raises(ConfigError, match="'d'"):
            controller.set_weights({"d": 1.0}, "typo")
        drive(tmp_path, controller)
        assert len(rundir.schedule) == PLANNED
        assert controller.report(signals()[-1]) is Receipt.REPEATED
        with pytest.raises(ScheduleError, match="not planned"):
            controller.row(PLANNED)


def test_a_resume_under_another_lag_is_refused(tmp_path):
    undisturbed(tmp_path)
    with RunDir(tmp_path) as rundir, pytest.raises(ResumeError, match="lag_windows=2"):
        open_controller(rundir, lag_windows=2)


def test_a_disk_that_fails_decides_nothing_and_the_run_goes_on_when_it_is_mended(tmp_path, monkeypatch):
    expected = undisturbed(tmp_path / "whole")
    with RunDir(tmp_path / "full") as rundir:
        controller = open_controller(rundir)
        for fail_at in range(2):
            before, window = text_of(rundir.path), controller.next_window
            original, calls = os.write, []

            def write(number, data, original=original, calls=calls, fail_at=fail_at):
                calls.append(1)
                if len(calls) <= fail_at:
                    return original(number, data)
                original(number, data[: len(data) // 2])
                raise OSError(28, "No space left on device")

            monkeypatch.setattr(os, "write", write)
            with pytest.raises(ScheduleError, match=r"No space left.*Make room"):
                controller.report(signals()[controller.next_signal])
            monkeypatch.undo()
            assert text_of(rundir.path) == before
            assert controller.next_window == window
            assert controller.row_or_none(window) is None
        drive(rundir.path, controller)
    assert text_of(tmp_path / "full") == expected


KILLED = """
import os, sys
from mixer.control import fence, rundir
from tests.control.making import open_controller, signals
count, die_at = 0, int(sys.argv[2])
def hook(name, real):
    def call(*args, **kwargs):
        global count
        count += 1
        if count == die_at:
            if name == "write":
                real(args[0], args[1][:len(args[1]) // 2])
            os._exit(9)
        return real(*args, **kwargs)
    return call
for name in ("write", "fsync", "replace", "open", "unlink"):
    setattr(os, name, hook(name, getattr(os, name)))
with rundir.RunDir(sys.argv[1]) as owned:
    controller = open_controller(owned, planned_windows=4)
    while not controller.is_complete:
        controller.report(signals()[controller.next_signal])
"""


def test_killed_at_any_call_to_the_disk_it_goes_on_to_the_same_schedule(tmp_path):
    expected = undisturbed(tmp_path / "whole", planned_windows=4)
    die_at, deaths = 1, 0
    # Every fifth call, with a period that falls into step with no commit; a new process shows what is on the disk.
    while True:
        folder = tmp_path / str(die_at)
        command = [sys.executable, "-c", KILLED, str(folder), str(die_at)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            break
        assert done.returncode == 9, done.stderr
        deaths, die_at = deaths + 1, die_at + 5
        with RunDir(folder) as rundir:
            drive(folder, open_controller(rundir, planned_windows=4))
        assert text_of(folder) == expected, f"killed at call {die_at - 5}"
    assert deaths >= 10


@pytest.mark.parametrize("lag", [0, 2])
def test_a_policy_that_measures_nothing_decides_from_the_first_window_on(tmp_path, lag):
    stages = {
        "begin": {"at": 0.0, "weights": {"a": 1, "b": 0, "c": 0}},
        "end": {"at": 1.0, "weights": {"a": 0, "b": 0, "c": 1}},
    }
    policy = load_policy("scripted", {"stages": stages})
    text = undisturbed(tmp_path, lag_windows=lag, policy=policy, rails=GuardRails())
    for row in MixtureSchedule.from_text(text):
        here = row.window / PLANNED
        np.testing.assert_allclose(row.weights_d, [1 - here, 0, here], rtol=0, atol=1e-9)
        assert row.reason == "policy"


def test_weights_that_are_held_stay_until_the_policy_decides_again(tmp_path):
    with RunDir(tmp_path) as rundir:
        controller = open_controller(rundir, rails=GuardRails())
        assert controller.set_weights({"a": 0.6}, "try", hold=True) == 2
        controller.resume_policy("enough", window=5)
        drive(tmp_path, controller)
        rows = list(rundir.schedule)
    for row in rows[2:5]:
        np.testing.assert_allclose(row.weights_d, [0.6, 0.2, 0.2], rtol=0, atol=1e-12)
    assert [row.reason for row in rows[1:6]] == ["prior", "set: try", "paused: try", "paused: try", "policy"]
