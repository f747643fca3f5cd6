"""Regressions from mixtures to losses, one for each set, and how well they rank runs that they have not seen.

The rank correlation is Spearman's, of all runs' losses with predictions by fits that left them out (in as many parts
as there are folds, drawn by the seed). A search for mixtures needs their order, not their losses.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

from mixer.core.errors import ConfigError, DataError
from mixer.proxies.evidence import Evidence
from mixer.proxies.laws import Constant, Law, fit_exp_linear, fit_linear
from mixer.proxies.trees import fit_trees

Floats = NDArray[np.float64]

REGRESSORS: Mapping[str, Callable[[Floats, Floats, int], Law]] = {
    "lightgbm": lambda weights_rd, loss_r, seed: fit_trees(weights_rd, loss_r, seed=seed),
    "exp_linear": lambda weights_rd, loss_r, seed: fit_exp_linear(weights_rd, loss_r, seed=seed),
    "linear": lambda weights_rd, loss_r, seed: fit_linear(weights_rd, loss_r),
}


def check_regressor(regressor: str) -> None:
    if regressor not in REGRESSORS:
        raise ConfigError(f"regressor={regressor!r}; it needs to be one of {', '.join(REGRESSORS)}.")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Fits:
    """A law for each target set."""

    laws: Mapping[str, Law]
    targets: Mapping[str, float]
    rank_correlation: Mapping[str, float]
    notes: tuple[str, ...] = ()

    def predict(self, weights_rd: Floats) -> dict[str, Floats]:
        return {name: law.predict(weights_rd) for name, law in self.laws.items()}

    def total(self, weights_rd: Floats) -> Floats:
        """The weighted mean over the targets."""
        return np.sum([weight * self.laws[name].predict(weights_rd) for name, weight in self.targets.items()], axis=0)

    def at(self, weights_d: Floats) -> dict[str, float]:
        return {name: float(loss_r[0]) for name, loss_r in self.predict(weights_d[None, :]).items()}


def fit(found: Evidence, regressor: str, seed: int, *, folds: int = 0) -> Fits:
    check_regressor(regressor)
    laws = {name: _law(regressor, found.weights_rd, loss_r, seed) for name, loss_r in found.losses.items()}
    ranks: dict[str, float] = {}
    notes = list(found.notes)
    if folds:
        for name, loss_r in found.losses.items():
            ranks[name] = cross_validated(regressor, found.weights_rd, loss_r, seed, folds)
        known = [rank for rank in ranks.values() if np.isfinite(rank)]
        text = f"{regressor} over {len(found.weights_rd)} runs: "
        if known:
            notes.append(f"{text}rank correlation of unseen runs {min(known):.3f} to {max(known):.3f}")
        else:
            notes.append(f"{text}too few to leave some out and see how well their ranks are predicted")
    return Fits(laws=laws, targets=found.targets, rank_correlation=ranks, notes=tuple(notes))


def cross_validated(regressor: str, weights_rd: Floats, loss_r: Floats, seed: int, folds: int = 5) -> float:
    """NaN where the runs are too few, or all alike."""
    predicted_r = np.full(len(loss_r), np.nan)
    order = np.random.default_rng([seed, 0x666F6C]).permutation(len(loss_r))
    for part in range(folds):
        out = order[part::folds]
        kept = np.setdiff1d(order, out)
        if not out.size:
            return float("nan")
        try:
            law = _law(regressor, weights_rd[kept], loss_r[kept], seed)
        except DataError:  # enough runs for the fit, but not without a part of them
            return float("nan")
        predicted_r[out] = law.predict(weights_rd[out])
    return spearman(predicted_r, loss_r)


def spearman(one: Floats, other: Floats) -> float:
    """NaN if either does not vary."""
    if np.ptp(one) == 0.0 or np.ptp(other) == 0.0:
        return float("nan")
    return float(np.corrcoef(rankdata(one), rankdata(other))[0, 1])


def _law(regressor: str, weights_rd: Floats, loss_r: Floats, seed: int) -> Law:
    if np.ptp(loss_r) == 0.0:
        return Constant(loss=float(loss_r[0]))
    return REGRESSORS[regressor](weights_rd, loss_r, seed)
