"""What one process has open of a run: who may write, what is remembered, what is told of how it ended."""

import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mixer.control.fence import epoch_to_replace, read_owner
from mixer.control.journal import ENDINGS, Journal, read_journal
from mixer.control.openrun import OpenRun
from mixer.control.record import read_record
from mixer.core.errors import ResumeError, ScheduleError
from tests.control.making import CATALOG, PLANNED, bytes_of, make_charge, signals, window_record
from tests.core.policies.making import make_signal

ROOT = Path(__file__).parents[2]


def records(folder: Path) -> list[dict]:
    return [record for _, record in read_journal(folder / "journal.jsonl")]


def event(what: str, **more) -> dict:
    return {"kind": "event", "what": what, "text": "", **more}


def report(run: OpenRun, begin: int, end: int) -> None:
    for window in range(begin, end):
        run.report(signals()[window], window_record(window))


# ---- one owner --------------------------------------------------------------------------------------


def takeover_of(folder: Path) -> int:
    owner = read_owner(folder)
    assert owner is not None
    return owner.epoch


def test_an_owner_that_was_replaced_writes_nothing_whatever_it_does(tmp_path, caplog):
    charge = make_charge(tmp_path)
    old = OpenRun(charge, where={"address": "old"})
    report(old, 0, 2)
    new = OpenRun(replace(charge, takeover=takeover_of(tmp_path)), where={"address": "new"})
    report(new, 2, 3)
    before = bytes_of(tmp_path)
    assert '"new"' in (tmp_path / "live.json").read_text()
    caplog.clear()
    old.note([event("checkpoint"), event("stop")])
    old.note([window_record(7)])
    with pytest.raises(ScheduleError, match="taken over by pid .*epoch 2"):
        report(old, 2, 3)
    old.close(0.0)  # with its report
    assert bytes_of(tmp_path) == before
    said = [entry.getMessage() for entry in caplog.records if entry.levelno >= logging.WARNING]
    assert sum("nothing is added to" in line for line in said) == 1
    report(new, 3, 4)
    assert [record["window"] for record in records(tmp_path) if record["kind"] == "window"] == [0, 1, 2, 3]
    new.close(0.0)
    assert (tmp_path / "report" / "report.html").exists()
    assert not (tmp_path / "live.json").exists()


SLEEPER = """
import os, signal, sys
from pathlib import Path
from mixer.control.openrun import OpenRun
from mixer.core.errors import ScheduleError
from tests.control.making import make_charge, signals, window_record
run = OpenRun(make_charge(Path(sys.argv[1])), where={"address": "old"})
run.report(signals()[0], window_record(0))
with open(Path(sys.argv[1]) / "journal.jsonl", "ab") as file:
    file.write(b'{"kind":"event","ti')  # the half of a record, which its next one would be put behind
os.kill(os.getpid(), signal.SIGSTOP)
run.note([{"kind": "event", "what": "checkpoint", "text": ""}])
try:
    run.report(signals()[1], window_record(1))
except ScheduleError:
    run.close(0.0)
    sys.exit(7)
"""


def test_an_owner_that_sleeps_through_its_replacement_leaves_every_byte_alone(tmp_path):
    child = subprocess.Popen([sys.executable, "-c", SLEEPER, str(tmp_path)], cwd=ROOT)
    try:
        os.waitpid(child.pid, os.WUNTRACED)
        new = OpenRun(make_charge(tmp_path, takeover=takeover_of(tmp_path)))
        report(new, 1, 2)
        before = bytes_of(tmp_path)
        os.kill(child.pid, signal.SIGCONT)
        assert child.wait(60) == 7
        assert bytes_of(tmp_path) == before
        new.close(0.0, report=False)
    finally:
        child.kill()
        child.wait(20)


def test_a_process_that_was_started_again_replaces_the_one_before_it_and_nobody_else(tmp_path):
    charge = make_charge(tmp_path)
    first = OpenRun(charge)  # cut off, and so alive
    with pytest.raises(ResumeError, match=r"belongs to pid .*epoch 1"):
        OpenRun(make_charge(tmp_path), again=True)  # another charge
    second = OpenRun(charge, again=True)
    with pytest.raises(ScheduleError, match="taken over"):
        report(first, 0, 1)
    report(second, 0, 1)
    second.close(0.0, report=False)
    other = OpenRun(make_charge(tmp_path))  # which has got the run rightly
    before = bytes_of(tmp_path)
    with pytest.raises(ResumeError, match=r"belongs to pid .*epoch 3"):
        OpenRun(charge, again=True)
    with pytest.raises(ResumeError, match=r"belongs to pid .*epoch 3"):
        OpenRun(replace(charge, takeover=1), again=True)  # what was once allowed is no key to later owners
    assert bytes_of(tmp_path) == before
    report(other, 1, 2)
    other.close(0.0, report=False)


