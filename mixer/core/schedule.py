"""The saved mixture schedule: per window one row, only ever appended, the truth about a run.

A row says what a window is made of: the weights it is bound to, the whole rows of each domain that
follow from them, what each domain gave before (`offsets_d`) and is owed (`carry_d`), the catalog in
force, and why. So any window can be planned from its row alone, and any reader can check the sums:

    offsets_d of the next row = offsets_d + counts_d
    carry_d  of the next row = carry_d + weights_d * slots - counts_d,   always within (-1, 1)

Text form: JSON lines. The first line is the header (format, plan version, geometry, first catalog),
then one line a window; a change of catalog is a line of its own before the window it begins with.
Arrays of up to 64 domains are mappings by name, longer ones the base64 of little-endian 64-bit
numbers in catalog order; both restore every value exactly. Every line ends in a check value over
its own text and the check before it, so a lost, changed or swapped line is found. A torn last line
is what a crash leaves: it was never shown to anybody and is dropped. A tear anywhere else is an error.
"""

import base64
import hashlib
import json
import math
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from mixer.core import plan
from mixer.core.apportion import apportion
from mixer.core.catalog import Catalog
from mixer.core.errors import MixerError, ResumeError, ScheduleError
from mixer.core.mixture import Mixture
from mixer.core.plan import Geometry
from mixer.core.row import ScheduleRow

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

FORMAT = 1
READABLE_DOMAINS = 64
EXACT_SUM = 1e-15  # weights whose sum is this near to 1 are bound to the last bit as they were asked for
CHECK_HEX = 16
_CHECK = ',"check":"'
_CATALOG_LINE = b'{"catalog_from"'


