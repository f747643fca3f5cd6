"""Forks and plain branches: what had begun stays byte for byte, what follows is decided as at a fresh start."""

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mixer.control.controller import ControllerOptions, Receipt
from mixer.control.fork import carried_over, prepare_fork, prior_at
from mixer.control.journal import Journal, read_journal
from mixer.control.rundir import RunDir, load_schedule
from mixer.core.catalog import Catalog, Domain
from mixer.core.errors import ConfigError, ResumeError, ScheduleError
from mixer.core.mixture import Mixture
from mixer.core.plan import Cursor, plan_window
from mixer.core.policies import load_policy
from mixer.core.rails import GuardRails
from mixer.core.schedule import MixtureSchedule, pack_d
from tests.control.making import CATALOG, GEOMETRY, PLANNED, RAILS, open_controller, signals, text_of
from tests.core.policies.making import make_signal

ROOT = Path(__file__).parents[2]
ODM = load_policy("odm", {"form": "paper"})
UNIFORM = Mixture.uniform(CATALOG)
EXTENDED = replace(CATALOG, domains=(*CATALOG.domains, Domain("aa", 1000, "new")))
REDUCED = replace(CATALOG, domains=CATALOG.domains[1:])
RENAMED = replace(CATALOG, domains=(CATALOG.domains[0], replace(CATALOG.domains[1], name="z"), CATALOG.domains[2]))


def record_of(signal, catalog) -> dict:
    return {
        "kind": "window",
        "window": signal.window,
        "time": 1.0,
        "steps": (signal.window + 1) * GEOMETRY.window_steps,
        "loss_sum": pack_d(signal.loss_sum_d, catalog),
        "tokens_d": pack_d(signal.tokens_d, catalog),
        "rows_d": pack_d(signal.rows_d, catalog),
        "bad_rows_d": pack_d(signal.bad_rows_d, catalog),
    }


def make_checkpoint(folder: Path, cursor: Cursor) -> None:
    path = folder / "checkpoints" / f"{cursor.steps(GEOMETRY):09d}"
    (path / "inner").mkdir(parents=True)
    (path / "meta.json").write_text("{}")
    (path / "inner" / "weights").write_bytes(b"weights")


def train(folder: Path, *, windows: int = PLANNED, orders=None, **options) -> None:
    """The run as a loop leaves it: each signal in the journal, then folded."""
    with RunDir(folder) as rundir, Journal(folder / "journal.jsonl") as journal:
        controller = open_controller(rundir, **options)
        if orders:
            orders(controller)
        for signal in signals():
            if signal.window >= windows:
                break
            journal.append({"kind": "event", "time": 0.5, "what": "checkpoint", "text": str(signal.window)})
            journal.append(record_of(signal, CATALOG))
            controller.report(signal)
            journal.append({"kind": "policy", "window": signal.window, "time": 1.5, "values": {}})
            journal.append(
                {"kind": "evaluation", "window": signal.window, "steps": (signal.window + 1) * 4, "time": 2.0}
            )


@pytest.fixture
def source(tmp_path):
    train(tmp_path / "source")
    return tmp_path / "source"


def fork(source: Path, target: Path, cursor: Cursor, *, lag: int = 1, checkpoint: bool = True, **changed):
    if checkpoint and not (source / "checkpoints" / f"{cursor.steps(GEOMETRY):09d}").exists():
        make_checkpoint(source, cursor)
    values = {"policy": ODM, "options": ControllerOptions(lag_windows=lag), "rails": RAILS, "planned_windows": PLANNED}
    return prepare_fork(source, target, cursor=cursor, **values | changed)


def branch(source: Path, target: Path, cursor: Cursor, **changed):
    return fork(source, target, cursor, **{"plain": True, "prior": UNIFORM} | changed)


def open_forked(rundir: RunDir, prior: Mixture, catalog: Catalog = CATALOG, *, policy=ODM, lag=1, rails=RAILS):
    """As the assembly opens the folder."""
    return open_controller(rundir, policy=policy, lag_windows=lag, rails=rails, catalog=catalog, prior=prior)


def later(catalog: Catalog) -> dict:
    rng = np.random.default_rng(9)
    return {k: make_signal(catalog, k, rng.uniform(1, 6, len(catalog)).tolist()) for k in range(PLANNED)}


def first_rows(text: bytes, rows: int) -> bytes:
    return b"".join(text.splitlines(keepends=True)[: rows + 1])


