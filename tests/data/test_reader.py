"""The reader hands out what the plan says, to any rank, from any cursor, and never a decayed row."""

import pickle

import numpy as np
import pyarrow.fs as pafs
import pytest

from mixer.core.errors import ConfigError, DataError, ResumeError, ScheduleError
from mixer.core.mixture import Mixture
from mixer.core.plan import Cursor, Geometry, Plan
from mixer.core.schedule import GrowingSchedule, MixtureSchedule
from mixer.data.corpus import Corpus
from mixer.data.reader import Batch, WindowReader
from tests.fakes import FAKE_EOS, fake_token, make_corpus

GEOMETRY = Geometry(window_steps=4, batch_rows=8, seed=3, block_rows=4, group_blocks=4)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return make_corpus(tmp_path_factory.mktemp("corpus"), {"a": 200, "b": 90, "c": 7}, shard_rows=32)


@pytest.fixture(scope="module")
def schedule(corpus: Corpus) -> MixtureSchedule:
    """Moving weights; c is passed over several times."""
    schedule = MixtureSchedule(corpus.catalog, GEOMETRY)
    for share in np.linspace(0.1, 0.6, 12):
        schedule.extend(Mixture(np.array([0.9 - share, share, 0.1])))
    return schedule


def read(corpus: Corpus, schedule: MixtureSchedule, **options: object) -> list[Batch]:
    return list(WindowReader(corpus.by_source, schedule, GEOMETRY, **options))  # type: ignore[arg-type]


def same(first: Batch, second: Batch) -> bool:
    return (first.window, first.step) == (second.window, second.step) and all(
        np.array_equal(getattr(first, name), getattr(second, name))
        for name in ("tokens", "domain_index", "row", "length", "starts", "starts_offsets")
    )


def test_every_row_is_the_one_that_the_plan_names(corpus: Corpus, schedule: MixtureSchedule) -> None:
    batches = read(corpus, schedule)
    assert [(b.window, b.step) for b in batches] == [(w, s) for w in range(12) for s in range(4)]
    plan = Plan(schedule, GEOMETRY)
    for batch in batches:
        window = plan.window(batch.window)
        slots = window.slots(batch.step)
        assert batch.domain_index.tolist() == window.domain_n[slots].tolist()
        assert batch.row.tolist() == window.row_n[slots].tolist()
        assert batch.tokens.dtype == np.int64
        for i in range(8):
            text = batch.tokens[i, : batch.length[i]]
            expected = fake_token(int(batch.domain_index[i]), int(batch.row[i]))
            assert set(text.tolist()) <= {expected, FAKE_EOS}
            assert (batch.tokens[i, batch.length[i] :] == FAKE_EOS).all()


def test_documents_start_where_the_shard_says(corpus: Corpus, schedule: MixtureSchedule) -> None:
    seen = 0
    for batch in read(corpus, schedule):
        for i in range(8):
            starts = batch.starts[batch.starts_offsets[i] : batch.starts_offsets[i + 1]].tolist()
            shard, row = corpus.locate(batch.domain_index[i : i + 1], batch.row[i : i + 1])
            assert starts == corpus.shard(int(shard[0])).starts[int(row[0])].as_py()
            assert all(start == 0 or batch.tokens[i, start - 1] == FAKE_EOS for start in starts)
            seen += len(starts)
    assert seen > 300


@pytest.mark.parametrize("world_size", [2, 3, 4, 6, 8])
def test_ranks_together_give_the_same_global_batches(
    corpus: Corpus, schedule: MixtureSchedule, world_size: int
) -> None:
    whole = read(corpus, schedule)
    parts = [read(corpus, schedule, rank=rank, world_size=world_size) for rank in range(world_size)]
    for step, batch in enumerate(whole):
        assert np.array_equal(np.concatenate([part[step].tokens for part in parts]), batch.tokens)
        assert np.array_equal(np.concatenate([part[step].row for part in parts]), batch.row)


