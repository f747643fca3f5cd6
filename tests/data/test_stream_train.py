"""The stream inside Ray Train, whose workers hold every CPU, and over an object store."""

import json
import os
import signal
import tempfile
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from mixer.core.mixture import Mixture
from mixer.core.plan import Cursor, Geometry
from mixer.core.row import ScheduleRow
from mixer.core.schedule import MixtureSchedule
from mixer.data.corpus import Corpus
from mixer.data.reader import Batch, WindowReader
from mixer.data.storage import Storage
from mixer.data.stream import StreamingOptions, WindowStream
from tests.fakes import ActorFeed, ShownRows, make_corpus, stream_processes

pytestmark = pytest.mark.ray

GEOMETRY = Geometry(window_steps=4, batch_rows=8, seed=3, block_rows=4, group_blocks=4)
WINDOWS, RANKS, LAG = 9, 2, 1
KILLED_AT = Cursor(4, 2)
WAIT_S = 10.0


class SlowRows:
    """Row k is there once the signal of window k - 1 - lag is, and then only when asked a few times more."""

    SLOW = 3

    def __init__(self, schedule: MixtureSchedule) -> None:
        self._schedule = schedule
        self._signals = 0
        self._asked: dict[int, int] = {}
        self._given: dict[int, int] = {}

    def row(self, window: int) -> ScheduleRow | None:
        if window > self._signals + LAG:
            return None
        self._asked[window] = self._asked.get(window, 0) + 1
        if self._asked[window] < self.SLOW:
            return None
        self._given.setdefault(window, self._signals)
        return self._schedule.row(window)

    def signal(self, window: int) -> None:
        self._signals = max(self._signals, window + 1)

    def given(self) -> dict[int, int]:
        """How many signals there were when a window's row was first given."""
        return self._given


def train(config: dict[str, Any]) -> None:
    """A training loop without a model: what a step leaves behind is which rows it saw."""
    import ray
    import torch
    import torch.distributed as dist
    from ray import train as ray_train

    rank = ray_train.get_context().get_world_rank()
    folder, rows = Path(config["folder"]), config["rows"]
    saved = folder / "cursor.json"
    attempt = sum(1 for _ in folder.glob(f"began-*-{rank}"))
    (folder / f"began-{attempt}-{rank}").touch()
    cursor = Cursor.from_dict(json.loads(saved.read_text())) if saved.exists() else Cursor()
    dist.barrier()  # everybody has read where to begin
    corpus = Corpus.open(config["corpus"])
    stream = WindowStream(
        corpus.by_source, ActorFeed(rows), GEOMETRY, rank=rank, world_size=RANKS, cursor=cursor, windows=WINDOWS
    )
    for batch in stream:
        if attempt == 1 and rank == 0 and batch[:2] == (cursor.window, 1):  # every rank's stream runs
            (folder / "left.json").write_text(json.dumps(left_after(config["driver"])))
        if attempt == 0 and rank == 1 and batch[:2] == (KILLED_AT.window, KILLED_AT.step):
            os.kill(os.getpid(), signal.SIGKILL)
        note(folder / f"rows-{attempt}-{rank}", batch)
        dist.all_reduce(torch.ones(1))  # as gradients would be: no rank goes on without the others
        if batch.step + 1 == GEOMETRY.window_steps and rank == 0:
            partial = folder / ".cursor"
            partial.write_text(json.dumps(stream.cursor.to_dict()))
            partial.rename(saved)
            ray.get(rows.signal.remote(batch.window))
    ray_train.report({"window": stream.cursor.window})


def note(path: Path, batch: Batch) -> None:
    with path.open("a") as file:
        rows = [batch.domain_index.tolist(), batch.row.tolist(), batch.length.tolist(), int(batch.tokens.sum())]
        file.write(json.dumps([batch.window, batch.step, *rows]) + "\n")


def left_after(driver: int) -> list[str]:
    """What works for streams below the driver once everything of an attempt before is gone, or time is over."""
    end = time.monotonic() + WAIT_S
    while len(found := stream_processes(driver)) > 2 * RANKS and time.monotonic() < end:
        time.sleep(0.05)
    return found


def wait_until_nothing_runs() -> None:
    end = time.monotonic() + WAIT_S
    while left := stream_processes(os.getpid()):
        assert time.monotonic() < end, f"still there: {left}"
        time.sleep(0.05)


def expected(corpus: Corpus, schedule: MixtureSchedule, rank: int, path: Path) -> list[str]:
    for batch in WindowReader(corpus.by_source, schedule, GEOMETRY, rank=rank, world_size=RANKS):
        note(path, batch)
    return path.read_text().splitlines()


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    return make_corpus(tmp_path / "corpus", {"a": 200, "b": 90, "c": 7}, shard_rows=32)


