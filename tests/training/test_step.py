"""One update: the loss by hand, the same gradient for any micro-batches and ranks, exact sums, bad rows."""

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mixer.core.errors import ConfigError
from mixer.core.mixture import Mixture
from mixer.core.plan import Geometry
from mixer.core.schedule import MixtureSchedule
from mixer.core.signal import Signal
from mixer.data.reader import WindowReader
from mixer.training.model import IGNORED, Decoder, DecoderOptions, TokenLosses
from mixer.training.optimizer import OptimizerOptions, RateOptions, make_optimizer
from mixer.training.step import (
    NAMED_ROWS,
    BadRow,
    DomainLosses,
    StepOptions,
    StepResult,
    StepRows,
    accumulate_gradients,
    train_step,
)
from tests.fakes import make_corpus
from tests.training.making import VOCAB, farthest, gradients, make_batch, tiny

CATALOG = "c" * 64


class Fixed(nn.Module):
    """A model with one parameter: each token's loss is its entry of a table, times the parameter."""

    def __init__(self, table_v: list[float]) -> None:
        super().__init__()
        self.table = torch.tensor(table_v)
        self.weight = nn.Parameter(torch.ones(1, 1))

    def forward(self, tokens: Tensor, documents: Any, target: Tensor) -> TokenLosses:
        has = target >= 0
        loss = torch.where(has, self.table[target.clamp_min(0)] * self.weight[0, 0], 0.0)
        return TokenLosses(loss, torch.where(has, 2.0 * self.weight[0, 0], 0.0))


def take_step(model: nn.Module, optimizer: torch.optim.Optimizer, rows: StepRows, **how: Any) -> StepResult:
    values: dict[str, Any] = {
        "rate": 0.01,
        "clip_norm": 1.0,
        "global_targets": rows.num_targets,
        "options": StepOptions(),
    }
    losses = how.pop("losses", None) or DomainLosses(8)
    return train_step(model, optimizer, rows, losses, **(values | how))


# --- rows ---------------------------------------------------------------------------------------------


def test_targets_by_hand() -> None:
    batch = make_batch(2, 6, starts=[[0, 3], [2]], length=[6, 4])
    t = batch.tokens
    rows = StepRows.of(batch)
    none = IGNORED
    assert rows.target_bs.tolist() == [
        [t[0, 1], t[0, 2], none, t[0, 4], t[0, 5], none],
        [t[1, 1], none, t[1, 3], none, none, none],
    ]
    assert rows.num_targets == 6
    across = StepRows.of(batch, cross_document_targets=True)
    assert across.target_bs.tolist() == [
        [t[0, 1], t[0, 2], t[0, 3], t[0, 4], t[0, 5], none],
        [t[1, 1], t[1, 2], t[1, 3], none, none, none],
    ]
    assert across.num_targets == 8


def test_padding_changes_nothing() -> None:
    batch = make_batch(length=[24, 13, 20, 24, 15, 12])
    other = batch._replace(tokens=batch.tokens.copy())
    for row, length in enumerate(batch.length):
        other.tokens[row, length:] = (other.tokens[row, length:] + 7) % VOCAB
    one, two = DomainLosses(3), DomainLosses(3)
    got = gradients(tiny(), StepRows.of(other), losses=one)
    expected = gradients(tiny(), StepRows.of(batch), losses=two)
    assert all(torch.equal(got[name], expected[name]) for name in expected)
    assert one.close(0, CATALOG).signal == two.close(0, CATALOG).signal


