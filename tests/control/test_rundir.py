import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mixer.control.fence import read_owner
from mixer.control.rundir import RunDir
from mixer.core.errors import ConfigError, ResumeError, ScheduleError
from tests.control.making import open_controller, signals, text_of, undisturbed

ROOT = Path(__file__).parents[2]


def test_a_torn_tail_is_dropped_at_every_byte(tmp_path):
    expected = undisturbed(tmp_path)
    lines = expected.splitlines(keepends=True)
    for cut in range(1, len(lines[-1]) + 1, 7):
        (tmp_path / "schedule.jsonl").write_bytes(expected[:-cut])
        with RunDir(tmp_path) as rundir:
            assert len(rundir.schedule) == len(lines) - 2
        assert text_of(tmp_path) == b"".join(lines[:-1])


def test_a_tear_in_the_middle_is_an_error(tmp_path):
    whole = undisturbed(tmp_path)
    (tmp_path / "schedule.jsonl").write_bytes(whole[:2000] + whole[2001:])
    with pytest.raises(ScheduleError, match="damaged"):
        RunDir(tmp_path)


@pytest.mark.parametrize("damage", ["truncated", "empty", "flipped", "missing", "swapped"])
def test_a_damaged_policy_state_is_passed_over_for_the_one_before_it(tmp_path, damage, caplog):
    undisturbed(tmp_path)
    path, before = tmp_path / "policy" / "11.npz", tmp_path / "policy" / "10.npz"
    assert sorted(file.name for file in (tmp_path / "policy").iterdir()) == ["10.npz", "11.npz"]
    data = bytearray(path.read_bytes())
    if damage == "flipped":  # within an array
        with np.load(path) as kept:
            data[data.index(kept["reward_d"].tobytes())] ^= 1
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(
            {"truncated": data[:100], "empty": b"", "flipped": data, "swapped": before.read_bytes()}[damage]
        )
    with RunDir(tmp_path) as rundir:
        found = rundir.state()
        assert found is not None
        assert found[0] == 10
        assert rundir.lost_states == 1
        assert str(path) in caplog.text
        before.write_bytes(b"")
        with pytest.raises(ResumeError, match="none of the last 2"):
            rundir.state()


def test_whatever_byte_of_a_state_is_flipped_no_other_state_is_believed(tmp_path):
    undisturbed(tmp_path)
    path = tmp_path / "policy" / "11.npz"
    data = path.read_bytes()
    with RunDir(tmp_path) as rundir:
        states: dict[int, Any] = {11: rundir.state()}
        path.write_bytes(b"")
        states[10] = rundir.state()
        for place in range(0, len(data), 7):
            path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
            found = rundir.state()
            assert found is not None
            window, state = found
            assert {key: value.tobytes() for key, value in state.items()} == {
                key: value.tobytes() for key, value in states[window][1].items()
            }


def test_pickles_are_not_loaded(tmp_path):
    undisturbed(tmp_path / "run")
    marker = tmp_path / "marker"
    target = tmp_path / "run" / "policy" / "11.npz"
    bad = (
        "import numpy as np, os\n"
        f"class X:\n    def __reduce__(self): return (os.mkdir, ({str(marker)!r},))\n"
        f"np.savez({str(target)!r}, a=np.array([X()], dtype=object))"
    )
    subprocess.run([sys.executable, "-c", bad], check=True)
    with RunDir(tmp_path / "run") as rundir:
        found = rundir.state()
        assert found is not None
        assert found[0] == 10
    assert not marker.exists()


def test_a_second_owner_is_refused_at_once_and_told_who_holds_it(tmp_path):
    with RunDir(tmp_path):
        begun = time.monotonic()
        with pytest.raises(ResumeError, match=rf"belongs to pid {os.getpid()} on .* since .*epoch 1"):
            RunDir(tmp_path)
        assert time.monotonic() - begun < 1
    with RunDir(tmp_path) as again:
        assert again.fence.owner.epoch == 2


def test_an_owner_that_was_replaced_can_write_nothing(tmp_path):
    old = RunDir(tmp_path)
    controller = open_controller(old)
    with RunDir(tmp_path, takeover=1) as new:
        other = open_controller(new)
        before = text_of(tmp_path)
        states = sorted((tmp_path / "policy").iterdir())
        with pytest.raises(ScheduleError, match="taken over by pid .*epoch 2"):
            controller.report(signals()[0])
        with pytest.raises(ScheduleError, match="taken over"):
            controller.pause_policy("late")
        assert text_of(tmp_path) == before
        assert sorted((tmp_path / "policy").iterdir()) == states
        old.close()  # the death of the first does not open the door that the second holds
        with pytest.raises(ResumeError, match="epoch 2"):
            RunDir(tmp_path)
        other.report(signals()[0])
        assert len(new.schedule) == 3


STOPPED = """
import os, signal, sys
from mixer.control import rundir
from mixer.core.errors import ScheduleError
from tests.control.making import open_controller, signals
owned = rundir.RunDir(sys.argv[1])
controller = open_controller(owned)
if sys.argv[2] == "within":
    real = rundir.write_whole
    def stop(*args):
        rundir.write_whole = real
        os.kill(os.getpid(), signal.SIGSTOP)
        return real(*args)
    rundir.write_whole = stop
else:
    os.kill(os.getpid(), signal.SIGSTOP)
try:
    controller.report(signals()[0])
except ScheduleError:
    sys.exit(7)
"""


@pytest.mark.parametrize("where", ["before", "within"])
def test_an_owner_that_sleeps_through_its_replacement_writes_nothing_on_waking(tmp_path, where):
    child = subprocess.Popen([sys.executable, "-c", STOPPED, str(tmp_path), where], cwd=ROOT)
    try:
        os.waitpid(child.pid, os.WUNTRACED)
        with pytest.raises(ResumeError, match=f"pid {child.pid}"):
            RunDir(tmp_path)
        if where == "before":
            with RunDir(tmp_path, takeover=1) as new:
                open_controller(new).report(signals()[0])
                text = text_of(tmp_path)
                os.kill(child.pid, signal.SIGCONT)
                assert child.wait(20) == 7
                assert text_of(tmp_path) == text
        else:  # in the middle of a write nobody gets in, until the kernel takes the lock from the dead
            with pytest.raises(ResumeError, match="Kill it"):
                RunDir(tmp_path, takeover=1)
            child.kill()
            child.wait(20)
            with RunDir(tmp_path) as new:
                assert len(new.schedule) == 2
    finally:
        child.kill()
        child.wait(20)
    owner = read_owner(tmp_path)
    assert owner is not None
    assert owner.epoch == 2


def test_a_run_is_begun_once_and_only_on_a_disk(tmp_path):
    undisturbed(tmp_path)
    with RunDir(tmp_path) as rundir, pytest.raises(ResumeError, match="holds a run of 12 windows"):
        rundir.begin(rundir.schedule.catalog, rundir.schedule.geometry)
    with pytest.raises(ConfigError, match="local disk"):
        RunDir("s3://bucket/run")
