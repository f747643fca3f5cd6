"""CLIMB (arXiv 2504.13161): runs in rounds, each near what the rounds before predict to be best.

`next_mixtures` names the mixtures of a round. The first are drawn from Dirichlet distributions around the tempered
prior, with strengths from 0.1 to 5. For every later one the regressor is fitted to all runs so far, `num_draws`
mixtures are ranked by it, and the round's are chosen at random among the `num_top` best, no two nearer than
`least_distance` to each other or to a run; where these are too few, the next best follow. `propose` answers with the
predictor's best: the mean of the `num_best` of them. Rounds of 64, 32 and 16 runs, as we remember the paper; how it
draws and chooses is ours.

In later rounds candidates are half of them drawn around the prior again and half around the best runs so far
(Dirichlet, concentrations of 10 to 300), as the predictor's best lie where few draws around the prior fall.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from mixer.core.errors import ConfigError
from mixer.proxies import draws, regress
from mixer.proxies.evidence import Evidence, evidence
from mixer.proxies.proposal import FitSetting, Proposal, by_name
from mixer.proxies.table import RunTable

Floats = NDArray[np.float64]

STRENGTHS = np.geomspace(0.1, 5.0, 15)
PARENTS = 8  # the best runs, around which half of the candidates lie


@dataclass(frozen=True, slots=True, kw_only=True)
class Climb:
    READS: ClassVar[str] = "losses"
    rounds: tuple[int, ...] = (64, 32, 16)
    regressor: Literal["lightgbm", "exp_linear", "linear"] = "lightgbm"
    num_draws: int = 100_000
    num_top: int = 1000
    num_best: int = 32
    least_distance: float = 0.01  # L1
    temper: float = 0.5  # the first round is drawn around prior^temper

    def __post_init__(self) -> None:
        object.__setattr__(self, "rounds", tuple(self.rounds))
        regress.check_regressor(self.regressor)
        if not self.rounds or min(self.rounds) < 1:
            raise ConfigError(f"rounds={list(self.rounds)}; they need to be numbers of runs, at least 1 each.")
        if not 1 <= self.num_best <= self.num_draws or not 1 <= self.num_top <= self.num_draws:
            raise ConfigError(
                f"num_best={self.num_best}, num_top={self.num_top}, num_draws={self.num_draws}; the first two count "
                "some of the draws, at least 1."
            )

    def next_mixtures(self, table: RunTable | None, setting: FitSetting, *, number: int | None = None) -> Floats:
        """The mixtures of round `number` (None: as many rounds are over as the table's runs fill), one a row."""
        done = 0 if table is None else len(set(table.run_r))
        if number is None:
            number = int(np.searchsorted(np.cumsum(self.rounds), done, side="right"))
        if not 0 <= number < len(self.rounds):
            raise ConfigError(
                f"round {number} of {len(self.rounds)}: {done} runs of {sum(self.rounds)} are done already. "
                "Propose, or plan another round."
            )
        rng = np.random.default_rng([setting.seed, 0x636C69, number])
        if table is None or not done:
            return self._apart(self._first(rng, setting, 20 * self.rounds[0]), np.empty((0, 0)), self.rounds[0])
        found = evidence(table, setting)
        ranked_rd = self._ranked(rng, found, setting, max(self.num_draws // 4, self.num_top))[0]
        order = np.concatenate([rng.permutation(self.num_top), np.arange(self.num_top, len(ranked_rd))])
        return self._apart(ranked_rd[order], found.weights_rd, self.rounds[number])

    def propose(self, table: RunTable, setting: FitSetting) -> Proposal:
        found = evidence(table, setting)
        rng = np.random.default_rng([setting.seed, 0x636C69, len(self.rounds)])
        best_rd, fits = self._ranked(rng, found, setting, self.num_best, folds=setting.folds)
        weights_d = setting.within(best_rd.mean(axis=0))
        missing = sum(self.rounds) - len(set(table.run_r))
        notes = [f"{missing} of {sum(self.rounds)} runs are not done yet"] * (missing > 0)
        return Proposal(
            weights=by_name(setting, weights_d),
            predicted=fits.at(weights_d),
            rank_correlation=fits.rank_correlation,
            notes=(*fits.notes, *notes, *setting.at_caps(weights_d)),
        )

    def _first(self, rng: np.random.Generator, setting: FitSetting, count: int) -> Floats:
        tempered_d = np.where(setting.prior_d > 0, setting.prior_d, 0.0) ** self.temper
        tempered_d = np.where(setting.prior_d > 0, tempered_d, 0.0) / tempered_d[setting.prior_d > 0].sum()
        strength_r = rng.choice(STRENGTHS, count)
        return draws.within_caps(draws.dirichlet(rng, strength_r[:, None] * tempered_d), setting.cap_d, setting.prior_d)

    def _ranked(
        self, rng: np.random.Generator, found: Evidence, setting: FitSetting, count: int, folds: int = 0
    ) -> tuple[Floats, regress.Fits]:
        fits = regress.fit(found, self.regressor, 42, folds=folds)
        best = np.argsort(found.total(found.losses), kind="stable")[:PARENTS]
        parents_pd = draws.within_caps(found.weights_rd[best], setting.cap_d, setting.prior_d)

        def draw(size: int) -> Floats:
            near = size // 2
            around_rd = parents_pd[rng.integers(len(parents_pd), size=near)] + 1e-3 * setting.prior_d
            sharp_r = np.exp(rng.uniform(np.log(10.0), np.log(300.0), near))
            near_rd = draws.within_caps(
                draws.dirichlet(rng, sharp_r[:, None] * around_rd), setting.cap_d, setting.prior_d
            )
            return np.concatenate([self._first(rng, setting, size - near), near_rd])

        return draws.best_draws(draw, fits.total, num_draws=self.num_draws, num_best=count)[0], fits

    def _apart(self, from_rd: Floats, known_rd: Floats, count: int) -> Floats:
        """The first `count` that keep their distance; if there are not as many, nearer ones after them."""
        kept: list[Floats] = [] if not known_rd.size else list(known_rd)
        chosen, near = [], []
        for weights_d in from_rd:
            if len(chosen) == count:
                break
            if kept and np.abs(np.array(kept) - weights_d).sum(axis=1).min() < self.least_distance:
                near.append(weights_d)
                continue
            kept.append(weights_d)
            chosen.append(weights_d)
        return np.array([*chosen, *near][:count])
