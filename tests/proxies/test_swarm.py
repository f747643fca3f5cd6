"""Whole swarms on tiny texts: what was killed goes on to the same table, and no other swarm gets into it."""

import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mixer.config import load, shipped
from mixer.control.fence import Fence
from mixer.control.journal import read_journal
from mixer.control.rundir import load_schedule
from mixer.core.errors import ConfigError, ResumeError
from mixer.core.rails import GuardRails
from mixer.proxies import proxy
from mixer.proxies.proxy import Outcome, proxy_of, run_proxy
from mixer.proxies.rounds import make_mixtures
from mixer.proxies.swarm import FailedError, options_of, run_swarm
from mixer.proxies.table import read_table
from mixer.proxies.tasks import Here, RayTasks, Tasks
from mixer.run import RunConfig, open_rows
from tests.core.policies.making import make_catalog
from tests.proxies.making import POINTS, RUNS, WINDOWS, Disturbed, config_of, tokens

NAMES = ("counting", "greek", "noise")


def swarm(texts: Path, folder: Path, *overrides: str, tasks: Tasks | None = None, **options) -> Any:
    config = config_of(texts, folder, *overrides)
    return run_swarm(config, open_rows(config), tasks or Here(), **options)


@pytest.fixture(scope="module")
def whole(texts, tmp_path_factory):
    """The swarm that nothing happened to."""
    return swarm(texts, tmp_path_factory.mktemp("swarms") / "whole")


