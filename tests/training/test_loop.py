"""The loop on ranks of this machine, without Ray: what it saves, asks for and reports when it is stopped or killed."""

import time
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from mixer.control.controller import Controller
from mixer.control.rundir import RunDir, load_schedule
from mixer.core.errors import CheckpointError
from mixer.data.reader import WindowReader
from mixer.run import Job, make_parts, make_policy, make_prior, open_rows
from mixer.training import checkpoint, loop
from tests.runs.making import STEPS, BadRow, Outcome, config_of, make_texts
from tests.training.ranks import run

SHORT = 4  # windows
NEAR = 1e-4


class KilledError(Exception):
    pass


class Hand:
    """Feed and sink of the first rank. It hands a signal on as late as it may: when a row is asked for that needs
    it, or when it is told to settle; what it still has when it is killed is lost."""

    def __init__(self, config: Any, rows: Any) -> None:
        catalog = rows.catalog
        self._rundir = RunDir(config.run.folder)
        self._controller = Controller(
            config.controller,
            make_policy(config),
            self._rundir,
            catalog,
            config.geometry,
            make_prior(config, catalog),
            rails=config.rails,
            planned_windows=config.train.windows,
        )
        self._kept: list[Any] = []
        self.records: list[Any] = []
        self.stop = False

    def row(self, window: int) -> Any:
        while (found := self._controller.row_or_none(window)) is None and self._kept:
            self._controller.report(self._kept.pop(0))
        assert found is not None, f"window {window} is never decided: a signal before it was lost"
        return found

    def report(self, signal: Any, record: Any = None) -> None:
        self._kept.append(signal)
        self.records.append(record)

    def note(self, record: Any) -> None:
        self.records.append(record)

    def settle(self) -> None:
        for signal in self._kept:
            self._controller.report(signal)
        self._kept = []

    def wants_stop(self) -> bool:
        return self.stop

    def close(self) -> None:
        self._rundir.close()


class Watch:
    """The feed of the other ranks: the schedule as the first one's controller writes it."""

    def __init__(self, folder: Any) -> None:
        self._folder = folder

    def row(self, window: int) -> Any:
        deadline = time.monotonic() + 60
        while not (self._folder / "schedule.jsonl").exists() or len(load_schedule(self._folder)) <= window:
            assert time.monotonic() < deadline, f"window {window} is never decided"
            time.sleep(0.002)
        return load_schedule(self._folder).row(window)

    def close(self) -> None: ...


def attempts(rank: int, world_size: int, _: Any, script: list[tuple[Any, dict[str, Any]]]) -> list[Any]:
    """The ending of each attempt and what it reported; an attempt's second part says before which step it is
    stopped or killed, or which one has a bad row."""
    import ray.train

    class Context:
        get_world_rank = staticmethod(lambda: rank)
        get_world_size = staticmethod(lambda: world_size)

    ray.train.get_context = lambda: Context  # type: ignore[assignment]
    loop._device = lambda: torch.device("cpu")
    return [attempt(rank, *one) for one in script]


