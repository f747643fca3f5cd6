"""Power laws of loss over samples, L(D) = exp(e) + exp(a) / D^alpha, fitted to one domain's history.

The fit minimises the mean Huber loss (delta 1e-3) of log L by descent from many starts, within
    a <= 6.5,   e >= 0.5,   0.001 <= alpha <= 0.8
ADO's released code (arXiv 2410.11820) has these limits as hinges of slope 1. No slope of the Huber term reaches 1
(it is below delta * log D), so the hinges hold exactly, and bounds have the same minimum. The limits suit losses
per token of several bytes and counts in samples of 1,024 tokens. Where losses themselves come near exp(0.5) = 1.65
nats, as with bytes for tokens, the limit of e would forbid the fit, and is log(lowest loss) - 1 instead: a departure.
Another is the descent: the released code's is L-BFGS. scipy's hands matrices of a few rows to a threaded LAPACK, and
took 17 times the CPU time of its truncated Newton (TNC) on two busy cores, for the same minimum.
"""

from collections.abc import Callable
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, signal  # pyright: ignore[reportMissingTypeStubs]  # it has none

Floats = NDArray[np.float64]

SAMPLE_TOKENS = 1024
GRID = tuple(
    (a, e, alpha)
    for a in np.linspace(-2.0, 5.0, 8).tolist()
    for e in np.linspace(-2.0, 1.5, 8).tolist()
    for alpha in np.linspace(0.0, 0.7, 8).tolist()
)
DELTA = 1e-3
LEAST_E = 0.5
BOUNDS = ((None, 6.5), (LEAST_E, None), (1e-3, 0.8))
_FEWEST = 5


def predicted(law_d3: Floats, samples_d: Floats) -> Floats:
    """The laws' losses; each law is (a, e, alpha)."""
    return np.exp(np.logaddexp(law_d3[..., 1], law_d3[..., 0] - law_d3[..., 2] * np.log(samples_d)))


def filtered(loss_h: Floats, points: int) -> Floats:
    """A cubic Savitzky-Golay filter over so many points, fewer where the history is short."""
    points = min(points, len(loss_h))
    points -= 1 - points % 2
    if points < _FEWEST:
        return loss_h
    return np.asarray(cast(Any, signal).savgol_filter(loss_h, points, 3), dtype=np.float64)


def fitted(samples_h: Floats, loss_h: Floats, *, starts: int | None = 4, before: Floats | None = None) -> Floats | None:
    """The law of a history; None where none can be fitted.

    `starts` of the grid's 512 starts are followed to their minimum, those that fit best as they stand; None: all.
    """
    good_h = (samples_h > 0) & (loss_h > 0) & np.isfinite(loss_h)
    if good_h.sum() < _FEWEST or np.ptp(samples_h[good_h]) == 0:
        return None
    log_samples_h, log_loss_h = np.log(samples_h[good_h]), np.log(loss_h[good_h])
    lowest = float(log_loss_h.min())
    least_e = LEAST_E if lowest > LEAST_E + 0.1 else lowest - 1.0
    bounds = (BOUNDS[0], (least_e, None), BOUNDS[2])

    def misfit(law_n3: Floats) -> Floats:
        e_n1, part_nh = law_n3[:, 1:2], law_n3[:, :1] - law_n3[:, 2:] * log_samples_h
        gap_nh = np.abs(np.logaddexp(e_n1, part_nh) - log_loss_h)
        return np.where(gap_nh < DELTA, gap_nh**2 / 2, DELTA * (gap_nh - DELTA / 2)).mean(1) / DELTA**2

    def slope(law_3: Floats) -> tuple[float, Floats]:
        part_h = law_3[0] - law_3[2] * log_samples_h
        log_h = np.logaddexp(law_3[1], part_h)
        gap_h: Floats = log_h - log_loss_h
        near_h = np.abs(gap_h) < DELTA
        huber_h: Floats = np.where(near_h, gap_h**2 / 2, DELTA * (np.abs(gap_h) - DELTA / 2))
        pull_h = np.clip(gap_h, -DELTA, DELTA) / (DELTA**2 * len(gap_h))
        share_h = np.exp(part_h - log_h)
        rise = float(pull_h @ share_h)
        return float(huber_h.mean()) / DELTA**2, np.array(
            [rise, pull_h.sum() - rise, -pull_h @ (share_h * log_samples_h)]
        )

    grid_n3 = np.array(GRID)
    low = np.array([-np.inf if low is None else low for low, _ in bounds])
    high = np.array([np.inf if high is None else high for _, high in bounds])
    grid_n3 = np.unique(np.clip(grid_n3, low, high), axis=0)
    if starts is not None:
        grid_n3 = grid_n3[np.argsort(misfit(grid_n3), kind="stable")[:starts]]
    if before is not None:
        grid_n3 = np.concatenate([np.clip(before, low, high)[None], grid_n3])
    best, best_misfit = None, np.inf
    for start_3 in grid_n3:
        law_3 = _descended(slope, start_3, bounds)
        value = slope(law_3)[0]
        if np.isfinite(law_3).all() and value < best_misfit:
            best, best_misfit = law_3, value
    return best


def _descended(slope: Callable[[Floats], tuple[float, Floats]], start_3: Floats, bounds: Any) -> Floats:
    found = cast(Any, optimize).minimize(slope, start_3, jac=True, method="TNC", bounds=bounds, options={"maxfun": 300})
    return np.asarray(found.x, dtype=np.float64)
