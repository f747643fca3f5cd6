"""Runs made of a finished one: repeated, stretched, forked with another domain, branched off unchanged."""

import shutil

import numpy as np
import pytest

from jobs.fork import main as fork
from jobs.replay import main as replay
from mixer.branch import make_fork, make_replay
from mixer.config import load
from mixer.control.rundir import load_schedule
from mixer.core.errors import ResumeError
from mixer.core.plan import plan_window
from mixer.data.prepare import prepare
from mixer.data.tasks import SerialRunner
from mixer.launch import fit
from mixer.run import RunConfig, require_same
from tests.runs.making import ROWS, STEPS, WINDOWS, Outcome, config_of, options_of, prepare_options, work_with

pytestmark = [pytest.mark.ray]

FORKED_AT = 4  # window


def test_a_replay_has_the_rows_and_the_weights_and_nobody_decides(texts, tmp_path, undisturbed):
    config = config_of(texts, tmp_path / "again", "train.windows=null")
    made = make_replay(undisturbed.folder, config)
    assert made.text.endswith(f"exact: {WINDOWS} windows of {STEPS * ROWS} rows")
    assert made.config.train.windows == WINDOWS
    told = []
    assert fit(made.config, made.rows, on_status=told.append).ending == "finished"
    again = Outcome.of(made.config)
    again.require_same(undisturbed)
    assert again.losses == undisturbed.losses
    assert not told[-1]["counts"]
    assert not [record for record in again.records if record["kind"] == "policy"]
    assert again.events[:2] == ["replay", "begun"]
    # The same command, and `mixer train`, go on with it as a replay, here at its end.
    assert make_replay(undisturbed.folder, config).text == made.text
    assert fit(made.config, made.rows).ending == "finished"
    assert Outcome.of(made.config).schedule == undisturbed.schedule


def test_a_replay_refuses_what_would_move_a_row_and_folders_of_other_runs(texts, tmp_path, undisturbed):
    with pytest.raises(ResumeError, match=r"batch_rows=8 became 16; windows=10 became 20"):
        make_replay(undisturbed.folder, config_of(texts, tmp_path / "no", "geometry.batch_rows=16", "train.windows=20"))
    assert not (tmp_path / "no").exists()
    overrides = options_of(texts, undisturbed.folder)
    with pytest.raises(ResumeError, match=r"holds a run that is no replay of"):
        replay([str(undisturbed.folder), "--stretch", *overrides])


def test_stretched_to_twice_the_windows_every_domain_has_its_share_at_every_fraction(texts, tmp_path, undisturbed):
    config = config_of(texts, tmp_path / "long", f"train.windows={2 * WINDOWS}")
    made = make_replay(undisturbed.folder, config, stretch=True)
    assert made.text.endswith(f"stretched from {WINDOWS} windows of 32 rows to {2 * WINDOWS} of 32")
    assert fit(made.config, made.rows, work=work_with()).ending == "finished"
    given_sd = given(Outcome.of(made.config))
    asked_wd = np.cumsum([row.weights_d * STEPS * ROWS for row in load_schedule(undisturbed.folder)], axis=0)
    apart_wd = given_sd[2 * STEPS - 1 :: 2 * STEPS] - 2 * asked_wd
    print(f"farthest from twice the saved shares: {np.abs(apart_wd).max():.3f} rows")
    assert np.abs(apart_wd).max() < 1


