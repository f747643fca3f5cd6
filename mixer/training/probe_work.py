"""One rank's work in a probe: which rows' gradients it takes, and what it makes of them.

Ranks of a model that is not sharded share the rows of all parts evenly, and a part may be cut between two of them:
projections and sketches of its pieces add up. Ranks of a sharded model compute every part together.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mixer.core.errors import ConfigError
from mixer.core.probe_plan import ProbePlan, Share, share_parts, share_rows
from mixer.training.gradients import CountSketch, Kept, Piece, Preconditioner, is_sharded, sum_gradient
from mixer.training.step import DomainLosses, StepRows


class Harvested(NamedTuple):
    """Sums over the micro-batches of this rank, by part of a domain; see `mixer.training.harvest`."""

    tokens_p: Tensor
    rows_p: Tensor
    sketch_pk: Tensor


class ProbeWork:
    """What one rank does of one probe, within `probing`. `read` gives a share's rows, in so many batches.

    Parts are numbered as in the sums: those of domains, then those of targets. Where domains are harvested they have
    other parts than are planned, and none is computed.
    """

    def __init__(
        self,
        plan: ProbePlan,
        num_domains: int,
        domain_parts: int,
        read: Callable[[Share, int], list[StepRows]],
        *,
        model: nn.Module,
        pieces: list[Piece],
        scales: dict[str, Tensor],
        preconditioner: Preconditioner | None,
        batch_rows: int | None,
        ranks: tuple[int, int],
        device: torch.device | str,
    ) -> None:
        self._plan, self._read, self._batch_rows = plan, read, batch_rows
        self._model, self._pieces, self._device = model, pieces, device
        self._scales, self._preconditioner = scales, preconditioner
        self._rank, self._world_size = ranks
        self._sharded = any(is_sharded(piece.parameter) for piece in pieces)
        planned_domains = int((plan.group_p < num_domains).sum())
        self._split, self._shift = domain_parts, domain_parts - planned_domains
        self._num = len(plan.group_p) + self._shift
        self.losses = DomainLosses(self._num, device)
        self.computed_rows = 0

    def project(self) -> Tensor:
        """Products of all parts with those of targets, (parts, target parts)."""
        split, targets = self._split, self._num - self._split
        kept = Kept(self._pieces, targets)
        speaks = self._sharded or self._rank == 0  # else all ranks would count the same targets
        booked = self.losses if speaks else DomainLosses(self._num, self._device)
        alone = None if self._sharded else (0, 1)
        for part, gradient in self._gradients(range(split, split + targets), booked, alone):
            kept.put(part - split, gradient)
        products = torch.zeros(self._num, targets, dtype=torch.float64, device=self._device)
        if speaks:
            products[split:] = kept.gram()
        for part, gradient in self._gradients(range(split), self.losses):
            products[part] += kept.products(gradient)
        return products

    def sketch(self, sketch: CountSketch, harvested: Harvested | None) -> Tensor:
        """Of all parts, (parts, width)."""
        sums = torch.zeros(self._num, sketch.width, dtype=torch.float64, device=self._device)
        first = 0
        if harvested is not None:
            first = self._split
            sums[:first] = harvested.sketch_pk
        for part, gradient in self._gradients(range(first, self._num), self.losses):
            sketch.add_gradient(sums[part], self._pieces, gradient)
        return sums

    def store(self) -> Tensor:
        """Products of all parts with all."""
        if not self._sharded and self._rank > 0:
            return torch.zeros(self._num, self._num, dtype=torch.float64, device=self._device)
        kept = Kept(self._pieces, self._num)
        for part, gradient in self._gradients(range(self._num), self.losses, None if self._sharded else (0, 1)):
            kept.put(part, gradient)
        return kept.gram()

    def _gradients(
        self, parts: range, losses: DomainLosses, ranks: tuple[int, int] | None = None
    ) -> Iterator[tuple[int, list[Tensor]]]:
        """This rank's share of some parts, of a sharded model its pieces of all of them; by the parts' numbers."""
        first = parts.start - self._shift  # the same part as it is planned
        rows_p: list[int] = self._plan.rows_p[first : first + len(parts)].tolist()
        rank, world_size = ranks or (self._rank, self._world_size)
        most = self._batch_rows
        for share in (share_parts if self._sharded else share_rows)(rows_p, rank, world_size):
            largest = -(-rows_p[share.part] // world_size) if self._sharded else share.end - share.begin
            micro = -(-largest // (most or largest))  # as many on all ranks of a sharded model
            batches = self._read(share._replace(part=first + share.part), micro)
            batches = [rows._replace(domain_b=rows.domain_b + self._shift).to(self._device) for rows in batches]
            self.computed_rows += sum(len(rows.tokens_bs) for rows in batches)
            part = parts.start + share.part
            yield part, self._in_metric(part, batches, losses)

    def _in_metric(self, part: int, batches: list[StepRows], losses: DomainLosses) -> list[Tensor]:
        named = sum_gradient(self._model, self._pieces, batches, losses, self._world_size)
        if self._preconditioner is not None and part >= self._split:
            whole = {name: one.full_tensor() if is_sharded(one) else one for name, one in named.items()}  # pyright: ignore[reportAttributeAccessIssue]
            named = dict(self._preconditioner.precondition(whole))
            if missing := whole.keys() - named.keys():
                raise ConfigError(
                    f"the preconditioner gave nothing for {sorted(missing)[:4]}. Let `layers` name what it covers."
                )
        flat = {piece.name: piece.local(named[piece.name]) for piece in self._pieces}
        return [flat[name] * self._scales[name] if self._scales else flat[name] for name in flat]
