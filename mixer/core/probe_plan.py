"""Which rows a probe of influence reads, when it is due, and what it costs: pure functions.

A probe is of *groups*: the domains of the catalog, and the targets. Each has an order of its own for its rows,
keyed by the run's seed, the group's label and the pass, and unrelated to the order of training. Probe q reads the
next rows of it, so no row of a group is read again before its pass is over; what is left at the end of a pass and
would not fill a probe waits for a later pass, shuffled anew. A group with fewer rows than asked for gives all it
has. The rows of a group are dealt to its *parts*, one gradient each. The number of ranks has no say in any of this.

Cost is counted in rows that are computed forward and backward, on whatever rank: a row of a probe has as many
tokens as one of training.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mixer.core.errors import ConfigError
from mixer.core.permute import key_of, mix, scramble

Ints = NDArray[np.int64]
Method = Literal["targets", "sketch", "store"]


def _no_rows() -> Ints:
    return np.zeros(0, dtype=np.int64)


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class ProbeGroup:
    """A domain ("domain/code") or a target ("target/code"): its rows, but for those to be left alone."""

    label: str
    num_rows: int
    avoided_n: Ints = field(default_factory=_no_rows)  # rows, rising

    @property
    def free_rows(self) -> int:
        return self.num_rows - len(self.avoided_n)

    @classmethod
    def avoiding(cls, label: str, num_rows: int, avoided_n: Ints) -> "ProbeGroup":
        """Leave these rows alone if at least half of the group remains; else none of them."""
        if 2 * (num_rows - len(avoided_n)) < num_rows:
            return cls(label=label, num_rows=num_rows)
        return cls(label=label, num_rows=num_rows, avoided_n=np.sort(avoided_n))


class ProbePlan(NamedTuple):
    """Rows in the order of their parts, parts in the order of their groups."""

    row_n: Ints  # number inside the group
    group_n: Ints
    part_n: Ints  # counted over all groups
    group_p: Ints  # of each part
    rows_p: Ints


def plan_probe(groups: Sequence[ProbeGroup], number: int, *, rows: int, parts: int, seed: int) -> ProbePlan:
    """The rows of probe `number`, counted from 0: up to `rows` of each group, in up to `parts` parts."""
    row_n: list[Ints] = []
    rows_p: list[int] = []
    group_p: list[int] = []
    for place, group in enumerate(groups):
        sizes = part_sizes(group.free_rows, rows, parts)
        row_n.append(_rows_of(group, number, sum(sizes), seed))
        rows_p += sizes
        group_p += [place] * len(sizes)
    parts_of_rows = np.repeat(np.arange(len(rows_p), dtype=np.int64), rows_p)
    groups_of_parts = np.array(group_p, dtype=np.int64)
    return ProbePlan(
        row_n=np.concatenate(row_n) if row_n else _no_rows(),
        group_n=groups_of_parts[parts_of_rows],
        part_n=parts_of_rows,
        group_p=groups_of_parts,
        rows_p=np.array(rows_p, dtype=np.int64),
    )


def part_sizes(num_rows: int, rows: int, parts: int) -> list[int]:
    """Rows of each part of a group with so many: as even as can be, none empty."""
    taken = min(rows, num_rows)
    parts = max(1, min(parts, taken))
    return [taken * (k + 1) // parts - taken * k // parts for k in range(parts)]


def _rows_of(group: ProbeGroup, number: int, taken: int, seed: int) -> Ints:
    if taken < 1:
        raise ConfigError(f"{group.label!r} has no row to probe. Give it rows, or leave it out.")
    size = group.free_rows
    in_pass, nth = divmod(number, size // taken)
    place_n = nth * taken + np.arange(taken, dtype=np.int64)
    key = mix(np.array([key_of("probe", seed, group.label)], dtype=np.uint64), in_pass)
    free_n = scramble(place_n, np.full(taken, size, dtype=np.int64), np.repeat(key, taken))
    # The k-th row that is not avoided: as many further as avoided ones lie before it.
    before_n = group.avoided_n - np.arange(len(group.avoided_n), dtype=np.int64)
    return free_n + np.searchsorted(before_n, free_n, side="right")


# --- who computes what --------------------------------------------------------------------------------


class Share(NamedTuple):
    """Rows begin .. end of a part."""

    part: int
    begin: int
    end: int


def share_rows(rows_p: Sequence[int], rank: int, world_size: int) -> list[Share]:
    """One rank's rows of all parts, which are cut where a rank's even share of the rows ends."""
    total = sum(rows_p)
    first, last = total * rank // world_size, total * (rank + 1) // world_size
    shares: list[Share] = []
    start = 0
    for part, size in enumerate(rows_p):
        begin, end = max(first - start, 0), min(last - start, size)
        if begin < end:
            shares.append(Share(part, begin, end))
        start += size
    return shares


def share_parts(rows_p: Sequence[int], rank: int, world_size: int) -> list[Share]:
    """One rank's rows of every part, where all ranks compute each part together; a share may be empty."""
    return [Share(part, size * rank // world_size, size * (rank + 1) // world_size) for part, size in enumerate(rows_p)]


def computed_rows(
    domain_rows_p: Sequence[int],
    target_rows_p: Sequence[int],
    *,
    method: Method,
    world_size: int = 1,
    sharded: bool = False,
    harvested: bool = False,
) -> int:
    """The rows that one probe computes on all ranks together, by the rows of its parts.

    Sharded models compute every part on all ranks at once, so ranks without a row of it compute an empty one.
    Otherwise each row is computed once, but for those of targets on which every rank projects for itself.
    """
    domains, targets = ([] if harvested else list(domain_rows_p)), list(target_rows_p)
    if sharded:
        return sum(world_size * -(-size // world_size) for size in domains + targets)
    return sum(domains) + sum(targets) * (world_size if method == "targets" else 1)


# --- when ---------------------------------------------------------------------------------------------


def budgeted_windows(cost_rows: int, *, budget: float, window_rows: int) -> int:
    """The fewest windows whose training pays for a probe, at `budget` of its rows."""
    return max(1, math.ceil(cost_rows / (budget * window_rows) - 1e-9))


@dataclass(frozen=True, slots=True, kw_only=True)
class Cadence:
    """After which windows a probe is due: the first after `start_windows`, and then

    - every `every_windows` from there on, or
    - with `repays`, so that from `every_windows` on there was never more than one probe for each of them: the first
      probe is an advance, and the next comes no earlier than after twice as many.
    """

    start_windows: int
    every_windows: int
    repays: bool = False

    def count(self, done: int) -> int:
        """Probes within the first `done` windows."""
        if done < self.start_windows:
            return 0
        if not self.repays:
            return 1 + (done - self.start_windows) // self.every_windows
        return 1 + max(0, done // self.every_windows - max(1, self.start_windows // self.every_windows))

    def due(self, window: int) -> bool:
        """Whether a probe follows the last step of this window."""
        return self.count(window + 1) > self.count(window)

    def number(self, window: int) -> int:
        """Of the probe that is due after this window, counted from 0."""
        return self.count(window + 1) - 1

    def spent_share(self, cost_rows: int, window_rows: int, done: int) -> float:
        """What the probes of the first `done` windows cost, as a share of what those cost."""
        return self.count(done) * cost_rows / (done * window_rows) if done else 0.0
