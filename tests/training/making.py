"""Small models and batches for the tests of training."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from mixer.data.reader import Batch
from mixer.training.model import Decoder, DecoderOptions
from mixer.training.step import DomainLosses, StepOptions, StepRows, accumulate_gradients

VOCAB = 61


def tiny(seed: int = 0, **options: Any) -> Decoder:
    values: dict[str, Any] = {"dim": 32, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "init_std": 0.1}
    return Decoder(DecoderOptions(**(values | options)), VOCAB, seed=seed)


def make_batch(
    rows: int = 6,
    row_tokens: int = 24,
    *,
    domains: int = 3,
    seed: int = 0,
    starts: Sequence[Sequence[int]] | None = None,
    length: Sequence[int] | None = None,
) -> Batch:
    """Random tokens; two or three documents a row and some padding, unless told."""
    rng = np.random.default_rng(seed)
    length = rng.integers(row_tokens // 2, row_tokens + 1, rows).tolist() if length is None else length
    assert length is not None
    if starts is None:
        starts = [sorted({0, *rng.integers(1, most, 2).tolist()} - ({0} if i % 2 else set()))
                  for i, most in enumerate(length)]  # fmt: skip
    return Batch(
        window=0,
        step=1,
        tokens=rng.integers(0, VOCAB, (rows, row_tokens)),
        domain_index=rng.integers(0, domains, rows).astype(np.int32),
        row=rng.integers(0, 1000, rows),
        length=np.array(length, dtype=np.int32),
        starts=np.array([s for row in starts for s in row], dtype=np.int32),
        starts_offsets=np.cumsum([0, *map(len, starts)]),
    )


def gradients(
    model: torch.nn.Module,
    rows: StepRows,
    *,
    global_targets: int | None = None,
    options: StepOptions | None = None,
    losses: DomainLosses | None = None,
    **how: Any,
) -> dict[str, torch.Tensor]:
    """The gradient of one rank's rows, by parameter name."""
    model.zero_grad()
    accumulate_gradients(
        model,
        rows,
        losses or DomainLosses(8),
        global_targets=rows.num_targets if global_targets is None else global_targets,
        options=options or StepOptions(),
        **how,
    )
    return {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


def farthest(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """The largest difference of any entry, as a share of the gradient's largest entry."""
    assert one.keys() == other.keys()
    scale = max(float(value.abs().max()) for value in one.values())
    return max(float((one[name] - other[name]).abs().max()) for name in one) / scale
