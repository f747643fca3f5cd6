"""Which row sits in which slot of which step: a pure function of (schedule row, geometry).

A window has `window_steps * batch_rows` slots, step by step. The schedule row says how many rows of
each domain it holds and how many that domain gave before; the plan

1. spreads each domain's rows evenly over the window: the k-th of c rows is due at (k + phase) / c,
   and slots are filled in order of what is due. Phases of domains with like counts are spaced by
   the golden ratio, so that what one domain has too early another has too late;
2. turns "the k-th row the domain ever gave" into a row number: pass k // num_rows, then the keyed
   shuffle of that pass. Keys come from the run's seed, the domain's *name* and the pass, so a domain
   keeps its order whatever happens to the others;
3. with `together_rows` g above 1, arranges the slots inside each step anew, so that aligned runs of g slots hold one
   domain: one that gives c rows to the step fills c // g runs, and what is left over fills mixed ones. A keyed
   shuffle of the runs keeps any domain from coming first always. Which domains, and so which rows, a step holds is
   decided before, by 1: it is the same for every g; and a domain's rows keep their order from slot to slot.

Rank r of R takes of every step the slots [batch_rows * r // R, batch_rows * (r + 1) // R). Neither the
number of ranks nor any clock, message or earlier call has a say in what a slot holds. Where a rank's slots begin or
end inside a run of `together_rows`, two ranks hold a part of it each: still of one domain, only shorter. Ranks have
whole runs alone where all their shares of batch_rows are multiples of g.

Without `together_rows` every row lies where it lay before there was such a thing, and releases from then cannot
read a schedule that has it; so it came without a new VERSION.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mixer.core.catalog import Catalog
from mixer.core.errors import ConfigError
from mixer.core.permute import key_of, mix, shuffle
from mixer.core.ports import MixtureFeed
from mixer.core.row import ScheduleRow

Ints = NDArray[np.int64]

VERSION = 1  # raised whenever a rule changes that moves a row; golden plans are regenerated then
GOLDEN = 0.6180339887498949


@dataclass(frozen=True, slots=True, kw_only=True)
class Geometry:
    """What, beside catalog and schedule, decides the place of every row."""

    window_steps: int = 16
    batch_rows: int = 64
    seed: int = 0
    block_rows: int = 64  # neighbouring rows that stay together when blocks are shuffled
    group_blocks: int = 64  # shuffled blocks among which rows are then shuffled
    together_rows: int = 1  # slots of a step that hold one domain where its rows suffice; 1: none are brought together

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 1 << 63:
            raise ConfigError(f"seed is {self.seed}; it must be 0 to 2**63 - 1.")
        for key in ("window_steps", "batch_rows", "block_rows", "group_blocks", "together_rows"):
            if (value := getattr(self, key)) < 1:
                raise ConfigError(f"{key} is {value}; it must be at least 1.")
        if self.batch_rows % self.together_rows:
            raise ConfigError(
                f"batch_rows={self.batch_rows} is no multiple of together_rows={self.together_rows}: a step is cut "
                f"into runs of so many slots. Use together_rows={math.gcd(self.batch_rows, self.together_rows)}, or "
                f"batch_rows={-(-self.batch_rows // self.together_rows) * self.together_rows}."
            )

    @property
    def window_slots(self) -> int:
        return self.window_steps * self.batch_rows

    def rank_slots(self, rank: int, world_size: int) -> slice:
        """The slots of each step that are this rank's."""
        if not 0 <= rank < world_size:
            raise ConfigError(f"rank {rank} of {world_size}; it must be 0 to {world_size - 1}.")
        if world_size > self.batch_rows:
            raise ConfigError(
                f"{world_size} ranks share steps of batch_rows={self.batch_rows}; some would get no row. "
                "Use at most as many ranks as rows."
            )
        return slice(self.batch_rows * rank // world_size, self.batch_rows * (rank + 1) // world_size)


@dataclass(frozen=True, slots=True, order=True)
class Cursor:
    """The next step to train. The only position in the system."""

    window: int = 0
    step: int = 0

    @classmethod
    def at(cls, steps: int, geometry: Geometry) -> "Cursor":
        """After so many steps from the start of the run."""
        return cls(*divmod(steps, geometry.window_steps))

    def steps(self, geometry: Geometry) -> int:
        """How many steps lie before it."""
        return self.window * geometry.window_steps + self.step

    def after(self, steps: int, geometry: Geometry) -> "Cursor":
        return Cursor.at(self.steps(geometry) + steps, geometry)

    def to_dict(self) -> dict[str, int]:
        return {"window": self.window, "step": self.step}

    @classmethod
    def from_dict(cls, value: dict[str, int]) -> "Cursor":
        return cls(int(value["window"]), int(value["step"]))


@dataclass(frozen=True, slots=True)
class WindowPlan:
    """The rows of one window, slot by slot: `domain_n` in catalog order, `row_n` inside the domain."""

    window: int
    catalog: Catalog
    geometry: Geometry
    domain_n: NDArray[np.int32]
    row_n: Ints
    pass_n: Ints

    def slots(self, step: int, rank: int = 0, world_size: int = 1) -> slice:
        """One rank's slots of one step."""
        if not 0 <= step < self.geometry.window_steps:
            raise ConfigError(f"step {step} of a window of {self.geometry.window_steps} steps.")
        part = self.geometry.rank_slots(rank, world_size)
        begin = step * self.geometry.batch_rows
        return slice(begin + part.start, begin + part.stop)

    def rank_slots(self, rank: int, world_size: int) -> Ints:
        """One rank's slots of all steps, in the order it trains them."""
        part = self.geometry.rank_slots(rank, world_size)
        slots = np.arange(self.geometry.window_slots).reshape(self.geometry.window_steps, -1)
        return np.ascontiguousarray(slots[:, part]).reshape(-1)


@dataclass(frozen=True, slots=True)
class Plan:
    """The rows of any window, in any order of asking, always the same."""

    feed: MixtureFeed
    geometry: Geometry

    def window(self, window: int) -> WindowPlan:
        return plan_window(self.feed.row(window), self.geometry)


def plan_window(row: ScheduleRow, geometry: Geometry) -> WindowPlan:
    """Lay out one window. O(slots + domains), whatever the rows in the corpus or the place in the run."""
    return plan_windows([row], geometry)[0]


def plan_windows(rows: Sequence[ScheduleRow], geometry: Geometry) -> list[WindowPlan]:
    """Lay out several windows at once, each as if it were alone: for small ones that is many times faster."""
    domains = [np.flatnonzero(row.counts_d) for row in rows]
    domain_a = np.concatenate(domains)  # "active": one domain of one window that gives rows in it

    def per_active(values: Sequence[NDArray[Any]]) -> NDArray[Any]:
        return np.concatenate([value[chosen] for value, chosen in zip(values, domains, strict=True)])

    window_a = np.repeat(np.arange(len(rows)), [len(chosen) for chosen in domains])
    count_a = per_active([row.counts_d for row in rows])
    offset_a = per_active([row.offsets_d for row in rows])
    size_a = per_active([row.catalog.num_rows_d for row in rows])
    key_a = mix(per_active([row.catalog.key_d for row in rows]), geometry.seed)
    salt_a = np.array([~row.window for row in rows])[window_a]
    active_n, nth_n = _spread(window_a, count_a, mix(key_a, salt_a), len(rows))
    if geometry.together_rows > 1:
        active_n, nth_n = _bring_together(active_n, count_a, np.array([row.window for row in rows]), geometry)

    given_n = offset_a[active_n] + nth_n
    pass_n = given_n // size_a[active_n]
    # A stream is one pass over one domain; most windows need one or two a domain.
    first_pass_a = offset_a // size_a
    passes_a = (offset_a + count_a - 1) // size_a - first_pass_a + 1
    stream_of_a = np.cumsum(passes_a) - passes_a
    active_s = np.repeat(np.arange(len(domain_a)), passes_a)
    pass_s = first_pass_a[active_s] + np.arange(len(active_s)) - stream_of_a[active_s]
    row_n = shuffle(
        given_n - pass_n * size_a[active_n],
        stream_of_a[active_n] + pass_n - first_pass_a[active_n],
        size_a[active_s],
        mix(key_a[active_s], pass_s),
        geometry.block_rows,
        geometry.group_blocks,
    )
    domain_n = domain_a[active_n].astype(np.int32)
    parts = [slice(place * geometry.window_slots, (place + 1) * geometry.window_slots) for place in range(len(rows))]
    return [
        WindowPlan(row.window, row.catalog, geometry, domain_n[part], row_n[part], pass_n[part])
        for row, part in zip(rows, parts, strict=True)
    ]


def _spread(window_a: Ints, count_a: Ints, key_a: NDArray[np.uint64], num_windows: int) -> tuple[Ints, Ints]:
    """Slot by slot: which active domain gives a row, and which of its rows in this window."""
    num_a = np.bincount(window_a, minlength=num_windows)
    first_a = (np.cumsum(num_a) - num_a)[window_a]
    rank_a = np.arange(len(count_a)) - first_a
    start_w = np.minimum.reduceat(key_a, np.cumsum(num_a) - num_a).astype(np.float64) / 2**64
    phase_a = np.empty(len(count_a))
    phase_a[np.lexsort((key_a, count_a, window_a))] = (rank_a * GOLDEN + start_w[window_a]) % 1.0
    active_n = np.repeat(np.arange(len(count_a)), count_a)
    nth_n = np.arange(len(active_n)) - np.repeat(np.cumsum(count_a) - count_a, count_a)
    due_n = (nth_n + phase_a[active_n]) / count_a[active_n]
    slots = len(due_n) // num_windows
    order_wn = np.argsort(due_n.reshape(num_windows, slots), axis=1, kind="stable")
    order_n = (order_wn + np.arange(num_windows)[:, None] * slots).reshape(-1)
    return active_n[order_n], nth_n[order_n]


def _bring_together(active_n: Ints, count_a: Ints, window_w: Ints, geometry: Geometry) -> tuple[Ints, Ints]:
    """The same steps with their slots arranged in runs: which active domain gives a row, and which of its rows."""
    batch, together = geometry.batch_rows, geometry.together_rows
    place_n = np.arange(len(active_n))
    step_n = place_n // batch
    by_domain = np.lexsort((active_n, step_n))
    begins = np.flatnonzero(np.diff(active_n[by_domain], prepend=-1) | (place_n % batch == 0))
    count_g = np.diff(begins, append=len(place_n))  # "group": one domain in one step
    nth_n = place_n - np.repeat(begins, count_g)
    # A run goes by the number of its first slot among those sorted; one of leftovers, by how many lie before it.
    run_n, left_n = np.empty_like(place_n), np.empty(len(place_n), dtype=bool)
    run_n[by_domain] = (place_n - nth_n % together) % batch
    left_n[by_domain] = nth_n >= np.repeat(count_g // together * together, count_g)
    left_sn = left_n.reshape(-1, batch)
    before_n = (np.cumsum(left_sn, axis=1) - left_sn).reshape(-1)
    run_n[left_n] = batch + before_n[left_n] // together
    steps = np.arange(geometry.window_steps)
    key_w = mix(np.array([key_of("together", geometry.seed)], dtype=np.uint64), window_w)
    key_s = mix(np.repeat(key_w, len(steps)), np.tile(steps, len(window_w)))
    order = np.lexsort((run_n, mix(key_s[step_n], run_n), step_n))
    active_n, nth_n = active_n[order], np.empty_like(place_n)
    nth_n[np.argsort(active_n, kind="stable")] = place_n - np.repeat(np.cumsum(count_a) - count_a, count_a)
    return active_n, nth_n