def test_batches_of_the_reader_become_rows_without_a_warning(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path, {"a": 40, "b": 40})
    geometry = Geometry(window_steps=2, batch_rows=5, seed=1)
    schedule = MixtureSchedule(corpus.catalog, geometry).extend(Mixture.uniform(corpus.catalog), 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for batch in WindowReader(corpus.by_source, schedule, geometry):
            rows = StepRows.of(batch)
            assert rows.step == batch.step
            assert rows.row_b.tolist() == batch.row.tolist()
            assert rows.domain_b.tolist() == batch.domain_index.tolist()
            assert 0 < rows.num_targets <= int(batch.length.sum()) - len(batch.length)


# --- the loss and its gradient ------------------------------------------------------------------------


def test_loss_and_gradient_by_hand() -> None:
    batch = make_batch(2, 4, starts=[[0], [0]], length=[4, 3])
    batch.tokens[:] = [[0, 1, 2, 3], [3, 1, 1, 0]]
    model = Fixed([0.0, 1.5, 0.5, 2.25])
    rows = StepRows.of(batch)
    losses = DomainLosses(3)
    loss = accumulate_gradients(model, rows, losses, global_targets=10, options=StepOptions())
    # Row 0: 1.5 + 0.5 + 2.25; row 1: 1.5 + 1.5; five targets here and five on another rank.
    assert loss.item() == pytest.approx(0.725)
    assert model.weight.grad is not None
    assert model.weight.grad.item() == pytest.approx(0.725)
    signal = losses.close(4, CATALOG).signal
    expected = Signal.from_rows(4, CATALOG, 3, batch.domain_index, [4.25, 3.0], [3, 2])
    assert signal == expected
    model.zero_grad()
    # The mean of log Z squared, 4 everywhere, has the gradient 2 x 2 x 2.
    accumulate_gradients(model, rows, losses, global_targets=5, options=StepOptions(z_loss=0.5))
    assert model.weight.grad is not None
    assert model.weight.grad.item() == pytest.approx(1.45 + 0.5 * 8)
    assert losses.close(4, CATALOG).signal == expected


@pytest.mark.parametrize("tied", [True, False])
def test_any_number_of_micro_batches_gives_the_same_gradient(tied: bool) -> None:
    rows = StepRows.of(make_batch(6))
    for options in (StepOptions(), StepOptions(z_loss=1e-2)):
        whole = gradients(tiny(tied=tied), rows, options=options)
        for number in (2, 3, 4, 6, 9):
            assert farthest(gradients(tiny(tied=tied), rows, options=options, micro_batches=number), whole) < 1e-6


def split(rows: StepRows, world_size: int, batch: Any) -> list[StepRows]:
    num = len(rows.tokens_bs)
    cuts = [num * rank // world_size for rank in range(world_size + 1)]
    parts = []
    for begin, end in pairwise(cuts):
        part = rows.part(begin, end)
        parts.append(part._replace(num_targets=int((part.target_bs >= 0).sum())))
    assert sum(part.num_targets for part in parts) == rows.num_targets
    return parts


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("micro_rows", [None, 1, 2])
def test_any_number_of_ranks_gives_the_same_gradient(world_size: int, micro_rows: int | None) -> None:
    """Ranks as data-parallel wrappers make them: each its own backward pass, then the mean of the gradients."""
    batch = make_batch(7, length=[24, 24, 24, 24, 3, 2, 2])
    rows = StepRows.of(batch)
    whole = gradients(tiny(), rows)
    whole_losses = DomainLosses(8)
    gradients(tiny(), rows, losses=whole_losses)
    options = StepOptions(micro_rows=micro_rows)
    micro_batches = options.micro_batches(7, world_size)
    total: dict[str, Tensor] = {name: torch.zeros_like(value) for name, value in whole.items()}
    losses = DomainLosses(8)
    calls = []
    for part in split(rows, world_size, batch):
        mine = DomainLosses(8)
        model = tiny()
        model.register_forward_hook(lambda *_: calls.append(1))
        grads = gradients(
            model,
            part,
            global_targets=rows.num_targets,
            options=options,
            losses=mine,
            replicas=world_size,
            micro_batches=micro_batches,
        )
        for name, value in grads.items():
            total[name] += value / world_size
        losses.sums += mine.sums
    assert farthest(total, whole) < 1e-6
    assert len(calls) == world_size * micro_batches  # every rank takes part in every exchange
    got, expected = losses.close(0, CATALOG).signal, whole_losses.close(0, CATALOG).signal
    assert got.tokens_d.tolist() == expected.tokens_d.tolist()
    np.testing.assert_allclose(got.loss_sum_d, expected.loss_sum_d, rtol=1e-6)


def test_all_but_the_last_micro_batch_run_without_exchange() -> None:
    seen: list[str] = []

    class Quiet:
        def __enter__(self) -> None:
            seen.append("in")

        def __exit__(self, *_: object) -> None:
            seen.append("out")

    model = tiny()
    model.embedding.weight.register_hook(lambda _: seen.append("gradient"))
    gradients(model, StepRows.of(make_batch()), micro_batches=3, no_sync=Quiet)
    assert seen == ["in", "gradient", "out", "in", "gradient", "out", "gradient"]


@pytest.mark.parametrize("weighed", [False, True])
def test_every_micro_batch_is_within_what_is_put_around_it(weighed: bool) -> None:
    seen: list[Any] = []
    model = tiny()
    model.register_forward_hook(lambda *_: seen.append("forward" if torch.is_grad_enabled() else "look"))
    model.embedding.weight.register_hook(lambda _: seen.append("gradient"))

    @contextmanager
    def around(part: StepRows) -> Iterator[None]:
        seen.append(part.row_b.tolist())
        yield
        seen.append("end")

    rows = StepRows.of(make_batch(3))
    plain = gradients(tiny(), rows, micro_batches=4)
    how: dict[str, Any] = {"weigh": lambda loss_b, *_: torch.ones_like(loss_b)} if weighed else {}
    found = gradients(model, rows, micro_batches=4, around=around, **how)
    one, two, three = ([row] for row in rows.row_b.tolist())
    middle = ["forward", "gradient", "end"]
    # The first of four parts of three rows is empty: it takes part all the same.
    assert seen == ["look"] * 4 * weighed + [[], *middle, one, *middle, two, *middle, three, *middle]
    assert all(torch.equal(found[name], plain[name]) for name in plain)


def test_global_counts_may_lie_on_the_device() -> None:
    rows = StepRows.of(make_batch())
    one = gradients(tiny(), rows, global_targets=50)
    other = gradients(tiny(), rows, global_targets=torch.tensor(50))  # pyright: ignore[reportArgumentType]
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_bfloat16_is_near_and_leaves_weights_and_losses_in_float32() -> None:
    rows = StepRows.of(make_batch())
    model = tiny()
    exact = gradients(tiny(), rows)
    low = gradients(model, rows, options=StepOptions(precision="bfloat16"))
    assert 1e-5 < farthest(low, exact) < 0.05
    assert {tensor.dtype for tensor in (*model.parameters(), *low.values())} == {torch.float32}
    with torch.autocast("cpu", torch.bfloat16):
        assert model(rows.tokens_bs, rows.documents, rows.target_bs).loss_bs.dtype == torch.float32


def test_options_that_cannot_be_are_refused() -> None:
    assert [StepOptions(micro_rows=2).micro_batches(7, ranks) for ranks in (1, 2, 3, 4, 7)] == [4, 2, 2, 1, 1]
    assert StepOptions().micro_batches(100, 3) == 1
    with pytest.raises(ConfigError, match="micro_rows=0"):
        StepOptions(micro_rows=0)
    with pytest.raises(ConfigError, match="z_loss=-1"):
        StepOptions(z_loss=-1.0)


# --- sums by domain -----------------------------------------------------------------------------------


def booked(rows: StepRows, loss: Tensor, tokens: Tensor, parts: list[Tensor]) -> DomainLosses:
    losses = DomainLosses(5)
    for part in parts:
        own = rows._replace(domain_b=rows.domain_b[part], row_b=rows.row_b[part])
        losses.add(own, loss[part], tokens[part])
    return losses


@pytest.mark.parametrize("seed", range(5))
def test_sums_are_the_same_bits_for_any_split_and_order(seed: int) -> None:
    rng = np.random.default_rng(seed)
    num = 300
    rows = StepRows.of(make_batch(num, 8, domains=5, seed=seed))
    tokens = torch.tensor(rng.integers(0, 2048, num))
    loss = torch.tensor(rng.lognormal(0, 4, num)).clamp_max(900) * tokens
    loss[torch.tensor(rng.random(num) < 0.05)] = math.nan
    expected = Signal.from_rows(2, CATALOG, 5, rows.domain_b.numpy(), loss.numpy(), tokens.numpy())
    for ranks in (1, 2, 3, 4, 7):
        order = torch.tensor(rng.permutation(num))
        on_ranks = order.tensor_split(sorted(rng.integers(0, num, ranks - 1).tolist()))
        parts = [booked(rows, loss, tokens, list(mine.split(int(rng.integers(1, 50))))) for mine in on_ranks]
        total = DomainLosses(5)
        for part in parts:
            total.sums += part.sums
        signal = total.close(2, CATALOG).signal
        assert signal == expected, f"seed {seed}, {ranks} ranks"
        assert signal.loss_sum_d.tobytes() == expected.loss_sum_d.tobytes()


def test_a_closed_window_leaves_nothing_behind() -> None:
    rows = StepRows.of(make_batch())
    losses = DomainLosses(3)
    bad = torch.full((6,), math.nan)
    losses.add(rows, bad, torch.ones(6).long())
    losses.count_skipped(torch.tensor(True))
    first = losses.close(0, CATALOG)
    assert first.skipped_steps == 1
    assert first.signal.bad_rows_d.sum() == len(first.bad_rows) == 6
    second = losses.close(1, CATALOG)
    assert second.signal == Signal.from_rows(1, CATALOG, 3, [], [], [])
    assert (second.skipped_steps, second.bad_rows) == (0, [])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e30, 1001.0 * 3, -1001.0 * 3])
