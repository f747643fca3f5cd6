"""The number of workers changes nothing of what is trained, and of the losses only how their sums are rounded."""

import shutil

import numpy as np
import pytest

from mixer.launch import fit
from mixer.run import open_rows
from tests.runs.making import ROWS, STEPS, Fault, Outcome, config_of, work_with

pytestmark = [pytest.mark.ray]

SHORT = 4  # windows
STOPPED = 6  # step, in the middle of a window
NEAR = 1e-4
SCRIPT = [
    f"train.windows={SHORT}",
    "checkpoint.every_windows=null",
    "policy={kind: scripted, stages: {begin: {at: 0, weights: {counting: 0.6, greek: 0.3, noise: 0.1}}, "
    "end: {at: 0.8, weights: {counting: 0.1, greek: 0.3, noise: 0.6}}}}",
]


@pytest.fixture(scope="module")
def whole(texts, tmp_path_factory, ray_session):
    """By two workers, never stopped."""
    return finished(config_of(texts, tmp_path_factory.mktemp("worlds") / "two", *SCRIPT))


@pytest.fixture(scope="module")
def stopped(texts, tmp_path_factory, ray_session):
    """By two workers, stopped within a window."""
    config = config_of(texts, tmp_path_factory.mktemp("worlds") / "stopped", *SCRIPT)
    assert fit(config, open_rows(config), work=work_with([Fault(STOPPED, 0, "stop")])).ending == "stopped"
    return Outcome.of(config)


def test_a_whole_run_by_one_worker(texts, tmp_path, whole):
    require_same_but_for_rounding(finished(config_of(texts, tmp_path / "one", *SCRIPT, "train.num_workers=1")), whole)


@pytest.mark.parametrize("workers", [1, 3, 4])
def test_begun_by_two_and_gone_on_with_by_others(texts, tmp_path, whole, stopped, workers):
    assert sorted(stopped.rows) == list(range(STOPPED))
    shutil.copytree(stopped.folder, tmp_path / "run")
    run = finished(config_of(texts, tmp_path / "run", *SCRIPT, f"train.num_workers={workers}"))
    assert f"{workers} workers go on from {STOPPED:09d}" in [r.get("text") for r in run.records]
    require_same_but_for_rounding(run, whole)


def finished(config):
    assert fit(config, open_rows(config), work=work_with()).ending == "finished"
    return Outcome.of(config)


def require_same_but_for_rounding(run, whole):
    assert run.schedule == whole.schedule
    assert run.rows == whole.rows
    assert sorted(run.rows) == list(range(SHORT * STEPS))
    assert {len(rows) for rows in run.rows.values()} == {ROWS}
    assert len(run.losses) == SHORT
    apart = np.abs(np.array(run.losses) / np.array(whole.losses) - 1).max()
    weights = max(float((run.weights[name] - value).abs().max()) for name, value in whole.weights.items())
    print(f"losses are apart by {apart:.2e} of themselves, weights by {weights:.2e}")
    assert apart < NEAR
    for name, counts in exact(run).items():  # what is counted is the same to the last token
        assert counts == exact(whole)[name], name


def exact(run):
    windows = [record for record in run.records if record["kind"] == "window"]
    return {key: [record[key] for record in windows] for key in ("tokens", "tokens_d", "rows_d", "bad_rows_d", "steps")}
