"""One optimizer update, as a function, and what it measured of each domain.

The gradient is that of the loss summed over all ranks' targets, divided by their global number: so micro-batches,
ranks and how rows lie on them change nothing but the order of floating-point sums. No function here waits for the
device or talks to other ranks: who calls passes global counts in, and adds up `DomainLosses.sums` once a window.

A row whose loss is not finite, or beyond ABSURD nats a token, is *bad*. It is booked on its domain as such and
named; and it makes the gradient NaN on purpose, so that the gradient's norm, which all ranks share, tells every
rank to leave that update out. Whether the run then goes on is for the caller, who finds `skipped` on the device
at once and the number of skipped steps in the window's losses.

Beside the loss of every target alike two things can be asked for: `weigh` lets rows count by their losses (see
`reweight`), and `reference`, a model without gradient, measures by how much each token's loss lies above its own.
The reference costs a forward pass of its size for every row, a third of a step where it is as large as the model,
and on each rank the memory of its weights and of its logits for a micro-batch.
"""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from mixer.core.errors import ConfigError
from mixer.core.signal import GRID, Signal
from mixer.training.model import IGNORED, Documents, TokenLosses, find_documents
from mixer.training.optimizer import clip_gradients, set_rate
from mixer.training.reweight import ReweightOptions, Weigh

ABSURD = 1000.0  # mean nats a token that no model has of real text
NAMED_ROWS = 16  # bad rows of a window that are named; all are counted


@dataclass(frozen=True, slots=True, kw_only=True)
class StepOptions:
    """How a step is computed. `micro_rows` and `precision` change the update by rounding alone."""

    micro_rows: int | None = None  # rows of a rank that are computed at once; null: all
    precision: Literal["float32", "bfloat16"] = "float32"  # of matrix products; weights stay in float32
    cross_document_targets: bool = False  # whether a document's first token is a target of the text before it
    z_loss: float = 0.0  # weight of the mean squared log Z
    bad_loss: Literal["skip", "stop"] = "skip"  # what the loop does after a step that was left out
    reweight: ReweightOptions = field(default_factory=ReweightOptions)  # of rows by their losses
    reference: str | None = None  # folder of a run, or of one of its checkpoints: the model whose losses are exceeded
    measure_excess: bool | None = None  # over the reference; null: where the policy needs it

    def __post_init__(self) -> None:
        if self.micro_rows is not None and self.micro_rows < 1:
            raise ConfigError(f"micro_rows={self.micro_rows}; it must be at least 1, or null.")
        if self.z_loss < 0:
            raise ConfigError(f"z_loss={self.z_loss}; it must not be negative.")

    def micro_batches(self, batch_rows: int, world_size: int) -> int:
        """How many micro-batches every rank computes: as the rank with most rows needs."""
        return 1 if self.micro_rows is None else math.ceil(math.ceil(batch_rows / world_size) / self.micro_rows)


# --- rows ---------------------------------------------------------------------------------------------


