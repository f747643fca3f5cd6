"""Quad's rule at the level of domains (arXiv 2409.16986): domains are arms, pulled by upper confidence bounds.

    bound_i = R_i + explore * sqrt(2 ln(sum_j T_j) / T_i)

R_i is the running mean of the domain's benefit to the targets, T_i how often it was pulled. The `arms` domains of the
largest bounds share the weights in the ratios of the prior; `smoothing` of the whole goes to all domains alike. So a
domain that was hardly trained is looked into again, however poor it seemed.

A window has `arms` pulls, shared out by the rows that the domains gave; all begin at one pull. R is the mean over
probes of sum_t u_t C[i, t], C as `mixer.core.benefit` reads it (by columns: standard deviations over the domains, for
which `explore` = 1 is of the right size); what is below its noise counts as the mixture in force. `forget` f above 0
makes R an average that weighs the newest probe by f at least, since benefits drift.

Departures. Quad chooses rows out of some 10,000 clusters, estimates an arm's influence on a few of its rows when it is
pulled, and keeps rows above a threshold. Here a probe measures every domain, so that R is equally sure of all, and the
count stands for how far the model has been trained on each; rows are not chosen. Several arms with equal bounds at the
edge are all taken. Idea from the paper's abstract; constants are not known to us.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from mixer.core.benefit import Noise, Reading, Scale, require_targets
from mixer.core.errors import ConfigError
from mixer.core.mirror import Floats, answered, begin, check_share, normalised, smooth, total
from mixer.core.ports import Setting, State
from mixer.core.signal import Signal

TIE = 1e-9


@dataclass(frozen=True, slots=True, kw_only=True)
class QuadUcb:
    NEEDS: ClassVar[frozenset[str]] = frozenset({"influence"})
    explore: float = 1.0
    arms: float = 0.25  # below 1: the share of the domains, at least one; from 1 on: how many
    forget: float = 0.0
    smoothing: float = 0.1
    target_weights: Mapping[str, float] = field(default_factory=dict[str, float])
    scale: Scale = "columns"
    noise: Noise = "zero"
    noise_sigmas: float = 2.0
    memory: float = 0.0
    min_stability: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.explore < np.inf:
            raise ConfigError(f"policy.explore={self.explore!r}; it needs to be a finite number, 0 or more.")
        if not 0 < self.arms < np.inf or (self.arms > 1 and self.arms != int(self.arms)):
            raise ConfigError(
                f"policy.arms={self.arms!r}; it needs to be a share below 1, or a whole number of domains."
            )
        check_share("forget", self.forget)
        check_share("smoothing", self.smoothing)
        assert self.reading  # its options are judged as they are read

    @property
    def reading(self) -> Reading:
        return Reading.of(self)

    def start(self, setting: Setting) -> State:
        require_targets("quad_ucb", setting)
        num = len(setting.catalog)
        own = {"reward_d": np.zeros(num), "pulls_d": np.ones(num), "bound_d": np.zeros(num)}
        return begin(setting.prior.weights_d) | self.reading.start(setting) | own

    def update(self, state: State, signal: Signal) -> tuple[State, NDArray[np.float64]]:
        rows_d, arms = signal.rows_d.astype(np.float64), self._arms(len(signal.rows_d))
        pulled_d = arms * rows_d / max(total(rows_d), 1.0)
        state = state | {"pulls_d": state["pulls_d"] + pulled_d}
        found = signal.influence
        if found is None:
            return state, state["weights_d"]
        read = self.reading.read(state, found.benefit_dt, found.benefit_error_dt)
        if read is None:
            return state, state["weights_d"]
        state, benefits = read
        newest_d = (benefits.relative_dt * state["target_t"]).sum(1)
        share = max(1.0 / int(state["probes"]), self.forget)
        reward_d = (1.0 - share) * state["reward_d"] + share * newest_d
        bound_d = upper_bounds(reward_d, state["pulls_d"], self.explore)
        chosen_d = bound_d >= np.sort(bound_d)[-arms] - TIE
        share_d = np.where(chosen_d, state["prior_d"], 0.0)
        weights_d = smooth(normalised(share_d if share_d.any() else chosen_d.astype(np.float64)), self.smoothing)
        return answered(state, weights_d) | {"reward_d": reward_d, "bound_d": bound_d}, weights_d

    def _arms(self, num_domains: int) -> int:
        wanted = int(self.arms) if self.arms >= 1 else int(np.ceil(self.arms * num_domains))
        return min(max(wanted, 1), num_domains)


def upper_bounds(reward_d: Floats, pulls_d: Floats, explore: float) -> Floats:
    return reward_d + explore * np.sqrt(2.0 * np.log(total(pulls_d)) / pulls_d)
