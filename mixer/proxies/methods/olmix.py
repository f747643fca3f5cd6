"""Olmix (arXiv 2602.12237): exp-linear laws, a pull to the prior, repetition caps, and reuse of an earlier mixture.

`exact` minimises  sum_m omega_m exp(A_m . x) + kl * KL(x | prior)  over mixtures within the caps; the answer comes with
a proof (`mixer.proxies.convex`; the released code calls a general convex solver). `simulation` is the released search
by draws (`mixer.proxies.draws.searched`), for any regressor; `search` answers with the best mixture that was trained
and obeys the caps. kl is 0.1 as in the released documents (0.05 in its function's signature).

*Reuse.* Domains that have not changed keep the ratios of an earlier mixture: `reuse` maps a block's name to its
domains' weights, of any scale. The block is one domain to the fit, so the runs that are needed grow with the blocks
and changed domains only; its runs hold those ratios too, or are refused. A weight in the block is W * rho with the same
rho, bit for bit, whatever else is in the mixture: `ratios` gives them.

A table may know domains that the catalog no longer has: the laws are fitted with them and they get no weight. (The
released way to remove a domain, renormalising, is the special case of one block.)

Departures: `lightgbm` here means RegMix's settings; Gaussian processes and the autoscale law are not offered; the
pull acts on blocks and domains as the fit sees them; in `simulation` the pull is added to the score, where the released
code has none, and draws over caps are brought within them instead of rejected.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from mixer.core.blocks import FrozenBlock, Places
from mixer.core.catalog import Catalog, Domain
from mixer.core.errors import ConfigError, DataError
from mixer.core.mixture import Mixture, unknown_domain
from mixer.proxies import draws, regress
from mixer.proxies.evidence import evidence
from mixer.proxies.methods.mixing_laws import minimum
from mixer.proxies.proposal import FitSetting, Proposal, by_name
from mixer.proxies.table import RunTable

Floats = NDArray[np.float64]

NEAR = 1e-3  # of the lowest predicted loss, in the simulation
HELD = 1e-3  # by how much a run's weights in a block may differ from the block's ratios


@dataclass(frozen=True, slots=True, kw_only=True)
class Olmix:
    READS: ClassVar[str] = "losses"
    kl: float = 0.1
    proposer: Literal["exact", "simulation", "search"] = "exact"
    regressor: Literal["exp_linear", "lightgbm", "linear"] = "exp_linear"
    reuse: Mapping[str, Mapping[str, float]] = field(default_factory=dict[str, Mapping[str, float]])
    num_draws: int = 100_000
    rounds: int = 10

    def __post_init__(self) -> None:
        regress.check_regressor(self.regressor)
        if self.proposer not in ("exact", "simulation", "search"):
            raise ConfigError(f"proposer={self.proposer!r}; it needs to be exact, simulation or search.")
        if self.proposer == "exact" and self.regressor != "exp_linear":
            raise ConfigError(
                f"proposer=exact needs regressor=exp_linear, whose sums are convex; found {self.regressor}. "
                "Use it, or proposer=simulation."
            )
        if not 0 <= self.kl < np.inf:
            raise ConfigError(f"kl={self.kl!r}; it needs to be 0 or more.")

    def propose(self, table: RunTable, setting: FitSetting) -> Proposal:
        bundle = Bundle.of(self.reuse, table, setting)
        return bundle.spread(self._propose(bundle.table, bundle.setting))

    def _propose(self, table: RunTable, setting: FitSetting) -> Proposal:
        found = evidence(table, setting)
        if self.proposer == "search":
            return _best_trained(table, setting)
        fits = regress.fit(found, self.regressor, setting.seed, folds=setting.folds)
        notes = list(fits.notes)
        if self.proposer == "exact":
            least = minimum(fits, setting, self.kl)
            weights_d = setting.within(least.weights_d)
            notes.append(f"at most {least.gap:.1e} above the minimum of the fitted laws with their pull to the prior")
        else:
            weights_d = setting.within(self._searched(fits, setting))
        return Proposal(
            weights=by_name(setting, weights_d),
            predicted=fits.at(weights_d),
            rank_correlation=fits.rank_correlation,
            notes=(*notes, *setting.at_caps(weights_d)),
        )

    def _searched(self, fits: regress.Fits, setting: FitSetting) -> Floats:
        prior_d = setting.prior_d

        def score(weights_rd: Floats) -> Floats:
            ratio_rd = np.where(weights_rd > 0, weights_rd, 1.0) / np.where(prior_d > 0, prior_d, 1.0)
            pull_r = (weights_rd * np.where(weights_rd > 0, np.log(ratio_rd), 0.0)).sum(axis=1)
            return fits.total(weights_rd) + self.kl * pull_r

        found_d = draws.searched(
            np.random.default_rng([setting.seed, 0x6F6C6D]),
            draws.within_caps(prior_d[None, :], setting.cap_d, prior_d)[0],
            setting.cap_d,
            score,
            rounds=self.rounds,
            num_draws=self.num_draws,
            num_best=self.num_draws,
            near=NEAR,
        )
        return np.where(found_d < 1e-5, 0.0, found_d)

    def ratios(self) -> dict[str, dict[str, float]]:
        """What each block's weight is shared out by."""
        found: dict[str, dict[str, float]] = {}
        for block, weights in self.reuse.items():
            names = sorted(weights)
            catalog = Catalog(row_tokens=1, tokenizer="", domains=tuple(Domain(name, 1, "") for name in names))
            frozen = {block: FrozenBlock(domains=tuple(names), ratios=dict(weights))}
            found[block] = dict(
                zip(names, Places(frozen, catalog, Mixture.uniform(catalog)).rho_d.tolist(), strict=True)
            )
        return found


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Bundle:
    """A table and a setting in which every block is one domain, and the way back."""

    table: RunTable
    setting: FitSetting
    inner: FitSetting  # with the blocks' domains
    places: Places | None = None

    @classmethod
    def of(cls, reuse: Mapping[str, Mapping[str, float]], table: RunTable, setting: FitSetting) -> "Bundle":
        gone = tuple(name for name in table.domains if name not in setting.catalog.index)
        if not reuse and not gone:
            return cls(table=table, setting=setting, inner=setting)
        _refuse_blocks(reuse, setting)
        frozen = {name: FrozenBlock(domains=tuple(block), ratios=dict(block)) for name, block in reuse.items()}
        places = Places(frozen, setting.catalog, setting.prior)
        alone = [setting.names[places.members(place)[0]] for place in range(len(places)) if places.names[place] is None]
        names = (*alone, *reuse)
        missing = sorted(set(setting.names) - set(table.domains))
        if missing:
            raise DataError(
                f"the table does not know {', '.join(missing)}. Fit the catalog that its runs were made for."
            )
        columns = [table.domains.index(name) for name in setting.names]
        weights_rr = np.array([places.gather(row) for row in table.weights_rd[:, columns]]).reshape(-1, len(names))
        _refuse_other_ratios(table.weights_rd[:, columns], weights_rr, places, table)
        others = [table.domains.index(name) for name in gone]
        wide = replace(
            table, domains=(*names, *gone), weights_rd=np.concatenate([weights_rr, table.weights_rd[:, others]], axis=1)
        )
        prior = dict(zip(names, places.gather(setting.prior_d).tolist(), strict=True)) | dict.fromkeys(gone, 0.0)
        caps = dict(zip(names, places.most(setting.cap_d).tolist(), strict=True)) | dict.fromkeys(gone, 0.0)
        domains = tuple(Domain(name, 1, "") for name in (*names, *gone))
        catalog = Catalog(row_tokens=1, tokenizer="", domains=domains)
        outer = FitSetting(
            catalog=catalog,
            prior=Mixture.from_dict(catalog, prior, normalize=True),
            caps=caps,
            targets=setting.targets,
            seed=setting.seed,
            folds=setting.folds,
        )
        return cls(table=wide, setting=outer, inner=setting, places=places)

    def spread(self, proposal: Proposal) -> Proposal:
        if self.places is None:
            return proposal
        blocks = {name for name in self.places.names if name is not None}
        names = [
            self.inner.names[self.places.members(place)[0]] if block is None else block
            for place, block in enumerate(self.places.names)
        ]
        weights_d = self.places.spread(np.array([proposal.weights[name] for name in names]))
        gone = [name for name in self.table.domains if name not in names]
        notes = [f"block {name}: {proposal.weights[name]:.4g}, its ratios reused" for name in sorted(blocks)]
        notes += [f"left out, no longer in the catalog: {', '.join(gone)}"] * bool(gone)
        return replace(proposal, weights=by_name(self.inner, weights_d), notes=(*proposal.notes, *notes))


