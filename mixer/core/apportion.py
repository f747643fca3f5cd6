"""Weights into whole row counts, with the remainders carried from window to window.

A domain's `share` of a window is weight x slots, seldom a whole number. What rounding leaves is its
`carry`: the rows it is still owed (positive) or was given ahead (negative), so that

    carry after = carry before + share - count

and over any number of windows the counts differ from the sum of the shares by |carry| alone.
The promise is |carry| < 1, for every domain after every window, however the weights moved.

Largest remainder keeps it nearly always, and no rule can keep it always: whoever chooses the next
weights after seeing the carries can halve the set of domains again and again to those that are owed
most, and drives their carry up by half a row each time, log2(domains) / 2 rows in all. It takes no
malice: let several domains be half a row ahead when their weights go to zero, and the remaining one
is owed more rows than a window has slots. So where rounding alone would break the promise, the
shares themselves are `settled`: moved by the least amounts that restore it (below one row for most
domains touched, and only when some domain's share is smaller than what it owes). The settled shares
are what the schedule records as the window's weights, so nothing hides in a rounding.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mixer.core.errors import InfeasibleError

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

NEARLY_WHOLE = 1e-7  # a share this close to a whole number of rows counts as whole
SETTLED_CARRY = 0.75  # how far settling brings back a carry that would leave (-1, 1)


@dataclass(frozen=True, slots=True)
class Apportionment:
    """What one window gives. `share_d` is the share asked for, or the settled one."""

    count_d: Ints
    share_d: Floats
    carry_d: Floats
    settled: bool


def apportion(share_d: Floats, carry_d: Floats, slots: int, limit_d: Ints | None = None) -> Apportionment:
    """Whole counts that sum to `slots`; `limit_d` is the most rows a domain can still give."""
    owed_d = share_d + carry_d
    count_d = _round(owed_d, slots, limit_d)
    after_d = owed_d - count_d
    if np.abs(after_d).max() < 1.0 - NEARLY_WHOLE:
        return Apportionment(count_d, share_d, after_d, False)
    settled_d = _settle(share_d, after_d)
    return Apportionment(count_d, settled_d, settled_d + carry_d - count_d, True)


def _round(owed_d: Floats, slots: int, limit_d: Ints | None) -> Ints:
    """The whole counts nearest to `owed_d` in squares: floors, then the largest remainders."""
    whole_d = np.rint(owed_d)
    floor_d = np.where(np.abs(owed_d - whole_d) < NEARLY_WHOLE, whole_d, np.floor(owed_d))
    count_d = np.maximum(floor_d, 0.0).astype(np.int64)
    if limit_d is not None:
        if (room := int(limit_d.sum())) < slots:
            raise InfeasibleError(f"{room} rows are left in all domains, a window needs {slots}. The data is used up.")
        count_d = np.minimum(count_d, limit_d)
    while missing := slots - int(count_d.sum()):
        rest_d = owed_d - count_d
        if missing > 0:
            if limit_d is not None:
                rest_d = np.where(count_d < limit_d, rest_d, -np.inf)
            count_d[_smallest(-rest_d, missing)] += 1
        else:
            rest_d = np.where(count_d > 0, rest_d, np.inf)
            count_d[_smallest(rest_d, -missing)] -= 1
    return count_d


def _smallest(key_d: Floats, num: int) -> Ints:
    """Where the `num` smallest finite keys stand, ties in catalog order; fewer if fewer are finite."""
    num = min(num, int(np.isfinite(key_d).sum()))
    if num == 0:
        return np.zeros(0, dtype=np.int64)
    last = np.partition(key_d, num - 1)[num - 1]
    below = np.flatnonzero(key_d < last)
    return np.concatenate([below, np.flatnonzero(key_d == last)[: num - len(below)]])


def _settle(share_d: Floats, after_d: Floats) -> Floats:
    """Shares nearest to `share_d` under which no carry exceeds SETTLED_CARRY in size.

    Carries after the window may move to `clip(after + tau, low, high)`, where `low` keeps the share
    from falling below zero; tau is found exactly, since the sum is piecewise linear in it.
    """
    low_d = np.maximum(-SETTLED_CARRY, after_d - share_d)
    low_d = np.minimum(low_d, SETTLED_CARRY)
    total = float(after_d.sum())
    breaks = np.sort(np.concatenate([low_d - after_d, SETTLED_CARRY - after_d]))
    sums = _sum_of_clipped(after_d, breaks, low_d)
    place = int(np.clip(np.searchsorted(sums, total), 1, len(breaks) - 1))
    left, right = breaks[place - 1], breaks[place]
    rise = sums[place] - sums[place - 1]
    tau = left if rise <= 0 else left + (right - left) * (total - sums[place - 1]) / rise
    settled_d = share_d + (np.clip(after_d + tau, low_d, SETTLED_CARRY) - after_d)
    return np.maximum(settled_d, 0.0) * (share_d.sum() / np.maximum(settled_d, 0.0).sum())


def _sum_of_clipped(after_d: Floats, tau_b: Floats, low_d: Floats) -> Floats:
    """sum over domains of clip(after + tau, low, SETTLED_CARRY), for every tau, by prefix sums."""
    begin_d = np.sort(low_d - after_d)  # below this tau a domain sits at its low
    end_d = np.sort(SETTLED_CARRY - after_d)  # above this one it sits at the top
    begin_sum = np.concatenate([[0.0], np.cumsum(begin_d)])
    end_sum = np.concatenate([[0.0], np.cumsum(end_d)])
    begun = np.searchsorted(begin_d, tau_b, side="right")
    ended = np.searchsorted(end_d, tau_b, side="right")
    # each domain adds low + max(0, tau - begin) - max(0, tau - end)
    return low_d.sum() + (begun * tau_b - begin_sum[begun]) - (ended * tau_b - end_sum[ended])