def test_a_fork_with_another_domain_leaves_the_others_their_order_and_place(texts, tmp_path, ray_session, undisturbed):
    more = tmp_path / "more"
    prepare(prepare_options(texts, more, "counting", "greek", "more", "noise"), SerialRunner())
    for name in ("counting", "greek", "noise"):
        for shard in (texts / "train" / "shards" / name).iterdir():
            assert shard.read_bytes() == (more / "train" / "shards" / name / shard.name).read_bytes()
    at_step = FORKED_AT * STEPS + 3
    made = make_fork(undisturbed.folder, tmp_path / "fork", at_step, overrides=[f"corpus.path={more}/train"])
    assert made.text.endswith(f"at its checkpoint of {FORKED_AT * STEPS} steps (window {FORKED_AT})")
    assert set(made.config.prior) == {"counting", "greek", "more", "noise"}
    assert fit(made.config, made.rows).ending == "finished"
    forked, before = Outcome.of(made.config), load_schedule(undisturbed.folder)
    schedule = load_schedule(forked.folder)
    assert forked.schedule.splitlines()[: 1 + FORKED_AT] == undisturbed.schedule.splitlines()[: 1 + FORKED_AT]
    assert schedule.switches == [FORKED_AT]
    assert [schedule.row(k).reason for k in range(FORKED_AT, WINDOWS)] == ["fork"] * 2 + ["policy"] * 4
    first = schedule.row(FORKED_AT)
    for name, place in before.catalog.index.items():  # every domain goes on at the row where it stopped
        assert first.offsets_d[first.catalog.index[name]] == before.row(FORKED_AT).offsets_d[place]
    assert sorted(forked.rows) == list(range(FORKED_AT * STEPS, WINDOWS * STEPS))
    new = [row for rows in forked.rows.values() for row in rows if row.startswith(f"{first.catalog.index['more']}:")]
    assert len(new) > (WINDOWS - FORKED_AT) * STEPS * ROWS / 10
    for window in range(FORKED_AT, WINDOWS):
        plan = plan_window(schedule.row(window), schedule.geometry)
        planned = [f"{d}:{r}" for d, r in zip(plan.domain_n.tolist(), plan.row_n.tolist(), strict=True)]
        trained = [row for step in range(STEPS) for row in forked.rows[window * STEPS + step]]
        assert [row.rpartition(":")[0] for row in trained] == planned
    # The k-th row that a domain ever gives is the one it gave, or would have given, without the fork.
    for name, place in before.catalog.index.items():
        ours, theirs = order_of(forked, schedule.last_catalog.index[name]), order_of(undisturbed, place)
        common = theirs[int(before.row(FORKED_AT).offsets_d[place]) :]
        shared = min(len(ours), len(common))
        assert shared > 10
        assert ours[:shared] == common[:shared]
    # A replay of it needs the catalogs of both parts, the older of which is a part of the newer.
    again = make_replay(forked.folder, config_of(texts, tmp_path / "again", f"corpus.path={more}/train"))
    assert fit(again.config, again.rows).ending == "finished"
    assert Outcome.of(again.config).schedule == forked.schedule


def test_a_plain_branch_is_the_run_it_was_taken_from(texts, tmp_path, ray_session, undisturbed):
    made = make_fork(undisturbed.folder, tmp_path / "branch", 5 * STEPS)
    assert made.text.startswith("a plain branch of")
    assert fit(made.config, made.rows).ending == "finished"
    branch = Outcome.of(made.config)
    assert branch.schedule == undisturbed.schedule
    assert branch.losses == undisturbed.losses
    assert branch.rows == {step: rows for step, rows in undisturbed.rows.items() if step >= FORKED_AT * STEPS}
    branch.require_same_weights(undisturbed)


def test_a_fork_takes_the_options_given_and_belongs_to_the_tracked_run(tmp_path, undisturbed, capsys):
    source = tmp_path / "source"
    shutil.copytree(undisturbed.folder, source, ignore=shutil.ignore_patterns("ray", "trace"))
    (source / "tracker.json").write_text('{"run_id": "abc"}')
    policy = tmp_path / "policy.yaml"
    policy.write_text("policy: {kind: temperature, exponent: 0.5}\n")
    options = ["tracker.kind=mlflow", "train.windows=12"]
    target = tmp_path / "fork"
    assert fork([str(source), *options, "--at-step", "17", f"--to={target}", f"--policy={policy}", "--no-train"]) == 0
    assert capsys.readouterr().out.startswith(f"a fork of {source} at its checkpoint of 16 steps (window 4)\n")
    config = load(RunConfig, [target / "run.yaml"])
    assert config.policy == {"kind": "temperature", "exponent": 0.5}
    assert config.tracker.parent == "abc"
    assert config.train.windows == 12
    assert config.run.folder == target
    schedule = load_schedule(target)
    assert config.prior == pytest.approx(schedule.row(3).mixture.to_dict(schedule.catalog))
    require_same(config, target)
    with pytest.raises(ResumeError, match=r"no checkpoint at or before step 7 can be used; there are those of 8, 16"):
        make_fork(source, tmp_path / "other", 7)
    with pytest.raises(ResumeError, match=r"Row order depends on it"):
        make_fork(source, tmp_path / "other", 17, overrides=["geometry.seed=3"])


def given(run):
    """Rows by domain after every step."""
    counts = [
        np.bincount([int(row.split(":")[0]) for row in rows], minlength=3) for _, rows in sorted(run.rows.items())
    ]
    return np.cumsum(counts, axis=0)


def order_of(run, domain):
    """A domain's rows as it gave them, by number and content."""
    rows = [row.split(":", 1) for _, rows in sorted(run.rows.items()) for row in rows]
    return [rest for number, rest in rows if int(number) == domain]
