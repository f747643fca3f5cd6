"""The reader under PyTorch's loaders: same order for any number of workers, exact state, no copies held."""

import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from mixer.core.mixture import Mixture
from mixer.core.plan import Geometry
from mixer.core.schedule import MixtureSchedule
from mixer.data.corpus import Corpus
from mixer.data.reader import WindowReader
from mixer.training.dataset import MixtureDataset, MixtureLoader
from tests.fakes import make_corpus

GEOMETRY = Geometry(window_steps=5, batch_rows=6, seed=1)
STEPS = 20


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return make_corpus(tmp_path_factory.mktemp("corpus"), {"a": 200, "b": 90}, shard_rows=32)


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "This DataLoader will create", UserWarning)
        yield


def reader(corpus: Corpus, **options: Any) -> WindowReader:
    schedule = MixtureSchedule(corpus.catalog, GEOMETRY).extend(Mixture(np.array([0.7, 0.3])), STEPS // 5)
    return WindowReader(corpus.by_source, schedule, GEOMETRY, **options)


def same(batch: dict[str, Any], expected: dict[str, Any]) -> bool:
    return batch.keys() == expected.keys() and all(
        torch.equal(value, expected[key]) if isinstance(value, torch.Tensor) else value == expected[key]
        for key, value in batch.items()
    )


@pytest.fixture(scope="module")
def whole(corpus: Corpus) -> list[dict[str, Any]]:
    batches = list(MixtureDataset(reader(corpus)))
    assert [(batch["window"], batch["step"]) for batch in batches] == [divmod(s, 5) for s in range(STEPS)]
    assert batches[0]["tokens"].dtype == torch.int64
    assert batches[0]["tokens"].shape == (6, 16)
    return batches


@pytest.mark.parametrize("num_workers", [0, 1, 2, 3, 4])
def test_a_plain_data_loader_keeps_the_order(corpus: Corpus, whole: list[dict[str, Any]], num_workers: int) -> None:
    loader = DataLoader(MixtureDataset(reader(corpus)), batch_size=None, num_workers=num_workers)
    got = list(loader)
    assert len(got) == STEPS
    assert all(map(same, got, whole))


@pytest.mark.parametrize("num_workers", [0, 1, 3])
@pytest.mark.parametrize("stop", [0, 1, 7, 19, 20])
def test_the_loader_resumes_after_what_it_delivered(
    corpus: Corpus, whole: list[dict[str, Any]], num_workers: int, stop: int
) -> None:
    loader = MixtureLoader(reader(corpus), num_workers=num_workers, run_steps=3)
    batches = iter(loader)
    head = [next(batches) for _ in range(stop)]
    state = loader.state_dict()
    assert state == dict(zip(("window", "step"), divmod(stop, 5), strict=True))
    restored = MixtureLoader(reader(corpus), num_workers=2 - num_workers // 2, run_steps=4)
    restored.load_state_dict(state)
    got = head + list(restored)
    assert len(got) == STEPS
    assert all(map(same, got, whole))


def test_the_dataset_resumes_at_another_world_size(corpus: Corpus, whole: list[dict[str, Any]]) -> None:
    dataset = MixtureDataset(reader(corpus))
    batches = iter(dataset)
    for _ in range(8):
        next(batches)
    tails = []
    for rank in range(3):
        part = MixtureDataset(reader(corpus, rank=rank, world_size=3))
        part.load_state_dict(dataset.state_dict())
        tails.append(list(part))
    for step, expected in enumerate(whole[8:]):
        assert torch.equal(torch.cat([tail[step]["tokens"] for tail in tails]), expected["tokens"])


@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_kept_by_the_caller_stay_as_they_were(corpus: Corpus, num_workers: int) -> None:
    loader = MixtureLoader(reader(corpus), num_workers=num_workers)
    kept = [(batch, batch["tokens"].clone()) for batch in loader]
    assert all(torch.equal(batch["tokens"], copy) for batch, copy in kept)
