from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from mixer.core.catalog import Catalog, Domain
from mixer.core.errors import ConfigError, ScheduleError
from mixer.core.permute import key_of, mix, shuffle
from mixer.core.plan import Cursor, Geometry, Plan, WindowPlan, plan_window, plan_windows
from mixer.core.row import ScheduleRow
from mixer.core.schedule import MixtureSchedule
from tests.core.making import (
    catalog_of,
    catalog_of_sizes,
    mixture_of,
    pairs,
    relative,
    rows_of,
    schedule_of,
    windows_of,
)

GEOMETRY = Geometry(window_steps=4, batch_rows=6, seed=7, block_rows=4, group_blocks=2)
CATALOG = catalog_of(books=10, code=30, web=60)


def whole_pass(size: int, name: str, seed: int, number: int, geometry: Geometry) -> list[int]:
    """The order of one pass over a domain, from names and numbers alone."""
    key = mix(mix(np.array([key_of("domain", name)], dtype=np.uint64), seed), number)
    streams = np.zeros(size, dtype=np.int64)
    return shuffle(np.arange(size), streams, np.array([size]), key, geometry.block_rows, geometry.group_blocks).tolist()


def row_at(catalog: Catalog, counts: list[int], offsets: list[int], window: int = 0) -> ScheduleRow:
    """A row as it may stand anywhere in a run."""
    count_d = np.array(counts, dtype=np.int64)
    return ScheduleRow(
        window,
        catalog,
        count_d / count_d.sum(),
        count_d,
        np.array(offsets, dtype=np.int64),
        np.zeros(len(counts)),
    )


# ---- geometry and cursor -----------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["window_steps", "batch_rows", "block_rows", "group_blocks"])
def test_a_geometry_needs_at_least_one_of_everything(key: str) -> None:
    with pytest.raises(ConfigError, match=f"{key} is 0; it must be at least 1"):
        Geometry(**{key: 0})


@pytest.mark.parametrize("seed", [-1, 1 << 63])
def test_a_seed_out_of_range_is_refused(seed: int) -> None:
    with pytest.raises(ConfigError, match=rf"seed is {seed}; it must be 0 to 2\*\*63 - 1"):
        Geometry(seed=seed)


def test_ranks_take_neighbouring_slots_and_may_be_uneven() -> None:
    geometry = Geometry(batch_rows=8)
    assert [geometry.rank_slots(rank, 3) for rank in range(3)] == [slice(0, 2), slice(2, 5), slice(5, 8)]
    assert geometry.rank_slots(0, 1) == slice(0, 8)
    assert [geometry.rank_slots(rank, 8).start for rank in range(8)] == list(range(8))


def test_every_number_of_ranks_shares_a_step_without_gap_or_overlap() -> None:
    for batch_rows in (1, 2, 7, 64, 100):
        geometry = Geometry(batch_rows=batch_rows)
        for world_size in range(1, batch_rows + 1):
            parts = [geometry.rank_slots(rank, world_size) for rank in range(world_size)]
            assert parts[0].start == 0
            assert parts[-1].stop == batch_rows
            assert all(a.stop == b.start for a, b in pairwise(parts))
            sizes = {part.stop - part.start for part in parts}
            assert max(sizes) - min(sizes) <= 1
            assert min(sizes) >= 1


def test_ranks_that_do_not_exist_or_would_get_no_row_are_refused() -> None:
    geometry = Geometry(batch_rows=4)
    with pytest.raises(ConfigError, match="rank 2 of 2; it must be 0 to 1"):
        geometry.rank_slots(2, 2)
    with pytest.raises(ConfigError, match="rank -1 of 2"):
        geometry.rank_slots(-1, 2)
    with pytest.raises(ConfigError, match="5 ranks share steps of batch_rows=4; some would get no row"):
        geometry.rank_slots(0, 5)


def test_a_cursor_counts_steps_through_windows() -> None:
    assert Cursor.at(0, GEOMETRY) == Cursor(0, 0)
    assert Cursor.at(11, GEOMETRY) == Cursor(2, 3)
    assert Cursor(2, 3).steps(GEOMETRY) == 11
    assert Cursor(2, 3).after(1, GEOMETRY) == Cursor(3, 0)
    assert Cursor(2, 3).after(0, GEOMETRY) == Cursor(2, 3)
    assert sorted([Cursor(1, 0), Cursor(0, 3), Cursor(0, 1)]) == [Cursor(0, 1), Cursor(0, 3), Cursor(1, 0)]
    assert Cursor.from_dict(Cursor(2, 3).to_dict()) == Cursor(2, 3)
    assert Cursor(10**15, 3).after(10**6, GEOMETRY).steps(GEOMETRY) == 4 * 10**15 + 3 + 10**6


