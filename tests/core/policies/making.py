import numpy as np

from mixer.core.catalog import Catalog, Domain
from mixer.core.mixture import Mixture
from mixer.core.ports import Setting
from mixer.core.signal import Signal, on_grid


def make_catalog(*num_rows: int, names: str = "abcdefgh") -> Catalog:
    return Catalog(16, "fake", tuple(Domain(names[i], n, f"content {i}") for i, n in enumerate(num_rows)))


def make_setting(catalog: Catalog, prior: Mixture | None = None, **options: int | None) -> Setting:
    values = {"window_slots": 10, "planned_windows": 30} | options
    return Setting(catalog=catalog, prior=prior or Mixture.uniform(catalog), **values)


def make_signal(catalog: Catalog, window: int, losses: list[float | None], tokens: int = 1 << 10) -> Signal:
    """Mean losses by domain; None: the domain gave no row; not finite: its row was bad."""
    n = [i for i, loss in enumerate(losses) if loss is not None]
    sums = on_grid([losses[i] * tokens for i in n])
    return Signal.from_rows(window, catalog.fingerprint, len(catalog), n, sums, np.full(len(n), tokens))
