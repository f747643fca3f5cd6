"""Weights of rows: the worked answers, the objective by hand, one update for any ranks, multipliers that are kept."""

import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mixer.core.errors import CheckpointError, ConfigError
from mixer.core.plan import Geometry
from mixer.training.optimizer import OptimizerOptions, make_optimizer
from mixer.training.reweight import (
    FeasibleOptions,
    Reweighting,
    ReweightOptions,
    ascended,
    keys_of,
    quantile,
    row_weights,
)
from mixer.training.step import DomainLosses, StepOptions, StepRows, accumulate_gradients, train_step
from tests.core.making import catalog_of
from tests.training.making import farthest, gradients, make_batch, tiny
from tests.training.ranks import gather, run

CATALOG = catalog_of(a=1000, b=1000, c=1000)
KINDS: list[dict[str, Any]] = [
    {"kind": "linupper"},
    {"kind": "quadratic", "temperature": 0.7},
    {"kind": "extremes", "quantiles": (0.1, 0.9)},
    {"kind": "clip_quantile", "quantiles": (0.0, 0.7)},
    {"kind": "feasible", "feasible": FeasibleOptions(tolerance=4.0, rate=0.5)},
    {"kind": "feasible", "feasible": FeasibleOptions(tolerance=4.0, rate=0.5, per="domain")},
]


def doubles(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def weights(kind: str, *losses: float, temperature: float = 1.0, **how: Any) -> list[float]:
    loss_n = doubles(*losses)
    return row_weights(kind, loss_n, loss_n.isfinite(), temperature, **how).tolist()


def reweighting(**options: Any) -> Reweighting:
    values: dict[str, Any] = {"burn_in": 0.0} | options
    made = Reweighting(ReweightOptions(**values))
    made.enter(CATALOG)
    return made


def factors(made: Reweighting, sums: list[float], targets: list[int], rows: list[int] | None = None) -> list[float]:
    weigh = made.at(0, 1)
    assert weigh is not None
    number = torch.tensor(rows if rows is not None else list(range(len(sums))))
    return weigh(doubles(*sums), torch.tensor(targets), torch.zeros_like(number), number).tolist()


# --- weights of one step ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "temperature", "expected"),
    [
        ("linupper", 1.0, [0.155362, 0.422319, 0.422319]),
        ("linupper", 0.4, [0.039424, 0.480288, 0.480288]),
        ("quadratic", 1.0, [0.211942, 0.576117, 0.211942]),
        ("quadratic", 0.4, [0.070509, 0.858981, 0.070509]),
        ("extremes", 1.0, [0.422319, 0.155362, 0.422319]),
    ],
)
def test_weights_of_three_rows(kind: str, temperature: float, expected: list[float]) -> None:
    assert weights(kind, 1, 2, 3, temperature=temperature) == pytest.approx(expected, abs=5e-7)
    # Only where a loss lies between the extremes matters, and rows without a loss change nothing.
    assert weights(kind, 50, math.nan, 70, 60, temperature=temperature) == pytest.approx(
        [expected[0], 0.0, expected[2], expected[1]], abs=5e-7
    )


@pytest.mark.parametrize("kind", ["linupper", "quadratic", "extremes", "clip_quantile"])
def test_like_losses_have_like_weights(kind: str) -> None:
    for loss in (0.0, 2.3, 1e-9, 900.0):
        assert weights(kind, *[loss] * 5) == pytest.approx([0.2] * 5, abs=1e-15)
    assert weights(kind, 3.0) == [1.0]
    assert weights(kind, math.nan, math.nan) == [0.0, 0.0]


def test_a_hot_softmax_makes_all_alike_and_delta_widens_the_span() -> None:
    assert weights("linupper", 1, 2, 3, temperature=1e9) == pytest.approx([1 / 3] * 3)
    # h = -2, 0, 2; f = 0, 2, 2
    assert weights("linupper", 1, 2, 3, delta=2.0) == pytest.approx(
        [1 / (1 + 2 * math.e**2), *[math.e**2 / (1 + 2 * math.e**2)] * 2]
    )
    assert weights("quadratic", 1, 2, 3, delta=2.0) == pytest.approx(weights("quadratic", 1, 2, 3))


