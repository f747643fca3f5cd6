"""Worlds whose losses follow a known law of the mixture, the tables of runs in them, and their true minima."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize

from mixer.core.catalog import Catalog, Domain
from mixer.core.mixture import Mixture
from mixer.proxies.proposal import FitSetting
from mixer.proxies.table import RunTable

Floats = NDArray[np.float64]


def catalog_of(rows: dict[str, int]) -> Catalog:
    return Catalog(
        row_tokens=128, tokenizer="t", domains=tuple(Domain(name, count, name) for name, count in rows.items())
    )


def setting_of(names: Sequence[str], prior_d: Sequence[float] | Floats | None = None, **options) -> FitSetting:
    rows = options.pop("rows", dict.fromkeys(names, 1000))
    catalog = catalog_of(rows)
    prior_d = np.full(len(names), 1.0 / len(names)) if prior_d is None else np.asarray(prior_d)
    return FitSetting(catalog=catalog, prior=Mixture(prior_d), **options)


def table_of(names: Sequence[str], weights_rd: Floats, losses: dict[str, Floats], **columns) -> RunTable:
    runs = len(weights_rd)
    return RunTable(
        domains=tuple(names),
        run_r=columns.get("run_r", tuple(f"run-{run:04d}" for run in range(runs))),
        progress_r=columns.get("progress_r", np.ones(runs)),
        tokens_r=columns.get("tokens_r", np.full(runs, 1 << 20, dtype=np.int64)),
        weights_rd=np.asarray(weights_rd, dtype=np.float64),
        losses=losses,
        quantity=columns.get("quantity", "loss"),
    )


@dataclass(frozen=True, kw_only=True)
class ExpWorld:
    """L_t(x) = exp(log_floor_t) + exp(x . slope_t), the law of `exp_linear`, for targets in equal parts."""

    slope_td: Floats
    log_floor_t: Floats
    prior_d: Floats
    names: tuple[str, ...] = field(default=())

    @classmethod
    def drawn(cls, seed: int, domains: int = 8, targets: int = 3, spread: float = 1.0) -> "ExpWorld":
        """Every target has domains that help it more than others; of loss some 2 to 4."""
        rng = np.random.default_rng([seed, 77])
        slope_td = 0.5 - spread * rng.gamma(0.8, 1.0, (targets, domains))
        return cls(
            slope_td=slope_td,
            log_floor_t=rng.uniform(0.4, 0.9, targets),
            prior_d=rng.dirichlet(np.full(domains, 2.0)),
            names=tuple(f"d{place:02d}" for place in range(domains)),
        )

    @property
    def sets(self) -> tuple[str, ...]:
        return tuple(f"target/{target}" for target in range(len(self.log_floor_t)))

    def losses(self, weights_rd: Floats) -> dict[str, Floats]:
        loss_rt = np.exp(self.log_floor_t) + np.exp(weights_rd @ self.slope_td.T)
        return {name: loss_rt[:, place] for place, name in enumerate(self.sets)}

    def total(self, weights_rd: Floats) -> Floats:
        return np.mean(list(self.losses(np.atleast_2d(weights_rd)).values()), axis=0)

    def mixtures(self, runs: int, seed: int) -> Floats:
        rng = np.random.default_rng([seed, 78])
        strength_r = np.geomspace(0.5, 5.0, 15)[rng.integers(15, size=runs)] * len(self.names)
        base_d = np.sqrt(self.prior_d) / np.sqrt(self.prior_d).sum()
        return np.array([rng.dirichlet(base_d * strength) for strength in strength_r])

    def table(self, runs: int, seed: int = 0, noise: float = 0.0) -> RunTable:
        return self.measured(self.mixtures(runs, seed), seed, noise)

    def measured(self, weights_rd: Floats, seed: int = 0, noise: float = 0.0) -> RunTable:
        rng = np.random.default_rng([seed, 79])
        losses = {
            name: loss_r + noise * rng.normal(size=len(loss_r)) for name, loss_r in self.losses(weights_rd).items()
        }
        return table_of(self.names, weights_rd, losses)

    def setting(self, **options) -> FitSetting:
        return setting_of(self.names, self.prior_d, **options)

    def minimum(self, cap_d: Floats | None = None) -> Floats:
        """By another solver than ours."""
        domains = len(self.names)
        cap_d = np.ones(domains) if cap_d is None else cap_d
        found = minimize(
            lambda x: float(self.total(x)[0]),
            np.minimum(np.full(domains, 1.0 / domains), cap_d),
            jac=lambda x: (np.exp(self.slope_td @ x) @ self.slope_td) / len(self.log_floor_t),
            bounds=[(0.0, cap) for cap in cap_d],
            constraints={"type": "eq", "fun": lambda x: x.sum() - 1.0, "jac": lambda x: np.ones(domains)},
            method="SLSQP",
            options={"ftol": 1e-15, "maxiter": 1000},
        )
        assert found.success, found.message
        return found.x


def weights_of(proposal, names: Sequence[str]) -> Floats:
    return np.array([proposal.weights[name] for name in names])
