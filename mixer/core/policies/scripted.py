"""Mixtures written down beforehand, by fraction of the run: curricula and annealing.

Window k of a run of W windows lies at the fraction k / W, where it begins. Before the first stage its mixture
is in force, after the last stage that one's. In between, `step` keeps a stage's mixture until the next stage
begins, and `linear` goes straight from one to the next. Stages are a mapping by name, so that one can be
changed by an override: `policy.stages.anneal.at=0.9`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal, cast

import numpy as np
from numpy.typing import NDArray

from mixer.core.errors import ConfigError
from mixer.core.mixture import Mixture
from mixer.core.ports import Setting, State
from mixer.core.signal import Signal


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    at: float  # fraction of the run
    weights: Mapping[str, float] = field(default_factory=dict[str, float])  # none: the prior

    def __post_init__(self) -> None:
        if not 0 <= self.at <= 1:
            raise ConfigError(f"a stage at={self.at!r}; it needs to be 0 to 1, a fraction of the run.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Scripted:
    """Without stages it keeps the prior."""

    NEEDS: ClassVar[frozenset[str]] = frozenset()
    stages: dict[str, Stage] = field(default_factory=dict[str, Stage])
    between: Literal["linear", "step"] = "linear"
    normalize: bool = False

    def __post_init__(self) -> None:
        if self.between not in ("linear", "step"):
            raise ConfigError(f"policy.between={self.between!r}; it needs to be linear or step.")
        plain = cast(Mapping[str, Stage | dict[str, object]], self.stages)
        read = {name: Stage(**stage) if isinstance(stage, dict) else stage for name, stage in plain.items()}  # type: ignore[arg-type]  # judged by Stage
        object.__setattr__(self, "stages", read)
        if len({stage.at for stage in read.values()}) < len(read):
            raise ConfigError(f"stages at {[stage.at for stage in read.values()]}; no two may begin at one place.")

    def start(self, setting: Setting) -> State:
        if setting.planned_windows is None and self.stages:
            raise ConfigError("policy 'scripted' needs to know the run's length. Plan its windows.")
        stages = sorted(self.stages.values(), key=lambda stage: stage.at) or [Stage(at=0.0)]
        mixtures = [
            Mixture.from_dict(setting.catalog, stage.weights, normalize=self.normalize)
            if stage.weights
            else setting.prior
            for stage in stages
        ]
        return {
            "at_m": np.array([stage.at for stage in stages]),
            "weights_md": np.stack([mixture.weights_d for mixture in mixtures]),
            "first_window": np.array(setting.first_window, dtype=np.int64),
            "planned_windows": np.array(setting.planned_windows or 1, dtype=np.int64),
        }

    def update(self, state: State, signal: Signal) -> tuple[State, NDArray[np.float64]]:
        at_m, weights_md = state["at_m"], state["weights_md"]
        here = (signal.window + int(state["first_window"])) / int(state["planned_windows"])
        stage = max(int(np.searchsorted(at_m, here, side="right")) - 1, 0)
        if self.between == "step" or stage + 1 == len(at_m) or here <= at_m[stage]:
            return state, weights_md[stage].copy()
        part = (here - at_m[stage]) / (at_m[stage + 1] - at_m[stage])
        return state, (1.0 - part) * weights_md[stage] + part * weights_md[stage + 1]