class StepRows(NamedTuple):
    """One rank's rows of a step as a model takes them. Targets are IGNORED where there is none: at the row's last
    position, before and in padding, and, unless asked for, where the next token is a document's first."""

    tokens_bs: Tensor
    target_bs: Tensor
    documents: Documents
    domain_b: Tensor  # int64, catalog order
    row_b: Tensor  # int64, number inside the domain
    step: int  # of the window
    num_targets: int

    @classmethod
    def of(cls, batch: Any, *, cross_document_targets: bool = False) -> "StepRows":
        """From a `Batch`; counted here, before the device has it, so that counting waits for nothing."""
        tokens = torch.as_tensor(batch.tokens).long()
        size = tokens.shape[1]
        length = torch.as_tensor(batch.length).long()
        documents = find_documents(batch.starts, batch.starts_offsets, length, size)
        ignored = torch.arange(size) + 1 >= length[:, None]
        if not cross_document_targets:
            ignored[:, :-1] |= documents.position_bs[:, 1:] == 0
        ignored[:, -1] = True
        target = tokens.roll(-1, 1).masked_fill(ignored, IGNORED)
        return cls(
            tokens,
            target,
            documents,
            torch.as_tensor(batch.domain_index).long(),
            torch.as_tensor(batch.row).long(),
            batch.step,
            int((target >= 0).sum()),
        )

    def to(self, device: torch.device | str) -> "StepRows":
        def moved(tensor: Tensor) -> Tensor:
            source = tensor.pin_memory() if torch.device(device).type == "cuda" and not tensor.is_cuda else tensor
            return source.to(device, non_blocking=True)

        return self._replace(
            tokens_bs=moved(self.tokens_bs),
            target_bs=moved(self.target_bs),
            documents=Documents(*map(moved, self.documents)),
            domain_b=moved(self.domain_b),
            row_b=moved(self.row_b),
        )

    def part(self, begin: int, end: int) -> "StepRows":
        """Some of the rows; `num_targets` stays that of all."""
        cut = slice(begin, end)
        return self._replace(
            tokens_bs=self.tokens_bs[cut],
            target_bs=self.target_bs[cut],
            documents=Documents(*(tensor[cut] for tensor in self.documents)),
            domain_b=self.domain_b[cut],
            row_b=self.row_b[cut],
        )

    @classmethod
    def nothing(cls, row_tokens: int, device: torch.device | str) -> "StepRows":
        """One row without text, for a rank that must take part but has no row."""
        zeros = torch.zeros(1, row_tokens, dtype=torch.int64, device=device)
        position = torch.arange(row_tokens, device=device)[None]
        return cls(
            tokens_bs=zeros,
            target_bs=torch.full_like(zeros, IGNORED),
            documents=Documents(zeros.int(), position),
            domain_b=zeros[0, :0],
            row_b=zeros[0, :0],
            step=0,
            num_targets=0,
        )


# --- losses by domain ---------------------------------------------------------------------------------


class BadRow(NamedTuple):
    step: int  # of the window
    domain: int  # catalog order
    row: int  # number inside the domain


class WindowLosses(NamedTuple):
    signal: Signal
    skipped_steps: int
    bad_rows: list[BadRow]  # the first NAMED_ROWS of this rank


class DomainLosses:
    """Sums of one window on the device, in whole grid points, so that they are the same in any order and for any
    split over micro-batches and ranks. `sums` holds loss, tokens, rows and bad rows by domain, and the excess over a
    reference where that is measured: ranks add it up (int64, one all-reduce) before one of them calls `close`,
    which is the window's only transfer.
    """

    def __init__(self, num_domains: int, device: torch.device | str = "cpu", *, excess: bool = False) -> None:
        self.measures_excess = excess
        self.sums = torch.zeros(4 + excess, num_domains, dtype=torch.int64, device=device)
        # By step, domain, row; the last line takes what is beyond NAMED_ROWS.
        self._named = torch.zeros(NAMED_ROWS + 1, 3, dtype=torch.int64, device=device)
        self._counts = torch.zeros(2, dtype=torch.int64, device=device)  # bad rows of this rank, skipped steps
        self._excess_is_whole = excess  # whether all of the window's rows are in it

    @torch.no_grad()
    def add(self, rows: StepRows, loss_b: Tensor, tokens_b: Tensor, excess_b: Tensor | None = None) -> Tensor:
        """Book rows with their losses, summed over their tokens; returns which of them are bad. An excess that is
        not finite, as of a row that the reference has no loss of, is booked as none."""
        loss_b = loss_b.double()
        bad = ~(loss_b.abs() <= ABSURD * tokens_b)
        good = (~bad).long()
        lines = [_points(loss_b, ~bad), tokens_b * good, good, 1 - good]
        if self.measures_excess:
            assert excess_b is not None
            lines.append(_points(excess_b.double(), ~bad & (excess_b <= ABSURD * tokens_b)))
        self.sums.index_add_(1, rows.domain_b, torch.stack(lines))

        place = (self._counts[0] + bad.cumsum(0) - 1).clamp_max(NAMED_ROWS)
        place = torch.where(bad, place, NAMED_ROWS)
        named = torch.stack([torch.full_like(rows.row_b, rows.step), rows.domain_b, rows.row_b], 1)
        self._named.index_copy_(0, place, named)
        self._counts[0] += bad.sum()
        return bad

    def restore(self, sums: Tensor) -> None:
        """The sums of a checkpoint, of a window half trained; one that did not measure the excess has a line less,
        and then this window tells none."""
        lines = min(len(sums), len(self.sums))
        self.sums[:lines].copy_(sums[:lines])
        self._excess_is_whole = self.measures_excess and lines == len(self.sums)

    @torch.no_grad()
    def count_skipped(self, skipped: Tensor) -> None:
        self._counts[1] += skipped

    @property
    def skipped_steps(self) -> int:
        """So far; waits for the device."""
        return int(self._counts[1])

    def close(self, window: int, catalog: str) -> WindowLosses:
        """The window's measurement; the sums are zero again."""
        parts = [self.sums.flatten(), self._counts, self._named.flatten()]
        flat = torch.cat(parts).cpu().numpy()
        num = self.sums.numel()
        loss, tokens, rows, bad_rows, *excess = flat[:num].reshape(len(self.sums), -1)
        num_bad, skipped = flat[num : num + 2].tolist()
        named = flat[num + 2 :].reshape(-1, 3)[: min(num_bad, NAMED_ROWS)]
        signal = Signal(
            window=window,
            catalog=catalog,
            loss_sum_d=loss.astype(np.float64) / GRID,
            tokens_d=tokens.copy(),
            rows_d=rows.copy(),
            bad_rows_d=bad_rows.copy(),
            excess_sum_d=excess[0].astype(np.float64) / GRID if excess and self._excess_is_whole else None,
        )
        self._excess_is_whole = self.measures_excess
        self.sums.zero_()
        self._counts.zero_()
        return WindowLosses(signal, skipped, [BadRow(*line) for line in named.tolist()])


