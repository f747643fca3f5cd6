"""UtiliMax (arXiv 2501.11747): utilities of domains as returns, their concentration as risk, repetition as a cap.

    maximise  mean_t(U_t . x) - risk * x . Sigma x      over mixtures within the caps

U[t, d] is how much of domain d's weight lowers target t's loss: the fitted slopes of linear laws over the runs, negated
and brought to mean 0 and standard deviation 1 for each target. Sigma is the identity: utilities are taken as
equally uncertain and independent. Departures: the formula is from memory of the paper, which reads utilities off
ablations or a language model's ratings; linear slopes over a table of runs, Sigma and the value of `risk` are ours.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from mixer.core.errors import ConfigError
from mixer.proxies import regress
from mixer.proxies.convex import Quadratic, minimise
from mixer.proxies.evidence import evidence
from mixer.proxies.laws import Linear
from mixer.proxies.proposal import FitSetting, Proposal, by_name
from mixer.proxies.table import RunTable

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Utilimax:
    READS: ClassVar[str] = "losses"
    risk: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.risk < np.inf:
            raise ConfigError(f"risk={self.risk!r}; it needs to be 0 or more.")

    def propose(self, table: RunTable, setting: FitSetting) -> Proposal:
        fits = regress.fit(evidence(table, setting), "linear", setting.seed, folds=setting.folds)
        utility_d = np.zeros(len(setting.names))
        for name, law in fits.laws.items():
            if isinstance(law, Linear):
                spread = float(np.std(law.loss_d)) or 1.0
                utility_d += fits.targets[name] * (law.loss_d.mean() - law.loss_d) / spread
        weights_d = setting.within(portfolio(utility_d, setting.cap_d, setting.prior_d, self.risk))
        return Proposal(
            weights=by_name(setting, weights_d),
            predicted=fits.at(weights_d),
            rank_correlation=fits.rank_correlation,
            notes=(*fits.notes, *setting.at_caps(weights_d)),
        )


def portfolio(
    utility_d: Floats, cap_d: Floats, start_d: Floats, risk: float, covariance_dd: Floats | None = None
) -> Floats:
    curve_dd = np.eye(len(cap_d)) if covariance_dd is None else covariance_dd
    return minimise(Quadratic(gain_d=utility_d, curve_dd=2.0 * risk * curve_dd), cap_d, start_d).weights_d
