"""Laws of how a loss depends on the mixture, or on the tokens seen, and their fits. No randomness but seeded starts.

    linear        L = x . b                              least squares
    exp-linear    L = exp(c) + exp(x . t)                Huber, many starts, L-BFGS with analytic gradients
    own share     L_i = (b s^-beta + c) x_i^-alpha       least squares on logarithms of the loss
    power         L = c + k D^-alpha                     least squares; alpha shared by several curves

*Exp-linear* is the law of Data Mixing Laws (arXiv 2403.16952) for one set, with the logarithm of the floor as
parameter, and the default of Olmix (arXiv 2602.12237). An intercept in the exponent is part of t, as weights sum to 1.
For a known floor f it is a straight line in log(L - f): regressions for a grid of floors below the least loss give
the first starts. The others are drawn as Olmix's code does: exp(c) from exp(-2) to exp(1.5), t around the
regression's. All are judged by their first loss, and only the best `POLISHED` are followed to the end, then one
of them by Levenberg-Marquardt steps on the same Huber loss. Departures: the published codes follow each of 300 starts;
a ridge of 1e-6 (of the loss in units of delta^2) makes t unique where the mixtures leave it open.

*Own share* is BiMix (arXiv 2405.14908), whose A, B and C are determined up to one common factor only; A = 1 here. The
formula is from memory of the paper.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares, minimize

from mixer.core.errors import DataError

Floats = NDArray[np.float64]

LARGEST = 50.0  # exponents beyond it are held there
FLOORS, DRAWS, POLISHED = 24, 300, 6
RIDGE = 1e-6
ZOOMS = 12  # each ten times closer


class Law(Protocol):
    def predict(self, weights_rd: Floats) -> Floats:
        """The loss of each mixture."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Constant:
    loss: float

    def predict(self, weights_rd: Floats) -> Floats:
        return np.full(len(weights_rd), self.loss)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Linear:
    loss_d: Floats

    def predict(self, weights_rd: Floats) -> Floats:
        return weights_rd @ self.loss_d


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ExpLinear:
    log_floor: float
    slope_d: Floats

    def predict(self, weights_rd: Floats) -> Floats:
        return np.exp(self.log_floor) + np.exp(np.minimum(weights_rd @ self.slope_d, LARGEST))


def fit_linear(weights_rd: Floats, loss_r: Floats) -> Linear:
    _refuse_few("linear", len(loss_r), weights_rd.shape[1])
    return Linear(loss_d=np.linalg.lstsq(weights_rd, loss_r, rcond=1e-10)[0].astype(np.float64))


def fit_exp_linear(weights_rd: Floats, loss_r: Floats, *, seed: int = 0, delta: float = 0.02) -> ExpLinear:
    """`delta` is where squares turn into absolute values, in nats."""
    _refuse_few("exp_linear", len(loss_r), weights_rd.shape[1] + 1)
    if loss_r.min() <= 0:
        raise DataError(
            f"a loss of {loss_r.min()!r}: exp_linear is a law of positive losses. Use the regressor lightgbm or linear."
        )
    fit = ExpLinearLoss(weights_rd, loss_r, delta)
    starts = _starts(weights_rd, loss_r, seed)
    first = np.array([fit(start)[0] for start in starts])
    best, found = np.inf, starts[0]
    for place in np.argsort(first, kind="stable")[:POLISHED].tolist():
        options = {"maxiter": 500, "maxfun": 2000, "ftol": 1e-13, "gtol": 1e-9}
        end = minimize(fit, starts[place], jac=True, method="L-BFGS-B", options=options)
        if end.fun < best:
            best, found = float(end.fun), end.x
    refined = fit.refined(found)
    found = refined if fit(refined)[0] < best else found
    return ExpLinear(log_floor=float(found[0]), slope_d=found[1:])


