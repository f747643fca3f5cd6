"""The rows of probes: fresh, apart from training and from what is measured; who computes them; when."""

import numpy as np
import pytest

from mixer.core.errors import ConfigError
from mixer.core.probe_plan import (
    Cadence,
    ProbeGroup,
    budgeted_windows,
    computed_rows,
    part_sizes,
    plan_probe,
    share_parts,
    share_rows,
)


def group(label="domain/a", num_rows=100, avoided=()):
    return ProbeGroup(label=label, num_rows=num_rows, avoided_n=np.array(avoided, dtype=np.int64))


def rows(one, number, num=8, parts=4, seed=0):
    return plan_probe([one], number, rows=num, parts=parts, seed=seed).row_n.tolist()


@pytest.mark.parametrize("size", [8, 9, 30])
@pytest.mark.parametrize("num", [1, 3, 8])
def test_no_row_comes_again_before_its_pass_is_over(size, num):
    one = group(num_rows=size)
    per_pass = size // num
    for first in (0, per_pass):
        seen = [row for number in range(first, first + per_pass) for row in rows(one, number, num)]
        assert len(set(seen)) == per_pass * num
        assert set(seen) <= set(range(size))
    long = {row for number in range(20 * per_pass) for row in rows(one, number, num)}
    assert long == set(range(size))  # what a pass leaves out, another one reads


def test_passes_names_seeds_and_kinds_have_orders_of_their_own():
    orders = [
        [row for number in numbers for row in rows(group(label), number, seed=seed)]
        for numbers, label, seed in [
            (range(12), "domain/a", 0),
            (range(12, 24), "domain/a", 0),
            (range(12), "domain/b", 0),
            (range(12), "target/a", 0),
            (range(12), "domain/a", 1),
        ]
    ]
    assert all(np.corrcoef(one, other)[0, 1] < 0.4 for i, one in enumerate(orders) for other in orders[:i])


def test_a_group_keeps_its_rows_whatever_else_is_probed():
    alone = plan_probe([group("domain/b", 50)], 3, rows=8, parts=4, seed=5)
    both = plan_probe([group("domain/a", 5), group("domain/b", 50)], 3, rows=8, parts=4, seed=5)
    assert both.row_n[both.group_n == 1].tolist() == alone.row_n.tolist()
    assert both.group_p.tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    assert both.rows_p.tolist() == [1, 1, 1, 2, 2, 2, 2, 2]
    assert both.part_n.tolist() == [0, 1, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7]
    assert both.group_n.tolist() == [0] * 5 + [1] * 8


def test_small_groups_give_what_they_have():
    assert part_sizes(1, 8, 4) == [1]
    assert part_sizes(3, 8, 4) == [1, 1, 1]
    assert part_sizes(6, 8, 4) == [1, 2, 1, 2]
    assert part_sizes(100, 8, 3) == [2, 3, 3]
    assert sorted(rows(group(num_rows=3), 7)) == [0, 1, 2]
    with pytest.raises(ConfigError, match="'domain/a' has no row to probe"):
        rows(group(num_rows=0), 0)


def test_rows_that_are_measured_are_left_alone_where_half_remains():
    avoided = np.array([0, 3, 4, 9])
    one = ProbeGroup.avoiding("target/a", 10, avoided)
    seen = [row for number in range(6) for row in rows(one, number, 1)]
    assert sorted(seen) == [1, 2, 5, 6, 7, 8]
    assert ProbeGroup.avoiding("target/a", 8, avoided % 8).free_rows == 4
    assert ProbeGroup.avoiding("target/a", 7, np.array([0, 1, 2, 3])).free_rows == 7


# --- who computes what --------------------------------------------------------------------------------


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 7, 40])
def test_every_row_is_computed_once_and_evenly(world_size):
    sizes = [2, 2, 3, 1, 5]
    for split in (share_rows, share_parts):
        shares = [split(sizes, rank, world_size) for rank in range(world_size)]
        seen = sorted((s.part, row) for mine in shares for s in mine for row in range(s.begin, s.end))
        assert seen == [(part, row) for part, size in enumerate(sizes) for row in range(size)]
    counts = [sum(s.end - s.begin for s in share_rows(sizes, rank, world_size)) for rank in range(world_size)]
    assert max(counts) - min(counts) <= 1
    assert {len(share_parts(sizes, rank, world_size)) for rank in range(world_size)} == {5}


def test_cost_counts_what_is_really_computed():
    domains, targets = [2] * 32, [2] * 12  # 8 domains, 3 targets, 8 rows in 4 parts
    assert computed_rows(domains, targets, method="sketch", world_size=16) == 88
    assert computed_rows(domains, targets, method="targets") == 88
    assert computed_rows(domains, targets, method="targets", world_size=16) == 64 + 16 * 24
    assert computed_rows(domains, targets, method="sketch", harvested=True) == 24
    assert computed_rows(domains, targets, method="sketch", world_size=16, sharded=True) == 44 * 16
    assert computed_rows(domains, targets, method="sketch", world_size=2, sharded=True) == 88


# --- when ---------------------------------------------------------------------------------------------


def test_the_budget_sets_the_cadence():
    assert budgeted_windows(88, budget=0.02, window_rows=1024) == 5  # 4.3
    assert budgeted_windows(8, budget=0.02, window_rows=400) == 1
    assert budgeted_windows(8, budget=0.02, window_rows=399) == 2
    assert budgeted_windows(1, budget=1.0, window_rows=1024) == 1


def due(cadence, windows):
    return [window for window in range(windows) if cadence.due(window)]


def test_a_given_cadence_is_kept():
    assert due(Cadence(start_windows=1, every_windows=4), 14) == [0, 4, 8, 12]
    assert due(Cadence(start_windows=3, every_windows=1), 6) == [2, 3, 4, 5]


def test_the_first_probe_is_an_advance_that_is_repaid():
    cadence = Cadence(start_windows=1, every_windows=5, repays=True)
    assert due(cadence, 21) == [0, 9, 14, 19]
    assert [cadence.number(window) for window in (0, 9, 14, 19)] == [0, 1, 2, 3]
    assert due(Cadence(start_windows=12, every_windows=5, repays=True), 21) == [11, 14, 19]
    assert due(Cadence(start_windows=1, every_windows=1, repays=True), 4) == [0, 1, 2, 3]


@pytest.mark.parametrize("start", [1, 2, 7, 30])
@pytest.mark.parametrize("cost", [1, 88, 700, 5000])
def test_what_was_spent_stays_within_the_budget(start, cost):
    every = budgeted_windows(cost, budget=0.05, window_rows=512)
    cadence = Cadence(start_windows=start, every_windows=every, repays=True)
    for done in range(every, 12 * every + 40):
        assert cadence.spent_share(cost, 512, done) <= 0.05 + 1e-12
    assert cadence.spent_share(cost, 512, 20 * every + start) > 0.05 * 0.9 * cost / (0.05 * 512 * every) - 0.01
    assert cadence.spent_share(cost, 512, 0) == 0.0