def test_bad_rows_are_counted_and_named(value: float) -> None:
    rows = StepRows.of(make_batch(4))
    losses = DomainLosses(3)
    bad = losses.add(rows, torch.tensor([1.5, value, 2.5, value]), torch.tensor([3, 3, 3, 3]))
    assert bad.tolist() == [False, True, False, True]
    closed = losses.close(0, CATALOG)
    assert closed.bad_rows == [BadRow(1, int(rows.domain_b[i]), int(rows.row_b[i])) for i in (1, 3)]
    assert closed.signal == Signal.from_rows(
        0, CATALOG, 3, rows.domain_b.numpy(), [1.5, math.nan, 2.5, math.nan], [3, 3, 3, 3]
    )


def test_more_bad_rows_than_are_named_are_still_counted() -> None:
    rows = StepRows.of(make_batch(12))
    losses = DomainLosses(3)
    for _ in range(3):
        losses.add(rows, torch.full((12,), math.nan), torch.ones(12).long())
    closed = losses.close(0, CATALOG)
    assert closed.signal.bad_rows_d.sum() == 36
    assert [bad.row for bad in closed.bad_rows] == [*rows.row_b.tolist(), *rows.row_b.tolist()][:NAMED_ROWS]


# --- the excess over a reference ----------------------------------------------------------------------


