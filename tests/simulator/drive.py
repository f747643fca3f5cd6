"""A policy in a world, through the real controller and its guard rails."""

import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mixer.control.controller import Controller, ControllerOptions
from mixer.control.rundir import RunDir
from mixer.core.mixture import Mixture
from mixer.core.plan import Geometry
from mixer.core.ports import Policy
from mixer.core.rails import GuardRails
from tests.simulator.world import Floats, Sensor

GEOMETRY = Geometry(window_steps=4, batch_rows=64, seed=0)
RAILS = GuardRails(floor=0.01, cap=0.9, max_shift=0.5)
ROUNDING = 1e-9


@dataclass(frozen=True, kw_only=True)
class Run:
    weights_wd: Floats
    counts_wd: NDArray[np.int64]
    share_d: Floats  # of all rows that were trained
    rows: int
    reasons: tuple[str, ...]
    state: dict[str, NDArray]


def run(
    policy: Policy,
    sensor: Sensor,
    windows: int,
    *,
    rails: GuardRails = RAILS,
    prior: Mixture | None = None,
    lag: int = 1,
    folder: Path | None = None,
) -> Run:
    catalog = sensor.catalog
    prior = prior or Mixture.natural(catalog)
    with tempfile.TemporaryDirectory(dir=folder) as path, RunDir(path) as rundir:
        controller = Controller(
            ControllerOptions(lag_windows=lag), policy, rundir, catalog, GEOMETRY, prior,
            rails=rails, planned_windows=windows, targets=sensor.world.targets,
        )  # fmt: skip
        given_d = np.zeros(len(catalog), dtype=np.int64)
        weights, counts, reasons = [], [], []
        for window in range(windows):
            row = controller.row(window)
            given_d = given_d + row.counts_d
            weights.append(np.array(row.weights_d))
            counts.append(np.array(row.counts_d))
            reasons.append(row.reason)
            rows = int(given_d.sum())
            controller.report(sensor.signal(window, np.array(row.counts_d), given_d / rows, rows))
        state = controller.state
    found = Run(
        weights_wd=np.array(weights), counts_wd=np.array(counts), share_d=given_d / given_d.sum(),
        rows=int(given_d.sum()), reasons=tuple(reasons), state=state,
    )  # fmt: skip
    broken = broken_rails(found, rails, sensor)
    assert not broken, f"{type(policy).__name__}: {broken}"
    return found


def broken_rails(found: Run, rails: GuardRails, sensor: Sensor) -> list[str]:
    """What the rails promise and the rows do not keep. The shift counts from the second row on."""
    weights_wd, names = found.weights_wd, sensor.catalog.names
    broken = []
    if weights_wd.min() < rails.floor - ROUNDING or weights_wd.max() > rails.cap + ROUNDING:
        broken.append(f"weights from {weights_wd.min()} to {weights_wd.max()}")
    shifts = np.abs(np.diff(weights_wd, axis=0)).sum(1)
    if rails.max_shift is not None and shifts.max(initial=0.0) > rails.max_shift + ROUNDING:
        broken.append(f"a shift of {shifts.max()}")
    if rails.max_epochs is not None:
        passes_d = found.share_d * found.rows / sensor.catalog.num_rows_d
        broken += [f"{name}: {p} passes" for name, p in zip(names, passes_d, strict=True) if p > rails.max_epochs]
    if "held" in found.reasons:
        broken.append(f"window {found.reasons.index('held')} was held")
    return broken
