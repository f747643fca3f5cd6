"""The journal of a run: what happened, for people, reports and trackers. Bookkeeping, never the truth about a run.

`journal.jsonl` holds one JSON record a line, each with a "kind" and a "time" in unix seconds; kinds are "window",
"policy", "evaluation" and "event". The first three also have a "window", and of one kind windows only grow: what is
not beyond the last is dropped, so that a restart, which trains windows again and reports them again, adds nothing.
Events are always kept. Numbers that are not finite are null.

One process appends, within the owner's fence; any may read while it does. A record is one write of a whole line.
Nothing here raises for the sake of a file, since training never stops for bookkeeping: a disk that is full or gone
costs the records of that time and one warning, and never leaves half a line between whole ones.

What is newest is read from the end, as far as TAIL_BYTES and TAIL_LINES, so that a long run is opened as fast as a
short one. What is rarer than that (an evaluation before the first window) is not found; nobody then misses more than
to be told of it, and readers leave out what was written twice.
"""

import errno
import json
import logging
import math
import os
import re
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import Any

import numpy as np

from mixer.control.fence import Fence
from mixer.core.errors import MixerError

logger = logging.getLogger(__name__)

ONCE = frozenset({"window", "policy", "evaluation"})  # kinds of which a window has one record
KINDS = ONCE | {"event"}
TAIL_BYTES, TAIL_LINES = 1 << 17, 64  # no more is read from the end than what reaches both
# How a run ended, as its events say, with the word that MLflow has for it; what is in GOES_ON takes an end back.
ENDINGS = {"finished": "FINISHED", "stopped": "KILLED", "bad_loss": "FAILED", "failed": "FAILED"}
GOES_ON = ("begun", "resumed")
_HEAD = re.compile(rb'\{"kind":"(\w+)","window":(\d+)[,}]')  # how `append` begins a record of those kinds
_BLOCK_BYTES = 1 << 20
_BACK_BYTES = 1 << 15
_LOST = "the run belongs to another process"


class Once:
    """The rule that windows of one kind only grow."""

    def __init__(self, last: Mapping[str, int] | None = None) -> None:
        self.last: dict[str, int] = dict(last or {})  # kind -> its newest window

    def is_known(self, record: Mapping[str, Any]) -> bool:
        last = self.last.get(record["kind"])
        return record["kind"] in ONCE and last is not None and record["window"] <= last

    def note(self, record: Mapping[str, Any]) -> None:
        if record["kind"] in ONCE:
            self.last[record["kind"]] = record["window"]


class Journal:
    """The appending end, for any number of threads. Whatever happens to its file or to the ownership of its run, no
    method raises an error of it."""

    def __init__(self, path: Path, fence: Fence | None = None) -> None:
        """With the fence of the run, a process that was replaced adds nothing to it."""
        self.path = path
        self._fence = fence
        self.lost = 0  # records that could not be written
        self._once = Once()
        self._lock = threading.Lock()
        self._number = -1
        self._trouble: str | None = None  # what the last warning said, while that goes on
        self._half = -1  # size to cut the file back to before anything is added: half a line follows
        try:
            with self._writing():
                self._open()
        except (OSError, MixerError) as error:
            self._failed(error)

    def append(self, record: Mapping[str, Any]) -> bool:
        """Add a record, with the time if it has none. False: known already, or it cannot be written now."""
        data = _line(record)
        with self._lock:
            if self._once.is_known(record):
                return False
            try:
                with self._writing():
                    self._write(data)
            except (OSError, MixerError) as error:
                self.lost += 1
                self._failed(error)
                return False
            if self._trouble:
                logger.warning("%s is written again; %d records are missing from it so far", self.path, self.lost)
                self._trouble = None
            self._once.note(record)
            return True

    def close(self) -> None:
        with self._lock:
            if self._number >= 0:
                try:
                    os.fsync(self._number)
                except OSError as error:
                    self._failed(error)
                self._shut()

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _writing(self) -> AbstractContextManager[None]:
        return self._fence.writing() if self._fence is not None else nullcontext()

    def _open(self) -> None:
        number = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        try:
            size, last = _scan(self.path)
            if torn := os.fstat(number).st_size - size:
                os.ftruncate(number, size)
                logger.warning("%s ended in %d bytes of a torn line; they were dropped", self.path, torn)
        except OSError:
            os.close(number)
            raise
        self._number = number
        for kind, window in last.items():  # what this process knows stays known, also if the file was lost
            self._once.last[kind] = max(window, self._once.last.get(kind, window))

    def _write(self, data: bytes) -> None:
        """All of `data`, or nothing of it, at the end of the file that has the journal's name."""
        if self._number >= 0 and not _is_same(self._number, self.path):
            self._shut()  # the file was moved or removed; what is added to it, nobody would find
        if self._number < 0:
            self._open()
        self._cut()
        size = os.fstat(self._number).st_size
        try:
            written = os.write(self._number, data)
            if written != len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # what else takes a part and says nothing
        except OSError:
            self._half = size
            with suppress(OSError):
                self._cut()  # else it is tried again before the next record
            raise

    def _cut(self) -> None:
        if self._half >= 0:
            os.ftruncate(self._number, self._half)
            self._half = -1

    def _shut(self) -> None:
        number, self._number, self._half = self._number, -1, -1
        with suppress(OSError):
            os.close(number)

    def _failed(self, error: OSError | MixerError) -> None:
        is_lost = self._fence is not None and self._fence.is_lost
        trouble = _LOST if is_lost else getattr(error, "strerror", None) or str(error)
        if trouble == self._trouble:
            return
        self._trouble = trouble
        if is_lost:
            logger.warning("nothing is added to %s by this process any more: %s", self.path, error)
        else:
            logger.warning(
                "%s cannot be written: %s. The run goes on and its records are missing from the journal until it "
                "can be: make room, or restore the folder.",
                self.path,
                trouble,
            )


