"""From runs to a table for people and figures for the record."""

import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tests.bench.peers.adapters import LIMIT
from tests.bench.peers.ours import WAYS
from tests.bench.peers.runs import Run

NOT_PEERS = (LIMIT, "memcpy", "limit-in-loader", *WAYS)
LARGEST_DEVIATION = 5.0  # standard deviations of independent drawing; a share further off is marked


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One reader in one setting over all repetitions: medians."""

    reader: str
    processes: int
    workers: int
    runs: int
    error: str
    mtok_per_s: float
    slowest: float
    fastest: float
    percent_of_limit: float
    cpu_s_per_mtok: float
    peak_rss_mb: float
    private_mb: float
    first_batch_s: float
    share_off: float
    share_off_sigma: float
    rows_checked: int
    rows_wrong: int
    batches_repeated: int

    @property
    def is_wrong(self) -> bool:
        return bool(self.rows_wrong or self.batches_repeated)


def summary(runs: list[Run]) -> list[Line]:
    """Settings in the order they were run; within one the fastest first."""
    limits = {(r.processes, r.workers, r.repetition): r.mtok_per_s for r in runs if r.reader == LIMIT and not r.error}
    lines: list[Line] = []
    keys = dict.fromkeys((r.processes, r.workers, r.reader) for r in runs)
    for processes, workers, reader in keys:
        mine = [r for r in runs if (r.processes, r.workers, r.reader) == (processes, workers, reader)]
        good = [r for r in mine if not r.error]
        paired = [
            100 * r.mtok_per_s / limits[processes, workers, r.repetition]
            for r in good
            if (processes, workers, r.repetition) in limits
        ]
        rates = [r.mtok_per_s for r in good]
        lines.append(
            Line(
                reader=reader,
                processes=processes,
                workers=workers,
                runs=len(good),
                error=next((r.error for r in mine if r.error), ""),
                mtok_per_s=_median(rates),
                slowest=min(rates, default=0.0),
                fastest=max(rates, default=0.0),
                percent_of_limit=_median(paired),
                cpu_s_per_mtok=_median([r.cpu_s_per_mtok for r in good]),
                peak_rss_mb=_median([r.peak_rss_mb for r in good]),
                private_mb=_median([r.private_mb for r in good]),
                first_batch_s=_median([r.first_batch_s for r in good]),
                share_off=max((r.share_off for r in good), default=0.0),
                share_off_sigma=max((r.share_off_sigma for r in good), default=0.0),
                rows_checked=sum(r.rows_checked for r in good),
                rows_wrong=sum(r.rows_wrong for r in good),
                batches_repeated=sum(r.batches_repeated for r in good),
            )
        )
    settings = list(dict.fromkeys((line.processes, line.workers) for line in lines))
    lines.sort(key=lambda line: (settings.index((line.processes, line.workers)), -line.mtok_per_s))
    return lines


def _median(values: list[float]) -> float:
    return statistics.median(values) if values else 0.0


def table(lines: list[Line]) -> str:
    head = (
        f"{'reader':<16} {'runs':>4} {'Mtok/s':>8} {'(min-max)':>15} {'% limit':>8} {'CPU s/Mtok':>11} "
        f"{'RSS MB':>7} {'private':>8} {'first s':>8} {'share off':>10} {'checked':>8}"
    )
    text: list[str] = []
    setting = None
    for line in lines:
        if (line.processes, line.workers) != setting:
            setting = (line.processes, line.workers)
            text += ["", setting_name(*setting), head]
        if not line.runs:
            text.append(f"{line.reader:<16} failed: {_last_line(line.error)}")
            continue
        spread = f"({line.slowest:.1f}-{line.fastest:.1f})"
        checked = "WRONG" if line.is_wrong else f"{line.rows_checked}"
        mark = "!" if line.share_off_sigma > LARGEST_DEVIATION else ""
        text.append(
            f"{line.reader:<16} {line.runs:>4} {line.mtok_per_s:>8.1f} {spread:>15} "
            f"{line.percent_of_limit:>8.1f} {line.cpu_s_per_mtok:>11.5f} {line.peak_rss_mb:>7.0f} "
            f"{line.private_mb:>8.0f} {line.first_batch_s:>8.3f} {f'{line.share_off:.4f}{mark}':>10} "
            f"{checked:>8}"
        )
        if line.error:
            text.append(f"{'':<16} and failed in another repetition: {_last_line(line.error)}")
    return "\n".join(text)


def _last_line(error: str) -> str:
    return (error.strip().splitlines() or ["without a word"])[-1][:160]


def figures(lines: list[Line]) -> list[dict[str, Any]]:
    """What is claimed, as arguments of `tests.bench.record.record`; empty where our reader did not run.

    Against the fastest peer, shares of the limit are divided, because those are paired by repetition.
    """
    found: list[dict[str, Any]] = []
    for mine in lines:
        if mine.reader not in WAYS or not mine.runs:
            continue
        others = [
            line
            for line in lines
            if (line.processes, line.workers) == (mine.processes, mine.workers)
            and line.reader not in WAYS
            and line.runs
        ]
        name = f"{mine.reader}, {setting_name(mine.processes, mine.workers)}"
        shown = {line.reader: _measures(line) for line in others}
        share = mine.percent_of_limit / 100
        value = {"share": round(share, 3)} | _measures(mine)
        found.append(_figure(f"{name}: share of the limit", value, "of the limit", ">= 0.5", share >= 0.5, shown))
        best = max((line.percent_of_limit for line in others if line.reader not in NOT_PEERS), default=0.0)
        if best:
            ahead = round(mine.percent_of_limit / best, 3)
            shares = {line.reader: round(line.percent_of_limit / 100, 3) for line in others}
            found.append(_figure(f"{name}: against the fastest peer", ahead, "times", "> 1", ahead > 1, shares))
    return found


def _measures(line: Line) -> dict[str, float]:
    return {
        "mtok_per_s": round(line.mtok_per_s, 1),
        "cpu_s_per_mtok": round(line.cpu_s_per_mtok, 5),
        "private_mb": round(line.private_mb),
    }


def setting_name(processes: int, workers: int) -> str:
    helper = "one worker each" if workers else "no worker"
    return f"{processes} process{'es' if processes > 1 else ''}, {helper}"


def _figure(
    figure: str, value: float | Mapping[str, float], unit: str, target: str, met: bool, peers: Mapping[str, Any]
) -> dict[str, Any]:
    return {
        "figure": figure,
        "value": value,
        "unit": unit,
        "target": target,
        "met": met,
        "peers": dict(peers),
    }