def _points(sum_b: Tensor, good: Tensor) -> Tensor:
    return torch.where(good, sum_b * GRID, 0.0).round().long()


# --- the update ---------------------------------------------------------------------------------------


class StepResult(NamedTuple):
    """On the device, so that looking is the caller's choice."""

    loss: Tensor  # this rank's part of the mean loss per target: parts add up to it; NaN with bad rows
    grad_norm: Tensor  # before clipping, over all ranks
    skipped: Tensor  # bool: the gradient was not finite and nothing was updated; the same on every rank


def accumulate_gradients(
    model: nn.Module,
    rows: StepRows,
    losses: DomainLosses,
    *,
    global_targets: int | Tensor,
    options: StepOptions,
    replicas: int = 1,
    micro_batches: int = 1,
    no_sync: Callable[[], AbstractContextManager[Any]] = nullcontext,
    around: Callable[[StepRows], AbstractContextManager[Any]] = nullcontext,
    weigh: Weigh | None = None,
    reference: nn.Module | None = None,
) -> Tensor:
    """Add the gradient of this rank's part of the loss to the parameters; returns that part.

    `replicas` is by how many the gradients are divided after the backward pass (the world size, where wrappers
    average). All micro-batches but the last run within `no_sync`. Every rank must name the same `micro_batches`:
    one that has fewer rows computes an empty row, so that all take part in every exchange. `around` is entered with
    the rows of each micro-batch, also those of an empty one, and left after their backward pass.

    With `weigh` the rows' losses count so much each, in the gradient alone: what is returned, the losses by domain
    and the z-loss are as they are without. Several micro-batches first run forward once without gradients, outside
    of `around`, so that all of the step's losses are known before the first gradient.
    """
    num_rows = len(rows.tokens_bs)
    scale = replicas / torch.as_tensor(global_targets, dtype=torch.float64).clamp_min(1)
    total = torch.zeros((), dtype=torch.float64, device=rows.tokens_bs.device)
    cuts = [num_rows * number // micro_batches for number in range(micro_batches + 1)]
    factor_b = None
    if weigh is not None and micro_batches > 1:
        factor_b = _weighed(weigh, rows, _row_losses(model, rows, cuts, options))
    for number, (begin, end) in enumerate(pairwise(cuts)):
        part = _part(rows, begin, end)
        with no_sync() if number < micro_batches - 1 else nullcontext(), around(part):
            out = _forward(model, part, options)
            loss_b = out.loss_bs.double().sum(1)
            objective = loss_b.sum()
            if len(part.domain_b):
                excess_b = None if reference is None else _excess(reference, part, out, options)
                bad = losses.add(part, loss_b.detach(), (part.target_bs >= 0).sum(1), excess_b)
                spoiled = torch.where(bad.any(), torch.nan, 1.0)
                total += objective.detach() * spoiled
                if weigh is not None:
                    mine_b = _weighed(weigh, part, loss_b.detach()) if factor_b is None else factor_b[begin:end]
                    objective = (loss_b * mine_b).sum()
                objective = objective * spoiled
            if options.z_loss:
                objective = objective + options.z_loss * out.log_z_bs.double().square().sum()
            (objective * scale).backward()
    return total * (scale / replicas)


def _part(rows: StepRows, begin: int, end: int) -> StepRows:
    part = rows.part(begin, end)
    return part if begin < end else StepRows.nothing(rows.tokens_bs.shape[1], rows.tokens_bs.device)


def _forward(model: nn.Module, part: StepRows, options: StepOptions) -> TokenLosses:
    device, low = part.tokens_bs.device.type, options.precision == "bfloat16"
    with torch.autocast(device, torch.bfloat16, enabled=low):
        return model(part.tokens_bs, part.documents, part.target_bs)


@torch.no_grad()
def _row_losses(model: nn.Module, rows: StepRows, cuts: list[int], options: StepOptions) -> Tensor:
    """Of all rows of this rank, in micro-batches of which all ranks compute as many."""
    parts = [_part(rows, begin, end) for begin, end in pairwise(cuts)]
    losses = [_forward(model, part, options).loss_bs.double().sum(1)[: len(part.domain_b)] for part in parts]
    return torch.cat(losses)


def _weighed(weigh: Weigh, rows: StepRows, loss_b: Tensor) -> Tensor:
    targets_b = (rows.target_bs >= 0).sum(1)
    loss_b = torch.where(loss_b.abs() <= ABSURD * targets_b, loss_b, torch.nan)
    return weigh(loss_b, targets_b, rows.domain_b, rows.row_b)


@torch.no_grad()
def _excess(reference: nn.Module, part: StepRows, out: TokenLosses, options: StepOptions) -> Tensor:
    """By how much each token's loss lies above the reference's, where it does, summed by row."""
    its_bs = _forward(reference, part, options).loss_bs.double()
    excess_b = (out.loss_bs.detach().double() - its_bs).clamp_min(0).sum(1)
    return torch.where(its_bs.sum(1).isfinite(), excess_b, torch.nan)


@torch.no_grad()
def update(optimizer: torch.optim.Optimizer, clip_norm: float | None) -> tuple[Tensor, Tensor]:
    """Clip and step, unless the gradient is not finite; returns its norm and whether the step was left out."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    norm = clip_gradients(parameters, clip_norm)
    skipped = ~norm.isfinite()
    if optimizer.defaults.get("fused"):
        optimizer.found_inf = skipped.float()  # pyright: ignore[reportAttributeAccessIssue]  # as GradScaler does
        optimizer.step()  # on the device it does nothing where found_inf is 1
        del optimizer.found_inf  # pyright: ignore[reportAttributeAccessIssue]
    elif not bool(skipped):
        optimizer.step()
    return norm, skipped


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    rows: StepRows,
    losses: DomainLosses,
    *,
    rate: float,
    clip_norm: float | None,
    global_targets: int | Tensor,
    options: StepOptions,
    replicas: int = 1,
    micro_batches: int = 1,
    no_sync: Callable[[], AbstractContextManager[Any]] = nullcontext,
    around: Callable[[StepRows], AbstractContextManager[Any]] = nullcontext,
    weigh: Weigh | None = None,
    reference: nn.Module | None = None,
) -> StepResult:
    """One update of the model on this rank's rows. See `accumulate_gradients` for what ranks must agree on."""
    set_rate(optimizer, rate)
    optimizer.zero_grad(set_to_none=True)
    loss = accumulate_gradients(
        model,
        rows,
        losses,
        global_targets=global_targets,
        options=options,
        replicas=replicas,
        micro_batches=micro_batches,
        no_sync=no_sync,
        around=around,
        weigh=weigh,
        reference=reference,
    )
    norm, skipped = update(optimizer, clip_norm)
    losses.count_skipped(skipped)
    return StepResult(loss, norm, skipped)
