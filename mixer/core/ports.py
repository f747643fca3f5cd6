"""The protocols by which floors meet: who decides mixtures, who takes measurements, how a mixture is found.

In a live run the controller's client is both feed and sink. In a replay the saved `MixtureSchedule` is the
feed. In a test a list is.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from mixer.core.catalog import Catalog
from mixer.core.errors import ConfigError
from mixer.core.mixture import Mixture
from mixer.core.row import ScheduleRow
from mixer.core.signal import Signal

State = dict[str, NDArray[Any]]  # all that a policy remembers: saved exactly, compared in tests


class MixtureFeed(Protocol):
    def row(self, window: int) -> ScheduleRow:
        """The window's row; blocks until it is decided. Asking again gives the same answer."""
        ...


class SignalSink(Protocol):
    """Where one rank reports what all of them measured."""

    def report(self, signal: Signal, record: Mapping[str, Any] | None = None) -> None:
        """Take one window's measurement, and what people may want to know of it. Safe to repeat; does not wait."""
        ...

    def settle(self) -> None:
        """Returns when all that was reported is durable, so that nobody will ask for it again."""
        ...

    def note(self, record: Mapping[str, Any]) -> None:
        """Something for people to read. It may be lost; it does not wait."""
        ...

    def wants_stop(self) -> bool:
        """Whether somebody asked the run to save itself and end."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What a policy is told once, at the start of a run.

    The `first_window` (lag_windows + 1) windows from `start_window` on carry the prior; the signal of window j
    decides window j + `first_window`. So a policy finds how far the run is from the signal's own number, not by
    counting its calls: a window whose signal was refused is never shown to it, and must not shift a script. A
    policy that measures nothing is also asked with `first_window` 0, of window j itself.
    """

    catalog: Catalog
    prior: Mixture
    window_slots: int
    window_steps: int = 1
    first_window: int = 1
    start_window: int = 0  # the first window whose signal the policy is shown: where a fork begins, else 0
    planned_windows: int | None = None  # None: the run ends when somebody ends it
    targets: tuple[str, ...] = ()  # what the run is to become good at, as far as it is measured

    def __post_init__(self) -> None:
        if self.window_slots < 1 or self.window_steps < 1 or self.first_window < 0:
            found = f"window_slots={self.window_slots}, window_steps={self.window_steps}"
            raise ConfigError(f"{found}, first_window={self.first_window}; they need to be at least 1, 1 and 0.")
        if self.start_window < 0:
            raise ConfigError(f"start_window={self.start_window}; it needs to be at least 0.")
        if self.planned_windows is not None and self.planned_windows < 1:
            raise ConfigError(f"planned_windows={self.planned_windows}; it needs to be at least 1.")
        if len(self.prior) != len(self.catalog):
            raise ConfigError(f"a prior of {len(self.prior)} weights for a catalog of {len(self.catalog)} domains.")


class Policy(Protocol):
    """(state, signal) -> (state, weights); a frozen dataclass whose fields are its options.

    No files, clock, randomness or memory outside its state, which `start` makes and `update` never changes in
    place. It is given one `Setting` and not a catalog and a prior only, because a script needs the length of
    the run and a budget its slots; what later policies need is one more field there, and no other signature.
    It answers with an array of any scale rather than a `Mixture`: the rails judge and normalise all answers
    alike, so a slip of a policy holds the last mixture instead of ending the run.
    """

    NEEDS: ClassVar[frozenset[str]]  # what the workers must measure, see `mixer.core.signal`

    def start(self, setting: Setting) -> State: ...

    def update(self, state: State, signal: Signal) -> tuple[State, NDArray[np.float64]]: ...
