"""RegMix (arXiv 2407.01492): a regressor from mixtures to losses, and the mean of the best simulated mixtures.

100,000 mixtures are drawn from Dirichlet(prior * strength), the regressor predicts their losses, and the proposal is
the mean of the 128 with the lowest. Departures from the released code: caps hold for what is simulated, and so for the
proposal (there they bound the small runs only); several targets count by their weights (there one metric is chosen);
for those of the regressor see `mixer.proxies.trees`.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from mixer.core.errors import ConfigError
from mixer.proxies import draws, regress
from mixer.proxies.evidence import evidence
from mixer.proxies.proposal import FitSetting, Proposal, by_name
from mixer.proxies.table import RunTable


@dataclass(frozen=True, slots=True, kw_only=True)
class Regmix:
    READS: ClassVar[str] = "losses"
    regressor: Literal["lightgbm", "exp_linear", "linear"] = "lightgbm"
    num_draws: int = 100_000
    num_best: int = 128
    strength: float = 1.0
    regressor_seed: int = 42

    def __post_init__(self) -> None:
        regress.check_regressor(self.regressor)
        if not 1 <= self.num_best <= self.num_draws:
            raise ConfigError(
                f"num_best={self.num_best}, num_draws={self.num_draws}; the best are at least 1 of the draws."
            )
        if not self.strength > 0:
            raise ConfigError(f"strength={self.strength!r}; it needs to be above 0.")

    def propose(self, table: RunTable, setting: FitSetting) -> Proposal:
        fits = regress.fit(evidence(table, setting), self.regressor, self.regressor_seed, folds=setting.folds)
        return self.simulate(fits, setting)

    def simulate(self, fits: regress.Fits, setting: FitSetting) -> Proposal:
        rng = np.random.default_rng([setting.seed, 0x726567])
        found_d = draws.simulated(
            rng,
            setting.prior_d,
            setting.cap_d,
            fits.total,
            num_draws=self.num_draws,
            num_best=self.num_best,
            strength=self.strength,
        )
        weights_d = setting.within(found_d)
        return Proposal(
            weights=by_name(setting, weights_d),
            predicted=fits.at(weights_d),
            rank_correlation=fits.rank_correlation,
            notes=(*fits.notes, *setting.at_caps(weights_d)),
        )