CURSORS = [Cursor(0, 0), Cursor(0, 2), Cursor(1, 0), Cursor(5, 0), Cursor(5, 1), Cursor(5, 3), Cursor(9, 2)]


# ---- forks ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cursor", CURSORS)
@pytest.mark.parametrize("lag", [0, 1, 2])
def test_what_had_begun_is_kept_and_the_next_rows_carry_the_mixture_in_force(source, tmp_path, cursor, lag):
    made = fork(source, tmp_path / "new", cursor, lag=lag)
    begun = cursor.window + (1 if cursor.step else 0)
    assert text_of(tmp_path / "new").startswith(first_rows(text_of(source), begun))
    saved = load_schedule(source)
    in_force = saved.row(max(begun - 1, 0)).weights_d
    planned = min(begun + lag + 1, PLANNED)
    assert len(made) == planned
    for row in made.rows[begun:]:
        assert row.reason == "fork"
        assert row.signals_through == (saved.row(begun - 1).signals_through if begun else -1)
        np.testing.assert_allclose(row.weights_d, in_force, rtol=0, atol=1e-12)
    assert load_schedule(tmp_path / "new").to_text().encode() == text_of(tmp_path / "new")
    with RunDir(tmp_path / "new") as rundir:
        controller = open_forked(rundir, prior_at(saved, cursor, CATALOG), lag=lag)
        if planned == begun + lag + 1:
            assert controller.next_signal == begun
            # The window the checkpoint stands in is reported whole by whoever goes on, and changes nothing.
            if cursor.step:
                assert controller.report(signals()[cursor.window]) is Receipt.REPEATED
            assert controller.next_window == planned
            if not controller.is_complete:
                assert controller.report(signals()[begun]) is Receipt.FOLDED
                assert rundir.schedule.row(planned).reason == "policy"
                assert rundir.schedule.row(planned).signals_through == begun


@pytest.mark.parametrize("catalog", [CATALOG, EXTENDED, REDUCED, RENAMED])
@pytest.mark.parametrize("cursor", [Cursor(4, 0), Cursor(4, 3)])
def test_a_restart_between_any_two_signals_after_a_fork_leaves_no_trace(source, tmp_path, catalog, cursor):
    prior = prior_at(load_schedule(source), cursor, catalog)
    script, texts = later(catalog), []
    for name in ("whole", "restarted"):
        fork(source, tmp_path / name, cursor, catalog=catalog)
        rundir = RunDir(tmp_path / name)
        controller = open_forked(rundir, prior, catalog)
        while not controller.is_complete:
            if name == "restarted":
                rundir.close()
                rundir = RunDir(tmp_path / name)
                controller = open_forked(rundir, prior, catalog)
            controller.report(script[controller.next_signal])
        rundir.close()
        texts.append(text_of(tmp_path / name))
    assert texts[0] == texts[1]
    made = MixtureSchedule.from_text(texts[0])
    assert len(made) == PLANNED
    assert made.switches == ([] if catalog is CATALOG else [4 + (cursor.step > 0)])
    assert {row.reason for row in made.rows[-3:]} == {"policy"}


def rows_by_domain(schedule, windows) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for window in windows:
        planned = plan_window(schedule.row(window), schedule.geometry)
        for place, row in zip(planned.domain_n.tolist(), planned.row_n.tolist(), strict=True):
            found.setdefault(planned.catalog.names[place], []).append(row)
    return found


@pytest.mark.parametrize("catalog", [EXTENDED, REDUCED, RENAMED])
def test_untouched_domains_keep_order_and_place_over_a_fork(source, tmp_path, catalog):
    made = fork(source, tmp_path / "new", Cursor(6, 0), catalog=catalog)
    ours, theirs = rows_by_domain(made, range(8)), rows_by_domain(load_schedule(source), range(PLANNED))
    untouched = {d.name for d in catalog.domains if d in CATALOG.domains}
    assert len(untouched) == {EXTENDED: 3, REDUCED: 2, RENAMED: 2}[catalog]
    for name in untouched:
        assert len(ours[name]) > len(rows_by_domain(made, range(6))[name])
        both = min(len(ours[name]), len(theirs[name]))
        assert ours[name][:both] == theirs[name][:both]
    for name in set(catalog.names) - untouched:
        place = catalog.index[name]
        assert made.row(6).offsets_d[place] == 0
        assert made.row(7).next_offsets_d[place] == made.row(6).counts_d[place] + made.row(7).counts_d[place] > 0