def test_quantiles_in_the_place_of_the_extremes_keep_an_outlier_from_flattening_all() -> None:
    losses = [1.0, 1.5, 2.0, 2.5, 3.0]
    flat = weights("linupper", *losses, 1000.0)
    assert max(flat[:5]) / min(flat[:5]) < 1.01
    robust = weights("linupper", *losses, 1000.0, quantiles=(0.0, 0.8))  # of six values the fifth
    within = weights("linupper", *losses)
    assert [value / robust[0] for value in robust[:5]] == pytest.approx([value / within[0] for value in within])
    assert robust[5] == pytest.approx(robust[4])  # as the greatest within


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_quantiles_are_those_of_the_good_rows(share: float) -> None:
    values = np.random.default_rng(3).normal(size=12)
    good = np.arange(12) % 4 != 1
    found = quantile(torch.tensor(values), torch.tensor(good), share)
    assert found.item() == pytest.approx(np.quantile(values[good], share), abs=1e-14)
    values[~good] = np.nan
    assert quantile(torch.tensor(values), torch.tensor(good), share).item() == found.item()


def test_clipped_rows_weigh_nothing() -> None:
    found = weights("clip_quantile", 5, 1, 2, 3, 4, 0, temperature=0.1, quantiles=(0.2, 0.8))
    assert found == pytest.approx([0, 0.25, 0.25, 0.25, 0.25, 0])


def test_the_temperature_falls_by_equal_factors_after_the_burn_in() -> None:
    options = ReweightOptions(kind="linupper", temperature=0.5, temperature_start=8.0, burn_in=0.1, anneal=0.4)
    at = [options.temperature_at(step, 100) for step in (0, 9, 10, 20, 30, 40, 50, 99)]
    assert at == [None, None, 8.0, pytest.approx(4.0), pytest.approx(2.0), pytest.approx(1.0), 0.5, 0.5]
    constant = ReweightOptions(kind="linupper")  # as the released code: 1,000 steps of 20,000 without
    assert [constant.temperature_at(step, 20_000) for step in (999, 1000, 19_999)] == [None, 0.4, 0.4]
    assert ReweightOptions(burn_in=0.0, anneal=0.0, temperature_start=3.0).temperature_at(0, 10) == 0.4
    made = Reweighting(options)
    assert made.at(9, 100) is None
    assert made.at(10, 100) is not None
    assert Reweighting(ReweightOptions(burn_in=0.0)).at(50, 100) is None  # kind: none


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "temperature=0.0"),
        ({"temperature_start": math.inf}, "temperature_start=inf"),
        ({"delta": -1.0}, "delta=-1.0"),
        ({"burn_in": 1.5}, "burn_in=1.5"),
        ({"anneal": -0.1}, "anneal=-0.1"),
        ({"quantiles": (0.5, 0.5)}, r"quantiles=\(0.5, 0.5\)"),
        ({"kind": "clip_quantile"}, "clips nothing"),
        ({"kind": "feasible"}, "without feasible.tolerance"),
    ],
)
def test_options_that_cannot_be_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ReweightOptions(**options)


@pytest.mark.parametrize(
    "options", [{"rate": 0.0}, {"price": 0.0}, {"rate": 2.0, "price": 1.0}, {"tolerance": math.nan}]
)
def test_feasible_options_that_cannot_be_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="|".join(options)):
        FeasibleOptions(**options)


# --- the objective ------------------------------------------------------------------------------------


def test_a_target_counts_as_its_row_weighs() -> None:
    """Rows of 10, 20 and 30 targets with mean losses 1, 2, 3: the objective is sum w S / sum w t."""
    found = factors(reweighting(kind="linupper", temperature=1.0), [10.0, 40.0, 90.0], [10, 20, 30])
    w = [1 / (1 + 2 * math.e), math.e / (1 + 2 * math.e), math.e / (1 + 2 * math.e)]
    of_all = 60 / (w[0] * 10 + w[1] * 20 + w[2] * 30)
    assert found == pytest.approx([weight * of_all for weight in w])
    objective = sum(factor * loss for factor, loss in zip(found, [10, 40, 90], strict=True)) / 60
    assert objective == pytest.approx((w[0] * 10 + w[1] * 40 + w[2] * 90) / (w[0] * 10 + w[1] * 20 + w[2] * 30))
    # Alike, whatever the targets: the mean over targets, as it is without weights.
    assert factors(reweighting(kind="linupper"), [20.0, 40.0, 60.0], [10, 20, 30]) == pytest.approx([1.0] * 3)


