"""The report: its numbers are the run's, it needs nothing but itself, and no run is too short or odd for it."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from mixer import cli
from mixer.control import drawing
from mixer.control.course import course_of, internals_of, shown_domains
from mixer.control.pictures import Scene
from mixer.control.record import happenings, options_of, read_record
from mixer.control.report import write_report
from mixer.control.wording import short, span
from mixer.core.catalog import Catalog, Domain
from mixer.core.errors import ScheduleError
from mixer.core.mixture import Mixture
from mixer.core.schedule import MixtureSchedule
from tests.control.telling import GEOMETRY, Teller, make_catalog, make_run
from tests.fakes import make_corpus

PNG = b"\x89PNG\r\n\x1a\n"


class Reading(HTMLParser):
    """What a browser would be told: tags, the cells of tables, ids, the data at the end."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.lines: list[list[str]] = []
        self.data = ""
        self._in: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.tags.append(tag)
        self._in.append(tag)
        self.ids += [value for key, value in attrs if key == "id" and value]
        self.links += [v for k, v in values.items() if k in ("src", "href", "xlink:href") and v]
        if tag == "tr":
            self.lines.append([])
        if tag in ("td", "th"):
            self.lines[-1].append("")

    def handle_endtag(self, tag):
        while self._in and self._in.pop() != tag:
            pass

    def handle_data(self, data):
        if self._in[-1:] == ["script"]:
            self.data += data
        if self._in[-1:] in (["td"], ["th"]):
            self.lines[-1][-1] += data

    def line(self, name: str) -> list[str]:
        return next(line for line in self.lines if line[0] == name)


def read_page(folder: Path) -> tuple[str, Reading, dict]:
    text = (folder / "report" / "report.html").read_text("utf-8")
    reading = Reading(text)
    return text, reading, json.loads(reading.data)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = make_run(tmp_path_factory.mktemp("runs") / "made", 44)
    write_report(folder)
    return folder


def told(folder: Path, kind: str) -> list[dict]:
    return [one for one in map(json.loads, (folder / "journal.jsonl").read_text().splitlines()) if one["kind"] == kind]


def test_the_numbers_of_the_page_are_those_of_the_files(run):
    _, reading, data = read_page(run)
    schedule = MixtureSchedule.from_text((run / "schedule.jsonl").read_bytes())
    windows = told(run, "window")
    facts = data["facts"]
    names = schedule.catalog.names
    assert facts["tokens"] == sum(sum(one["tokens_d"].values()) for one in windows)
    assert (facts["windows_trained"], facts["windows_decided"], facts["windows_planned"]) == (44, 44, 44)
    assert facts["steps"] == 44 * GEOMETRY.window_steps
    assert facts["catalog"] == schedule.catalog.fingerprint
    assert facts["duration_s"] == pytest.approx(sum(one["seconds"] for one in windows) + 6.5)
    assert facts["data_wait_share"] == pytest.approx(0.004)
    assert facts["rows_trained_differ_from_plan"] == 0
    assert (facts["bad_rows"], facts["faults"], facts["faults_survived"]) == (1, 1, 1)

    weights_wd = np.array([row.weights_d for row in schedule])
    counts_wd = np.array([row.counts_d for row in schedule])
    apart_wd = np.cumsum(weights_wd * GEOMETRY.window_slots - counts_wd, axis=0)
    assert facts["largest_distance_rows"] == pytest.approx(np.abs(apart_wd).max(), abs=1e-9)
    last = windows[-1]
    for place, name in enumerate(names):
        one = data["domains"][place]
        assert one["domain"] == name
        assert one["rows_given"] == counts_wd[:, place].sum()
        assert one["last_weight"] == pytest.approx(weights_wd[-1, place], rel=1e-12)
        assert one["passes"] == pytest.approx(counts_wd[:, place].sum() / schedule.catalog.num_rows_d[place])
        assert one["last_loss"] == pytest.approx(last["loss_sum"][name] / last["tokens_d"][name])
        assert one["rows_trained"] == sum(w["rows_d"][name] + w["bad_rows_d"][name] for w in windows)
        cells = reading.line(name)
        assert cells[3] == f"{weights_wd[-1, place]:.2%}"
        assert cells[4] == f"{counts_wd[:, place].sum():,}"
        assert cells[10] == f"{last['loss_sum'][name] / last['tokens_d'][name]:.3f}"
    evaluated = told(run, "evaluation")
    assert reading.line("target/code_new")[3] == f"{evaluated[-1]['sets']['target/code_new']['loss']:.4f}"
    assert reading.line("target/code_new")[-1] == str(len(evaluated))