def test_restored_at_every_step_the_tail_is_the_same(corpus: Corpus, schedule: MixtureSchedule) -> None:
    whole = read(corpus, schedule)
    reader = WindowReader(corpus.by_source, schedule, GEOMETRY)
    states = [reader.state_dict()]
    for _ in reader:
        states.append(reader.state_dict())
    assert len(states) == len(whole) + 1
    assert states[5] == {"window": 1, "step": 1}
    for done, state in enumerate(states):
        restored = WindowReader(corpus.by_source, schedule, GEOMETRY)
        restored.load_state_dict(state)
        tail = list(restored)
        assert len(tail) == len(whole) - done
        assert all(map(same, tail, whole[done:]))


def test_a_broken_off_iteration_goes_on_where_it_stood(corpus: Corpus, schedule: MixtureSchedule) -> None:
    reader = WindowReader(corpus.by_source, schedule, GEOMETRY)
    head = [next(iter(reader)) for _ in range(3)]
    assert all(map(same, head + list(reader), read(corpus, schedule)))


@pytest.mark.parametrize("workers", [1, 2, 3, 5])
@pytest.mark.parametrize("run", [1, 3, 7])
def test_workers_share_out_runs_of_steps(corpus: Corpus, schedule: MixtureSchedule, workers: int, run: int) -> None:
    whole = read(corpus, schedule)[6:]
    cursor = Cursor(1, 2)
    got: dict[int, Batch] = {}
    for worker in range(workers):
        reader = WindowReader(corpus.by_source, schedule, GEOMETRY)
        reader.cursor = cursor
        for batch in reader.every(workers, worker, run):
            place = Cursor(batch.window, batch.step).steps(GEOMETRY) - 6
            assert place // run % workers == worker
            assert place not in got
            got[place] = batch
    assert all(same(got[place], batch) for place, batch in enumerate(whole))


def test_prefetching_changes_nothing(corpus: Corpus, schedule: MixtureSchedule) -> None:
    assert all(map(same, read(corpus, schedule, prefetch_windows=3), read(corpus, schedule)))


def test_held_batches_are_never_written_over(corpus: Corpus, schedule: MixtureSchedule) -> None:
    for widen in (True, False):
        held = read(corpus, schedule, widen=widen)
        assert len({batch.tokens.ctypes.data for batch in held}) == len(held)
        for batch in held:
            first = fake_token(int(batch.domain_index[0]), int(batch.row[0]))
            assert set(batch.tokens[0, : batch.length[0]].tolist()) <= {first, FAKE_EOS}


def test_memory_nobody_holds_is_used_again(corpus: Corpus, schedule: MixtureSchedule) -> None:
    places = {batch.tokens.ctypes.data for batch in WindowReader(corpus.by_source, schedule, GEOMETRY, windows=1)}
    assert len(places) <= 3


def test_a_mixture_may_be_asked_for_window_by_window(corpus: Corpus, schedule: MixtureSchedule) -> None:
    asked: list[int] = []

    def ask(window: int) -> Mixture:
        asked.append(window)
        return schedule.row(window).mixture

    feed = GrowingSchedule(MixtureSchedule(corpus.catalog, GEOMETRY), ask)
    batches = list(WindowReader(corpus.by_source, feed, GEOMETRY, windows=12))
    assert asked == list(range(12))
    assert all(map(same, batches, read(corpus, schedule)))
    assert [row.counts_d.tolist() for row in feed.schedule] == [row.counts_d.tolist() for row in schedule]


def test_a_switched_catalog_needs_its_rows(tmp_path: object, corpus: Corpus) -> None:
    larger = make_corpus(f"{tmp_path}/larger", {"a": 200, "b": 90, "c": 7, "d": 40}, shard_rows=32)
    schedule = MixtureSchedule(corpus.catalog, GEOMETRY).extend(Mixture.uniform(corpus.catalog), 2)
    schedule.append(schedule.propose(Mixture.uniform(larger.catalog), catalog=larger.catalog))
    with pytest.raises(DataError, match="window 2 is bound to catalog .* Open that catalog too"):
        read(corpus, schedule)
    batches = list(WindowReader([corpus.by_source, larger.by_source], schedule, GEOMETRY))
    assert np.bincount(np.concatenate([b.domain_index for b in batches[8:]])).tolist() == [8, 8, 8, 8]
    # untouched domains go on in their order: none of a's rows comes twice
    rows_of_a = [row for b in batches for d, row in zip(b.domain_index, b.row, strict=True) if d == 0]
    assert len(set(rows_of_a)) == len(rows_of_a) == sum(int(row.counts_d[0]) for row in schedule)


