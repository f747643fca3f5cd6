"""The bench of control runs on a tiny model, and counts what it should."""

import argparse
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from mixer.core.plan import Cursor
from tests.bench import control, first_step
from tests.bench.training import Times, Turns, config_of, corpus_of, is_quiet

TINY = ("model.dim=16", "model.num_layers=1", "model.num_heads=2")


def test_a_turn_counts_all_windows_but_its_first() -> None:
    times = Times(2, {0: 9.0, 1: 1.0, 2: 3.0, 3: 9.0, 4: 5.0, 5: 7.0}, dict.fromkeys(range(6), 0.5))
    assert times.of_block(0, 3) == (2.0, 0.5)
    assert times.of_block(1, 3) == (6.0, 0.5)


def test_windows_are_timed_and_the_time_between_turns_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("tests.bench.training.time", SimpleNamespace(perf_counter=lambda: now[0]))

    def make(**_: object):
        for window in range(4):
            for step in range(2):
                now[0] += 1  # waited for
                yield SimpleNamespace(window=window, step=step)

    turned: list[int] = []

    def between(window: int) -> None:
        turned.append(window)
        now[0] += 1000

    times = Times(2)
    for _ in times.watch(make, block=2, between=between)(rank=0, world_size=1, cursor=Cursor()):
        now[0] += 10  # trained
    assert turned == [0, 2, 4]
    assert times.seconds == dict.fromkeys(range(4), 22.0)
    assert times.waited == dict.fromkeys(range(4), 2.0)


def test_a_loop_whose_other_fails_does_not_wait_for_ever() -> None:
    turns = Turns(["a", "b"])
    turns.take("a")
    turns.give()
    turns.take("b")
    turns.fail(ValueError("x"))
    with pytest.raises(RuntimeError):
        turns.take("a")


def test_a_loaded_machine_records_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.getloadavg", lambda: (2.4, 9.0, 9.0))
    assert is_quiet()
    monkeypatch.setattr("os.getloadavg", lambda: (2.6, 0.0, 0.0))
    assert not is_quiet()


@pytest.mark.ray
@pytest.mark.slow
def test_loops_with_and_without_control_take_turns(tmp_path: Path, ray_session: ModuleType) -> None:
    corpus = corpus_of(tmp_path, 16)
    tiny = (*TINY, "train.num_workers=1", "train.windows=4", "geometry.batch_rows=2", "geometry.window_steps=2")
    found = control.cost(config_of(corpus, tmp_path / "run", "0.5m", *tiny, "tracker.kind=none"), 1)
    assert len(found["ratios"]) == 1 and found["ratio"] > 0
    assert 0 <= found["data_wait"] < 1


class Faultless:
    """A service of which only the order of what happens to it is known."""

    def __init__(self) -> None:
        self.begun: list[str] = []

    def begin(self, phase: str) -> None:
        self.begun.append(phase)


@pytest.mark.ray
@pytest.mark.slow
def test_every_fault_lies_between_good_health(
    tmp_path: Path, ray_session: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control, "check", lambda *_: None)
    service, corpus = Faultless(), corpus_of(tmp_path, 16)
    tiny = (*TINY, "train.num_workers=1", "geometry.batch_rows=2", "geometry.window_steps=2", "tracker.kind=none")
    config = config_of(corpus, tmp_path / "run", "0.5m", *tiny)
    found = control.faults(config, service, 1, ("500",))  # pyright: ignore[reportArgumentType]
    assert service.begun == ["healthy", "500", "healthy"]
    assert list(found) == ["500"] and len(found["500"]) == 1


@pytest.mark.ray
@pytest.mark.slow
def test_a_resumed_run_is_timed_beside_a_fresh_one(tmp_path: Path, ray_session: ModuleType) -> None:
    given = argparse.Namespace(warm=0, pairs=1, windows=10, model="0.5m")
    found = first_step.measure(corpus_of(tmp_path, 16), tmp_path, given)
    fresh, resumed = found["fresh"], found["resumed"]
    assert len(fresh) == len(resumed) == 1
    assert fresh[0]["load_s"] == 0 < resumed[0]["load_s"] < resumed[0]["first_step_s"]
