"""RegMix-D (arXiv 2606.18663): RegMix at several points of the small runs, so that the mixture follows the training.

A regressor is fitted to the losses at each of `stages` (shares of a small run's tokens; without any, all at which the
table has every run), and stage k of the proposal, RegMix's for that point, holds from the share before it on. Only
the abstract is known to us. Ours are: that shares of the small runs' tokens are shares of the real run's; that caps
are the whole run's in every stage (mixtures that obey them in each stage obey them in the mean, but a domain that one
stage leaves out cannot be used up by another); and that a regressor sees the loss reached at a point, not the fall
since the one before.

Offline the proposal's `scripted()` is the whole schedule. For a run that is under way `stage_at` names the stage whose
predicted losses are nearest to the observed ones.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from mixer.core.errors import ConfigError, DataError
from mixer.proxies import regress
from mixer.proxies.evidence import SAME, evidence
from mixer.proxies.methods.regmix import Regmix
from mixer.proxies.proposal import FitSetting, Proposal, ProposedStage, by_name
from mixer.proxies.table import RunTable


@dataclass(frozen=True, slots=True, kw_only=True)
class RegmixD:
    READS: ClassVar[str] = "losses"
    stages: tuple[float, ...] = ()
    regressor: Literal["lightgbm", "exp_linear", "linear"] = "lightgbm"
    num_draws: int = 100_000
    num_best: int = 128

    def __post_init__(self) -> None:
        object.__setattr__(self, "stages", tuple(sorted(self.stages)))
        if any(not 0 < stage <= 1 for stage in self.stages) or len(set(self.stages)) < len(self.stages):
            raise ConfigError(
                f"stages={list(self.stages)}; they need to be different shares of the run, above 0, to 1."
            )

    def propose(self, table: RunTable, setting: FitSetting) -> Proposal:
        regmix = Regmix(regressor=self.regressor, num_draws=self.num_draws, num_best=self.num_best)
        points = self.stages or common_points(table)
        found: list[ProposedStage] = []
        ranks: dict[str, float] = {}
        notes: list[str] = []
        for begin, end in zip((0.0, *points), points, strict=False):
            found_here = evidence(table, setting, progress=end)
            fits = regress.fit(found_here, self.regressor, regmix.regressor_seed, folds=setting.folds)
            stage = regmix.simulate(fits, setting)
            found.append(ProposedStage(at=begin, weights=stage.weights, predicted=stage.predicted))
            ranks |= {f"{name} at {end:.3g}": rank for name, rank in stage.rank_correlation.items()}
            notes += [f"stage to {end:.3g}: {note}" for note in stage.notes]
        lengths = np.diff([*(stage.at for stage in found), 1.0])  # the last stage holds to the end
        mean_d = lengths @ np.array([[stage.weights[name] for name in setting.names] for stage in found])
        return Proposal(
            weights=by_name(setting, setting.within(mean_d)),
            predicted=found[-1].predicted,
            rank_correlation=ranks,
            notes=tuple(notes),
            stages=tuple(found),
        )


def stage_at(proposal: Proposal, observed: Mapping[str, float]) -> int:
    """The number of the stage whose predicted losses are nearest, in squares over the sets in common, to those seen."""
    if not proposal.stages:
        raise DataError("the proposal has no stages to choose from. Propose with regmix_d.")
    sets = sorted(set(observed) & set(proposal.stages[0].predicted))
    if not sets:
        raise DataError(
            f"observed losses of {sorted(observed)}, predicted ones of {sorted(proposal.stages[0].predicted)}: none in "
            "common. Observe a target of the fit."
        )
    far = [sum((stage.predicted[name] - observed[name]) ** 2 for name in sets) for stage in proposal.stages]
    return int(np.argmin(far))


def common_points(table: RunTable) -> tuple[float, ...]:
    """The progress at which every run was measured."""
    runs = len(set(table.run_r))
    points: list[float] = []
    for point in np.unique(table.progress_r[table.progress_r > 0]).tolist():
        new = not points or point - points[-1] > SAME
        if new and int((np.abs(table.progress_r - point) <= SAME).sum()) == runs:
            points.append(point)
    if not points:
        raise DataError(
            f"the {runs} runs of the table were never measured at the same share of their tokens. "
            "Name the stages, or evaluate all runs at the same points."
        )
    return tuple(points)
