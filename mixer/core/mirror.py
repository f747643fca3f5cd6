"""Mirror descent on mixtures: the one step that most mixing methods take, and what they take it from.

    w_i = base_i * exp(rate * score_i) / sum_k base_k * exp(rate * score_k)

is the mixture that maximises  rate * <score, w> - KL(w || base): exponentiated gradient. From the previous answer it
adds scores up (follow the regularised leader), from the prior or the average answer it does not. A number added to all
scores changes nothing, so benefits need not be centred for it.

Sums over domains are correctly rounded (`total`) or sorted first (`total_t`), so that no order of the domains changes
a bit of an answer.
"""

import math
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from mixer.core.errors import ConfigError
from mixer.core.ports import State

Floats = NDArray[np.float64]
Base = Literal["previous", "prior", "average"]
BASES = ("previous", "prior", "average")

LEAST = 1e-12  # a weight is never pushed below this, or it could not come back; what the base has at 0 stays there
MOST = 1e300  # the largest rate * score
TINY = 1e-300  # what is not above it is no number to divide by


def total(values: Floats) -> float:
    """The correctly rounded sum."""
    return math.fsum(values.tolist())


def total_t(values_dt: Floats) -> Floats:
    """The sum of each column, smallest first."""
    return np.sort(values_dt, axis=0).sum(0)


def normalised(weights_d: Floats) -> Floats:
    return weights_d / total(weights_d)


def step(base_d: Floats, score_d: Floats, rate: float = 1.0) -> Floats:
    """One step from a base; in log space, the largest power at 0, so that no score overflows."""
    with np.errstate(divide="ignore", over="ignore", under="ignore"):
        push_d = np.clip(rate * score_d, -MOST, MOST)
        power_d = np.log(base_d) + (push_d - push_d[base_d > 0].max())
        weights_d = normalised(np.exp(power_d - power_d.max()))
    low_d = (weights_d < LEAST) & (base_d > 0)
    return normalised(np.where(low_d, LEAST, weights_d)) if low_d.any() else weights_d


def smooth(weights_d: Floats, share: float) -> Floats:
    """(1 - share) of the mixture and `share` of the uniform one."""
    return weights_d if share == 0 else (1.0 - share) * weights_d + share / len(weights_d)


# ---- what a policy remembers of its answers ----------------------------------------------------------------------


def begin(prior_d: Floats) -> State:
    """weights_d: the last answer; average_d: the mean of all answers since the start, before any the prior."""
    return {
        "weights_d": prior_d.copy(),
        "prior_d": prior_d.copy(),
        "average_d": prior_d.copy(),
        "updates": np.array(0, dtype=np.int64),
    }


def base_of(state: State, base: Base) -> Floats:
    return state[{"previous": "weights_d", "prior": "prior_d", "average": "average_d"}[base]]


def answered(state: State, weights_d: Floats) -> State:
    """The state after one more answer."""
    count = int(state["updates"]) + 1
    average_d = state["average_d"] + (weights_d - state["average_d"]) / count if count > 1 else weights_d.copy()
    return state | {"weights_d": weights_d, "average_d": average_d, "updates": np.array(count, dtype=np.int64)}


# ---- options ---------------------------------------------------------------------------------------------------


def check_base(base: str) -> None:
    if base not in BASES:
        raise ConfigError(f"policy.base={base!r}; it needs to be one of {', '.join(BASES)}.")


def check_above_zero(key: str, value: float) -> None:
    if not 0 < value < math.inf:
        raise ConfigError(f"policy.{key}={value!r}; it needs to be a finite number above 0.")


def check_share(key: str, value: float) -> None:
    """A share that leaves something: 0 is allowed, 1 is not."""
    if not 0 <= value < 1:
        raise ConfigError(f"policy.{key}={value!r}; it needs to be at least 0 and below 1.")
