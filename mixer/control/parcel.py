"""What a job takes along to a cluster: the code and the files that its command line names, and nothing else.

A parcel is a folder of its own, made of jobs/, mixer/, configs/ and the named files, so that no data, run,
environment or repository that lies beside them is sent. Paths of the command line stay what they are if they lie
below the folder they are given in; others are sent as `submitted/...`, and the command line is changed to that.
"""

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from mixer.core.errors import ConfigError

CODE = ("jobs", "mixer", "configs")
LIMIT_BYTES = 20_000_000
NOT_SENT = ("__pycache__", "node_modules", "mlruns", "venv")  # and all names that begin with a dot
NAMED_IN_A_REFUSAL = 5
CONFIG_ENDINGS = (".yaml", ".yml")


@dataclass(frozen=True, slots=True)
class Parcel:
    files: Mapping[str, Path]  # place in the job's folder -> file on this machine
    args: tuple[str, ...]  # of the command line as the job sees it

    @property
    def num_bytes(self) -> int:
        return sum(path.stat().st_size for path in self.files.values())

    def write(self, folder: Path) -> None:
        for place, path in self.files.items():
            target = folder / place
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)


def project_of(here: Path, package: Path) -> Path:
    """The folder whose code is sent: this one if it holds mixer and jobs, else where the running mixer lies."""
    return here if is_project(here) else package.parent


def is_project(folder: Path) -> bool:
    return all((folder / name / "__init__.py").is_file() for name in ("jobs", "mixer"))


def pack(
    args: Sequence[str],
    *,
    here: Path,
    project: Path | None,
    include: Sequence[str] = (),
    limit_bytes: int = LIMIT_BYTES,
) -> Parcel:
    """`args` are the words after the verb; `project` is None when the cluster has mixer installed."""
    files: dict[str, Path] = {}
    if project is not None:
        if not is_project(project):
            raise ConfigError(
                f"{project} holds no mixer/ and jobs/ to send. Name the project's folder by --working-dir."
            )
        for name in CODE:
            files |= tree(project / name, name)
    changed: list[str] = []
    for arg in args:
        path = named_file(arg, here)
        if path is None:
            refuse_local(arg, here, include)
            changed.append(arg)
        else:
            place = place_of(arg, len(files))
            files[place] = path
            changed.append(place)
    for name in include:
        path = here / name
        if not path.exists():
            raise ConfigError(f"--include {name}: there is no such file or folder in {here}. Correct the name.")
        place = place_of(name, len(files))
        if place != str(PurePosixPath(name)):
            raise ConfigError(f"--include {name} lies outside {here}. Go to a folder that holds it, or copy it there.")
        files |= {place: path} if path.is_file() else tree(path, place)
    parcel = Parcel(files, tuple(changed))
    refuse_large(parcel, limit_bytes)
    return parcel


def tree(folder: Path, name: str) -> dict[str, Path]:
    """The files below a folder by their place; caches, environments and hidden ones left out, links not followed."""
    found: dict[str, Path] = {}
    for root, folders, files in os.walk(folder):
        folders[:] = sorted(one for one in folders if one not in NOT_SENT and not one.startswith("."))
        for file in sorted(files):
            path = Path(root, file)
            if not file.startswith(".") and not file.endswith(".pyc") and path.is_file():
                found[f"{name}/{path.relative_to(folder).as_posix()}"] = path
    return found


def is_config(arg: str) -> bool:
    return arg.endswith(CONFIG_ENDINGS) and "=" not in arg and not arg.startswith("-")


def named_file(arg: str, here: Path) -> Path | None:
    """The configuration that a word names; one that is not on this machine must be a whole path, the cluster's."""
    if not is_config(arg):
        return None
    path = here / arg
    if path.is_file():
        return path
    if Path(arg).is_absolute():
        return None
    raise ConfigError(f"{arg} is not a file in {here}. Name one that is here to send, or a whole path on the cluster.")


def place_of(arg: str, number: int) -> str:
    path = PurePosixPath(arg)
    return f"submitted/{number}-{path.name}" if path.is_absolute() or ".." in path.parts else str(path)


def refuse_local(arg: str, here: Path, include: Sequence[str]) -> None:
    """A relative path that exists here would point to nothing on the cluster."""
    path = arg.partition("=")[2] or arg
    if "/" not in path or "://" in path or Path(path).is_absolute() or not (here / path).exists():
        return
    if any(PurePosixPath(path).is_relative_to(one) for one in include):
        return
    raise ConfigError(
        f"{arg} names something in {here}, which is not sent: the job would not find it. Give the whole path of a "
        f"place that every node sees, or an s3:// or gs:// URI, or send it along with --include {path}."
    )


def refuse_large(parcel: Parcel, limit_bytes: int) -> None:
    num_bytes = parcel.num_bytes
    if num_bytes <= limit_bytes:
        return
    largest = sorted(parcel.files.items(), key=lambda one: -one[1].stat().st_size)[:NAMED_IN_A_REFUSAL]
    named = ", ".join(f"{place} ({megabytes(path.stat().st_size)})" for place, path in largest)
    raise ConfigError(
        f"{len(parcel.files)} files of {megabytes(num_bytes)} would be sent, more than {megabytes(limit_bytes)}; the "
        f"largest are {named}. Move data out of {', '.join(CODE)}, or raise --limit-mb."
    )


def refuse_relative(places: Mapping[str, str]) -> None:
    """Options that say where data and runs lie: a relative one would lie in the job's folder, and go with it."""
    wrong = {key: path for key, path in places.items() if path and "://" not in path and not Path(path).is_absolute()}
    if wrong:
        listed = ", ".join(f"{key}={path}" for key, path in wrong.items())
        mend = " ".join(f"{key}=/shared/{path}" for key, path in wrong.items())
        raise ConfigError(
            f"{listed}: relative, and a job's own folder is thrown away with the job. Give places that every node "
            f"sees, as in {mend}"
        )


def megabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:.1f} MB" if num_bytes >= 100_000 else f"{num_bytes / 1e3:.1f} kB"
