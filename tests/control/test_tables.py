"""`mixer show`: tables and JSON with the schedule's own numbers."""

import json
from pathlib import Path

import numpy as np
import pytest

from mixer import cli
from mixer.control.record import checkpoint_steps, read_record
from mixer.control.tables import cursor_lines, part_of, schedule_lines
from mixer.core.catalog import Catalog, Domain
from mixer.core.errors import ConfigError
from mixer.core.mixture import Mixture
from mixer.core.plan import plan_window
from mixer.core.schedule import MixtureSchedule
from tests.control.telling import GEOMETRY, make_run
from tests.fakes import make_corpus


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "made", 30, trained=20)


@pytest.fixture(scope="module")
def schedule(run) -> MixtureSchedule:
    return MixtureSchedule.from_text((run / "schedule.jsonl").read_bytes())


def shown(capsys, *args: object) -> list[str]:
    assert cli.main(["show", *map(str, args)]) == 0
    return capsys.readouterr().out.splitlines()


def test_the_schedule_as_a_table(run, schedule, capsys):
    lines = shown(capsys, "schedule", run, "--windows", "3:6")
    names = schedule.catalog.names
    assert [line.split()[:3] for line in lines[1:]] == [[str(k), "policy", "1"] for k in (3, 4, 5)]
    for line, row in zip(lines[1:], [schedule.row(k) for k in (3, 4, 5)], strict=True):
        assert line.split()[3:] == [f"{100 * weight:.2f}%" for weight in row.weights_d]
    assert len(lines[0].split()) == 3 + len(names)
    narrow = schedule_lines(schedule, range(3, 5), 60)
    assert max(map(len, narrow)) <= 60 and narrow[0].endswith("others")
    total = sum(float(cell.rstrip("%")) for cell in narrow[1].split()[3:])
    assert total == pytest.approx(100, abs=0.03)
    assert shown(capsys, "schedule", run)[-1].split()[0] == "21"


def test_the_schedule_as_json_is_exact(run, schedule, capsys):
    values = [json.loads(line) for line in shown(capsys, "schedule", run, "--json")]
    assert [value["window"] for value in values] == list(range(22))
    for value in values:
        row = schedule.row(value["window"])
        assert list(value["weights"].values()) == row.weights_d.tolist()
        assert value["counts"] == dict(zip(schedule.catalog.names, row.counts_d.tolist(), strict=True))
        assert (value["lag"], value["signals_through"]) == (row.window - 1 - row.signals_through, row.signals_through)


def test_a_long_schedule_is_shown_by_some_windows_and_says_so(tmp_path):
    catalog = Catalog(16, "fake", (Domain("a", 9, "a"), Domain("b", 9, "b")))
    other = Catalog(16, "fake", (Domain("a", 9, "a"), Domain("c", 9, "c")))
    schedule = MixtureSchedule(catalog, GEOMETRY).extend(Mixture(np.array([0.5, 0.5])), 60)
    schedule.append(schedule.propose(Mixture(np.array([0.25, 0.75])), catalog=other))
    schedule.extend(Mixture(np.array([0.25, 0.75])), 59)
    lines = schedule_lines(schedule)
    assert len(lines) == 1 + 40 + 2
    assert lines[1].split() == ["0", "prior", "0", "50.00%", "50.00%", "–"]
    assert lines[40].split() == ["119", "prior", "119", "25.00%", "–", "75.00%"]
    assert lines[41] == f"from window 60: another catalog, {other.fingerprint[:12]}"
    assert lines[42].startswith("40 of 120 windows")


def test_ranges():
    assert part_of("2:5", 9, "--windows") == range(2, 5)
    assert part_of(":5", 9, "--windows") == range(5)
    assert part_of("4:", 9, "--windows") == range(4, 9)
    assert part_of("4", 9, "--windows") == range(4, 5)
    assert part_of(None, 9, "--windows") is None
    for wrong in ("5:5", "3:10", "x", "-1:3"):
        with pytest.raises(ConfigError, match="--windows"):
            part_of(wrong, 9, "--windows")


def test_the_rows_of_a_step(run, schedule, capsys):
    plan = plan_window(schedule.row(3), GEOMETRY)
    part = plan.slots(2, 1, 2)
    lines = shown(capsys, "rows", run / "schedule.jsonl", "--step", 14, "--rank", 1, "--of", 2)
    assert lines[0] == "step 14 is step 2 of window 3 (policy), rank 1 of 2: 16 rows"
    assert [line.split() for line in lines[2:]] == [
        [str(16 + i), schedule.catalog.names[plan.domain_n[slot]], f"{plan.row_n[slot]:,}", str(plan.pass_n[slot])]
        for i, slot in enumerate(range(part.start, part.stop))
    ]
    values = [json.loads(line) for line in shown(capsys, "rows", run, "--step", 14, "--domain", "web", "--json")]
    web = schedule.catalog.index["web"]
    inside = plan.slots(2)
    assert [v["row"] for v in values] == plan.row_n[inside][plan.domain_n[inside] == web].tolist()


def test_without_the_corpus_rows_are_given_by_number_with_a_note(run, capsys):
    assert cli.main(["show", "rows", str(run / "schedule.jsonl"), "--step", "3", "--documents"]) == 0
    out, err = capsys.readouterr()
    assert "rows are given by number" in err and "--corpus" in err
    assert len(out.splitlines()) == 2 + GEOMETRY.batch_rows
    assert cli.main(["show", "rows", str(run), "--step", "3", "--documents", "--corpus", "/nowhere"]) == 0
    assert "manifest.json is missing" in capsys.readouterr().err


