"""What the driver does while others work: signals taken, the actor asked until it has heard."""

import os
import signal
import threading

import pytest

from mixer.launch import _run


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
