"""Replays: the same bytes where nothing differs, the same course where a stretch is asked for, else an error."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mixer.control.openrun import OpenRun
from mixer.control.replay import prepare_replay
from mixer.control.rundir import RunDir, load_schedule
from mixer.core.catalog import Catalog
from mixer.core.errors import ResumeError, ScheduleError
from mixer.core.plan import Geometry, plan_window
from tests.control.making import (
    CATALOG,
    GEOMETRY,
    PLANNED,
    make_charge,
    open_controller,
    signals,
    text_of,
    undisturbed,
    window_record,
)
from tests.core.policies.making import make_catalog

ROOT = Path(__file__).parents[2]
LARGER = replace(GEOMETRY, batch_rows=12)


@pytest.fixture
def source(tmp_path):
    undisturbed(tmp_path / "source")
    return tmp_path / "source"


def asked_d(source: Path, windows: int, slots: int) -> np.ndarray:
    """The rows each domain should have given over the whole run, with fractions."""
    saved = load_schedule(source)
    return np.mean([row.weights_d for row in saved], axis=0) * windows * slots


@pytest.mark.parametrize("as_file", [True, False])
@pytest.mark.parametrize("stretch", [True, False])
def test_where_nothing_differs_the_schedule_is_the_same_byte_for_byte(source, tmp_path, as_file, stretch):
    named = source / "schedule.jsonl" if as_file else source
    made = prepare_replay(named, tmp_path / "new", CATALOG, GEOMETRY, PLANNED, stretch=stretch, config="a: 1\n")
    assert text_of(tmp_path / "new") == text_of(source)
    assert len(made) == PLANNED
    for row, saved in zip(made, load_schedule(source), strict=True):
        ours, theirs = plan_window(row, GEOMETRY), plan_window(saved, GEOMETRY)
        assert ours.domain_n.tolist() == theirs.domain_n.tolist()
        assert ours.row_n.tolist() == theirs.row_n.tolist()
    with RunDir(tmp_path / "new") as rundir:
        assert rundir.config() == "a: 1\n"
        origin = rundir.origin()
        assert origin is not None
        assert (origin["kind"], origin["stretched"], origin["windows"]) == ("replay", False, PLANNED)
        assert origin["source"] == str(named)


def test_decided_windows_that_were_never_trained_are_kept(tmp_path):
    with RunDir(tmp_path / "source") as rundir:
        controller = open_controller(rundir, lag_windows=3)
        controller.report(signals()[0])
    assert len(prepare_replay(tmp_path / "source", tmp_path / "new", CATALOG, GEOMETRY)) == 5
    assert text_of(tmp_path / "new") == text_of(tmp_path / "source")


def test_a_torn_tail_of_the_source_is_left_out_and_the_source_is_not_touched(source, tmp_path):
    whole = text_of(source)
    (source / "schedule.jsonl").write_bytes(whole[:-20])
    before = {path: path.stat().st_mtime_ns for path in source.rglob("*")}
    prepare_replay(source, tmp_path / "new", CATALOG, GEOMETRY)
    assert text_of(tmp_path / "new") == b"".join(whole.splitlines(keepends=True)[:-1])
    assert {path: path.stat().st_mtime_ns for path in source.rglob("*")} == before


@pytest.mark.parametrize(
    ("changed", "windows", "catalog", "message"),
    [
        ({"batch_rows": 16, "seed": 4}, None, CATALOG, "batch_rows=8 became 16; .*seed=3 became 4"),
        ({"window_steps": 2}, 24, CATALOG, "window_steps=4 became 2; windows=12 became 24"),
        ({}, 13, CATALOG, "windows=12 became 13"),
        ({}, 11, CATALOG, "windows=12 became 11"),
        ({}, None, make_catalog(50, 501, 5000), "domain 'b' had 500 rows and has 501"),
        ({}, None, replace(CATALOG, row_tokens=32), "rows of 16 tokens became rows of 32"),
    ],
)
def test_what_differs_is_named_and_refused_and_nothing_is_begun(source, tmp_path, changed, windows, catalog, message):
    with pytest.raises(ResumeError, match=message):
        prepare_replay(source, tmp_path / "new", catalog, replace(GEOMETRY, **changed), windows)
    assert not (tmp_path / "new").exists()
    made = prepare_replay(source, tmp_path / "new", catalog, replace(GEOMETRY, **changed), windows, stretch=True)
    assert {row.reason for row in made} == {"stretched"}


@pytest.mark.parametrize(
    ("windows", "geometry"),
    [(24, GEOMETRY), (12, LARGER), (24, LARGER), (7, GEOMETRY), (5, LARGER), (1, GEOMETRY), (300, LARGER)],
)
def test_a_stretch_gives_each_domain_its_share_within_one_row(source, tmp_path, windows, geometry):
    made = prepare_replay(source, tmp_path / "new", CATALOG, geometry, windows, stretch=True)
    given_d = np.sum([row.counts_d for row in made], axis=0)
    assert int(given_d.sum()) == windows * geometry.window_slots
    assert np.abs(given_d - asked_d(source, windows, geometry.window_slots)).max() < 1 + 1e-6
    # And at every whole fraction of the way that both have.
    saved = load_schedule(source)
    for part in range(1, 12):
        if part * windows % PLANNED == 0:
            so_far_d = made.row(part * windows // PLANNED - 1).next_offsets_d
            share_d = np.sum([row.weights_d for row in saved.rows[:part]], axis=0) / PLANNED
            assert np.abs(so_far_d - share_d * windows * geometry.window_slots).max() < 1 + 1e-6
    with RunDir(tmp_path / "new") as rundir:
        assert rundir.schedule.to_text() == made.to_text()
        origin = rundir.origin()
        assert origin is not None
        assert origin["stretched"]


def test_another_corpus_keeps_the_weights_and_numbers_its_own_rows(source, tmp_path):
    other = make_catalog(70, 400, 9000)
    made = prepare_replay(source, tmp_path / "new", other, GEOMETRY, stretch=True)
    assert made.catalog == other
    for row, saved in zip(made, load_schedule(source), strict=True):
        assert row.weights_d.tolist() == saved.weights_d.tolist()
        planned = plan_window(row, GEOMETRY)
        assert (planned.row_n < other.num_rows_d[planned.domain_n]).all()


def test_a_corpus_of_other_names_is_refused_with_the_names(source, tmp_path):
    named = Catalog(16, "fake", (*CATALOG.domains[:2], replace(CATALOG.domains[2], name="web")))
    with pytest.raises(ResumeError, match=r"lacks \['c'\] and has \['web'\]"):
        prepare_replay(source, tmp_path / "new", named, GEOMETRY, stretch=True)


def test_a_change_of_catalog_is_replayed_as_it_was(source, tmp_path):
    after = make_catalog(50, 500, 5000, 700)
    with RunDir(source) as rundir:
        schedule = rundir.schedule
        row = schedule.propose(
            type(schedule.row(0).mixture)(np.full(4, 0.25)), catalog=after, signals_through=3, reason="policy"
        )
        rundir.commit(row, {})
    made = prepare_replay(source, tmp_path / "new", after, GEOMETRY)
    assert text_of(tmp_path / "new") == text_of(source)
    assert made.switches == [PLANNED]
    assert (tmp_path / "new" / "catalogs" / f"{after.fingerprint}.json").exists()
    with pytest.raises(ResumeError, match="'d' was removed"):
        prepare_replay(source, tmp_path / "other", CATALOG, GEOMETRY)
    with pytest.raises(ScheduleError, match="catalog changes before window 12"):
        prepare_replay(source, tmp_path / "other", after, GEOMETRY, 14, stretch=True)
    twice = prepare_replay(source, tmp_path / "other", after, LARGER, 26, stretch=True)
    assert twice.switches == [24]


def test_a_folder_with_a_run_is_not_begun_again(source, tmp_path):
    prepare_replay(source, tmp_path / "new", CATALOG, GEOMETRY)
    with pytest.raises(ResumeError, match="holds a run of 12 windows"):
        prepare_replay(source, tmp_path / "new", CATALOG, GEOMETRY)
    with pytest.raises(ScheduleError, match=r"no schedule at .*nowhere"):
        prepare_replay(tmp_path / "nowhere", tmp_path / "other", CATALOG, GEOMETRY)
    with RunDir(tmp_path / "empty") as rundir:
        rundir.begin(CATALOG, GEOMETRY)
    with pytest.raises(ResumeError, match="has no window"):
        prepare_replay(tmp_path / "empty", tmp_path / "other", CATALOG, GEOMETRY)


def test_a_replay_is_opened_without_a_controller_and_decides_nothing(source, tmp_path):
    prepare_replay(source, tmp_path / "new", CATALOG, Geometry(**vars_of(GEOMETRY)), 12)
    run = OpenRun(make_charge(tmp_path / "new", policy=None))
    row = run.row_or_none(11)
    assert row is not None and row.window == 11
    assert run.report(signals()[3], window_record(3)) == 4
    with pytest.raises(ScheduleError, match="nobody decides"):
        run.decider.pause_policy("look")
    run.close(0.0, report=False)
    assert text_of(tmp_path / "new") == text_of(source)


def vars_of(geometry: Geometry) -> dict[str, int]:
    return {key: getattr(geometry, key) for key in ("window_steps", "batch_rows", "seed", "block_rows", "group_blocks")}


KILLED = """
import os, sys
from pathlib import Path
from mixer.control import fence
from mixer.control.openrun import OpenRun
from mixer.control.replay import prepare_replay
from tests.control.making import CATALOG, GEOMETRY
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
for name in ("write", "fsync", "replace", "unlink"):
    setattr(os, name, hook(name, getattr(os, name)))
