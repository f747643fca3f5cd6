"""How policies read probes: target weights by name, columns on one scale, nothing made of noise.

    reading = Reading(target_weights={"code": 2.0}, scale="columns", noise_sigmas=2.0)
    state |= reading.start(setting)
    state, found = reading.read(state, signal.influence.benefit_dt, signal.influence.benefit_error_dt)

`found.relative_dt[i, t]` is B[i, t] - sum_k w_k B[k, t], with w the last answer (`weights_d`): by how much a little
weight moved from everybody to domain i lowers target t's loss. Positive is good. In this order:

1. *Memory.* With `memory` m above 0 the benefits of successive probes are averaged, m of the old and 1 - m of the
   new, and their errors with them; but in a target's column only while its ranking of the domains is stable: Spearman's
   correlation of the new column with the average of before above `min_stability`. Else the column begins anew.
2. *Centre.* The weighted mean is subtracted. The error of the difference is the domain's own, (1 - w_i) s_i: what is
   wrong about the mean is wrong for all alike and moves nobody, and one noisy domain must not hide all others.
3. *Noise.* What is below its noise counts as unknown, and so does what was not measured (NaN): its difference from the
   mean is taken to be 0. With k = `noise_sigmas` and s the error, `noise="zero"` does so to every |C| < k s and keeps
   all else, `noise="shrink"` multiplies C by max(0, 1 - (k s)^2 / C^2). An error that is not known (a probe of one
   part) counts as none. The rule looks at the difference and not at B itself: a worthless domain has a small B, and
   that is known.
4. *Scale.* `columns` divides each target's column by its standard deviation over the domains, so that no target
   counts more because its gradients are long; `all` divides the whole matrix by one (the root mean square of those),
   which keeps the targets' proportions; `none` leaves it. Deviations are taken before the noise rule.

A target of weight 0 has no say (but in the one divisor of `all`). Weights are given by name, and are 1 for targets that
are not named.
"""

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from mixer.core.errors import ConfigError, SignalError
from mixer.core.mirror import TINY, Floats, check_share, total, total_t
from mixer.core.ports import Setting, State

