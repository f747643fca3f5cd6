"""Is the order of a pass as good as chance, and does it keep its promise of locality?

A block-local order is not a uniform permutation and must not be tested as one: the rows of a group
come from `group_blocks` blocks, so rows that follow each other resemble each other as far as rows
of a block do (by 1 / group_blocks of their variance; measured below). What is promised is chance on
two levels: blocks are dealt into groups by a random permutation, and each group's rows stand in a
random permutation. So the tests run on both levels, on orders with blocks of one row (which are
plain permutations), and on whole passes against passes that numpy shuffled on two levels.

Ten seeds and several statistics make many p-values, of which one in a hundred is below 0.01 when all is
well. So the level of 1 % is kept for every family of a statistic as a whole: its least p-value
of ten must exceed 0.01 / 10 (Bonferroni), and the ten together must look uniform (Kolmogorov-Smirnov, 1 %).
Seeds are fixed: the outcome is the same every time. That the p-values are right is shown on numpy's
permutations, that the tests have teeth on bad orders.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
from scipy import stats

from mixer.core.permute import key_of, mix, scramble, shuffle
from mixer.core.plan import Geometry, plan_window
from mixer.core.row import ScheduleRow
from tests.core.making import catalog_of

SEEDS = range(10)
LEVEL = 0.01
FAMILY = 40  # such comparisons are in this file: each is held to LEVEL / FAMILY, so that all together are to LEVEL
Order = np.ndarray
Statistic = Callable[[Order], float]


# ---- p-values of an order under the hypothesis that it is a uniform permutation ---------------------------


def serial(order: Order, lag: int = 1) -> float:
    """Correlation of a row with that `lag` places on, round the end: mean -1 / (n - 1), variance 1 / n."""
    n = len(order)
    x = order - (n - 1) / 2
    r = float(x @ np.roll(x, -lag)) / float(x @ x)
    return 2 * float(stats.norm.sf(abs(r + 1 / (n - 1)) * np.sqrt(n)))


def p_of(result: Any) -> float:
    """The p-value of any of scipy's results."""
    return float(result.pvalue)


def serial_far(order: Order) -> float:
    return serial(order, lag=64)


def gaps(order: Order) -> float:
    """How many places lie between rows of the lowest eighth: geometric, by chi-square."""
    n, share = len(order), 1 / 8
    length = np.diff(np.flatnonzero(order < n * share)) - 1
    edges = 20
    found = np.bincount(np.minimum(length, edges), minlength=edges + 1)
    chance = share * (1 - share) ** np.arange(edges + 1)
    chance[edges] = (1 - share) ** edges
    return float(stats.chisquare(found, chance * len(length)).pvalue)


def places(order: Order) -> float:
    """Where in the order which rows stand: 16 x 16 cells, by chi-square."""
    n, cells = len(order), 16
    table = np.histogram2d(np.arange(n), order, bins=cells, range=[[0, n], [0, n]])[0]
    return p_of(stats.chi2_contingency(table, correction=False))


def neighbours(order: Order) -> float:
    """Which row follows which: 16 x 16 cells, by chi-square."""
    n, cells = len(order), 16
    table = np.histogram2d(order[0 : n - 1 : 2], order[1:n:2], bins=cells, range=[[0, n], [0, n]])[0]
    return p_of(stats.chi2_contingency(table, correction=False))


STATISTICS: list[Statistic] = [serial, serial_far, gaps, places, neighbours]


def assert_chance(p_values: list[float], what: str) -> None:
    worst = LEVEL / FAMILY
    assert min(p_values) > worst / len(p_values), f"{what}: p-values {sorted(p_values)[:3]} of {len(p_values)}"
    assert stats.kstest(p_values, "uniform").pvalue > worst, f"{what}: p-values {np.round(sorted(p_values), 3)}"


@pytest.mark.parametrize("statistic", STATISTICS)
def test_the_p_values_are_right(statistic: Statistic) -> None:
    """On 400 true permutations about 1 % fall below 1 %, 10 % below 10 %, and all together are uniform."""
    p_values = np.array([statistic(np.random.default_rng(seed).permutation(4096)) for seed in range(400)])
    assert (p_values < 0.01).sum() <= 12  # 4 expected; 13 or more in one of 3,000 sweeps
    assert 20 <= (p_values < 0.1).sum() <= 62  # 40 expected
    assert stats.kstest(p_values, "uniform").pvalue > LEVEL