prepare_replay(Path(sys.argv[1]), Path(sys.argv[2]), CATALOG, GEOMETRY)
"""


def test_killed_at_any_call_to_the_disk_there_is_no_run_or_the_whole_one(source, tmp_path):
    begun = []
    for die_at in range(1, 60, 2):
        folder = tmp_path / str(die_at)
        command = [sys.executable, "-c", KILLED, str(source), str(folder), str(die_at)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode in (0, 9), done.stderr
        with RunDir(folder) as rundir:
            begun.append(rundir.is_begun)
            if not rundir.is_begun:
                prepare_replay(source, rundir, CATALOG, GEOMETRY)
        assert text_of(folder) == text_of(source), f"killed at call {die_at}"
        if done.returncode == 0:
            break
    assert begun.count(False) >= 5
    assert done.returncode == 0


def test_a_start_that_came_to_nothing_leaves_no_origin_to_another(source, tmp_path, monkeypatch):
    def no_replace(before, after, real=os.replace):
        if Path(after).name == "schedule.jsonl":
            raise OSError(28, "No space left on device")
        real(before, after)

    monkeypatch.setattr(os, "replace", no_replace)
    with pytest.raises(ScheduleError, match="No space left"):
        prepare_replay(source, tmp_path / "new", CATALOG, GEOMETRY)
    monkeypatch.undo()
    assert (tmp_path / "new" / "origin.json").exists()
    assert undisturbed(tmp_path / "new") == text_of(source)
    with RunDir(tmp_path / "new") as rundir:
        assert rundir.origin() is None
