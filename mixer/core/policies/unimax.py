"""UniMax (arXiv 2304.09151): as uniform as a limit on repetition allows.

Domains from the smallest to the largest; each gets an equal share of the budget that is left, but at most
`max_epochs` times its rows:  U = min(R / k, max_epochs * num_rows),  R -= U,  k -= 1;  w = U / sum(U).
The budget is the planned run's slots. In rows, not in tokens of text: rows have one length.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from mixer.core.errors import ConfigError
from mixer.core.ports import Setting, State
from mixer.core.signal import Signal


@dataclass(frozen=True, slots=True, kw_only=True)
class Unimax:
    NEEDS: ClassVar[frozenset[str]] = frozenset()
    max_epochs: float = 4.0
    budget_rows: int | None = None  # None: planned_windows * window_slots

    def __post_init__(self) -> None:
        if not self.max_epochs > 0:
            raise ConfigError(f"policy.max_epochs={self.max_epochs!r}; it needs to be above 0.")
        if self.budget_rows is not None and self.budget_rows < 1:
            raise ConfigError(f"policy.budget_rows={self.budget_rows}; it needs to be at least 1.")

    def start(self, setting: Setting) -> State:
        budget = self.budget_rows
        if budget is None:
            if setting.planned_windows is None:
                raise ConfigError("policy 'unimax' needs a budget. Plan the run's windows, or set policy.budget_rows.")
            budget = setting.planned_windows * setting.window_slots
        rows_d = setting.catalog.num_rows_d
        given_d, left = np.zeros(len(rows_d)), float(budget)
        for done, domain in enumerate(np.argsort(rows_d, kind="stable").tolist()):
            given_d[domain] = min(left / (len(rows_d) - done), self.max_epochs * float(rows_d[domain]))
            left -= given_d[domain]
        return {"weights_d": given_d / given_d.sum()}

    def update(self, state: State, signal: Signal) -> tuple[State, NDArray[np.float64]]:
        return state, state["weights_d"]
