"""One mixture for the whole run."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from mixer.core.mixture import Mixture
from mixer.core.ports import Setting, State
from mixer.core.signal import Signal


@dataclass(frozen=True, slots=True, kw_only=True)
class Fixed:
    """Keeps the weights it was given; without any, the prior."""

    NEEDS: ClassVar[frozenset[str]] = frozenset()
    weights: Mapping[str, float] = field(default_factory=dict[str, float])
    normalize: bool = False

    def start(self, setting: Setting) -> State:
        mixture = setting.prior
        if self.weights:
            mixture = Mixture.from_dict(setting.catalog, self.weights, normalize=self.normalize)
        return {"weights_d": mixture.weights_d}

    def update(self, state: State, signal: Signal) -> tuple[State, NDArray[np.float64]]:
        return state, state["weights_d"]
