"""What keeps every policy's weights within bounds: one place, applied after all of them alike.

    rules = GuardRails(floor=0.01, max_shift=0.1, max_epochs=4).bind(catalog, prior)
    rules.check(progress)                                   # before the run; before a catalog switch
    mixture = rules.apply(proposal, previous=previous, progress=progress)      # every window

The result is the exact projection of the proposal (see `mixer.core.simplex`): domains that touch no
bound keep the ratios the policy gave them, and a proposal within all rules comes back bit for bit. Floors
hold after normalisation; max(w, floor) / sum, a common shortcut, ends below the floor.

The rules, each outranking those after it:

1. `max_epochs`, `epochs`: over the planned run domain i gives at most E_i = floor(epochs_i * num_rows_i)
   rows. R_i = E_i - given_i are left, and carry_i is the fraction of a row still owed to it, so
       w_i <= pace_i = (R_i - carry_i) / slots_left
   Kept to the end, such a weight uses up the rows exactly; a domain that takes less may take more later, so
   pace_i never falls, and rules that fit at the start fit to the end. If the horizon is unknown, slots_left
   is window_slots: rows may be gone early, but are never passed. If the paces of all domains together cannot
   fill the window (`check` would have refused such a plan) each domain gets its pace, and what is
   missing is shared out up to R_i / window_slots.
2. `cap`, `caps`: w_i <= cap_i.
3. `frozen`: the domains of a block keep one ratio, w_i = W * rho_i. The block is one domain to all else: its
   proposal is the sum of its members', its bounds are max_i lo_i / rho_i <= W <= min_i hi_i / rho_i, so it
   stops with the first member that runs out of rows. A pinned `share` fixes W.
4. `floor`, `floors`, `min_rows`: w_i >= max(floor_i, min_rows / window_slots). A weight counts rows on
   average: the carried fraction may move one row of `min_rows` into a neighbouring window.
5. `max_shift`: sum_i |w_i - p_i| <= max_shift, where p is the previous mixture projected onto 1 to 4. It
   bounds what the policy changes; what those rules force, say as a domain runs out, comes on top.
6. The proposal. Its zeros stay at their floors, unless all other domains are at their caps; then the zeros
   share the rest in the prior's ratios (in equal ones where the prior is 0 as well).

Only rows that run out make a rule give way: a share or a floor that worked at the start yields to 1. Options
that contradict each other are an InfeasibleError that names them, at `bind`, and at `check` if the length of
the run is what makes them contradict. So is a window that cannot be filled, for rows or caps.
`floor`, `cap` and `max_epochs` are for every domain; `floors`, `caps` and `epochs` override them by name.

A proposal that is not finite, negative or all zero is a SignalError and no ConfigError, so that the caller
can tell a policy's slip (hold: propose the previous mixture) from rules that cannot be obeyed (stop).
"""

import math
from collections import defaultdict
from dataclasses import dataclass, field
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from mixer.core.blocks import FrozenBlock, Places, in_range
from mixer.core.catalog import Catalog
from mixer.core.errors import ConfigError, InfeasibleError, SignalError
from mixer.core.mixture import SHOWN, Mixture, unknown_domain
from mixer.core.schedule import MixtureSchedule
from mixer.core.simplex import SLACK, Floats, onto_box, onto_box_near, relative

