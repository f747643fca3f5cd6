"""Exact projections onto boxes in the simplex, in the geometry of ratios (KL divergence).

The nearest w to a proposal q, in the sense of the least sum_i w_i log(w_i / q_i), among all with
lo <= w <= hi and sum(w) = total. Setting the derivative of the Lagrangian to zero gives

    w_i = clip(c * q_i, lo_i, hi_i)          with the one c that makes the sum right:

domains that touch no bound keep the ratios the proposal gave them. As a function of c the sum is
continuous, rises, and is a straight line between neighbours of the sorted breakpoints lo_i / q_i
and hi_i / q_i. So c is found without a tolerance: a binary search over the breakpoints finds the
two neighbours it lies between, which says who is at a bound, and the line gives c.

*Zeros.* A q_i of 0 is the limit of a tiny weight: it stays at lo_i unless all positive entries are
at hi and mass is left over. `ratios` is therefore a list, each entry used only for the domains on which
all before it are 0: the proposal, then what shapes the zeros' share, then equal ratios.

*Trust region.* `onto_box_near` adds sum_i |w_i - p_i| <= max_shift, for a p inside the box with sum 1.
With a multiplier m >= 0 for that rule, whose subgradient is the sign of w_i - p_i, the condition is

    log(w_i / q_i) = const - m   where w_i > p_i          so w_i = a * q_i, clipped at hi_i
    log(w_i / q_i) = const + m   where w_i < p_i          so w_i = b * q_i, clipped at lo_i,   a <= b
    w_i = p_i                    where a * q_i <= p_i <= b * q_i

If the rule binds (m > 0), increases and decreases are max_shift / 2 each, as they sum to 0. No domain
is in both sets, so the two halves part: a solves the box problem on [p, hi] with total 1 + max_shift / 2,
b the one on [lo, p] with total 1 - max_shift / 2, and w = up + down - p. That a <= b follows: let c solve
the problem without the rule, where increases exceed max_shift / 2; increases grow with a, so a <= c, and
decreases shrink with b, so c <= b. The problem is convex, so a w that meets the condition is the minimum.

Bounds hold exactly, to the last bit; sums to rounding (some 1e-15; callers may rely on 1e-12).
"""

from bisect import bisect_right
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

SLACK = 4e-13  # rounding allowed in a sum or a shift; half of what the rails promise


def relative(ratios: Floats) -> Floats:
    """Ratios scaled to a largest of 1, with what is too small to divide by as 0."""
    scaled = ratios / (ratios.max(initial=0.0) or 1.0)
    return np.where(scaled < np.finfo(np.float64).tiny, 0.0, scaled)


def onto_box(ratios: Sequence[Floats], lo: Floats, hi: Floats, mass: float = 1.0) -> Floats:
    """The w within lo <= w <= hi (exactly) that sums to `mass`, with `ratios` as the module says.

    Needs sum(lo) <= mass <= sum(hi), up to SLACK; the last of `ratios` has no zeros.
    """
    w = lo.copy()
    waiting = np.ones(w.size, dtype=np.bool_)
    for q in ratios:
        now = waiting & (q > 0)
        rest = mass - w[~now].sum()
        if hi[now].sum() >= rest - SLACK:
            w[now] = _scaled(q[now], lo[now], hi[now], rest)
            return w
        w[now] = hi[now]
        waiting &= ~now
    return w


def onto_box_near(ratios: Sequence[Floats], lo: Floats, hi: Floats, p: Floats, max_shift: float) -> Floats:
    """The same with sum 1 and an L1 distance of at most `max_shift` from `p`, which lies in the box."""
    w = onto_box(ratios, lo, hi)
    if np.abs(w - p).sum() <= max_shift + SLACK:
        return w
    if max_shift <= SLACK:
        return p.copy()
    up = onto_box(ratios, p, hi, p.sum() + max_shift / 2)
    down = onto_box(ratios, lo, p, 1.0 - max_shift / 2)
    return np.where(up > p, up, down)


def _scaled(q: Floats, lo: Floats, hi: Floats, mass: float) -> Floats:
    """clip(c * q, lo, hi) with the sum `mass`; all q > 0."""
    if mass <= lo.sum():
        return lo
    if mass >= hi.sum():
        return hi
    enters, leaves = lo / q, hi / q  # the c from which a domain is off its floor, and reaches its cap
    breaks = np.concatenate([enters, leaves])

    def mass_at(c: float) -> float:
        return float(np.minimum(np.maximum(c * q, lo), hi).sum())

    left, right = 0.0, np.inf
    for stride in (64, 1):  # first among few, then among all that lie between two of the few
        some = np.sort(breaks[::stride])
        place = bisect_right(range(some.size), mass, key=lambda k: mass_at(some[k]))
        left = float(some[place - 1]) if place else left
        right = float(some[place]) if place < some.size else right
        breaks = breaks[(breaks >= left) & (breaks <= right)]
    low, high = enters > left, leaves <= left
    free = ~low & ~high
    c = left
    if free.any():
        c = (mass - lo[low].sum() - hi[high].sum()) / q[free].sum()
    return np.minimum(np.maximum(min(max(c, left), right) * q, lo), hi)
