"""What a run's journal says as metrics: the one table of names. No tracker in here.

The names are a promise: dashboards are built on them. Every metric has the record's own time, and as its step the
optimizer steps trained after the record's window.

    name                             from                              value
    train/loss                       window: loss                      mean nats a token
    train/tokens                     window: tokens                    targets trained since the run began
    train/tokens_per_s               window: tokens_per_s
    train/data_wait                  window: data_wait_s, seconds      share of the window's time spent waiting for rows
    train/mfu                        window: mfu                       share of the machines' peak arithmetic
    train/rate                       window: rate                      learning rate
    train/grad_norm                  window: grad_norm
    train/skipped_steps              window: skipped_steps             of this window
    train/bad_rows                   window: bad_rows_d                rows of this window without a finite loss
    train/world_size                 window: world_size                ranks
    probe/time                       window: probe_s, seconds          of a probe of influence, as share of the window's
    probe/tokens                     window: probe_tokens              tokens it computed
    influence/<target>/<domain>      window: influence                 first-order fall of the target's loss per unit of
                                                                       weight moved to the domain, where measured
    control/lag_windows              schedule: signals_through         windows between the row and the newest signal
                                                                       behind it; absent where it depends on none
    control/held                     schedule: reason                  1 where the mixture of the row before was held
    weight/<domain>                  schedule: weights                 the share asked for
    share/<domain>                   schedule: counts                  the share of the window's rows given
    passes/<domain>                  schedule: offsets, counts         passes over the domain's rows since the run began
    loss/<domain>                    window: loss_sum, tokens_d        mean nats a token; absent without a token
    tokens/<domain>                  window: tokens_d                  targets trained since the run began
    policy/<name>[/<domain>]         policy: values                    internals after the window's signal
    eval/<set>/loss                  evaluation: sets                  mean nats a token
    eval/<set>/bits_per_byte         evaluation: sets

What is null or missing in a record is no metric. Those by domain, but for influence, are made for every n-th window
only, see `TrackerOptions.every_windows`.

In a name letters, digits, `_`, `-`, `.` and spaces stand for themselves; any other character of a domain's name is
written `_xHEX_` (`web/news` is `web_x2F_news`), and so is a `_` before an `x`, so that it can be undone and two domains
never share a name. One too long to fit ends in `_x_` and a digest of the whole. A set's name keeps its first
slash: `target/code` is `eval/target/code/loss`.
"""

import hashlib
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mixer.core.errors import ScheduleError
from mixer.core.row import ScheduleRow
from mixer.core.schedule import MixtureSchedule, unpack_d

MOST_INFLUENCE = 1024  # numbers of one probe; more of them are in the journal and the report only
NAME_LETTERS = 100  # of one part of a name; a tracker's names have room for 250
TRAIN = ("loss", "tokens", "tokens_per_s", "mfu", "rate", "grad_norm", "skipped_steps", "world_size")
_OTHER = re.compile(r"[^\w.\- ]|_(?=x)|^[. ]| $")


@dataclass(frozen=True, slots=True)
class Metric:
    key: str
    value: float
    time_ms: int
    step: int


