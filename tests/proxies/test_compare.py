"""Comparisons of policies: whole ones on a tiny corpus, cut off and gone on with, and what is refused."""

import json
import os
import shutil
import signal

import pytest

from mixer import cli
from mixer.alone import run_alone
from mixer.config import load, shipped
from mixer.control.journal import read_journal
from mixer.core.errors import ConfigError, ResumeError
from mixer.core.policies import kinds
from mixer.proxies.compare import STOP, Asked, compare
from mixer.proxies.contenders import config_of, contenders_of
from mixer.proxies.findings import write_findings
from mixer.proxies.lanes import Job, Outcome, Processes, RayTasks, Wish, run_one
from mixer.run import RunConfig, open_rows
from tests.runs.making import make_texts, options_of

WINDOWS = 6
OPTIONS = (f"train.windows={WINDOWS}", "train.trace=false", "evaluation.every_windows=3", "rails.floor=0.02",
           "influence.every_windows=2", "influence.rows=4", "influence.parts=2")  # fmt: skip


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    make_texts(folder)
    return folder


class InTurn:
    """Lanes that are this process, one run after the other; at a record of the journal `cut` may raise."""

    def __init__(self, cut=lambda record: None):
        self.cut, self.begun = cut, []

    def run(self, jobs, stop):
        for number, job in enumerate(jobs):
            if stop.exists():
                return
            self.begun.append(job.name)
            rows = open_rows(job.config)
            ending = run_alone(job.config, rows, stop=stop.exists, on_record=self.cut)
            yield number, Outcome("finished" if ending == "finished" else "stopped")


def asked_for(texts, folder, *overrides, policies=("natural", "grape"), seeds=2, **more):
    base = load(RunConfig, (), [one for one in options_of(texts, folder, *OPTIONS, *overrides) if "policy" not in one])
    return Asked(base=base, rows=open_rows(base), contenders=contenders_of(policies), seeds=seeds, **more)


@pytest.fixture(scope="module")
def undisturbed(texts, tmp_path_factory):
    asked = asked_for(texts, tmp_path_factory.mktemp("compare") / "undisturbed")
    lanes = InTurn()
    found = compare(asked, lanes)
    write_findings(asked.folder, found)
    assert lanes.begun == ["natural/0", "grape/0", "natural/1", "grape/1"]
    return asked.folder


def test_a_comparison_says_what_its_runs_measured(undisturbed):
    found = json.loads((undisturbed / "compare.json").read_text())
    natural, grape = found["contenders"]["natural"], found["contenders"]["grape"]
    window = 4 * 8 * 32  # steps, rows, tokens of a row
    assert found["evaluated_at"] == [0, 3 * window, 6 * window]
    assert found["targets"] == ["sums"]
    assert natural["seeds"] == grape["seeds"] == [0, 1]
    journal = [record for _, record in read_journal(undisturbed / "grape/1/journal.jsonl")]
    losses = [record["sets"]["target/sums"]["loss"] for record in journal if record["kind"] == "evaluation"]
    assert grape["curve"]["by_seed"][1] == losses
    assert grape["final_loss"]["by_seed"][1] == losses[-1] != grape["final_loss"]["by_seed"][0]
    probes = [record["probe_tokens"] for record in journal if "probe_tokens" in record]
    assert len(probes) == 3 and grape["overhead"]["probe_tokens"] == sum(probes) > 0
    assert natural["overhead"]["probe_tokens"] == 0
    assert natural["weights"]["noise"]["floor"] == 0.02
    assert sum(one["final"] for one in grape["weights"].values()) == pytest.approx(1)
    assert grape["weights"] != natural["weights"]
    assert found["left_out"] == {}
    times = json.loads((undisturbed / "times.json").read_text())
    assert times["grape"]["probe_s"] > 0 == times["natural"]["probe_s"]
    for name in ("compare.md", "compare.png", "compare-compute.png", "compare-weights.png"):
        assert (undisturbed / name).stat().st_size > 500


def test_what_is_finished_is_not_done_again_and_more_may_be_asked_for(texts, tmp_path, undisturbed):
    asked = asked_for(texts, undisturbed)
    lanes = InTurn()
    before = (undisturbed / "compare.json").read_bytes()
    write_findings(undisturbed, compare(asked, lanes))
    assert lanes.begun == []
    assert (undisturbed / "compare.json").read_bytes() == before
    only = compare(asked_for(texts, undisturbed, policies=("natural", "grape", "uniform")), None)
    assert only.left_out == {"uniform/0": "not finished", "uniform/1": "not finished"}
    assert only.verdict is not None and list(only.verdict["contenders"]) == ["natural", "grape"]


@pytest.mark.parametrize("record", [4, 19, 33])
def test_killed_anywhere_it_goes_on_to_the_same_numbers(texts, tmp_path, undisturbed, record):
    asked = asked_for(texts, tmp_path / "run")
    left = iter(range(record))

    def cut(_):
        if next(left, None) is None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compare(asked, InTurn(cut))
    assert not (tmp_path / "run" / "compare.json").exists()
    write_findings(asked.folder, compare(asked, InTurn()))
    assert (asked.folder / "compare.json").read_bytes() == (undisturbed / "compare.json").read_bytes()


