"""Write one figure of the project where `make figures` reads it: tests/bench/results/<slug>.json.

A figure is what was measured, what was wanted, how others did, and what has to be typed to measure it again.
Recording a figure again replaces it.
"""

import json
import os
import platform
import re
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def record(
    *,
    figure: str,
    value: float | int | str | Mapping[str, Any],
    unit: str,
    target: str,
    met: bool,
    peers: Mapping[str, Any],
    command: str,
    results: Path = RESULTS,
) -> Path:
    """`target` in words with its number ("<= 2 ms"); `peers` maps a system to its value, empty if none."""
    entry = {
        "figure": figure,
        "value": value,
        "unit": unit,
        "target": target,
        "met": bool(met),
        "peers": dict(peers),
        "command": command,
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "machine": machine(),
    }
    text = json.dumps(entry, indent=2, ensure_ascii=False, default=_plain) + "\n"
    results.mkdir(parents=True, exist_ok=True)
    path = results / f"{slug(figure)}.json"
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(text, "utf-8")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def slug(figure: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", figure.lower()).strip("-")


def machine() -> str:
    """Cores that this process may use, memory, processor, system, Python."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    processor = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        named = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE)
        processor = named[1].strip() if named else processor
    python = ".".join(map(str, sys.version_info[:3]))
    return f"{cores} cores, {memory:.0f} GiB, {processor}, {platform.system()}, Python {python}"


def _plain(value: Any) -> Any:
    """numpy's numbers and arrays as Python's."""
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"a {type(value).__name__} in a figure; needed plain values.")
