"""RunDir: the files of a run. Everything needed to continue or repeat it; one writer at a time.

    run.yaml                  the resolved configuration, text that the assembly writes and reads
    catalog.json              the catalog that the run began with
    catalogs/<fingerprint>.json   those it switched to
    schedule.jsonl            one line a window, appended and synced; only whole lines are believed
    policy/<window>.npz       the policy's state after the decision of that window
    orders.json               what people asked for: weights, pauses
    origin.json               the run it was made from, if it is a replay or a fork (see those modules)
    owner.json, *.lock        the fence, see `mixer.control.fence`

The order of a commit is: policy state, then catalog if new, then the line, each durable before the next; the
line is what makes the window decided. A crash before it leaves a state file of a window that does not exist,
which the same window's next commit replaces. A state that cannot be read is a warning and the one before it
is used; the schedule itself has no second copy, and damage to it is an error.

Only local disks (and what is mounted as one); object stores cannot append, and need another form of schedule.
"""

import errno
import hashlib
import io
import json
import logging
import os
import shutil
import zipfile
import zlib
from collections.abc import Generator, Mapping
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from mixer.control.fence import Fence, sync_folder, write_all, write_whole
from mixer.core import schedule as schedules
from mixer.core.catalog import Catalog
from mixer.core.errors import ConfigError, ResumeError, ScheduleError
from mixer.core.plan import Geometry
from mixer.core.ports import State
from mixer.core.schedule import LineWriter, MixtureSchedule, ScheduleRow

logger = logging.getLogger(__name__)

# What reading a damaged archive may raise: a flipped bit may also name another compression, or encryption.
_UNREADABLE = (
    OSError,
    ValueError,
    KeyError,
    EOFError,
    zipfile.BadZipFile,
    zlib.error,
    NotImplementedError,
    RuntimeError,
)
GENERATIONS = 2  # policy states kept: the last one and the one before it
_CHECK = "_check"


