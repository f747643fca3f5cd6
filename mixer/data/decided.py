"""Which windows a rank's task reads next, and how many of them at once.

Everything that travels through Ray Data has a cost of its own, tens of milliseconds of which are Ray's. So
windows that are decided already travel together, up to a size, as long as the consumer has others to go on with;
once it comes near, whatever is there is sent. A window never waits for one that is not decided yet.
"""

import os
import tempfile
import threading
import time
from collections import deque
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from mixer.core.ports import MixtureFeed
from mixer.core.row import ScheduleRow

SHORT_WAIT_S, LONG_WAIT_S = 0.0005, 0.01  # between looks at the window that is consumed


class Place:
    """The window that is consumed, in a small file where tasks on this node can see it."""

    def __init__(self, window: int) -> None:
        number, self.path = tempfile.mkstemp(prefix=f"mixer-stream-{os.getpid()}-")
        os.close(number)
        np.array([window], np.int64).tofile(self.path)
        self._window_1 = np.memmap(self.path, np.int64, "r+")

    def __enter__(self) -> "Place":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.unlink(self.path)

    def move(self, window: int) -> None:
        self._window_1[0] = window


class DecidedRows:
    """The rows of windows in order, in groups; asked of the feed one after the other, in a thread of its own.

    A row is asked for once the one before it is there, and no further than `ahead` windows beyond the one that is
    consumed. A group has `most` rows of one catalog at most; it has fewer where windows end, or where the consumer
    is less than `most` windows away and no more rows are there. Of an error of the feed the rows before it come first.
    """

    def __init__(self, feed: MixtureFeed, place: str, windows: range, *, ahead: int, most: int) -> None:
        self._feed, self._windows, self._ahead, self._most = feed, windows, ahead, most
        self._consumed_1: NDArray[np.int64] = np.memmap(place, np.int64, "r")
        self._rows: deque[ScheduleRow] = deque()
        self._error: BaseException | None = None
        self._is_over = False  # nothing more is asked for
        self._is_left = False  # nobody takes any more
        self._change = threading.Condition()

    def __enter__(self) -> "DecidedRows":
        threading.Thread(target=self._ask, name="mixer-decided", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._is_left = True

    def next_group(self) -> list[ScheduleRow]:
        """Empty at the end of the windows."""
        group: list[ScheduleRow] = []
        with self._change:
            while not self._is_due():
                self._change.wait(LONG_WAIT_S)
            while self._rows and len(group) < self._most and _are_of_one_catalog(self._rows[0], *group[:1]):
                group.append(self._rows.popleft())
        if not group and self._error is not None:
            raise self._error
        return group

    def _is_due(self) -> bool:
        if self._is_over or self._is_left or len(self._rows) >= self._most:
            return True
        return bool(self._rows) and self._rows[0].window - self._consumed_1[0] < self._most

    def _ask(self) -> None:
        try:
            for window in self._windows:
                self._wait_until_near(window)
                if self._is_left:
                    return
                row = self._feed.row(window)
                with self._change:
                    self._rows.append(row)
                    self._change.notify()
        except BaseException as error:
            self._error = error
        with self._change:
            self._is_over = True
            self._change.notify()

    def _wait_until_near(self, window: int) -> None:
        wait_s = SHORT_WAIT_S
        while window > self._consumed_1[0] + self._ahead and not self._is_left:
            time.sleep(wait_s)
            wait_s = min(LONG_WAIT_S, wait_s * 1.25)


def _are_of_one_catalog(row: ScheduleRow, *others: ScheduleRow) -> bool:
    return all(row.catalog is other.catalog or row.catalog.fingerprint == other.catalog.fingerprint for other in others)
