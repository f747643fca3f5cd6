"""The folder of a run's checkpoints on disk: which of them are whole, which are kept, what is rubbish.

    <steps, 9 digits>/
      <rank>-<save>.data        what a rank wrote: tensors one after another, nothing else
      index-<save>.json         where each tensor lies in them, with a checksum of every piece
      checkpoint.json           written last: position, sizes and checksums of the files above, its own checksum

A checkpoint counts when `checkpoint.json` is there and the files it names have the sizes it says. `<save>` differs
from save to save, so that the same steps can be saved again without touching what is there; files that no
`checkpoint.json` names are what a killed save left. Nothing here is code: JSON and plain numbers.
"""

import contextlib
import hashlib
import json
import logging
import os
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow.fs as pafs

from mixer.core.errors import CheckpointError, DamagedError
from mixer.core.plan import Cursor
from mixer.data.storage import put

logger = logging.getLogger(__name__)

FORMAT = 1
RECORD = "checkpoint.json"
_FOLDER = re.compile(r"\d{9,}")
_FILE = re.compile(r"(\d{5,}-[0-9a-f]{8}\.data|index-[0-9a-f]{8}\.json)")
_TEMPORARY = re.compile(r"\.(checkpoint|index-[0-9a-f]{8})\.json\.[0-9a-f]+\.tmp")


@dataclass(frozen=True, slots=True)
class File:
    bytes: int
    checksum: str  # of an index its SHA-256; of data the SHA-256 of its pieces' SHA-256, one after another


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """What `checkpoint.json` says."""

    cursor: Cursor
    steps: int
    tokens: int
    extra: dict[str, Any]
    world_size: int
    groups: list[dict[str, Any]]  # the optimizer's, without their parameters
    index: str
    files: dict[str, File]

    def write(self, folder: Path) -> None:
        """Makes the checkpoint one: whole, durable, and after everything else."""
        text = _canonical(asdict(self))
        value = {"format": FORMAT, "checksum": checksum(text.encode()), "checkpoint": json.loads(text)}
        put(pafs.LocalFileSystem(), str(folder), RECORD, (json.dumps(value, indent=1) + "\n").encode())

    @classmethod
    def read(cls, folder: Path) -> "Record":
        path = folder / RECORD
        try:
            value = json.loads(path.read_text("utf-8"))
            found = value["format"]
            if isinstance(found, int) and found > FORMAT:
                raise CheckpointError(
                    f"{path} has format {found}, and this mixer reads up to {FORMAT}. Use the mixer that wrote it, "
                    "or a newer one."
                )
            if found != FORMAT:
                raise ValueError(f"format {found!r} was never written")
            fields = value["checkpoint"]
            if value["checksum"] != checksum(_canonical(fields).encode()):
                raise ValueError("its checksum does not fit")
            if bad := [name for name in [fields["index"], *fields["files"]] if not _FILE.fullmatch(name)]:
                raise ValueError(f"it names {bad[0]!r}, which is no file of a checkpoint")
            files = {name: File(**file) for name, file in fields.pop("files").items()}
            return cls(**fields | {"cursor": Cursor.from_dict(fields["cursor"]), "files": files})
        except FileNotFoundError as error:
            raise DamagedError(
                f"{path} is not there. A checkpoint whose saving was cut short has none; load another."
            ) from error
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise DamagedError(
                f"{path} cannot be understood ({error}). Load an earlier checkpoint, or restore it from a copy."
            ) from error

    def check(self, folder: Path) -> None:
        """That every file is there with its size: cheap, and what a killed or full disk gets wrong."""
        if folder.name.isdigit() and int(folder.name) != self.steps:
            raise DamagedError(f"{folder} holds the checkpoint of {self.steps} steps. Give it that name.")
        for name, file in self.files.items():
            try:
                size = (folder / name).stat().st_size
            except OSError as error:
                raise DamagedError(_unfit(folder / name, error.strerror or str(error))) from error
            if size != file.bytes:
                raise DamagedError(_unfit(folder / name, f"it has {size} bytes, and {file.bytes} were written"))

    def read_index(self, folder: Path) -> dict[str, Any]:
        path, file = folder / self.index, self.files[self.index]
        try:
            data = path.read_bytes()
        except OSError as error:
            raise DamagedError(_unfit(path, error.strerror or str(error))) from error
        if checksum(data) != file.checksum:
            raise DamagedError(_unfit(path, "its checksum does not fit"))
        return json.loads(data)


def checksum(data: Any) -> str:
    return hashlib.sha256(data).hexdigest()


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def _unfit(path: Path, why: str) -> str:
    return f"{path} cannot be used: {why}. Load an earlier checkpoint, or restore the file from a copy."


def find(folder: str | Path, at_steps: int | None = None) -> Path | None:
    """The newest whole checkpoint, or that at or before so many steps. Damaged ones are named and passed over."""
    for path in sorted(_folders(Path(folder)), key=_steps, reverse=True):
        if (at_steps is not None and _steps(path) > at_steps) or not (path / RECORD).exists():
            continue
        try:
            Record.read(path).check(path)
        except DamagedError as error:
            logger.warning("%s The one before it is looked at.", error)
            continue
        return path
    return None


def written(folder: str | Path) -> list[Path]:
    """All that were finished, whether or not they are still whole."""
    return [path for path in sorted(_folders(Path(folder)), key=_steps) if (path / RECORD).exists()]


def path_of(folder: Path, steps: int) -> Path:
    return folder / f"{steps:09d}"


def sweep(folder: Path) -> None:
    """Remove what killed saves left. Nobody else may be saving here."""
    for path in _folders(folder):
        try:
            if not (path / RECORD).exists():
                _remove(path)
                continue
            named = Record.read(path).files
        except CheckpointError:
            continue  # a person may want to look at it
        except OSError as error:
            logger.warning("what a killed save left in %s cannot be removed: %s", path, error)
            continue
        _sweep_files(path, set(named))


def prune(folder: Path, saved: Path, keep: int, keep_every_windows: int | None) -> None:
    """Remove whole checkpoints beyond the `keep` newest, those kept for good, and the one just saved."""
    whole: dict[Path, Cursor] = {}
    for path in _folders(folder):
        with contextlib.suppress(CheckpointError):
            record = Record.read(path)
            record.check(path)
            whole[path] = record.cursor
    kept = {saved, *sorted(whole, key=_steps)[-keep:]}
    for path, cursor in whole.items():
        for_good = keep_every_windows is not None and cursor.step == 0 and cursor.window % keep_every_windows == 0
        if path not in kept and not for_good:
            try:
                _remove(path)
            except OSError as error:
                logger.warning("%s is not needed any more and cannot be removed: %s", path, error)


def sync_folder(folder: Path) -> None:
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def _folders(folder: Path) -> Iterator[Path]:
    if folder.is_dir():
        yield from (path for path in folder.iterdir() if _FOLDER.fullmatch(path.name) and path.is_dir())


def _steps(path: Path) -> int:
    return int(path.name)


def _remove(path: Path) -> None:
    """Its record first: a removal cut short leaves rubbish, not a damaged checkpoint."""
    (path / RECORD).unlink(missing_ok=True)
    _sweep_files(path, set())
    path.rmdir()


def _sweep_files(path: Path, named: set[str]) -> None:
    for file in path.iterdir():
        rubbish = _FILE.fullmatch(file.name) and file.name not in named
        if rubbish or _TEMPORARY.fullmatch(file.name):
            try:
                file.unlink(missing_ok=True)
            except OSError as error:
                logger.warning("%s is not needed any more and cannot be removed: %s", file, error)