def test_new_domains_get_their_natural_share_and_the_others_keep_their_ratios():
    before = Mixture.from_dict(CATALOG, {"a": 0.5, "b": 0.3, "c": 0.2})
    got = carried_over(before, CATALOG, EXTENDED).to_dict(EXTENDED)
    share = 1000 / 6550
    assert got == pytest.approx({"a": 0.5 * (1 - share), "aa": share, "b": 0.3 * (1 - share), "c": 0.2 * (1 - share)})
    assert carried_over(before, CATALOG, REDUCED).to_dict(REDUCED) == pytest.approx({"b": 0.6, "c": 0.4})
    renamed = carried_over(before, CATALOG, RENAMED).to_dict(RENAMED)
    assert renamed == pytest.approx({"a": 5050 / 5550 * 5 / 7, "c": 5050 / 5550 * 2 / 7, "z": 500 / 5550})
    assert carried_over(before, CATALOG, CATALOG) == before
    alone = Mixture.from_dict(CATALOG, {"a": 1.0, "b": 0.0, "c": 0.0})
    assert carried_over(alone, CATALOG, REDUCED) == Mixture.natural(REDUCED)


def test_a_given_prior_is_reached_no_faster_than_the_rails_allow(source, tmp_path):
    prior = Mixture.from_dict(EXTENDED, {"a": 0.05, "aa": 0.85, "b": 0.05, "c": 0.05})
    made = fork(source, tmp_path / "new", Cursor(6, 0), catalog=EXTENDED, prior=prior, lag=2)
    previous_d = carried_over(made.row(5).mixture, CATALOG, EXTENDED).weights_d
    for row in made.rows[6:]:
        assert row.catalog == EXTENDED
        np.testing.assert_allclose(np.abs(row.weights_d - previous_d).sum(), 0.3, rtol=0, atol=1e-9)
        previous_d = row.weights_d


def test_rows_given_before_a_fork_count_against_the_epochs_after_it(source, tmp_path):
    given = int(load_schedule(source).row(5).next_offsets_d[0])
    rails = GuardRails(epochs={"a": (given + 3) / 50})
    prior = Mixture.from_dict(CATALOG, {"a": 0.9, "b": 0.05, "c": 0.05})
    made = fork(source, tmp_path / "new", Cursor(6, 0), prior=prior, rails=rails)
    pace = 3 / (6 * GEOMETRY.window_slots)
    assert made.row(6).weights_d[0] <= pace + 0.02
    assert made.row(7).next_offsets_d[0] <= given + 3
    with pytest.raises(ConfigError, match="leaves it 3"):
        fork(source, tmp_path / "other", Cursor(6, 0), rails=replace(rails, floor=0.1))
    assert not (tmp_path / "other").exists()
    assert not list(tmp_path.glob(".*"))


def test_the_policy_starts_anew_at_the_fork(source, tmp_path):
    fork(source, tmp_path / "new", Cursor(5, 2))
    with RunDir(tmp_path / "new") as rundir:
        found = rundir.state()
        assert found is not None
        window, state = found
        assert window == 7
        assert int(state["start_window"]) == 6
        assert not state["reward_d"].any()
        assert state["pi_wd"].tolist() == [load_schedule(source).row(5).weights_d.tolist()] * 2


def test_a_policy_that_measures_nothing_has_its_say_at_once(source, tmp_path):
    policy = load_policy("fixed", {"weights": {"a": 0.2, "b": 0.2, "c": 0.6}})
    made = fork(source, tmp_path / "new", Cursor(5, 0), policy=policy, rails=GuardRails())
    assert [row.reason for row in made.rows[5:]] == ["fork", "fork"]
    for row in made.rows[5:]:
        np.testing.assert_allclose(row.weights_d, [0.2, 0.2, 0.6], rtol=0, atol=1e-12)


def test_orders_of_the_source_are_not_those_of_a_fork(tmp_path):
    train(tmp_path / "source", orders=lambda controller: controller.pause_policy("look", window=3))
    fork(tmp_path / "source", tmp_path / "new", Cursor(5, 0))
    with RunDir(tmp_path / "new") as rundir:
        assert rundir.orders() == []
        controller = open_forked(rundir, rundir.schedule.row(6).mixture)
        controller.report(signals()[5])
        assert rundir.schedule.row(7).reason == "policy"