class Measures:
    """Turns records into metrics, in the journal's order; keeps the sums that need all records."""

    def __init__(self, schedule: MixtureSchedule, *, every_windows: int, tokens: Mapping[str, int]) -> None:
        self.tokens: dict[str, int] = dict(tokens)  # by domain, since the run began
        self._schedule = schedule
        self._every = every_windows
        self._names: tuple[tuple[str, ...], tuple[str, ...]] = ((), ())  # of domains, and as they are written

    def of(self, record: Mapping[str, Any]) -> Iterator[Metric]:
        """The metrics of one record; one of a kind without metrics has none."""
        kind = record["kind"]
        if kind not in ("window", "policy", "evaluation"):
            return
        time_ms = round(record["time"] * 1000)
        steps = _number(record.get("steps"))
        step = self._schedule.geometry.window_steps * (record["window"] + 1) if steps is None else int(steps)
        for key, value in getattr(self, f"_{kind}")(record):
            if (number := _number(value)) is not None:
                yield Metric(key, number, time_ms, step)

    def _by_domain(self, window: int) -> bool:
        return (window + 1) % self._every == 0

    def _window(self, record: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
        for key in TRAIN:
            yield f"train/{key}", record.get(key)
        seconds, wait = _number(record.get("seconds")), _number(record.get("data_wait_s"))
        if seconds and wait is not None:
            yield "train/data_wait", wait / seconds
        if seconds and (probe := _number(record.get("probe_s"))) is not None:
            yield "probe/time", probe / seconds
            yield "probe/tokens", record.get("probe_tokens")
        try:
            row = self._schedule.row(record["window"])
        except ScheduleError:
            return  # a journal that says more than its schedule
        yield "control/held", float(row.reason.startswith("held"))
        if row.signals_through >= 0:
            yield "control/lag_windows", row.window - 1 - row.signals_through
        yield from self._domains(record, row)
        yield from self._influence(record, row)

    def _domains(self, record: Mapping[str, Any], row: ScheduleRow) -> Iterator[tuple[str, Any]]:
        names = row.catalog.names
        tokens_d = _array(record.get("tokens_d"), row, np.int64)
        loss_sum_d = _array(record.get("loss_sum"), row, np.float64)
        bad_rows_d = _array(record.get("bad_rows_d"), row, np.int64)
        if bad_rows_d is not None:
            yield "train/bad_rows", int(bad_rows_d.sum())
        if tokens_d is not None:
            for name, tokens in zip(names, tokens_d.tolist(), strict=True):
                self.tokens[name] = self.tokens.get(name, 0) + tokens
        if not self._by_domain(row.window):
            return
        written = self._written(names)
        families: dict[str, NDArray[Any]] = {
            "weight": row.weights_d,
            "share": row.counts_d / row.counts_d.sum(),
            "passes": row.next_offsets_d / row.catalog.num_rows_d,
        }
        if tokens_d is not None and loss_sum_d is not None:
            with np.errstate(invalid="ignore", divide="ignore"):
                families["loss"] = np.where(tokens_d > 0, loss_sum_d / tokens_d, np.nan)
        for family, values in families.items():
            for name, value in zip(written, values.tolist(), strict=True):
                yield f"{family}/{name}", value
        if tokens_d is not None:
            for name, plain in zip(written, names, strict=True):
                yield f"tokens/{name}", self.tokens[plain]

    def _influence(self, record: Mapping[str, Any], row: ScheduleRow) -> Iterator[tuple[str, Any]]:
        columns = _mapping(_mapping(record.get("influence")).get("benefit"))
        if len(columns) * len(row.catalog) > MOST_INFLUENCE:
            return
        domains = self._written(row.catalog.names)
        for target, column in columns.items():
            value_d = _array(column, row, np.float64)
            if value_d is not None:
                for name, value in zip(domains, value_d.tolist(), strict=True):
                    yield f"influence/{written(target)}/{name}", value

    def _policy(self, record: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
        by_domain = self._by_domain(record["window"])
        for name, value in _mapping(record.get("values")).items():
            first, slash, domain = name.partition("/")
            if not slash:
                yield f"policy/{written(first)}", value
            elif by_domain:
                yield f"policy/{written(first)}/{written(domain)}", value

    def _evaluation(self, record: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
        for name, found in _mapping(record.get("sets")).items():
            of_set = "/".join(map(written, name.split("/", 1)))
            for key in ("loss", "bits_per_byte"):
                yield f"eval/{of_set}/{key}", _mapping(found).get(key)

    def _written(self, names: tuple[str, ...]) -> tuple[str, ...]:
        if self._names[0] is not names:
            self._names = (names, tuple(map(written, names)))
        return self._names[1]


def written(name: str) -> str:
    """One part of a metric's name, in the letters that trackers allow; different for different names."""
    text = _OTHER.sub(lambda found: f"_x{ord(found[0]):X}_", name)
    if len(text) <= NAME_LETTERS:
        return text
    digest = hashlib.sha256(name.encode(errors="backslashreplace")).hexdigest()[:32]
    return f"{text[: NAME_LETTERS - 35]}_x_{digest}"


def _array(value: Any, row: ScheduleRow, kind: type[Any]) -> NDArray[Any] | None:
    if value is None:
        return None
    try:
        return unpack_d(value, row.catalog, kind)
    except (ValueError, TypeError):
        return None  # of another catalog, or damaged: the journal is not the truth


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _number(value: Any) -> float | None:
    """A finite number, or None."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)