@dataclass(slots=True)
class MixtureSchedule:
    """Windows 0, 1, 2, ... without gaps; a row once written is never changed. A `MixtureFeed` as it stands."""

    catalog: Catalog
    geometry: Geometry
    plan_version: int = plan.VERSION
    switches: list[int] = field(default_factory=list[int], init=False)  # windows with another catalog than before
    # Rows, or what makes them: those of a saved schedule are decoded when they are first asked for.
    _rows: list[ScheduleRow | Callable[[], ScheduleRow]] = field(
        default_factory=list[ScheduleRow | Callable[[], ScheduleRow]], init=False, repr=False
    )

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[ScheduleRow]:
        return map(self.row, range(len(self)))

    def row(self, window: int) -> ScheduleRow:
        if not 0 <= window < len(self._rows):
            raise ScheduleError(f"window {window} is not in the schedule, which has {len(self._rows)}. It ends here.")
        row = self._rows[window]
        if not isinstance(row, ScheduleRow):
            row = self._rows[window] = row()
        return row

    @property
    def rows(self) -> list[ScheduleRow]:
        return list(self)

    @property
    def last(self) -> ScheduleRow | None:
        return self.row(len(self) - 1) if self._rows else None

    @property
    def last_catalog(self) -> Catalog:
        return self.last.catalog if self.last else self.catalog

    def propose(
        self,
        mixture: Mixture,
        *,
        catalog: Catalog | None = None,
        limit_d: Ints | None = None,
        signals_through: int = -1,
        reason: str = "prior",
    ) -> ScheduleRow:
        """The row that would bind `mixture` to the next window; nothing is written.

        `limit_d` is the most rows each domain may still give. With another `catalog`, domains of the
        same name and content go on where they last were, all others begin at their first row.
        """
        catalog = catalog or self.last_catalog
        if len(mixture) != len(catalog):
            raise ScheduleError(f"a mixture of {len(mixture)} weights for a catalog of {len(catalog)} domains.")
        offsets_d, carry_d = self.position(catalog)
        slots = self.geometry.window_slots
        weights_d = mixture.weights_d
        if abs((total := math.fsum(weights_d.tolist())) - 1.0) > EXACT_SUM:
            weights_d = weights_d / total  # else what the sum misses would add up in the carries, window by window
        given = apportion(weights_d * slots, carry_d, slots, limit_d)
        if given.settled:
            weights_d = given.share_d / slots
        for array in (weights_d, given.count_d, offsets_d, carry_d):
            array.flags.writeable = False
        return ScheduleRow(len(self), catalog, weights_d, given.count_d, offsets_d, carry_d, signals_through, reason)

    def append(self, row: ScheduleRow) -> ScheduleRow:
        """Write `row`, if it follows from the one before it."""
        offsets_d, carry_d = self.position(row.catalog)
        slots = self.geometry.window_slots

        def refuse(what: str) -> None:
            raise ScheduleError(f"row of window {row.window} does not follow from the one before it: {what}.")

        if row.window != len(self):
            refuse(f"window {len(self)} comes next")
        if int(row.counts_d.sum()) != slots or (row.counts_d < 0).any():
            refuse(f"its counts sum to {int(row.counts_d.sum())}, a window has {slots} slots")
        if not np.array_equal(row.offsets_d, offsets_d):
            refuse(_first_difference("offset", row.catalog, row.offsets_d, offsets_d))
        if not np.array_equal(row.carry_d, carry_d):
            refuse(_first_difference("carry", row.catalog, row.carry_d, carry_d))
        if np.abs(row.next_carry_d).max() >= 1.0:
            refuse("counts and weights are a row or more apart")
        if not -1 <= row.signals_through < max(row.window, 0):
            refuse(f"it depends on signals through window {row.signals_through}")
        Mixture(row.weights_d)
        if self.last and row.catalog.fingerprint != self.last.catalog.fingerprint:
            self.switches.append(row.window)
        self._rows.append(row)
        return row

    def append_saved(self, decode: Callable[[], ScheduleRow], *, switched: bool) -> None:
        """A row that a schedule's own text vouches for; it is decoded when it is asked for."""
        if switched and self._rows:
            self.switches.append(len(self))
        self._rows.append(decode)

    def extend(self, mixture: Mixture, windows: int = 1, **why: Any) -> "MixtureSchedule":
        """Bind the same mixture to the next windows; returns itself."""
        for _ in range(windows):
            self.append(self.propose(mixture, **why))
        return self

    def position(self, catalog: Catalog) -> tuple[Ints, Floats]:
        """What each domain of `catalog` gave before the next window, and is owed."""
        if (last := self.last) is None:
            return np.zeros(len(catalog), dtype=np.int64), np.zeros(len(catalog))
        if catalog is last.catalog or catalog.fingerprint == last.catalog.fingerprint:
            return last.next_offsets_d, last.next_carry_d
        return self._latest(catalog)

    def _latest(self, catalog: Catalog) -> tuple[Ints, Floats]:
        """Where each domain was after the last window whose catalog had it, by name and content."""
        offsets_d, carry_d = np.zeros(len(catalog), dtype=np.int64), np.zeros(len(catalog))
        wanted = {(domain.name, domain.content): place for place, domain in enumerate(catalog.domains)}
        for end in [len(self), *reversed(self.switches)]:
            row = self.row(end - 1)  # the last row of a stretch under one catalog says it all
            last_offsets_d, last_carry_d = row.next_offsets_d, row.next_carry_d
            for place, domain in enumerate(row.catalog.domains):
                if (new := wanted.pop((domain.name, domain.content), None)) is not None:
                    offsets_d[new], carry_d[new] = last_offsets_d[place], last_carry_d[place]
            if not wanted:
                break
        return offsets_d, carry_d

    # ---- the same mixtures over another length -------------------------------------------------

    def stretch(
        self, windows: int, geometry: Geometry | None = None, catalog: Catalog | None = None
    ) -> "MixtureSchedule":
        """The same course of mixtures, by token fraction, over another number of windows, other batches or rows.

        Window j of the new schedule takes the mean of the old weights over the part of the run it covers,
        [j, j + 1) / windows; rows are planned afresh. A change of catalog keeps its place, which must be where
        a new window begins. With `catalog`, of the same names, all rows are that one's.
        """
        old = len(self)
        if windows < 1 or not self:
            raise ScheduleError(f"cannot stretch {old} windows to {windows}. Both must be at least 1.")
        if catalog is not None and (self.switches or catalog.names != self.row(0).catalog.names):
            raise ScheduleError(
                f"cannot stretch to another catalog: the schedule has {len(self.switches)} changes of catalog, and "
                "its domains and those of the new one must have the same names. Use the schedule's catalogs."
            )
        for switch in self.switches:
            if switch * windows % old:
                fits = old // math.gcd(old, *self.switches)
                raise ScheduleError(
                    f"cannot stretch {old} windows to {windows}: the catalog changes before window {switch}, which "
                    f"would fall inside window {switch * windows // old}. Use a multiple of {fits} windows."
                )
        stretched = MixtureSchedule(catalog or self.catalog, geometry or self.geometry)
        for new in range(windows):
            # In units of 1 / (old * windows) of the run, old window i covers [i, i + 1) * windows.
            begin, end = new * old, (new + 1) * old
            first = self.row(begin // windows)
            weights_d = np.zeros(len(first.catalog))
            for i in range(begin // windows, -(-end // windows)):
                part = min(end, (i + 1) * windows) - max(begin, i * windows)
                weights_d += self.row(i).weights_d * (part / old)
            stretched.extend(Mixture(weights_d), catalog=catalog or first.catalog, reason="stretched")
        return stretched

    def head(self, windows: int) -> "MixtureSchedule":
        """The first so many windows, as a schedule of their own."""
        if not 0 <= windows <= len(self):
            raise ScheduleError(f"the first {windows} windows of a schedule that has {len(self)}. Ask for fewer.")
        head = MixtureSchedule(self.catalog, self.geometry, self.plan_version)
        head.switches = [switch for switch in self.switches if switch < windows]
        head._rows = self._rows[:windows]
        return head

    # ---- text ----------------------------------------------------------------------------------

    def to_text(self) -> str:
        writer = LineWriter.begin(self)
        return writer.header + "".join(map(writer.lines, self))

    @classmethod
    def from_text(cls, text: str | bytes) -> "MixtureSchedule":
        """The schedule of a text; a torn last line is left out."""
        return read(text).schedule

    def check_resume(self, catalog: Catalog, geometry: Geometry) -> None:
        """Refuse to go on under anything that would move a row, each difference with its own text."""
        if self.plan_version != plan.VERSION:
            raise ResumeError(
                f"resume refused: the run was planned by version {self.plan_version} of the plan, this is "
                f"{plan.VERSION}. Row order depends on it. Use the release that began the run."
            )
        for key, saved in asdict(self.geometry).items():
            if (given := getattr(geometry, key)) != saved:
                raise ResumeError(
                    f"resume refused: the run has {key}={saved}, this config has {given}. Row order depends on it. "
                    f"Use {saved}, or start a new run."
                )
        now = self.last_catalog
        if now.row_tokens != catalog.row_tokens:
            raise ResumeError(
                f"resume refused: the run has row_tokens={now.row_tokens}, this corpus has {catalog.row_tokens}. "
                "Use the corpus the run began with, or start a new run."
            )
        if now.tokenizer != catalog.tokenizer:
            raise ResumeError(
                f"resume refused: the run was tokenized by {now.tokenizer}, this corpus by {catalog.tokenizer}. "
                "Use the corpus the run began with, or start a new run."
            )
        if now.fingerprint != catalog.fingerprint:
            raise ResumeError(
                f"resume refused: the catalog is not the run's: {'; '.join(now.differences(catalog)[:5])}. "
                "Use the run's catalog, or bind the new one to a window of the schedule."
            )


@dataclass(slots=True)
class GrowingSchedule:
    """A feed for a loop that decides by itself: asks for the mixture of each next window, once, and keeps it."""

    schedule: MixtureSchedule
    ask: Callable[[int], Mixture]

    def row(self, window: int) -> ScheduleRow:
        while len(self.schedule) <= window:
            mixture = self.ask(len(self.schedule))
            self.schedule.append(self.schedule.propose(mixture, reason="asked"))
        return self.schedule.row(window)


def _first_difference(what: str, catalog: Catalog, found_d: Ints | Floats, needed_d: Ints | Floats) -> str:
    if len(found_d) != len(needed_d):
        return f"{len(found_d)} {what}s for {len(needed_d)} domains"
    place = int(np.flatnonzero(found_d != needed_d)[0])
    return f"{what} of {catalog.names[place]!r} is {found_d[place]}, {needed_d[place]} would follow"


# ---- the text form -------------------------------------------------------------------------------


@dataclass(slots=True)
class LineWriter:
    """Turns rows into lines, one after the other; holds the check of the last line and the catalog in force."""

    header: str
    check: str
    catalog: Catalog

    @classmethod
    def begin(cls, schedule: MixtureSchedule) -> "LineWriter":
        value = {
            "format": FORMAT,
            "plan": schedule.plan_version,
            "geometry": _geometry(schedule.geometry),
            "catalog": schedule.catalog.to_dict(),
        }
        header, check = _line(value, "")
        return cls(header, check, schedule.catalog)

    def lines(self, row: ScheduleRow) -> str:
        """The text to append for `row`: its line, after one for its catalog where that is new."""
        text = ""
        if row.catalog.fingerprint != self.catalog.fingerprint:
            text, self.check = _line({"catalog_from": row.window, "catalog": row.catalog.to_dict()}, self.check)
            self.catalog = row.catalog
        value = {
            "window": row.window,
            "weights": pack_d(row.weights_d, row.catalog),
            "counts": pack_d(row.counts_d, row.catalog),
            "offsets": pack_d(row.offsets_d, row.catalog),
            "carry": pack_d(row.carry_d, row.catalog),
            "signals_through": row.signals_through,
            "reason": row.reason,
        }
        line, self.check = _line(value, self.check)
        return text + line


@dataclass(frozen=True, slots=True)
class Reading:
    """A schedule as found: `size` bytes of the text are sound, `torn` more were dropped; `writer` goes on."""

    schedule: MixtureSchedule
    writer: LineWriter
    size: int
    torn: int


def read(text: str | bytes, *, thorough: bool = True) -> Reading:
    """Read a schedule: every check value, and if `thorough` also every row and the sums between rows.

    Else rows are decoded when they are asked for, so that a long run resumes as fast as a short one;
    the check values vouch for what the writer summed up.
    """
    data = text.encode() if isinstance(text, str) else bytes(text)
    lines = data.split(b"\n")
    tail = lines.pop()  # what follows the last newline: nothing, or a torn line
    if not lines:
        raise ScheduleError(f"no schedule: {len(data)} bytes without one whole line. Its writing never got that far.")
    check = _require_check(lines[0], "", 1)
    with _reading(1):
        head = _json(lines[0])
    schedule = _read_header(head)
    writer = LineWriter(lines[0].decode() + "\n", check, schedule.catalog)
    read_row = _ROW_READERS[int(head["format"])]
    catalog, size, pending = schedule.catalog, len(lines[0]) + 1, 0
    for number, line in enumerate(lines[1:], start=2):
        check = _require_check(line, check, number)
        if line.startswith(_CATALOG_LINE):
            with _reading(number):
                catalog, pending = Catalog.from_dict(_json(line)["catalog"]), pending + len(line) + 1
            continue  # it counts only together with the row it was written for
        if thorough:
            with _reading(number):
                schedule.append(read_row(_json(line), catalog))
        else:
            decode = partial(_decode, line, number, read_row, catalog, len(schedule))
            schedule.append_saved(decode, switched=catalog is not writer.catalog)
        size, pending = size + pending + len(line) + 1, 0
        writer.check, writer.catalog = check, catalog
    if tail[-1:] not in (b"", b"\0") and _has_check(tail[:-1], check):  # a tear leaves no byte, or zeros
        raise ScheduleError(
            f"line {len(lines) + 1} of the schedule is damaged: it is whole, but ends in {tail[-1:]!r} and not in a "
            "newline. Restore the file from a copy."
        )
    return Reading(schedule, writer, size, pending + len(tail))


def _read_header(head: dict[str, Any]) -> MixtureSchedule:
    version = head.get("format")
    if type(version) is not int or version not in _ROW_READERS:
        known = ", ".join(map(str, _ROW_READERS))
        raise ScheduleError(
            f"the schedule has format {version!r}, this release reads {known}. "
            "Use the release that wrote it, or a newer."
        )
    try:
        geometry = Geometry(**head["geometry"])
        return MixtureSchedule(Catalog.from_dict(head["catalog"]), geometry, plan_version=int(head["plan"]))
    except (KeyError, TypeError, ValueError, MixerError) as error:
        raise ScheduleError(f"the header of the schedule cannot be understood: {error!r}.") from error


def _geometry(geometry: Geometry) -> dict[str, int]:
    """As the header holds it: without `together_rows` where it changes nothing, as in headers older than that."""
    value = asdict(geometry)
    if geometry.together_rows == 1:
        del value["together_rows"]
    return value


def _read_row_1(value: dict[str, Any], catalog: Catalog) -> ScheduleRow:
    return ScheduleRow(
        window=int(value["window"]),
        catalog=catalog,
        weights_d=unpack_d(value["weights"], catalog, np.float64),
        counts_d=unpack_d(value["counts"], catalog, np.int64),
        offsets_d=unpack_d(value["offsets"], catalog, np.int64),
        carry_d=unpack_d(value["carry"], catalog, np.float64),
        signals_through=int(value["signals_through"]),
        reason=str(value["reason"]),
    )


_RowReader = Callable[[dict[str, Any], Catalog], ScheduleRow]
_ROW_READERS: dict[int, _RowReader] = {1: _read_row_1}


def _line(value: dict[str, Any], check_before: str) -> tuple[str, str]:
    """One line of text, and its check, which also covers the check of the line before."""
    body = json.dumps(value, separators=(",", ":"), ensure_ascii=False, allow_nan=False)[:-1]
    check = _check_of(body.encode(), check_before)
    return f'{body}{_CHECK}{check}"}}\n', check


def _decode(line: bytes, number: int, read_row: _RowReader, catalog: Catalog, window: int) -> ScheduleRow:
    with _reading(number):
        row = read_row(_json(line), catalog)
        if row.window != window:
            raise ScheduleError(f"it says window {row.window}, and stands in the place of {window}.")
        return row


@contextmanager
def _reading(number: int) -> Generator[None]:
    """Puts the number of the line before whatever is wrong with it."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise ScheduleError(f"line {number} of the schedule is not a row: {error!r}.") from error
    except MixerError as error:
        raise ScheduleError(f"line {number} of the schedule: {error}") from error


def _json(line: bytes) -> dict[str, Any]:
    try:
        return cast(dict[str, Any], json.loads(line))  # a body and a check within braces is a mapping
    except ValueError as error:
        raise ScheduleError(f"not JSON: {error}") from error


def _require_check(line: bytes, check_before: str, number: int) -> str:
    """The check value of a line, if it is the right one."""
    if not _has_check(line, check_before):
        raise ScheduleError(
            f"line {number} of the schedule is damaged, or lines before it are missing: its check value does not fit. "
            "Restore the file from a copy; nothing after this line can be trusted."
        )
    return line[-CHECK_HEX - 2 : -2].decode()


def _has_check(line: bytes, check_before: str) -> bool:
    body, mark, rest = line.rpartition(_CHECK.encode())
    return bool(mark) and rest == f'{_check_of(body, check_before)}"}}'.encode()


def _check_of(body: bytes, check_before: str) -> str:
    return hashlib.blake2b(body, key=check_before.encode(), digest_size=CHECK_HEX // 2).hexdigest()


def pack_d(values: Floats | Ints, catalog: Catalog) -> dict[str, float | int] | str:
    """Values in catalog order as JSON can hold them, exactly: a mapping by name, or base64 of many."""
    if len(values) <= READABLE_DOMAINS:
        return dict(zip(catalog.names, values.tolist(), strict=True))
    return base64.b64encode(values.astype(values.dtype.newbyteorder("<")).tobytes()).decode()


def unpack_d(value: Mapping[str, float | int | None] | str, catalog: Catalog, kind: type[Any]) -> NDArray[Any]:
    """What `pack_d` packed, read-only; a null among floats is NaN. Anything else is a ValueError or TypeError."""
    values: NDArray[Any]
    if isinstance(value, str):
        values = np.frombuffer(base64.b64decode(value, validate=True), dtype=np.dtype(kind).newbyteorder("<"))
        values = values.astype(kind)
    else:
        if value.keys() != catalog.index.keys():
            raise ValueError(f"domains {sorted(value.keys() ^ catalog.index.keys())} do not fit the catalog")
        values = np.array([value[name] for name in catalog.names], dtype=kind)
    if len(values) != len(catalog):
        raise ValueError(f"{len(values)} values for {len(catalog)} domains")
    values.flags.writeable = False
    return values
