"""Worlds whose losses are known formulas of what was trained, so that the best mixture is known, too.

`MixingWorld`: with p the mean mixture of the run so far and D its rows,
    L_s = c_s + sum_j exp(a_s - T_sj p_j) (1 + D / D0)^-alpha
for every set s: the domains' own validation sets first, targets after them. It is convex in p.
`OwnLawWorld`: every domain's loss follows a power law of the rows that it gave itself, and nothing else.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from scipy import optimize

from mixer.core.catalog import Catalog, Domain
from mixer.core.influence import Influence
from mixer.core.power_law import predicted
from mixer.core.signal import Evaluation, Signal, on_grid

Floats = NDArray[np.float64]
TOKENS = 1 << 16  # of each domain, that losses are taken over


class World(Protocol):
    @property
    def num_rows(self) -> tuple[int, ...]: ...

    @property
    def targets(self) -> tuple[str, ...]: ...

    def losses(self, share_d: Floats, rows: float) -> Floats: ...

    def benefits(self, share_d: Floats, rows: float) -> Floats: ...


@dataclass(frozen=True, kw_only=True)
class MixingWorld:
    num_rows: tuple[int, ...]
    targets: tuple[str, ...]
    floor_s: Floats  # c
    height_s: Floats  # a
    pull_sd: Floats  # T
    alpha: float = 0.3
    half_rows: float = 10_000.0  # D0

    def losses(self, share_d: Floats, rows: float) -> Floats:
        decay = (1.0 + rows / self.half_rows) ** -self.alpha
        return self.floor_s + np.exp(self.height_s[:, None] - self.pull_sd * share_d).sum(1) * decay

    def benefits(self, share_d: Floats, rows: float) -> Floats:
        """-dL_s / dp_j, of shape (domains, sets)."""
        decay = (1.0 + rows / self.half_rows) ** -self.alpha
        return (self.pull_sd * np.exp(self.height_s[:, None] - self.pull_sd * share_d) * decay).T


@dataclass(frozen=True, kw_only=True)
class OwnLawWorld:
    num_rows: tuple[int, ...]
    law_d3: Floats
    targets: tuple[str, ...] = ()
    by_total: bool = False  # a power law of all rows, whosever they are

    def losses(self, share_d: Floats, rows: float) -> Floats:
        own_d = np.maximum(share_d * rows, 1.0)
        return predicted(self.law_d3, np.full_like(own_d, rows) if self.by_total else own_d)

    def benefits(self, share_d: Floats, rows: float) -> Floats:
        own_d = np.maximum(share_d * rows, 1.0)
        falls_d = self.losses(share_d, rows) - np.exp(self.law_d3[:, 1])
        return np.diag(self.law_d3[:, 2] * falls_d / own_d * rows)


def catalog_of(world: World) -> Catalog:
    return Catalog(1024, "world", tuple(Domain(f"d{k}", n, f"of {k}") for k, n in enumerate(world.num_rows)))


@dataclass(frozen=True, kw_only=True)
class Sensor:
    """Makes signals of a world: exact, or with noise drawn from the seed and the window."""

    world: World
    catalog: Catalog
    evaluate_every: int = 1
    probe_every: int = 2
    noise: float = 0.0  # of losses, in nats, and of benefits, in parts of their mean
    seed: int = 0
    reference_d: Floats | None = None  # whose excess is measured

    def signal(self, window: int, counts_d: NDArray[np.int64], share_d: Floats, rows: float) -> Signal:
        rng = np.random.default_rng([self.seed, window])
        num, targets = len(self.catalog), self.world.targets
        loss_s = self.world.losses(share_d, rows)
        seen_s = loss_s + self.noise * rng.standard_normal(len(loss_s))
        tokens_d = np.where(counts_d > 0, TOKENS, 0).astype(np.int64)
        signal = Signal(
            window=window,
            catalog=self.catalog.fingerprint,
            loss_sum_d=on_grid(seen_s[:num] * tokens_d),
            tokens_d=tokens_d,
            rows_d=counts_d.astype(np.int64),
            bad_rows_d=np.zeros(num, dtype=np.int64),
        )
        if self.reference_d is not None:
            signal = replace(signal, excess_sum_d=on_grid(np.maximum(seen_s[:num] - self.reference_d, 0.0) * tokens_d))
        if (window + 1) % self.evaluate_every == 0:
            names = [f"validation/{name}" for name in self.catalog.names] + [f"target/{name}" for name in targets]
            signal = replace(signal, evaluation=Evaluation(sets=tuple(names), loss_s=seen_s.copy()))
        if (window + 1) % self.probe_every == 0:
            signal = replace(signal, influence=self._influence(share_d, rows, loss_s, rng))
        return signal

    def _influence(self, share_d: Floats, rows: float, loss_s: Floats, rng: np.random.Generator) -> Influence:
        num = len(self.catalog)
        benefit_ds = self.world.benefits(share_d, rows)
        error = self.noise * 10 * float(np.abs(benefit_ds).mean())
        benefit_ds = benefit_ds + error * rng.standard_normal(benefit_ds.shape)
        own_dd = benefit_ds[:, :num]
        return Influence(
            metric="world",
            targets=self.world.targets,
            benefit_dt=benefit_ds[:, num:].copy(),
            benefit_error_dt=np.full((num, len(self.world.targets)), error),
            loss_d=loss_s[:num].copy(),
            target_loss_t=loss_s[num:].copy(),
            rate=1e-3,
            gram_dd=(own_dd + own_dd.T) / 2,
            gram_error_dd=np.full((num, num), error),
            noise_d=np.full(num, 0.1),
        )


def best(value: Callable[[Floats], float], num: int, low: float = 0.0, high: float = 1.0) -> Floats:
    """The mixture of least value within the bounds; the value is convex, and perhaps not smooth."""
    found: Any = None
    for start in (np.full(num, 1.0 / num), np.linspace(1, 2, num) / np.linspace(1, 2, num).sum()):
        one: Any = optimize.minimize(
            value, start, method="SLSQP", bounds=[(low, high)] * num, options={"maxiter": 500, "ftol": 1e-12},
            constraints=[{"type": "eq", "fun": lambda p: p.sum() - 1.0}],
        )  # fmt: skip
        found = one if found is None or one.fun < found.fun else found
    return np.asarray(found.x, dtype=np.float64)


def least_worst(losses: Callable[[Floats], Floats], num: int, low: float = 0.0, high: float = 1.0) -> Floats:
    """The mixture whose largest loss is least, as a smooth program with the largest as one more variable."""
    start = np.full(num, 1.0 / num)
    found: Any = optimize.minimize(
        lambda x: x[-1], np.append(start, losses(start).max()), method="SLSQP",
        bounds=[(low, high)] * num + [(None, None)], options={"maxiter": 500, "ftol": 1e-12},
        constraints=[
            {"type": "eq", "fun": lambda x: x[:-1].sum() - 1.0},
            {"type": "ineq", "fun": lambda x: x[-1] - losses(x[:-1])},
        ],
    )  # fmt: skip
    return np.asarray(found.x[:-1], dtype=np.float64)