UNLIMITED_ROWS = 1 << 62
ROUNDING = 1e-12  # two bounds that cross by less than this are taken as meeting


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How far a run is before a window: what the rules need to know beside the weights."""

    window_slots: int
    given_d: NDArray[np.int64]  # rows each domain gave so far
    carry_d: Floats | None = None  # the fraction of a row owed to each (below 0: given in advance)
    slots_left: int | None = None  # slots from this window to the end of the run; None: nobody knows

    def __post_init__(self) -> None:
        if self.window_slots < 1 or (self.slots_left is not None and self.slots_left < 1):
            raise ConfigError(
                f"window_slots={self.window_slots}, slots_left={self.slots_left}; both need to be at least 1."
            )

    @classmethod
    def start(cls, catalog: Catalog, window_slots: int, planned_slots: int | None = None) -> "Progress":
        nothing = np.zeros(len(catalog), dtype=np.int64)
        return cls(window_slots=window_slots, given_d=nothing, slots_left=planned_slots)

    @classmethod
    def before(cls, schedule: MixtureSchedule, slots_left: int | None, catalog: Catalog | None = None) -> "Progress":
        """Where a schedule stands before its next window, under its own catalog or the one to be switched to."""
        given_d, carry_d = schedule.position(catalog or schedule.last_catalog)
        slots = schedule.geometry.window_slots
        return cls(window_slots=slots, given_d=given_d, carry_d=carry_d, slots_left=slots_left)


@dataclass(frozen=True, slots=True, kw_only=True)
class GuardRails:
    """The options; the module says what each of them means."""

    floor: float = 0.0
    floors: dict[str, float] = field(default_factory=dict[str, float])
    cap: float = 1.0
    caps: dict[str, float] = field(default_factory=dict[str, float])
    min_rows: int = 0
    max_shift: float | None = None
    max_epochs: float | None = None
    epochs: dict[str, float] = field(default_factory=dict[str, float])
    frozen: dict[str, FrozenBlock] = field(default_factory=dict[str, FrozenBlock])

    def __post_init__(self) -> None:
        in_range("floor", self.floor, 0, 1)
        in_range("cap", self.cap, 0, 1)
        for key, values in (("floors", self.floors), ("caps", self.caps)):
            for name, value in values.items():
                in_range(f"{key}.{name}", value, 0, 1)
        if self.min_rows < 0:
            raise ConfigError(f"min_rows={self.min_rows}; it needs to be 0 or more.")
        if self.max_shift is not None:
            in_range("max_shift", self.max_shift, 0, 2)
        for name, value in self.epochs.items():
            _above_zero(f"epochs.{name}", value)
        if self.max_epochs is not None:
            _above_zero("max_epochs", self.max_epochs)
        owner: dict[str, str] = {}
        for block_name, block in self.frozen.items():
            for name in block.domains:
                if name in owner:
                    raise ConfigError(
                        f"domain {name!r} is in two frozen blocks, {owner[name]!r} and {block_name!r}. Leave it in one."
                    )
                owner[name] = block_name

    def bind(self, catalog: Catalog, prior: Mixture) -> "BoundRails":
        """The rules over one catalog's domains; refuses unknown names and options that contradict."""
        named = {"floors": self.floors, "caps": self.caps, "epochs": self.epochs}
        named |= {f"frozen.{name}": dict.fromkeys(block.domains, 0.0) for name, block in self.frozen.items()}
        for key, names in named.items():
            for name in names:
                if name not in catalog.index:
                    raise ConfigError(f"{key} names the {unknown_domain(name, catalog.names)}")
        if len(prior) != len(catalog):
            raise ConfigError(f"a prior of {len(prior)} weights for a catalog of {len(catalog)} domains.")
        return BoundRails(self, catalog, prior)


