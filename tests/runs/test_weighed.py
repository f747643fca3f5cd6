"""Runs whose step does more, in one process without Ray: rows weighted by their losses, the excess over a reference."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mixer.config import to_text
from mixer.core.errors import ConfigError
from mixer.core.mixture import Mixture
from mixer.core.plan import Cursor
from mixer.core.schedule import MixtureSchedule
from mixer.core.signal import Signal
from mixer.data.corpus import CatalogRows
from mixer.data.reader import WindowReader
from mixer.run import Job, RunConfig, make_model, make_parts, make_reference, open_rows
from mixer.training import loop
from mixer.training.checkpoint import find, load_model
from mixer.training.step import StepRows
from tests.runs.making import STEPS, config_of, make_texts

SHORT = 3  # windows
FEASIBLE = "step.reweight={kind: feasible, burn_in: 0.0, feasible: {tolerance: 3.0, rate: 0.5, price: 2.0}}"


class Sink:
    """Takes what a run measures; asks it to stop before one of its steps."""

    def __init__(self, stop_before: int | None) -> None:
        self.signals: list[Signal] = []
        self._asked, self._stop_before = 0, stop_before

    def report(self, signal: Signal, record: Mapping[str, Any] | None = None) -> None:
        self.signals.append(signal)

    def note(self, record: Mapping[str, Any]) -> None: ...

    def settle(self) -> None: ...

    def wants_stop(self) -> bool:
        self._asked += 1
        return self._asked - 1 == self._stop_before


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    make_texts(folder)
    return folder


def config_at(texts: Path, folder: Path, *overrides: str) -> RunConfig:
    return config_of(texts, folder, "train.num_workers=1", "train.trace=false", "policy={kind: natural}", *overrides)


def train(
    config: RunConfig, stop_before: int | None = None, windows: int = SHORT, mixture: tuple[float, ...] = ()
) -> list[Signal]:
    rows = open_rows(config)
    chosen = Mixture(np.array(mixture)) if mixture else Mixture.natural(rows.catalog)
    schedule = MixtureSchedule(rows.catalog, config.geometry).extend(chosen, windows)
    sink = Sink(stop_before)
    parts = make_parts(Job(config, rows, schedule, None, windows), sink)

    def batches(*, rank: int, world_size: int, cursor: Cursor) -> Iterator[Any]:
        reader = WindowReader(rows, schedule, config.geometry, rank=rank, world_size=world_size, windows=windows)
        reader.cursor = cursor
        return iter(reader)

    loop.train_here(replace(parts, batches=batches), "cpu")
    return sink.signals


def weights_of(config: RunConfig) -> list[torch.Tensor]:
    model = make_model(config, open_rows(config).corpus.manifest.tokenizer.vocab_size)
    newest = find(config.run.folder / "checkpoints")
    assert newest is not None
    load_model(newest, model)
    return list(model.parameters())


@pytest.fixture(scope="module")
def small(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A run to be a reference, of another size than those that look at it."""
    folder = tmp_path_factory.mktemp("reference") / "small"
    config = config_at(texts, folder, "model.dim=8")
    train(config)
    schedule = MixtureSchedule(open_rows(config).catalog, config.geometry)
    (folder / "run.yaml").write_text(to_text(config))
    (folder / "schedule.jsonl").write_text(schedule.to_text())
    return config


@pytest.mark.parametrize("kind", ["row", "domain", "excess"])
def test_what_a_step_remembers_goes_through_a_checkpoint_within_a_window(
    kind: str, texts: Path, small: RunConfig, tmp_path: Path
) -> None:
    how: dict[str, Any] = {}
    options = [FEASIBLE, f"step.reweight.feasible.per={kind}"]
    if kind == "row":  # of a domain so small that all of its rows come again
        options, how = [*options, "geometry.batch_rows=256"], {"mixture": (1.0, 0.0, 0.0)}
        assert open_rows(small).catalog.num_rows_d[0] < 256 * STEPS * SHORT * 2 / 3
    if kind == "excess":
        options = ["step.measure_excess=true", f"step.reference={small.run.path}"]
    whole, parts = (config_at(texts, tmp_path / name, *options) for name in ("whole", "parts"))
    expected = train(whole, **how)
    found = train(parts, stop_before=STEPS + 2, **how)
    assert len(found) == 1
    found += train(parts, **how)
    assert found == expected
    assert all(torch.equal(a, b) for a, b in zip(weights_of(parts), weights_of(whole), strict=True))


