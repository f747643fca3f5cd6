"""TiKMiX-M (arXiv 2508.17677): a regressor from mixtures to their influence, and a search for the most influential.

The table is one of predicted influence: a row is a mixture at which the running model's influence was measured, and
its "loss" of a set is minus the group influence of that mixture's gradient on the set. Nothing was trained. The
setting's prior is where the search starts: the mixture in force, or better TiKMiX-D's answer.

For each set a regressor is fitted (LightGBM). A mixture's score is the weighted mean over sets of what is predicted,
each set in units of its standard deviation over the table, so that no set rules by the size of its gradients.
The search: `rounds` rounds of draws around a centre (`mixer.proxies.draws.searched`), of which the `num_best` of
highest score are averaged. With `pareto` a mixture that is predicted to do worse for some set than the start loses
what it lacks, `PENALTY` times, so that none is sacrificed.

Departures: no code was released and its details are not known to us. That a regressor stands in for measured
influence and is searched by sampling and averaging is from the paper's summary; the numbers of candidates and rounds,
the units, the Pareto penalty and the draws are ours. With influence linear in the mixture (one gradient for each
domain) the regressor `linear` is exact.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from mixer.core.errors import ConfigError, DataError
from mixer.proxies import draws, regress
from mixer.proxies.evidence import evidence
from mixer.proxies.proposal import FitSetting, Proposal, by_name
from mixer.proxies.table import RunTable

Floats = NDArray[np.float64]

PENALTY = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class TikmixM:
    READS: ClassVar[str] = "influence"
    regressor: Literal["lightgbm", "linear"] = "lightgbm"
    num_candidates: int = 128
    rounds: int = 10
    num_draws: int = 10_000
    num_best: int = 128
    pareto: bool = True

    def __post_init__(self) -> None:
        if self.regressor not in ("lightgbm", "linear"):
            raise ConfigError(
                f"regressor={self.regressor!r}; influence has both signs, so it needs lightgbm or linear."
            )
        if self.rounds < 1 or self.num_candidates < 2 or not 1 <= self.num_best <= self.num_draws:
            raise ConfigError(
                f"rounds={self.rounds}, num_candidates={self.num_candidates}, num_best={self.num_best} of "
                f"num_draws={self.num_draws}; they need to be at least 1, 2 and 1, and no more than the draws."
            )

    def candidates(self, setting: FitSetting) -> Floats:
        """The mixtures to measure, one a row: the start itself, and draws around it from near to far."""
        rng = np.random.default_rng([setting.seed, 0x74696B])
        strength_r = rng.choice(np.geomspace(1.0, 100.0, 15), self.num_candidates - 1)
        centre_d = setting.within(setting.prior_d)
        drawn_rd = draws.dirichlet(rng, strength_r[:, None] * centre_d)
        return np.concatenate([centre_d[None, :], draws.within_caps(drawn_rd, setting.cap_d, setting.prior_d)])

    def propose(self, table: RunTable, setting: FitSetting) -> Proposal:
        if table.quantity != "influence":
            raise DataError(
                f"the table holds {table.quantity}, not influence. Less is better in both, but of other things. "
                "Give it a table of influence, or propose with regmix."
            )
        found = evidence(table, setting)
        fits = regress.fit(found, self.regressor, 42, folds=setting.folds)
        start_d = setting.within(setting.prior_d)
        unit = {name: float(np.std(loss_r)) or 1.0 for name, loss_r in found.losses.items()}
        start = fits.at(start_d)

        def score(weights_rd: Floats) -> Floats:
            worse = {name: (loss_r - start[name]) / unit[name] for name, loss_r in fits.predict(weights_rd).items()}
            total_r = found.total(worse)
            if self.pareto:
                total_r = total_r + PENALTY * np.sum([np.maximum(one, 0.0) for one in worse.values()], axis=0)
            return total_r

        rng = np.random.default_rng([setting.seed, 0x74696C])
        weights_d = setting.within(
            draws.searched(
                rng, start_d, setting.cap_d, score, rounds=self.rounds, num_draws=self.num_draws, num_best=self.num_best
            )
        )
        notes = list(fits.notes)
        if score(weights_d[None, :])[0] >= 0.0:
            weights_d = start_d
            notes.append("no mixture is predicted to be better than the start, which is the answer")
        return Proposal(
            weights=by_name(setting, weights_d),
            predicted=fits.at(weights_d),
            rank_correlation=fits.rank_correlation,
            notes=(*notes, *setting.at_caps(weights_d)),
        )