def test_stopped_by_a_signal_it_goes_on_to_the_same_numbers(texts, tmp_path, undisturbed):
    asked = asked_for(texts, tmp_path / "run")
    left = iter(range(15))

    def cut(_):
        if next(left, None) is None and not (asked.folder / STOP).exists():
            os.kill(os.getpid(), signal.SIGINT)

    found = compare(asked, InTurn(cut))
    assert (found.ending, found.verdict) == ("stopped", None)
    seen = []
    found = compare(asked, InTurn(), seen.append)
    assert [seen[0].finished, seen[-1].finished, seen[-1].windows] == [1, 4, 4 * WINDOWS]
    write_findings(asked.folder, found)
    assert (asked.folder / "compare.json").read_bytes() == (undisturbed / "compare.json").read_bytes()


def test_processes_of_which_one_is_killed(texts, tmp_path, undisturbed, monkeypatch):
    """The run of the killed process is named, the others are done; the next start does the rest."""
    monkeypatch.setattr("mixer.proxies.lanes.LOOK_EVERY_S", 0.01)
    asked = asked_for(texts, tmp_path / "run")
    killed = []

    def kill_once(progress):
        if not killed and progress.going:
            (name,) = progress.going
            killed.append(name)
            os.kill(json.loads((asked.folder / name / "owner.json").read_text())["pid"], signal.SIGKILL)

    found = compare(asked, Processes(1, asked.folder), kill_once)
    assert found.left_out is not None and found.left_out.keys() == set(killed) == {"natural/0"}
    assert "by signal 9" in found.left_out["natural/0"]
    assert (found.verdict or {})["contenders"]["natural"]["seeds"] == [1]
    found = compare(asked, Processes(2, asked.folder))
    write_findings(asked.folder, found)
    assert (asked.folder / "compare.json").read_bytes() == (undisturbed / "compare.json").read_bytes()


@pytest.mark.ray
def test_tasks_of_ray_come_to_the_same_numbers(texts, tmp_path, undisturbed, ray_session):
    asked = asked_for(texts, tmp_path / "run")
    found = compare(asked, RayTasks(asked.rows, cpus=0.5, at_once=2))
    write_findings(asked.folder, found)
    assert (asked.folder / "compare.json").read_bytes() == (undisturbed / "compare.json").read_bytes()


def test_a_run_ends_if_the_file_is_there_or_its_parent_is_not(tmp_path):
    assert not Wish(tmp_path / "stop", os.getppid())()
    assert Wish(tmp_path / "stop", os.getppid() + 1)()
    (tmp_path / "stop").touch()
    assert Wish(tmp_path / "stop")()


def command(texts, folder, *more):
    options = [one for one in options_of(texts, folder, *OPTIONS) if "policy" not in one]
    return ["compare", *options, "--policies", "natural,grape", "--seeds", "2", *more]


def test_the_command_tells_what_was_found(texts, tmp_path, undisturbed, capsys):
    folder = tmp_path / "run"
    shutil.copytree(undisturbed, folder)
    assert cli.main(command(texts, folder, "--watch", "noise", "--extra", "grape=6144")) == 0
    shown = capsys.readouterr()
    assert "4 of 4 runs" in shown.err
    assert "best: " in shown.out and "worse than natural: " in shown.out
    assert "noise" in shown.out and "counting" not in shown.out
    found = json.loads((folder / "compare.json").read_text())
    one = found["contenders"]["grape"]
    assert one["overhead"]["cost_tokens"] == found["tokens"] == 6144
    assert one["equal_compute"]["mean"] > one["final_loss"]["mean"]
    assert cli.main(command(texts, folder, "--watch", "nois")) == 2
    assert "--watch names nois; the domains are counting, greek, noise" in capsys.readouterr().err
    assert cli.main(["compare", "policy.kind=odm", "--policies", "natural"]) == 2
    assert "policies come by --policies" in capsys.readouterr().err


def test_the_command_names_what_failed_in_its_answer_and_its_status(texts, tmp_path, undisturbed, capsys):
    folder = tmp_path / "run"
    shutil.copytree(undisturbed, folder)
    journal = folder / "grape/1/journal.jsonl"
    lines = [line for line in journal.read_text().splitlines(keepends=True) if '"evaluation","window":3' not in line]
    journal.write_text("".join(lines))
    assert cli.main(command(texts, folder)) == 1
    assert "left out: grape/1: its journal lacks the evaluation after window 3" in capsys.readouterr().out


def test_a_run_that_fails_is_an_outcome(texts, tmp_path):
    asked = asked_for(texts, tmp_path / "run")
    entry = asked.entries()[0]
    entry.folder.mkdir(parents=True)
    (entry.folder / "run.yaml").mkdir()  # nobody can write it
    job = Job(entry.name, entry.config, tmp_path / STOP)
    outcome = run_one(job.config, asked.rows, lambda: False)
    assert outcome.ending == "failed" and "cannot be written" in outcome.text


