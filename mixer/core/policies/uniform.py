"""Every domain alike, however many rows it has."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from mixer.core.mixture import Mixture
from mixer.core.ports import Setting, State
from mixer.core.signal import Signal


@dataclass(frozen=True, slots=True, kw_only=True)
class Uniform:
    """Keeps `Mixture.uniform` of the run's catalog."""

    NEEDS: ClassVar[frozenset[str]] = frozenset()

    def start(self, setting: Setting) -> State:
        return {"weights_d": Mixture.uniform(setting.catalog).weights_d}

    def update(self, state: State, signal: Signal) -> tuple[State, NDArray[np.float64]]:
        return state, state["weights_d"]
