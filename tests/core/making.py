"""Small catalogs, mixtures and schedules for the tests of the core."""

from collections.abc import Iterable

import numpy as np

from mixer.core.catalog import Catalog, Domain
from mixer.core.mixture import Mixture
from mixer.core.plan import Geometry, Plan, WindowPlan
from mixer.core.schedule import MixtureSchedule

Pair = tuple[int, int]


def catalog_of(**rows: int) -> Catalog:
    return Catalog(2048, "byte", tuple(Domain(name, count, f"of {name}") for name, count in rows.items()))


def catalog_of_sizes(sizes: Iterable[int]) -> Catalog:
    """Domains d0000, d0001, ... so that catalog order is the order given."""
    return Catalog(2048, "byte", tuple(Domain(f"d{i:05}", size, f"of {i}") for i, size in enumerate(sizes)))


def mixture_of(*weights: float) -> Mixture:
    return Mixture(np.array(weights, dtype=np.float64))


def relative(weights: Iterable[float]) -> Mixture:
    weights_d = np.array(list(weights), dtype=np.float64)
    return Mixture(weights_d / weights_d.sum())


def schedule_of(catalog: Catalog, geometry: Geometry, mixtures: Iterable[Mixture]) -> MixtureSchedule:
    schedule = MixtureSchedule(catalog, geometry)
    for mixture in mixtures:
        schedule.extend(mixture)
    return schedule


def windows_of(schedule: MixtureSchedule) -> list[WindowPlan]:
    plan = Plan(schedule, schedule.geometry)
    return [plan.window(window) for window in range(len(schedule))]


def pairs(window: WindowPlan) -> list[Pair]:
    """(domain, row) of every slot."""
    return list(zip(window.domain_n.tolist(), window.row_n.tolist(), strict=True))


def rows_of(schedule: MixtureSchedule, domain: int) -> list[int]:
    """All rows one domain gave, in the order in which it gave them (slots of one window, step by step)."""
    return [row for window in windows_of(schedule) for place, row in pairs(window) if place == domain]