def test_the_page_needs_nothing_but_itself(run):
    text, reading, _ = read_page(run)
    assert not [link for link in reading.links if not link.startswith("#")]
    assert not re.findall(r"url\((?!#)", text)
    assert "@import" not in text and "<link" not in text and text.count("<script") == 1
    assert len(set(reading.ids)) == len(reading.ids)
    targets = {link[1:] for link in reading.links} | set(re.findall(r"url\(#([^)]+)\)", text))
    assert targets <= set(reading.ids)
    pictures = sorted(path.stem for path in (run / "report").glob("*.png"))
    assert pictures == sorted(re.findall(r"<figure id='([^']+)'", text))
    assert reading.tags.count("svg") == len(pictures) == 11
    for path in (run / "report").glob("*.png"):
        assert path.read_bytes()[:8] == PNG
    for colour, name in drawing.THEMED.items():  # in the dark the page's own colours are used
        assert colour not in text.partition("</style>")[2]
        assert f"var({name})" in text.partition("</style>")[2]


def test_the_same_run_gives_the_same_files(run, tmp_path):
    first = {path.name: path.read_bytes() for path in (run / "report").iterdir()}
    assert {path.name: path.read_bytes() for path in write_report(run, tmp_path / "again")} == first


def test_what_happened_is_listed_in_order_with_what_the_schedule_tells(run):
    found = happenings(read_record(run))
    assert [one["what"] for one in found] == [
        "begun", "checkpoint", "bad_rows", "restart", "order", "checkpoint", "finished",
    ]  # fmt: skip
    quiet = read_record(run)
    quiet.events = []
    assert [(one["window"], one["what"], one["text"]) for one in happenings(quiet)] == [
        (36, "order", "paused: looking at it (6 windows)")
    ]
    _, reading, _ = read_page(run)
    restart = next(line for line in reading.lines if len(line) == 6 and line[2] == "restart")
    assert restart[4:] == ["24", "96"]
    assert "SIGKILL" in restart[3]


def test_a_fault_that_nothing_followed_was_not_survived(tmp_path):
    folder = make_run(tmp_path / "run", 30, trained=10)
    assert read_record(folder).faults_survived == 0
    teller = Teller(folder)
    teller.now += 1000
    teller.event("restart", "lost", window=9)
    record = read_record(folder)
    assert (len(record.faults), record.faults_survived, record.status) == (1, 0, "not finished")


def test_status_is_what_the_last_word_says(tmp_path):
    folder = make_run(tmp_path / "run", 12, trained=6)
    assert read_record(folder).status == "not finished"
    (folder / "live.json").write_text("{}")
    assert read_record(folder).status == "running"
    teller = Teller(folder)
    teller.now += 500
    for what, again in (("stopped", "resumed"), ("failed", "begun"), ("bad_loss", "begun"), ("finished", "resumed")):
        teller.event(what, "so it ended", after_s=1)
        assert read_record(folder).status == what
        teller.event("restart", "the controller", after_s=1)  # which was to be closed
        assert read_record(folder).end is not None
        teller.event(again, "again", after_s=1)
        assert read_record(folder).status == "running"


@pytest.mark.parametrize(("windows", "trained"), [(1, 1), (1, 0), (40, 7), (3, 0)])
def test_short_and_unfinished_runs_have_a_report(tmp_path, windows, trained):
    folder = make_run(tmp_path / "run", windows, trained=trained, evaluated=False)
    files = write_report(folder)
    _, _, data = read_page(folder)
    assert data["facts"]["windows_trained"] == trained
    assert data["facts"]["windows_decided"] == min(windows, trained + 2)
    assert ("losses.png" in {path.name for path in files}) == (trained > 0)
    assert not data["sets"]


def test_a_schedule_alone_and_an_empty_one_have_a_report(run, tmp_path):
    alone = tmp_path / "replay" / "schedule.jsonl"
    alone.parent.mkdir()
    alone.write_bytes((run / "schedule.jsonl").read_bytes())
    files = write_report(alone, tmp_path / "out")
    assert {path.name for path in files} == {"report.html", "weights.png", "passes.png", "asked-given.png", "lag.png"}
    assert '"status":"schedule only"' in files[0].read_text()
    alone.write_bytes((run / "schedule.jsonl").read_bytes().splitlines(keepends=True)[0])
    assert [path.name for path in write_report(alone, tmp_path / "empty")] == ["report.html"]
    with pytest.raises(ScheduleError, match="holds no run"):
        write_report(tmp_path / "nowhere")


