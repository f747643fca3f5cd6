"""One run has one writer: the owner's fence, for a folder on a local disk (or one whose `flock` works).

Two locks and one number:
- `owner.json` says who owns the run: epoch, host, pid, since. The epoch only grows.
- `owner-<epoch>.lock` is held by that epoch's owner from opening to closing, and only says that its process
  lives. The kernel drops it when the process dies, however it dies.
- `fence.lock` is held for the length of one write, and for a change of owner.

Why a replaced owner can write nothing: every write happens inside `Fence.writing`, which takes `fence.lock` and
then reads the epoch; the epoch changes only under the same lock. So the epoch that was read is in force until the
write is done: a check that is true cannot become false before the write, however long the writer sleeps between
the two. If it is stopped *before* it has the lock, it finds the larger epoch on waking and is refused. If it is
stopped *while it has* the lock, nobody can take over: who tries is told so after `PATIENCE_S`, with the pid to
kill, whereupon the kernel frees the lock. There is no time-out after which an owner is taken for dead: clocks
decide nothing but when to stop waiting.

Who may become the owner: if the lock of the epoch in force is free, its owner is dead and anybody may, with the
next epoch. If it is held, only who asks for `takeover`; else it is refused at once and told who holds it. One
lock file an epoch, so that an owner who took over is protected by its own and not by the one it replaced. A fork
of the owner shares its locks; exec does not.
"""

import contextlib
import fcntl
import json
import os
import socket
import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from mixer.core.errors import ResumeError, ScheduleError

PATIENCE_S = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Owner:
    epoch: int
    host: str
    pid: int
    since: str  # for people; nothing depends on it

    def __str__(self) -> str:
        return f"pid {self.pid} on {self.host} since {self.since} (epoch {self.epoch})"


class Fence:
    """Ownership of one folder, from construction to `close`."""

    def __init__(self, folder: Path, *, takeover: bool = False) -> None:
        self._folder = folder
        self._alive = -1
        self._lock = _open_lock(folder / "fence.lock")
        try:
            with self._exclusive():
                self.owner = self._enter(takeover)
        except BaseException:
            self.close()
            raise

    def _enter(self, takeover: bool) -> Owner:
        before = read_owner(self._folder)
        if before and not takeover and not self._is_dead(before):
            raise ResumeError(
                f"{self._folder} belongs to {before}. Stop that process, or ask for a takeover if you cannot reach it."
            )
        now = datetime.now(UTC).isoformat(timespec="seconds")
        epoch = before.epoch + 1 if before else 1
        owner = Owner(epoch=epoch, host=socket.gethostname(), pid=os.getpid(), since=now)
        self._alive = _open_lock(self._lock_of(owner))
        if not _try_lock(self._alive):
            raise ResumeError(f"{self._lock_of(owner)} is held, though nobody owned epoch {epoch} yet. Try again.")
        write_whole(self._folder / "owner.json", (json.dumps(asdict(owner)) + "\n").encode())
        if before:
            self._lock_of(before).unlink(missing_ok=True)  # nobody asks for that epoch any more
        return owner

    def _lock_of(self, owner: Owner) -> Path:
        return self._folder / f"owner-{owner.epoch}.lock"

    def _is_dead(self, owner: Owner) -> bool:
        number = _open_lock(self._lock_of(owner))
        try:
            return _try_lock(number)
        finally:
            os.close(number)

    @contextmanager
    def writing(self) -> Generator[None]:
        """Everything written inside is written by the owner; who no longer is one gets a ScheduleError."""
        with self._exclusive():
            if (now := read_owner(self._folder)) != self.owner:
                raise ScheduleError(
                    f"{self._folder} was taken over by {now}; this process, {self.owner}, may not write any more. "
                    "Stop it."
                )
            yield

    @contextmanager
    def _exclusive(self) -> Generator[None]:
        deadline = time.monotonic() + PATIENCE_S
        while not _try_lock(self._lock):
            if time.monotonic() > deadline:
                raise ResumeError(
                    f"{self._folder} is being written by {read_owner(self._folder)}, which does not get done. "
                    "Kill it if it is stopped, and try again."
                )
            time.sleep(0.01)
        try:
            yield
        finally:
            fcntl.flock(self._lock, fcntl.LOCK_UN)

    def close(self) -> None:
        for name in ("_alive", "_lock"):
            if (number := getattr(self, name)) >= 0:
                setattr(self, name, -1)
                os.close(number)


def require_free(folder: Path) -> None:
    """Refuse a folder whose owner lives, without becoming its owner."""
    owner = read_owner(folder)
    lock = folder / f"owner-{owner.epoch}.lock" if owner else None
    if owner is None or lock is None or not lock.exists():
        return
    number = _open_lock(lock)
    try:
        if not _try_lock(number):
            raise ResumeError(f"{folder} belongs to {owner}. Wait for that run, or stop it.")
    finally:
        os.close(number)


def read_owner(folder: Path) -> Owner | None:
    try:
        return Owner(**json.loads((folder / "owner.json").read_text("utf-8")))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        raise ScheduleError(
            f"{folder / 'owner.json'} cannot be understood: {error}. Only the owner's number is lost: find out "
            "that nobody owns the run, and write a larger number by hand."
        ) from error


def write_whole(path: Path, data: bytes) -> None:
    """The file is there with all of `data`, durably, or as it was before."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        number = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
        try:
            write_all(number, data)
            os.fsync(number)
        finally:
            os.close(number)
        os.replace(partial, path)
    except OSError:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_all(number: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(number, view) :]


def sync_folder(folder: Path) -> None:
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def _open_lock(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)


def _try_lock(number: int) -> bool:
    try:
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