def test_a_forked_run_is_resumed_with_its_lag_only(source, tmp_path):
    fork(source, tmp_path / "new", Cursor(5, 0), lag=2)
    for lag in (0, 1, 3):
        with RunDir(tmp_path / "new") as rundir, pytest.raises(ResumeError, match=f"lag_windows=2, .* has {lag}"):
            open_forked(rundir, UNIFORM, lag=lag)


def test_a_fork_of_a_fork(source, tmp_path):
    fork(source, tmp_path / "one", Cursor(4, 0), catalog=EXTENDED)
    prior = prior_at(load_schedule(source), Cursor(4, 0), EXTENDED)
    with RunDir(tmp_path / "one") as rundir:
        controller = open_forked(rundir, prior, EXTENDED)
        while controller.next_window < 8:
            controller.report(later(EXTENDED)[controller.next_signal])
    made = fork(tmp_path / "one", tmp_path / "two", Cursor(4, 3), catalog=CATALOG, lag=2)
    assert text_of(tmp_path / "two").startswith(b"".join(text_of(tmp_path / "one").splitlines(keepends=True)[:7]))
    assert [row.reason for row in made.rows[4:]] == ["fork"] * 4
    assert made.switches == [4, 5]
    assert made.row(5).offsets_d.tolist() == [
        made.row(4).next_offsets_d[EXTENDED.index[name]] for name in CATALOG.names
    ]
    with RunDir(tmp_path / "two") as rundir:
        assert open_forked(rundir, UNIFORM, lag=2).next_signal == 5


# ---- plain branches ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cursor", CURSORS)
@pytest.mark.parametrize("lag", [0, 1, 2])
def test_a_plain_branch_goes_on_as_the_run_did(tmp_path, cursor, lag):
    source = tmp_path / "source"
    train(source, lag_windows=lag)
    made = branch(source, tmp_path / "new", cursor, lag=lag)
    rows = min(cursor.window + lag + 1, PLANNED)
    assert text_of(tmp_path / "new") == first_rows(text_of(source), rows)
    assert len(made) == rows
    with RunDir(tmp_path / "new") as rundir:
        controller = open_forked(rundir, UNIFORM, lag=lag)
        if rows < PLANNED:
            assert controller.next_signal == cursor.window
        while not controller.is_complete:
            controller.report(signals()[controller.next_signal])
    assert text_of(tmp_path / "new") == text_of(source)
    states = [(folder / "policy" / "11.npz").read_bytes() for folder in (source, tmp_path / "new")]
    assert len(set(states)) == 1


def test_a_branch_keeps_orders_and_held_windows(tmp_path):
    def orders(controller):
        controller.set_weights({"a": 0.2, "b": 0.3, "c": 0.5}, "more c", window=4)
        controller.pause_policy("look", window=6)
        controller.resume_policy(window=8)

    train(tmp_path / "source", orders=orders)
    branch(tmp_path / "source", tmp_path / "new", Cursor(6, 1))
    with RunDir(tmp_path / "new") as rundir:
        controller = open_forked(rundir, UNIFORM)
        while not controller.is_complete:
            controller.report(signals()[controller.next_signal])
    assert text_of(tmp_path / "new") == text_of(tmp_path / "source")
    assert b"paused: look" in text_of(tmp_path / "new")


@pytest.mark.parametrize("cursor", [Cursor(4, 0), Cursor(5, 0), Cursor(8, 2)])
def test_a_branch_of_a_fork_is_folded_from_the_fork_on(source, tmp_path, cursor):
    one, script = tmp_path / "one", later(EXTENDED)
    at = Cursor(3, 2)
    fork(source, one, at, catalog=EXTENDED)
    prior = prior_at(load_schedule(source), at, EXTENDED)
    with RunDir(one) as rundir, Journal(one / "journal.jsonl") as journal:
        controller = open_forked(rundir, prior, EXTENDED)
        journal.append(record_of(signals()[3], CATALOG))
        while not controller.is_complete:
            journal.append(record_of(script[controller.next_signal], EXTENDED))
            controller.report(script[controller.next_signal])
    branch(one, tmp_path / "two", cursor, prior=prior)
    assert text_of(one).startswith(text_of(tmp_path / "two"))
    with RunDir(tmp_path / "two") as rundir:
        controller = open_forked(rundir, prior, EXTENDED)
        assert controller.next_signal == cursor.window
        while not controller.is_complete:
            controller.report(script[controller.next_signal])
    assert text_of(tmp_path / "two") == text_of(one)
    assert (one / "policy" / "11.npz").read_bytes() == (tmp_path / "two" / "policy" / "11.npz").read_bytes()
    # And a branch of the branch.
    branch(tmp_path / "two", tmp_path / "three", cursor, prior=prior)
    assert text_of(one).startswith(text_of(tmp_path / "three"))


