"""The domains' gradients for nothing: sketched while the steps compute them anyway.

A micro-batch whose rows are all of one domain has, in its backward pass, that domain's gradient. `Harvest.around`
is entered around each micro-batch of `accumulate_gradients`; it hangs a hook on every chosen parameter, which sees
the gradient of this micro-batch alone, before it is added to `.grad` and before data parallel sums it over ranks
(that happens after the addition). So every micro-batch counts, the last one of a step too, and nothing in the step
changes. What it costs is the sketching, in every step; the budget counts rows and does not see it. It is little
beside the backward pass of a large micro-batch, and much where a weight is smaller than the sketch is wide.

How many micro-batches are of one domain is for the geometry to say (`together_rows`); one that is not is left out.
On a GPU that is decided there, without waiting.

What is harvested is not quite what a probe measures, and says less than it:

- gradients come from all steps since the last probe, each at that step's weights, and in the adam metric each with
  that step's second moments; a probe's are of one moment;
- with a z-loss they hold its gradient too;
- domains appear as often as they are trained on, so rare ones have large errors, and those that gave no whole
  micro-batch none at all: NaN;
- their losses are not booked here (the window's own are in the signal).

A micro-batch goes to the part that the number of its first row says, modulo `parts`: rows are shuffled, so parts
are about even, and there is no turn to remember. Whoever saves a run saves the sums: `close` them, add them up over
the ranks, and `add` the total back on one. Models that are sharded cannot be harvested: their gradients are summed
over ranks within the backward pass.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from mixer.core.errors import ConfigError
from mixer.training.gradients import CountSketch, Piece, adam_scales, choose_pieces, is_sharded
from mixer.training.influence import InfluenceOptions
from mixer.training.probe_work import Harvested
from mixer.training.step import StepRows


class Harvest:
    """Sums of sketched gradients of one rank, by domain and part. `model` is the bare module."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        options: InfluenceOptions,
        num_domains: int,
        *,
        device: torch.device | str = "cpu",
    ) -> None:
        self._pieces: Sequence[Piece] = choose_pieces(model, options.layers)
        if any(is_sharded(piece.parameter) for piece in self._pieces):
            raise ConfigError(
                "harvest of a model that is sharded: its gradients are summed over ranks before they can be seen. "
                "Use harvest=false, or strategy ddp."
            )
        self._optimizer, self._metric, self._parts = optimizer, options.metric, options.parts
        self._sketch = CountSketch(options.sketch_width, options.seed)
        places = num_domains * options.parts
        self._sums_pk = torch.zeros(places, options.sketch_width, dtype=torch.float64, device=device)
        self._counts_2p = torch.zeros(2, places, dtype=torch.int64, device=device)  # tokens, rows

    def around(self, scale: float | Tensor) -> Callable[[StepRows], AbstractContextManager[Any]]:
        """For one step, whose gradients are those of summed losses times `scale` (replicas / global targets)."""
        scales = adam_scales(self._pieces, self._optimizer) if self._metric == "adam" else {}

        def around(part: StepRows) -> AbstractContextManager[Any]:
            domain_b = part.domain_b
            mixed = domain_b.device.type == "cpu" and bool((domain_b != domain_b[:1]).any())
            if scales is None or mixed or not len(domain_b):
                return nullcontext()
            return self._around(part, scale, scales)

        return around

    @contextmanager
    def _around(self, part: StepRows, scale: float | Tensor, scales: dict[str, Tensor]) -> Iterator[None]:
        sums_k = torch.zeros(self._sketch.width, dtype=torch.float64, device=part.domain_b.device)

        def hook(piece: Piece) -> Callable[[Tensor], None]:
            def take(gradient: Tensor) -> None:
                flat = gradient.detach().reshape(-1)
                self._sketch.add(sums_k, piece.name, flat * scales[piece.name] if scales else flat, piece.begin)

            return take

        hooks = [piece.parameter.register_hook(hook(piece)) for piece in self._pieces]
        try:
            yield
        finally:
            for one in hooks:
                one.remove()
        self._book(part, sums_k / scale)

    @torch.no_grad()
    def _book(self, part: StepRows, sums_k: Tensor) -> None:
        domain = part.domain_b[:1]
        good = (part.domain_b == domain).all() & sums_k.isfinite().all()
        place = domain * self._parts + part.row_b[:1] % self._parts
        self._sums_pk.index_add_(0, place, torch.where(good, sums_k, 0.0)[None])
        tokens = (part.target_bs >= 0).sum()
        rows = torch.full_like(tokens, len(part.domain_b))
        self._counts_2p.index_add_(1, place, (torch.stack([tokens, rows]) * good)[:, None])

    def close(self) -> Harvested:
        """What this rank harvested since the last time; it begins anew."""
        found = Harvested(self._counts_2p[0].clone(), self._counts_2p[1].clone(), self._sums_pk.clone())
        self._counts_2p.zero_()
        self._sums_pk.zero_()
        return found

    def add(self, found: Harvested) -> None:
        """Take in what was harvested before."""
        self._counts_2p += torch.stack([found.tokens_p, found.rows_p]).to(self._counts_2p.device)
        self._sums_pk += found.sketch_pk.to(self._sums_pk.device)