def read_journal(path: Path, start: int = 0) -> Iterator[tuple[int, dict[str, Any]]]:
    """Each record from byte `start` on, with the byte offset after it; ends at a torn tail, or where the file does.

    A line that cannot be understood is skipped with a warning, and so is what breaks the rule of growing windows
    without one. A file that is not there holds no records.
    """
    once = Once()
    offset = start
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return
    with file:
        file.seek(start)
        for line in file:
            if not line.endswith(b"\n"):
                return
            before, offset = offset, offset + len(line)
            try:
                record = _record(line)
            except ValueError as error:
                number = _lines_before(path, before) + 1
                logger.warning("line %d of %s is damaged and left out: %s", number, path, error)
                continue
            if not once.is_known(record):
                once.note(record)
                yield offset, record


def read_back(path: Path) -> Iterator[dict[str, Any]]:
    """The newest records of a journal, the last one first; what cannot be understood is left out."""
    with suppress(FileNotFoundError):
        for _, line in _lines_back(path):
            with suppress(ValueError):
                yield _record(line)


def _record(line: bytes) -> dict[str, Any]:
    record = json.loads(line)  # text that is not UTF-8 is a ValueError too
    if not isinstance(record, dict) or not isinstance(record.get("kind"), str):
        raise ValueError("it is no record with a kind")
    if type(record.get("time")) not in (int, float):
        raise ValueError(f"its time is {record.get('time')!r}")
    if record["kind"] in ONCE and type(record.get("window")) is not int:
        raise ValueError(f"its window is {record.get('window')!r}")
    return record


def _scan(path: Path) -> tuple[int, dict[str, int]]:
    """The size of all whole lines, and the newest window of each kind, without decoding what is long in a record."""
    size, last = 0, dict[str, int]()
    for end, line in _lines_back(path):
        size = max(size, end)
        record: dict[str, Any]
        if head := _HEAD.match(line):
            record = {"kind": head[1].decode(), "window": int(head[2])}
        else:
            try:
                record = _record(line)
            except ValueError:
                continue  # whoever reads the journal is told
        if (kind := record["kind"]) in ONCE:
            last[kind] = max(record["window"], last.get(kind, record["window"]))
        if last.keys() == ONCE:
            break
    return size, last


def _lines_back(path: Path) -> Iterator[tuple[int, bytes]]:
    """Whole lines, the last one first, each with the byte offset after it; at least as many as the TAIL says."""
    with path.open("rb", buffering=0) as file:
        size = begin = file.seek(0, os.SEEK_END)
        held, step, given = b"", _BACK_BYTES, 0  # held: what was read and not handed out, from `begin` on
        while begin > 0 and not (size - begin >= TAIL_BYTES and given >= TAIL_LINES):
            length = min(step, begin)
            begin -= length
            file.seek(begin)
            held = file.read(length) + held
            cut = held.find(b"\n") + 1 if begin else 0  # where the first line begins that is held whole
            whole, held = (held[cut:], held[:cut]) if cut or not begin else (b"", held)
            if not whole:
                step *= 2  # in the middle of a long line
                continue
            end = begin + cut + len(whole)
            *lines, torn = whole.split(b"\n")
            end -= len(torn)
            for line in reversed(lines):
                yield end, line + b"\n"
                end -= len(line) + 1
                given += 1


def _lines_before(path: Path, offset: int) -> int:
    lines = 0
    with path.open("rb") as file:
        while offset > 0 and (block := file.read(min(offset, _BLOCK_BYTES))):
            lines, offset = lines + block.count(b"\n"), offset - len(block)
    return lines


def _is_same(number: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(number), os.stat(path))
    except FileNotFoundError:
        return False


def _line(record: Mapping[str, Any]) -> bytes:
    head = {key: record[key] for key in ("kind", "window") if key in record}
    value = _plain({**head, "time": time.time(), **record})
    text = json.dumps(value, separators=(",", ":"), ensure_ascii=False, allow_nan=False, default=str)
    return f"{text}\n".encode(errors="backslashreplace")  # lone surrogates, as file names have them: JSON's escapes


def _plain(value: Any) -> Any:
    """The same in what JSON has: no numpy, and null for a number that is not finite."""
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, np.generic | np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value