class ExpLinearLoss:
    """The mean Huber loss of exp-linear in units of delta^2, and its gradient by (c, t)."""

    def __init__(self, weights_rd: Floats, loss_r: Floats, delta: float) -> None:
        self.weights_rd, self.loss_r, self.delta = weights_rd, loss_r, delta

    def _residual(self, parameters: Floats) -> tuple[float, Floats, Floats]:
        floor = float(np.exp(np.clip(parameters[0], -LARGEST, LARGEST)))
        fall_r = np.exp(np.clip(self.weights_rd @ parameters[1:], -LARGEST, LARGEST))
        return floor, fall_r, (floor + fall_r - self.loss_r) / self.delta

    def __call__(self, parameters: Floats) -> tuple[float, Floats]:
        floor, fall_r, error_r = self._residual(parameters)
        size_r = np.abs(error_r)
        value = np.where(size_r <= 1.0, error_r**2 / 2, size_r - 0.5).mean()
        pull_r = np.clip(error_r, -1.0, 1.0) / (self.delta * len(error_r))
        slope = np.concatenate([[pull_r.sum() * floor], self.weights_rd.T @ (pull_r * fall_r)])
        t_d = parameters[1:]
        slope[1:] += RIDGE * t_d
        return float(value) + RIDGE / 2 * float(t_d @ t_d), slope

    def refined(self, parameters: Floats) -> Floats:
        """From near a minimum to it: the same loss, by a method that knows it is a sum of squares."""
        rows, ridge = len(self.loss_r), np.sqrt(RIDGE)

        def residuals(at: Floats) -> Floats:
            error_r = self._residual(at)[2]
            size_r = np.abs(error_r)
            shaped_r = np.where(size_r <= 1.0, error_r, np.sign(error_r) * np.sqrt(np.maximum(2 * size_r - 1, 1.0)))
            return np.concatenate([shaped_r / np.sqrt(rows), ridge * at[1:]])

        def jacobian(at: Floats) -> Floats:
            floor, fall_r, error_r = self._residual(at)
            size_r = np.maximum(np.abs(error_r), 1.0)
            scale_r = 1.0 / (np.sqrt(2 * size_r - 1) * self.delta * np.sqrt(rows))
            top = np.concatenate([np.full((rows, 1), floor), fall_r[:, None] * self.weights_rd], axis=1)
            return np.concatenate([scale_r[:, None] * top, ridge * np.eye(len(at))[1:]])

        found = least_squares(
            residuals,
            parameters,
            jac=jacobian,  # type: ignore[arg-type]  # its stub knows the names of schemes only
            xtol=1e-12,
            ftol=1e-12,
            max_nfev=100,
        )
        return found.x


