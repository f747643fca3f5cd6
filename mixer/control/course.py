"""The course of a run as arrays over tokens: what pictures and tables draw.

Long runs are drawn by points of several windows each (`stride`), so that a picture costs the same after ten
windows and after a million. Sums are summed and shares averaged, so nothing that is shown depends on which window a
point would have picked. Domains are all names that the run ever had, sorted; where a catalog lacks one, it is NaN.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mixer.control.record import Record, catalogs_of, number

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

MOST_POINTS = 600
SHOWN_DOMAINS = 20  # drawn by name; of more, the largest and those that move most
MOST_MOVING = 6


@dataclass(frozen=True, slots=True, eq=False)
class Course:
    """B points of up to `stride` windows each, D names. What was not measured is NaN."""

    names: tuple[str, ...]
    stride: int
    has_tokens: bool  # whether tokens were counted; else they are rows times their length
    tokens_e: Floats  # tokens before point b at b, and after the last one: B + 1
    last_b: Ints  # the last window of each point
    weights_bd: Floats  # mean share
    passes_bd: Floats  # over the domain's rows, after the point
    apart_bd: Floats  # shares summed less rows given, after the point
    apart_low_b: Floats  # over all domains and windows of the point
    apart_high_b: Floats
    lag_b: Ints  # the largest
    loss_sum_bd: Floats
    loss_tokens_bd: Floats
    speed_b: Floats
    wait_b: Floats  # share of the time
    rate_b: Floats
    grad_norm_b: Floats
    given_d: Ints  # rows of all windows decided
    trained_d: Ints  # rows of all windows in the journal, bad ones too
    planned_d: Ints  # rows that the schedule has for those windows
    bad_d: Ints

    def __len__(self) -> int:
        return len(self.last_b)

    @property
    def after_b(self) -> Floats:
        """Tokens after each point."""
        return self.tokens_e[1:]

    @property
    def loss_bd(self) -> Floats:
        """Mean loss of a token of each domain."""
        return _ratio(self.loss_sum_bd, self.loss_tokens_bd)

    def loss_of(self, places: Sequence[int] | None = None) -> Floats:
        """Mean loss of a token of some domains together, point by point; None: of all."""
        chosen = slice(None) if places is None else list(places)
        return _ratio(self.loss_sum_bd[:, chosen].sum(axis=1), self.loss_tokens_bd[:, chosen].sum(axis=1))

    @property
    def largest_apart(self) -> float:
        """The farthest that any domain's rows ever were from the sum of its shares."""
        return float(max(self.apart_high_b.max(initial=0.0), -self.apart_low_b.min(initial=0.0)))


