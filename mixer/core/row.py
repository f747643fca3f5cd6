"""One window's row of the schedule: what was decided, and all that its plan needs to know."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mixer.core.catalog import Catalog
from mixer.core.mixture import Mixture

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class ScheduleRow:
    """One window's commitment. `signals_through` is the last window whose signal it depends on, -1 for none."""

    window: int
    catalog: Catalog
    weights_d: Floats
    counts_d: Ints
    offsets_d: Ints
    carry_d: Floats
    signals_through: int = -1
    reason: str = "prior"

    @property
    def next_offsets_d(self) -> Ints:
        return self.offsets_d + self.counts_d

    @property
    def next_carry_d(self) -> Floats:
        return self.carry_d + self.weights_d * int(self.counts_d.sum()) - self.counts_d

    @property
    def mixture(self) -> Mixture:
        return Mixture(self.weights_d)
