"""Skill-It (arXiv 2307.14430): weight by how much a domain helps the sets whose losses are high.

`graph[i][j]` says how much training on domain i helps set j. After every evaluation, with the losses of the last
`window` evaluations summed up:
    w_i proportional to prior_i * exp(eta * sum_j graph_ij * loss_j)
always from the prior, not from the weights before. Before the first evaluation every loss counts as 1. With the
losses held still, w is the maximum of eta * w . (graph @ loss) - KL(w | prior). Which losses: `validation`, one per
domain, where a graph that is left out is the identity; or `target`.

The authors make the graph offline, by training on one domain at a time: graph_ij = (loss_j(start) - loss_j(end)) /
loss_j(start), or an edge where training on i and j beats training on j alone.

Departures: the base is the prior (released: uniform weights; make the prior uniform for that); of the options of the
released code `relative` is here (losses divided by the first ones), and the decay of eta and of edges is not. A
loss that an evaluation lacks is taken from the one before, and does not count until it has been measured once.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from mixer.core.errors import ConfigError
from mixer.core.mirror import step
from mixer.core.mixture import unknown_domain
from mixer.core.ports import Setting, State
from mixer.core.signal import Signal


@dataclass(frozen=True, slots=True, kw_only=True)
class SkillIt:
    NEEDS: ClassVar[frozenset[str]] = frozenset({"evaluation"})
    graph: Mapping[str, Mapping[str, float]] = field(default_factory=dict[str, Mapping[str, float]])
    losses: Literal["validation", "target"] = "validation"
    eta: float = 0.2
    window: int = 3
    relative: bool = False

    def __post_init__(self) -> None:
        if self.losses not in ("validation", "target"):
            raise ConfigError(f"policy.losses={self.losses!r}; it needs to be validation or target.")
        if not 0 < self.eta < np.inf:
            raise ConfigError(f"policy.eta={self.eta!r}; it needs to be above 0.")
        if self.window < 1:
            raise ConfigError(f"policy.window={self.window}; it needs to be at least 1.")

    def start(self, setting: Setting) -> State:
        names = setting.catalog.names if self.losses == "validation" else setting.targets
        graph_ds = self._matrix(setting.catalog.names, names)
        return {
            "names": np.array(names, dtype=np.str_),
            "graph_ds": graph_ds,
            "prior_d": setting.prior.weights_d,
            "weights_d": step(setting.prior.weights_d, graph_ds.sum(1), self.eta),
            "first_s": np.ones(len(names)),
            "seen_s": np.zeros(len(names), dtype=np.bool_),
            "losses_ws": np.zeros((self.window, len(names))),  # the latest last
        }

    def update(self, state: State, signal: Signal) -> tuple[State, NDArray[np.float64]]:
        if signal.evaluation is None:
            return state, state["weights_d"]
        loss_s = signal.evaluation.at(self.losses, state["names"].tolist())
        known_s, seen_s, before_ws = np.isfinite(loss_s), state["seen_s"], state["losses_ws"]
        if not (known_s | seen_s).any():
            return state, state["weights_d"]
        loss_s = np.where(known_s, np.clip(loss_s, 0.0, 1e6), before_ws[-1])  # beyond any loss; sums stay finite
        first_s = np.where(known_s & ~seen_s, np.maximum(loss_s, 1e-6), state["first_s"])
        losses_ws = np.concatenate([before_ws[1:], loss_s[None]])
        total_s = losses_ws.sum(0) / (first_s if self.relative else 1.0)
        pull_d = np.clip(state["graph_ds"] @ total_s, -1e300, 1e300)
        weights_d = step(state["prior_d"], pull_d, self.eta)
        after = {"first_s": first_s, "seen_s": seen_s | known_s, "losses_ws": losses_ws, "weights_d": weights_d}
        return state | after, weights_d

    def _matrix(self, domains: tuple[str, ...], sets: tuple[str, ...]) -> NDArray[np.float64]:
        if not self.graph or not sets:
            if self.losses == "target":
                raise ConfigError(
                    "policy 'skill_it' has no graph from domains to targets. "
                    "Set policy.graph, or policy.losses=validation."
                )
            return np.eye(len(domains))
        matrix_ds = np.zeros((len(domains), len(sets)))
        for name, row in self.graph.items():
            if name not in domains:
                raise ConfigError(f"policy.graph names the {unknown_domain(name, domains)}")
            for other, weight in row.items():
                if other not in sets:
                    raise ConfigError(f"policy.graph.{name} names {other!r}; the {self.losses} sets are {sets}.")
                if not np.isfinite(weight):
                    raise ConfigError(f"policy.graph.{name}.{other} is {weight!r}. Give a finite number.")
                matrix_ds[domains.index(name), sets.index(other)] = weight
        return matrix_ds