# ---- the orders ------------------------------------------------------------------------------------------


def key_for(seed: int) -> np.ndarray:
    return mix(mix(np.array([key_of("domain", "web")], dtype=np.uint64), seed), 0)


@cache
def a_pass(size: int, seed: int, block_rows: int, group_blocks: int) -> Order:
    streams = np.zeros(size, dtype=np.int64)
    return shuffle(np.arange(size), streams, np.array([size]), key_for(seed), block_rows, group_blocks)


@cache
def scrambled(size: int, seed: int) -> Order:
    return scramble(np.arange(size), np.full(size, size), np.repeat(key_for(seed), size))


@pytest.mark.parametrize("statistic", STATISTICS)
@pytest.mark.parametrize("size", [4096, 65_536, 100_003])
def test_a_scrambled_order_is_as_good_as_chance(size: int, statistic: Statistic) -> None:
    assert_chance([statistic(scrambled(size, seed)) for seed in SEEDS], f"{statistic.__name__} of {size}")


@pytest.mark.parametrize("statistic", STATISTICS)
def test_blocks_of_one_row_make_a_plain_permutation(statistic: Statistic) -> None:
    assert_chance([statistic(a_pass(65_000, seed, 1, 65_000)) for seed in SEEDS], statistic.__name__)


@pytest.mark.parametrize("statistic", STATISTICS)
def test_blocks_are_dealt_by_chance(statistic: Statistic) -> None:
    """The blocks of each group, in the order of their first row, over all groups of a pass of 262,144 rows.

    Inside a group the order in which blocks first turn up is chance as well, so the whole is a permutation.
    """
    p_values = []
    for seed in SEEDS:
        blocks = a_pass(64 * 64 * 64, seed, 64, 64) // 64
        _, first = np.unique(blocks, return_index=True)
        p_values.append(statistic(blocks[np.sort(first)]))
    assert_chance(p_values, statistic.__name__)


@pytest.mark.parametrize("statistic", STATISTICS)
def test_the_rows_of_a_group_are_shuffled_by_chance(statistic: Statistic) -> None:
    """The order inside groups: each row by its rank among the 4,096 of its group, one group a seed."""
    p_values = []
    for seed in SEEDS:
        group = a_pass(100_000, seed, 64, 64)[4096 * seed :][:4096]
        p_values.append(statistic(np.argsort(np.argsort(group))))
    assert_chance(p_values, statistic.__name__)


def test_the_place_of_a_row_in_one_pass_says_nothing_of_the_next() -> None:
    p_values = []
    for seed in SEEDS:
        size = 20_000
        streams = np.repeat([0, 1], size)
        keys = mix(mix(np.array([key_of("domain", "web")] * 2, dtype=np.uint64), seed), np.arange(2))
        both = shuffle(np.tile(np.arange(size), 2), streams, np.array([size] * 2), keys, 1, size)
        first, second = np.argsort(both[:size]), np.argsort(both[size:])
        p_values.append(p_of(stats.spearmanr(first, second)))
    assert_chance(p_values, "rank correlation of two passes")


def test_two_domains_of_one_size_have_unrelated_orders() -> None:
    p_values = []
    for seed in SEEDS:
        keys = [mix(np.array([key_of("domain", name)], dtype=np.uint64), seed) for name in ("a", "b")]
        orders = [scramble(np.arange(20_000), np.full(20_000, 20_000), np.repeat(key, 20_000)) for key in keys]
        p_values.append(p_of(stats.spearmanr(orders[0], orders[1])))
    assert_chance(p_values, "rank correlation of two domains")