def test_a_takeover_is_refused_where_the_owner_can_be_reached(tmp_path, monkeypatch):
    assert epoch_to_replace(tmp_path) is None
    run = OpenRun(make_charge(tmp_path))
    with pytest.raises(ResumeError, match=rf"lives on this machine.*stop process {os.getpid()} "):
        epoch_to_replace(tmp_path)
    with monkeypatch.context() as patch:  # as seen from another machine, where that number means nothing
        patch.setattr(socket, "gethostname", lambda: "elsewhere")
        assert epoch_to_replace(tmp_path) == 1
        new = OpenRun(make_charge(tmp_path, takeover=1))
    run.close(0.0, report=False)
    assert epoch_to_replace(tmp_path) == 2  # held from elsewhere
    new.close(0.0, report=False)
    assert epoch_to_replace(tmp_path) is None


# ---- how it ended -----------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ENDINGS)
def test_how_a_run_ended_is_known_until_it_goes_on(tmp_path, ending):
    charge = make_charge(tmp_path)
    run = OpenRun(charge)
    run.note([event("begun"), event("workers")])
    report(run, 0, 2)
    assert run.status()["ending"] == ""
    run.note([event(ending)])
    run.close(0.0, report=False)
    run = OpenRun(charge, again=True)  # its controller was lost at the very end
    assert run.status()["ending"] == read_record(tmp_path).status == ending
    run.note([event("begun")])
    assert run.status()["ending"] == ""
    assert read_record(tmp_path).end is None
    run.note([event("workers")])  # of a driver that was started again: no restart
    assert [record["what"] for record in records(tmp_path)[-3:]] == ["restart", "begun", "workers"]
    run.close(0.0, report=False)


# ---- what a process was to tell of its rows when it was lost -----------------------------------------


def drive(run: OpenRun) -> None:
    """Report in order until everything is decided, as a loop does; window 4 cannot be true."""
    while (window := run.status()["decided"] - 2) < PLANNED - 2:
        signal = make_signal(CATALOG, 4, [1e6, 2.0, 2.0]) if window == 4 else signals()[window]
        run.report(signal, window_record(window))


def told(folder: Path) -> dict[str, list]:
    """By kind; the why of a held row is lost with the process that held it."""
    found = records(folder)
    return {
        "policy": [(one["window"], one["values"]) for one in found if one["kind"] == "policy"],
        "rows": [(one["what"], one["window"]) for one in found if one.get("what") in ("held", "order")],
        "windows": [one["window"] for one in found if one["kind"] == "window"],
    }


def killed_before(folder: Path, kind: str, window: int) -> None:
    """Another process goes on with the run, and dies when it is about to note a record."""
    child = os.fork()
    if not child:
        with contextlib.suppress(BaseException):
            append = Journal.append

            def die(self: Journal, record: Mapping[str, Any]) -> bool:
                if record["kind"] == kind and record.get("window") == window:
                    os._exit(9)
                return append(self, record)

            Journal.append = die
            run = OpenRun(make_charge(folder))
            if not records(folder):
                order(run)
            drive(run)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


def order(run: OpenRun) -> None:
    run.decider.set_weights({"a": 0.5}, "try", window=4)
    run.decider.pause_policy("look", window=8)


def test_what_a_process_was_to_tell_of_its_rows_is_told_by_the_next_one(tmp_path):
    run = OpenRun(make_charge(tmp_path / "whole"))
    order(run)
    drive(run)
    run.close(0.0, report=False)
    whole = told(tmp_path / "whole")
    assert [window for window, _ in whole["policy"]] == list(range(PLANNED - 2))
    assert whole["rows"] == [("order", 4), ("held", 6), *(("order", window) for window in range(8, PLANNED))]
    folder = tmp_path / "killed"
    places = [("window", 0), ("policy", 1), ("event", 4), ("policy", 2), ("event", 6), ("policy", 4), ("event", 8)]
    places += [("window", 7), ("event", 10), ("policy", 9)]  # the last is that of the last row
    for kind, window in places:
        killed_before(folder, kind, window)
    run = OpenRun(make_charge(folder))
    drive(run)
    run.close(0.0, report=False)
    OpenRun(make_charge(folder)).close(0.0, report=False)  # all is told: nothing is added
    found = told(folder)
    assert found["policy"] == whole["policy"]
    assert sorted(found["rows"]) == sorted(whole["rows"])
    assert found["windows"] == [window for window in whole["windows"] if window not in (0, 7)]  # workers repeat those
    assert (folder / "schedule.jsonl").read_bytes() == (tmp_path / "whole" / "schedule.jsonl").read_bytes()


def test_a_policy_whose_newest_state_is_lost_is_not_told_with_an_older_one(tmp_path):
    killed_before(tmp_path, "policy", 3)
    (tmp_path / "policy" / "5.npz").write_bytes(b"")
    run = OpenRun(make_charge(tmp_path))
    assert [window for window, _ in told(tmp_path)["policy"]] == [0, 1, 2]
    run.close(0.0, report=False)
