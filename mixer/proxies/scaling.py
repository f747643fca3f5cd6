"""How losses go on: over model sizes and over tokens, with bands.

Practice after a study of more than a thousand fitted laws (arXiv 2410.11840): fit what was measured on the way, not
ends alone; leave out the earliest part of training; nearby sizes predict best, and several small models may tell more
than one larger. Details of it (how much is early; here a tenth of a run) are from memory. Losses under a decaying
learning rate are no power of the tokens: fit stretches of a constant one.

- `fit_sizes`: L = c + a N^b over widths trained under muP, whose hyperparameters carry over (arXiv 2304.06875).
- `fit_tokens`: L = c_run + k_run D^-alpha over the curves of several runs, alpha shared.

Bands are of a residual bootstrap: the law is fitted again to its own values plus residuals drawn with replacement
(raised for the degrees of freedom that the fit used up), and the quantiles of what those fits predict are reported.
They hold what noise there is about the law, and no doubt about the law itself; the seeds of runs are in them only as
far as the table has several.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mixer.core.errors import ConfigError, DataError
from mixer.proxies.laws import Power, fit_power, fit_powers
from mixer.proxies.table import RunTable

Floats = NDArray[np.float64]

EARLIEST = 0.1  # of a run's tokens


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Band:
    """A prediction, and the quantiles of what the bootstrap's fits predict."""

    loss_x: Floats
    low_x: Floats
    high_x: Floats
    level: float


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ScalingFit:
    law: Power
    again: tuple[Power, ...]  # the bootstrap's
    residual: float  # root of the mean square

    def predict(self, x: Floats, level: float = 0.9) -> Band:
        if not 0 < level < 1:
            raise ConfigError(f"level={level!r}; a band holds a share between 0 and 1.")
        at = np.asarray(x, dtype=np.float64)
        several_bx = np.array([law.predict(at) for law in self.again])
        low_x, high_x = np.quantile(several_bx, [(1 - level) / 2, (1 + level) / 2], axis=0)
        return Band(loss_x=self.law.predict(at), low_x=low_x, high_x=high_x, level=level)


def fit_sizes(parameters: Floats, loss: Floats, *, bootstraps: int = 200, seed: int = 0) -> ScalingFit:
    """In the words of muP's loss prediction: a = scale, b = -alpha, c = floor."""
    x, y = np.asarray(parameters, dtype=np.float64), np.asarray(loss, dtype=np.float64)
    law = fit_power(x, y)
    drawn = _resampled([law], [x], [y], bootstraps, seed)
    again = tuple(fit_power(x, sample[0]) for sample in drawn)
    return ScalingFit(law=law, again=again, residual=float(np.sqrt(np.mean((law.predict(x) - y) ** 2))))


def fit_tokens(
    table: RunTable, name: str, *, earliest: float = EARLIEST, bootstraps: int = 200, seed: int = 0
) -> dict[str, ScalingFit]:
    """For each run of the table, the course of its loss of the set `name` over tokens."""
    if name not in table.losses:
        raise DataError(f"the table has no losses of {name!r}; it has {', '.join(sorted(table.losses))}.")
    if not 0 <= earliest < 1:
        raise ConfigError(f"earliest={earliest!r}; it needs to be a share of the run below 1.")
    run_r: NDArray[Any] = np.array(table.run_r)
    used = (table.progress_r > earliest) & np.isfinite(table.losses[name])
    runs = list(dict.fromkeys(table.run_r))
    rows = [np.flatnonzero(used & (run_r == run)) for run in runs]
    short = [run for run, own in zip(runs, rows, strict=True) if own.size < 4]
    if short:
        raise DataError(
            f"{len(short)} of {len(runs)} runs, {short[0]!r} first, have fewer than 4 losses of {name!r} after "
            f"{earliest:.3g} of their tokens. Evaluate more often, or drop those runs."
        )
    xs = [table.tokens_r[own].astype(np.float64) for own in rows]
    ys = [table.losses[name][own] for own in rows]
    laws = fit_powers(xs, ys)
    drawn = _resampled(laws, xs, ys, bootstraps, seed)
    again = [fit_powers(xs, sample) for sample in drawn]
    found: dict[str, ScalingFit] = {}
    for place, (run, x, y) in enumerate(zip(runs, xs, ys, strict=True)):
        residual = float(np.sqrt(np.mean((laws[place].predict(x) - y) ** 2)))
        found[run] = ScalingFit(law=laws[place], again=tuple(fits[place] for fits in again), residual=residual)
    return found


def _resampled(
    laws: Sequence[Power], xs: Sequence[Floats], ys: Sequence[Floats], bootstraps: int, seed: int
) -> list[list[Floats]]:
    if bootstraps < 1:
        raise ConfigError(f"bootstraps={bootstraps}; a band needs at least 1, and 100 to mean much.")
    rng = np.random.default_rng([seed, 0x626F6F])
    fitted = [law.predict(x) for law, x in zip(laws, xs, strict=True)]
    points, coefficients = sum(len(y) for y in ys), 2 * len(laws) + 1
    raised = np.sqrt(points / max(points - coefficients, 1))
    rest = [(y - fit) * raised for y, fit in zip(ys, fitted, strict=True)]
    rest = [one - one.mean() for one in rest]
    return [
        [fit + one[rng.integers(len(one), size=len(one))] for fit, one in zip(fitted, rest, strict=True)]
        for _ in range(bootstraps)
    ]