def test_a_swarm_measures_every_mixture_at_every_point(texts, whole):
    table = whole.table
    assert whole.ending == "finished" and (whole.progress.finished, whole.progress.failed) == (RUNS, 0)
    assert table.domains == NAMES
    assert table.sets == ("target/sums", *(f"validation/{name}" for name in NAMES))
    assert table.keys == [(f"{run:05}", tokens() * k // POINTS) for run in range(RUNS) for k in (1, 2, 3)]
    assert table.points == pytest.approx((1 / 3, 2 / 3, 1.0))
    config = config_of(texts, Path("unused"))
    asked = make_mixtures(options_of(config), open_rows(config).catalog)
    np.testing.assert_array_equal(table.weights_rd, np.repeat(list(asked.values()), POINTS, axis=0))
    losses_rs = table.loss_rs()
    assert np.isfinite(losses_rs).all()
    assert len(np.unique(losses_rs)) == losses_rs.size  # no number of another moment or mixture
    assert (losses_rs < np.log(257) + 1).all() and (losses_rs > 0.5).all()


def test_losses_are_those_of_the_run_and_move_with_the_mixture(whole):
    folder = whole.path.parent / "proxies" / "00002"
    records = [record for _, record in read_journal(folder / "journal.jsonl") if record["kind"] == "evaluation"]
    assert [record["window"] for record in records] == [2, 4, 6]
    one = whole.table.take([run == "00002" for run in whole.table.run_r])
    for place, record in enumerate(records):
        for name in one.sets:
            assert one.losses[name][place] == record["sets"][name]["loss"]
    last = whole.table.at(1.0)
    greek = last.weights_rd[:, 1]
    losses = last.losses["validation/greek"]
    assert losses[np.argmax(greek)] < losses[np.argmin(greek)]


def test_a_proxy_is_the_run_as_overridden_without_its_policy_and_rails(whole):
    folder = whole.path.parent / "proxies" / "00001"
    schedule = load_schedule(folder)
    assert len(schedule) == WINDOWS
    weights_d = whole.table.weights_rd[3]
    assert weights_d.min() < 0.1  # the run's floor is not the proxies'
    assert all(np.array_equal(row.weights_d, weights_d) for row in schedule)
    config = load(RunConfig, [folder / "run.yaml"])
    assert (config.model.dim, config.model.num_layers, config.train.windows) == (16, 1, None)
    assert (config.rails, config.geometry.batch_rows, config.swarm) == (GuardRails(), 8, None)
    assert not (folder / "checkpoints").exists()  # a finished proxy needs none


@pytest.mark.parametrize(("run", "window"), [("00001", 3), ("00003", 5)])
def test_killed_anywhere_the_same_command_makes_the_same_table(texts, whole, tmp_path, run, window):
    folder = tmp_path / "killed"
    call = [sys.executable, "-m", "tests.proxies.making", str(texts), str(folder), run, str(window)]
    done = subprocess.run(call, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    left = read_table(folder / "swarm.parquet").runs
    assert left == tuple(f"{number:05}" for number in range(int(run)))
    trained: Counter[str] = Counter()

    def count(run: str, kind: str, window: int | None) -> None:
        trained[run] += kind == "window"

    finish = swarm(texts, folder, tasks=Disturbed(count))
    assert finish.ending == "finished"
    assert finish.path.read_bytes() == whole.path.read_bytes()
    assert set(trained) == {f"{number:05}" for number in range(int(run), RUNS)}  # nothing finished is done again
    assert trained[run] == WINDOWS - window // 2 * 2  # from the newest checkpoint, one every two windows


def test_stopped_proxies_save_themselves_and_go_on(texts, whole, tmp_path, monkeypatch):
    monkeypatch.setattr(proxy, "LOOK_EVERY_S", 0.0)
    folder = tmp_path / "stopped"

    def stop(run: str, kind: str, window: int | None) -> None:
        if (run, kind, window) == ("00001", "window", 2):
            signal.raise_signal(signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    finish = swarm(texts, folder, tasks=Disturbed(stop))
    assert signal.getsignal(signal.SIGINT) is before
    assert finish.ending == "stopped" and finish.progress.finished == 1 and finish.table.runs == ("00000",)
    events = [record for _, record in read_journal(folder / "proxies/00001/journal.jsonl") if record["kind"] == "event"]
    assert events[-1]["what"] == "stopped"
    assert not (folder / "proxies/00002").exists()
    assert swarm(texts, folder).path.read_bytes() == whole.path.read_bytes()


def test_a_second_signal_gives_up_at_once(texts, tmp_path):
    def stop(run: str, kind: str, window: int | None) -> None:
        if kind == "window":
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        swarm(texts, tmp_path / "twice", tasks=Disturbed(stop))


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("swarm.overrides.model.dim=32", r"model.dim=16; this one has 32"),
        ("swarm.overrides.geometry.seed=9", r"geometry.seed=0; this one has 9"),
        ("swarm.overrides.rails.cap=0.9", r"rails.cap=1.0; this one has 0.9"),
        ("evaluation.rows=5", r"evaluation.rows=4; this one has 5"),
        ("swarm.points=2", r"swarm.points=3; this one has 2"),
        ("swarm.seed=1", r"has run 00000 with mixture [0-9a-f]{16}; this swarm gives it [0-9a-f]{16}"),
        ("swarm.generator=dirichlet", r"has run 00000 with mixture"),
    ],
)
def test_another_swarm_is_refused_in_its_folder_with_both_values(texts, whole, override, words):
    before = whole.path.read_bytes()
    with pytest.raises(ResumeError, match=words):
        swarm(texts, whole.path.parent, override)
    assert whole.path.read_bytes() == before


def test_it_is_refused_also_before_anything_is_finished(texts, tmp_path):
    class Nothing(Here):
        def run(self, work, jobs, stop):
            yield from ()

    assert swarm(texts, tmp_path, tasks=Nothing()).table is None
    with pytest.raises(ResumeError, match=r"swarm.json is of a swarm with model.dim=16; this one has 32"):
        swarm(texts, tmp_path, "swarm.overrides.model.dim=32")


def test_a_table_put_into_another_folder_is_refused(texts, whole, tmp_path):
    (tmp_path / "swarm.parquet").write_bytes(whole.path.read_bytes())
    with pytest.raises(ResumeError, match=r"swarm.parquet is of a swarm with model.dim=16; this one has 32"):
        swarm(texts, tmp_path, "swarm.overrides.model.dim=32")
    (tmp_path / "proxies" / "00000").mkdir(parents=True)
    result = (whole.path.parent / "proxies/00000/result.json").read_text()
    (tmp_path / "proxies/00000/result.json").write_text(result.replace('"model.dim": 16', '"model.dim": 17'))
    (tmp_path / "swarm.parquet").unlink()
    with pytest.raises(ResumeError, match=r"result.json is of a swarm with model.dim=17; this one has 16"):
        swarm(texts, tmp_path)


def test_one_swarm_has_one_driver(texts, tmp_path):
    fence = Fence(tmp_path)
    try:
        with pytest.raises(ResumeError, match="belongs to pid"):
            swarm(texts, tmp_path)
    finally:
        fence.close()


def test_a_proxy_that_fails_is_named_and_left_out(texts, whole, tmp_path):
    def broken(task, *, rows):
        if task.run == "00001":
            raise OSError("no such disk")
        if task.run == "00003":
            return Outcome("failed", "it diverged")
        return run_proxy(task, rows=rows)

    seen = []
    words = r"2 of 4 proxies failed and are left out of .* \(00001: OSError: no such disk; 00003: it diverged\)"
    with pytest.raises(FailedError, match=words):
        swarm(texts, tmp_path, work=broken, on_progress=seen.append)
    assert read_table(tmp_path / "swarm.parquet").runs == ("00000", "00002")
    assert [(p.finished, p.failed) for p in seen] == [(0, 0), (1, 0), (1, 1), (2, 1), (2, 2)]
    assert swarm(texts, tmp_path).path.read_bytes() == whole.path.read_bytes()


def test_a_task_that_runs_again_after_its_result_is_written_does_nothing(texts, tmp_path):
    """As Ray runs it again whose process dies between the last write and the answer."""

    def twice(task, *, rows):
        assert run_proxy(task, rows=rows) == Outcome("finished")
        before = (task.config.run.folder / "result.json").stat().st_mtime_ns
        seen = []
        assert run_proxy(task, rows=rows, on_record=seen.append) == Outcome("finished")
        assert not seen and (task.config.run.folder / "result.json").stat().st_mtime_ns == before
        return Outcome("finished")

    assert swarm(texts, tmp_path, "swarm.runs=1", work=twice).ending == "finished"


def test_an_evaluation_that_the_journal_lost_is_measured_again(texts, whole, tmp_path):
    def lose(run: str, kind: str, window: int | None) -> None:
        journal = tmp_path / "proxies" / run / "journal.jsonl"
        if (run, kind, window) == ("00001", "evaluation", 4) and not (tmp_path / "lost").exists():
            (tmp_path / "lost").touch()
            lines = journal.read_text().splitlines(keepends=True)
            journal.write_text("".join(line for line in lines if '"kind":"evaluation"' not in line))

    finish = swarm(texts, tmp_path, tasks=Disturbed(lose))
    assert (tmp_path / "lost").exists()
    assert finish.path.read_bytes() == whole.path.read_bytes()


def test_a_swarm_grows_where_its_generator_allows(texts, tmp_path):
    given = ("swarm.generator=dirichlet", "swarm.given.even={counting: 1, greek: 1, noise: 1}")
    small = swarm(texts, tmp_path, *given, "swarm.runs=1")
    assert small.table.runs == ("00000", "given-00000")
    np.testing.assert_allclose(small.table.weights_rd[-1], 1 / 3)
    large = swarm(texts, tmp_path, *given, "swarm.runs=2")
    assert large.table.runs == ("00000", "00001", "given-00000")
    same = large.table.take([run != "00001" for run in large.table.run_r])
    np.testing.assert_array_equal(same.loss_rs(), small.table.loss_rs())


def test_rounds_of_climb_follow_from_what_was_measured_and_are_the_same_after_a_restart(texts, tmp_path):
    more = ("swarm.generator=climb", "swarm.fit.climb={rounds: [3, 2], regressor: linear, num_draws: 200, num_top: 10, "
            "num_best: 4}", "rails={}", "swarm.points=1")  # fmt: skip
    whole = swarm(texts, tmp_path / "whole", *more)
    assert (whole.ending, whole.progress.finished, whole.progress.runs) == ("finished", 5, 5)
    assert whole.table.runs == tuple(f"{run:05}" for run in range(5))

    def stop(run: str, kind: str, window: int | None) -> None:
        if (run, kind) == ("00004", "window"):
            raise OSError("in the second round")

    seen = []
    with pytest.raises(FailedError, match=r"1 of 5 proxies failed .*00004: OSError: in the second round"):
        swarm(texts, tmp_path / "cut", *more, tasks=Disturbed(stop), on_progress=seen.append)
    assert [one.finished for one in seen] == [0, 1, 2, 3, 3, 4, 4]
    again = swarm(texts, tmp_path / "cut", *more)
    assert again.path.read_bytes() == whole.path.read_bytes()
    # The later mixtures lie where the law of the first three says that the target's loss is least.
    last = whole.table.at(1.0)
    slope_d = np.linalg.lstsq(last.weights_rd[:3], last.losses["target/sums"][:3], rcond=None)[0]
    assert (last.weights_rd[3:] @ slope_d).max() < (last.weights_rd[:3] @ slope_d).mean()


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("swarm.points=4",), r"swarm.points=4 of proxies of 6 windows do not fall .* Use one of 1, 2, 3, 6"),
        (("swarm.overrides.model.dimm=3",), r"unknown option `model.dimm`"),
        (("swarm.overrides.policy={kind: odm}",), r"overrides has policy; a proxy may differ in geometry"),
        (("evaluation.sets=[]",), r"nothing to measure proxies on: evaluation.sets=\[\]"),
        (("swarm=null",), r"has no section `swarm`"),
        (("swarm.generator=given",), r"nothing given: no proxy would run"),
    ],
)
def test_what_is_no_swarm_is_refused(texts, tmp_path, overrides, words):
    with pytest.raises(ConfigError, match=words):
        swarm(texts, tmp_path / "none", *overrides)
    assert not (tmp_path / "none").exists()


