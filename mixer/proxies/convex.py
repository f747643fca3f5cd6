"""Smooth convex functions minimised over mixtures with caps: sum(x) = 1 and 0 <= x <= cap.

An interior point method: Newton's method on  s * f(x) - sum log x - sum log(cap - x)  within sum(x) = 1, with s
raised tenfold until 2 * D / s, which bounds what is left to gain, is negligible. Deterministic; a Newton step costs
one Cholesky factor of D x D.

The answer carries its own proof. For a convex f and any feasible y,

    f(y) >= f(x) + grad f(x) . (y - x),    so    f(x) - min f <= max_y grad f(x) . (x - y) =: gap

and the maximum over mixtures with caps is found exactly, by filling domains in the order of their gradient. The gap
is 0 just where the Karush-Kuhn-Tucker conditions hold.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import LinAlgError, cho_factor, cho_solve

from mixer.core.simplex import SLACK, onto_box

Floats = NDArray[np.float64]

GROWTH, STEPS = 10.0, 60


class Objective(Protocol):
    """A convex function; all x > 0 are in its domain."""

    def value(self, x_d: Floats) -> float: ...

    def gradient(self, x_d: Floats) -> Floats: ...

    def hessian(self, x_d: Floats) -> Floats: ...


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Exponentials:
    """sum_m weight_m * exp(slope_m . x) + pull * sum_d x_d log(x_d / prior_d)"""

    weight_m: Floats
    slope_md: Floats
    pull: float = 0.0
    prior_d: Floats | None = None  # needed, and positive, if there is a pull

    def _terms(self, x_d: Floats) -> Floats:
        with np.errstate(over="ignore"):
            return self.weight_m * np.exp(self.slope_md @ x_d)

    def value(self, x_d: Floats) -> float:
        value = float(self._terms(x_d).sum())
        if self.pull and self.prior_d is not None:
            value += self.pull * float(
                np.where(x_d > 0, x_d * np.log(np.maximum(x_d, 1e-300) / self.prior_d), 0.0).sum()
            )
        return value

    def gradient(self, x_d: Floats) -> Floats:
        gradient_d = self._terms(x_d) @ self.slope_md
        if self.pull and self.prior_d is not None:
            gradient_d = gradient_d + self.pull * (np.log(np.maximum(x_d, 1e-300) / self.prior_d) + 1.0)
        return gradient_d

    def hessian(self, x_d: Floats) -> Floats:
        hessian_dd = self.slope_md.T @ (self._terms(x_d)[:, None] * self.slope_md)
        return hessian_dd + np.diag(self.pull / np.maximum(x_d, 1e-300)) if self.pull else hessian_dd


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Quadratic:
    """x . curve . x / 2 - gain . x, with a positive semidefinite curve."""

    gain_d: Floats
    curve_dd: Floats

    def value(self, x_d: Floats) -> float:
        return float(x_d @ self.curve_dd @ x_d / 2 - self.gain_d @ x_d)

    def gradient(self, x_d: Floats) -> Floats:
        return self.curve_dd @ x_d - self.gain_d

    def hessian(self, x_d: Floats) -> Floats:
        return self.curve_dd


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Minimum:
    weights_d: Floats  # sums to 1 and is at most the caps, exactly
    value: float
    gap: float  # f is at most this much above its minimum


def minimise(objective: Objective, cap_d: Floats, start_d: Floats) -> Minimum:
    """Over mixtures with x <= cap; the start, which may lie at caps and have zeros, only speeds it up."""
    if cap_d.sum() <= 1.0 + 1e-9 or (cap_d > 0).sum() == 1:
        x_d = onto_box((cap_d, np.ones(len(cap_d))), np.zeros(len(cap_d)), cap_d)
        return Minimum(weights_d=x_d, value=objective.value(x_d), gap=0.0)
    free = cap_d > 0
    x_d = np.zeros(len(cap_d))
    x_d[free] = 0.9 * onto_box((start_d[free], np.ones(free.sum())), np.zeros(free.sum()), cap_d[free])
    x_d[free] += 0.1 * cap_d[free] / cap_d[free].sum()
    scale = float(np.abs(objective.gradient(x_d)[free]).max()) or 1.0
    s, end = 1.0 / scale, 2e13 * len(cap_d) / scale
    while s < end:
        x_d = _centred(objective, x_d, free, cap_d, s)
        s *= GROWTH
    x_d = onto_box((x_d, np.ones(len(cap_d))), np.zeros(len(cap_d)), cap_d) if not _feasible(x_d, cap_d) else x_d
    return Minimum(weights_d=x_d, value=objective.value(x_d), gap=gap(objective.gradient(x_d), x_d, cap_d))


def gap(gradient_d: Floats, x_d: Floats, cap_d: Floats) -> float:
    """max over mixtures y within the caps of gradient . (x - y); see the module."""
    order = np.argsort(gradient_d, kind="stable")
    before = np.concatenate([[0.0], np.cumsum(cap_d[order])[:-1]])
    y_d = np.zeros(len(x_d))
    y_d[order] = np.clip(1.0 - before, 0.0, cap_d[order])
    return max(float(gradient_d @ (x_d - y_d)), 0.0)


def _feasible(x_d: Floats, cap_d: Floats) -> bool:
    return bool((x_d >= 0).all() and (x_d <= cap_d).all() and abs(x_d.sum() - 1.0) <= SLACK)


def _centred(objective: Objective, x_d: Floats, free: NDArray[np.bool_], cap_d: Floats, s: float) -> Floats:
    """The minimum of  s * f - sum log x - sum log(cap - x)  over the domains that may have a weight."""
    x_d, cap = x_d.copy(), cap_d[free]

    def merit(y: Floats) -> float:
        y_d = np.zeros(len(x_d))
        y_d[free] = y
        value = objective.value(y_d)
        return s * value - float(np.log(y).sum() + np.log(cap - y).sum()) if np.isfinite(value) else np.inf

    for _ in range(STEPS):
        x = x_d[free]
        slope = s * objective.gradient(x_d)[free] - 1.0 / x + 1.0 / (cap - x)
        curve = s * objective.hessian(x_d)[np.ix_(free, free)] + np.diag(1.0 / x**2 + 1.0 / (cap - x) ** 2)
        unit = 1.0 / np.sqrt(np.diagonal(curve))  # a vertex has diagonals of all magnitudes
        try:
            factor = cho_factor(curve * unit[:, None] * unit[None, :])
        except LinAlgError:
            break
        down, ones = unit * cho_solve(factor, unit * slope), unit * cho_solve(factor, unit)
        step = -down + ones * (down.sum() / ones.sum())
        fall = -float(slope @ step)  # twice what a full step gains, were the function quadratic
        if not fall > 1e-10:
            break
        with np.errstate(divide="ignore", invalid="ignore"):
            room = np.where(step < 0, -x / step, np.where(step > 0, (cap - x) / step, np.inf)).min()
        length, here = min(1.0, 0.99 * room), merit(x)
        noise = 1e-14 * abs(here)  # of the merit itself, once s is large
        while length > 1e-10 and merit(x + length * step) > here - 0.1 * length * fall + noise:
            length /= 2
        if length <= 1e-10:
            break
        x_d[free] = x + length * step
    return x_d