class BoundRails:
    """Guard rails over one catalog. Holds no run's state: the same question has the same answer."""

    def __init__(self, options: GuardRails, catalog: Catalog, prior: Mixture) -> None:
        self.options = options
        self.catalog = catalog
        self._places = Places(options.frozen, catalog, prior)
        self._floor_d = self._by_name(options.floor, options.floors)
        self._cap_d = self._by_name(options.cap, options.caps)
        self._rows_d = self._allowed_rows()
        self._prior_r = relative(self._places.gather(prior.weights_d))
        self._ones_r = np.ones(len(self._places))
        self._no_limit_d = np.full(len(catalog), np.inf)
        self._static_bounds(0)

    def bounds(self, progress: Progress) -> tuple[Floats, Floats]:
        """Each domain's least and largest weight in this window, after rules yielded to those above them."""
        lo_r, hi_r = self._bounds(progress)
        return self._places.spread(lo_r), self._places.spread(hi_r)

    def apply(self, proposal: Mixture | Floats, *, previous: Mixture | None, progress: Progress) -> Mixture:
        """The mixture nearest to the proposal that obeys every rule; `previous` is None in the first window.

        A proposal that is an array may have any scale.
        """
        lo_r, hi_r = self._bounds(progress)
        proposed_r = self._places.snapped(self._places.gather(self._checked(proposal)), lo_r, hi_r)
        start_r, max_shift = None, self.options.max_shift
        if previous is not None and max_shift is not None:
            if len(previous) != len(self.catalog):
                raise ConfigError(
                    f"a previous mixture of {len(previous)} weights for a catalog of {len(self.catalog)} "
                    "domains. Carry it over to the catalog in force first."
                )
            start_r = self._places.snapped(self._places.gather(previous.weights_d), lo_r, hi_r)
            if not _inside(start_r, lo_r, hi_r):
                start_r = onto_box((relative(start_r), self._prior_r, self._ones_r), lo_r, hi_r)
        if _inside(proposed_r, lo_r, hi_r) and (
            start_r is None or np.abs(proposed_r - start_r).sum() <= (max_shift or 0.0) + SLACK
        ):
            return Mixture(self._places.spread(proposed_r))
        ratios = (relative(proposed_r), self._prior_r, self._ones_r)
        if start_r is None or max_shift is None:
            return Mixture(self._places.spread(onto_box(ratios, lo_r, hi_r)))
        return Mixture(self._places.spread(onto_box_near(ratios, lo_r, hi_r, start_r, max_shift)))

    def rows_left(self, progress: Progress) -> NDArray[np.int64]:
        """R_i: the rows that each domain may still give by its repeat cap."""
        return np.maximum(self._rows_d - progress.given_d, 0)

    def check(self, progress: Progress) -> None:
        """Refuses rules that cannot hold to the planned end, before they fail on the way there."""
        self._bounds(progress)
        if progress.slots_left is None:
            return
        slots, (lo_r, cap_r) = progress.slots_left, self._static_bounds(progress.window_slots)
        left_d, asked_d = self._rows_d - progress.given_d, self._places.spread(lo_r) * slots
        short_d = asked_d > left_d * (1 + ROUNDING) + 1e-9
        if short_d.any():
            domain = int(np.argmax(short_d))
            floor = self._lower_rule(int(self._places.place_d[domain]), progress.window_slots)
            epochs = self._epochs_rule(domain)
            raise _infeasible(
                f"{floor} asks {self.catalog.names[domain]!r} for {asked_d[domain]:.0f} of the {slots} rows "
                f"to come, but {epochs} leaves it {max(int(left_d[domain]), 0)}. "
                "Lower the first, raise the second, or shorten the run.",
                [floor, epochs],
            )
        pace_d, _ = self._paces(progress)
        self._refuse_too_little(np.minimum(cap_r, self._places.most(pace_d)), pace_d, slots)

    def _bounds(self, progress: Progress) -> tuple[Floats, Floats]:
        lo_r, cap_r = self._static_bounds(progress.window_slots)
        pace_d, last_d = self._paces(progress)
        hi_r = np.minimum(cap_r, self._places.most(pace_d))
        if hi_r.sum() >= 1.0 - SLACK:
            return np.minimum(lo_r, hi_r), hi_r
        last_r = np.minimum(cap_r, self._places.most(last_d))
        self._refuse_too_little(last_r, last_d, progress.window_slots)
        return hi_r, last_r

    def _static_bounds(self, window_slots: int) -> tuple[Floats, Floats]:
        """What the options alone say, for every place; window_slots 0: without `min_rows`."""
        floor_r, cap_r = self._places.least(self._floors(window_slots)), self._places.most(self._cap_d)
        lo_r, hi_r = np.fmax(floor_r, self._places.share_r), np.fmin(cap_r, self._places.share_r)
        if (lo_r > hi_r + ROUNDING).any():
            place = int(np.argmax(lo_r > hi_r + ROUNDING))
            lower, upper = self._lower_rule(place, window_slots), self._upper_rule(place, self._no_limit_d)
            raise _infeasible(
                f"{self._called(place)}: {lower} asks for a weight of {lo_r[place]:.6g}, "
                f"{upper} allows {hi_r[place]:.6g}. Lower the first or raise the second.",
                [lower, upper],
            )
        if lo_r.sum() > 1.0 + SLACK:
            rules = [self._lower_rule(place, window_slots) for place in range(len(self._places))]
            raise _infeasible(f"{_summed(rules, lo_r, 'asks for')} > 1. Lower what asks for most.", rules)
        self._refuse_too_little(hi_r, self._no_limit_d, 0)
        return np.minimum(lo_r, hi_r), hi_r

    def _paces(self, progress: Progress) -> tuple[Floats, Floats]:
        """The most each domain may get by rule 1: paced to the end, and if this window were the last."""
        if progress.given_d.shape != (len(self.catalog),):
            raise ConfigError(
                f"progress of {len(progress.given_d)} domains for a catalog of {len(self.catalog)} domains."
            )
        left_d = np.maximum(self._rows_d - progress.given_d, 0).astype(np.float64)
        carry_d = np.zeros_like(left_d) if progress.carry_d is None else progress.carry_d
        slots = progress.window_slots
        horizon = slots if progress.slots_left is None else max(progress.slots_left, slots)
        pace_d = np.maximum(left_d - carry_d, 0.0) / horizon
        return pace_d, np.maximum(left_d - np.minimum(carry_d, 0.0), 0.0) / slots

    def _checked(self, proposal: Mixture | Floats) -> Floats:
        if isinstance(proposal, Mixture):
            proposed_d = proposal.weights_d
        else:
            proposed_d = np.asarray(proposal, dtype=np.float64)
        if proposed_d.shape != (len(self.catalog),):
            raise SignalError(f"a proposal of shape {proposed_d.shape} for {len(self.catalog)} domains.")
        wrong_d = ~np.isfinite(proposed_d) | (proposed_d < 0)
        if wrong_d.any() or not proposed_d.any():
            first = int(np.argmax(wrong_d))
            found = "zeros only"
            if wrong_d.any():
                found = f"{float(proposed_d[first])!r} for {self.catalog.names[first]!r}"
            raise SignalError(f"a proposal with {found}. It needs finite numbers >= 0, not all 0.")
        largest = proposed_d.max()
        return proposed_d / largest if largest > 1.0 else proposed_d + 0.0

    def _by_name(self, everyone: float, named: dict[str, float]) -> Floats:
        values_d = np.full(len(self.catalog), float(everyone))
        for name, value in named.items():
            values_d[self.catalog.index[name]] = value
        return values_d

    def _allowed_rows(self) -> NDArray[np.int64]:
        """E_i, exact for epochs as they are written: 0.29 of 100 rows is 29, though 0.29 * 100 < 29."""
        rows_d = np.full(len(self.catalog), UNLIMITED_ROWS, dtype=np.int64)
        for place, domain in enumerate(self.catalog.domains):
            epochs = self.options.epochs.get(domain.name, self.options.max_epochs)
            if epochs is not None and math.isfinite(epochs):
                over, under = Fraction(repr(float(epochs))).as_integer_ratio()
                rows_d[place] = min(domain.num_rows * over // under, UNLIMITED_ROWS)
        return rows_d

    def _floors(self, window_slots: int) -> Floats:
        return np.maximum(self._floor_d, self.options.min_rows / window_slots if window_slots else 0.0)

    # From here on: the words for a refusal.

    def _refuse_too_little(self, hi_r: Floats, most_d: Floats, slots: int) -> None:
        """For bounds that no mixture reaches; `most_d` is what the repeat caps allow in `slots` slots."""
        if hi_r.sum() >= 1.0 - SLACK:
            return
        rules = [self._upper_rule(place, most_d) for place in range(len(self._places))]
        text = f"{_summed(rules, hi_r, 'allows')} < 1"
        if not hi_r.any() and not most_d.any():
            text = f"every domain is exhausted: {_summed(rules, hi_r, 'allows')}"
        advice = f" (1 is {slots} rows). Raise what allows least, or shorten the run." if slots else ". Raise it."
        raise _infeasible(text + advice, rules)

    def _lower_rule(self, place: int, window_slots: int) -> str:
        """What sets the least weight of a place, as `key=value`."""
        options, least_d = self.options, self._floors(window_slots)
        members = np.flatnonzero(self._places.place_d == place)
        rho = np.maximum(self._places.rho_d[members], np.finfo(np.float64).tiny)
        domain = int(members[np.argmax(least_d[members] / rho)])
        if self._places.share_r[place] >= (least_d[members] / rho).max():
            return self._within(place, "share")
        name = self.catalog.names[domain]
        rule = f"floors.{name}={options.floors[name]}" if name in options.floors else f"floor={options.floor}"
        if least_d[domain] > self._floor_d[domain]:
            rule = f"min_rows={options.min_rows}"
        return self._within(place, rule)

    def _upper_rule(self, place: int, most_d: Floats) -> str:
        """What sets the largest weight of a place, as `key=value`."""
        options, upper_d = self.options, np.minimum(self._cap_d, most_d)
        members = self._places.members(place)
        domain = int(members[np.argmin(upper_d[members] / self._places.rho_d[members])])
        if self._places.share_r[place] <= upper_d[domain] / self._places.rho_d[domain]:
            return self._within(place, "share")
        name = self.catalog.names[domain]
        rule = f"caps.{name}={options.caps[name]}" if name in options.caps else f"cap={options.cap}"
        if most_d[domain] < self._cap_d[domain]:
            rule = self._epochs_rule(domain)
        return self._within(place, rule)

    def _epochs_rule(self, domain: int) -> str:
        name, epochs = self.catalog.names[domain], self.options.epochs
        return f"epochs.{name}={epochs[name]}" if name in epochs else f"max_epochs={self.options.max_epochs}"

    def _within(self, place: int, rule: str) -> str:
        block = self._places.names[place]
        if rule == "share":
            return f"frozen.{block}.share={self._places.share_r[place]}"
        return rule if block is None else f"frozen.{block} with {rule}"

    def _called(self, place: int) -> str:
        block = self._places.names[place]
        domain = int(self._places.members(place)[0])
        return f"domain {self.catalog.names[domain]!r}" if block is None else f"block {block!r}"


def _summed(rules: list[str], bound_r: Floats, verb: str) -> str:
    """Who asks for (or allows) how much: the bounds of the places, added up by rule."""
    sums: dict[str, list[float]] = defaultdict(list)
    for rule, bound in zip(rules, bound_r.tolist(), strict=True):
        sums[rule].append(bound)
    largest = sorted(sums.items(), key=lambda item: -math.fsum(item[1]))
    parts = [
        f"{rule} for {len(bounds)} domain{'s' * (len(bounds) > 1)} {verb} {math.fsum(bounds):.6g}"
        for rule, bounds in largest[:SHOWN]
    ]
    if len(largest) == 1:
        return parts[0]
    if len(largest) > SHOWN:
        parts.append(f"{len(largest) - SHOWN} more rules")
    return f"{', '.join(parts)}; together {math.fsum(bound_r):.6g}"


def _infeasible(text: str, rules: list[str]) -> InfeasibleError:
    keys = [key for rule in rules for key in rule.rsplit("=", 1)[0].split(" with ")]
    return InfeasibleError(text, tuple(dict.fromkeys(keys)))


def _inside(w: Floats, lo: Floats, hi: Floats) -> bool:
    return bool((lo <= w).all() and (w <= hi).all() and abs(w.sum() - 1.0) <= SLACK)


def _above_zero(key: str, value: float) -> None:
    if not value > 0:
        raise ConfigError(f"{key}={value!r}; it needs to be above 0. To leave a domain out, cap it at 0.")
