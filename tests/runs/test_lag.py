"""A row is used lag + 1 windows after the last signal that it depends on, whoever is slow."""

import numpy as np
import pytest

from mixer.control.controller import Controller
from mixer.control.rundir import RunDir, load_schedule
from mixer.core.plan import plan_window
from mixer.core.schedule import unpack_d
from mixer.core.signal import Signal
from mixer.launch import fit
from mixer.run import make_policy, make_prior, open_rows
from tests.runs.making import STEPS, WINDOWS, Outcome, config_of, work_with

pytestmark = [pytest.mark.ray]

SLOW_S = 0.05  # a batch
SHORT = 6  # windows


@pytest.mark.parametrize("lag", [0, 1, 3])
def test_slow_and_fast_workers_decide_the_same_and_the_lag_is_kept(texts, tmp_path, undisturbed, lag):
    options = () if lag == 1 else (f"controller.lag_windows={lag}", f"train.windows={SHORT}")
    fast = undisturbed if lag == 1 else run(config_of(texts, tmp_path / "fast", *options))
    slow = run(config_of(texts, tmp_path / "slow", *options), pause_s={lag % 2: SLOW_S})
    assert slow.schedule == fast.schedule
    assert slow.losses == fast.losses
    assert slow.rows == fast.rows
    for one in (fast, slow):
        require_lag(one, lag, tmp_path / f"again-{one.folder.name}")


def run(config, **how):
    assert fit(config, open_rows(config), work=work_with(**how)).ending == "finished"
    return Outcome.of(config)


def require_lag(run, lag, folder):
    """From the run's own record: its schedule, its journal, and what was trained."""
    schedule = load_schedule(run.folder)
    windows = len(schedule)
    assert windows == (WINDOWS if lag == 1 else SHORT)
    first_use = {row.window: first_step(run, schedule, row) // STEPS for row in schedule}
    for row in schedule:
        assert row.signals_through == max(row.window - 1 - lag, -1)
        assert row.reason == ("policy" if row.window > lag else "prior")
        if row.window > lag:
            assert first_use[row.window] - row.signals_through == lag + 1
    folded = [record["window"] for record in run.records if record["kind"] == "policy"]
    assert folded == list(range(windows - 1 - lag))  # one decision each
    # The same signals, one after the other, give the same rows, each at its place and not a signal earlier.
    config, catalog = run.config, schedule.catalog
    with RunDir(folder) as rundir:
        controller = Controller(
            config.controller,
            make_policy(config),
            rundir,
            catalog,
            config.geometry,
            make_prior(config, catalog),
            rails=config.rails,
            planned_windows=windows,
        )
        for signal in signals(run, catalog):
            assert controller.next_window == min(signal.window + lag + 1, windows)
            controller.report(signal)
        assert (folder / "schedule.jsonl").read_bytes() == run.schedule


def first_step(run, schedule, row):
    """The step at which the rows that it asks for are trained."""
    plan = plan_window(row, schedule.geometry)
    planned = [f"{d}:{r}" for d, r in zip(plan.domain_n.tolist(), plan.row_n.tolist(), strict=True)]
    per_step = len(planned) // STEPS
    bare = {step: [one.rpartition(":")[0] for one in rows] for step, rows in run.rows.items()}
    (found,) = [step for step, rows in bare.items() if rows == planned[:per_step]]
    assert [row for step in range(found, found + STEPS) for row in bare[step]] == planned
    return found


def signals(run, catalog):
    for record in run.records:
        if record["kind"] == "window":
            yield Signal(
                window=record["window"],
                catalog=catalog.fingerprint,
                loss_sum_d=unpack_d(record["loss_sum"], catalog, np.float64),
                tokens_d=unpack_d(record["tokens_d"], catalog, np.int64),
                rows_d=unpack_d(record["rows_d"], catalog, np.int64),
                bad_rows_d=unpack_d(record["bad_rows_d"], catalog, np.int64),
            )