def test_the_excess_is_cut_off_below_at_every_token() -> None:
    """Two tokens of one row, 1 above and 1 below the reference: together 1, not 0."""
    batch = make_batch(3, 3, starts=[[0]] * 3, length=[3] * 3)
    batch.tokens[:] = [[0, 1, 2], [0, 3, 3], [0, 2, 2]]
    model, reference = Fixed([0.0, 3.0, 1.0, 2.5]), Fixed([0.0, 2.0, 2.0, 2.25])
    rows = StepRows.of(batch)._replace(domain_b=torch.tensor([1, 1, 2]))
    losses, plain = DomainLosses(4, excess=True), DomainLosses(4)
    reference.weight.requires_grad_(False)
    loss = accumulate_gradients(
        model, rows, losses, global_targets=6, options=StepOptions(), reference=reference
    )  # fmt: skip
    assert loss.item() == pytest.approx(11 / 6)
    assert model.weight.grad is not None
    assert model.weight.grad.item() == pytest.approx(11 / 6)  # the gradient knows nothing of it
    accumulate_gradients(model, rows, plain, global_targets=6, options=StepOptions())
    assert torch.equal(losses.sums[:4], plain.sums)
    signal, without = losses.close(3, CATALOG).signal, plain.close(3, CATALOG).signal
    assert signal.excess_sum_d is not None
    assert signal.excess_sum_d.tolist() == [0.0, 1.0 + 0.5, 0.0, 0.0]
    assert signal.excess_d.tolist()[1:3] == [1.5 / 4, 0.0]
    assert without.excess_sum_d is None
    again = losses.close(4, CATALOG).signal
    assert again.excess_sum_d is not None
    assert not again.excess_sum_d.any()


