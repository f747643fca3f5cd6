"""BiMix (arXiv 2405.14908): every domain's loss falls with its own weight and the tokens seen, and nothing else.

    L_i(x_i, s) = (b_i s^-beta_i + c_i) x_i^-alpha_i

fitted for each domain to its own set (`validation/<domain>`), over all measurements of all runs (`laws.OwnShare`). At
`horizon` (in tokens of a whole small run) that leaves  sum_i a_i x_i^-alpha_i,  and where a cap does not hold a domain

    x_i = (a_i alpha_i / nu)^(1 / (1 + alpha_i))          with the one nu that makes the weights sum to 1,

found by bisection. a_i carries the domain's weight among the targets: equal parts unless the setting names sets.

Departures: the formula is from memory; fitted by least squares of log losses. Measurements of runs that gave a domain
nothing are left out of its law, which is infinite there. Sets that are no domain's own are refused: the law says
nothing of them. The cheap start from domains' entropies is not offered.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from mixer.core.errors import ConfigError, DataError
from mixer.proxies.evidence import VALIDATION
from mixer.proxies.laws import OwnShare, fit_own_share
from mixer.proxies.proposal import FitSetting, Proposal, by_name
from mixer.proxies.regress import spearman
from mixer.proxies.table import RunTable

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Bimix:
    READS: ClassVar[str] = "losses"
    horizon: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.horizon < np.inf:
            raise ConfigError(f"horizon={self.horizon!r}; it needs to be above 0.")

    def propose(self, table: RunTable, setting: FitSetting) -> Proposal:
        targets = self._targets(table, setting)
        laws, ranks, notes = {}, {}, []
        for name in setting.names:
            if name in targets:
                laws[name], ranks[f"{VALIDATION}{name}"], left_out = _fitted(table, name)
                notes += [f"{name}: {left_out} measurements without its rows or loss left out"] * bool(left_out)
        scale_d, alpha_d = np.zeros(len(setting.names)), np.zeros(len(setting.names))
        for name, law in laws.items():
            place = setting.catalog.index[name]
            scale_d[place], alpha_d[place] = targets[name] * law.scale(self.horizon), law.alpha
        flat = [name for name, law in laws.items() if law.alpha < 1e-6]
        notes += [f"losses that do not fall with their own weight: {', '.join(flat)}"] * bool(flat)
        weights_d = setting.within(shares(scale_d, alpha_d, setting.cap_d, setting.prior_d))
        predicted = {
            f"{VALIDATION}{name}": float(laws[name].predict(np.array(max(weight, 1e-12)), np.array(self.horizon)))
            for name, weight in zip(setting.names, weights_d.tolist(), strict=True)
            if name in laws
        }
        return Proposal(
            weights=by_name(setting, weights_d),
            predicted=predicted,
            rank_correlation=ranks,
            notes=(*notes, "rank correlations are of the runs that were fitted", *setting.at_caps(weights_d)),
        )

    def _targets(self, table: RunTable, setting: FitSetting) -> dict[str, float]:
        asked = {name: weight for name, weight in setting.targets.items() if weight > 0}
        own = {f"{VALIDATION}{name}": name for name in setting.names}
        foreign = sorted(set(asked) - set(own))
        if foreign:
            raise DataError(
                f"bimix knows a domain's own losses ({VALIDATION}<domain>), not {', '.join(foreign)}. "
                "Name such sets as targets, or use mixing_laws."
            )
        asked = asked or dict.fromkeys(own, 1.0)
        lost = sorted(name for name in asked if name not in table.losses)
        if lost:
            raise DataError(
                f"the table has no losses of {', '.join(lost)}; bimix needs them. Evaluate the runs on them."
            )
        total = sum(asked.values())
        return {own[name]: weight / total for name, weight in asked.items()}


def _fitted(table: RunTable, name: str) -> tuple[OwnShare, float, int]:
    if name not in table.domains:
        raise DataError(f"the table does not know the domain {name!r}. Fit the catalog that the runs were made for.")
    weight_r, loss_r = table.weights_rd[:, table.domains.index(name)], table.losses[f"{VALIDATION}{name}"]
    used = (weight_r > 1e-9) & np.isfinite(loss_r) & (loss_r > 0) & (table.progress_r > 0)
    x, s, loss = weight_r[used], table.progress_r[used], loss_r[used]
    if not used.any() or np.ptp(np.log(x)) < 1e-9:
        raise DataError(
            f"{int(used.sum())} measurements of {name!r} with rows of it, all at one weight; a law in the weight needs "
            "several. Train runs that vary it."
        )
    law = fit_own_share(x, s, loss)
    last = s == s.max()
    return law, spearman(law.predict(x[last], s[last]), loss[last]), int((~used).sum())


def shares(scale_d: Floats, alpha_d: Floats, cap_d: Floats, spare_d: Floats) -> Floats:
    """The x within the caps, summing to 1, of least  sum_i scale_i x_i^-alpha_i.

    Domains without a part in it get what the others cannot take, in the ratios of `spare_d`, and nothing else.
    """
    weights_d = np.zeros(len(cap_d))
    want_d = scale_d * alpha_d
    named = (want_d > 0) & (cap_d > 0)
    if not named.any():
        return spare_d.copy()
    if cap_d[named].sum() <= 1.0:
        weights_d[named] = cap_d[named]
        rest_d = np.where(named, 0.0, spare_d)
        return weights_d + rest_d * (1.0 - weights_d.sum()) / (rest_d.sum() or 1.0)
    log_want, power, cap = np.log(want_d[named]), 1.0 / (1.0 + alpha_d[named]), cap_d[named]

    def at(log_nu: float) -> Floats:
        return np.minimum(np.exp(np.clip((log_want - log_nu) * power, -700.0, 1.0)), cap)

    low, high = float(log_want.min()) - 1.0, float(log_want.max()) + 1.0
    while at(low).sum() < 1.0:
        low -= high - low
    while at(high).sum() > 1.0:
        high += high - low
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if at(middle).sum() > 1.0 else (low, middle)
    weights_d[named] = at(high)
    return weights_d
