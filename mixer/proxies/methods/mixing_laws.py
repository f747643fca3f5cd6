"""Data Mixing Laws (arXiv 2403.16952): L_t(x) = exp(c_t) + exp(x . t_t) for each target; their weighted mean minimised.

The minimum over mixtures within the caps is exact, and comes with a proof (`mixer.proxies.convex`). With `horizon`
above 1 the losses are first carried on to that multiple of the small runs' tokens by the step law
L = c + k D^-alpha, alpha shared by all runs of a set, fitted to what each run measured after its first tenth.

Departures: no law over model sizes; targets that are mixtures themselves have explicit weights, not the latent domains
that the released pipeline finds with boosted networks; the step law is fitted by least squares.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from mixer.core.errors import ConfigError, DataError
from mixer.proxies import regress
from mixer.proxies.convex import Exponentials, Minimum, minimise
from mixer.proxies.evidence import evidence, last_progress, target_weights
from mixer.proxies.laws import ExpLinear, fit_powers
from mixer.proxies.proposal import FitSetting, Proposal, by_name
from mixer.proxies.table import RunTable

Floats = NDArray[np.float64]

EARLIEST = 0.1  # of a run's tokens; what was measured before is no part of a power law


@dataclass(frozen=True, slots=True, kw_only=True)
class MixingLaws:
    READS: ClassVar[str] = "losses"
    horizon: float = 1.0  # in tokens of a whole small run

    def __post_init__(self) -> None:
        if not 1.0 <= self.horizon < np.inf:
            raise ConfigError(f"horizon={self.horizon!r}; it needs to be 1 (the small runs' own length) or more.")

    def propose(self, table: RunTable, setting: FitSetting) -> Proposal:
        if self.horizon > 1.0:
            table = carried_on(table, setting, self.horizon)
        fits = regress.fit(evidence(table, setting), "exp_linear", setting.seed, folds=setting.folds)
        found = minimum(fits, setting)
        weights_d = setting.within(found.weights_d)
        notes = (*fits.notes, f"at most {found.gap:.1e} above the fitted laws' minimum", *setting.at_caps(weights_d))
        return Proposal(
            weights=by_name(setting, weights_d),
            predicted=fits.at(weights_d),
            rank_correlation=fits.rank_correlation,
            notes=notes,
        )


def minimum(fits: regress.Fits, setting: FitSetting, pull: float = 0.0) -> Minimum:
    """Of the targets' weighted mean + pull * KL(x | prior), over mixtures within the caps."""
    return minimise(
        exponentials(fits.laws, fits.targets, setting.prior_d, pull), _open_to(setting, pull), setting.prior_d
    )


def exponentials(
    laws: Mapping[str, object], targets: Mapping[str, float], prior_d: Floats, pull: float = 0.0
) -> Exponentials:
    """The part of the weighted mean that depends on the mixture."""
    known = {name: law for name, law in laws.items() if isinstance(law, ExpLinear)}
    return Exponentials(
        weight_m=np.array([targets[name] for name in known]),
        slope_md=np.array([law.slope_d for law in known.values()]),
        pull=pull,
        prior_d=np.where(prior_d > 0, prior_d, 1.0) if pull else None,
    )


def _open_to(setting: FitSetting, pull: float) -> Floats:
    """The caps; a pull to a prior of 0 is infinite, so there the weight is 0."""
    cap_d = np.where(setting.prior_d > 0, setting.cap_d, 0.0) if pull else setting.cap_d
    if cap_d.sum() < 1.0 - 1e-12:
        raise ConfigError(
            f"the caps of the domains that the prior knows sum to {cap_d.sum():.6g} < 1. Raise a cap, give other "
            "domains some prior, or take away the pull to the prior."
        )
    return cap_d


def carried_on(table: RunTable, setting: FitSetting, horizon: float) -> RunTable:
    """The runs' ends, with the targets' losses as the step law sees them at `horizon` times their tokens."""
    end = last_progress(table)
    ends = np.flatnonzero(np.abs(table.progress_r - end) <= 1e-9)
    run_r = np.array(table.run_r)
    losses = {name: loss_r[ends].copy() for name, loss_r in table.losses.items()}
    for name in target_weights(table, setting):
        curves: list[tuple[Floats, Floats]] = []
        whole: list[int] = []
        for place, row in enumerate(ends.tolist()):
            own = (run_r == run_r[row]) & (table.progress_r >= EARLIEST * end) & np.isfinite(table.losses[name])
            if own[row]:
                curves.append((table.progress_r[own] / end, table.losses[name][own]))
                whole.append(place)
        short = [len(x) for x, _ in curves if len(x) < 3]
        if short or not curves:
            raise DataError(
                f"horizon={horizon} needs 3 losses of {name!r} from each run after its first tenth; "
                f"{len(short) or 'all'} runs have fewer. Evaluate more often, or use horizon=1."
            )
        laws = fit_powers([x for x, _ in curves], [loss for _, loss in curves])
        for place, law in zip(whole, laws, strict=True):
            losses[name][place] = float(law.predict(np.array(horizon)))
    return replace(
        table,
        run_r=tuple(run_r[ends].tolist()),
        progress_r=table.progress_r[ends],
        tokens_r=table.tokens_r[ends],
        weights_rd=table.weights_rd[ends],
        losses=losses,
    )
