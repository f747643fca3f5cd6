import numpy as np

from mixer.core.catalog import Catalog, Domain
from mixer.core.mixture import Mixture
from mixer.core.ports import Setting
from mixer.core.signal import Evaluation, Signal, on_grid


def make_catalog(*num_rows: int, names: str = "abcdefgh") -> Catalog:
    return Catalog(16, "fake", tuple(Domain(names[i], n, f"content {i}") for i, n in enumerate(num_rows)))


def make_setting(
    catalog: Catalog, prior: Mixture | None = None, *, first_window: int = 1, planned_windows: int | None = 30
) -> Setting:
    return Setting(
        catalog=catalog,
        prior=prior or Mixture.uniform(catalog),
        window_slots=10,
        first_window=first_window,
        planned_windows=planned_windows,
    )


def make_signal(catalog: Catalog, window: int, losses: list[float | None], tokens: int = 1 << 10) -> Signal:
    """Mean losses by domain; None: the domain gave no row; not finite: its row was bad."""
    given = [(place, loss) for place, loss in enumerate(losses) if loss is not None]
    sums = on_grid([loss * tokens for _, loss in given])
    places = [place for place, _ in given]
    return Signal.from_rows(window, catalog.fingerprint, len(catalog), places, sums, np.full(len(given), tokens))


def make_evaluation(validation: dict[str, float] | None = None, target: dict[str, float] | None = None) -> Evaluation:
    """Losses of the sets validation/<name> and target/<name>."""
    kinds = {"validation": validation or {}, "target": target or {}}
    losses = {f"{kind}/{name}": loss for kind, named in kinds.items() for name, loss in named.items()}
    return Evaluation(sets=tuple(losses), loss_s=np.array(list(losses.values()), dtype=np.float64))
