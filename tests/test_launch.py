"""What the driver does while others work: signals taken, the actor asked until it has heard."""

import os
import signal
import threading
from typing import Any

import pytest

from jobs import train
from mixer.control.rundir import RunDir
from mixer.core.errors import DataError, ResumeError
from mixer.launch import PATIENCE_S, _run, _tell_end, fit


class Forgetful:
    """A run's actor that is restarted when it was first asked to stop, and so has forgotten it."""

    def __init__(self, ended: threading.Event) -> None:
        self.asked: list[str] = []
        self.ended = ended

    def call(self, method, *args):
        if method == "stop":
            self.asked += args
            if len(self.asked) == 2:
                self.ended.set()
        return {"stop": len(self.asked) > 1}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_asks_the_run_to_stop_until_its_actor_knows(number):
    ended = threading.Event()
    client = Forgetful(ended)

    def interrupt(status):
        if not client.asked:
            os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    assert _run(lambda: ended.wait(30), client, interrupt, 0.01) is None  # type: ignore[arg-type]
    assert client.asked == [number.name] * 2
    assert signal.getsignal(number) is before


def test_a_second_signal_gives_up_at_once():
    ended = threading.Event()
    client = Forgetful(ended)
    with pytest.raises(KeyboardInterrupt):
        _run(lambda: ended.wait(30), client, lambda status: os.kill(os.getpid(), signal.SIGINT), 0.01)  # type: ignore[arg-type]
    ended.set()


def test_what_the_thread_raises_comes_back():
    error = ValueError("x")

    def fail():
        raise error

    assert _run(fail, Forgetful(threading.Event()), lambda status: None, 0.01) is error  # type: ignore[arg-type]


class Reachable:
    """A run's actor, as far as the end of a run needs it."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, Any]] = []

    def call(self, method: str, *args: Any, deadline: float) -> None:
        self.asked.append((method, *args))


@pytest.mark.parametrize(
    ("error", "told", "patience_s"),
    [
        (DataError("shard x is damaged"), ("failed", "shard x is damaged"), PATIENCE_S),
        (ZeroDivisionError(), ("failed", "ZeroDivisionError()"), PATIENCE_S),
        (KeyboardInterrupt(), ("stopped", "given up at once"), 0.0),
    ],
)
def test_what_a_run_failed_of_is_told_before_it_is_closed(error, told, patience_s):
    client = Reachable()
    _tell_end(client, error)  # type: ignore[arg-type]
    assert client.asked == [
        ("note", [{"kind": "event", "what": told[0], "text": told[1]}]),
        ("close", patience_s),
    ]


def test_a_takeover_is_what_the_command_asks_for_and_never_of_an_owner_on_this_machine(tmp_path, monkeypatch):
    asked: list[bool] = []

    def refused(config, rows, *, on_status, takeover, say):
        asked.append(takeover)
        return fit(config, rows, on_status=on_status, takeover=takeover)

    monkeypatch.setattr(train, "open_rows", lambda config: None)
    monkeypatch.setattr(train, "fit", refused)
    with RunDir(tmp_path / "run"):
        with pytest.raises(ResumeError, match=r"lives on this machine.*stop process \d+ and start the run again"):
            train.main([f"run.path={tmp_path / 'run'}", "--takeover"])
        with pytest.raises(ResumeError, match=r"belongs to pid \d+ .*`mixer train --takeover` goes on without it"):
            train.main([f"run.path={tmp_path / 'run'}"])
    assert asked == [True, False]
