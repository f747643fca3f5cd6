"""What arrives through Ray Data is what the reader gives, bound late, and nothing stays behind."""

import os
import tempfile
import time
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from mixer.core.errors import ConfigError, DataError, ResumeError, ScheduleError
from mixer.core.mixture import Mixture
from mixer.core.plan import Cursor, Geometry
from mixer.core.schedule import MixtureSchedule
from mixer.data.corpus import Corpus
from mixer.data.reader import Batch, WindowReader
from mixer.data.stream import StreamingOptions, WindowStream
from tests.fakes import ActorFeed, ShownRows, make_corpus, stream_processes

pytestmark = pytest.mark.ray

GEOMETRY = Geometry(window_steps=4, batch_rows=8, seed=3, block_rows=4, group_blocks=4)
WINDOWS = 12
WAIT_S = 30.0


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return make_corpus(tmp_path_factory.mktemp("corpus"), {"a": 200, "b": 90, "c": 7}, shard_rows=32)


@pytest.fixture(scope="module")
def schedule(corpus: Corpus) -> MixtureSchedule:
    schedule = MixtureSchedule(corpus.catalog, GEOMETRY)
    for share in np.linspace(0.1, 0.6, WINDOWS):
        schedule.extend(Mixture(np.array([0.9 - share, share, 0.1])))
    return schedule


def same(first: Batch, second: Batch) -> bool:
    def alike(one: np.ndarray, other: np.ndarray) -> bool:
        return one.dtype == other.dtype and np.array_equal(one, other)

    return first[:2] == second[:2] and all(map(alike, first[2:], second[2:]))


def read(corpus: Corpus, feed: object, cursor: Cursor = Cursor(), **options: object) -> list[Batch]:  # noqa: B008
    reader = WindowReader(corpus.by_source, feed, GEOMETRY, **options)  # type: ignore[arg-type]
    reader.cursor = cursor
    return list(reader)


def require_same(stream: list[Batch], reader: list[Batch]) -> None:
    assert len(stream) == len(reader)
    assert all(map(same, stream, reader))


def wait_until_nothing_runs() -> None:
    end = time.monotonic() + WAIT_S
    while left := stream_processes(os.getpid()):
        assert time.monotonic() < end, f"still there: {left}"
        time.sleep(0.05)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_every_rank_gets_what_its_reader_gives(
    corpus: Corpus, schedule: MixtureSchedule, ray_session: ModuleType, world_size: int
) -> None:
    for rank in range(world_size):
        stream = WindowStream(corpus.by_source, schedule, GEOMETRY, rank=rank, world_size=world_size)
        require_same(list(stream), read(corpus, schedule, rank=rank, world_size=world_size))
        assert stream.cursor == Cursor(WINDOWS, 0)


@pytest.mark.parametrize("cursor", [Cursor(0, 1), Cursor(5, 3), Cursor(11, 3), Cursor(12, 0)])
def test_from_any_cursor(corpus: Corpus, schedule: MixtureSchedule, ray_session: ModuleType, cursor: Cursor) -> None:
    stream = WindowStream(corpus.by_source, schedule, GEOMETRY, cursor=cursor)
    require_same(list(stream), read(corpus, schedule, cursor))