# ---- which rows --------------------------------------------------------------------------------------


def test_a_window_holds_the_counts_of_its_row() -> None:
    schedule = schedule_of(CATALOG, GEOMETRY, [mixture_of(0.25, 0.25, 0.5)])
    (window,) = windows_of(schedule)
    assert np.bincount(window.domain_n).tolist() == [6, 6, 12]
    assert (window.window, window.catalog, window.geometry) == (0, CATALOG, GEOMETRY)
    assert window.domain_n.dtype == np.int32
    assert window.row_n.dtype == np.int64


def test_a_domain_gives_the_rows_of_its_passes_in_their_order() -> None:
    schedule = schedule_of(CATALOG, GEOMETRY, [mixture_of(0.25, 0.25, 0.5)] * 12)
    for domain, (name, size) in enumerate([("books", 10), ("code", 30), ("web", 60)]):
        given = rows_of(schedule, domain)
        passes = [row for number in range(10) for row in whole_pass(size, name, 7, number, GEOMETRY)]
        assert given == passes[: len(given)]
        assert len(given) == 12 * (12 if name == "web" else 6)


def test_passes_differ_and_their_numbers_are_told() -> None:
    schedule = schedule_of(CATALOG, GEOMETRY, [mixture_of(1, 0, 0)] * 5)
    windows = windows_of(schedule)
    assert np.concatenate([window.pass_n for window in windows]).tolist() == [i // 10 for i in range(120)]
    given = rows_of(schedule, 0)
    orders = [tuple(given[i : i + 10]) for i in range(0, 120, 10)]
    assert all(sorted(order) == list(range(10)) for order in orders)
    assert len(set(orders)) == 12


def test_many_passes_in_one_window() -> None:
    (window,) = windows_of(schedule_of(catalog_of(one=1, three=3), GEOMETRY, [mixture_of(0.5, 0.5)]))
    assert sorted(window.pass_n[window.domain_n == 0].tolist()) == list(range(12))
    assert set(window.row_n[window.domain_n == 0].tolist()) == {0}
    three = window.row_n[window.domain_n == 1].tolist()
    assert all(sorted(three[i : i + 3]) == [0, 1, 2] for i in range(0, 12, 3))


def test_one_domain_of_one_row_and_windows_of_one_slot() -> None:
    geometry = Geometry(window_steps=1, batch_rows=1)
    schedule = schedule_of(catalog_of(only=1), geometry, [mixture_of(1.0)] * 3)
    assert [pairs(window) for window in windows_of(schedule)] == [[(0, 0)]] * 3
    schedule = schedule_of(catalog_of(a=2, b=1), geometry, [mixture_of(0.75, 0.25)] * 8)
    assert [pairs(window)[0][0] for window in windows_of(schedule)] == [0, 0, 1, 0, 0, 0, 1, 0]


def test_five_thousand_domains_in_one_window() -> None:
    catalog = catalog_of_sizes([1 + i % 7 for i in range(5_000)])
    geometry = Geometry(window_steps=10, batch_rows=1_000)
    (window,) = windows_of(schedule_of(catalog, geometry, [relative([1.0] * 5_000)]))
    assert np.bincount(window.domain_n).tolist() == [2] * 5_000
    assert (window.row_n < catalog.num_rows_d[window.domain_n]).all()


@pytest.mark.parametrize("offset", [(1 << 47) - 3, (1 << 47) + 12345, (1 << 48) - 12, 5 * (1 << 48) - 7])
def test_far_down_the_largest_domain(offset: int) -> None:
    size = 1 << 48
    window = plan_window(row_at(catalog_of(huge=size), [24], [offset]), GEOMETRY)
    key = mix(mix(np.array([key_of("domain", "huge")], dtype=np.uint64), 7), np.arange(6))
    for place, (number, row) in enumerate(zip(window.pass_n.tolist(), window.row_n.tolist(), strict=True)):
        assert number == (offset + place) // size
        alone = shuffle(np.array([(offset + place) % size]), np.array([number]), np.full(6, size), key, 4, 2)
        assert row == alone[0]


def test_a_pass_ends_at_its_last_row_and_the_next_begins_in_the_same_window() -> None:
    for offset in range(31):
        window = plan_window(row_at(CATALOG, [0, 24, 0], [0, offset, 0]), GEOMETRY)
        passes = whole_pass(30, "code", 7, 0, GEOMETRY) + whole_pass(30, "code", 7, 1, GEOMETRY)
        assert window.row_n.tolist() == passes[offset : offset + 24], f"offset {offset}"
        assert window.pass_n.tolist() == [(offset + i) // 30 for i in range(24)], f"offset {offset}"


def test_order_comes_from_seed_name_and_pass_and_nothing_else() -> None:
    def code_rows(catalog: Catalog, geometry: Geometry, *weights: float) -> list[int]:
        schedule = schedule_of(catalog, geometry, [relative(weights)] * 3)
        return rows_of(schedule, catalog.index["code"])[:12]

    base = code_rows(CATALOG, GEOMETRY, 1, 1, 2)
    assert code_rows(catalog_of(code=30), GEOMETRY, 1) == base
    assert code_rows(catalog_of(a=5, b=1, code=30, zoo=9), GEOMETRY, 0, 1, 3, 5) == base
    assert code_rows(CATALOG, replace(GEOMETRY, window_steps=9, batch_rows=2), 1, 1, 2) == base
    moved = Catalog(99, "gpt2", (Domain("code", 30, "elsewhere"),))
    assert code_rows(moved, GEOMETRY, 1) == base
    assert code_rows(CATALOG, replace(GEOMETRY, seed=8), 1, 1, 2) != base
    assert code_rows(CATALOG, replace(GEOMETRY, block_rows=2), 1, 1, 2) != base
    assert code_rows(CATALOG, replace(GEOMETRY, group_blocks=4), 1, 1, 2) != base


def test_domains_of_one_size_have_orders_of_their_own() -> None:
    schedule = schedule_of(catalog_of(a=60, b=60), GEOMETRY, [mixture_of(0.5, 0.5)] * 5)
    assert rows_of(schedule, 0) != rows_of(schedule, 1)


# ---- which slots -------------------------------------------------------------------------------------


def test_slots_are_step_by_step_and_ranks_slice_them() -> None:
    (window,) = windows_of(schedule_of(CATALOG, GEOMETRY, [mixture_of(0.25, 0.25, 0.5)]))
    assert window.slots(0) == slice(0, 6)
    assert window.slots(3) == slice(18, 24)
    assert window.slots(1, rank=1, world_size=4) == slice(7, 9)
    assert window.rank_slots(1, 4).tolist() == [1, 2, 7, 8, 13, 14, 19, 20]
    assert window.rank_slots(0, 1).tolist() == list(range(24))
    for step in (-1, 4):
        with pytest.raises(ConfigError, match=f"step {step} of a window of 4 steps"):
            window.slots(step)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 6, 8])