def _refuse_blocks(reuse: Mapping[str, Mapping[str, float]], setting: FitSetting) -> None:
    for name, block in reuse.items():
        if name in setting.catalog.index:
            raise ConfigError(f"reuse.{name}: a domain has that name too. Call the block by another one.")
        for domain in block:
            if domain not in setting.catalog.index:
                raise ConfigError(f"reuse.{name} names the {unknown_domain(domain, setting.names)}")
    several = [domain for block in reuse.values() for domain in block]
    twice = sorted({domain for domain in several if several.count(domain) > 1})
    if twice:
        raise ConfigError(f"reuse has {', '.join(twice)} in more than one block. Leave each domain in one.")


def _refuse_other_ratios(weights_rd: Floats, weights_rr: Floats, places: Places, table: RunTable) -> None:
    off_r = np.abs(weights_rd - weights_rr[:, places.place_d] * places.rho_d).max(axis=1, initial=0.0)
    if (off_r > HELD).any():
        row = int(np.argmax(off_r))
        raise DataError(
            f"run {table.run_r[row]!r} gives the domains of a reused block other ratios than the block's (a weight is "
            f"off by {off_r[row]:.3g}). Train runs that hold the ratios, or reuse those that the runs had."
        )


def _best_trained(table: RunTable, setting: FitSetting) -> Proposal:
    found = evidence(table, setting)
    allowed = np.flatnonzero((found.weights_rd <= setting.cap_d + 1e-9).all(axis=1))
    if not allowed.size:
        raise DataError(
            f"none of {len(found.weights_rd)} runs obeys the caps, so none can be chosen. Use proposer=exact, or train "
            "mixtures within them."
        )
    total_r = found.total(found.losses)[allowed]
    best = int(allowed[np.argmin(total_r)])
    return Proposal(
        weights=by_name(setting, setting.within(found.weights_rd[best])),
        predicted={name: float(loss_r[best]) for name, loss_r in found.losses.items()},
        notes=(*found.notes, f"the best of {allowed.size} runs that obey the caps"),
    )
