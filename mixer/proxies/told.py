"""What the files of a finished run say for a comparison."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mixer.control.journal import read_journal
from mixer.control.rundir import load_schedule


@dataclass(frozen=True, slots=True, eq=False)
class Told:
    """What a finished run's files say."""

    loss_et: NDArray[np.float64]
    final_d: NDArray[np.float64]
    mean_d: NDArray[np.float64]
    held: float  # the share of windows whose mixture was held, as the policy's answer was refused
    probe_tokens: float
    train_s: float
    probe_s: float


def read_run(folder: Path, targets: Sequence[str], moments: Sequence[int]) -> Told | str:
    """What it measured, or why it cannot be compared."""
    sets: dict[int, Mapping[str, Any]] = {}
    sums = dict.fromkeys(("probe_tokens", "seconds", "probe_s"), 0.0)
    finished = False
    for _, record in read_journal(folder / "journal.jsonl"):
        if record["kind"] == "evaluation":
            sets[record["window"]] = record["sets"]
        elif record["kind"] == "window":
            for key in sums:
                sums[key] += record.get(key) or 0.0
        finished = finished or (record["kind"] == "event" and record["what"] == "finished")
    if not finished:
        return "not finished"
    if missing := [window for window in moments if window not in sets]:
        return f"its journal lacks the evaluation after window {missing[0]}; remove {folder} to train it anew"
    loss_et = np.array([[_loss(sets[window], name) for name in targets] for window in moments])
    if bad := [name for name, loss in zip(targets, loss_et[-1], strict=True) if not np.isfinite(loss)]:
        return f"its last evaluation has no finite loss on {', '.join(bad)}"
    schedule = load_schedule(folder)
    weights_kd = np.array([row.weights_d for row in schedule])
    held = float(np.mean([row.reason == "held" for row in schedule]))
    return Told(loss_et, weights_kd[-1], weights_kd.mean(axis=0), held, *sums.values())


def _loss(sets: Mapping[str, Any], target: str) -> float:
    loss = sets.get(f"target/{target}", {}).get("loss")
    return np.nan if loss is None else float(loss)