def test_the_excess_is_the_same_for_any_micro_batches_and_adds_up_over_ranks() -> None:
    rows = StepRows.of(make_batch(7))
    reference = tiny(seed=1)
    sums = []
    for number in (1, 2, 7, 9):
        losses = DomainLosses(3, excess=True)
        gradients(tiny(), rows, losses=losses, micro_batches=number, reference=reference)
        sums.append(losses.sums)
    halves = DomainLosses(3, excess=True)
    for begin, end in ((0, 3), (3, 7)):
        gradients(tiny(), rows.part(begin, end), losses=halves, reference=reference)
    for other in [*sums[1:], halves.sums]:
        torch.testing.assert_close(other.double(), sums[0].double(), rtol=1e-5, atol=16)
    assert (sums[0][4] > 0).all()
    assert (sums[0][4] < sums[0][0]).all()
    assert all(parameter.grad is None for parameter in reference.parameters())


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_row_that_the_reference_has_no_loss_of_exceeds_nothing_and_is_not_bad(value: float) -> None:
    batch = make_batch(2, 3, starts=[[0]] * 2, length=[3] * 2, domains=1)
    batch.tokens[:] = [[0, 1, 2], [0, 1, 1]]
    losses = DomainLosses(1, excess=True)
    reference = Fixed([0.0, 1.0, value])
    gradients(Fixed([0.0, 3.0, 1.0]), StepRows.of(batch), losses=losses, reference=reference)
    signal = losses.close(0, CATALOG).signal
    assert signal.excess_sum_d is not None
    assert signal.excess_sum_d.tolist() == [4.0]
    assert (signal.rows_d.tolist(), signal.bad_rows_d.tolist()) == ([2], [0])


def test_a_bad_row_exceeds_nothing() -> None:
    losses = DomainLosses(3, excess=True)
    rows = StepRows.of(make_batch(2))._replace(domain_b=torch.tensor([1, 1]))
    losses.add(rows, torch.tensor([5.0, math.nan]), torch.tensor([3, 3]), torch.tensor([2.0, 1.0]))
    assert losses.sums.tolist() == [[0, 5 << 16, 0], [0, 3, 0], [0, 1, 0], [0, 1, 0], [0, 2 << 16, 0]]


def test_sums_of_a_checkpoint_without_the_excess_make_a_window_without() -> None:
    rows, excess = StepRows.of(make_batch()), torch.ones(6)
    old, now, ranks = DomainLosses(3), DomainLosses(3, excess=True), DomainLosses(3, excess=True)
    old.add(rows, torch.ones(6), torch.ones(6).long())
    now.restore(old.sums)
    now.add(rows, torch.ones(6), torch.ones(6).long(), excess)
    closed = now.close(0, CATALOG).signal
    assert (closed.rows_d.sum(), closed.excess_sum_d) == (12, None)
    now.add(rows, torch.ones(6), torch.ones(6).long(), excess)
    ranks.restore(now.sums)
    assert ranks.sums.tolist() == now.sums.tolist()
    ranks.add(rows, torch.ones(6), torch.ones(6).long(), excess)
    closed = ranks.close(1, CATALOG).signal
    assert closed.excess_sum_d is not None
    assert closed.excess_sum_d.sum() == 12
    old.restore(ranks.sums.new_ones(5, 3))  # nobody asks for it any more
    assert old.close(2, CATALOG).signal.excess_sum_d is None


# --- the whole step -----------------------------------------------------------------------------------


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("micro_batches", [1, 3])
def test_a_step_with_a_bad_row_updates_nothing_and_names_it(fused: bool, micro_batches: int) -> None:
    # Without gradient of its own the loss of token 2 would pass unnoticed: inf is a constant here.
    model = Fixed([1.0, 1.0, math.inf])
    optimizer = make_optimizer(model, OptimizerOptions(fused=fused))
    batch = make_batch(3, 4, starts=[[0]] * 3, length=[4] * 3)
    batch.tokens[:] = [[0, 1, 0, 1], [0, 2, 0, 1], [0, 1, 1, 1]]
    rows = StepRows.of(batch)
    losses = DomainLosses(3)
    result = take_step(model, optimizer, rows, losses=losses, micro_batches=micro_batches)
    assert bool(result.skipped)
    assert not result.loss.isfinite()
    assert model.weight.item() == 1.0
    closed = losses.close(0, CATALOG)
    assert closed.skipped_steps == 1
    assert closed.bad_rows == [BadRow(1, int(batch.domain_index[1]), int(batch.row[1]))]
    assert closed.signal.rows_d.sum() == 2
    batch.tokens[:] = 1
    result = take_step(model, optimizer, StepRows.of(batch), losses=losses, micro_batches=micro_batches)
    assert not bool(result.skipped)
    assert result.loss.item() == 1.0
    assert model.weight.item() == pytest.approx(1 - 0.01 * 0.1 - 0.01)
    assert losses.close(1, CATALOG).skipped_steps == 0


