"""Between natural and uniform: w_i proportional to num_rows_i ** exponent.

The exponent is 1 / temperature: 1 is natural, 0 uniform. Multilingual models use 0.3 to 0.7. Small domains
may repeat many times under a small exponent; `rails.max_epochs` bounds that.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from mixer.core.errors import ConfigError
from mixer.core.ports import Setting, State
from mixer.core.signal import Signal


@dataclass(frozen=True, slots=True, kw_only=True)
class Temperature:
    NEEDS: ClassVar[frozenset[str]] = frozenset()
    exponent: float = 0.3

    def __post_init__(self) -> None:
        if not 0 <= self.exponent <= 1:
            raise ConfigError(f"policy.exponent={self.exponent!r}; it needs to be 0 (uniform) to 1 (natural).")

    def start(self, setting: Setting) -> State:
        power_d = setting.catalog.num_rows_d.astype(np.float64) ** self.exponent
        return {"weights_d": power_d / power_d.sum()}

    def update(self, state: State, signal: Signal) -> tuple[State, NDArray[np.float64]]:
        return state, state["weights_d"]