def test_the_global_batch_is_the_same_for_any_number_of_ranks(world_size: int) -> None:
    geometry = Geometry(window_steps=3, batch_rows=10)
    (window,) = windows_of(schedule_of(CATALOG, geometry, [mixture_of(0.2, 0.3, 0.5)]))
    whole = pairs(window)
    for step in range(3):
        batch = [
            whole[slot] for rank in range(world_size) for slot in range(10 * 3)[window.slots(step, rank, world_size)]
        ]
        assert batch == whole[step * 10 : step * 10 + 10]
    slots = np.concatenate([window.rank_slots(rank, world_size).reshape(3, -1) for rank in range(world_size)], axis=1)
    assert slots.reshape(-1).tolist() == list(range(30))


def test_halves_alternate() -> None:
    geometry = Geometry(window_steps=4, batch_rows=4)
    (window,) = windows_of(schedule_of(catalog_of(a=100, b=100), geometry, [mixture_of(0.5, 0.5)]))
    first = window.domain_n[0]
    assert window.domain_n.tolist() == [first, 1 - first] * 8


@pytest.mark.parametrize(
    "weights",
    [
        [1, 1, 1],
        [8, 4, 2, 1, 1],
        [97, 1, 1, 1],
        [1] * 64,
        [2.0**-i for i in range(12)],
        list(range(1, 40)),
        [1] * 4096,
    ],
)
def test_every_domain_is_spread_evenly_over_its_window(weights: list[float]) -> None:
    """In any first part of a window a domain has its share of the slots, to within 2.5 rows."""
    geometry = Geometry(window_steps=16, batch_rows=64)
    catalog = catalog_of_sizes([10**6] * len(weights))
    for window in windows_of(schedule_of(catalog, geometry, [relative(weights)] * 3)):
        count_d = np.bincount(window.domain_n, minlength=len(weights))
        so_far_nd = np.cumsum(window.domain_n[:, None] == np.flatnonzero(count_d)[:50], axis=0)
        fair_nd = np.arange(1, 1025)[:, None] / 1024 * count_d[np.flatnonzero(count_d)[:50]]
        assert np.abs(so_far_nd - fair_nd).max() < 2.5