@pytest.mark.parametrize(("size", "most"), [(2, 1.05), (3, 1.05), (4, 1.15), (5, 1.65)])
def test_the_smallest_domains_come_in_every_order(size: int, most: float) -> None:
    """Six rounds over so few digits do not make all n! orders equally likely: at 5 rows, the worst size, the
    likeliest order comes 1.5 times as often as it should. None is missing, and no row has a place it prefers.
    """
    num = 100_000
    keys = mix(np.zeros(num, dtype=np.uint64), np.arange(num))
    orders = np.stack([scramble(np.full(num, place), np.full(num, size), keys) for place in range(size)])
    found = np.unique(orders, axis=1, return_counts=True)[1] / num * math.factorial(size)
    assert len(found) == math.factorial(size)
    assert 2 - most < found.min() <= found.max() < most + 0.05
    for place in range(size):
        assert np.abs(np.bincount(orders[place], minlength=size) / num * size - 1).max() < 0.08


# ---- whole passes against passes shuffled on two levels by numpy -----------------------------------------


def ideal_pass(size: int, rng: np.random.Generator, block_rows: int, group_blocks: int) -> Order:
    blocks = rng.permutation(-(-size // block_rows))
    groups = [blocks[i : i + group_blocks] for i in range(0, len(blocks), group_blocks)]
    rows = [(group[:, None] * block_rows + np.arange(block_rows)).reshape(-1) for group in groups]
    return np.concatenate([rng.permutation(part[part < size]) for part in rows])


@cache
def ideal_passes(size: int, block_rows: int, group_blocks: int) -> list[Order]:
    return [ideal_pass(size, np.random.default_rng(i), block_rows, group_blocks) for i in range(1000)]


def lag_correlation(order: Order) -> float:
    x = order - order.mean()
    return float(x[1:] @ x[:-1] / (x @ x))


def low_runs(order: Order) -> float:
    """The spread of the gaps between rows of the lowest eighth."""
    return float(np.var(np.diff(np.flatnonzero(order < len(order) / 8))))


def cell_spread(order: Order) -> float:
    n = len(order)
    return float(np.histogram2d(np.arange(n), order, bins=16, range=[[0, n], [0, n]])[0].var())


@pytest.mark.parametrize("value", [lag_correlation, low_runs, cell_spread])
def test_whole_passes_are_like_passes_shuffled_on_two_levels_by_numpy(
    value: Callable[[Order], float],
) -> None:
    """300 passes against 1,000 of numpy, at 1 % for the three statistics together."""
    shape = (2_563, 4, 8)  # 81 groups of 32 rows, one of them with the short block
    null = [value(order) for order in ideal_passes(*shape)]
    found = [value(a_pass(shape[0], seed, *shape[1:])) for seed in range(300)]
    assert p_of(stats.ks_2samp(null, found)) > LEVEL / 3


def test_the_price_of_locality_is_what_theory_says() -> None:
    """Neighbours correlate by 1 / group_blocks less one part in the rows of a group, not by more."""
    found = [lag_correlation(a_pass(64 * 64 * 64, seed, 64, 64)) for seed in SEEDS]
    expected = 1 / 64 - 1 / 4096
    error = np.std(found, ddof=1) / np.sqrt(len(found))
    assert abs(np.mean(found) - expected) < 4 * error
    assert np.mean(found) < 0.02


# ---- the tests have teeth ------------------------------------------------------------------------------


def identity(size: int, seed: int) -> Order:
    return np.arange(size)


def rotated(size: int, seed: int) -> Order:
    return np.roll(np.arange(size), 1234 + seed)


def blocks_only(size: int, seed: int) -> Order:
    """Blocks of 64 in a random order, the rows of each as they were."""
    return (scrambled(size // 64, seed)[:, None] * 64 + np.arange(64)).reshape(-1)


def groups_of_one_block(size: int, seed: int) -> Order:
    return a_pass(size, seed, 64, 1)


def linear(size: int, seed: int) -> Order:
    """A multiplication, which is a permutation too."""
    return np.arange(size) * (2 * seed + 40_503) % size


def one_round(size: int, seed: int) -> Order:
    """Only the low digit moves, by a hash of the high one."""
    side = int(size**0.5)
    high, low = np.divmod(np.arange(side * side), side)
    return high * side + (low + np.random.default_rng(seed).integers(0, side, side)[high]) % side


@pytest.mark.parametrize("order", [identity, rotated, blocks_only, groups_of_one_block, linear, one_round])
def test_bad_orders_are_rejected(order: Callable[[int, int], Order]) -> None:
    rejected = {s.__name__ for s in STATISTICS if all(s(order(65_536, seed)) < 1e-6 for seed in SEEDS)}
    assert rejected, f"no statistic sees that {order.__name__} is not shuffled"
    if order is identity:
        assert rejected == {s.__name__ for s in STATISTICS}


# ---- locality --------------------------------------------------------------------------------------------


def most_blocks(count: int, size: int, geometry: Geometry) -> int:
    """The most blocks that `count` rows in a row of one pass can lie in.

    Groups follow each other in the order of a pass; all rows of a group lie in its `group_blocks` blocks. A
    group has span = block_rows * group_blocks rows; the last of a pass has fewer, and so has the one with the
    domain's short block (by `short` rows). For count rows to touch g >= 2 groups, all g - 2 between the
    first and the last are taken whole: (g - 2) * span - short + 2 <= count. So, for count >= 2,

        g <= 2 + (count - 2 + short) // span,

    which without a short block is ceil((count - 1) / span) + 1. And rows lie in no more blocks than rows.
    """
    blocks = -(-size // geometry.block_rows)
    span = geometry.block_rows * geometry.group_blocks
    short = blocks * geometry.block_rows - size
    groups = 1 if count == 1 else 2 + (count - 2 + short) // span
    return min(groups * geometry.group_blocks, blocks, count)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_window_touches_no_more_blocks_than_locality_promises(seed: int) -> None:
    rng = np.random.default_rng(seed)
    reached = 0
    for _ in range(60):
        geometry = Geometry(
            window_steps=1,
            batch_rows=int(rng.integers(1, 3000)),
            seed=seed,
            block_rows=int(rng.choice([1, 4, 16, 64])),
            group_blocks=int(rng.choice([1, 4, 16, 64])),
        )
        size = int(rng.choice([int(rng.integers(1, 5000)), int(rng.integers(1, 10**6)), 10**12 + 5]))
        offset = int(rng.integers(0, 3 * size))
        count = geometry.window_slots
        row = ScheduleRow(0, catalog_of(web=size), np.ones(1), np.array([count]), np.array([offset]), np.zeros(1))
        plan = plan_window(row, geometry)
        for number in np.unique(plan.pass_n):
            rows = plan.row_n[plan.pass_n == number]
            touched = len(np.unique(rows // geometry.block_rows))
            bound = most_blocks(len(rows), size, geometry)
            assert touched <= bound, f"{geometry}, {size} rows from {offset}"
            reached += touched == bound
    assert reached >= 5  # a bound that is never reached says little


def test_a_usual_window_reads_two_groups_of_blocks_at_most() -> None:
    """1,024 rows of a domain of 10^12 at the default locality: 64 or 128 blocks of the 15,625,000,000."""
    geometry, catalog = Geometry(window_steps=16, batch_rows=64), catalog_of(web=10**12)
    for window in range(50):
        row = ScheduleRow(0, catalog, np.ones(1), np.array([1024]), np.array([window * 1024]), np.zeros(1))
        touched = len(np.unique(plan_window(row, geometry).row_n // 64))
        assert touched <= 64 if window % 4 != 3 else touched <= 128


def test_the_short_block_may_cost_one_group_more() -> None:
    """Why `short` stands in the bound. Here span + 1 = 33 rows can reach three groups: the one in the middle
    may have 17 rows instead of 32. That is 2 blocks before, 2 in it and 2 after, where 4 in all would be the
    bound if all groups were alike.
    """
    geometry = Geometry(window_steps=1, batch_rows=33, block_rows=16, group_blocks=2)
    size = 32 * 5 - 15
    assert most_blocks(33, size, geometry) == 6
    touched = set()
    for seed in range(10):
        for offset in range(size - 33):
            row = ScheduleRow(0, catalog_of(web=size), np.ones(1), np.array([33]), np.array([offset]), np.zeros(1))
            touched.add(len(np.unique(plan_window(row, replace(geometry, seed=seed)).row_n // 16)))
    assert touched == {3, 4, 5, 6}