Scale = Literal["none", "columns", "all"]
Noise = Literal["zero", "shrink"]
SCALES, NOISES = ("none", "columns", "all"), ("zero", "shrink")
MOST = 1e150  # the largest benefit, so that squares stay finite
ROUNDING = 1e-12  # a deviation this small, next to the benefits, is none


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Benefits:
    """A probe as it was read; finite throughout."""

    relative_dt: Floats  # to the weighted mean; 0 where unknown
    value_dt: Floats  # the same with the mean, on the same scale: what P_t(w) = sum_i w_i value[i, t] is made of
    error_dt: Floats  # of a benefit itself, on the same scale; 0 where unknown


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """The options, under the names they have in every policy that reads probes."""

    target_weights: Mapping[str, float] = field(default_factory=dict[str, float])
    scale: Scale = "columns"
    noise: Noise = "zero"
    noise_sigmas: float = 2.0
    memory: float = 0.0
    min_stability: float = 0.5

    def __post_init__(self) -> None:
        if self.scale not in SCALES:
            raise ConfigError(f"policy.scale={self.scale!r}; it needs to be one of {', '.join(SCALES)}.")
        if self.noise not in NOISES:
            raise ConfigError(f"policy.noise={self.noise!r}; it needs to be one of {', '.join(NOISES)}.")
        if not 0 <= self.noise_sigmas < math.inf:
            raise ConfigError(f"policy.noise_sigmas={self.noise_sigmas!r}; it needs to be a finite number, 0 or more.")
        check_share("memory", self.memory)
        if not -1 <= self.min_stability <= 1:
            raise ConfigError(f"policy.min_stability={self.min_stability!r}; it needs to be -1 to 1, a correlation.")
        for name, weight in self.target_weights.items():
            if not 0 <= weight < math.inf:
                raise ConfigError(
                    f"policy.target_weights.{name}={weight!r}; it needs to be a finite number, 0 or more."
                )

    @classmethod
    def of(cls, policy: object) -> "Reading":
        """The options of a policy, which has all of these fields."""
        return cls(**{option.name: getattr(policy, option.name) for option in fields(cls)})

    def start(self, setting: Setting) -> State:
        """target_t: the targets' weights, summing to 1. The rest: what is known of the benefits."""
        shape = (len(setting.catalog), len(setting.targets))
        return {
            "target_t": target_weights(self.target_weights, setting.targets),
            "benefit_dt": np.zeros(shape),
            "error_dt": np.zeros(shape),
            "known_dt": np.zeros(shape, dtype=np.bool_),
            "probes": np.array(0, dtype=np.int64),
            "stability": np.array(1.0),  # of the rankings since the probe before: Spearman, mean over targets
        }

    def read(
        self, state: State, benefit_dt: Floats, error_dt: Floats, loss_t: Floats | None = None
    ) -> tuple[State, Benefits] | None:
        """What one more probe says; None if nothing that counts was measured. `state` has `weights_d`, too.

        With the targets' losses, benefits are those to the logarithms of the losses.
        """
        target_t = state["target_t"]
        if benefit_dt.shape[1] != len(target_t):
            raise SignalError(
                f"a probe of {benefit_dt.shape[1]} targets; the policy began with {len(target_t)}. "
                "Give it the targets of the run."
            )
        if loss_t is not None:
            loss_t = np.where(loss_t > 0, loss_t, np.nan)
            benefit_dt, error_dt = benefit_dt / loss_t, error_dt / loss_t
        if not np.isfinite(benefit_dt[:, target_t > 0]).any():
            return None
        state = self._remembered(state, *_bounded(benefit_dt, error_dt))
        return state, self._judged(state["weights_d"], state["benefit_dt"], state["error_dt"], state["known_dt"])

    def once(self, weights_d: Floats, benefit_dt: Floats, error_dt: Floats) -> Benefits:
        """What a probe says by itself, without memory: for matrices that would make a large state."""
        known_dt, (benefit_dt, error_dt) = np.isfinite(benefit_dt), _bounded(benefit_dt, error_dt)
        benefit_dt, error_dt = np.where(known_dt, benefit_dt, 0.0), np.where(known_dt, error_dt, 0.0)
        return self._judged(weights_d, benefit_dt, error_dt, known_dt)

    def _remembered(self, state: State, benefit_dt: Floats, error_dt: Floats) -> State:
        old_dt, was_dt, target_t = state["benefit_dt"], state["known_dt"], state["target_t"]
        known_dt = np.isfinite(benefit_dt)
        both_dt = known_dt & was_dt
        stability_t = np.array([spearman(old_dt[b, t], benefit_dt[b, t]) for t, b in enumerate(both_dt.T)])
        seen = total(target_t[both_dt.any(0)])
        stability = total((target_t * stability_t)[both_dt.any(0)]) / seen if seen > 0 else 1.0
        keep, stable_t = self.memory, stability_t > self.min_stability
        keep_dt = both_dt & stable_t
        mean_dt = np.where(keep_dt, keep * old_dt + (1.0 - keep) * benefit_dt, benefit_dt)
        spread_dt = np.where(keep_dt, np.hypot(keep * state["error_dt"], (1.0 - keep) * error_dt), error_dt)
        still_dt = was_dt & ~known_dt & stable_t & (keep > 0)  # not measured this time, but before
        return state | {
            "benefit_dt": np.where(still_dt, old_dt, np.where(known_dt, mean_dt, 0.0)),
            "error_dt": np.where(still_dt, state["error_dt"], np.where(known_dt, spread_dt, 0.0)),
            "known_dt": known_dt | still_dt,
            "probes": np.array(int(state["probes"]) + 1, dtype=np.int64),
            "stability": np.array(stability),
        }

    def _judged(self, weights_d: Floats, benefit_dt: Floats, error_dt: Floats, known_dt: NDArray[np.bool_]) -> Benefits:
        relative_dt, mean_t, noise_dt = centred(benefit_dt, error_dt, known_dt, weights_d)
        scale_t = np.ones(len(mean_t)) if self.scale == "none" else self._deviations(benefit_dt, relative_dt, known_dt)
        kept_dt = self.heard(relative_dt, noise_dt)
        value_dt = np.where(kept_dt == relative_dt, np.where(known_dt, benefit_dt, mean_t), mean_t + kept_dt)
        return Benefits(relative_dt=kept_dt / scale_t, value_dt=value_dt / scale_t, error_dt=error_dt / scale_t)

    def _deviations(self, benefit_dt: Floats, relative_dt: Floats, known_dt: NDArray[np.bool_]) -> Floats:
        """By what to divide the columns; where all benefits are equal, the largest of them."""
        count_t = np.maximum(known_dt.sum(0), 1)
        around_dt = np.where(known_dt, relative_dt - total_t(relative_dt) / count_t, 0.0)
        largest_t = np.maximum(np.abs(benefit_dt).max(0, initial=0.0), TINY)
        deviation_t = largest_t * np.sqrt(total_t((around_dt / largest_t) ** 2) / count_t)
        deviation_t = np.where(deviation_t > ROUNDING * largest_t, deviation_t, 0.0)
        if self.scale == "all":
            most = max(float(deviation_t.max(initial=0.0)), TINY)
            root = most * math.sqrt(total((deviation_t / most) ** 2) / max(len(deviation_t), 1))
            deviation_t = np.full_like(deviation_t, root)
            largest_t = np.full_like(largest_t, largest_t.max(initial=TINY))
        return np.where(deviation_t > 0, deviation_t, largest_t)

    def heard(self, value: Floats, error: Floats) -> Floats:
        """Values without what is below its noise."""
        if self.noise == "zero":
            return np.where(np.abs(value) < self.noise_sigmas * error, 0.0, value)
        with np.errstate(divide="ignore", invalid="ignore"):
            share = 1.0 - (self.noise_sigmas * error / value) ** 2
        return np.where(value == 0, 0.0, value * np.maximum(share, 0.0))


