"""Random mixtures within caps, and the search for good ones among them.

A draw above a cap becomes the nearest mixture within the caps, in the geometry of ratios (`mixer.core.simplex`), where
published codes reject it or, at the proposal, have no caps at all: no setting is so tight that no draw is
left, and mixtures *at* the caps, where the best ones often are, are among the draws.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

AT_ONCE = 20_000  # draws in memory


def dirichlet(rng: np.random.Generator, concentration_rd: Floats) -> Floats:
    """One mixture for each row of concentrations; tiny ones are no trouble, and 0 leaves a domain out."""
    positive = concentration_rd > 0
    a_rd = np.where(positive, concentration_rd, 1.0)
    with np.errstate(divide="ignore", over="ignore"):  # log Gamma(a) variate = that of a + 1, plus log(u) / a
        log_rd = np.log(rng.standard_gamma(a_rd + 1.0)) + np.log(1.0 - rng.random(a_rd.shape)) / a_rd
    log_rd = np.where(positive, np.maximum(log_rd, -1e300), -np.inf)
    weights_rd = np.exp(log_rd - log_rd.max(axis=1, keepdims=True))
    return weights_rd / weights_rd.sum(axis=1, keepdims=True)


def within_caps(weights_rd: Floats, cap_d: Floats, spare_d: Floats) -> Floats:
    """min(c * w, cap) with the c that sums to 1, for every row; zeros take part if they must, as `spare_d` says."""
    w_rd = np.where(cap_d > 0, weights_rd, 0.0)
    if (w_rd <= cap_d).all() and (np.abs(w_rd.sum(axis=1) - 1.0) < 1e-12).all():
        return w_rd
    spare_d = np.where(cap_d > 0, spare_d + 1e-6, 0.0)
    w_rd = np.maximum(w_rd, 1e-30 * spare_d)
    for _ in range(len(cap_d) + 1):
        over_rd = w_rd >= cap_d
        w_rd = np.where(over_rd, cap_d, w_rd)
        free_r = np.where(over_rd, 0.0, w_rd).sum(axis=1)
        missing_r = 1.0 - np.where(over_rd, cap_d, 0.0).sum(axis=1)
        scale_r = np.where(free_r > 0, missing_r / np.where(free_r > 0, free_r, 1.0), 1.0)
        w_rd = np.where(over_rd, cap_d, w_rd * np.maximum(scale_r, 0.0)[:, None])
        if (w_rd <= cap_d * (1 + 1e-15)).all():
            break
    return np.minimum(w_rd, cap_d)


def best_draws(
    draw: Callable[[int], Floats], score: Callable[[Floats], Floats], *, num_draws: int, num_best: int
) -> tuple[Floats, Floats]:
    """The mixtures of lowest score among `num_draws`, best first, and their scores."""
    kept_rd, kept_r = np.empty((0, 0)), np.empty(0)
    left = num_draws
    while left:
        weights_rd = draw(min(left, AT_ONCE))
        left -= len(weights_rd)
        score_r = score(weights_rd)
        all_rd = np.concatenate([kept_rd, weights_rd]) if kept_rd.size else weights_rd
        all_r = np.concatenate([kept_r, score_r])
        order = np.argsort(all_r, kind="stable")[:num_best]
        kept_rd, kept_r = all_rd[order], all_r[order]
    return kept_rd, kept_r


def simulated(
    rng: np.random.Generator,
    centre_d: Floats,
    cap_d: Floats,
    score: Callable[[Floats], Floats],
    *,
    num_draws: int = 100_000,
    num_best: int = 128,
    strength: float = 1.0,
) -> Floats:
    """RegMix's proposal: the mean of the best of many draws from a Dirichlet distribution around `centre_d`."""

    def draw(count: int) -> Floats:
        return within_caps(dirichlet(rng, np.tile(centre_d * strength, (count, 1))), cap_d, centre_d)

    return best_draws(draw, score, num_draws=num_draws, num_best=num_best)[0].mean(axis=0)


def searched(
    rng: np.random.Generator,
    centre_d: Floats,
    cap_d: Floats,
    score: Callable[[Floats], Floats],
    *,
    rounds: int = 10,
    num_draws: int = 100_000,
    num_best: int = 128,
    near: float | None = None,
) -> Floats:
    """The search of Olmix's code (arXiv 2602.12237): draws ever closer around a centre that follows the best.

    In round r the concentration is alpha * centre with log alpha = U(log 1, log 100) + log(2 (r + 1)); the new best is
    the mean of the `num_best` draws of lowest score, or of those that are within `near` of the lowest, and the centre
    moves half of the way to it. The best mean of all rounds is the answer.
    """
    best_d, best = centre_d, float(score(centre_d[None, :])[0])
    for number in range(rounds):

        def draw(count: int, around_d: Floats = centre_d, sharper: float = 2.0 * (number + 1)) -> Floats:
            strength_r = np.exp(rng.uniform(0.0, np.log(100.0), count)) * sharper
            return within_caps(dirichlet(rng, strength_r[:, None] * around_d), cap_d, around_d)

        found_rd, found_r = best_draws(draw, score, num_draws=num_draws, num_best=num_best)
        if near is not None:
            found_rd = found_rd[found_r <= found_r[0] + near]
        mean_d = found_rd.mean(axis=0)
        here = float(score(mean_d[None, :])[0])
        if here < best:
            best_d, best = mean_d, here
        centre_d = (centre_d + mean_d) / 2
    return best_d
