"""AdamW over a model's parameters, its learning rate as a pure function of the step, and gradient clipping."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from mixer.core.errors import ConfigError

FUSED_ON = ("cuda", "cpu")


@dataclass(frozen=True, slots=True, kw_only=True)
class RateOptions:
    """The learning rate: up from 0 in `warmup_steps`, then one of

    - cosine: half a cosine from `peak` to `final` x peak at the run's end;
    - wsd: at `peak`, then in the last `decay` of the run's steps linearly down to `final` x peak;
    - constant: at `peak`.
    """

    peak: float = 1e-3
    kind: Literal["cosine", "wsd", "constant"] = "cosine"
    warmup_steps: int = 100
    final: float = 0.1
    decay: float = 0.2  # wsd's share of the run's steps

    def __post_init__(self) -> None:
        if not (math.isfinite(self.peak) and self.peak > 0):
            raise ConfigError(f"peak={self.peak}; the learning rate must be positive and finite.")
        if self.warmup_steps < 0:
            raise ConfigError(f"warmup_steps={self.warmup_steps}; it must not be negative.")
        if not (0 <= self.final <= 1 and 0 <= self.decay <= 1):
            raise ConfigError(f"final={self.final} and decay={self.decay} must lie between 0 and 1.")

    def at(self, step: int, num_steps: int) -> float:
        """The rate of the update `step`, counted from 0, of a run of `num_steps`; after its end as at its end."""
        if step < self.warmup_steps:
            return self.peak * (step + 1) / self.warmup_steps
        if self.kind == "constant":
            return self.peak
        last = num_steps - 1
        begin = 0 if self.kind == "cosine" else last - round(self.decay * num_steps)  # the last step at the peak
        begin = max(begin, self.warmup_steps - 1)
        step = min(step, last)
        if step <= begin:
            return self.peak
        way = (step - begin) / (last - begin)
        left = 0.5 * (1 + math.cos(math.pi * way)) if self.kind == "cosine" else 1 - way
        return self.peak * (self.final + (1 - self.final) * left)


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerOptions:
    """AdamW with decoupled decay of matrices; gains and biases do not decay."""

    rate: RateOptions = field(default_factory=RateOptions)
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float | None = 1.0  # of the whole gradient; null: not clipped
    fused: bool | None = None  # one kernel for all parameters; null: where there is one

    def __post_init__(self) -> None:
        if not (0 <= self.beta1 < 1 and 0 <= self.beta2 < 1 and self.eps > 0 and self.weight_decay >= 0):
            raise ConfigError(
                f"beta1={self.beta1}, beta2={self.beta2}, eps={self.eps}, weight_decay={self.weight_decay}: betas must "
                "lie in [0, 1), eps must be positive and the decay not negative."
            )
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise ConfigError(f"clip_norm={self.clip_norm}; it must be positive, or null for no clipping.")


class Scaled(Protocol):
    """A model that says how fast its parameters learn."""

    def rate_scales(self) -> dict[str, float]: ...


def parameter_groups(model: nn.Module, options: OptimizerOptions) -> list[dict[str, Any]]:
    """Groups by decay and by `rate_scales` of the model, each with its `rate_scale`, in the order of the names.

    Decay acts through lr x weight_decay; where a parameter's rate is lowered, its decay is raised as much, so that
    what decays in a step does not depend on the model's width.
    """
    scales: dict[str, float] = model.rate_scales() if hasattr(model, "rate_scales") else {}  # pyright: ignore[reportCallIssue,reportAssignmentType]  # of Scaled
    groups: dict[tuple[float, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        scale, decays = scales.get(name, 1.0), parameter.ndim >= 2
        group = groups.setdefault(
            (scale, decays),
            {"params": [], "rate_scale": scale, "weight_decay": options.weight_decay / scale if decays else 0.0},
        )
        group["params"].append(parameter)
    return list(groups.values())


def make_optimizer(model: nn.Module, options: OptimizerOptions) -> torch.optim.AdamW:
    """For the model itself, not a wrapper of it; after it was sharded."""
    groups = parameter_groups(model, options)
    devices = {parameter.device.type for group in groups for parameter in group["params"]}
    fused = devices <= set(FUSED_ON) and len(devices) == 1 if options.fused is None else options.fused
    return torch.optim.AdamW(
        groups, lr=options.rate.peak, betas=(options.beta1, options.beta2), eps=options.eps, fused=fused
    )


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("rate_scale", 1.0)


@torch.no_grad()
def clip_gradients(parameters: Iterable[Tensor], most: float | None) -> Tensor:
    """Scale all gradients so that their common 2-norm is at most `most`; returns the norm before, on the device.

    A norm that is not finite leaves gradients that are not finite: the update must be left out. The norm of
    sharded gradients is summed over their ranks.
    """
    kept = list(parameters)
    norm = nn.utils.get_total_norm([p.grad for p in kept if p.grad is not None])
    if hasattr(norm, "full_tensor"):
        norm = norm.full_tensor()  # pyright: ignore[reportAttributeAccessIssue]  # a sharded tensor
    if most is not None:
        nn.utils.clip_grads_with_norm_(kept, most, norm)
    return norm