def test_rows_without_targets_or_usable_loss_are_no_part_of_it() -> None:
    made = reweighting(kind="linupper", temperature=1.0)
    whole = factors(made, [10.0, 20.0, 30.0], [10, 10, 10])
    found = factors(made, [10.0, 0.0, 20.0, math.nan, 30.0], [10, 0, 10, 10, 10])
    assert found == pytest.approx([whole[0] * 4 / 3, 0, whole[1] * 4 / 3, 0, whole[2] * 4 / 3])  # T has the bad row's
    assert factors(made, [0.0, math.nan], [0, 3]) == [0.0, 0.0]


@pytest.mark.parametrize("options", KINDS)
def test_weights_carry_no_gradient_and_losses_are_booked_unweighted(options: dict[str, Any]) -> None:
    rows = StepRows.of(make_batch())
    plain, booked = DomainLosses(3), DomainLosses(3)
    base = gradients(tiny(), rows, losses=plain)
    weigh = reweighting(**options).at(0, 1)
    assert weigh is not None
    model = tiny()
    found = gradients(model, rows, losses=booked, weigh=weigh)
    assert torch.equal(plain.sums, booked.sums)
    assert farthest(found, base) > 0.01
    # By hand: the gradient of the sum of losses, each times its number.
    other, made = tiny(), reweighting(**options)
    out: Any = other(rows.tokens_bs, rows.documents, rows.target_bs)
    loss_b, targets_b = out.loss_bs.double().sum(1), (rows.target_bs >= 0).sum(1)
    again = made.at(0, 1)
    assert again is not None
    factor_b = again(loss_b.detach(), targets_b, rows.domain_b, rows.row_b)
    ((loss_b * factor_b).sum() / rows.num_targets).backward()
    expected = {name: p.grad for name, p in other.named_parameters() if p.grad is not None}
    assert farthest(found, expected) < 1e-6


def test_without_weights_gradients_are_those_of_the_sum_to_the_last_bit() -> None:
    rows = StepRows.of(make_batch())
    model = tiny()
    out: Any = model(rows.tokens_bs, rows.documents, rows.target_bs)
    (out.loss_bs.double().sum(1).sum() * 1.0 * torch.tensor(1 / rows.num_targets, dtype=torch.float64)).backward()
    expected = {name: p.grad for name, p in model.named_parameters()}
    found = gradients(tiny(), rows, weigh=Reweighting(ReweightOptions()).at(5, 10))
    assert all(torch.equal(found[name], value) for name, value in expected.items() if value is not None)


@pytest.mark.parametrize("options", KINDS)
@pytest.mark.parametrize("micro_batches", [2, 3, 6, 8])
def test_any_number_of_micro_batches_gives_the_same_gradient(options: dict[str, Any], micro_batches: int) -> None:
    rows = StepRows.of(make_batch())
    found, models = [], [tiny(), tiny()]
    calls: list[bool] = []
    models[1].register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    for model, number in zip(models, (1, micro_batches), strict=True):
        step = StepOptions(z_loss=1e-3)
        found.append(gradients(model, rows, options=step, micro_batches=number, weigh=reweighting(**options).at(0, 1)))
    assert farthest(found[1], found[0]) < 1e-6
    assert calls == [False] * micro_batches + [True] * micro_batches


@pytest.mark.parametrize("micro_batches", [1, 3])
def test_a_bad_row_still_spoils_the_step(micro_batches: int) -> None:
    class Spoiled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = tiny()

        def forward(self, *args: Any) -> Any:
            out: Any = self.inner(*args)
            loss = torch.where((args[0] == bad).all(1)[:, None], math.inf, out.loss_bs)
            return out._replace(loss_bs=torch.where(args[2] >= 0, loss, 0.0))

    rows = StepRows.of(make_batch())
    bad = rows.tokens_bs[4]
    model, losses = Spoiled(), DomainLosses(3)
    result = train_step(
        model, make_optimizer(model.inner, OptimizerOptions()), rows, losses, rate=0.1, clip_norm=1.0,
        global_targets=rows.num_targets, options=StepOptions(), micro_batches=micro_batches,
        weigh=reweighting(kind="linupper").at(0, 1),
    )  # fmt: skip
    assert bool(result.skipped)
    closed = losses.close(0, "c" * 64)
    assert [row.row for row in closed.bad_rows] == [int(rows.row_b[4])]
    assert closed.skipped_steps == 1


# --- ranks --------------------------------------------------------------------------------------------


def updates(rank: int, world_size: int, _: Any, cases: list[tuple[dict[str, Any], int]]) -> list[dict[str, Any]]:
    return [three_updates(rank, world_size, *case) for case in cases]


