"""Harvested gradients: those of autograd by domain and part, and no trace of it in the step."""

from typing import Any

import numpy as np
import pytest
import torch

from mixer.core.errors import ConfigError
from mixer.training.gradients import CountSketch, adam_scales, choose_pieces
from mixer.training.harvest import Harvest
from mixer.training.influence import InfluenceOptions, ProbeFacts
from mixer.training.optimizer import OptimizerOptions, make_optimizer
from mixer.training.probe_work import Harvested
from mixer.training.step import DomainLosses, StepOptions, StepRows, accumulate_gradients
from tests.training import ranks
from tests.training.making import make_batch, tiny
from tests.training.test_influence import decoder, folders, make_probe, rows_of, trained  # noqa: F401

WIDTH, PARTS = 700, 2
DOMAINS = [0, 0, 2, 2, 1, 0, 2, 2, 2, 2]  # by row; in pairs, one of which is of two domains


def options(**more):
    return InfluenceOptions(**{"sketch_width": WIDTH, "parts": PARTS, "harvest": True, "metric": "identity"} | more)


def make_rows(bad=None):
    batch = make_batch(rows=len(DOMAINS), seed=3)._replace(domain_index=np.array(DOMAINS))
    if bad is not None:
        batch.tokens[bad] = 7
    return StepRows.of(batch)


def step(model, rows, around, pairs=range(5), replicas=1, global_targets=None, no_sync=None):
    """Micro-batches of two rows, each within `around`."""
    for number, pair in enumerate(pairs):
        part = rows.part(2 * pair, 2 * pair + 2)
        last = number == len(pairs) - 1
        with around(part) if around else torch.enable_grad():
            accumulate_gradients(
                model,
                part,
                DomainLosses(8),
                global_targets=global_targets or rows.num_targets,
                options=StepOptions(),
                replicas=replicas,
                micro_batches=1 if last or no_sync is None else 2,
                **({} if last or no_sync is None else {"no_sync": no_sync}),
            )


def by_autograd(model, rows, pairs=(0, 1, 3, 4), scales=None):
    """Tokens, rows and sketched gradients of summed losses, of the pairs of one domain."""
    tokens_p, rows_p, sketch_pk = np.zeros(3 * PARTS), np.zeros(3 * PARTS), torch.zeros(3 * PARTS, WIDTH).double()
    for pair in pairs:
        part = rows.part(2 * pair, 2 * pair + 2)
        place = int(part.domain_b[0]) * PARTS + int(part.row_b[0]) % PARTS
        pieces = choose_pieces(model)
        loss = model(part.tokens_bs, part.documents, part.target_bs).loss_bs.sum()
        for piece, gradient in zip(pieces, torch.autograd.grad(loss, [p.parameter for p in pieces]), strict=True):
            flat = gradient.flatten() * (1.0 if scales is None else scales[piece.name])
            CountSketch(WIDTH, 0).add(sketch_pk[place], piece.name, flat, 0)
        tokens_p[place] += int((part.target_bs >= 0).sum())
        rows_p[place] += 2
    return tokens_p, rows_p, sketch_pk.numpy()


def same(found: Harvested, expected):
    assert found.tokens_p.tolist() == expected[0].tolist()
    assert found.rows_p.tolist() == expected[1].tolist()
    scale = np.abs(expected[2]).max()
    np.testing.assert_allclose(found.sketch_pk.numpy(), expected[2], rtol=1e-4, atol=1e-5 * scale)


def gradients(model) -> dict[str, Any]:
    return {name: torch.clone(parameter.grad) for name, parameter in model.named_parameters()}


def harvest_of(model, optimizer=None, **more):
    return Harvest(model, optimizer or make_optimizer(model, OptimizerOptions()), options(**more), 3)


def test_micro_batches_of_one_domain_are_harvested_and_the_step_is_the_same():
    model, rows = tiny(num_layers=1), make_rows()
    assert {int(row) % PARTS for row in rows.row_b[[0, 2, 6, 8]]} == {0, 1}
    harvest = harvest_of(model)
    step(model, rows, None)
    without = gradients(model)
    model.zero_grad()
    step(model, rows, harvest.around(1 / rows.num_targets))
    assert all(torch.equal(gradient, without[name]) for name, gradient in gradients(model).items())
    found, expected = harvest.close(), by_autograd(model, rows)
    assert expected[1].sum() == 8 and (expected[1] > 0).sum() >= 3
    same(found, expected)
    assert not harvest.close().sketch_pk.any()
    harvest.add(found)
    harvest.add(found)
    same(harvest.close(), [2 * value for value in expected])


def test_no_hook_stays():
    model, rows = tiny(num_layers=1), make_rows()
    harvest = harvest_of(model)
    step(model, rows, harvest.around(1 / rows.num_targets))
    harvest.close()
    step(model, rows, None)
    with pytest.raises(ZeroDivisionError), harvest.around(1.0)(rows.part(0, 2)):
        raise ZeroDivisionError
    step(model, rows, None)
    found = harvest.close()
    assert not found.sketch_pk.any() and not found.tokens_p.any()


def test_in_the_adam_metric_it_is_that_of_the_step():
    model, rows = tiny(num_layers=1), make_rows()
    optimizer = make_optimizer(model, OptimizerOptions())
    harvest = harvest_of(model, optimizer, metric="adam")
    step(model, rows, harvest.around(1 / rows.num_targets))
    assert not harvest.close().tokens_p.any()  # before the first update there is none
    optimizer.step()
    optimizer.zero_grad()
    step(model, rows, harvest.around(1 / rows.num_targets))
    same(harvest.close(), by_autograd(model, rows, scales=adam_scales(choose_pieces(model), optimizer)))


