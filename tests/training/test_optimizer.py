"""Learning rates by hand, AdamW against its formulae, decay and muP groups, clipping."""

import math
from typing import Any

import pytest
import torch
from torch import nn

from mixer.core.errors import ConfigError
from mixer.training.model import Mup
from mixer.training.optimizer import (
    OptimizerOptions,
    RateOptions,
    clip_gradients,
    make_optimizer,
    parameter_groups,
    set_rate,
)
from mixer.training.step import update
from tests.training.making import tiny


def rates(num_steps: int, **options: Any) -> list[float]:
    rate = RateOptions(peak=8.0, **options)
    return [round(rate.at(step, num_steps), 12) for step in range(num_steps + 2)]


def test_rates_by_hand() -> None:
    half = 0.5 * (1 + math.cos(math.pi / 4))
    assert rates(5, kind="cosine", warmup_steps=0, final=0.0) == [
        8.0, round(8 * half, 12), 4.0, round(8 * (1 - half), 12), 0.0, 0.0, 0.0,
    ]  # fmt: skip
    assert rates(6, kind="cosine", warmup_steps=4, final=0.5) == [2.0, 4.0, 6.0, 8.0, 6.0, 4.0, 4.0, 4.0]
    assert rates(6, kind="wsd", warmup_steps=2, final=0.0, decay=0.5) == [
        4.0, 8.0, 8.0, round(16 / 3, 12), round(8 / 3, 12), 0.0, 0.0, 0.0,
    ]  # fmt: skip
    assert rates(4, kind="wsd", warmup_steps=0, decay=0.0) == [8.0] * 6
    assert rates(4, kind="wsd", warmup_steps=0, final=0.0, decay=1.0) == [6.0, 4.0, 2.0, 0.0, 0.0, 0.0]
    assert rates(4, kind="constant", warmup_steps=2) == [4.0, 8.0, 8.0, 8.0, 8.0, 8.0]


@pytest.mark.parametrize("kind", ["cosine", "wsd", "constant"])
@pytest.mark.parametrize("warmup", [0, 1, 3, 10, 20])
@pytest.mark.parametrize("num_steps", [1, 2, 10])
def test_rates_rise_then_never_rise_again(kind: Any, warmup: int, num_steps: int) -> None:
    got = rates(num_steps, kind=kind, warmup_steps=warmup)
    top = max(range(len(got)), key=lambda step: (got[step], -step))
    assert got[: top + 1] == sorted(got[: top + 1])
    assert got[top:] == sorted(got[top:], reverse=True)
    assert all(0 < rate <= 8 for rate in got)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"peak": 0.0}, "peak=0.0; the learning rate must be positive"),
        ({"peak": math.inf}, "peak=inf"),
        ({"warmup_steps": -1}, "warmup_steps=-1"),
        ({"decay": 1.5}, "final=0.1 and decay=1.5 must lie between 0 and 1"),
    ],
)
def test_rates_that_cannot_be_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RateOptions(**options)
    impossible: list[dict[str, Any]] = [{"beta2": 1.0}, {"eps": 0.0}, {"clip_norm": 0.0}, {"weight_decay": -1.0}]
    for bad in impossible:
        with pytest.raises(ConfigError):
            OptimizerOptions(**bad)


@pytest.mark.parametrize("fused", [None, True, False])
def test_an_update_by_its_formulae(fused: bool | None) -> None:
    model = nn.Linear(1, 1)
    with torch.no_grad():
        model.weight.fill_(2.0)
        model.bias.fill_(3.0)
    options = OptimizerOptions(beta1=0.5, beta2=0.75, eps=1e-8, weight_decay=0.1, fused=fused)
    optimizer = make_optimizer(model, options)
    weight, bias, first, second = 2.0, 3.0, 0.0, 0.0
    for step, (gradient, rate) in enumerate([(1.0, 0.1), (-3.0, 0.2)], 1):
        model.weight.grad, model.bias.grad = torch.full((1, 1), gradient), torch.full((1,), gradient)
        set_rate(optimizer, rate)
        optimizer.step()
        first, second = 0.5 * first + 0.5 * gradient, 0.75 * second + 0.25 * gradient**2
        move = rate * (first / (1 - 0.5**step)) / (math.sqrt(second / (1 - 0.75**step)) + 1e-8)
        weight, bias = weight * (1 - rate * 0.1) - move, bias - move
        assert model.weight.item() == pytest.approx(weight, rel=1e-6)
        assert model.bias.item() == pytest.approx(bias, rel=1e-6)


def test_matrices_decay_and_gains_do_not() -> None:
    model = tiny()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decay = {
        names[id(p)]: group["weight_decay"]
        for group in parameter_groups(model, OptimizerOptions(weight_decay=0.3))
        for p in group["params"]
    }
    assert decay == {name: 0.3 if p.ndim == 2 else 0.0 for name, p in model.named_parameters()}


def test_groups_of_mup_learn_slower_and_decay_as_much() -> None:
    model = tiny(dim=128, mup=Mup(base_dim=32, base_head_dim=8))
    optimizer = make_optimizer(model, OptimizerOptions(weight_decay=0.1))
    set_rate(optimizer, 0.02)
    slow = {id(p) for name, p in model.named_parameters() if name.startswith("layers.") and p.ndim == 2}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters()))
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            assert group["lr"] == (0.005 if id(parameter) in slow else 0.02)
            assert group["lr"] * group["weight_decay"] == pytest.approx(0.002 if parameter.ndim == 2 else 0.0)


def test_what_is_frozen_is_left_out() -> None:
    model = tiny()
    model.embedding.weight.requires_grad_(False)
    listed = {id(p) for group in parameter_groups(model, OptimizerOptions()) for p in group["params"]}
    assert listed == {id(p) for p in model.parameters() if p.requires_grad}


@pytest.mark.parametrize(("most", "expected"), [(None, [3.0, 4.0]), (10.0, [3.0, 4.0]), (1.0, [0.6, 0.8])])
def test_clipping_by_hand(most: float | None, expected: list[float]) -> None:
    one, two, without = (nn.Parameter(torch.zeros(1)) for _ in range(3))
    one.grad, two.grad = torch.tensor([3.0]), torch.tensor([4.0])
    assert clip_gradients([one, two, without], most).item() == 5.0
    assert [one.grad.item(), two.grad.item()] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_updates_nothing(fused: bool, bad: float) -> None:
    def after(gradients: list[float]) -> list[torch.Tensor]:
        torch.manual_seed(0)
        model = nn.Linear(2, 2)
        optimizer = make_optimizer(model, OptimizerOptions(fused=fused))
        for value in gradients:
            for parameter in model.parameters():
                parameter.grad = torch.full_like(parameter, 0.1)
            model.bias.grad[0] = value  # pyright: ignore[reportOptionalSubscript]  # set just above
            norm, skipped = update(optimizer, 1.0)
            assert bool(skipped) == (not math.isfinite(value)) == (not norm.isfinite())
        state = [value for kept in optimizer.state.values() for value in kept.values()]
        return [parameter.detach() for parameter in model.parameters()] + state

    with_bad, without = after([0.1, bad, 0.3]), after([0.1, 0.3])
    assert len(with_bad) == len(without)
    assert all(torch.equal(a, b) for a, b in zip(with_bad, without, strict=True))