def attempt(rank: int, config: Any, happens: dict[str, Any]) -> tuple[str, list[Any]]:
    if rank == 0 and "harmed" in happens:  # before the ranks meet
        newest = max((config.run.folder / "checkpoints").iterdir())
        for file in newest.glob("*.data"):
            data = bytearray(file.read_bytes())
            data[len(data) // 2] ^= 1
            file.write_bytes(data)
    if "all harmed" in happens and rank == 0:
        for file in (config.run.folder / "checkpoints").glob("*/*.data"):
            file.write_bytes(b"nothing")
    rows, bad = open_rows(config), BadRow()
    hand: Any = Hand(config, rows) if rank == 0 else Watch(config.run.folder)
    parts = make_parts(Job(config, rows, hand, None, SHORT), hand)

    def batches(*, rank: int, world_size: int, cursor: Any) -> Any:
        reader = WindowReader(rows, hand, config.geometry, rank=rank, world_size=world_size, windows=SHORT)
        reader.cursor = cursor
        for batch in reader:
            step = batch.window * STEPS + batch.step
            if step == happens.get("killed"):
                raise KilledError
            if rank == 0:
                hand.stop |= step == happens.get("stopped")
            if step == happens.get("bad") and rank == world_size - 1:
                bad.tokens = torch.as_tensor(batch.tokens[0])
            yield batch

    real, number = checkpoint.save, [0]

    def save(*args: Any, **kwargs: Any) -> Any:
        number[0] += 1
        if number[0] in happens.get("unsaved", ()):
            raise OSError(28, "No space left on device")
        return real(*args, **kwargs)

    checkpoint.save = save
    try:
        ending = loop.train(replace(parts, batches=batches, make_model=lambda: bad.put_into(parts.make_model())))
    except KilledError:
        ending = "killed"
    except CheckpointError as error:
        ending = str(error)
    finally:
        checkpoint.save = real
        hand.close()
    return ending, hand.records if rank == 0 else []


STOPPED = [0, 1, 3, 4, 8, 10, 15]
KILLED = [7, 8, 9]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """By name: the config, the endings of its attempts, and the losses that they reported."""
    texts, folder = tmp_path_factory.mktemp("texts"), tmp_path_factory.mktemp("runs")
    make_texts(texts)

    def make(name: str, *overrides: str) -> Any:
        short = [f"train.windows={SHORT}", "checkpoint.asynchronous=false", *overrides]
        return config_of(texts, folder / name, *short)

    plan: dict[str, tuple[Any, list[dict[str, Any]]]] = {"undisturbed": (make("undisturbed"), [{}])}
    plan |= {f"stopped {step}": (make(f"stopped {step}"), [{"stopped": step}, {}]) for step in STOPPED}
    plan |= {f"killed {step}": (make(f"killed {step}"), [{"killed": step}, {}]) for step in KILLED}
    plan["harmed"] = make("harmed"), [{}, {"harmed": 1}]
    plan["unsaved"] = make("unsaved"), [{"unsaved": [1]}]
    plan["never saved"] = (
        make("never saved", "checkpoint.every_windows=1", "checkpoint.max_failed=2"),
        [{"unsaved": [1, 2]}],
    )
    plan["all harmed"] = make("all harmed"), [{}, {"all harmed": 1}]
    plan["natural"] = make("natural", "policy={kind: natural}"), [{}]
    plan["three"] = make("three", "policy={kind: natural}"), [{"stopped": 6}]
    weighed = ["policy={kind: natural}", "step.reweight={kind: feasible, burn_in: 0.0, feasible: {tolerance: 4.0}}"]
    plan["natural, weighed"] = make("natural, weighed", *weighed), [{}]
    plan["three, weighed"] = make("three, weighed", *weighed, "step.micro_rows=1"), [{"stopped": 6}]
    plan["bad"] = make("bad", "step.bad_loss=stop"), [{"bad": 5, "stopped": 6}, {}, {}]
    done = {name: (config, [], {}) for name, (config, _) in plan.items()}

    def go(world_size: int, script: list[tuple[str, dict[str, int]]]) -> None:
        results = run(attempts, world_size, [(plan[name][0], happens) for name, happens in script])
        assert all(isinstance(one, list) for one in results), results
        for (name, _), (ending, records) in zip(script, results[0], strict=True):
            done[name][1].append(ending)
            done[name][2].update({one["window"]: one["loss"] for one in records if one["kind"] == "window"})

    go(2, [(name, happens) for name, (_, script) in plan.items() for happens in script])
    go(3, [("three", {}), ("three, weighed", {})])
    lost = ("never saved", "all harmed")  # without a checkpoint that can be read
    return {
        name: (None if name in lost else Outcome.of(config), endings, losses)
        for name, (config, endings, losses) in done.items()
    }


@pytest.mark.parametrize("step", STOPPED)
def test_stopped_before_any_step_it_goes_on_to_the_same_end(runs, step):
    undisturbed, _, expected = runs["undisturbed"]
    stopped, endings, losses = runs[f"stopped {step}"]
    assert endings == ["stopped", "finished"]
    stopped.require_same(undisturbed)
    assert sorted(losses) == list(range(SHORT))
    assert losses == expected  # also of the window in two parts


@pytest.mark.parametrize("step", KILLED)
def test_killed_it_goes_on_from_the_newest_checkpoint_and_lacks_no_signal(runs, step):
    killed, endings, losses = runs[f"killed {step}"]
    assert endings == ["killed", "finished"]
    killed.require_same(runs["undisturbed"][0])
    assert losses == runs["undisturbed"][2]


def test_a_harmed_checkpoint_is_passed_over_for_the_one_before_it(runs):
    harmed, endings, losses = runs["harmed"]
    undisturbed, _, expected = runs["undisturbed"]
    assert endings == ["finished", "finished"]
    harmed.require_same(undisturbed)
    assert losses == expected


def test_a_save_that_fails_costs_no_run_until_too_many_do(runs):
    unsaved, endings, losses = runs["unsaved"]
    undisturbed, _, expected = runs["undisturbed"]
    assert endings == ["finished"]
    unsaved.require_same(undisturbed)
    assert losses == expected
    (ending,) = runs["never saved"][1]
    assert "was not saved: " in ending and "No space left on device" in ending


def test_where_all_checkpoints_are_harmed_the_run_is_refused(runs):
    assert runs["all harmed"][1][0] == "finished"
    assert "every checkpoint of " in runs["all harmed"][1][1]


@pytest.mark.parametrize("weighed", ["", ", weighed"])
def test_begun_by_two_ranks_and_gone_on_with_by_three(runs, weighed):
    whole, _, expected = runs[f"natural{weighed}"]
    three, endings, losses = runs[f"three{weighed}"]
    if weighed:
        unlike = runs["natural"][2]
        assert max(abs(unlike[window] / expected[window] - 1) for window in range(SHORT)) > 3 * NEAR
    assert endings == ["stopped", "finished"]
    assert three.schedule == whole.schedule
    assert three.rows == whole.rows
    apart = max(abs(losses[window] / expected[window] - 1) for window in range(SHORT))
    assert apart < NEAR, apart
    for name, value in three.weights.items():
        assert np.allclose(value, whole.weights[name], rtol=1e-3, atol=1e-4), name


def test_a_step_that_was_left_out_is_not_forgotten_by_a_stop_within_its_window(runs):
    bad, endings, _ = runs["bad"]
    assert endings == ["stopped", "bad_loss", "finished"]
    assert sorted(bad.rows) == list(range(SHORT * STEPS))
