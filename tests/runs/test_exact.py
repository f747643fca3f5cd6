"""A run that is killed here and there is the run that was not, to the last bit."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mixer.control.fence import require_free
from mixer.core.errors import ResumeError
from mixer.core.schedule import MixtureSchedule
from mixer.launch import fit
from mixer.run import open_rows
from tests.runs.making import STEPS, WINDOWS, Outcome, config_of, kills, work_with

pytestmark = [pytest.mark.ray]

ROOT = Path(__file__).parents[2]


def test_the_undisturbed_run_moves_its_weights_and_keeps_its_lag(undisturbed):
    schedule = MixtureSchedule.from_text(undisturbed.schedule)
    assert len(schedule) == WINDOWS
    assert [row.signals_through for row in schedule] == [-1, -1, *range(WINDOWS - 2)]
    assert schedule.row(2).mixture.shift(schedule.row(WINDOWS - 1).mixture) > 0.01
    assert len(undisturbed.rows) == WINDOWS * STEPS


@pytest.mark.faults
@pytest.mark.parametrize("kind", ["rank", "controller"])
def test_killed_at_random_steps_it_is_the_same_run(texts, tmp_path, ray_session, undisturbed, kind):
    config = config_of(texts, tmp_path / "run")
    faults = kills(1, kind, 5)
    assert fit(config, open_rows(config), work=work_with(faults)).ending == "finished"
    assert len(list((tmp_path / "run").glob("fault-*"))) == len(faults)
    found = Outcome.of(config)
    found.require_same(undisturbed)
    assert found.policy == undisturbed.policy
    assert [window for window, _ in found.policy] == list(range(WINDOWS - 2))


@pytest.mark.faults
def test_a_driver_that_is_killed_is_started_again_and_it_is_the_same_run(texts, tmp_path, undisturbed):
    folder = tmp_path / "run"
    for fault in kills(2, "driver", 2):
        assert drive(texts, folder, f"{fault.step}:{fault.rank}:{fault.kind}").returncode == -signal.SIGKILL
        wait_until_free(folder)
    assert drive(texts, folder, "").stdout.strip() == "finished"
    found = Outcome.of(config_of(texts, folder))
    found.require_same(undisturbed)
    assert found.policy == undisturbed.policy


@pytest.mark.faults
@pytest.mark.slow
def test_a_node_is_killed_and_on_those_that_are_left_it_is_the_same_run(texts, tmp_path, undisturbed):
    folder = tmp_path / "run"
    done = drive(texts, folder, "11:-1:node", "train.cpus_per_worker=1")
    assert "finished" in done.stdout.splitlines(), done.stderr[-2000:]  # among what Ray says of its raylet
    assert len(list(folder.glob("fault-node-*"))) == 1
    Outcome.of(config_of(texts, folder)).require_same(undisturbed)


def drive(texts, folder, script, *overrides):
    return subprocess.run(
        [sys.executable, "-m", "tests.runs.drive", str(texts), str(folder), script, *overrides],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def wait_until_free(folder):
    """What the killed driver left ends by itself."""
    deadline = time.monotonic() + 60
    while True:
        try:
            return require_free(folder)
        except ResumeError:
            assert time.monotonic() < deadline, "the controller outlives its driver"
            time.sleep(0.2)
