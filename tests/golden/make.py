"""Golden plans: the exact rows of a few runs. `python -m tests.golden.make` writes them anew.

They may change only together with `plan.VERSION`: a run that was begun before a change could not be
continued after it. Kept are a digest over all slots of a window and, to look at, the first few.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from mixer.core import plan
from mixer.core.catalog import Catalog, Domain
from mixer.core.mixture import Mixture
from mixer.core.plan import Geometry, Plan, plan_window
from mixer.core.row import ScheduleRow
from mixer.core.schedule import MixtureSchedule

PATH = Path(__file__).parent / "plans.json"
SHOWN_SLOTS = 24


def catalog_of(sizes: dict[str, int]) -> Catalog:
    return Catalog(2048, "byte", tuple(Domain(name, rows, f"of {name} {rows}") for name, rows in sizes.items()))


def mixture_of(*weights: float) -> Mixture:
    """In proportion; whole numbers, so that no sum depends on the order of adding."""
    weights_d = np.array(weights, dtype=np.float64)
    return Mixture(weights_d / weights_d.sum())


def steady() -> MixtureSchedule:
    """Three domains, one mixture, several passes of the smallest."""
    schedule = MixtureSchedule(
        catalog_of({"books": 10, "code": 300, "web": 6000}), Geometry(window_steps=4, batch_rows=8)
    )
    return schedule.extend(mixture_of(2, 3, 3), 6)


def moving() -> MixtureSchedule:
    """Weights that move, vanish and return, small blocks, another seed."""
    geometry = Geometry(window_steps=5, batch_rows=13, seed=20_240_229, block_rows=8, group_blocks=3)
    schedule = MixtureSchedule(catalog_of({"a": 97, "b": 1000, "c": 31, "ü": 8}), geometry)
    for window in range(20):
        schedule.extend(mixture_of(window % 5, 7, (window * window) % 11, 1 if window % 3 else 0))
    return schedule


def switching() -> MixtureSchedule:
    """A domain split, one re-selected, one added, then the first catalog again."""
    before = catalog_of({"books": 50, "code": 300, "web": 700})
    after = catalog_of({"books": 50, "code": 210, "web/high": 200, "web/low": 500, "wiki": 40})
    schedule = MixtureSchedule(before, Geometry(window_steps=2, batch_rows=16, seed=3))
    schedule.extend(mixture_of(1, 2, 5), 4)
    schedule.extend(mixture_of(3, 4, 5, 2, 2), 4, catalog=after)
    return schedule.extend(mixture_of(1, 2, 5), 4, catalog=before)


def small() -> MixtureSchedule:
    """Domains of 1, 2 and 3 rows: many passes in one window."""
    return MixtureSchedule(catalog_of({"one": 1, "two": 2, "three": 3}), Geometry(window_steps=3, batch_rows=6)).extend(
        mixture_of(1, 1, 1), 3
    )


def many() -> MixtureSchedule:
    """5,000 domains of unlike sizes, more than a window has slots."""
    catalog = catalog_of({f"domain {i}": 1 + (i * i * 7919) % 100_003 for i in range(5_000)})
    schedule = MixtureSchedule(catalog, Geometry(window_steps=16, batch_rows=64, seed=1))
    for window in range(4):
        schedule.extend(mixture_of(*[1 + (i * (window + 1)) % 17 for i in range(5_000)]))
    return schedule


def drying() -> MixtureSchedule:
    """Limits: one domain runs dry, the others take over its share."""
    schedule = MixtureSchedule(
        catalog_of({"dry": 20, "wet": 10_000, "damp": 40}), Geometry(window_steps=2, batch_rows=8)
    )
    limit_d = np.array([40, 20, 1 << 60])  # in catalog order: damp, dry, wet
    given_d = np.zeros(3, dtype=np.int64)
    for _ in range(8):
        row = schedule.append(schedule.propose(mixture_of(2, 3, 3), limit_d=limit_d - given_d))
        given_d = row.next_offsets_d
    return schedule


def together() -> MixtureSchedule:
    """Steps arranged in runs of four rows of one domain, where there are so many."""
    geometry = Geometry(window_steps=3, batch_rows=16, seed=11, block_rows=8, together_rows=4)
    schedule = MixtureSchedule(catalog_of({"a": 97, "b": 40, "c": 300, "d": 8}), geometry)
    for window in range(6):
        schedule.extend(mixture_of(5, 1 + window, 7, 2))
    return schedule


RUNS: list[Callable[[], MixtureSchedule]] = [steady, moving, switching, small, many, drying, together]


def far() -> Iterator[tuple[ScheduleRow, Geometry]]:
    """Windows as they stand late in runs over the largest corpora."""
    catalog = catalog_of({"huge": 1 << 48, "large": 10**12, "small": 1000})
    geometry = Geometry(window_steps=8, batch_rows=16, seed=9)
    counts_d = np.array([64, 48, 16])
    for window, offsets in [
        (10**6, [(1 << 47) - 30, 10**12 - 20, 16 * 10**6 + 990]),
        (1 << 40, [(1 << 48) - 1, 5 * 10**12 + 7, 999]),
        (7, [0, 0, 0]),
    ]:
        yield ScheduleRow(window, catalog, counts_d / 128, counts_d, np.array(offsets), np.zeros(3)), geometry


def described(domain_n: np.ndarray, row_n: np.ndarray, pass_n: np.ndarray) -> dict[str, Any]:
    data = b"".join(array.astype("<i8").tobytes() for array in (domain_n, row_n, pass_n))
    return {
        "sha256": hashlib.sha256(data).hexdigest(),
        "domains": domain_n[:SHOWN_SLOTS].tolist(),
        "rows": row_n[:SHOWN_SLOTS].tolist(),
        "passes": pass_n[:SHOWN_SLOTS].tolist(),
    }


def plans() -> dict[str, Any]:
    """Everything that is kept, by name of the run and window."""
    found: dict[str, Any] = {}
    for run in RUNS:
        schedule = run()
        windows = map(Plan(schedule, schedule.geometry).window, range(len(schedule)))
        found[run.__name__] = {str(w.window): described(w.domain_n, w.row_n, w.pass_n) for w in windows}
    windows = [plan_window(row, geometry) for row, geometry in far()]
    found["far"] = {str(w.window): described(w.domain_n, w.row_n, w.pass_n) for w in windows}
    return found


def main() -> None:
    lines = []
    for run, windows in plans().items():
        inside = ",\n".join(f"    {json.dumps(window)}: {json.dumps(plan)}" for window, plan in windows.items())
        lines.append(f"  {json.dumps(run)}: {{\n{inside}\n  }}")
    text = f'{{\n  "version": {plan.VERSION},\n' + ",\n".join(lines) + "\n}\n"
    PATH.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