def _starts(weights_rd: Floats, loss_r: Floats, seed: int) -> list[Floats]:
    least, spread = float(loss_r.min()), float(np.ptp(loss_r)) or float(loss_r.min())
    below = np.geomspace(spread * 1e-2, max(spread * 30, least), FLOORS)
    floors = [floor for floor in least - below if floor > 0] + [least * 1e-3]
    found: list[Floats] = []
    for floor in floors:
        rest_r = loss_r - floor
        line = np.linalg.lstsq(weights_rd * rest_r[:, None], np.log(rest_r) * rest_r, rcond=1e-10)[0]
        found.append(np.concatenate([[np.log(floor)], line]))
    rng = np.random.default_rng([seed, 0x657870])
    middle = np.array(found).mean(axis=0)[1:]
    drawn_sd = middle + rng.normal(0.0, 1.0, (DRAWS, len(middle)))
    log_floor_s = np.repeat(np.linspace(-2.0, 1.5, 10), DRAWS // 10)
    return found + list(np.concatenate([log_floor_s[:, None], drawn_sd], axis=1))


def _refuse_few(law: str, runs: int, coefficients: int) -> None:
    if runs < coefficients:
        raise DataError(
            f"{runs} usable runs for the {coefficients} coefficients of the law {law!r}; it needs at least as many. "
            "Train more of them, or use a law with fewer coefficients (linear) or the regressor lightgbm."
        )


# Laws of tokens.


@dataclass(frozen=True, slots=True, kw_only=True)
class Power:
    """c + k * x^-alpha; x may be tokens or parameters."""

    floor: float
    scale: float
    alpha: float

    def predict(self, x: Floats) -> Floats:
        return self.floor + self.scale * np.asarray(x, dtype=np.float64) ** -self.alpha


def fit_power(x: Floats, loss: Floats, *, alphas: tuple[float, float] = (0.01, 3.0)) -> Power:
    return fit_powers([x], [loss], alphas=alphas)[0]


def fit_powers(
    xs: Sequence[Floats], losses: Sequence[Floats], *, alphas: tuple[float, float] = (0.01, 3.0)
) -> list[Power]:
    """Curves of one common alpha, each with its own c and k, by least squares.

    For a given alpha that is a linear problem; alpha is searched on a grid and refined. No sign is imposed: a curve
    that rises comes out with k < 0. (The step law of arXiv 2403.16952 shares alpha too; its code uses a Huber loss.)
    """
    for x, loss in zip(xs, losses, strict=True):
        if len(x) < 3 or len(set(x.tolist())) < 3:
            raise DataError(f"a power law of {len(x)} points; it needs 3 at different places. Evaluate more often.")
        if not (np.isfinite(x).all() and np.isfinite(loss).all() and (x > 0).all()):
            raise DataError(f"a power law of the points {x.tolist()}, {loss.tolist()}; it needs finite ones at x > 0.")

    curves = [(np.log(x) - np.log(x).mean(), loss) for x, loss in zip(xs, losses, strict=True)]
    alpha_a = np.geomspace(*alphas, 60)
    for _ in range(ZOOMS):
        error_a = np.sum([_straight(log_x, loss, alpha_a)[2] for log_x, loss in curves], axis=0)
        best = int(np.argmin(error_a))
        alpha_a = np.linspace(alpha_a[max(best - 1, 0)], alpha_a[min(best + 1, len(alpha_a) - 1)], 21)
    found: list[Power] = []
    for x, (log_x, loss) in zip(xs, curves, strict=True):
        floor_a, scale_a, _ = _straight(log_x, loss, alpha_a)
        alpha = float(alpha_a[10])
        unit = float(np.exp(alpha * np.log(x).mean()))
        found.append(Power(floor=float(floor_a[10]), scale=float(scale_a[10]) * unit, alpha=alpha))
    return found


def _straight(log_x: Floats, loss: Floats, alpha_a: Floats) -> tuple[Floats, Floats, Floats]:
    """For each alpha the best line of the loss over x^-alpha: its c, its k and the sum of its squares."""
    z_ax = np.exp(-alpha_a[:, None] * log_x)
    z_a = z_ax.mean(axis=1)
    z_ax = z_ax - z_a[:, None]
    scale_a = z_ax @ (loss - loss.mean()) / (z_ax**2).sum(axis=1)
    floor_a = loss.mean() - scale_a * z_a
    error_ax = loss - loss.mean() - scale_a[:, None] * z_ax
    return floor_a, scale_a, (error_ax**2).sum(axis=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnShare:
    """(fall * s^-beta + floor) * x^-alpha, x the domain's weight, s the tokens in units of a whole small run."""

    alpha: float
    beta: float
    fall: float
    floor: float

    def scale(self, s: float) -> float:
        return self.fall * s**-self.beta + self.floor

    def predict(self, weight: Floats, s: Floats) -> Floats:
        return (self.fall * s**-self.beta + self.floor) * weight**-self.alpha


def fit_own_share(weight: Floats, s: Floats, loss: Floats) -> OwnShare:
    """Where the domain has no weight the law has no answer: such rows are for the caller to leave out."""
    if len(loss) < 3:
        raise DataError(f"{len(loss)} measurements with a weight above 0; the law bimix needs 3. Train more runs.")
    moves = np.ptp(np.log(s)) > 1e-6  # else all were measured at one place, and it is loss = scale * x^-alpha

    def unpacked(at: Floats) -> OwnShare:
        fall, beta = (float(np.exp(at[2])), float(at[3])) if moves else (0.0, 1.0)
        return OwnShare(alpha=float(at[0]), floor=float(np.exp(at[1])), fall=fall, beta=beta)

    def residuals(at: Floats) -> Floats:
        return np.log(unpacked(at).predict(weight, s)) - np.log(loss)

    middle = float(np.log(np.median(loss)))
    best: tuple[float, Floats] | None = None
    for share in (0.1, 0.5, 0.9) if moves else (0.0,):
        for beta in (0.2, 0.6) if moves else (0.0,):
            start = np.array([0.1, middle + np.log(1.0 - share), middle + np.log(share or 1.0), beta])
            lo, hi = np.array([0.0, -30.0, -30.0, 1e-3]), np.array([5.0, 10.0, 10.0, 3.0])
            size = 4 if moves else 2
            end = least_squares(
                residuals, start[:size], bounds=(lo[:size], hi[:size]), xtol=1e-14, ftol=1e-14, gtol=1e-14
            )
            if best is None or end.cost < best[0] * (1 - 1e-9):
                best = (float(end.cost), end.x)
    assert best is not None
    return unpacked(best[1])