def test_runs_and_legs_follow_without_a_seam(
    corpus: Corpus, schedule: MixtureSchedule, ray_session: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mixer.data.stream.LEG_RUNS", 2)
    feed = ActorFeed(ray_session.remote(ShownRows).remote(schedule, WINDOWS))  # asked window by window
    stream = WindowStream(
        corpus.by_source,
        feed,
        GEOMETRY,
        cursor=Cursor(1, 2),
        windows=WINDOWS,
        options=StreamingOptions(run_windows=3),
    )
    require_same(list(stream), read(corpus, schedule, Cursor(1, 2)))


def test_a_broken_off_iteration_goes_on_where_it_stood(
    corpus: Corpus, schedule: MixtureSchedule, ray_session: ModuleType
) -> None:
    stream = WindowStream(corpus.by_source, schedule, GEOMETRY)
    head = []
    for batch in stream:
        head.append(batch)
        if len(head) == 6:
            break
    assert stream.cursor == Cursor(1, 2)
    require_same([*head, *stream], read(corpus, schedule))


def test_narrow_tokens_and_arrays_that_are_the_callers_to_keep(
    corpus: Corpus, schedule: MixtureSchedule, ray_session: ModuleType
) -> None:
    stream = WindowStream(corpus.by_source, schedule, GEOMETRY, widen=False)
    require_same(list(stream), read(corpus, schedule, widen=False))


def test_a_window_is_bound_when_its_row_is_there(
    corpus: Corpus, schedule: MixtureSchedule, ray_session: ModuleType
) -> None:
    rows = ray_session.remote(ShownRows).remote(schedule, 1)
    stream = iter(WindowStream(corpus.by_source, ActorFeed(rows), GEOMETRY, windows=WINDOWS))
    batches = []
    for window in range(WINDOWS):
        ray_session.get(rows.show.remote(window + 1))
        batches += [next(stream) for _ in range(GEOMETRY.window_steps)]
        assert max(ray_session.get(rows.asked.remote())) <= window + 1
    assert next(stream, None) is None
    require_same(batches, read(corpus, schedule))
    assert ray_session.get(rows.asked.remote()) == list(range(WINDOWS))
    assert ray_session.get(rows.most_ahead.remote()) == 0  # only the next one was ever waited for


def test_how_far_tasks_read_ahead_is_bounded(tmp_path: Path, ray_session: ModuleType) -> None:
    corpus = make_corpus(tmp_path, {"a": 2000, "b": 2000}, row_tokens=1024, shard_rows=2000)
    geometry = Geometry(window_steps=8, batch_rows=16)
    schedule = MixtureSchedule(corpus.catalog, geometry).extend(Mixture.uniform(corpus.catalog), 60)
    rows = ray_session.remote(ShownRows).remote(schedule, 60)
    options = StreamingOptions(prefetch_windows=4)
    stream = iter(WindowStream(corpus.by_source, ActorFeed(rows), geometry, windows=60, options=options))
    for step in range(80):
        assert next(stream).window == step // 8
    before = -1
    while before != (asked := max(ray_session.get(rows.asked.remote()))):
        before = asked
        time.sleep(1.0)
    stream.close()
    assert asked == 9 + 4
    assert not list(Path(tempfile.gettempdir()).glob(f"mixer-stream-{os.getpid()}-*"))


def test_a_flipped_token_stops_the_stream_with_shard_and_row(tmp_path: Path, ray_session: ModuleType) -> None:
    corpus = make_corpus(tmp_path / "c", {"a": 64}, shard_rows=64)
    shard = corpus.shards[0]
    with open(f"{corpus.root}/{shard.path}", "r+b") as file:
        file.seek(shard.tokens_offset + 17 * 16 * 4 + 5)
        byte = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte[0] ^ 4]))
    schedule = MixtureSchedule(corpus.catalog, GEOMETRY).extend(Mixture.uniform(corpus.catalog), 2)
    with pytest.raises(DataError, match=rf"{shard.path}.*'a'.*row 17: .*corpus verify") as caught:
        list(WindowStream(Corpus.open(corpus.root).by_source, schedule, GEOMETRY))
    assert type(caught.value) is DataError
    assert "\n" not in str(caught.value)
    wait_until_nothing_runs()


def test_an_error_of_an_actor_behind_the_feed_arrives_as_it_was_raised(
    corpus: Corpus, schedule: MixtureSchedule, ray_session: ModuleType
) -> None:
    feed = ActorFeed(ray_session.remote(ShownRows).remote(schedule, WINDOWS + 9))  # it has fewer rows
    stream = iter(WindowStream(corpus.by_source, feed, GEOMETRY))  # no end is known
    head = [next(stream) for _ in range(WINDOWS * GEOMETRY.window_steps)]
    require_same(head, read(corpus, schedule))
    with pytest.raises(
        ScheduleError, match="^window 12 is not in the schedule, which has 12. It ends here.$"
    ) as caught:
        next(stream)
    assert type(caught.value) is ScheduleError


@pytest.mark.parametrize("shown", [1, WINDOWS])
def test_an_early_close_leaves_nothing_running(
    corpus: Corpus, schedule: MixtureSchedule, ray_session: ModuleType, shown: int
) -> None:
    """Also where a task waits for a row that never comes."""
    feed = ActorFeed(ray_session.remote(ShownRows).remote(schedule, shown))
    stream = iter(WindowStream(corpus.by_source, feed, GEOMETRY))
    next(stream)
    assert stream_processes(os.getpid())
    stream.close()
    wait_until_nothing_runs()


def test_a_switched_catalog_needs_its_rows(tmp_path: Path, corpus: Corpus, ray_session: ModuleType) -> None:
    larger = make_corpus(tmp_path / "larger", {"a": 200, "b": 90, "c": 7, "d": 40}, shard_rows=32)
    schedule = MixtureSchedule(corpus.catalog, GEOMETRY).extend(Mixture.uniform(corpus.catalog), 2)
    schedule.append(schedule.propose(Mixture.uniform(larger.catalog), catalog=larger.catalog))
    with pytest.raises(DataError, match="window 2 is bound to catalog .* Open that catalog too"):
        list(WindowStream(corpus.by_source, schedule, GEOMETRY))
    both = [corpus.by_source, larger.by_source]
    require_same(list(WindowStream(both, schedule, GEOMETRY)), list(WindowReader(both, schedule, GEOMETRY)))


def test_what_cannot_be_is_refused_before_anything_runs(corpus: Corpus, schedule: MixtureSchedule) -> None:
    with pytest.raises(ConfigError, match="9 ranks share steps of batch_rows=8"):
        WindowStream(corpus.by_source, schedule, GEOMETRY, rank=0, world_size=9)
    with pytest.raises(ResumeError, match="windows here have 4 steps"):
        WindowStream(corpus.by_source, schedule, GEOMETRY, cursor=Cursor(0, 4))
    with pytest.raises(ConfigError, match="prefetch_windows is 0; it must be at least 1"):
        StreamingOptions(prefetch_windows=0)
    with pytest.raises(ConfigError, match="num_cpus is -1; it must be at least 0"):
        StreamingOptions(num_cpus=-1)
