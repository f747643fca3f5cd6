"""The promises of the core over any catalog, any moving mixture and any number of ranks.

Hypothesis draws the sizes and a seed; the long arrays come from numpy by that seed, which every
failing example names.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from hypothesis import event, given, target
from hypothesis import strategies as st

from mixer.core.catalog import Catalog
from mixer.core.errors import InfeasibleError
from mixer.core.mixture import Mixture
from mixer.core.permute import mix, unscramble
from mixer.core.plan import Cursor, Geometry, Plan, WindowPlan, plan_window
from mixer.core.row import ScheduleRow
from mixer.core.schedule import MixtureSchedule, read
from tests.core import moves
from tests.core.making import catalog_of_sizes, pairs, windows_of

WORLD_SIZES = (1, 2, 3, 4, 6, 8)
MOST_DOMAINS = 5_000
MOST_ROWS = 10**9


@dataclass(frozen=True)
class Run:
    """A decided run and how it came about."""

    seed: int
    move: str
    schedule: MixtureSchedule
    asked: Sequence[np.ndarray]

    def __repr__(self) -> str:
        sizes = self.schedule.catalog.num_rows_d
        shown = ", ".join(map(str, sizes[:8].tolist())) + (", ..." if len(sizes) > 8 else "")
        return f"Run(seed={self.seed}, {self.move}, {len(sizes)} domains of {shown}, {self.schedule.geometry})"


def sizes_of(family: str, num: int, most: int, rng: np.random.Generator) -> np.ndarray:
    if family == "equal":
        return np.full(num, int(rng.integers(1, most + 1)))
    if family == "tiny":
        return rng.integers(1, min(most, 5) + 1, num)
    if family == "any":
        return rng.integers(1, most + 1, num)
    return np.exp(rng.uniform(0, math.log(most), num)).astype(np.int64).clip(1, most)  # "log": of every magnitude


NUMS = st.one_of(st.integers(1, 8), st.integers(1, 100), st.integers(1, MOST_DOMAINS), st.just(1))


@st.composite
def geometries(draw: st.DrawFn, least_batch_rows: int = 1) -> Geometry:
    return Geometry(
        window_steps=draw(st.integers(1, 6)),
        batch_rows=draw(st.integers(least_batch_rows, 40)),
        seed=draw(st.one_of(st.integers(0, 3), st.integers(0, (1 << 63) - 1))),
        block_rows=draw(st.sampled_from([1, 2, 3, 7, 64])),
        group_blocks=draw(st.sampled_from([1, 2, 5, 64])),
    )


@st.composite
def catalogs(draw: st.DrawFn, most_rows: int = MOST_ROWS, nums: st.SearchStrategy[int] = NUMS) -> Catalog:
    rng = np.random.default_rng(draw(st.integers(0, 1 << 32)))
    family = draw(st.sampled_from(["log", "any", "tiny", "equal"]))
    return catalog_of_sizes(sizes_of(family, draw(nums), draw(st.integers(1, most_rows)), rng).tolist())


@st.composite
def runs(
    draw: st.DrawFn,
    most_rows: int = MOST_ROWS,
    nums: st.SearchStrategy[int] = NUMS,
    windows: st.SearchStrategy[int] | None = None,
    least_batch_rows: int = 1,
    families: Sequence[moves.Move] = tuple(moves.ALL),
) -> Run:
    catalog = draw(catalogs(most_rows, nums))
    move, seed = draw(st.sampled_from(families)), draw(st.integers(0, 1 << 32))
    rng = np.random.default_rng(seed)
    schedule, asked = MixtureSchedule(catalog, draw(geometries(least_batch_rows))), []
    if windows is None:
        windows = st.integers(1, 12 if len(catalog) < 500 else 6)
    for _ in range(draw(windows)):
        mixture = move(schedule, rng)
        asked.append(mixture.weights_d)
        schedule.append(schedule.propose(mixture))
    return Run(seed, move.__name__, schedule, asked)


def flat(windows: Sequence[WindowPlan]) -> list[tuple[int, int]]:
    return [pair for window in windows for pair in pairs(window)]


# ---- the global batch ----------------------------------------------------------------------------------


@given(run=runs(least_batch_rows=8, windows=st.integers(1, 3)), order=st.randoms(use_true_random=False))
def test_any_number_of_ranks_trains_the_same_rows_in_the_same_slots(run: Run, order: random.Random) -> None:
    geometry, text = run.schedule.geometry, run.schedule.to_text()
    whole = windows_of(run.schedule)
    for world_size in WORLD_SIZES:
        put: dict[tuple[int, int, int], tuple[int, int]] = {}
        feed = read(text).schedule  # as workers of another start read it
        for rank in range(world_size):
            windows = list(range(len(feed)))
            order.shuffle(windows)  # every rank asks in an order of its own
            # Where a rank's rows belong is said once more here, in plain words.
            first = geometry.batch_rows * rank // world_size
            for window in windows:
                plan = Plan(feed, geometry).window(window)
                given_rows = pairs(plan)
                for step in range(geometry.window_steps):
                    for place, pair in enumerate(given_rows[plan.slots(step, rank, world_size)]):
                        key = (window, step, first + place)
                        assert key not in put, f"{world_size} ranks: two of them train slot {key}"
                        put[key] = pair
        slots = [
            (window, step, place)
            for window in range(len(whole))
            for step in range(geometry.window_steps)
            for place in range(geometry.batch_rows)
        ]
        assert [put.get(slot) for slot in slots] == flat(whole), f"{world_size} ranks"


# ---- counts --------------------------------------------------------------------------------------------


def assert_counts_follow(schedule: MixtureSchedule) -> float:
    """Counts against the exact sums of recorded shares, after every window; returns the largest distance."""
    slots = schedule.geometry.window_slots
    sum_d = np.zeros(len(schedule.catalog), dtype=np.longdouble)
    count_d = np.zeros(len(schedule.catalog), dtype=np.int64)
    worst = 0.0
    for row in schedule:
        assert int(row.counts_d.sum()) == slots
        assert (row.counts_d >= 0).all()
        assert abs(math.fsum(row.weights_d) - 1.0) <= 1e-12
        assert (row.offsets_d == count_d).all()
        sum_d += row.weights_d.astype(np.longdouble) * slots
        count_d = count_d + row.counts_d
        worst = max(worst, float(np.abs(sum_d - count_d).max()))
        assert worst < 1.0, f"window {row.window}: a domain is {worst} rows off"
    return worst


@given(run=runs(windows=st.integers(1, 25)))
def test_every_domain_is_within_a_row_of_its_shares_after_every_window(run: Run) -> None:
    target(assert_counts_follow(run.schedule))


@given(run=runs(windows=st.integers(1, 25)))
def test_shares_are_settled_only_where_somebody_cannot_pay_and_by_less_than_two_rows(run: Run) -> None:
    slots = run.schedule.geometry.window_slots
    for asked_d, row in zip(run.asked, run.schedule, strict=True):
        exact_d = asked_d / math.fsum(asked_d)
        moved_d = np.abs(row.weights_d - exact_d) * slots
        if moved_d.max() < 1e-6:
            continue
        event(f"settled under {run.move}")
        # Somebody was given more rows than its share of this window can pay for.
        assert (exact_d * slots + row.carry_d < 0).any()
        assert moved_d.max() < 2.0
        # Without weight a domain pays at most for what it was given ahead, and is owed nothing new.
        out_d = asked_d == 0
        paid_d = (row.weights_d * slots)[out_d]
        assert (paid_d <= np.maximum(row.counts_d[out_d], -row.carry_d[out_d]) + 1e-9).all()


def test_mixtures_that_do_not_look_at_carries_are_bound_as_asked_but_for_one_window_in_a_thousand() -> None:
    """In a sweep of 75,000 windows whose weights never vanish none was settled, of 30,000 with zeros one was.

    This one is 40 fixed seeds of it. Weights that look at the carries get 9 windows in 100 settled.
    """
    settled, windows = 0, 0
    for move in [*moves.MILD, *moves.WILD]:
        for seed in range(40):
            rng = np.random.default_rng(seed)
            num = int(rng.choice([1, 2, 3, 5, 8, 20, 64, 300, 1000]))
            geometry = Geometry(window_steps=int(rng.integers(1, 9)), batch_rows=int(rng.choice([1, 2, 8, 24])))
            schedule = MixtureSchedule(catalog_of_sizes([10] * num), geometry)
            for _ in range(25):
                mixture = move(schedule, rng)
                row = schedule.append(schedule.propose(mixture))
                moved = np.abs(row.weights_d - mixture.weights_d).max() * geometry.window_slots
                settled, windows = settled + (moved > 1e-6), windows + 1
    assert settled <= windows / 1000


@given(run=runs(windows=st.integers(1, 25)))
def test_a_domain_that_never_had_weight_never_gives_a_row(run: Run) -> None:
    never_d = np.ones(len(run.schedule.catalog), dtype=bool)
    for asked_d, row in zip(run.asked, run.schedule, strict=True):
        never_d &= asked_d == 0
        assert not row.counts_d[never_d].any()
        assert not row.weights_d[never_d].any()


# ---- passes --------------------------------------------------------------------------------------------


def given_rows(windows: Sequence[WindowPlan], domain: int) -> tuple[list[int], list[int]]:
    rows = np.concatenate([window.row_n[window.domain_n == domain] for window in windows])
    passes = np.concatenate([window.pass_n[window.domain_n == domain] for window in windows])
    return rows.tolist(), passes.tolist()


@given(run=runs(most_rows=120, nums=st.integers(1, 6), windows=st.integers(1, 40)))
def test_every_pass_visits_every_row_exactly_once(run: Run) -> None:
    windows = windows_of(run.schedule)
    full_passes = 0
    for domain, size in enumerate(run.schedule.catalog.num_rows_d.tolist()):
        rows, passes = given_rows(windows, domain)
        assert passes == [i // size for i in range(len(rows))]
        for begin in range(0, len(rows), size):
            one = rows[begin : begin + size]
            assert len(set(one)) == len(one)
            if len(one) == size:
                full_passes += 1
                assert sorted(one) == list(range(size))
            else:
                assert 0 <= min(one) <= max(one) < size
    target(float(full_passes))


@given(run=runs())
def test_no_row_comes_twice_in_a_pass_over_domains_of_any_size(run: Run) -> None:
    seen = [(d, p, r) for w in windows_of(run.schedule) for d, p, r in zip(w.domain_n, w.pass_n, w.row_n, strict=True)]
    assert len(set(seen)) == len(seen)
    sizes_d = run.schedule.catalog.num_rows_d
    for window in windows_of(run.schedule):
        assert (window.row_n >= 0).all()
        assert (window.row_n < sizes_d[window.domain_n]).all()


@given(size=st.integers(1, 400), geometry=geometries(), passes=st.integers(0, 3), key=st.integers(0, 1 << 30))
def test_successive_passes_are_other_orders(size: int, geometry: Geometry, passes: int, key: int) -> None:
    catalog = catalog_of_sizes([size])
    geometry = replace(geometry, window_steps=1, batch_rows=size, seed=key)
    rows = []
    for number in (passes, passes + 1):
        row = ScheduleRow(0, catalog, np.ones(1), np.array([size]), np.array([number * size]), np.zeros(1))
        rows.append(plan_window(row, geometry).row_n.tolist())
    assert sorted(rows[0]) == sorted(rows[1]) == list(range(size))
    if size >= 20:  # below, two orders may well be equal by chance
        assert rows[0] != rows[1]


@given(
    size=st.integers(1, 1 << 48),
    offset=st.integers(0, 1 << 50),
    seed=st.integers(0, (1 << 63) - 1),
    block_rows=st.sampled_from([1, 3, 64, 1000]),
    group_blocks=st.sampled_from([1, 2, 64]),
)
def test_the_place_of_a_row_can_be_found_back_at_any_size(
    size: int, offset: int, seed: int, block_rows: int, group_blocks: int
) -> None:
    """The inverse of the shuffle, worked out from the definition, returns every row to its place."""
    geometry = Geometry(window_steps=1, batch_rows=32, seed=seed, block_rows=block_rows, group_blocks=group_blocks)
    catalog = catalog_of_sizes([size])
    row = ScheduleRow(0, catalog, np.ones(1), np.array([32]), np.array([offset]), np.zeros(1))
    plan = plan_window(row, geometry)
    num_blocks = -(-size // block_rows)
    short = num_blocks * block_rows - size

    def undo(place: int, size: int, key: np.ndarray) -> int:
        return int(unscramble(np.array([place]), np.array([size]), key)[0])

    for nth, (found, number) in enumerate(zip(plan.row_n.tolist(), plan.pass_n.tolist(), strict=True)):
        assert number == (offset + nth) // size
        outer = mix(mix(mix(catalog.key_d, seed), number), 0)
        block, inside = divmod(found, block_rows)
        last_at = undo(num_blocks - 1, num_blocks, outer)
        short_group = last_at // group_blocks
        at = undo(block, num_blocks, outer)
        group = at // group_blocks
        members = min(group_blocks, num_blocks - group * group_blocks)
        if group == short_group:  # the last block and the one at the group's end have changed places
            end = group * group_blocks + members - 1
            at = {last_at: end, end: last_at}.get(at, at)
        rows_inside = members * block_rows - (short if group == short_group else 0)
        inner = (at - group * group_blocks) * block_rows + inside
        place = undo(inner, rows_inside, mix(outer, group + 1))
        place += group * group_blocks * block_rows - (short if group > short_group else 0)
        assert place == (offset + nth) % size


# ---- restore -------------------------------------------------------------------------------------------


@given(run=runs(windows=st.integers(1, 5)), data=st.data())
def test_restored_at_any_step_the_tail_is_the_same(run: Run, data: st.DataObject) -> None:
    geometry = run.schedule.geometry
    whole = flat(windows_of(run.schedule))
    total = len(run.schedule) * geometry.window_steps
    steps = data.draw(st.integers(0, total), label="steps trained")
    cursor = Cursor().after(steps, geometry)
    assert cursor.steps(geometry) == steps
    cursor = Cursor.from_dict(cursor.to_dict())
    # The text may have been torn anywhere after the window in training was decided.
    lines = run.schedule.to_text().encode().splitlines(keepends=True)
    least = sum(map(len, lines[: min(cursor.window + 2, len(lines))]))
    text = b"".join(lines)
    cut = data.draw(st.integers(least, len(text)), label="bytes left")
    found = read(text[:cut])
    restored = found.schedule
    while len(restored) < len(run.schedule):  # the lost rows are decided again, the same
        decided = run.schedule.row(len(restored))
        again = restored.propose(Mixture(run.asked[len(restored)]))
        assert again.weights_d.tobytes() == decided.weights_d.tobytes()
        restored.append(again)
    assert restored.to_text() == text.decode()
    plan = Plan(restored, geometry)
    tail = [
        pair
        for window in range(cursor.window, len(restored))
        for pair in pairs(plan.window(window))[(cursor.step if window == cursor.window else 0) * geometry.batch_rows :]
    ]
    assert tail == whole[steps * geometry.batch_rows :]


@given(run=runs())
def test_text_restores_every_bit(run: Run) -> None:
    found = read(run.schedule.to_text())
    assert found.torn == 0
    for a, b in zip(found.schedule, run.schedule, strict=True):
        for key in ("weights_d", "counts_d", "offsets_d", "carry_d"):
            assert getattr(a, key).tobytes() == getattr(b, key).tobytes()
    assert found.schedule.to_text() == run.schedule.to_text()


# ---- limits --------------------------------------------------------------------------------------------


@given(
    catalog=catalogs(most_rows=200, nums=st.integers(1, 12)),
    geometry=geometries(),
    move=st.sampled_from(moves.ALL),
    epochs=st.integers(1, 2),
    seed=st.integers(0, 1 << 32),
)
def test_domains_run_dry_to_their_last_row_and_never_beyond(
    catalog: Catalog, geometry: Geometry, move: moves.Move, epochs: int, seed: int
) -> None:
    schedule, rng = MixtureSchedule(catalog, geometry), np.random.default_rng(seed)
    most_d = catalog.num_rows_d * epochs
    for _ in range(60):
        left_d = most_d - (schedule.rows[-1].next_offsets_d if schedule.rows else 0)
        mixture = move(schedule, rng)
        try:
            schedule.append(schedule.propose(mixture, limit_d=left_d))
        except InfeasibleError:
            assert left_d[mixture.weights_d > 0].sum() < geometry.window_slots
            break
        assert (schedule.rows[-1].next_offsets_d <= most_d).all()
    if schedule.rows:
        assert_counts_follow(schedule)
        dry_d = schedule.rows[-1].next_offsets_d == most_d
        for domain in np.flatnonzero(dry_d).tolist():
            rows, _ = given_rows(windows_of(schedule), domain)
            assert sorted(rows) == sorted(list(range(int(catalog.num_rows_d[domain]))) * epochs)