def test_the_shipped_section_fits_the_demo():
    config = load(RunConfig, [shipped() / "demo.yaml", shipped() / "swarm" / "demo.yaml"])
    catalog = make_catalog(*[1000] * 8)
    proxy = proxy_of(config, options_of(config), catalog)
    assert (proxy.train.windows, proxy.evaluation.every_windows, proxy.checkpoint.every_windows) == (12, 3, 3)
    assert (proxy.model.dim, proxy.optimizer.rate.peak, proxy.optimizer.rate.warmup_steps) == (48, 0.003, 8)
    assert (proxy.rails, proxy.swarm, proxy.corpus.path) == (GuardRails(), None, "data/demo/train")
    by_tokens = load(RunConfig, [shipped() / "demo.yaml"], ["swarm.overrides.train.tokens=49152", "swarm.points=1"])
    assert proxy_of(by_tokens, options_of(by_tokens), catalog).train.windows is None


# ---- on Ray ----------------------------------------------------------------------------------------------


@pytest.mark.ray
def test_on_ray_the_table_is_the_same(texts, whole, tmp_path, ray_session):
    config = config_of(texts, tmp_path, "swarm.cpus_per_run=0.5")
    finish = run_swarm(config, open_rows(config), RayTasks(options_of(config)))
    assert finish.ending == "finished" and finish.path.read_bytes() == whole.path.read_bytes()


