"""What a fit is asked (`FitSetting`) and what it answers (`Proposal`).

The caps of a setting are the guard rails' own, for a run of `planned_rows` from its start, so that a fit looks for
the best mixture among those that the run would allow, instead of being cut down to one afterwards.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mixer.core.catalog import Catalog
from mixer.core.errors import ConfigError
from mixer.core.mixture import Mixture
from mixer.core.rails import GuardRails, Progress
from mixer.core.simplex import SLACK, onto_box, relative

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FitSetting:
    """The run that a mixture is wanted for."""

    catalog: Catalog
    prior: Mixture
    planned_rows: int | None = None  # of the whole run; None: nobody knows, so repetition sets no cap
    max_epochs: float | None = None
    epochs: Mapping[str, float] = field(default_factory=dict[str, float])
    caps: Mapping[str, float] = field(default_factory=dict[str, float])
    targets: Mapping[str, float] = field(default_factory=dict[str, float])  # weights by set; none: see `Evidence`
    seed: int = 0
    folds: int = 5  # parts of the runs that are left out in turn to see how well unseen ones are ranked; 0: do not look
    cap_d: Floats = field(init=False)  # each domain's largest weight

    def __post_init__(self) -> None:
        if self.planned_rows is not None and self.planned_rows < 1:
            raise ConfigError(f"planned_rows={self.planned_rows}; a run needs at least 1.")
        if self.folds < 0 or self.folds == 1:
            raise ConfigError(f"folds={self.folds}; it needs to be 0 (no cross-validation) or at least 2.")
        for name, weight in self.targets.items():
            if not 0 <= weight < np.inf:
                raise ConfigError(f"targets.{name}={weight!r}; a target's weight needs to be a number >= 0.")
        if self.targets and not any(self.targets.values()):
            raise ConfigError(f"all weights of the targets {sorted(self.targets)} are 0. Give one of them some.")
        known = self.planned_rows is not None
        rails = GuardRails(
            caps=dict(self.caps),
            max_epochs=self.max_epochs if known else None,
            epochs=dict(self.epochs) if known else {},
        ).bind(self.catalog, self.prior)
        progress = Progress.start(self.catalog, self.planned_rows or 1, self.planned_rows)
        object.__setattr__(self, "cap_d", rails.bounds(progress)[1])

    @property
    def names(self) -> tuple[str, ...]:
        return self.catalog.names

    @property
    def prior_d(self) -> Floats:
        return self.prior.weights_d

    def within(self, weights_d: Floats) -> Floats:
        """The mixture nearest to these weights (of any scale) that obeys the caps; one that does is not changed."""
        zeros = np.zeros(len(self.names))
        if (weights_d >= 0).all() and (weights_d <= self.cap_d).all() and abs(weights_d.sum() - 1.0) <= SLACK:
            return weights_d + 0.0
        ratios = (relative(np.maximum(weights_d, 0.0)), relative(self.prior_d), np.ones(len(self.names)))
        return onto_box(ratios, zeros, self.cap_d)

    def at_caps(self, weights_d: Floats) -> tuple[str, ...]:
        """A note on the domains that would get more if they were allowed to."""
        capped = np.flatnonzero((self.cap_d < 1.0) & (weights_d >= self.cap_d * (1 - 1e-6)) & (weights_d > 0))
        if not capped.size:
            return ()
        named = ", ".join(f"{self.names[place]} at {self.cap_d[place]:.4g}" for place in capped.tolist())
        return (f"held by their caps: {named}",)


@dataclass(frozen=True, slots=True, kw_only=True)
class ProposedStage:
    """A mixture for a part of the run, which begins at the fraction `at`."""

    at: float
    weights: Mapping[str, float]
    predicted: Mapping[str, float]  # the losses at the stage's end


@dataclass(frozen=True, slots=True, kw_only=True)
class Proposal:
    """A mixture, or a script of them; the weights of a script are its mean over the run."""

    weights: Mapping[str, float]
    predicted: Mapping[str, float]  # losses by set
    rank_correlation: Mapping[str, float] = field(default_factory=dict[str, float])  # of unseen runs, by set
    notes: tuple[str, ...] = ()  # for people
    stages: tuple[ProposedStage, ...] = ()

    def scripted(self) -> dict[str, Any]:
        """Options of the policy `scripted` that carry the proposal out."""
        stages = self.stages or (ProposedStage(at=0.0, weights=self.weights, predicted=self.predicted),)
        named = {f"stage_{number}": stage for number, stage in enumerate(stages)}
        return {
            "between": "step",
            "stages": {name: {"at": stage.at, "weights": dict(stage.weights)} for name, stage in named.items()},
        }


def by_name(setting: FitSetting, weights_d: Floats) -> dict[str, float]:
    return dict(zip(setting.names, weights_d.tolist(), strict=True))