def switched(folder: Path) -> MixtureSchedule:
    """Ten windows of three domains, then ten in which one of them is gone and another came."""
    before = Catalog(16, "fake", tuple(Domain(name, 50, name) for name in ("a", "b", "c")))
    after = Catalog(16, "fake", tuple(Domain(name, 50, name) for name in ("a", "c", "d</script>")))
    schedule = MixtureSchedule(before, GEOMETRY).extend(Mixture(np.array([0.5, 0.3, 0.2])), 10)
    schedule.append(schedule.propose(Mixture(np.array([0.25, 0.25, 0.5])), catalog=after, reason="set: new one"))
    schedule.extend(Mixture(np.array([0.25, 0.25, 0.5])), 9, reason="held")
    folder.mkdir()
    (folder / "schedule.jsonl").write_text(schedule.to_text())
    return schedule


def test_a_switch_of_the_catalog_shows_who_came_and_went(tmp_path):
    switched(tmp_path / "fork")
    record = read_record(tmp_path / "fork")
    course = course_of(record)
    assert course.names == ("a", "b", "c", "d</script>")
    assert np.isnan(course.weights_bd[10:, 1]).all() and np.isnan(course.weights_bd[:10, 3]).all()
    np.testing.assert_allclose(course.weights_bd[[9, 10]][:, [0, 2]], [[0.5, 0.2], [0.25, 0.25]])
    slots = GEOMETRY.window_slots
    np.testing.assert_allclose(course.passes_bd[9], [slots * 5 / 50, slots * 3 / 50, slots * 2 / 50, np.nan], atol=0.02)
    write_report(tmp_path / "fork")
    text, reading, data = read_page(tmp_path / "fork")
    assert [one["domain"] for one in data["domains"]] == ["a", "b", "c", "d</script>"]
    assert reading.line("d</script>")[2] == "50.00%"
    assert text.count("</script>") == 1
    happened = {line[2]: line[3] for line in reading.lines if len(line) == 6}
    assert "domain 'b' was removed" in happened["catalog"]
    assert happened["order"] == "set: new one"
    assert happened["held"] == "the mixture was held for 9 windows"
    assert data["facts"]["windows_held"] == 9


def test_of_many_domains_the_largest_and_the_moving_are_named_and_the_rest_is_pooled(tmp_path):
    catalog = make_catalog(60)
    schedule = MixtureSchedule(catalog, GEOMETRY)
    for window in range(8):
        weights_d = np.full(60, 1.0)
        weights_d[5] = 40.0
        weights_d[33] = 1.0 + 0.5 * window  # moves most
        schedule.extend(Mixture(weights_d / weights_d.sum()))
    (tmp_path / "schedule.jsonl").write_text(schedule.to_text())
    record = read_record(tmp_path)
    course = course_of(record)
    scene = Scene.of(record, course)
    assert len(scene.shown) == 20 and {5, 33} <= set(scene.shown)
    assert scene.shown == tuple(sorted(scene.shown))
    assert sorted([*scene.shown, *scene.rest]) == list(range(60))
    assert scene.rest_name == "40 others"
    looks = [(one.colour, str(one.line)) for one in scene.looks]
    assert len(set(looks)) == 20
    assert shown_domains(course) == scene.shown


def test_points_of_several_windows_keep_sums(tmp_path):
    record = read_record(make_run(tmp_path / "run", 44))
    fine, coarse = course_of(record), course_of(record, most_points=10)
    assert (fine.stride, coarse.stride, len(coarse)) == (1, 5, 9)
    np.testing.assert_allclose(coarse.weights_bd[2], fine.weights_bd[10:15].mean(axis=0))
    np.testing.assert_allclose(coarse.loss_sum_bd.sum(axis=0), fine.loss_sum_bd.sum(axis=0))
    assert coarse.loss_of()[2] == pytest.approx(
        fine.loss_sum_bd[10:15].sum() / fine.loss_tokens_bd[10:15].sum(), rel=1e-12
    )
    assert coarse.tokens_e.tolist() == [*fine.tokens_e[:44:5], fine.tokens_e[44]]
    assert coarse.largest_apart == fine.largest_apart
    np.testing.assert_array_equal(coarse.passes_bd[-1], fine.passes_bd[-1])
    assert np.nanmax(coarse.lag_b) == 1
    assert np.isnan(fine.lag_b[:2]).all() and (fine.lag_b[2:] == 1).all()


def test_influence_is_drawn_where_the_journal_has_it(tmp_path):
    folder = make_run(tmp_path / "run", 6, trained=4)
    teller = Teller(folder)
    names = make_catalog().names
    benefit = {"code_new": dict(zip(names, np.arange(len(names)) / 10, strict=True)), "questions": dict.fromkeys(names)}
    influence = {"metric": "adam", "targets": ["code_new", "questions"], "benefit": benefit, "error": benefit}
    teller.tell("window", window=4, influence=influence)
    teller.tell("window", window=4, influence=influence)
    teller.tell("window", window=5, influence=influence | {"benefit": {"code_new": {"nobody": 1.0}}})  # damaged
    record = read_record(folder)
    assert [one["window"] for one in record.influence] == [4]
    assert record.influence[0]["matrix"][names[2]][0] == 0.2 and np.isnan(record.influence[0]["matrix"][names[2]][1])
    assert "influence-0.png" in {path.name for path in write_report(folder)}