def test_a_micro_batch_without_a_usable_loss_is_left_out():
    model, rows = tiny(num_layers=1, tied=False), make_rows(bad=7)
    with torch.no_grad():
        model.embedding.weight[7] = torch.nan
    rows.tokens_bs[torch.arange(10) != 7] = rows.tokens_bs[torch.arange(10) != 7].clamp_min(8)
    harvest = harvest_of(model)
    step(model, rows, harvest.around(1 / rows.num_targets))
    same(harvest.close(), by_autograd(model, rows, pairs=(0, 1, 4)))


def on_ranks(rank, world_size, group):
    """Two ranks: one has the first three pairs, the other the last two; both exchange at their last."""
    run = ranks.Run("ddp" if world_size > 1 else "plain", rank, world_size, num_layers=1)
    harvest = Harvest(run.bare, run.optimizer, options(), 3)
    rows = make_rows()
    pairs = range(5) if world_size == 1 else (range(3), range(3, 5))[rank]
    scale = world_size / rows.num_targets
    around = harvest.around(scale)
    for number, pair in enumerate(pairs):
        part = rows.part(2 * pair, 2 * pair + 2)
        model: Any = run.model
        quiet = world_size > 1 and number < len(pairs) - 1
        with model.no_sync() if quiet else torch.enable_grad(), around(part):
            out = model(part.tokens_bs, part.documents, part.target_bs)
            (out.loss_bs.double().sum() * scale).backward()
    found = list(harvest.close())
    if group is not None:
        for sums in found:
            torch.distributed.all_reduce(sums, group=group)
    return [value.numpy() for value in found], {name: one.numpy() for name, one in gradients(run.bare).items()}


def test_ranks_harvest_before_they_exchange():
    (alone,) = ranks.run(on_ranks, 1)
    assert not isinstance(alone, str), alone
    expected = by_autograd(ranks.Run("plain", num_layers=1).bare, make_rows())
    for found, gradient in [alone, *ranks.run(on_ranks, 2)]:
        same(Harvested(*map(torch.from_numpy, found)), expected)
        for name, value in gradient.items():
            np.testing.assert_allclose(value, alone[1][name], rtol=1e-4, atol=1e-6)


def test_a_sharded_model_is_refused():
    class Shards(torch.nn.Parameter):
        placements, device_mesh = (), type("Mesh", (), {"shape": (), "get_coordinate": lambda self: []})()

        def to_local(self):
            return self

    model = tiny(num_layers=1)
    for layer in model.modules():
        for name, parameter in list(layer.named_parameters(recurse=False)):
            setattr(layer, name, Shards(parameter.data))
    with pytest.raises(ConfigError, match="harvest of a model that is sharded"):
        harvest_of(model)


def test_a_probe_takes_what_was_harvested(folders):  # noqa: F811
    """Harvested from the very rows that a probe would read, it finds the same."""
    more = {"metric": "identity", "sketch_width": 1 << 15, "every_windows": 1}
    facts = ProbeFacts(num_parameters=1, needs_gram=True)
    probe, direct = (make_probe(folders, facts=facts, harvest=harvest, **more) for harvest in (True, False))
    model = decoder()
    optimizer = trained(model, probe)
    harvest = Harvest(model, optimizer, probe.options, 3)
    plan = probe.plan(0)
    around = harvest.around(0.25)
    for part in range(int((plan.group_p < 3).sum())):
        for rows in rows_of(probe, plan, [part]):
            numbers = torch.tensor([part])  # so that rows go to the parts that the plan has for them
            rows = rows._replace(domain_b=torch.tensor([int(plan.group_p[part])]), row_b=numbers)
            with around(rows):
                out: Any = model(rows.tokens_bs, rows.documents, rows.target_bs)
                (0.25 * out.loss_bs.sum()).backward()
    found = probe.close(probe.measure(model, optimizer, 0, harvested=harvest.close()), 0.1)
    expected = direct.close(direct.measure(model, optimizer, 0), 0.1)
    for key in ("benefit_dt", "benefit_error_dt", "gram_dd", "noise_d", "target_loss_t"):
        value = getattr(expected, key)
        np.testing.assert_allclose(getattr(found, key), value, rtol=1e-4, atol=1e-5 * np.abs(value).max())
    assert np.isnan(found.loss_d).all()
    assert found.tokens == probe.cost_rows * 16 < expected.tokens
    with pytest.raises(ConfigError, match="harvest=True and harvested=False"):
        probe.measure(model, optimizer, 0)
    nothing = probe.close(probe.measure(model, optimizer, 0, harvested=harvest.close()), 0.1)
    assert np.isnan(nothing.benefit_dt).all() and np.isfinite(nothing.target_loss_t).all()
    around = harvest.around(1.0)
    for rows in rows_of(probe, plan, [0]):
        with around(rows._replace(domain_b=torch.tensor([1]), row_b=torch.tensor([2]))):
            out = model(rows.tokens_bs, rows.documents, rows.target_bs)
            out.loss_bs.sum().backward()
    little = probe.close(probe.measure(model, optimizer, 0, harvested=harvest.close()), 0.1)
    assert np.isnan(little.benefit_dt).tolist() == [[True] * 2, [False] * 2, [True] * 2]
    np.testing.assert_allclose(little.benefit_dt[1] / expected.benefit_dt[0], 1.0, atol=0.9)  # a third of its rows
    assert np.isnan(little.benefit_error_dt).all()  # of one part there is none
