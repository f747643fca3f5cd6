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
shares themselves are `settled`: moved by the least amounts that restore it (less than two rows a
domain, and only when some domain's share is smaller than what it owes). It always can: the counts
taken as shares leave every carry as it was. The settled shares are what the schedule records as the
window's weights, so nothing hides in a rounding.

A share of zero keeps a domain out: it gets no row that it was not owed from windows in which it had
a share, whatever the others owe and whichever of them run dry.

A domain that can give fewer rows than its share (`limit_d`) gives what it has; the rest of its
share goes to the other domains in proportion to theirs, and is recorded in the same way.
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
    """What one window gives. `share_d` is the share asked for or, where `settled`, the one that holds."""

    count_d: Ints
    share_d: Floats
    carry_d: Floats
    settled: bool


def apportion(share_d: Floats, carry_d: Floats, slots: int, limit_d: Ints | None = None) -> Apportionment:
    """Whole counts that sum to `slots`; `limit_d` is the most rows a domain can still give."""
    asked_d = share_d
    if limit_d is not None:
        limit_d = np.clip(limit_d, 0, slots)  # more than a window is as good as all there is, and sums without overflow
        share_d = _within(share_d, carry_d, slots, limit_d)
    count_d = _round(share_d, share_d + carry_d, slots, limit_d)
    after_d = share_d + carry_d - count_d
    if np.abs(after_d).max() < 1.0 - NEARLY_WHOLE:
        return Apportionment(count_d, share_d, after_d, share_d is not asked_d)
    settled_d = _settle(share_d, carry_d, count_d)
    return Apportionment(count_d, settled_d, settled_d + carry_d - count_d, True)


def _within(share_d: Floats, carry_d: Floats, slots: int, limit_d: Ints) -> Floats:
    """The shares themselves if every domain can give what it then owes; else the excess goes to the others."""
    if (room := int(limit_d[share_d > 0].sum())) < slots:
        raise InfeasibleError(
            f"{room} rows are left in the domains with weight, a window needs {slots}. "
            "Give weight to others, allow more passes, or end the run here."
        )
    most_d = np.maximum(limit_d - carry_d, 0.0)
    if (share_d <= most_d).all():
        return share_d
    # Domains run dry in the order of most / share as the common factor of all other shares grows.
    (live_a,) = np.nonzero(share_d)
    live_a = live_a[np.argsort(most_d[live_a] / share_d[live_a], kind="stable")]
    share_a, most_a = share_d[live_a], most_d[live_a]
    dry_a = np.cumsum(most_a) - most_a  # what those before give when they are dry
    wet_a = np.cumsum(share_a[::-1])[::-1]  # the shares of this one and those after
    factor_a = np.maximum(share_d.sum() - dry_a, 0.0) / wet_a  # below zero by rounding only
    fits_a = factor_a * share_a <= most_a
    within_d = np.zeros_like(share_d)
    if fits_a.any():
        first = int(np.argmax(fits_a))
        within_d[live_a] = np.where(np.arange(len(live_a)) < first, most_a, factor_a[first] * share_a)
    else:  # all are dry, but for what they are owed beyond it
        within_d[live_a] = most_a
        within_d += share_d * (max(0.0, float(share_d.sum() - within_d.sum())) / share_d.sum())
    return within_d


def _round(share_d: Floats, owed_d: Floats, slots: int, limit_d: Ints | None) -> Ints:
    """The whole counts nearest to `owed_d` in squares: floors, then the largest remainders."""
    whole_d = np.rint(owed_d)
    floor_d = np.where(np.abs(owed_d - whole_d) < NEARLY_WHOLE, whole_d, np.floor(owed_d))
    count_d = np.maximum(floor_d, 0.0).astype(np.int64)
    if limit_d is not None:
        count_d = np.minimum(count_d, limit_d)
    while missing := slots - int(count_d.sum()):
        rest_d = owed_d - count_d
        if missing > 0:
            may_d = (share_d > 0) | (rest_d > NEARLY_WHOLE)
            if limit_d is not None:
                may_d &= count_d < limit_d
            count_d[_smallest(np.where(may_d, -rest_d, np.inf), missing)] += 1
        else:
            count_d[_smallest(np.where(count_d > 0, rest_d, np.inf), -missing)] -= 1
    return count_d


def _smallest(key_d: Floats, num: int) -> Ints:
    """Where the `num` smallest finite keys stand, ties in catalog order; fewer if fewer are finite."""
    num = min(num, int(np.isfinite(key_d).sum()))
    if num == 0:
        return np.zeros(0, dtype=np.int64)
    last = np.partition(key_d, num - 1)[num - 1]
    below = np.flatnonzero(key_d < last)
    return np.concatenate([below, np.flatnonzero(key_d == last)[: num - len(below)]])


def _settle(share_d: Floats, carry_d: Floats, count_d: Ints) -> Floats:
    """Shares nearest to `share_d` under which carries stay within SETTLED_CARRY, or where they were.

    Carries after the window may move to `clip(after + tau, low, high)`; tau is found exactly, since
    the sum is piecewise linear in it. `low` keeps shares from falling below zero. `high` keeps a
    share of zero from rising, but to pay for rows the domain was given. Both let the carry from
    before the window stand, so that there is always a solution, and one inside (-1, 1).
    """
    after_d = share_d + carry_d - count_d
    low_d = np.maximum(np.minimum(-SETTLED_CARRY, carry_d), carry_d - count_d)
    high_d = np.maximum(np.where(share_d > 0, SETTLED_CARRY, 0.0), carry_d)
    total = float(after_d.sum())
    breaks = np.sort(np.concatenate([low_d - after_d, high_d - after_d]))
    sums = _sum_of_clipped(after_d, breaks, low_d, high_d)
    place = int(np.clip(np.searchsorted(sums, total), 1, len(breaks) - 1))
    left, right = breaks[place - 1], breaks[place]
    rise = sums[place] - sums[place - 1]
    tau = left if rise <= 0 else left + (right - left) * min(1.0, max(0.0, (total - sums[place - 1]) / rise))
    settled_d = np.maximum(share_d + (np.clip(after_d + tau, low_d, high_d) - after_d), 0.0)
    return settled_d * (share_d.sum() / settled_d.sum())  # what the sums above were rounded by


def _sum_of_clipped(after_d: Floats, tau_b: Floats, low_d: Floats, high_d: Floats) -> Floats:
    """sum over domains of clip(after + tau, low, high), for every tau, by prefix sums."""
    begin_d = np.sort(low_d - after_d)  # below this tau a domain sits at its low
    end_d = np.sort(high_d - after_d)  # above this one it sits at its high
    begin_sum = np.concatenate([[0.0], np.cumsum(begin_d)])
    end_sum = np.concatenate([[0.0], np.cumsum(end_d)])
    begun = np.searchsorted(begin_d, tau_b, side="right")
    ended = np.searchsorted(end_d, tau_b, side="right")
    # each domain adds low + max(0, tau - begin) - max(0, tau - end)
    return low_d.sum() + (begun * tau_b - begin_sum[begun]) - (ended * tau_b - end_sum[ended])