def _bounded(benefit_dt: Floats, error_dt: Floats) -> tuple[Floats, Floats]:
    """Numbers whose squares are finite, with errors that are not known as 0; what was not measured stays NaN."""
    error_dt = np.where(np.isfinite(error_dt), error_dt, 0.0)
    return np.clip(benefit_dt, -MOST, MOST), np.minimum(error_dt, MOST)


def centred(
    benefit_dt: Floats, error_dt: Floats, known_dt: NDArray[np.bool_], weights_d: Floats
) -> tuple[Floats, Floats, Floats]:
    """Differences from the weighted mean of what is known, that mean, and the errors of the differences."""
    weight_dt = np.where(known_dt, weights_d[:, None], 0.0)
    sum_t = total_t(weight_dt)
    even_t = ~(sum_t > 0)  # known only of domains that have no weight: then all of them count alike
    weight_dt = np.where(even_t, known_dt.astype(np.float64), weight_dt)
    share_dt = weight_dt / np.maximum(np.where(even_t, total_t(weight_dt), sum_t), TINY)
    mean_t = total_t(share_dt * benefit_dt)
    relative_dt = np.where(known_dt, benefit_dt - mean_t, 0.0)
    return relative_dt, mean_t, np.maximum(1.0 - share_dt, 0.0) * error_dt


def target_weights(named: Mapping[str, float], targets: tuple[str, ...]) -> Floats:
    """Weights in the targets' order, summing to 1."""
    for name in named:
        if name not in targets:
            nearest = difflib.get_close_matches(name, targets, n=1, cutoff=0.0)
            known = f"The nearest target of the run is {nearest[0]!r}" if nearest else "The run has no targets"
            raise ConfigError(f"policy.target_weights names {name!r}, which is no target. {known}. Correct the name.")
    weight_t = np.array([named.get(name, 1.0) for name in targets], dtype=np.float64)
    if len(targets) and not weight_t.any():
        raise ConfigError(
            f"policy.target_weights are 0 for every target: {', '.join(targets)}. Give one of them some weight."
        )
    return weight_t / weight_t.max() / total(weight_t / weight_t.max()) if len(targets) else weight_t


def require_targets(kind: str, setting: Setting) -> None:
    """For policies that have nothing to go by without a target."""
    if not setting.targets:
        raise ConfigError(
            f"policy {kind!r} moves weights toward targets, and the run has none. Give the run targets, "
            "or take a policy that needs none."
        )


def spearman(one: Floats, other: Floats) -> float:
    """Rank correlation, ties at their mean rank; 1 where there is nothing to rank."""
    if len(one) < 2:
        return 1.0
    a, b = _ranks(one), _ranks(other)
    a, b = a - (len(a) - 1) / 2, b - (len(b) - 1) / 2
    size = math.sqrt(total(a * a) * total(b * b))
    return total(a * b) / size if size > 0 else float((a == b).all())


def _ranks(values: Floats) -> Floats:
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(count) - (count + 1) / 2)[place]
