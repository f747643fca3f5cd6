"""Rows are handed out in order, in groups, without waiting for one that is not decided."""

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from mixer.core.catalog import Catalog
from mixer.core.errors import ScheduleError
from mixer.core.mixture import Mixture
from mixer.core.plan import Geometry
from mixer.core.row import ScheduleRow
from mixer.core.schedule import MixtureSchedule
from mixer.data.decided import DecidedRows, Place
from tests.fakes import make_corpus

WAIT_S = 10.0


@pytest.fixture(scope="module")
def schedule(tmp_path_factory: pytest.TempPathFactory) -> MixtureSchedule:
    catalog = make_corpus(tmp_path_factory.mktemp("corpus"), {"a": 40, "b": 40}).catalog
    return MixtureSchedule(catalog, Geometry(window_steps=1, batch_rows=2)).extend(Mixture.uniform(catalog), 40)


@pytest.fixture
def place() -> Iterator[Place]:
    with Place(0) as place:
        yield place


class Gated:
    """A feed whose rows are there up to a window; asks are written down, and an ask behind it waits."""

    def __init__(self, schedule: MixtureSchedule, shown: int) -> None:
        self._schedule = schedule
        self._shown = shown
        self._change = threading.Condition()
        self.asked: list[int] = []

    def row(self, window: int) -> ScheduleRow:
        with self._change:
            self.asked.append(window)
            self._change.notify_all()
            assert self._change.wait_for(lambda: window < self._shown, WAIT_S)
        return self._schedule.row(window)

    def show(self, windows: int) -> None:
        with self._change:
            self._shown = windows
            self._change.notify_all()

    def wait_until_asked(self, window: int) -> None:
        with self._change:
            assert self._change.wait_for(lambda: window in self.asked, WAIT_S)


def windows(group: list[ScheduleRow]) -> list[int]:
    return [row.window for row in group]


def test_groups_are_full_while_the_consumer_is_far(schedule: MixtureSchedule, place: Place) -> None:
    feed = Gated(schedule, 40)
    with DecidedRows(feed, place.path, range(10, 21), ahead=100, most=4) as decided:
        assert [windows(decided.next_group()) for _ in range(4)] == [
            [10, 11, 12, 13],
            [14, 15, 16, 17],
            [18, 19, 20],
            [],
        ]


def test_what_is_there_is_handed_out_when_the_consumer_is_near(schedule: MixtureSchedule, place: Place) -> None:
    feed = Gated(schedule, 7)
    with DecidedRows(feed, place.path, range(40), ahead=100, most=4) as decided:
        feed.wait_until_asked(7)  # and so rows 0 to 6 are there
        assert windows(decided.next_group()) == [0, 1, 2, 3]
        place.move(1)
        assert windows(decided.next_group()) == [4, 5, 6]  # window 4 is 3 away
        feed.show(8)
        place.move(6)
        assert windows(decided.next_group()) == [7]
        feed.show(40)


def test_rows_wait_for_a_full_group_only_until_the_consumer_is_near(schedule: MixtureSchedule, place: Place) -> None:
    feed = Gated(schedule, 7)
    taken: list[list[int]] = []
    with DecidedRows(feed, place.path, range(40), ahead=100, most=4) as decided:
        feed.wait_until_asked(7)
        assert windows(decided.next_group()) == [0, 1, 2, 3]
        thread = threading.Thread(target=lambda: taken.append(windows(decided.next_group())))
        thread.start()
        thread.join(0.1)
        assert taken == []  # the consumer is at 0 and has four windows to go on with
        place.move(1)
        thread.join(WAIT_S)
        assert taken == [[4, 5, 6]]
        feed.show(40)


def test_one_is_asked_for_after_the_other_and_none_too_far_ahead(schedule: MixtureSchedule, place: Place) -> None:
    feed = Gated(schedule, 40)
    with DecidedRows(feed, place.path, range(40), ahead=5, most=2) as decided:
        assert decided.next_group()[0].window == 0
        feed.wait_until_asked(5)
        time.sleep(0.05)
        assert feed.asked == [0, 1, 2, 3, 4, 5]
        place.move(2)
        feed.wait_until_asked(7)
        time.sleep(0.05)
        assert feed.asked == [0, 1, 2, 3, 4, 5, 6, 7]


def test_an_error_comes_behind_the_rows_before_it(schedule: MixtureSchedule, place: Place) -> None:
    with DecidedRows(schedule, place.path, range(38, 50), ahead=100, most=8) as decided:
        assert windows(decided.next_group()) == [38, 39]
        with pytest.raises(ScheduleError, match="window 40 is not in the schedule"):
            decided.next_group()


def test_a_group_has_rows_of_one_catalog(schedule: MixtureSchedule, place: Place, tmp_path: Path) -> None:
    larger: Catalog = make_corpus(tmp_path, {"a": 40, "b": 40, "c": 40}).catalog
    switched = MixtureSchedule(schedule.catalog, schedule.geometry).extend(Mixture.uniform(schedule.catalog), 3)
    switched.append(switched.propose(Mixture.uniform(larger), catalog=larger))
    switched.extend(Mixture.uniform(larger), 2)
    place.move(-20)  # far, so that groups are as full as they may be
    with DecidedRows(switched, place.path, range(6), ahead=100, most=8) as decided:
        assert [windows(decided.next_group()) for _ in range(3)] == [[0, 1, 2], [3, 4, 5], []]


def test_nothing_is_asked_for_once_it_is_left(schedule: MixtureSchedule, place: Place) -> None:
    feed = Gated(schedule, 40)
    with DecidedRows(feed, place.path, range(40), ahead=2, most=1):
        feed.wait_until_asked(2)
    place.move(30)
    for thread in threading.enumerate():
        if thread.name == "mixer-decided":
            thread.join(WAIT_S)
    assert feed.asked == [0, 1, 2]


def test_the_place_is_a_file_that_goes_with_it() -> None:
    with Place(7) as place:
        assert np.memmap(place.path, np.int64, "r")[0] == 7
        place.move(9)
        assert np.memmap(place.path, np.int64, "r")[0] == 9
    assert not os.path.exists(place.path)
