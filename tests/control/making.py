from pathlib import Path
from typing import Any

import numpy as np

from mixer.control.controller import Controller, ControllerOptions
from mixer.control.openrun import Charge
from mixer.control.rundir import RunDir
from mixer.control.tracker import TrackerOptions
from mixer.core.catalog import Catalog
from mixer.core.mixture import Mixture
from mixer.core.plan import Geometry
from mixer.core.policies import load_policy
from mixer.core.ports import Policy
from mixer.core.rails import GuardRails
from mixer.core.signal import Signal
from tests.core.policies.making import make_catalog, make_signal

CATALOG = make_catalog(50, 500, 5000)
GEOMETRY = Geometry(window_steps=4, batch_rows=8, seed=3)
PLANNED = 12
RAILS = GuardRails(floor=0.05, max_shift=0.3, max_epochs=4)


def signals(num: int = PLANNED, seed: int = 0) -> list[Signal]:
    rng = np.random.default_rng(seed)
    return [make_signal(CATALOG, window, rng.uniform(1, 6, 3).tolist()) for window in range(num)]


def open_controller(
    rundir: RunDir,
    *,
    policy: Policy | None = None,
    planned_windows: int | None = PLANNED,
    rails: GuardRails = RAILS,
    catalog: Catalog = CATALOG,
    prior: Mixture | None = None,
    **options,
) -> Controller:
    return Controller(
        ControllerOptions(**{"lag_windows": 1} | options),
        policy or load_policy("odm", {"form": "paper"}),
        rundir,
        catalog,
        GEOMETRY,
        prior or Mixture.uniform(catalog),
        rails=rails,
        planned_windows=planned_windows,
    )


def text_of(folder: Path) -> bytes:
    return (folder / "schedule.jsonl").read_bytes()


def undisturbed(folder: Path, **options) -> bytes:
    with RunDir(folder) as rundir:
        controller = open_controller(rundir, **options)
        for signal in signals():
            if signal.window < controller.next_window:
                controller.report(signal)
        assert controller.is_complete
    return text_of(folder)


def make_charge(folder: Path, **options) -> Charge:
    """What `undisturbed` is made of, for an `OpenRun`; nothing is tracked."""
    given = {
        "options": ControllerOptions(lag_windows=1),
        "policy": load_policy("odm", {"form": "paper"}),
        "catalog": CATALOG,
        "geometry": GEOMETRY,
        "prior": Mixture.uniform(CATALOG),
        "rails": RAILS,
        "planned_windows": PLANNED,
        "tracker": TrackerOptions(kind="none"),
    }
    return Charge(folder=folder, **(given | options))


def window_record(window: int) -> dict[str, Any]:
    """What a loop reports with the signal of a window, as far as tests look at it."""
    return {"kind": "window", "window": window, "time": 100.0 + window, "loss": 2.5, "steps": 4 * window + 4}


def bytes_of(folder: Path) -> dict[str, bytes | None]:
    """Everything in a folder: files by what is in them, and folders."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}