def three_updates(rank: int, world_size: int, options: dict[str, Any], micro_batches: int) -> dict[str, Any]:
    """The gradients of one rank in three steps, its losses, and what it remembers."""
    mine = Geometry(batch_rows=10).rank_slots(rank, world_size)
    made = Reweighting(ReweightOptions(burn_in=0.0, **options), gather, mine)
    made.enter(CATALOG)
    model, losses, found = tiny(), DomainLosses(3), {}
    for step in range(3):
        rows = StepRows.of(make_batch(10, seed=step % 2))  # the rows of the first step come again
        of_step = gradients(
            model, rows.part(mine.start, mine.stop), global_targets=rows.num_targets, losses=losses,
            replicas=world_size, micro_batches=micro_batches, weigh=made.at(step, 3),
        )  # fmt: skip
        found |= {f"{step} {name}": value.numpy() for name, value in of_step.items()}
    return {"gradient": found, "sums": losses.sums.numpy(), "state": made.state()}


def test_any_number_of_ranks_makes_the_same_update() -> None:
    chosen = [KINDS[0], *KINDS[-2:]]
    (alone,) = run(updates, 1, [(options, 1) for options in chosen])
    for world_size, micro_batches in ((2, (1, 3)), (4, (1,))):
        cases = [(options, number) for number in micro_batches for options in chosen]
        ranks = run(updates, world_size, cases)
        assert all(isinstance(one, list) for one in ranks), ranks
        for place, case in enumerate(cases):
            parts, expected = [one[place] for one in ranks], alone[place % len(chosen)]
            for name, value in expected["gradient"].items():
                mean = sum(part["gradient"][name] for part in parts) / world_size
                scale = max(abs(other).max() for other in expected["gradient"].values())
                assert abs(mean - value).max() < 1e-6 * scale, (world_size, case, name)
            assert all(part["state"] == parts[0]["state"] for part in parts)  # to the last bit
            np.testing.assert_allclose(sum(part["sums"] for part in parts), expected["sums"], rtol=1e-6)


# --- multipliers --------------------------------------------------------------------------------------


def descend(options: FeasibleOptions, steps: int, x: float = 0.7, rate: float = 0.02) -> tuple[float, list[float]]:
    """Two rows whose losses are (x - 1)^2 and (x + 1)^2, each its own constraint."""
    made = reweighting(kind="feasible", feasible=options)
    multipliers = [0.0, 0.0]
    for _ in range(steps):
        multipliers = factors(made, [(x - 1) ** 2, (x + 1) ** 2], [1, 1])
        x -= rate * (multipliers[0] * 2 * (x - 1) + multipliers[1] * 2 * (x + 1)) / 2
    return x, multipliers


def test_feasible_rows_are_brought_below_the_tolerance() -> None:
    x, multipliers = descend(FeasibleOptions(tolerance=1.2, rate=0.5, price=None), 2000)
    edge = math.sqrt(1.2) - 1
    assert edge == pytest.approx(0.0954, abs=5e-5)
    assert -edge - 1e-3 <= x <= edge + 1e-3
    assert max(multipliers) < 10


def test_rows_that_cannot_get_there_have_bounded_multipliers_only_with_a_price() -> None:
    x, bounded = descend(FeasibleOptions(tolerance=0.5, rate=0.1, price=3.0), 1500)
    assert x == pytest.approx(0.0, abs=1e-6)
    assert bounded == pytest.approx([1.5, 1.5], abs=1e-6)  # price x (1 - tolerance)
    unbounded = FeasibleOptions(tolerance=0.5, rate=0.1, price=None)
    assert descend(unbounded, 200, x=0.0)[1] == pytest.approx([10.0, 10.0])  # 0.05 a step, for ever
    assert descend(unbounded, 400, x=0.0)[1] == pytest.approx([20.0, 20.0])


def test_multipliers_by_hand() -> None:
    options = FeasibleOptions(tolerance=2.0, rate=0.5, price=4.0)
    assert ascended(doubles(0, 0, 1), doubles(3, 1, 2.5), options).tolist() == [0.5, 0.0, 1.125]
    made = reweighting(kind="feasible", feasible=options)
    # Long and short rows are one constraint each: lambda l / rows, so lambda T / (rows t) before S / T.
    assert factors(made, [30.0, 90.0], [10, 30], rows=[7, 8]) == pytest.approx([0.5 * 2.0, 0.5 * 40 / 60])
    assert factors(made, [45.0, 40.0], [10, 10], rows=[7, 9]) == pytest.approx([0.5 + 0.5 * (2.5 - 0.125), 1.0])
    assert factors(made, [math.nan, 20.0], [10, 10], rows=[7, 8]) == pytest.approx([0.0, (0.5 - 0.0625) * 2])
    assert factors(made, [20.0], [10], rows=[7]) == pytest.approx([1.6875 - 0.5 * 1.6875 / 4])  # not moved when bad


