"""A record of every row that was trained, for checks: what is promised of order can be compared with what happened.

One file an attempt and rank, one line a step: the step since the start of the run, rank and world size, then
`domain:row:check` for each row in slot order, where check is a sum over its tokens. Not a part of a run's state;
nothing reads it but people and tests.
"""

import time
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np


class Trace:
    """The lines of one rank; each is written at once, so that a killed rank leaves what it trained."""

    def __init__(self, folder: Path, rank: int, world_size: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._file = open(folder / f"{time.time_ns()}-{rank}.txt", "a", buffering=1)  # noqa: SIM115  # as long as the rank
        self._place = f"{rank} {world_size}"

    def add(self, step: int, batch: Any) -> None:
        tokens_bs = np.ascontiguousarray(np.asarray(batch.tokens), dtype="<i8")
        rows = zip(np.asarray(batch.domain_index).tolist(), np.asarray(batch.row).tolist(), tokens_bs, strict=True)
        parts = (f"{domain}:{row}:{zlib.crc32(tokens_s.tobytes()):08x}" for domain, row, tokens_s in rows)
        self._file.write(f"{step} {self._place} {' '.join(parts)}\n")

    def close(self) -> None:
        self._file.close()


def read_trace(folder: Path) -> dict[int, list[str]]:
    """The rows of every step of the run, in slot order, as last trained; steps that ranks share are joined."""
    steps: dict[int, dict[int, tuple[int, str, list[str]]]] = {}
    for attempt, file in enumerate(sorted(folder.glob("*.txt"))):
        for line in _whole_lines(file):
            step, rank, world_size, *rows = line.split(" ")
            steps.setdefault(int(step), {})
            steps[int(step)][int(rank)] = (attempt, world_size, rows)
    joined: dict[int, list[str]] = {}
    for step, ranks in sorted(steps.items()):
        latest = max(ranks.values(), key=lambda one: one[0])[1]
        joined[step] = [row for _, (_, world, rows) in sorted(ranks.items()) if world == latest for row in rows]
    return joined


def _whole_lines(file: Path) -> Iterable[str]:
    *lines, _ = file.read_text().split("\n")
    return lines