def test_a_branch_without_its_signals_is_refused_by_name(source, tmp_path):
    lines = (source / "journal.jsonl").read_text().splitlines(keepends=True)
    (source / "journal.jsonl").write_text("".join(x for x in lines if '"window","window":3' not in x))
    with pytest.raises(ResumeError, match="journal lacks the windows 3 of 0 to 5"):
        branch(source, tmp_path / "new", Cursor(6, 0))
    branch(source, tmp_path / "early", Cursor(3, 0))
    (source / "journal.jsonl").unlink()
    with pytest.raises(ResumeError, match="journal lacks the windows 0, 1, 2, 3, 4, 5 of 0 to 5"):
        branch(source, tmp_path / "new", Cursor(6, 0))
    fork(source, tmp_path / "new", Cursor(6, 0))


@pytest.mark.parametrize(
    "changed",
    [
        {"policy": load_policy("odm", {"form": "released"})},
        {"rails": replace(RAILS, floor=0.33)},
        {"prior": Mixture.natural(CATALOG)},
        {"planned_windows": 13, "rails": replace(RAILS, epochs={"a": 1.0})},
    ],
)
def test_a_branch_that_would_decide_otherwise_is_refused(source, tmp_path, changed):
    with pytest.raises(ResumeError, match="does not come out as it was"):
        branch(source, tmp_path / "new", Cursor(8, 0), **changed)
    assert not (tmp_path / "new").exists()
    assert not list(tmp_path.glob(".*"))


def test_a_branch_has_no_other_catalog_and_needs_the_prior(source, tmp_path):
    for changed in ({"catalog": EXTENDED}, {"prior": None}):
        with pytest.raises(ConfigError, match="plain branch"):
            branch(source, tmp_path / "new", Cursor(8, 0), **changed)


# ---- the folder ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cursor", [Cursor(5, 0), Cursor(5, 2)])
def test_the_journal_tells_the_story_up_to_the_fork(source, tmp_path, cursor):
    fork(source, tmp_path / "new", cursor)
    records = [record for _, record in read_journal(tmp_path / "new" / "journal.jsonl")]
    of = {kind: [r for r in records if r["kind"] == kind] for kind in ("window", "policy", "evaluation", "event")}
    assert [r["window"] for r in of["window"]] == [r["window"] for r in of["policy"]] == [0, 1, 2, 3, 4]
    assert [r["steps"] for r in of["evaluation"]] == [4, 8, 12, 16, 20]
    assert [r["text"] for r in of["event"][:-1]] == ["0", "1", "2", "3", "4", "5"]
    theirs = [r for _, r in read_journal(source / "journal.jsonl") if r["kind"] == "window"]
    assert of["window"] == theirs[:5]
    last = records[-1]
    assert (last["what"], last["steps"], last["window"]) == ("forked", cursor.steps(GEOMETRY), 5)
    assert str(source) in last["text"]


@pytest.mark.parametrize("linked", [True, False])
def test_the_checkpoint_comes_along_linked_or_copied(source, tmp_path, monkeypatch, linked):
    if not linked:

        def no_link(*_):
            raise OSError(18, "Invalid cross-device link")

        monkeypatch.setattr(os, "link", no_link)
    fork(source, tmp_path / "new", Cursor(5, 2))
    theirs, ours = (f / "checkpoints" / "000000022" for f in (source, tmp_path / "new"))
    assert [p.name for p in (tmp_path / "new" / "checkpoints").iterdir()] == ["000000022"]
    for name in ("meta.json", "inner/weights"):
        assert (ours / name).read_bytes() == (theirs / name).read_bytes()
        assert ((ours / name).stat().st_ino == (theirs / name).stat().st_ino) is linked
    shutil.rmtree(source)
    assert (ours / "inner" / "weights").read_bytes() == b"weights"