def test_the_documents_of_a_step(tmp_path, capsys):
    corpus = make_corpus(tmp_path / "corpus", {"code": 40, "web": 70})
    schedule = MixtureSchedule(corpus.catalog, GEOMETRY).extend(Mixture.uniform(corpus.catalog), 2)
    run = tmp_path / "run"
    run.mkdir()
    (run / "schedule.jsonl").write_text(schedule.to_text())
    (run / "run.yaml").write_text(f"corpus:\n  path: {tmp_path / 'corpus'}\n")
    values = [json.loads(line) for line in shown(capsys, "rows", run, "--step", 6, "--documents", "--json")]
    assert len(values) == GEOMETRY.batch_rows
    for value in values:
        for part in value["documents"]:
            document = corpus.document_of(value["domain"], value["row"], part["begin"])
            assert part["document"] == document._asdict()
    lines = shown(capsys, "rows", run, "--step", 6, "--documents")
    first = values[0]["documents"][0]["document"]
    assert f"{first['domain']} #{first['number']}" in lines[2]
    assert f"{first['source']}, record {first['record']}" in lines[2]
    assert len(lines) == 2 + sum(len(value["documents"]) for value in values)
    other = make_corpus(tmp_path / "other", {"code": 41, "web": 71}, seed=1)
    assert other.catalog.fingerprint != corpus.catalog.fingerprint
    call = ["show", "rows", str(run), "--step", "6", "--documents", "--corpus", str(tmp_path / "other"), "--json"]
    assert cli.main(call) == 0
    out, err = capsys.readouterr()
    assert "documents" not in out and "other rows than the run's catalog" in err


def test_a_summary_of_steps(run, schedule, capsys):
    lines = shown(capsys, "rows", run, "--steps", "8:16", "--domain", "web")
    web = schedule.catalog.index["web"]
    rows = [schedule.row(k) for k in (2, 3)]
    num = sum(int(row.counts_d[web]) for row in rows)
    assert lines[0].startswith(f"web gave {num} of the 256 rows of steps 8:16")
    assert lines[2].split()[:6] == [
        "2", "8:12", f"{rows[0].weights_d[web]:.2%}", str(rows[0].counts_d[web]), str(rows[0].offsets_d[web]),
        str(rows[0].next_offsets_d[web]),
    ]  # fmt: skip
    totals = json.loads(shown(capsys, "rows", run, "--steps", "8:16", "--json")[0])
    assert totals["web"] == num and sum(totals.values()) == 256
    for wrong in (["--step", "1", "--rank", "0"], ["--steps", "0:4", "--documents"], ["--steps", "0:9999"]):
        assert cli.main(["show", "rows", str(run), *wrong]) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1


def test_the_catalogs(run, schedule, capsys):
    lines = shown(capsys, "catalog", run)
    assert lines[0] == f"from window 0: catalog {schedule.catalog.fingerprint}"
    web = next(line for line in lines if line.startswith("web"))
    rows = int(schedule.catalog.num_rows_d[schedule.catalog.index["web"]])
    assert web.split()[1:4] == [f"{rows:,}", f"{rows * 64:,}", f"{rows / schedule.catalog.num_rows_d.sum():.2%}"]


def test_the_cursor_is_the_newest_whole_checkpoint(run, schedule, tmp_path, capsys):
    assert checkpoint_steps(tmp_path) is None
    for steps, text in ((16, "{}"), (64, '{"whole": 1}'), (80, '{"torn'), (96, None)):
        folder = tmp_path / "checkpoints" / f"{steps:09d}"
        folder.mkdir(parents=True)
        if text is not None:
            (folder / "checkpoint.json").write_text(text)
    assert checkpoint_steps(tmp_path) == 64
    lines = cursor_lines(read_record(run), 66)
    assert lines[0] == "newest checkpoint: after step 66, so the next is step 2 of window 16"
    assert lines[1] == "trained so far: 20 windows, 80 steps"
    assert lines[2] == "decided: 22 windows of 30"
    row = schedule.row(20)
    assert lines[3] == "window 20 comes next, decided (policy) from the signals through 18:"
    web = row.catalog.index["web"]
    offset, num = int(row.offsets_d[web]), int(row.catalog.num_rows_d[web])
    assert next(line for line in lines if line.startswith("web")).split()[1:] == [
        f"{row.weights_d[web]:.2%}", str(row.counts_d[web]), f"{offset:,}", f"{offset / num:.3f}",
    ]  # fmt: skip
    assert shown(capsys, "cursor", run)[0] == "no checkpoint: a start would train from step 0"


def test_the_cursor_of_a_run_that_waits_or_is_complete(tmp_path):
    record = read_record(make_run(tmp_path / "run", 12, evaluated=False))
    assert cursor_lines(record, 48)[-1] == "the run is complete"
    record = read_record(make_run(tmp_path / "other", 12, trained=5, evaluated=False))
    record.windows[6] = record.windows[4] | {"window": 6}  # as if two more were trained than there are signals of
    assert cursor_lines(record, 28)[-1] == "window 7 comes next; it is decided when the signal of window 5 is there"
