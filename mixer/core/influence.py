"""Group influence: how much a little more of each domain would lower the loss on each target, with its error.

    benefit_dt[i, t] = <grad of target t's mean loss, M^-1 . grad of domain i's mean loss>

is the first-order fall of target t's loss per unit of weight moved to domain i: positive is good, and the classic
influence function is its negative. M is the metric: identity, the optimizer's second moments, or a curvature.

A probe does not take one gradient of a domain but several, each of other rows, its parts. From the inner
products of all parts come the means, and without further measurement:

- errors, by leaving out one part after the other (jackknife; those of domain and target add up, which is too much
  by up to a factor of sqrt 2 where there is nothing but noise);
- squares without bias: a part's product with itself holds its noise, so norms use pairs of different parts;
- the noise itself: what one row's gradient varies.

Nothing here knows how products are measured; `mixer.training.influence` does.
"""

from dataclasses import dataclass, fields
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from mixer.core.errors import SignalError

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Influence:
    """One probe, after the last step of a window. Domains in catalog order; NaN or None is what was not measured."""

    metric: str  # of the inner products: identity, adam, ekfac, ...
    targets: tuple[str, ...]
    benefit_dt: Floats
    benefit_error_dt: Floats  # standard deviations
    loss_d: Floats  # mean loss of the probed rows
    target_loss_t: Floats
    rate: float  # the learning rate in force
    gram_dd: Floats | None = None  # of the domains' gradients, its diagonal without bias
    gram_error_dd: Floats | None = None
    target_gram_tt: Floats | None = None
    noise_d: Floats | None = None  # of one row's gradient: its variance, summed over parameters
    tokens: int = 0  # that the probe cost, of domains and targets

    def __post_init__(self) -> None:
        domains, targets = len(self.loss_d), len(self.targets)
        shapes = {
            "benefit_dt": (domains, targets),
            "benefit_error_dt": (domains, targets),
            "loss_d": (domains,),
            "target_loss_t": (targets,),
            "gram_dd": (domains, domains),
            "gram_error_dd": (domains, domains),
            "target_gram_tt": (targets, targets),
            "noise_d": (domains,),
        }
        for key, shape in shapes.items():
            value = getattr(self, key)
            if value is None:
                continue
            if value.dtype != np.float64 or value.shape != shape:
                raise SignalError(f"{key} of an influence must be float64 of shape {shape}, found {value!r}.")
            if np.isinf(value).any():
                raise SignalError(f"{key} of an influence is infinite: {value!r}.")

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Influence):
            return NotImplemented
        return all(alike(getattr(self, f.name), getattr(other, f.name)) for f in fields(self))

    def column(self, target: str) -> Floats:
        return self.benefit_dt[:, self.targets.index(target)]


def alike(one: Any, other: Any) -> bool:
    """Of two values of one field: the same arrays, or equal."""
    arrays = [cast(NDArray[Any], value) for value in (one, other) if isinstance(value, np.ndarray)]
    if len(arrays) == 1:
        return False
    return np.array_equal(*arrays, equal_nan=arrays[0].dtype.kind == "f") if arrays else bool(one == other)


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Parts:
    """The parts of a probe: of which group each is, domains first and targets after them, and how large."""

    group_n: Ints
    tokens_n: Ints
    rows_n: Ints
    loss_n: Floats  # mean a token


def summarise(
    products_nn: Floats,
    parts: Parts,
    *,
    num_domains: int,
    targets: tuple[str, ...],
    metric: str,
    rate: float,
) -> Influence:
    """What the inner products of all parts say; a block of NaN is one that was not measured.

    A group's gradient is the mean over its tokens, so its parts count by their tokens.
    """
    groups = num_domains + len(targets)
    weight_gn = np.zeros((groups, len(parts.group_n)))
    weight_gn[parts.group_n, np.arange(len(parts.group_n))] = parts.tokens_n
    total_g = weight_gn.sum(1)
    if (total_g == 0).any():
        raise SignalError(f"groups {np.flatnonzero(total_g == 0).tolist()} of a probe have no token; all need some.")
    weight_gn = weight_gn / total_g[:, None]
    loss_g = weight_gn @ parts.loss_n
    domain, target = slice(0, num_domains), slice(num_domains, groups)
    mean_gg, error_gg = _means(products_nn, weight_gn, parts.group_n)
    has_gram = not np.isnan(mean_gg[domain, domain]).any()
    noise_d = None
    if has_gram:
        square_n = np.diagonal(products_nn)
        excess_n = (square_n - np.diagonal(mean_gg)[parts.group_n]) * parts.rows_n
        noise_d = np.maximum(weight_gn[domain] @ excess_n, 0.0)
    has_targets = len(targets) > 0 and not np.isnan(mean_gg[target, target]).any()
    return Influence(
        metric=metric,
        targets=targets,
        benefit_dt=mean_gg[domain, target].copy(),
        benefit_error_dt=error_gg[domain, target].copy(),
        loss_d=loss_g[domain].copy(),
        target_loss_t=loss_g[target].copy(),
        rate=rate,
        gram_dd=mean_gg[domain, domain].copy() if has_gram else None,
        gram_error_dd=error_gg[domain, domain].copy() if has_gram else None,
        target_gram_tt=mean_gg[target, target].copy() if has_targets else None,
        noise_d=noise_d,
        tokens=int(parts.tokens_n.sum()),
    )


def _means(products_nn: Floats, weight_gn: Floats, group_n: Ints) -> tuple[Floats, Floats]:
    """Inner products of the groups' mean gradients, and their jackknife errors.

    Between groups the mean over all pairs of parts; within a group over pairs of different parts, which leaves the
    noise out. A group of one part has no pair and no error: NaN.
    """
    unknown_nn = np.isnan(products_nn)
    part_nn = np.where(unknown_nn, 0.0, products_nn)
    np.fill_diagonal(part_nn, 0.0)  # no part meets itself
    has_gn = (weight_gn > 0).astype(np.float64)
    unknown_gg = has_gn @ unknown_nn @ has_gn.T > 0
    sums_gg = weight_gn @ part_nn @ weight_gn.T
    own_g = (weight_gn**2).sum(1)  # the weight of pairs of a part with itself
    pairs_gg = np.ones_like(sums_gg)
    np.fill_diagonal(pairs_gg, 1.0 - own_g)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean_gg = np.where((pairs_gg > 1e-12) & ~unknown_gg, sums_gg / pairs_gg, np.nan)

    # Leaving out part n of group g changes row g and column g only.
    sum_gn = weight_gn @ part_nn  # of group g with part n
    variance_gg = np.zeros_like(mean_gg)
    count_g = np.bincount(group_n, minlength=len(weight_gn))
    for n, group in enumerate(group_n.tolist()):
        w = weight_gn[group, n]
        if count_g[group] < 2:
            variance_gg[group, :] = variance_gg[:, group] = np.nan
            continue
        without_g = (sums_gg[group] - w * sum_gn[:, n]) / (1.0 - w)
        left = (1.0 - w) ** 2 - (own_g[group] - w * w)  # the weight of the pairs within the group that are left
        own = (sums_gg[group, group] - 2.0 * w * sum_gn[group, n]) / left if left > 1e-12 else np.nan
        deviation_g = without_g - mean_gg[group]
        deviation_g[group] = own - mean_gg[group, group]
        share = (count_g[group] - 1) / count_g[group]
        variance_gg[group] += share * deviation_g**2
        others = np.arange(len(weight_gn)) != group
        variance_gg[others, group] += share * deviation_g[others] ** 2
    return mean_gg, np.sqrt(variance_gg)
