"""Probes of influence: what the gradients of domains and targets have to do with each other, on the live model.

After the last step of a window in which it is due, a probe reads some rows of every domain and every target (which,
says `mixer.core.probe_plan`), takes a gradient of each part of them, and gives their inner products; what follows
from these is said in `mixer.core.influence`. The shape is that of an evaluation: `measure` gives one rank's sums,
who calls adds them up over the ranks in one all-reduce, and `close` reads them. Nothing here talks to other ranks,
nothing in the model, the optimizer or the random states is afterwards other than it was, and results are the same
for any number of ranks but for rounding.

Sums are of gradients of *summed* losses, so that parts may be cut anywhere between ranks; `close` divides by the
global numbers of targets.

- `targets`: every target part's gradient is kept, each domain part's is projected on them and dropped. Exact, and
  only numbers cross the network; but there is no Gram matrix of the domains, targets x parts gradients are kept on
  each rank (of a sharded model: the rank's shards of them), and ranks of a model that is not sharded compute the
  targets' gradients each for itself.
- `sketch`: every part becomes `sketch_width` numbers. (domains + targets) x parts x sketch_width float64 on each
  rank and in the all-reduce; gives everything. The error of the sketch is in the errors reported, as its bound.
- `store`: all gradients are kept, which is exact and gives everything, for tests and small models. Ranks cannot add
  up products of their own, so of a model that is not sharded rank 0 computes all of it alone.
- `auto`: targets if no Gram matrix is asked for and there are at most 4 targets whose gradients fit `memory_mb`;
  else sketch.

Sharded models compute each part on all ranks at once, so `rows` should be at least `parts` x ranks: a rank without
a row computes an empty one, and the budget pays for it.

A target's rows are chosen away from those on which it is evaluated, as far as half of the target's rows remain:
what steers a run must not be what judges it. Of a smaller target all rows are probed, and its loss in evaluations
flatters the run.

The z-loss has no part in it. Dropout modules are off; functional dropout (in attention kernels) is as in training.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mixer.core.catalog import Catalog
from mixer.core.errors import ConfigError
from mixer.core.influence import Influence, Parts, summarise
from mixer.core.permute import key_of
from mixer.core.plan import Geometry, WindowPlan
from mixer.core.probe_plan import (
    Cadence,
    Method,
    ProbeGroup,
    ProbePlan,
    Share,
    budgeted_windows,
    computed_rows,
    plan_probe,
)
from mixer.core.signal import GRID
from mixer.data.corpus import CatalogRows, Corpus
from mixer.data.reader import Batch
from mixer.data.window import locate
from mixer.training.evaluation import EvaluationOptions, choose_rows, corpora_beside, refuse_other
from mixer.training.gradients import CountSketch, Precision, Preconditioner, adam_scales, choose_pieces, probing
from mixer.training.probe_work import Harvested, ProbeWork
from mixer.training.step import StepRows

FEW_TARGETS = 4  # that `auto` projects on
Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class InfluenceOptions:
    """How often influence is measured, on how much, and how."""

    budget: float = 0.02  # share of the rows computed in training; sets the cadence
    every_windows: int | None = None  # null: from the budget
    start_windows: int = 1  # trained before the first probe
    rows: int = 8  # of each domain and target, a probe
    parts: int = 4  # gradients that these are cut into, from which errors are found
    batch_rows: int | None = None  # of a rank, computed at once; null: a part's
    metric: Literal["adam", "identity", "ekfac"] = "adam"
    method: Literal["auto", "targets", "sketch", "store"] = "auto"
    sketch_width: int = 65536
    memory_mb: float = 1024.0  # for the targets' gradients, up to which `auto` keeps them
    layers: tuple[str, ...] = ()  # globs of parameter names; none: the matrices of the blocks
    harvest: bool = False  # take the domains' gradients from the steps' own micro-batches
    always: bool = False  # also where no policy asks, for people to look at
    seed: int = 0  # of sketches

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple(self.layers))
        for key in ("every_windows", "start_windows", "rows", "parts", "batch_rows", "sketch_width"):
            if (value := getattr(self, key)) is not None and value < 1:
                raise ConfigError(f"{key}={value}; it must be at least 1.")
        for key in ("budget", "memory_mb"):
            if not getattr(self, key) > 0:
                raise ConfigError(f"{key}={getattr(self, key)}; it must be above 0.")
        if self.harvest and self.method not in ("auto", "sketch"):
            raise ConfigError(f"harvest with method={self.method}; harvested gradients are sketches. Use sketch.")


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeFacts:
    """What a probe is planned for. None of it may change in a run, or the cadence would; so `world_size` is the
    most ranks that the run may have, not those there are."""

    num_parameters: int
    world_size: int = 1
    sharded: bool = False
    needs_gram: bool = False
    cross_document_targets: bool = False
    evaluation: EvaluationOptions | None = None  # whose rows of the targets are left alone


class Probe:
    """The probes of one catalog. Immutable; every worker builds or is sent the same."""

    def __init__(
        self,
        rows: CatalogRows,
        targets: Corpus | None,
        options: InfluenceOptions,
        geometry: Geometry,
        facts: ProbeFacts,
    ) -> None:
        self.options, self.facts = options, facts
        self.rows, self.target_rows = rows, None if targets is None else targets.by_source
        self._seed, self._window_rows = geometry.seed, geometry.window_slots
        if targets is not None:
            refuse_other(rows.corpus.manifest, targets)
        names = rows.catalog.names
        self.targets: tuple[str, ...] = () if targets is None else targets.catalog.names
        self._groups = [
            ProbeGroup(label=f"domain/{name}", num_rows=int(size))
            for name, size in zip(names, rows.catalog.num_rows_d, strict=True)
        ]
        self._groups += [] if targets is None else _target_groups(targets, facts.evaluation)
        self.num_domains = len(names)
        self.method: Method = choose_method(options, facts, len(self.targets))
        plan = self.plan(0)
        is_domain_p = plan.group_p < self.num_domains
        self.cost_rows = computed_rows(
            plan.rows_p[is_domain_p].tolist(),
            plan.rows_p[~is_domain_p].tolist(),
            method=self.method,
            world_size=facts.world_size,
            sharded=facts.sharded,
            harvested=options.harvest,
        )
        every = budgeted_windows(self.cost_rows, budget=options.budget, window_rows=geometry.window_slots)
        self.cadence = Cadence(
            start_windows=options.start_windows,
            every_windows=options.every_windows or every,
            repays=options.every_windows is None,
        )
        harvested_p = np.repeat(np.arange(self.num_domains), options.parts)
        domains_p = harvested_p if options.harvest else plan.group_p[is_domain_p]
        self._group_p = np.concatenate([domains_p, plan.group_p[~is_domain_p]])
        self.domain_parts, self.target_parts = len(domains_p), int((~is_domain_p).sum())

    @classmethod
    def beside(cls, rows: CatalogRows, options: InfluenceOptions, geometry: Geometry, facts: ProbeFacts) -> "Probe":
        """On the targets that were prepared together with the corpus that is trained, if there are any."""
        return cls(rows, corpora_beside(rows.corpus, ["targets"]).get("targets"), options, geometry, facts)

    @property
    def catalog(self) -> Catalog:
        return self.rows.catalog

    def due(self, window: int) -> bool:
        """Whether to measure after the last step of this window."""
        return self.cadence.due(window)

    def plan(self, number: int) -> ProbePlan:
        """The rows of a probe, counted from 0; groups are the domains in catalog order, then the targets."""
        return plan_probe(self._groups, number, rows=self.options.rows, parts=self.options.parts, seed=self._seed)

    def spent_share(self, done: int) -> float:
        """Rows computed for probes in the first `done` windows, as a share of those computed in training."""
        return self.cadence.spent_share(self.cost_rows, self._window_rows, done)

    # ---- measuring -------------------------------------------------------------------------------

    def measure(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        window: int,
        *,
        rank: int = 0,
        world_size: int = 1,
        device: torch.device | str = "cpu",
        precision: Precision = "float32",
        preconditioner: Preconditioner | None = None,
        harvested: Harvested | None = None,
    ) -> Tensor:
        """This rank's sums, float64; ranks add them up. `model` is the bare module, not one that wraps it.

        Before the optimizer's first update there is no adam metric, and the sums are NaN: nothing was measured.
        """
        options = self.options
        if not 0 <= rank < world_size:
            raise ConfigError(f"rank {rank} of {world_size}; it must be 0 to {world_size - 1}.")
        if (preconditioner is None) == (options.metric == "ekfac"):
            raise ConfigError(f"metric={options.metric} and preconditioner={preconditioner!r}; ekfac needs one.")
        if (harvested is None) == options.harvest:
            raise ConfigError(f"harvest={options.harvest} and harvested={harvested is not None}; give both or none.")
        pieces = choose_pieces(model, options.layers)
        scales = adam_scales(pieces, optimizer) if options.metric == "adam" else {}
        if scales is None:
            return torch.full((self._size,), torch.nan, dtype=torch.float64, device=device)
        plan = self.plan(max(0, self.cadence.number(window)))
        with probing(model, device, precision):
            work = ProbeWork(
                plan,
                self.num_domains,
                self.domain_parts,
                partial(self.read, plan),
                model=model,
                pieces=pieces,
                scales=scales,
                preconditioner=preconditioner,
                batch_rows=options.batch_rows,
                ranks=(rank, world_size),
                device=device,
            )
            if self.method == "sketch":
                products = work.sketch(CountSketch(options.sketch_width, options.seed), harvested)
            else:
                products = work.project() if self.method == "targets" else work.store()
        stats = work.losses.sums.double()
        if harvested is not None:
            stats[0, : self.domain_parts] = torch.nan
            stats[1, : self.domain_parts] = harvested.tokens_p
            stats[2, : self.domain_parts] = harvested.rows_p
        places = work.computed_rows * self.rows.catalog.row_tokens
        computed = torch.tensor([places], dtype=torch.float64, device=device)
        return torch.cat([computed, stats.flatten(), products.flatten()])

    @property
    def _size(self) -> int:
        num, targets = len(self._group_p), self.target_parts
        products = {"targets": num * targets, "sketch": num * self.options.sketch_width, "store": num * num}
        return 1 + 4 * num + products[self.method]

    # ---- reading ---------------------------------------------------------------------------------

    def close(self, sums: Tensor, rate: float) -> Influence:
        """What was measured, of sums that were added up over the ranks. A domain or target with a row without a
        usable loss, or without any target, has not been measured: NaN."""
        values = sums.cpu().numpy()
        if values.shape != (self._size,):
            raise ConfigError(f"sums of shape {values.shape}; needed ({self._size},). Give what measure gives.")
        num = len(self._group_p)
        stats = values[1 : 1 + 4 * num].reshape(4, num)
        tokens_p, rows_p, bad_p = np.nan_to_num(stats[1:])
        with np.errstate(all="ignore"):
            products_pp = self._products(values[1 + 4 * num :], tokens_p)
            loss_p = stats[0] / GRID / tokens_p
        unknown_p = (tokens_p == 0) | (bad_p > 0)
        products_pp[unknown_p] = products_pp[:, unknown_p] = np.nan
        products_pp[~np.isfinite(products_pp)] = np.nan

        groups, split = len(self._groups), self.num_domains
        empty_g = np.bincount(self._group_p, tokens_p, groups) == 0
        lost_p = (bad_p > 0) | (~np.isfinite(loss_p) & (tokens_p > 0))
        lost_g = empty_g | (np.bincount(self._group_p, lost_p, groups) > 0)
        # Parts without a token are left out, unless their group has no other; those count for one, and are unknown.
        kept_p = (tokens_p > 0) | empty_g[self._group_p]
        group_p, loss_p = self._group_p[kept_p], loss_p[kept_p]
        tokens_p, rows_p = np.maximum(tokens_p[kept_p], 1), np.maximum(rows_p[kept_p], 1)
        products_pp = products_pp[np.ix_(kept_p, kept_p)]
        found = summarise(
            self._in_one_metric(products_pp, group_p),
            Parts(
                group_n=group_p,
                tokens_n=tokens_p.astype(np.int64),
                rows_n=rows_p.astype(np.int64),
                loss_n=np.where(np.isfinite(loss_p), loss_p, 0.0),
            ),
            num_domains=split,
            targets=self.targets,
            metric=self.options.metric,
            rate=rate,
        )
        found = replace(
            found,
            loss_d=np.where(lost_g[:split], np.nan, found.loss_d),
            target_loss_t=np.where(lost_g[split:], np.nan, found.target_loss_t),
            tokens=int(np.nan_to_num(values[0])),
        )
        return self._with_sketch_error(found, products_pp, group_p, tokens_p) if self.method == "sketch" else found

    def _products(self, values: Floats, tokens_p: Floats) -> Floats:
        """Inner products of all parts' mean gradients; NaN where this method gives none."""
        num, split = len(tokens_p), self.domain_parts
        if self.method == "sketch":
            mean_pk = values.reshape(num, -1) / tokens_p[:, None]
            return mean_pk @ mean_pk.T
        products_pp = np.full((num, num), np.nan)
        if self.method == "store":
            products_pp = values.reshape(num, num)
        else:
            products_pp[:, split:] = values.reshape(num, -1)
            products_pp[split:, :split] = products_pp[:split, split:].T
        return products_pp / tokens_p[:, None] / tokens_p

    def _in_one_metric(self, products_pp: Floats, group_p: Ints) -> Floats:
        """Without the products of one side with itself, where the metric is on the targets' side alone."""
        if self.options.metric != "ekfac":
            return products_pp
        is_domain_p = group_p < self.num_domains
        return np.where(is_domain_p[:, None] == is_domain_p, np.nan, products_pp)

    def _with_sketch_error(self, found: Influence, products_pp: Floats, group_p: Ints, tokens_p: Floats) -> Influence:
        """With the bound of the sketch's variance in the errors: it is the same in all parts, so these do not show
        it."""
        weight_gp = np.zeros((len(self._groups), len(tokens_p)))
        weight_gp[group_p, np.arange(len(tokens_p))] = tokens_p
        weight_gp /= weight_gp.sum(1, keepdims=True)
        square_g = np.einsum("gp,pq,gq->g", weight_gp, np.nan_to_num(products_pp), weight_gp)
        domain_d, target_t = square_g[: self.num_domains], square_g[self.num_domains :]

        def widened(error: Floats, product: Floats, one_g: Floats, other_g: Floats) -> Floats:
            return np.sqrt(error**2 + (np.outer(one_g, other_g) + product**2) / self.options.sketch_width)

        benefit_error = widened(found.benefit_error_dt, found.benefit_dt, domain_d, target_t)
        if found.gram_dd is None or found.gram_error_dd is None:
            return replace(found, benefit_error_dt=benefit_error)
        gram_error = widened(found.gram_error_dd, found.gram_dd, domain_d, domain_d)
        return replace(found, benefit_error_dt=benefit_error, gram_error_dd=gram_error)

    # ---- rows ------------------------------------------------------------------------------------

    def read(self, plan: ProbePlan, share: Share, micro: int) -> list[StepRows]:
        """The share's rows in so many batches, with the part's number for their domain; a batch without a row is one
        without text."""
        first = int(plan.rows_p[: share.part].sum()) + share.begin
        size = share.end - share.begin
        cuts = [slice(first + size * k // micro, first + size * (k + 1) // micro) for k in range(micro)]
        nothing = StepRows.nothing(self.rows.catalog.row_tokens, "cpu")
        return [self._read(plan, cut) if cut.start < cut.stop else nothing for cut in cuts]

    def _read(self, plan: ProbePlan, cut: slice) -> StepRows:
        group, row_n = int(plan.group_n[cut.start]), plan.row_n[cut]
        rows, domain = self.rows, group
        if group >= self.num_domains:
            assert self.target_rows is not None
            rows, domain = self.target_rows, group - self.num_domains
        geometry = Geometry(window_steps=1, batch_rows=len(row_n))
        domain_n = np.full(len(row_n), domain, dtype=np.int32)
        found = locate([WindowPlan(0, rows.catalog, geometry, domain_n, row_n, np.zeros_like(row_n))], rows, 0, 1)
        batch = Batch(
            window=0,
            step=0,
            tokens=found.copy_tokens(np.arange(len(row_n))).astype(np.int64),
            domain_index=plan.part_n[cut],
            row=row_n,
            length=found.length_n,
            starts=found.starts,
            starts_offsets=found.starts_offsets,
        )
        return StepRows.of(batch, cross_document_targets=self.facts.cross_document_targets)


# --- what is chosen -----------------------------------------------------------------------------------


def choose_method(options: InfluenceOptions, facts: ProbeFacts, num_targets: int) -> Method:
    """What `auto` is, and whether what was asked for can be had."""
    if not num_targets and not facts.needs_gram:
        raise ConfigError(
            "influence without targets, for a policy that needs no Gram matrix: there is nothing to measure. "
            "Prepare a corpus of targets beside the one that is trained."
        )
    if options.metric == "ekfac" and facts.needs_gram:
        raise ConfigError(
            "metric=ekfac for a policy that needs the domains' Gram matrix; ekfac is applied to targets alone. "
            "Use adam or identity."
        )
    if options.harvest and facts.sharded:
        raise ConfigError(
            "harvest of a model that is sharded: its gradients are summed over ranks before they can be seen. "
            "Use harvest=false, or strategy ddp."
        )
    exact_bytes = num_targets * options.parts * facts.num_parameters * 4
    if options.method == "targets" and (facts.needs_gram or not num_targets):
        raise ConfigError(
            f"method=targets with {num_targets} targets, Gram matrix needed: {facts.needs_gram}. Projecting needs "
            "targets and gives no Gram matrix: use sketch."
        )
    if options.method != "auto":
        return options.method
    few = 0 < num_targets <= FEW_TARGETS and exact_bytes <= options.memory_mb * 2**20
    return "targets" if few and not facts.needs_gram and not options.harvest else "sketch"


def _target_groups(targets: Corpus, evaluation: EvaluationOptions | None) -> list[ProbeGroup]:
    groups: list[ProbeGroup] = []
    for name, size in zip(targets.catalog.names, targets.catalog.num_rows_d.tolist(), strict=True):
        label, avoided_n = f"target/{name}", np.zeros(0, dtype=np.int64)
        if evaluation is not None and "targets" in evaluation.sets:
            avoided_n = choose_rows(size, evaluation.rows, key_of("evaluation", evaluation.seed, label))
        groups.append(ProbeGroup.avoiding(label, size, avoided_n))
    return groups
