"""Other ways to train the same run: sharded, in micro-batches, with as many workers as there are, warned beforehand."""

from types import SimpleNamespace

import pytest
import ray.train

from mixer.control.journal import read_journal
from mixer.launch import fit
from mixer.run import Job, open_rows
from mixer.training import loop
from tests.runs.making import WINDOWS, Outcome, config_of, work_with

pytestmark = pytest.mark.ray


def records(folder, kind):
    return [record for _, record in read_journal(folder / "journal.jsonl") if record["kind"] == kind]


def test_sharded_and_in_micro_batches_the_losses_are_the_same(texts, tmp_path, undisturbed):
    config = config_of(texts, tmp_path / "run", "train.strategy=fsdp", "step.micro_rows=1", "train.num_workers=[1,2]")
    assert fit(config, open_rows(config), work=work_with([])).ending == "finished"
    found = Outcome.of(config)
    assert {step: len(rows) for step, rows in found.rows.items()} == {s: len(r) for s, r in undisturbed.rows.items()}
    assert found.rows[0] == undisturbed.rows[0]
    for name, weight in found.weights.items():
        assert (weight - undisturbed.weights[name]).abs().max() < 1e-3, name
    windows = records(tmp_path / "run", "window")
    assert [one["window"] for one in windows] == list(range(WINDOWS))
    assert windows[0]["loss"] > windows[-1]["loss"] + 1


def test_a_notice_that_a_node_goes_away_is_answered_by_a_checkpoint(texts, tmp_path, undisturbed):
    config = config_of(texts, tmp_path / "run", "checkpoint.every_windows=null")
    assert fit(config, open_rows(config), work=warned).ending == "finished"
    told = [(event["what"], event["steps"]) for event in records(tmp_path / "run", "event")]
    place = [what for what, _ in told].index("preemption")
    assert told[place + 1][0] == "checkpoint"
    assert told[place + 1][1] == told[place][1] + 1  # before the very next step, in mid-window or not
    assert [what for what, _ in told].count("preemption") == 1
    Outcome.of(config).require_same(undisturbed)


def warned(job: Job) -> None:
    """A worker whose node is to be taken away, as Ray would tell it."""
    info = SimpleNamespace(preempted_node_ids=["n1"])
    ray.train.get_preemption_info = lambda: info  # type: ignore[assignment]  # this process is the worker's own
    loop.NOTICE_EVERY_S = 0.0
    work_with([])(job)