@pytest.fixture
def schedule(corpus: Corpus) -> MixtureSchedule:
    schedule = MixtureSchedule(corpus.catalog, GEOMETRY)
    for share in np.linspace(0.1, 0.6, WINDOWS):
        schedule.extend(Mixture(np.array([0.9 - share, share, 0.1])))
    return schedule


def test_workers_that_hold_every_cpu_get_the_rows_of_the_plan_also_after_one_is_killed(
    tmp_path: Path, corpus: Corpus, schedule: MixtureSchedule, ray_session: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_TRAIN_V2_ENABLED", "1")
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    folder = tmp_path / "seen"
    folder.mkdir()
    rows = ray_session.remote(SlowRows).options(num_cpus=0).remote(schedule)
    assert ray_session.cluster_resources()["CPU"] == RANKS
    trainer = TorchTrainer(
        train,
        train_loop_config={
            "corpus": corpus.root,
            "rows": rows,
            "folder": str(folder),
            "driver": os.getpid(),
        },
        scaling_config=ScalingConfig(num_workers=RANKS, resources_per_worker={"CPU": 1}),
        torch_config=TorchConfig(backend="gloo", timeout_s=60),
        run_config=RunConfig(
            name="stream", storage_path=str(tmp_path / "train"), failure_config=FailureConfig(max_failures=1)
        ),
    )
    result = trainer.fit()
    assert result.error is None

    killed, again = KILLED_AT.steps(GEOMETRY), Cursor(KILLED_AT.window, 0)
    for rank in range(RANKS):
        before, after = ((folder / f"rows-{attempt}-{rank}").read_text().splitlines() for attempt in (0, 1))
        whole = expected(corpus, schedule, rank, folder / f"expected-{rank}")
        assert before == whole[: killed + (rank == 0)]  # the rank that lives waits in the step it was killed in
        assert after == whole[again.steps(GEOMETRY) :]
    left = json.loads((folder / "left.json").read_text())
    assert sorted(left) == sorted(2 * list(dict.fromkeys(left))), left  # a coordinator and a task a rank: the new ones
    assert len(left) == 2 * RANKS, left
    given = ray_session.get(rows.given.remote())
    assert sorted(given) == list(range(WINDOWS))
    assert all(signals >= window - LAG for window, signals in given.items())
    wait_until_nothing_runs()


def test_shards_in_an_object_store(ray_session: ModuleType, s3: Any) -> None:
    made = make_corpus("corpora/stream", {"a": 60, "b": 30}, shard_rows=16, filesystem=s3.filesystem)
    storage = Storage(endpoint=s3.endpoint, region="us-east-1", anonymous=True)
    corpus = Corpus.open("s3://corpora/stream", storage=storage)
    assert corpus.catalog.fingerprint == made.catalog.fingerprint
    schedule = MixtureSchedule(corpus.catalog, GEOMETRY).extend(Mixture.uniform(corpus.catalog), 4)
    feed = ActorFeed(ray_session.remote(ShownRows).remote(schedule, 4))
    stream = list(WindowStream(corpus.by_source, feed, GEOMETRY, windows=4, rank=1, world_size=2))
    reader = list(WindowReader(made.by_source, schedule, GEOMETRY, rank=1, world_size=2))
    assert len(stream) == len(reader) == 4 * GEOMETRY.window_steps
    for one, other in zip(stream, reader, strict=True):
        assert one[:2] == other[:2]
        for array, same in zip(one[2:], other[2:], strict=True):
            np.testing.assert_array_equal(array, same)
    fetched = sum(size for path, asked, size in s3.gets() if path.endswith(".arrow") and asked)
    rows_read = 2 * sum(len(batch.row) for batch in reader)  # by the reader as well
    assert fetched >= rows_read * corpus.manifest.layout.row_bytes


def test_an_early_close_leaves_no_task_and_no_file(
    corpus: Corpus, schedule: MixtureSchedule, ray_session: ModuleType
) -> None:
    rows = ray_session.remote(SlowRows).remote(schedule)
    stream = WindowStream(
        corpus.by_source, ActorFeed(rows), GEOMETRY, windows=WINDOWS, options=StreamingOptions(num_cpus=1)
    )
    batches = iter(stream)
    for _ in range(5):
        next(batches)
    files = f"mixer-stream-{os.getpid()}-*"
    assert len(list(Path(tempfile.gettempdir()).glob(files))) == 1
    assert len(stream_processes(os.getpid())) == 2
    batches.close()
    assert not list(Path(tempfile.gettempdir()).glob(files))
    wait_until_nothing_runs()
    end = time.monotonic() + WAIT_S
    while ray_session.available_resources().get("CPU") != 2:  # nothing holds or waits for a CPU
        assert time.monotonic() < end
        time.sleep(0.05)