def course_of(record: Record, most_points: int = MOST_POINTS) -> Course:
    schedule = record.schedule
    num = len(schedule)
    names = tuple(sorted({name for _, catalog in catalogs_of(schedule) for name in catalog.names}))
    stride = max(1, -(-num // most_points))
    points = -(-num // stride)
    tally = _Tally(record, names, stride, points)
    for row in schedule:
        tally.decided(row)
        tally.trained(row)
    has_tokens, tokens_w = _tokens_before(record)
    last_b = np.minimum(np.arange(1, points + 1) * stride, num) - 1
    size_b = np.diff(np.append(np.arange(points) * stride, num))[:, None]
    with np.errstate(invalid="ignore", divide="ignore"):
        return Course(
            names=names,
            stride=stride,
            has_tokens=has_tokens,
            tokens_e=tokens_w[np.append(np.arange(points) * stride, num)],
            last_b=last_b,
            weights_bd=np.where(tally.seen_bd, tally.weights_bd / size_b, np.nan),
            passes_bd=tally.passes_bd,
            apart_bd=tally.apart_bd,
            apart_low_b=tally.apart_low_b,
            apart_high_b=tally.apart_high_b,
            lag_b=tally.lag_b,
            loss_sum_bd=tally.loss_bd,
            loss_tokens_bd=tally.tokens_bd,
            speed_b=_ratio(tally.sums["tokens"], tally.sums["seconds"]),
            wait_b=_ratio(tally.sums["data_wait_s"], tally.sums["seconds"]),
            rate_b=_ratio(tally.sums["rate"], tally.times["rate"]),
            grad_norm_b=_ratio(tally.sums["grad_norm"], tally.times["grad_norm"]),
            given_d=tally.given_d,
            trained_d=tally.trained_d,
            planned_d=tally.planned_d,
            bad_d=tally.bad_d,
        )


def _ratio(above: Floats, below: Floats) -> Floats:
    return np.where(below > 0, above / np.where(below > 0, below, 1.0), np.nan)


class _Tally:
    """Sums over windows, point by point."""

    def __init__(self, record: Record, names: tuple[str, ...], stride: int, points: int) -> None:
        shape = points, len(names)
        self.record, self.stride = record, stride
        self.index = {name: place for place, name in enumerate(names)}
        self.places: dict[str, Ints] = {}  # of a catalog's domains among all names
        self.seen_bd = np.zeros(shape, dtype=bool)
        self.weights_bd, self.loss_bd, self.tokens_bd = np.zeros(shape), np.zeros(shape), np.zeros(shape)
        self.passes_bd, self.apart_bd = np.full(shape, np.nan), np.full(shape, np.nan)
        self.apart_low_b, self.apart_high_b = np.zeros(points), np.zeros(points)
        self.lag_b = np.zeros(points, dtype=np.int64)
        self.given_d, self.trained_d, self.planned_d, self.bad_d = (
            np.zeros(len(names), dtype=np.int64) for _ in range(4)
        )
        keys = ("tokens", "seconds", "data_wait_s", "rate", "grad_norm")
        self.sums = {key: np.zeros(points) for key in keys}
        self.times = {key: np.zeros(points) for key in keys}

    def _place_d(self, row: Any) -> Ints:
        mark = row.catalog.fingerprint
        if mark not in self.places:
            self.places[mark] = np.array([self.index[name] for name in row.catalog.names], dtype=np.int64)
        return self.places[mark]

    def decided(self, row: Any) -> None:
        place_d, b = self._place_d(row), row.window // self.stride
        apart_d = row.next_carry_d
        self.seen_bd[b, place_d] = True
        self.weights_bd[b, place_d] += row.weights_d
        self.passes_bd[b, place_d] = row.next_offsets_d / row.catalog.num_rows_d
        self.apart_bd[b, place_d] = apart_d
        self.apart_low_b[b] = min(self.apart_low_b[b], apart_d.min())
        self.apart_high_b[b] = max(self.apart_high_b[b], apart_d.max())
        self.lag_b[b] = max(self.lag_b[b], row.window - 1 - row.signals_through)
        self.given_d[place_d] += row.counts_d

    def trained(self, row: Any) -> None:
        told = self.record.windows.get(row.window)
        if told is None:
            return
        place_d, b = self._place_d(row), row.window // self.stride
        loss_d, tokens_d = (self.record.measured(row.window, key) for key in ("loss_sum", "tokens_d"))
        rows_d, bad_d = (self.record.measured(row.window, key) for key in ("rows_d", "bad_rows_d"))
        if loss_d is not None and tokens_d is not None:
            self.loss_bd[b, place_d] += loss_d
            self.tokens_bd[b, place_d] += tokens_d
        if rows_d is not None:
            self.trained_d[place_d] += rows_d + (0 if bad_d is None else bad_d)
            self.planned_d[place_d] += row.counts_d
        if bad_d is not None:
            self.bad_d[place_d] += bad_d
        seconds = number(told.get("seconds"))
        speed = number(told.get("tokens_per_s"))
        values = {"seconds": seconds, "tokens": speed * seconds, "data_wait_s": number(told.get("data_wait_s"))}
        values |= {key: number(told.get(key)) for key in ("rate", "grad_norm")}
        for key, value in values.items():
            if math.isfinite(value):
                self.sums[key][b] += value
                self.times[key][b] += 1


def _tokens_before(record: Record) -> tuple[bool, Floats]:
    """Tokens trained before each window and after the last; windows that nobody counted are taken by rows."""
    schedule, num = record.schedule, len(record.schedule)
    by_rows = np.arange(num + 1, dtype=np.float64) * float(schedule.geometry.window_slots * schedule.catalog.row_tokens)
    known = sorted((k + 1, number(one.get("tokens"))) for k, one in record.windows.items() if k < num)
    known = [(k, tokens) for k, tokens in known if math.isfinite(tokens)]
    if not known:
        return False, by_rows
    at, tokens = np.array([(0, 0.0), *known]).T
    found = np.interp(np.arange(num + 1), at, tokens)
    beyond = np.arange(num + 1) > at[-1]
    found[beyond] = tokens[-1] + by_rows[1] * (np.arange(num + 1)[beyond] - at[-1])
    return True, found


def shown_domains(course: Course) -> tuple[int, ...]:
    """The domains to be drawn by name, in the order of names: all, or the largest and those that move most."""
    if len(course.names) <= SHOWN_DOMAINS or not len(course):
        return tuple(range(len(course.names)))
    weights_bd = np.nan_to_num(course.weights_bd)
    moving = np.argsort(-np.ptp(weights_bd, axis=0), kind="stable")[:MOST_MOVING].tolist()
    largest = [place for place in np.argsort(-weights_bd.max(axis=0), kind="stable").tolist() if place not in moving]
    return tuple(sorted([*moving, *largest[: SHOWN_DOMAINS - len(moving)]]))


@dataclass(frozen=True, slots=True, eq=False)
class Measured:
    """One evaluation set over the run."""

    tokens_n: Floats
    loss_n: Floats
    bits_per_byte_n: Floats


def evaluations_of(record: Record) -> dict[str, Measured]:
    """Every evaluation set by name, over tokens."""
    found: dict[str, list[tuple[float, float, float]]] = {}
    for one in record.evaluations:
        for name, values in (one.get("sets") or {}).items():
            point = number(one.get("tokens")), number(values.get("loss")), number(values.get("bits_per_byte"))
            found.setdefault(name, []).append(point)
    return {name: Measured(*np.array(sorted(found[name])).T) for name in sorted(found)}


def internals_of(record: Record) -> dict[str, dict[str | None, tuple[Floats, Floats]]]:
    """The policy's internals: by name and domain (None: one number for all), windows and values."""
    found: dict[str, dict[str | None, list[tuple[float, float]]]] = {}
    for window in sorted(record.policy):
        for key, value in (record.policy[window].get("values") or {}).items():
            name, mark, domain = key.partition("/")
            found.setdefault(name, {}).setdefault(domain if mark else None, []).append((window, number(value)))
    return {
        name: {domain: (np.array(points)[:, 0], np.array(points)[:, 1]) for domain, points in series.items()}
        for name, series in sorted(found.items())
    }
