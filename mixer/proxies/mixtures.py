"""Which mixtures a swarm tries: generators that know the domains' sizes, and nothing of training.

    regmix      as RegMix (arXiv 2407.01492) and its released code make them
    olmix       as Olmix (arXiv 2602.12237) and its released code make them, by groups of domains
    dirichlet   all mixtures alike: Dirichlet with 1 for every domain
    given       named by their weights

CLIMB (arXiv 2504.13161), which chooses by what was measured before, is in `mixer.proxies.rounds`.

Each answers an array of runs x domains in catalog order, the same one for the same catalog, options and seed. `olmix`,
`dirichlet` and `given` ask for runs one after the other, so a larger swarm begins with the runs of the smaller one;
`regmix` picks at random from all it has drawn, and has no such order.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mixer.core.catalog import Catalog
from mixer.core.errors import ConfigError
from mixer.core.mixture import Mixture, unknown_domain
from mixer.core.permute import key_of

Floats = NDArray[np.float64]

_DRAWS = 256  # attempts drawn at once; part of what a seed means
_SAME = 1e-5  # RegMix's: mixtures whose weights differ by no more in sum are one


def _positive(section: str, **values: float) -> None:
    for key, value in values.items():
        if not (math.isfinite(value) and value > 0):
            raise ConfigError(f"{section}.{key}={value}; it must be above 0 and finite.")


@dataclass(frozen=True, slots=True, kw_only=True)
class RegmixOptions:
    """The released values. `minimum` was chosen for proxies of 512,000 rows; take more for shorter ones."""

    temperature: float = 0.5  # exponent of the natural shares, below 1 toward uniform
    strengths: tuple[float, float] = (0.1, 5.0)  # least and most
    num_strengths: int = 15  # evenly spaced in their logarithm
    max_usage: float = 15.0  # a weight is at most so many natural shares
    minimum: float = 2e-4  # less is none, and weights are multiples of it
    multiplier: int = 100  # attempts, by the runs asked for

    def __post_init__(self) -> None:
        low, high = self.strengths
        _positive("regmix", temperature=self.temperature, max_usage=self.max_usage, minimum=self.minimum)
        _positive("regmix", strengths=low, num_strengths=self.num_strengths, multiplier=self.multiplier)
        if not (low <= high and math.isfinite(high)):
            raise ConfigError(f"regmix.strengths={list(self.strengths)}; needed [least, most].")
        if self.minimum >= 1:
            raise ConfigError(f"regmix.minimum={self.minimum}; it must be below 1.")


@dataclass(frozen=True, slots=True, kw_only=True)
class OlmixOptions:
    """The released values; without groups each domain is a source of its own."""

    groups: dict[str, tuple[str, ...]] = field(default_factory=dict[str, tuple[str, ...]])  # source: its domains
    pins: dict[str, dict[str, float]] = field(default_factory=dict[str, dict[str, float]])  # fixed ratios in a group
    temperature: float = 1.0  # exponent of the natural shares, of groups and in them
    strengths: tuple[float, float] = (0.1, 5.0)
    num_strengths: int = 15
    minimum: float = 0.002  # of a source; less is none
    minimum_inside: float = 0.002  # of a domain in its group: a share of the group
    max_repetition: float = 5.0  # passes over a domain in the run of `budget_tokens`
    budget_tokens: float | None = None  # of the run that the mixtures are meant for; null: no cap on repetition
    distance: float = 0.01  # L2; a mixture nearer to another one is left out
    multiplier: int = 10

    def __post_init__(self) -> None:
        low, high = self.strengths
        _positive("olmix", temperature=self.temperature, strengths=low, num_strengths=self.num_strengths)
        _positive("olmix", multiplier=self.multiplier, max_repetition=self.max_repetition)
        if not (low <= high and math.isfinite(high)):
            raise ConfigError(f"olmix.strengths={list(self.strengths)}; needed [least, most].")
        if self.budget_tokens is not None:
            _positive("olmix", budget_tokens=self.budget_tokens)
        for key in ("minimum", "minimum_inside", "distance"):
            if not 0 <= getattr(self, key) < 1:
                raise ConfigError(f"olmix.{key}={getattr(self, key)}; it must be at least 0 and below 1.")
        unknown = [name for name in self.pins if name not in self.groups]
        if unknown:
            raise ConfigError(
                f"olmix.pins names {', '.join(unknown)}, which olmix.groups does not. Name the group there."
            )


# ---- RegMix ------------------------------------------------------------------------------------------------


def regmix(prior_d: Floats, runs: int, options: RegmixOptions, seed: int) -> Floats:
    """RegMix's candidates. Rows are multiples of `minimum` and so sum to 1 only nearly, as there.

    `multiplier` x runs times: one of the strengths s, w ~ Dirichlet(s * tempered prior); out if a weight is above
    min(max_usage * prior, 1), the prior as it is; what is below `minimum` is 0; normalised; rounded to multiples of
    `minimum` and not normalised again. Sorted, near-equal neighbours dropped, `runs` picked at random.

    Departures: random numbers are numpy's of today and of our seed, so no mixture is one of the released; the
    strength is drawn before its weights and not one of fifteen draws, which is the same distribution.
    """
    rng = np.random.default_rng([seed, key_of("regmix")])
    tempered_d = _tempered(prior_d, options.temperature)
    strengths = np.geomspace(*options.strengths, options.num_strengths)
    bound_d = np.minimum(options.max_usage * prior_d, 1.0)
    attempts = options.multiplier * runs
    kept: list[Floats] = []
    for first in range(0, attempts, _DRAWS):
        drawn_rd = np.concatenate([
            rng.dirichlet(tempered_d * strengths[k], size=number)
            for k, number in enumerate(np.bincount(rng.integers(len(strengths), size=min(_DRAWS, attempts - first))))
        ])  # fmt: skip
        kept.append(drawn_rd[(drawn_rd <= bound_d).all(axis=1)])
    drawn_rd = _above(np.concatenate(kept), options.minimum)
    found_rd = _unlike(np.round(drawn_rd / options.minimum) * options.minimum)
    if len(found_rd) < runs:
        raise ConfigError(
            f"swarm.runs={runs}; of {attempts} drawn mixtures {len(found_rd)} are different and within "
            f"regmix.max_usage={options.max_usage:g}. Ask for fewer, or raise regmix.max_usage or regmix.multiplier."
        )
    return found_rd[rng.choice(len(found_rd), size=runs, replace=False)]


def _tempered(shares_d: Floats, temperature: float) -> Floats:
    powers_d = shares_d**temperature
    return powers_d / powers_d.sum()


def _above(weights_rd: Floats, minimum: float) -> Floats:
    """Weights below `minimum` are 0, and the others sum to 1; rows with nothing left are left out."""
    kept_rd = np.where(weights_rd < minimum, 0.0, weights_rd)
    total_r = kept_rd.sum(axis=1)
    return kept_rd[total_r > 0] / total_r[total_r > 0, None]


def _unlike(weights_rd: Floats) -> Floats:
    """Sorted, without those that are like the last one kept."""
    ordered_rd = weights_rd[np.lexsort(weights_rd.T)]
    kept: list[Floats] = []
    for weights_d in ordered_rd:
        if not kept or np.abs(weights_d - kept[-1]).sum() > _SAME:
            kept.append(weights_d)
    return np.array(kept).reshape(-1, weights_rd.shape[1])


# ---- Olmix -------------------------------------------------------------------------------------------------


class _Places(NamedTuple):
    """A pinned group counts as one place, any other domain as one of its own; places of a group lie together."""

    source_p: NDArray[np.int64]  # the group of each place
    prior_p: Floats  # its natural share
    bound_p: Floats  # no more than its rows allow
    spread_pd: Floats  # a place's domains, in their ratios


def olmix(catalog: Catalog, runs: int, options: OlmixOptions, seed: int, earlier_rd: Floats | None = None) -> Floats:
    """Olmix's candidates; `earlier_rd` are mixtures of other swarms, to which none is to be near.

    Sources first, then the domains in each: Dirichlet(s * share of the source) x Dirichlet(s * share in the source),
    for each of the strengths s; of these, one at random of those within the caps: w <= repetitions * tokens / budget.
    Where both minima are equal, weights below it are 0 and the others are rounded to multiples of it; else sources
    below `minimum` and domains below `minimum_inside` of their source are 0. Normalised, and the caps looked at again.

    Departures: the caps are one rule, repetition included (there two, of which the one with repetition is looked at
    last only); mixtures that are near (`distance`) to one of this very swarm are left out as those near to earlier
    ones are; as many as asked for are taken in the order they come, which has the distribution of picking them at
    random; a source that is below its minimum as a whole is 0 also where its domains are clipped by level; pinned
    ratios hold to the last rounding (there the rounding of weights undoes them). Levels are two.
    """
    rng = np.random.default_rng([seed, key_of("olmix")])
    places = _places(catalog, options)
    strengths = np.geomspace(*options.strengths, options.num_strengths)
    taken: list[Floats] = []
    known_rd = np.zeros((0, len(catalog))) if earlier_rd is None else earlier_rd
    attempts, over, near = options.multiplier * runs, 0, 0
    for first in range(0, attempts, _DRAWS):
        number = min(_DRAWS, attempts - first)
        drawn_kap = np.stack([_draw(rng, places, strength, _DRAWS, options.temperature) for strength in strengths])
        luck_a = rng.random(_DRAWS)
        for a in range(number):
            within_k = (drawn_kap[:, a] <= places.bound_p).all(axis=1)
            choices = np.flatnonzero(within_k)
            chosen_p = drawn_kap[choices[int(luck_a[a] * len(choices))], a] if len(choices) else None
            weights_p = None if chosen_p is None else _clipped(chosen_p, places, options)
            if weights_p is None or (weights_p > places.bound_p * (1 + 1e-12)).any():
                over += 1
                continue
            weights_d = weights_p @ places.spread_pd
            if _nearest(weights_d, known_rd) < options.distance or _nearest(weights_d, taken) < options.distance:
                near += 1
                continue
            taken.append(weights_d)
            if len(taken) == runs:
                return np.array(taken)
    raise ConfigError(
        f"swarm.runs={runs}; of {attempts} attempts {over} were over their domains' rows or had nothing left, and "
        f"{near} lay within olmix.distance={options.distance:g} of another; {len(taken)} are left. Ask for fewer, "
        "raise olmix.max_repetition or olmix.multiplier, or lower olmix.distance."
    )


def _places(catalog: Catalog, options: OlmixOptions) -> _Places:
    source_of: dict[str, str] = {}
    for group, names in options.groups.items():
        for name in names:
            if name not in catalog.index:
                raise ConfigError(f"olmix.groups.{group} names the {unknown_domain(name, catalog.names)}")
            if name in source_of:
                raise ConfigError(f"olmix.groups has {name!r} in {source_of[name]} and in {group}. Keep it in one.")
            source_of[name] = group
    sources: dict[tuple[bool, str], list[int]] = {}
    for name, place in catalog.index.items():
        key = (True, source_of[name]) if name in source_of else (False, name)
        sources.setdefault(key, []).append(place)
    share_d = catalog.num_rows_d / float(catalog.num_rows_d.sum())
    tokens_d = catalog.num_rows_d * float(catalog.row_tokens)
    budget = options.budget_tokens
    bound_d = np.minimum(options.max_repetition * tokens_d / budget, 1.0) if budget else np.ones(len(catalog))
    source, prior, bound, spread = [], [], [], []
    for number, ((is_group, name), members) in enumerate(sorted(sources.items())):
        ratios = _pinned(options.pins[name], name, members, catalog) if is_group and name in options.pins else None
        for inside in [ratios] if ratios is not None else np.eye(len(members)):
            row_d = np.zeros(len(catalog))
            row_d[members] = inside
            has = row_d > 0
            source.append(number)
            prior.append(share_d[members].sum() if ratios is not None else share_d[has].sum())
            bound.append(min(1.0, float((bound_d[has] / row_d[has]).min())))
            spread.append(row_d)
    return _Places(np.array(source), np.array(prior), np.array(bound), np.array(spread))


def _pinned(ratios: Mapping[str, float], group: str, members: Sequence[int], catalog: Catalog) -> Floats:
    names = [catalog.names[place] for place in members]
    if set(ratios) != set(names):
        raise ConfigError(
            f"olmix.pins.{group} is about {', '.join(ratios)}; the group has {', '.join(names)}. Name them."
        )
    given = np.array([ratios[name] for name in names], dtype=np.float64)
    if not (np.isfinite(given).all() and (given >= 0).all() and given.any()):
        raise ConfigError(f"olmix.pins.{group}={dict(ratios)}; needed numbers of at least 0, one of them above it.")
    return given / given.sum()


def _draw(rng: np.random.Generator, places: _Places, strength: float, number: int, temperature: float) -> Floats:
    """So many attempts at one strength, (attempts, places)."""
    share_s = np.bincount(places.source_p, weights=places.prior_p)
    source_as = rng.dirichlet(_tempered(share_s / share_s.sum(), temperature) * strength, size=number)
    weights_ap = source_as[:, places.source_p]
    for source in np.flatnonzero(np.bincount(places.source_p) > 1):
        members = np.flatnonzero(places.source_p == source)
        prior = places.prior_p[members] / places.prior_p[members].sum()
        weights_ap[:, members] *= rng.dirichlet(_tempered(prior, temperature) * strength, size=number)
    return weights_ap


def _clipped(weights_p: Floats, places: _Places, options: OlmixOptions) -> Floats | None:
    """Without what is too little; None if nothing is left."""
    source_p, least = places.source_p, options.minimum
    if least == options.minimum_inside:
        kept_p = np.where(weights_p < least, 0.0, weights_p)
        if least and kept_p.any():
            kept_p = np.round(kept_p / kept_p.sum() / least) * least
    else:
        total_p = np.bincount(source_p, weights=weights_p)[source_p]
        inside = np.bincount(source_p)[source_p] > 1
        small_p = (total_p < least) | (inside & (weights_p < options.minimum_inside * total_p))
        kept_p = np.where(small_p, 0.0, weights_p)
    return kept_p / kept_p.sum() if kept_p.any() else None


def _nearest(weights_d: Floats, others: Floats | list[Floats]) -> float:
    return float(np.sqrt(((np.asarray(others) - weights_d) ** 2).sum(axis=1)).min()) if len(others) else math.inf


# ---- others ------------------------------------------------------------------------------------------------


def dirichlet(num_domains: int, runs: int, seed: int) -> Floats:
    """Every mixture as likely as any other; run n depends on seed and n alone."""
    key = key_of("dirichlet")
    rows = [np.random.default_rng([seed, key, run]).dirichlet(np.ones(num_domains)) for run in range(runs)]
    return np.array(rows).reshape(runs, num_domains)


def given(catalog: Catalog, mixtures: Mapping[str, Mapping[str, float]]) -> Floats:
    """Mixtures by name, each a weight of any scale for every domain."""
    rows: list[Floats] = []
    for name, weights in mixtures.items():
        try:
            rows.append(Mixture.from_dict(catalog, weights, normalize=True).weights_d)
        except ConfigError as error:
            raise ConfigError(f"swarm.given.{name}: {error}") from error
    return np.array(rows).reshape(len(rows), len(catalog))


def normalised(weights_rd: Floats) -> Floats:
    """Rows that sum to 1, to rounding."""
    return weights_rd / np.array([math.fsum(weights_d) for weights_d in weights_rd]).reshape(-1, 1)