def test_a_bad_row_makes_the_gradient_of_every_rank_not_finite() -> None:
    """What ranks share is the mean of gradients: one NaN among them reaches all, also where the loss is absurd
    but finite, and so its own gradient too."""
    model = Fixed([1.0, 5000.0])
    batch = make_batch(1, 4, starts=[[0]], length=[4])
    batch.tokens[:] = 1
    grads = gradients(model, StepRows.of(batch))
    assert not grads["weight"].isfinite().any()


@pytest.mark.parametrize("micro_batches", [1, 2, 3])
def test_weights_are_asked_for_once_and_told_of_no_absurd_loss(micro_batches: int) -> None:
    batch = make_batch(2, 4, starts=[[0]] * 2, length=[4, 3])
    batch.tokens[:] = [[0, 1, 0, 0], [0, 0, 0, 0]]
    rows, seen = StepRows.of(batch), []

    def weigh(loss_b: Tensor, *rest: Tensor) -> Tensor:
        seen.append([loss_b.tolist(), *(one.tolist() for one in rest)])
        return torch.ones_like(loss_b)

    gradients(Fixed([1.0, 5000.0]), rows, micro_batches=micro_batches, weigh=weigh)
    losses, *others = seen[0]
    assert len(seen) == 1
    assert math.isnan(losses[0])  # 5,002 nats over three targets
    assert losses[1] == 2.0
    assert others == [[3, 2], batch.domain_index.tolist(), batch.row.tolist()]


def test_the_rate_is_set_and_the_gradient_clipped() -> None:
    rows = StepRows.of(make_batch())
    model = tiny()
    optimizer = make_optimizer(model, OptimizerOptions())
    plain = gradients(tiny(), rows)
    norm = math.sqrt(sum(float(value.square().sum()) for value in plain.values()))
    result = take_step(model, optimizer, rows, rate=0.25, clip_norm=norm / 4)
    assert {group["lr"] for group in optimizer.param_groups} == {0.25}
    assert result.grad_norm.item() == pytest.approx(norm, rel=1e-5)
    first = {name: optimizer.state[p]["exp_avg"] / (1 - 0.9) for name, p in model.named_parameters()}
    assert farthest(first, {name: value / 4 for name, value in plain.items()}) < 1e-4


def test_the_same_steps_give_the_same_bits() -> None:
    def run() -> list[Tensor]:
        model = tiny()
        optimizer = make_optimizer(model, OptimizerOptions())
        for seed in range(5):
            take_step(model, optimizer, StepRows.of(make_batch(seed=seed)), micro_batches=2)
        return list(model.parameters())

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


@pytest.mark.parametrize("kind", ["plain", "recompute"])
def test_a_tiny_model_learns_a_tiny_batch_by_heart(kind: str) -> None:
    options = OptimizerOptions(rate=RateOptions(peak=0.01, warmup_steps=5, kind="constant"), weight_decay=0.0)
    model = Decoder(DecoderOptions(dim=32, num_layers=2, num_heads=4, recompute=kind == "recompute"), VOCAB)
    optimizer = make_optimizer(model, options)
    rows = StepRows.of(make_batch(2, 16, starts=[[0, 9], [0]], length=[16, 12]))
    first = loss = math.nan
    for step in range(120):
        result = take_step(model, optimizer, rows, rate=options.rate.at(step, 120))
        loss = result.loss.item()
        first = loss if step == 0 else first
    assert first == pytest.approx(math.log(VOCAB), rel=0.05)  # nothing known yet
    assert loss < 0.1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("attention", ["sdpa", "flex"])
def test_a_step_on_a_gpu_never_waits_for_it(attention: Any) -> None:
    model = tiny(attention=attention, dim=64).to("cuda")
    optimizer = make_optimizer(model, OptimizerOptions())
    losses = DomainLosses(8, "cuda")
    options = StepOptions(precision="bfloat16", z_loss=1e-4)
    rows = StepRows.of(make_batch(8, 128)).to("cuda")
    take_step(model, optimizer, rows, options=options, losses=losses, micro_batches=2)  # states and kernels are made
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        result = take_step(model, optimizer, rows, options=options, losses=losses, micro_batches=2)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert not bool(result.skipped)
    assert losses.close(0, CATALOG).signal.rows_d.sum() == 16
