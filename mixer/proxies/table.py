"""The table of small runs: what each was trained on, and the losses it reached on the way.

A row is one measurement of one run: `progress` is the share of the run's tokens that it had seen, `weights` the mean
mixture so far, `losses` what was measured then, by set (`target/x`, `validation/x`); NaN is what was not measured.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from mixer.core.errors import DataError

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class RunTable:
    domains: tuple[str, ...]
    run_r: tuple[str, ...]
    progress_r: Floats
    tokens_r: NDArray[np.int64]
    weights_rd: Floats
    losses: Mapping[str, Floats]
    quantity: Literal["loss", "influence"] = "loss"  # influence: minus what was predicted without training

    def __post_init__(self) -> None:
        rows = len(self.run_r)
        shapes = {"progress": (self.progress_r, (rows,)), "tokens": (self.tokens_r, (rows,))}
        shapes["weights"] = (self.weights_rd, (rows, len(self.domains)))
        shapes |= {f"losses of {name}": (loss_r, (rows,)) for name, loss_r in self.losses.items()}
        for key, (value, shape) in shapes.items():
            if value.shape != shape:
                raise DataError(f"a table of {rows} rows has {key} of shape {value.shape}; they need {shape}.")
