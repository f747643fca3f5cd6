"""Losses whose labels the model draws itself, and the rows they are drawn for.

The Fisher matrix is an expectation over labels of the model's own distribution. They are drawn here by a key of row
and place: a row gets the same labels on any rank, in any batch, and no random state is read or changed.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mixer.core.apportion import apportion
from mixer.core.permute import key_of, mix
from mixer.core.plan import Geometry, WindowPlan
from mixer.data.corpus import CatalogRows
from mixer.data.reader import Batch
from mixer.data.window import locate
from mixer.training.evaluation import choose_rows
from mixer.training.model import token_losses
from mixer.training.step import StepRows


class Sampled(NamedTuple):
    """The summed loss of labels that the model drew itself, and which places have one (None: all)."""

    loss: Tensor
    counted: Tensor | None  # bool; the shape of layers' inputs but for the last axis


SampledLoss = Callable[[nn.Module, Any], Sampled]


def draw_labels(logits_nv: Tensor, uniform_n: Tensor) -> Tensor:
    """One label a line, of the probabilities of its logits: where a uniform number falls among their sums."""
    cumulated_nv = torch.softmax(logits_nv.detach().double(), -1).cumsum(-1)
    threshold_n = uniform_n.to(cumulated_nv) * cumulated_nv[..., -1]
    labels_n = torch.searchsorted(cumulated_nv, threshold_n[..., None], right=True)[..., 0]
    return labels_n.clamp_max(logits_nv.shape[-1] - 1)


def uniforms(rows: StepRows, seed: int) -> Tensor:
    """In [0, 1), (rows, positions): the same for a row wherever and with whatever it is computed."""
    domain_b, row_b = (value.cpu().numpy() for value in (rows.domain_b, rows.row_b))
    key_b = np.full(len(domain_b), key_of("labels", seed), dtype=np.uint64)
    key_b = mix(mix(key_b, domain_b), row_b)
    number_bs = mix(key_b[:, None], np.arange(rows.tokens_bs.shape[1], dtype=np.int64)[None])
    return torch.from_numpy((number_bs >> np.uint64(11)) * 2.0**-53)


def of_rows(seed: int) -> SampledLoss:
    """For models of tokens: every position with a target gets a label of the model's instead."""

    def sampled(model: nn.Module, rows: StepRows) -> Sampled:
        logits = cast(Tensor, model(rows.tokens_bs, rows.documents))
        counted = rows.target_bs >= 0
        uniform = torch.zeros(rows.tokens_bs.shape, dtype=torch.float64)
        uniform[: len(rows.domain_b)] = uniforms(rows, seed)
        labels = draw_labels(logits.float(), uniform.to(logits.device))
        losses = token_losses(logits, torch.where(counted, labels, rows.target_bs))
        return Sampled(losses.loss_bs.sum(), counted)

    return sampled


def choose_batches(
    rows: CatalogRows,
    weights_d: NDArray[np.float64],
    num_rows: int,
    *,
    probe: int = 0,
    seed: int = 0,
    batch_rows: int = 1,
    rank: int = 0,
    world_size: int = 1,
    cross_document_targets: bool = False,
) -> Iterator[StepRows]:
    """This rank's batches of a probe: domains by their weights, rows by seed, name and probe. Ranks take turns
    and get equally many, the last of them empty where the rows do not go round."""
    catalog = rows.catalog
    share_d = np.asarray(weights_d, dtype=np.float64) * num_rows
    count_d = apportion(share_d, np.zeros_like(share_d), num_rows, catalog.num_rows_d).count_d
    keys = [key_of("curvature", seed, name, probe) for name in catalog.names]
    chosen = [choose_rows(int(n), int(k), key) for n, k, key in zip(catalog.num_rows_d, count_d, keys, strict=True)]
    domain_n, row_n = np.repeat(np.arange(len(catalog)), count_d), np.concatenate(chosen)
    for first in range(0, len(row_n), batch_rows * world_size):
        part = slice(first + rank * batch_rows, first + (rank + 1) * batch_rows)
        if not len(row_n[part]):
            yield StepRows.nothing(catalog.row_tokens, "cpu")
            continue
        geometry = Geometry(window_steps=1, batch_rows=len(row_n[part]))
        plan = WindowPlan(
            0, catalog, geometry, domain_n[part].astype(np.int32), row_n[part], np.zeros_like(row_n[part])
        )
        found = locate([plan], rows, 0, 1)
        tokens = found.copy_tokens(np.arange(len(row_n[part]))).astype(np.int64)
        batch = Batch(
            0, 0, tokens, plan.domain_n, plan.row_n, found.length_n, found.starts, found.starts_offsets
        )  # fmt: skip
        yield StepRows.of(batch, cross_document_targets=cross_document_targets)