def test_a_flipped_token_stops_the_reader_with_shard_and_row(tmp_path: object) -> None:
    corpus = make_corpus(f"{tmp_path}/c", {"a": 64}, shard_rows=64)
    shard = corpus.shards[0]
    path = f"{corpus.root}/{shard.path}"
    with open(path, "r+b") as file:
        file.seek(shard.tokens_offset + 17 * 16 * 4 + 5)
        byte = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte[0] ^ 4]))
    schedule = MixtureSchedule(corpus.catalog, GEOMETRY).extend(Mixture.uniform(corpus.catalog), 2)
    with pytest.raises(DataError, match=rf"{shard.path}.*'a'.*row 17: .*corpus verify"):
        list(WindowReader(Corpus.open(corpus.root).by_source, schedule, GEOMETRY))


class TestRefusals:
    def test_more_ranks_than_rows(self, corpus: Corpus, schedule: MixtureSchedule) -> None:
        with pytest.raises(ConfigError, match="9 ranks share steps of batch_rows=8"):
            read(corpus, schedule, rank=0, world_size=9)

    def test_a_rank_outside_of_the_world(self, corpus: Corpus, schedule: MixtureSchedule) -> None:
        with pytest.raises(ConfigError, match="rank 2 of 2"):
            read(corpus, schedule, rank=2, world_size=2)

    @pytest.mark.parametrize("state", [{}, {"window": 1}, {"window": "x", "step": 0}, {"window": None, "step": 0}])
    def test_a_state_that_is_no_cursor(self, corpus: Corpus, schedule: MixtureSchedule, state: dict[str, int]) -> None:
        with pytest.raises(ResumeError, match="is no cursor"):
            WindowReader(corpus.by_source, schedule, GEOMETRY).load_state_dict(state)

    @pytest.mark.parametrize("state", [{"window": 0, "step": 4}, {"window": -1, "step": 0}])
    def test_a_state_of_another_geometry(
        self, corpus: Corpus, schedule: MixtureSchedule, state: dict[str, int]
    ) -> None:
        with pytest.raises(ResumeError, match="windows here have 4 steps"):
            WindowReader(corpus.by_source, schedule, GEOMETRY).load_state_dict(state)

    def test_going_past_the_schedule(self, corpus: Corpus, schedule: MixtureSchedule) -> None:
        with pytest.raises(ScheduleError, match="window 12 is not in the schedule, which has 12"):
            read(corpus, schedule, windows=13)


def test_a_reader_travels_to_other_processes(corpus: Corpus, schedule: MixtureSchedule) -> None:
    reader = pickle.loads(pickle.dumps(WindowReader(corpus.by_source, schedule, GEOMETRY)))
    assert all(map(same, list(reader), read(corpus, schedule)))


def test_an_object_store_gives_the_same_rows(corpus: Corpus, schedule: MixtureSchedule, tmp_path: object) -> None:
    """Whatever is not local disk takes the ranged path; a real S3 protocol is tested in test_shards."""
    remote = pafs.PyFileSystem(pafs.FSSpecHandler(_memory_copy(corpus)))
    reader = WindowReader(Corpus.open("/corpus", filesystem=remote).by_source, schedule, GEOMETRY)
    assert all(map(same, list(reader), read(corpus, schedule)))


def _memory_copy(corpus: Corpus) -> object:
    from fsspec.implementations.memory import MemoryFileSystem

    memory = MemoryFileSystem()
    memory.put(corpus.root, "/corpus", recursive=True)
    return memory
