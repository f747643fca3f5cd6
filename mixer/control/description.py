"""What a run is, for whoever looks at it from outside: its parameters, tags and files, without their secrets."""

import contextlib
import json
import logging
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from mixer.control.metrics import written
from mixer.core.schedule import MixtureSchedule

logger = logging.getLogger(__name__)

RUN_TAG = "mixer.run"
PARAM_LETTERS = 6000  # MLflow's limits
TAG_LETTERS = 5000
SECRETS = ("password", "passwd", "secret", "token", "api_key", "access_key", "secret_key", "credentials")
_WORDS = "|".join(SECRETS)
_URI_USER = re.compile(r"(?<=://)[^/\s'\"]+@")
_URI_SECRET = re.compile(rf"(?i)(?<=[?&])((?:\w*_)?(?:{_WORDS})=)[^&\s'\"]+")
_SECRET = rf"(?:\w*_)?(?:{_WORDS})[ \t]*:[ \t]+)(?!null\b)"  # a key of YAML, and what stands before its value
_SECRET_LINE = re.compile(rf"(?im)^(\s*{_SECRET}\S.*$")
_SECRET_ENTRY = re.compile(rf"(?i)([{{,]\s*{_SECRET}(?:\"[^\"]*\"|'[^']*'|[^,}}\n]+)")


def params_of(folder: Path) -> dict[str, str]:
    """run.yaml by dotted key, without secrets and within MLflow's limits."""
    try:
        value = _read_yaml(folder / "run.yaml")
    except (OSError, ValueError) as error:
        logger.warning("%s has no parameters to track: %s", folder / "run.yaml", error)
        return {}
    return {key: _cut(text, PARAM_LETTERS) for key, text in flat(value).items()}


def tags_of(
    folder: Path, schedule: MixtureSchedule, run: str, *, parent: str | None, more: Mapping[str, str]
) -> dict[str, str]:
    tags = {
        RUN_TAG: run,
        "mixer.catalog": schedule.catalog.fingerprint,
        "mixer.version": _version(),
        "mixer.folder": str(folder),
    }
    if commit := _commit():
        tags |= {"mixer.commit": commit, "mlflow.source.git.commit": commit}
    if parent:
        tags["mlflow.parentRunId"] = parent
    given = {written(key): redacted(str(value)) for key, value in more.items()}
    return {key: _cut(value, TAG_LETTERS) for key, value in (given | tags).items()}


@contextlib.contextmanager
def staged(folder: Path, max_bytes: int | None = None) -> Iterator[Path]:
    """A folder with copies of a run's files, of whole lines and without secrets; the originals may grow meanwhile."""
    with tempfile.TemporaryDirectory(prefix="mixer-tracker-") as place:
        copies = Path(place)
        report = [path for ending in ("png", "html") for path in sorted(folder.glob(f"report/*.{ending}"))]
        for path in [folder / "schedule.jsonl", folder / "catalog.json", *report]:
            if path.is_file() and (max_bytes is None or path.stat().st_size <= max_bytes):
                copy = copies / path.relative_to(folder)
                copy.parent.mkdir(exist_ok=True)
                shutil.copyfile(path, copy)
        if (config := folder / "run.yaml").is_file():
            (copies / "run.yaml").write_text(redacted(config.read_text("utf-8")), "utf-8")
        yield copies


def flat(value: Any, prefix: str = "") -> dict[str, str]:
    """A configuration as one text by dotted key; secrets are starred out, lists are JSON."""
    if isinstance(value, Mapping) and value:
        pairs: dict[str, str] = {}
        for key, inner in value.items():
            pairs |= flat(inner, f"{prefix}.{written(str(key))}" if prefix else written(str(key)))
        return pairs
    if value is not None and is_secret(prefix.rpartition(".")[2]):
        return {prefix: "***"}
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return {prefix: redacted(text)} if prefix else {}


def is_secret(key: str) -> bool:
    return key.lower() in SECRETS or key.lower().endswith(tuple(f"_{word}" for word in SECRETS))


def redacted(text: str) -> str:
    """Text without the users, passwords and keys in URIs, and without what YAML in it gives as secrets."""
    text = _URI_SECRET.sub(r"\1***", _URI_USER.sub("***@", text))
    return _SECRET_ENTRY.sub(r"\1'***'", _SECRET_LINE.sub(r"\1'***'", text))


def _read_yaml(path: Path) -> Any:
    try:
        return yaml.safe_load(path.read_text("utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"it is no YAML: {error}") from error


def _cut(text: str, letters: int) -> str:
    return text if len(text) <= letters else f"{text[: letters - 1]}…"


def _version() -> str:
    try:
        return metadata.version("mixer")
    except metadata.PackageNotFoundError:
        return "unknown"


def _commit() -> str | None:
    """The commit of this package, if it lies in a checkout of its own."""
    place = Path(__file__).resolve().parents[2]
    try:
        done = subprocess.run(
            ["git", "-C", str(place), "rev-parse", "--show-toplevel", "HEAD"],
            capture_output=True,
            text=True,
            timeout=5,
            check=False,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    said = done.stdout.split("\n")
    return said[1] if done.returncode == 0 and Path(said[0]) == place else None
