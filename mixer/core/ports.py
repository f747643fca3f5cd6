"""The protocols by which floors meet: who decides mixtures, who takes measurements.

In a live run the controller's client is both. In a replay the saved `MixtureSchedule` is the feed.
In a test a list is.
"""

from typing import Protocol

from mixer.core.row import ScheduleRow
from mixer.core.signal import Signal


class MixtureFeed(Protocol):
    def row(self, window: int) -> ScheduleRow:
        """The window's row; blocks until it is decided. Asking again gives the same answer."""
        ...


class SignalSink(Protocol):
    def report(self, signal: Signal) -> None:
        """Take one window's measurement. Safe to repeat."""
        ...