def test_multipliers_of_domains_by_hand() -> None:
    options = FeasibleOptions(tolerance=2.0, rate=0.5, price=None, per="domain")
    made = reweighting(kind="feasible", feasible=options)
    weigh = made.at(0, 1)
    assert weigh is not None
    domain_b, row_b, targets_b = torch.tensor([0, 0, 2]), torch.tensor([5, 6, 5]), torch.tensor([10, 30, 10])
    # Domain 0: 130 nats over 40 targets, 1.25 above; domain 2 is 1 below.
    assert weigh(doubles(30, 100, 10), targets_b, domain_b, row_b).tolist() == [0.625, 0.625, 0.0]
    assert weigh(doubles(30, math.nan, 40), targets_b, domain_b, row_b).tolist() == [1.125, 0.0, 1.0]
    assert made.state() == {"domains": {"a": 1.125, "b": 0.0, "c": 1.0}}
    alone = torch.tensor([10]), torch.tensor([0]), torch.tensor([5])
    assert weigh(doubles(35), *alone).tolist() == [1.875]
    assert made.state()["domains"]["c"] == 1.0  # it gave no row


def random_steps(made: Reweighting, steps: range, num_rows: int = 300) -> list[list[float]]:
    found = []
    for step in steps:
        rng = np.random.default_rng(step)
        weigh = made.at(0, 1)
        assert weigh is not None
        loss_b = torch.tensor(rng.gamma(2.0, 2.0, 16) * 8)
        domain_b, row_b = torch.tensor(rng.integers(0, 3, 16)), torch.tensor(rng.integers(0, num_rows, 16))
        found.append(weigh(loss_b, torch.full((16,), 8), domain_b, row_b).tolist())
    return found


@pytest.mark.parametrize("per", ["row", "domain"])
@pytest.mark.parametrize("places", [7, 5000])
def test_what_is_remembered_goes_through_a_checkpoint(per: Any, places: int) -> None:
    options = FeasibleOptions(tolerance=3.0, per=per, remembered_rows=places)
    made, other = (reweighting(kind="feasible", feasible=options) for _ in range(2))
    random_steps(made, range(40), 5)
    other = Reweighting(ReweightOptions(kind="feasible", burn_in=0.0, feasible=options))
    other.load(json.loads(json.dumps(made.state())))
    assert other.state() == made.state()  # before a row is seen, too
    other.enter(CATALOG)
    assert other.state() == made.state()
    assert random_steps(other, range(40, 60), 5) == random_steps(made, range(40, 60), 5)
    assert other.state() == made.state()
    fresh = reweighting(kind="feasible", feasible=options)
    assert random_steps(fresh, range(40, 42), 5) != random_steps(other, range(40, 42), 5)


def test_a_table_with_room_remembers_every_row_and_a_full_one_the_latest() -> None:
    options = FeasibleOptions(tolerance=3.0, price=None, remembered_rows=1_000_000)
    made = reweighting(kind="feasible", feasible=options)
    known: dict[tuple[int, int], float] = {}
    for step in range(60):
        rng = np.random.default_rng(step)
        (found,) = random_steps(made, range(step, step + 1), 40)
        loss = rng.gamma(2.0, 2.0, 16)
        who = list(zip(rng.integers(0, 3, 16).tolist(), rng.integers(0, 40, 16).tolist(), strict=True))
        expected = [max(0.0, known.get(row, 0.0) + 0.1 * (loss[i] - 3.0)) for i, row in enumerate(who)]
        assert found == pytest.approx(expected)
        known |= dict(zip(who, expected, strict=True))
    assert len(known) == 120
    # One place: whoever came last, and nobody else.
    tight = reweighting(kind="feasible", feasible=FeasibleOptions(tolerance=0.0, price=None, remembered_rows=1))
    assert factors(tight, [1.0, 2.0, 3.0], [1, 1, 1], rows=[4, 5, 6]) == pytest.approx([0.1, 0.2, 0.3])
    assert factors(tight, [1.0, math.nan], [1, 1], rows=[6, 5]) == pytest.approx([0.4 * 2, 0.0])  # of T a half
    assert factors(tight, [0.0, 0.0], [1, 1], rows=[5, 6]) == pytest.approx([0.0, 0.4])