def test_the_verb_writes_the_report_and_names_the_corpus(tmp_path, capsys):
    corpus = make_corpus(tmp_path / "corpus", {"code": 40, "web": 70})
    schedule = MixtureSchedule(corpus.catalog, GEOMETRY).extend(Mixture.uniform(corpus.catalog), 2)
    run = tmp_path / "run"
    run.mkdir()
    (run / "schedule.jsonl").write_text(schedule.to_text())
    (run / "run.yaml").write_text(f"corpus:\n  path: {tmp_path / 'corpus'}\n")
    assert cli.main(["report", str(run)]) == 0
    assert capsys.readouterr().out == f"{run / 'report' / 'report.html'} and 3 pictures beside it\n"
    _, reading, data = read_page(run)
    assert data["facts"]["corpus"] == corpus.fingerprint == reading.line("corpus")[1]
    assert data["facts"]["catalog"] == corpus.catalog.fingerprint == reading.line("catalog")[1]
    (run / "run.yaml").write_text("corpus:\n  path: /nowhere\n")
    assert cli.main(["report", str(run), "--out", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "report.html").is_file()


def test_internals_are_split_by_name_and_domain(run):
    found = internals_of(read_record(run))
    assert sorted(found) == ["epsilon", "reward"]
    assert set(found["reward"]) == set(make_catalog().names)
    windows, values = found["epsilon"][None]
    assert windows.tolist() == list(range(44))
    assert values[0] == 1 / 8


def test_names_at_the_ends_of_lines_never_lie_on_one_another():
    rng = np.random.default_rng(0)
    for num in (1, 2, 7, 20):
        for gap in (0.01, 0.04):
            wanted = np.sort(rng.uniform(0, 1, num) ** 3)
            placed = drawing.spread(wanted, gap)
            assert (np.diff(placed) >= gap - 1e-12).all()
            assert placed.min() >= 0 and placed.max() <= 1 + 1e-12
    np.testing.assert_allclose(drawing.spread(np.array([0.2, 0.5, 0.8]), 0.1), [0.2, 0.5, 0.8])
    np.testing.assert_allclose(drawing.spread(np.array([0.5, 0.5]), 0.1), [0.45, 0.55])


def test_options_are_found_by_their_dotted_key_and_secrets_are_not_shown(tmp_path):
    text = "train:\n  windows: 60\n  tokens: null\npolicy:\n  kind: odm\n  inner:\n    x: 'a: b'\nrails: {}\n"
    assert options_of(text) == {"train.windows": "60", "policy.kind": "odm", "policy.inner.x": "a: b"}
    folder = make_run(tmp_path / "run", 2, trained=0)
    (folder / "run.yaml").write_text(text + "tracker:\n  uri: http://me:hunter2@host\n  api_key: hunter3\n")
    write_report(folder)
    page, _, data = read_page(folder)
    assert "hunter" not in page and "http://***@host" in page
    assert data["facts"]["windows_planned"] == 60


def test_a_replay_and_a_fork_say_what_they_were_made_from(tmp_path):
    switched(tmp_path / "fork")
    origin = tmp_path / "fork" / "origin.json"
    origin.write_text('{"kind": "fork", "source": "/runs/first", "steps": 40, "plain": false, "window": 10}')
    record = read_record(tmp_path / "fork")
    assert record.made_from == "fork of /runs/first at step 40"
    assert record.planned_windows is None
    scene = Scene.of(record, course_of(record))
    assert scene.marks() == {10 * GEOMETRY.window_slots * 16.0: "catalog, fork, set"}
    origin.write_text('{"kind": "replay", "source": "/runs/first", "windows": 20, "stretched": true}')
    record = read_record(tmp_path / "fork")
    assert record.made_from == "replay of /runs/first, stretched"
    assert record.planned_windows == 20


def test_numbers_for_people():
    assert [short(value) for value in (0, 12.34, 999, 1234, 999_999, 2.5e9)] == [
        "0", "12.3", "999", "1.23k", "1M", "2.5B",
    ]  # fmt: skip
    assert [span(value) for value in (1.23456, 59, 61, 3661, 90000)] == [
        "1.23 s", "59 s", "1 min 01 s", "1 h 01 min", "1 d 01 h",
    ]  # fmt: skip
