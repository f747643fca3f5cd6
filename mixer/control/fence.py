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
decide nothing but when to stop waiting. All that an owner writes it writes so: schedule and policy states, orders,
the journal, the tracker's notes, the report. The check reads one small file and syncs nothing.

Who may become the owner: if the lock of the epoch in force is free, its owner is dead and anybody may, with the
next epoch. If it is held, only who asks for the takeover of that very epoch; else it is refused at once and told who
holds it. So nobody replaces an owner unseen: a process that was started again replaces the one before it, which may
be cut off rather than dead (their `holder` is the same), and not whoever got the run meanwhile. One lock file an
epoch, so that an owner who took over is protected by its own and not by the one it replaced. A fork of the owner
shares its locks; exec does not.
"""

import contextlib
import errno
import fcntl
import json
import os
import socket
import threading
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
    holder: str = ""  # the same for processes of which one goes on where the other was lost

    def __str__(self) -> str:
        return f"pid {self.pid} on {self.host} since {self.since} (epoch {self.epoch})"


class Fence:
    """Ownership of one folder, from construction to `close`; for any number of threads."""

    def __init__(self, folder: Path, *, holder: str = "", takeover: int | None = None) -> None:
        """`takeover` is the epoch of an owner that may be replaced though it seems to live."""
        self._folder = folder
        self._alive = -1
        self._mutex = threading.Lock()  # the threads of one process share its lock on the file
        self._replaced = False
        self._lock = _open_lock(folder / "fence.lock")
        try:
            with self._exclusive():
                self.owner = self._enter(holder, takeover)
        except BaseException:
            self.close()
            raise

    def _enter(self, holder: str, takeover: int | None) -> Owner:
        before = read_owner(self._folder)
        if before and before.epoch != takeover and not self._is_dead(before):
            raise ResumeError(f"{self._folder} belongs to {before}. Wait for that run, or stop it.")
        now = datetime.now(UTC).isoformat(timespec="seconds")
        epoch = before.epoch + 1 if before else 1
        owner = Owner(epoch=epoch, host=socket.gethostname(), pid=os.getpid(), since=now, holder=holder)
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

    @property
    def is_lost(self) -> bool:
        """Whether this process is known to own the folder no more, which is for good."""
        return self._replaced or self._lock < 0

    @contextmanager
    def writing(self) -> Generator[None]:
        """Everything written inside is written by the owner; who no longer is one gets a ScheduleError."""
        with self._exclusive():
            if (now := read_owner(self._folder)) is None:
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self._folder / "owner.json"))
            if now != self.owner:
                self._replaced = True
                raise ScheduleError(
                    f"{self._folder} was taken over by {now}; this process, {self.owner}, may not write any more. "
                    "Stop it."
                )
            yield

    def check(self) -> None:
        """Nothing, for the owner."""
        with self.writing():
            pass

    @contextmanager
    def _exclusive(self) -> Generator[None]:
        with self._mutex:
            if self._lock < 0:
                raise ScheduleError(f"{self._folder} was let go by this process. Open the run again to write to it.")
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
        with self._mutex:
            for name in ("_alive", "_lock"):
                if (number := getattr(self, name)) >= 0:
                    setattr(self, name, -1)
                    os.close(number)


def require_free(folder: Path) -> None:
    """Refuse a folder whose owner lives, without becoming its owner."""
    if owner := _living_owner(folder):
        raise ResumeError(
            f"{folder} belongs to {owner}. Wait for that run, or stop it; if its machine cannot be reached any more, "
            "`mixer train --takeover` goes on without it."
        )


def epoch_to_replace(folder: Path) -> int | None:
    """Of an owner that holds its lock from another machine; None if nobody holds one. An owner that lives here can be
    reached, and is not replaced behind its back."""
    owner = _living_owner(folder)
    if owner and owner.host == socket.gethostname() and _is_running(owner.pid):
        raise ResumeError(
            f"{folder} belongs to {owner}, which lives on this machine. A takeover is for an owner that nobody can "
            f"reach: stop process {owner.pid} and start the run again."
        )
    return owner.epoch if owner else None


def _living_owner(folder: Path) -> Owner | None:
    owner = read_owner(folder)
    lock = folder / f"owner-{owner.epoch}.lock" if owner else None
    if lock is None or not lock.exists():
        return None
    number = _open_lock(lock)
    try:
        return None if _try_lock(number) else owner
    finally:
        os.close(number)


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # somebody else's
    return True


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