def test_domains_with_one_row_in_a_window_change_their_places_from_window_to_window() -> None:
    catalog = catalog_of_sizes([10**6] * 24)
    places = [
        window.domain_n.tolist() for window in windows_of(schedule_of(catalog, GEOMETRY, [relative([1] * 24)] * 20))
    ]
    assert all(sorted(place) == list(range(24)) for place in places)
    assert len(set(map(tuple, places))) == 20


# ---- asking ------------------------------------------------------------------------------------------


def test_windows_may_be_asked_in_any_order_and_again() -> None:
    schedule = schedule_of(CATALOG, GEOMETRY, [relative([1, 2, i]) for i in range(1, 9)])
    plan = Plan(schedule, GEOMETRY)
    forward = [pairs(plan.window(window)) for window in range(8)]
    for window in (7, 0, 3, 3, 5):
        assert pairs(plan.window(window)) == forward[window]
    with pytest.raises(ScheduleError, match="window 8 is not in the schedule, which has 8"):
        plan.window(8)


def test_any_feed_will_do() -> None:
    schedule = schedule_of(CATALOG, GEOMETRY, [relative([1, 2, 3])] * 3)

    class ListFeed:
        def __init__(self, rows: list[ScheduleRow]) -> None:
            self.rows = rows

        def row(self, window: int) -> ScheduleRow:
            return self.rows[window]

    asked, direct = Plan(ListFeed(list(schedule)), GEOMETRY), Plan(schedule, GEOMETRY)
    assert [pairs(asked.window(w)) for w in range(3)] == [pairs(direct.window(w)) for w in range(3)]


def test_a_plan_leaves_its_row_as_it_was() -> None:
    schedule = MixtureSchedule(CATALOG, GEOMETRY).extend(relative([1, 2, 3]), 2)
    before = schedule.to_text()
    windows_of(schedule)
    assert schedule.to_text() == before


# ---- runs of one domain ------------------------------------------------------------------------------


TOGETHER = [
    (Geometry(window_steps=4, batch_rows=16, seed=7, together_rows=4), [1, 2, 5]),
    (Geometry(window_steps=3, batch_rows=24, seed=1, together_rows=3), [1] * 9),
    (Geometry(window_steps=5, batch_rows=12, seed=2, together_rows=12), [3, 1]),
    (Geometry(window_steps=2, batch_rows=64, seed=3, together_rows=2), list(range(1, 30))),
    (Geometry(window_steps=1, batch_rows=8, seed=3, together_rows=4), [97, 1, 1, 1]),
]


def arranged(geometry: Geometry, weights: list[float], windows: int = 6) -> list[tuple[WindowPlan, WindowPlan]]:
    """Each window without and with rows brought together."""
    catalog = catalog_of_sizes([5 + 3 * i for i in range(len(weights))])
    schedule = schedule_of(catalog, geometry, [relative(weights)] * windows)
    apart = replace(geometry, together_rows=1)
    return [(plan_window(row, apart), plan_window(row, geometry)) for row in schedule]


@pytest.mark.parametrize(("geometry", "weights"), TOGETHER)
def test_rows_brought_together_are_those_of_the_same_steps_in_runs(geometry: Geometry, weights: list[float]) -> None:
    together, moved = geometry.together_rows, False
    for apart, window in arranged(geometry, weights):
        moved |= pairs(apart) != pairs(window)
        for step in range(geometry.window_steps):
            part = window.slots(step)
            before = sorted(zip(apart.domain_n[part], apart.row_n[part], apart.pass_n[part], strict=True))
            assert sorted(zip(window.domain_n[part], window.row_n[part], window.pass_n[part], strict=True)) == before
            runs = window.domain_n[part].reshape(-1, together)
            whole = runs[(runs == runs[:, :1]).all(axis=1), 0]
            assert np.bincount(whole, minlength=len(weights)).tolist() == [
                count // together for count in np.bincount(window.domain_n[part], minlength=len(weights))
            ]
    assert moved or together == geometry.batch_rows  # one run only: nothing to arrange


