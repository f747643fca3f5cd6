"""Which rows and documents a step holds: as planned, as trained, and as packed."""

import numpy as np
import pytest

from mixer.core.catalog import Catalog, Domain
from mixer.core.errors import ConfigError, ScheduleError
from mixer.core.mixture import Mixture
from mixer.core.plan import Geometry, plan_window
from mixer.core.schedule import MixtureSchedule
from mixer.data.provenance import documents_of, given_in, knows, row_of_step, rows_of_step, totals_in
from mixer.data.reader import WindowReader
from tests.fakes import FAKE_MAX_ROWS, make_corpus

GEOMETRY = Geometry(window_steps=4, batch_rows=6, seed=5)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return make_corpus(tmp_path_factory.mktemp("corpus"), {"code": 90, "books": 13, "web": 150}, shard_rows=32)


@pytest.fixture(scope="module")
def schedule(corpus):
    schedule = MixtureSchedule(corpus.catalog, GEOMETRY)
    for window in range(5):
        weights_d = np.array([0.2 + 0.1 * window, 0.3, 0.5 - 0.1 * window])
        schedule.extend(Mixture(weights_d / weights_d.sum()))
    return schedule


def test_the_rows_of_a_step_are_those_that_were_planned_and_read(corpus, schedule):
    for world_size in (1, 4):
        for rank in range(world_size):
            reader = WindowReader(corpus.by_source, schedule, GEOMETRY, rank=rank, world_size=world_size)
            for batch in reader:
                step = batch.window * GEOMETRY.window_steps + batch.step
                found = rows_of_step(schedule, step, rank, world_size)
                names = [corpus.catalog.names[place] for place in batch.domain_index]
                assert [one.domain for one in found] == names
                read = batch.tokens[:, 0] % FAKE_MAX_ROWS  # a row's tokens say its number
                assert [one.row for one in found] == read.tolist()
                part = GEOMETRY.rank_slots(rank, world_size)
                assert [one.slot for one in found] == list(range(part.start, part.stop))
    plan = plan_window(schedule.row(3), GEOMETRY)
    assert [one.turn for one in rows_of_step(schedule, 13)] == plan.pass_n[6:12].tolist()


def test_a_step_that_is_not_decided_is_refused_with_those_that_are(schedule):
    for step in (-1, 20):
        with pytest.raises(ScheduleError, match="steps 0 to 19"):
            rows_of_step(schedule, step)
    assert row_of_step(schedule, 19)[0].window == 4 and row_of_step(schedule, 19)[1] == 3
    with pytest.raises(ConfigError, match="rank 2 of 2"):
        rows_of_step(schedule, 0, 2, 2)


def test_what_a_domain_gave_in_some_steps_is_the_sum_of_the_steps(schedule):
    rows = [rows_of_step(schedule, step) for step in range(20)]
    for begin, end in [(0, 20), (3, 9), (5, 6), (4, 8), (17, 20)]:
        planned = [one.domain for step in rows[begin:end] for one in step]
        assert totals_in(schedule, begin, end) == {name: planned.count(name) for name in schedule.catalog.names}
        before = [one.domain for step in rows[:begin] for one in step].count("books")
        found = given_in(schedule, begin, end, "books")
        assert found[0].first == before
        assert sum(one.num_rows for one in found) == planned.count("books")
        assert found[-1].passes == (before + planned.count("books")) / 13
        assert [one.first + one.num_rows for one in found[:-1]] == [one.first for one in found[1:]]
        assert (found[0].first_step, sum(one.num_steps for one in found)) == (begin, end - begin)
    assert [one.weight for one in given_in(schedule, 0, 20, "web")] == [row.weights_d[2] for row in schedule]
    with pytest.raises(ScheduleError, match="nearest known one is 'books'"):
        given_in(schedule, 0, 4, "boks")
    with pytest.raises(ScheduleError, match="5:5 are none"):
        given_in(schedule, 5, 5, "web")


def test_a_switch_of_the_catalog_is_followed():
    before = Catalog(16, "fake", tuple(Domain(name, 50, name) for name in ("a", "b")))
    after = Catalog(16, "fake", tuple(Domain(name, 50, name) for name in ("b", "c")))
    schedule = MixtureSchedule(before, GEOMETRY).extend(Mixture(np.array([0.5, 0.5])), 2)
    schedule.append(schedule.propose(Mixture(np.array([0.5, 0.5])), catalog=after))
    assert {one.domain for one in rows_of_step(schedule, 7)} <= {"a", "b"}
    assert {one.domain for one in rows_of_step(schedule, 8)} <= {"b", "c"}
    assert [one.window for one in given_in(schedule, 0, 12, "a")] == [0, 1]
    assert [(one.window, one.first) for one in given_in(schedule, 0, 12, "b")] == [(0, 0), (1, 12), (2, 24)]
    assert totals_in(schedule, 0, 12) == {"a": 24, "b": 36, "c": 12}


@pytest.mark.parametrize("domain", ["code", "books", "web"])
def test_the_parts_of_all_rows_are_the_documents_whole_and_in_order(corpus, domain):
    rows = corpus.by_source
    lengths = corpus.documents(domain).column("tokens").to_pylist()
    given = dict.fromkeys(range(len(lengths)), 0)
    place = corpus.catalog.index[domain]
    for row in range(int(corpus.catalog.num_rows_d[place])):
        parts = documents_of(rows, domain, row)
        assert parts[0].begin == 0
        assert [part.end for part in parts[:-1]] == [part.begin for part in parts[1:]]
        for part in parts:
            number = part.document.number
            assert part.document == corpus.document_of(domain, row, part.begin)
            assert part.tokens == lengths[number]
            assert part.offset == given[number]  # rows are visited in order, so this much came before
            given[number] += part.end - part.begin
    assert [given[number] for number in range(len(lengths))] == lengths


def test_only_rows_of_the_same_content_are_known(corpus):
    mine = corpus.catalog
    assert knows(corpus.by_source, mine, "web")
    changed = Catalog(16, mine.tokenizer, (Domain("web", 150, "other"), Domain("code", 90, mine.domains[1].content)))
    assert not knows(corpus.by_source, changed, "web")
    assert knows(corpus.by_source, changed, "code")
    assert not knows(corpus.by_source, mine, "wab")


def test_what_was_written_of_a_row_is_what_its_parts_say(corpus):
    """A document's end is an EOS, nothing else is: parts that end a document end in one."""
    rows = corpus.by_source
    eos = corpus.manifest.tokenizer.eos
    for row in range(40):
        shard_n, place_n = rows.locate(np.array([corpus.catalog.index["web"]]), np.array([row]))
        tokens = corpus.shard(int(shard_n[0])).take(place_n)[0]
        for part in documents_of(rows, "web", row):
            ends = part.offset + part.end - part.begin == part.tokens
            assert (tokens[part.end - 1] == eos) == ends