def test_keys_of_rows_are_their_own() -> None:
    domains = torch.tensor([0, 1, -1, 2**62, -(2**63)]).repeat_interleave(2000)
    keys = keys_of(domains, torch.arange(2000).repeat(5))
    assert len(set(keys.tolist())) == 10_000
    assert int(keys.min()) > 0
    assert (torch.bincount((keys >> 1) % 16, minlength=16) > 500).all()


def test_another_catalog_keeps_the_multipliers_of_its_domains_and_of_unchanged_rows() -> None:
    by_domain = reweighting(kind="feasible", feasible=FeasibleOptions(tolerance=3.0, per="domain"))
    random_steps(by_domain, range(9))
    before = by_domain.state()["domains"]
    assert before["a"] > 0
    by_domain.enter(catalog_of(a=1000, d=9))
    assert by_domain.state()["domains"] == before | {"d": 0.0}
    by_domain.enter(CATALOG)
    assert by_domain.state()["domains"] == before | {"d": 0.0}

    by_row = reweighting(kind="feasible", feasible=FeasibleOptions(tolerance=0.0, price=None))
    weigh = by_row.at(0, 1)
    assert weigh is not None
    one, loss = torch.tensor([1]), doubles(1)
    assert weigh(loss, one, torch.tensor([1]), torch.tensor([5])).tolist() == pytest.approx([0.1])  # row 5 of b
    by_row.enter(catalog_of(b=1000, c=1000))  # where b is the first
    assert weigh(loss, one, torch.tensor([0]), torch.tensor([5])).tolist() == pytest.approx([0.2])
    moved = catalog_of(b=1000)
    by_row.enter(type(moved)(moved.row_tokens, moved.tokenizer, (type(moved.domains[0])("b", 1000, "other rows"),)))
    assert weigh(loss, one, torch.tensor([0]), torch.tensor([5])).tolist() == pytest.approx([0.1])


def test_a_state_that_is_none_is_refused() -> None:
    made = reweighting(kind="feasible", feasible=FeasibleOptions(tolerance=3.0))
    for state in ({"rows": "AAAA"}, {"rows": "!", "multipliers": ""}, {"domains": {"a": "x"}}):
        with pytest.raises(CheckpointError, match="multipliers in the checkpoint cannot be understood"):
            made.load(state)


# --- learning -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", KINDS)
def test_training_under_every_kind_lowers_the_loss(options: dict[str, Any]) -> None:
    rows, model = StepRows.of(make_batch()), tiny()
    optimizer = make_optimizer(model, OptimizerOptions(weight_decay=0.0))
    made, losses = reweighting(**options), []
    for step in range(30):
        result = train_step(
            model, optimizer, rows, DomainLosses(3), rate=0.01, clip_norm=1.0, global_targets=rows.num_targets,
            options=StepOptions(), weigh=made.at(step, 30),
        )  # fmt: skip
        losses.append(result.loss.item())
    assert losses[-1] < losses[0] - 0.3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("options", KINDS)
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_weighting_on_a_gpu_never_waits_for_it(options: dict[str, Any], micro_batches: int) -> None:
    made = Reweighting(ReweightOptions(burn_in=0.0, **options), device="cuda")
    made.enter(CATALOG)
    model, losses = tiny(dim=64).to("cuda"), DomainLosses(3, "cuda")
    rows = StepRows.of(make_batch(8, 128)).to("cuda")

    def go() -> None:
        accumulate_gradients(
            model, rows, losses, global_targets=rows.num_targets, options=StepOptions(),
            micro_batches=micro_batches, weigh=made.at(0, 1), reference=reference,
        )  # fmt: skip

    reference = None
    go()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        go()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    on_host = Reweighting(ReweightOptions(burn_in=0.0, **options))
    on_host.enter(CATALOG)
    arguments = doubles(*range(20, 28)), torch.full((8,), 4), rows.domain_b.cpu(), rows.row_b.cpu()
    again = Reweighting(ReweightOptions(burn_in=0.0, **options), device="cuda")
    again.enter(CATALOG)
    here, there = on_host.at(0, 1), again.at(0, 1)
    assert here is not None
    assert there is not None
    expected = here(*arguments)
    torch.testing.assert_close(there(*(a.to("cuda") for a in arguments)).cpu(), expected, rtol=1e-12, atol=1e-12)
    assert again.state() == on_host.state()