@pytest.mark.parametrize(("geometry", "weights"), TOGETHER)
def test_a_domain_keeps_the_order_of_its_rows_when_they_are_brought_together(
    geometry: Geometry, weights: list[float]
) -> None:
    for apart, window in arranged(geometry, weights):
        for domain in range(len(weights)):
            for values in ("row_n", "pass_n"):
                before = getattr(apart, values)[apart.domain_n == domain]
                assert getattr(window, values)[window.domain_n == domain].tolist() == before.tolist()


def test_leftovers_keep_their_order_in_mixed_runs() -> None:
    geometry = Geometry(window_steps=4, batch_rows=24, seed=9, together_rows=4)
    for apart, window in arranged(geometry, [7, 6, 6, 5]):
        for step in range(4):
            order = apart.domain_n[apart.slots(step)].tolist()
            left = [domain for i, domain in enumerate(order) if order[:i].count(domain) >= order.count(domain) // 4 * 4]
            runs = window.domain_n[window.slots(step)].reshape(-1, 4).tolist()
            mixed = sorted(run for run in runs if len(set(run)) > 1)
            assert mixed == sorted([left[i : i + 4] for i in range(0, len(left), 4) if len(set(left[i : i + 4])) > 1])


def test_no_domain_comes_first_always_and_every_step_and_seed_has_its_own_order() -> None:
    geometry = Geometry(window_steps=8, batch_rows=16, seed=4, together_rows=4)
    windows = [window for _, window in arranged(geometry, [1, 1, 1, 1], windows=25)]
    first = np.concatenate([window.domain_n.reshape(8, 16)[:, 0] for window in windows])
    assert np.bincount(first).min() > 30  # 200 steps, four domains: 50 each
    orders = [tuple(step) for step in windows[0].domain_n.reshape(8, 16)[:, ::4].tolist()]
    assert len(set(orders)) > 4
    again = [window for _, window in arranged(replace(geometry, seed=5), [1, 1, 1, 1], windows=25)]
    same = sum(a.domain_n.tolist() == b.domain_n.tolist() for a, b in zip(windows, again, strict=True))
    assert same == 0


def test_windows_planned_at_once_are_brought_together_as_if_each_were_alone() -> None:
    geometry = Geometry(window_steps=2, batch_rows=12, seed=4, together_rows=3)
    catalog = catalog_of_sizes([9, 4, 60])
    rows = list(schedule_of(catalog, geometry, [relative([1, 1 + i, 3]) for i in range(7)]))
    for one, row in zip(plan_windows(rows, geometry), rows, strict=True):
        alone = plan_window(row, geometry)
        assert pairs(one) == pairs(alone)
        assert one.pass_n.tolist() == alone.pass_n.tolist()


def test_a_run_that_two_ranks_share_is_of_one_domain_on_both() -> None:
    geometry = Geometry(window_steps=3, batch_rows=24, seed=4, together_rows=4)
    (_, window), *_ = arranged(geometry, [1, 1])
    for world_size in (1, 2, 3, 4, 5, 6, 7, 24):
        step = np.concatenate([window.domain_n[window.slots(1, rank, world_size)] for rank in range(world_size)])
        assert step.tolist() == window.domain_n[window.slots(1)].tolist()
        starts = [geometry.rank_slots(rank, world_size).start for rank in range(world_size)]
        whole = all(start % 4 == 0 for start in starts)
        assert whole == ((24 // world_size) % 4 == 0 and 24 % world_size == 0)


def test_steps_that_cannot_be_cut_into_runs_are_refused() -> None:
    message = r"batch_rows=10 is no multiple of together_rows=4: .* Use together_rows=2, or batch_rows=12\."
    with pytest.raises(ConfigError, match=message):
        Geometry(batch_rows=10, together_rows=4)
    with pytest.raises(ConfigError, match="together_rows is 0; it must be at least 1"):
        Geometry(together_rows=0)
