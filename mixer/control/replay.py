"""Replay: a run folder that holds a whole saved schedule from the start, so that nothing is left to decide.

With the same catalog, geometry and length the rows are the saved ones, byte for byte. Anything else has its place
in the order of rows, and so is refused, or, where it is asked for by name, a stretch: the same course of weights by
token fraction (see `MixtureSchedule.stretch`), planned afresh, whose rows have the reason `stretched`. Domains of
another corpus are then matched by name. Rows that were decided but not trained belong to the schedule too.
"""

from dataclasses import asdict
from pathlib import Path

from mixer.control.rundir import RunDir, load_schedule
from mixer.core import plan
from mixer.core.catalog import Catalog
from mixer.core.errors import ResumeError
from mixer.core.plan import Geometry
from mixer.core.schedule import MixtureSchedule

REPLAY = "replay"  # the kind of such a folder, in its origin.json
SHOWN = 8  # differences that an error text spells out


def prepare_replay(
    source: Path,
    target: RunDir | Path,
    catalog: Catalog,
    geometry: Geometry,
    windows: int | None = None,
    *,
    stretch: bool = False,
    config: str = "",
) -> MixtureSchedule:
    """Begin the run of `target` with the schedule of `source`, a run folder or a schedule file; returns it.

    `catalog` is the one in force at the schedule's end. `windows` is the length of the new run, by default that of
    the schedule. The target is begun whole or not at all.
    """
    saved = load_schedule(source)
    schedule = _fitted(saved, source, catalog, geometry, windows or len(saved), stretch)
    origin = {
        "kind": REPLAY,
        "source": str(source.absolute()),
        "windows": len(saved),
        "stretched": schedule is not saved,
        "lag_windows": None,
    }
    if isinstance(target, RunDir):
        target.begin(schedule.catalog, geometry, config, schedule=schedule, origin=origin)
        return target.schedule
    with RunDir(target) as rundir:
        rundir.begin(schedule.catalog, geometry, config, schedule=schedule, origin=origin)
        return rundir.schedule


def _fitted(
    saved: MixtureSchedule, source: Path, catalog: Catalog, geometry: Geometry, windows: int, stretch: bool
) -> MixtureSchedule:
    """The saved schedule itself if nothing differs, else it stretched, else an error."""
    if not saved:
        raise ResumeError(f"replay refused: the schedule of {source} has no window. Name one that decided some.")
    now = saved.last_catalog
    differences = [
        f"{key}={value} became {getattr(geometry, key)}"
        for key, value in asdict(saved.geometry).items()
        if getattr(geometry, key) != value
    ]
    if windows != len(saved):
        differences.append(f"windows={len(saved)} became {windows}")
    if saved.plan_version != plan.VERSION:
        differences.append(f"version {saved.plan_version} of the plan became {plan.VERSION}")
    differences += now.differences(catalog)
    if not differences:
        return saved
    named = "; ".join(differences[:SHOWN])
    named += f"; and {len(differences) - SHOWN} more" if len(differences) > SHOWN else ""
    if not stretch:
        raise ResumeError(
            f"replay refused: this is not what {source} was planned for: {named}. Every row would be another one. "
            "Use the saved values, or ask for the schedule to be stretched."
        )
    if now.fingerprint == catalog.fingerprint:
        return saved.stretch(windows, geometry)
    missing = sorted(now.index.keys() - catalog.index.keys())
    extra = sorted(catalog.index.keys() - now.index.keys())
    if missing or extra:
        raise ResumeError(
            f"replay refused: domains are matched by name, and the corpus lacks {missing[:SHOWN]} and has "
            f"{extra[:SHOWN]} beside those of {source}. Use a catalog of the same names, or fork the run."
        )
    return saved.stretch(windows, geometry, catalog)