class RunDir:
    """An owned run folder. `schedule` holds exactly the rows that are durable."""

    def __init__(self, path: str | Path, *, holder: str = "", takeover: int | None = None) -> None:
        """`holder`, `takeover`: see `Fence`."""
        if "://" in str(path):
            raise ConfigError(f"run folder {path} is not on a local disk. Name a folder on one.")
        self.path = Path(path)
        (self.path / "policy").mkdir(parents=True, exist_ok=True)
        (self.path / "catalogs").mkdir(exist_ok=True)
        self.lost_states = 0
        self._broken: str | None = None
        self._size = 0
        self._writer: LineWriter | None = None
        self._schedule: MixtureSchedule | None = None
        self.fence = Fence(self.path, holder=holder, takeover=takeover)
        try:
            if (self.path / "schedule.jsonl").exists():
                self._read()
        except BaseException:
            self.close()
            raise

    @property
    def schedule(self) -> MixtureSchedule:
        if self._schedule is None:
            raise ScheduleError(f"{self.path} holds no run yet. Begin one first.")
        return self._schedule

    @property
    def is_begun(self) -> bool:
        return self._schedule is not None

    def begin(
        self,
        catalog: Catalog,
        geometry: Geometry,
        config: str = "",
        *,
        schedule: MixtureSchedule | None = None,
        state: State | None = None,
        origin: Mapping[str, Any] | None = None,
    ) -> None:
        """Start a run here; the schedule, written last, makes it one. A begun run is never begun again.

        With `schedule` its rows are decided from the start; `state` is the policy's after them.
        """
        if self._schedule is not None:
            raise ResumeError(f"{self.path} holds a run of {len(self._schedule)} windows. Resume it, or name another.")
        given = MixtureSchedule(catalog, geometry) if schedule is None else schedule
        assert given.catalog == catalog and given.geometry == geometry
        text = given.to_text().encode()
        with self._writing("the start of the run"):
            write_whole(self.path / "run.yaml", config.encode())
            write_whole(self.path / "catalog.json", _catalog_text(catalog))
            for switch in given.switches:
                self._write_catalog(given.row(switch).catalog)
            if given:
                write_whole(self._state_path(len(given) - 1), _state_bytes(len(given) - 1, state or {}))
            if origin is not None:
                write_whole(self.path / "origin.json", (json.dumps(origin, indent=1) + "\n").encode())
            else:
                (self.path / "origin.json").unlink(missing_ok=True)  # of a start that came to nothing
            write_whole(self.path / "schedule.jsonl", text)
        begun = schedules.read(text, thorough=False)  # its own, so that nobody else appends to it
        self._schedule, self._writer, self._size = begun.schedule, begun.writer, begun.size

    def origin(self) -> dict[str, Any] | None:
        return load_origin(self.path)

    def config(self) -> str:
        return (self.path / "run.yaml").read_text("utf-8")

    def commit(self, row: ScheduleRow, state: State) -> None:
        """Make a row and the policy's state after it durable; only then is the row in `schedule`."""
        schedule, old = self.schedule, self._writer
        assert old is not None
        writer = replace(old)
        data = writer.lines(row).encode()
        with self._writing(f"window {row.window}"):
            write_whole(self._state_path(row.window), _state_bytes(row.window, state))
            if row.catalog.fingerprint != old.catalog.fingerprint:
                self._write_catalog(row.catalog)
            self._append(data)
            self._writer, self._size = writer, self._size + len(data)
            schedule.append(row)
            self._prune(row.window)

    def state(self) -> tuple[int, State] | None:
        """The window of the newest policy state that can be believed, and that state."""
        last = len(self.schedule) - 1
        for window in range(last, max(last - GENERATIONS, -1), -1):
            path = self._state_path(window)
            try:
                return window, _read_state(window, path.read_bytes())
            except _UNREADABLE as error:
                self.lost_states += 1
                logger.warning("policy state %s cannot be used (%s); trying the one before it", path, error)
        if last < 0:
            return None
        raise ResumeError(
            f"none of the last {GENERATIONS} policy states of {self.path} can be read. Restore "
            f"{self._state_path(last)} from a copy, or start a new run from this schedule."
        )

    def orders(self) -> list[dict[str, Any]]:
        return load_orders(self.path)

    def write_orders(self, orders: list[dict[str, Any]]) -> None:
        with self._writing("orders"):
            write_whole(self.path / "orders.json", (json.dumps(orders, indent=1) + "\n").encode())

    def close(self) -> None:
        self.fence.close()

    def __enter__(self) -> "RunDir":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _write_catalog(self, catalog: Catalog) -> None:
        write_whole(self.path / "catalogs" / f"{catalog.fingerprint}.json", _catalog_text(catalog))

    def _state_path(self, window: int) -> Path:
        return self.path / "policy" / f"{window}.npz"

    def _read(self) -> None:
        path = self.path / "schedule.jsonl"
        with self.fence.writing():  # so that what is read is not being written by the one before
            found = schedules.read(path.read_bytes(), thorough=False)
            if found.torn:
                logger.warning("%s ends in %d bytes of a torn line; they are dropped", path, found.torn)
                number = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
                try:
                    os.ftruncate(number, found.size)
                    os.fsync(number)
                finally:
                    os.close(number)
        self._schedule, self._writer, self._size = found.schedule, found.writer, found.size

    def _append(self, data: bytes) -> None:
        """Add `data` at the end; where that fails the file is cut back to what it was."""
        number = os.open(self.path / "schedule.jsonl", os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
        try:
            if (size := os.fstat(number).st_size) != self._size:
                raise OSError(errno.EIO, f"the schedule has {size} bytes where {self._size} were left")
            try:
                write_all(number, data)
                os.fsync(number)
            except OSError:
                self._broken = "an earlier write failed half-way"  # unless the half can be taken back:
                os.ftruncate(number, self._size)
                os.fsync(number)
                self._broken = None
                raise
        finally:
            os.close(number)

    def _prune(self, window: int) -> None:
        old = self._state_path(window - GENERATIONS)
        old.unlink(missing_ok=True)

    def _writing(self, what: str) -> "_Writing":
        if self._broken:
            raise ScheduleError(f"{self.path} is not written any more: {self._broken}. Free its disk, then resume.")
        return _Writing(self.fence, self.path, what)


@contextmanager
def building(target: Path) -> Generator[RunDir]:
    """An owned run folder beside the target, which takes its name when all went well and is gone otherwise."""
    hidden = target.with_name(f".{target.name}.building")
    if hidden.exists():  # of a process that died, or that is at work: then this is refused
        with closing(Fence(hidden)):
            shutil.rmtree(hidden)
    with RunDir(hidden) as rundir:
        try:
            yield rundir
            sync_folder(hidden)
            os.rename(hidden, target)
            sync_folder(target.parent)
        except OSError as error:
            shutil.rmtree(hidden, ignore_errors=True)
            raise ScheduleError(
                f"{target} cannot be made: {error.strerror or error}. Nothing is left of it. Make room or choose "
                "another place, and try again."
            ) from error
        except BaseException:
            shutil.rmtree(hidden, ignore_errors=True)
            raise


def load_schedule(source: Path) -> MixtureSchedule:
    """The schedule of a run folder, or of a schedule file, of which every sum is checked; nothing is written there."""
    path = source / "schedule.jsonl" if source.is_dir() else source
    try:
        return schedules.read(path.read_bytes()).schedule
    except OSError as error:
        raise ScheduleError(
            f"no schedule at {path}: {error.strerror}. Name the folder of a run, or a schedule.jsonl."
        ) from error
    except ScheduleError as error:
        raise ScheduleError(f"{path}: {error}") from error


def load_origin(folder: Path) -> dict[str, Any] | None:
    """What was said of the run that this one was made from; None for a run of its own."""
    return _load_json(folder / "origin.json", None)


def load_orders(folder: Path) -> list[dict[str, Any]]:
    return _load_json(folder / "orders.json", [])


def _load_json(path: Path, otherwise: Any) -> Any:
    if not path.exists():
        return otherwise
    try:
        return json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ScheduleError(f"{path} cannot be understood: {error}. Restore it from a copy.") from error


class _Writing:
    """The fence round a write, and the words for a disk that fails."""

    def __init__(self, fence: Fence, path: Path, what: str) -> None:
        self._path, self._what, self._inner = path, what, fence.writing()

    def __enter__(self) -> None:
        try:
            self._inner.__enter__()
        except OSError as error:
            raise self._failed(error) from error

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        self._inner.__exit__(kind, error, trace)
        if isinstance(error, OSError):
            raise self._failed(error) from error

    def _failed(self, error: OSError) -> ScheduleError:
        return ScheduleError(
            f"{self._what} cannot be written to {self._path}: {error.strerror or error}. Nothing was decided. "
            "Make room or restore the folder, then resume."
        )


def _catalog_text(catalog: Catalog) -> bytes:
    return (json.dumps(catalog.to_dict(), ensure_ascii=False, indent=1) + "\n").encode()


def _digest(window: int, state: Mapping[str, Any]) -> np.ndarray:
    digest = hashlib.sha256(f"policy state of window {window}\n".encode())
    for key in sorted(state):
        value = np.ascontiguousarray(state[key])
        digest.update(f"{key}\n{value.dtype.str}\n{np.shape(state[key])}\n".encode())
        digest.update(value.tobytes())
    return np.frombuffer(digest.digest(), dtype=np.uint8)


def _state_bytes(window: int, state: State) -> bytes:
    assert _CHECK not in state and not any(value.dtype.hasobject for value in state.values())
    out = io.BytesIO()
    arrays: dict[str, Any] = {**state, _CHECK: _digest(window, state)}
    np.savez(out, allow_pickle=False, **arrays)
    return out.getvalue()


def _read_state(window: int, data: bytes) -> State:
    with np.load(io.BytesIO(data), allow_pickle=False) as found:
        state = {key: found[key] for key in found.files}
    check = state.pop(_CHECK)
    if not np.array_equal(check, _digest(window, state)):
        raise ValueError("its check value does not fit")
    return state