def test_bad_input_is_refused_before_anything_is_trained(texts, tmp_path):
    folder = tmp_path / "run"

    def refused(match, *overrides, error: type[Exception] = ConfigError, **more):
        with pytest.raises(error, match=match):
            compare(asked_for(texts, folder, *overrides, **more), InTurn())
        assert not folder.exists()

    refused("grpe is neither a file nor a kind of policy", policies=("natural", "grpe"))
    refused(r"compared with 'natural', which is none of grape, uniform", policies=("grape,uniform",))
    refused("there is no target to compare on", "evaluation.sets=[validation]", policies=("natural", "uniform"))
    refused(r"evaluation\.every_windows is null", "evaluation.every_windows=null")
    refused("needs at least two", policies=("natural",))
    refused("seeds=0", seeds=0)
    refused("policy skill_it: .* learns from losses on the validation corpus", "evaluation.sets=[targets]",
            policies=("natural", "skill_it"))  # fmt: skip
    refused("policy shearing: .*reference", policies=("natural", "shearing"))
    refused("policy doremi: .*reference", policies=("natural", "doremi"))
    other = tmp_path / "other.yaml"
    other.write_text("policy: {kind: natural}\ntrain: {windows: 3}\n")
    refused("unknown option `train`", policies=("natural", str(other)))
    other.write_text("policy: {kind: natural, rate: 3}\n")
    refused(r"policy other: .*unknown option `policy\.rate`", policies=("natural", str(other)))
    other.write_text("policy: {kind: fixed, weights: {nothing: 1}}\n")
    refused("policy other: .*nothing", policies=("natural", str(other)))


def test_runs_of_other_options_are_refused(texts, undisturbed):
    def refused(match, *overrides):
        with pytest.raises(ResumeError, match=match):
            compare(asked_for(texts, undisturbed, *overrides), InTurn())

    refused(r"model\.dim=16", "model.dim=32")
    refused(r"evaluation\.rows=8, this comparison 4", "evaluation.rows=4")
    refused(r"geometry\.window_steps=4, this comparison 2", "geometry.window_steps=2")


def test_contenders_are_kinds_and_files_with_what_they_cost(tmp_path):
    (tmp_path / "regmix.yaml").write_text("policy: {kind: fixed}\n")
    (tmp_path / "regmix.json").write_text('{"cost_tokens": 5e6, "runs": 3}')
    file = tmp_path / "regmix.yaml"
    found = contenders_of(["natural,grape", str(file), f"again={file}"], ["again=7", "grape=1e3"])
    assert [(one.label, one.cost_tokens) for one in found] == [
        ("natural", 0.0),
        ("grape", 1000.0),
        ("regmix", 5e6),
        ("again", 7.0),
    ]
    for named, extra, match in (
        (["natural", "natural"], [], "two policies are called 'natural'"),
        (["natural", f"a/b={file}"], [], "'a/b' is no label"),
        (["natural", "grape"], ["odm=3"], "extra tokens for 'odm'"),
        (["natural", "grape"], ["grape=-3"], "--extra grape=-3 is '-3'"),
        (["natural", "grape"], ["grape"], "--extra grape is None"),
    ):
        with pytest.raises(ConfigError, match=match):
            contenders_of(named, extra)
    (tmp_path / "regmix.json").write_text('{"cost_tokens": "many"}')
    with pytest.raises(ConfigError, match=r"cost_tokens of .*regmix\.json is 'many'"):
        contenders_of(["natural", str(file)])


@pytest.mark.parametrize("name", ["compare", "folder"])
def test_shipped_configurations_have_curves_and_take_every_kind(name, tmp_path):
    base = load(RunConfig, [shipped() / f"{name}.yaml"])
    assert base.train.windows is not None and base.evaluation.every_windows is not None
    assert base.train.windows % base.evaluation.every_windows == 0
    for contender in contenders_of(kinds()):
        config = config_of(base, contender, tmp_path, 3)
        assert config.policy["kind"] == contender.label
        assert (config.train.seed, config.geometry.seed, config.tracker.kind) == (3, 3, "none")
        assert config.run.folder == tmp_path / contender.label / "3"
        assert (config.model, config.rails, config.influence) == (base.model, base.rails, base.influence)


def test_a_contender_may_differ_in_the_sections_of_its_file(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("policy: {kind: odm}\nrails: {max_shift: 0.1}\ninfluence: {rows: 2}\nprior: {a: 1, b: 2}\n")
    base = load(RunConfig, (), ["policy.kind=ado", "policy.form=paper", "rails.floor=0.03", "train.windows=3"])
    _, mine = contenders_of(["natural", str(file)])
    config = config_of(base, mine, tmp_path, 0)
    assert config.policy == {"kind": "odm"}  # nothing is left of the policy of the comparison
    assert (config.rails.floor, config.rails.max_shift, config.influence.rows) == (0.03, 0.1, 2)
    assert config.prior == {"a": 1, "b": 2}