def _dies_once(task, *, rows):
    """Its process is killed in the middle of the run, the first time; or it fails every time."""
    import os

    if task.run == "00003":
        raise OSError("no such disk")

    def on_record(record):
        mark = task.stop.with_name(f"died-{task.run}")
        if record["kind"] == "window" and record["window"] == 3 and task.run == "00001" and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)

    return run_proxy(task, rows=rows, on_record=on_record)


@pytest.mark.ray
def test_on_ray_a_killed_worker_is_replaced_and_a_failing_one_is_named(texts, whole, tmp_path, ray_session):
    config = config_of(texts, tmp_path, "swarm.cpus_per_run=0.5", "swarm.max_retries=1", "swarm.at_once=2")
    with pytest.raises(FailedError, match=r"1 of 4 proxies failed .*00003: .*no such disk"):
        run_swarm(config, open_rows(config), RayTasks(options_of(config)), work=_dies_once)
    assert (tmp_path / "died-00001").exists()
    expected = whole.table.take([run != "00003" for run in whole.table.run_r])
    found = read_table(tmp_path / "swarm.parquet")
    assert found.keys == expected.keys
    np.testing.assert_array_equal(found.loss_rs(), expected.loss_rs())
    what = [record["what"] for _, record in read_journal(tmp_path / "proxies/00001/journal.jsonl") if "what" in record]
    assert "resumed" in what