# --- rows weighted by their losses --------------------------------------------------------------------


def test_rows_count_alike_in_the_burn_in(texts: Path, tmp_path: Path) -> None:
    plain = train(config_at(texts, tmp_path / "plain"))
    late = train(config_at(texts, tmp_path / "late", "step.reweight={kind: linupper, burn_in: 0.34}"))
    # Steps 0 to 4 of 12; the losses of step 5 are the last that do not know of weights.
    assert late[0] == plain[0]
    assert late[1] != plain[1]


# --- the excess over a reference ----------------------------------------------------------------------


def test_the_excess_over_a_run_is_in_the_signals_and_changes_nothing_else(
    texts: Path, small: RunConfig, tmp_path: Path
) -> None:
    one_step = ("geometry.window_steps=1", "train.windows=2")
    plain, over = (
        config_at(texts, tmp_path / "plain", *one_step),
        (
            config_at(
                texts, tmp_path / "over", *one_step, "step.measure_excess=true", f"step.reference={small.run.path}"
            )
        ),
    )
    without, draws = train(plain, windows=2), torch.get_rng_state()
    found = train(over, windows=2)
    assert torch.equal(torch.get_rng_state(), draws)  # a model with dropout drops the same
    for signal, expected in zip(found, without, strict=True):
        assert signal.excess_sum_d is not None
        assert replace(signal, excess_sum_d=None) == expected
    assert all(torch.equal(a, b) for a, b in zip(weights_of(plain), weights_of(over), strict=True))

    # The first step is taken at the first weights: by hand.
    rows = open_rows(over)
    schedule = MixtureSchedule(rows.catalog, over.geometry).extend(Mixture.natural(rows.catalog), 1)
    batch = StepRows.of(next(iter(WindowReader(rows, schedule, over.geometry))))
    vocab = rows.corpus.manifest.tokenizer.vocab_size
    reference = make_model(small, vocab)
    newest = find(small.run.folder / "checkpoints")
    assert newest is not None
    load_model(newest, reference)
    with torch.no_grad():
        ours, its = (
            model(batch.tokens_bs, batch.documents, batch.target_bs).loss_bs
            for model in (make_model(over, vocab), reference)
        )
    excess_b = (ours - its).clamp_min(0).sum(1).numpy()
    expected_d = np.bincount(batch.domain_b.numpy(), excess_b, minlength=len(rows.catalog))
    assert found[0].excess_sum_d is not None
    np.testing.assert_allclose(found[0].excess_sum_d, expected_d, rtol=1e-4)
    assert (expected_d > 1).all()


def test_a_reference_is_named_by_its_run_or_by_one_of_its_checkpoints(texts: Path, small: RunConfig) -> None:
    newest = find(small.run.folder / "checkpoints")
    assert newest is not None
    corpus = open_rows(small).corpus
    assert make_reference(small, corpus) is None
    for name in (small.run.folder, newest):
        config = config_at(texts, Path("unused"), "step.measure_excess=true", f"step.reference={name}")
        make = make_reference(config, corpus)
        assert make is not None
        for one, other in zip(make().parameters(), weights_of(small), strict=True):
            assert torch.equal(one, other)


def test_references_that_cannot_be_are_refused(texts: Path, small: RunConfig, tmp_path: Path) -> None:
    rows: CatalogRows = open_rows(small)

    def ask(reference: str) -> Any:
        return make_reference(
            config_at(texts, tmp_path, "step.measure_excess=true", f"step.reference={reference}"), rows.corpus
        )

    with pytest.raises(ConfigError, match=r"step\.reference is empty"):
        ask("null")
    for path in (tmp_path, tmp_path / "none", "runs", small.run.folder / "checkpoints" / "000000777"):
        with pytest.raises(ConfigError, match="is neither the folder of a run with a checkpoint nor a checkpoint"):
            ask(str(path))
    other = tmp_path / "other"
    (other / "checkpoints").mkdir(parents=True)
    newest = find(small.run.folder / "checkpoints")
    assert newest is not None
    (other / "checkpoints" / newest.name).symlink_to(newest)
    (other / "run.yaml").write_text(to_text(small))
    schedule = MixtureSchedule(replace(rows.catalog, tokenizer="another"), small.geometry)
    (other / "schedule.jsonl").write_text(schedule.to_text())
    with pytest.raises(ConfigError, match="tokenized by another, this corpus by"):
        ask(str(other))