def test_what_cannot_be_forked_is_refused(source, tmp_path):
    new = tmp_path / "new"
    with pytest.raises(ResumeError, match=r"no checkpoint .*000000020, only \[\]"):
        fork(source, new, Cursor(5, 0), checkpoint=False)
    with pytest.raises(ResumeError, match="has begun 13 windows, of which the schedule has 12"):
        fork(source, new, Cursor(12, 1), planned_windows=20)
    with pytest.raises(ResumeError, match="12 windows have begun and 12 are planned"):
        fork(source, new, Cursor(12, 0))
    with pytest.raises(ResumeError, match="has 4 steps, none is 4"):
        fork(source, new, Cursor(5, 4))
    with pytest.raises(ResumeError, match="tokenizer=fake, this catalog has other"):
        fork(source, new, Cursor(5, 0), catalog=replace(CATALOG, tokenizer="other"))
    with pytest.raises(ConfigError, match="prior of 3 weights for a catalog of 4"):
        fork(source, new, Cursor(5, 0), catalog=EXTENDED, prior=UNIFORM)
    with pytest.raises(ScheduleError, match="no schedule at"):
        fork(tmp_path / "nowhere", new, Cursor(5, 0))
    assert not new.exists()
    new.mkdir()
    with pytest.raises(ResumeError, match="is there already"):
        fork(source, new, Cursor(5, 0))
    assert not list(tmp_path.glob(".*"))


def test_the_source_is_only_read_and_may_be_at_work(source, tmp_path):
    make_checkpoint(source, Cursor(5, 0))
    with RunDir(source):
        before = {p: p.stat().st_mtime_ns for p in source.rglob("*") if p.is_file()}
        fork(source, tmp_path / "new", Cursor(5, 0))
        branch(source, tmp_path / "branch", Cursor(5, 0))
        assert {p: p.stat().st_mtime_ns for p in source.rglob("*") if p.is_file()} == before


def test_the_end_of_a_run_can_be_given_more_windows(source, tmp_path):
    made = fork(source, tmp_path / "new", Cursor(12, 0), planned_windows=20)
    assert len(made) == 14
    assert first_rows(text_of(tmp_path / "new"), 12) == text_of(source)


KILLED = """
import os, sys
from pathlib import Path
from mixer.control import fork
from tests.control import test_fork
from mixer.core.plan import Cursor
count, die_at = 0, int(sys.argv[3])
def hook(name, real):
    def call(*args, **kwargs):
        global count
        count += 1
        if count == die_at:
            if name == "write":
                real(args[0], args[1][:len(args[1]) // 2])
            os._exit(9)
        return real(*args, **kwargs)
    return call
for name in ("write", "fsync", "replace", "unlink", "link", "rename"):
    setattr(os, name, hook(name, getattr(os, name)))
test_fork.branch(Path(sys.argv[1]), Path(sys.argv[2]), Cursor(2, 1))
print(count)
"""


def test_killed_at_any_call_to_the_disk_there_is_no_folder_or_the_whole_one(source, tmp_path):
    make_checkpoint(source, Cursor(2, 1))
    branch(source, tmp_path / "whole", Cursor(2, 1))

    def content(folder):
        left_out = ("owner", "fence", "journal")
        files = [p for p in folder.rglob("*") if p.is_file() and not p.name.startswith(left_out)]
        return {str(p.relative_to(folder)): p.read_bytes() for p in files}

    def killed(target, die_at):
        command = [sys.executable, "-c", KILLED, str(source), str(target), str(die_at)]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)

    done = killed(tmp_path / "counted", 0)
    assert done.returncode == 0, done.stderr
    calls, deaths, target = int(done.stdout), 0, tmp_path / "new"
    for die_at in [*range(1, calls, 9), calls - 2, calls - 1, calls]:
        done = killed(target, die_at)
        assert done.returncode == 9, done.stderr
        if not target.exists():
            deaths += 1
            branch(source, target, Cursor(2, 1))  # clears what the dead one left
        assert content(target) == content(tmp_path / "whole"), f"killed at call {die_at}"
        assert not list(tmp_path.glob(".*"))
        shutil.rmtree(target)
    assert deaths >= 8


def test_two_at_once_do_not_build_the_same_folder(source, tmp_path):
    with RunDir(tmp_path / ".new.building"), pytest.raises(ResumeError, match="belongs to"):
        fork(source, tmp_path / "new", Cursor(5, 0))
    fork(source, tmp_path / "new", Cursor(5, 0))
