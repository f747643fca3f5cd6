"""Weights over a catalog: what share of a window's rows each domain gets.

A weight counts rows; rows have one length, so it counts tokens too. Weights are float64 arrays in
catalog order inside, and mappings by name at the edges. What keeps a policy's weights within
floors, caps and bounded change is in `mixer.core.rails`; nothing here changes a weight, except
where `normalize=True` asks for it.
"""

import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mixer.core.catalog import Catalog
from mixer.core.errors import ConfigError

SUM_TOLERANCE = 1e-9  # hand-written weights may miss 1 by this much; what the rails return misses it by 1e-12
SHOWN = 8  # values an error text spells out


@dataclass(frozen=True, slots=True, eq=False)
class Mixture:
    """Immutable weights in catalog order: finite, not negative, summing to 1; a weight may be 0.

    Two mixtures are equal if their weights are, bit for bit.
    """

    weights_d: NDArray[np.float64]

    def __post_init__(self) -> None:
        try:
            given = np.asarray(self.weights_d, dtype=np.float64)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"weights {self.weights_d!r} are not numbers. Give every domain one.") from error
        if given.ndim != 1 or not given.size:
            raise ConfigError(f"weights of shape {given.shape}; they need one axis, with a number a domain.")
        _refuse_bad(given, range(given.size))
        _refuse_sum(given, range(given.size))
        # Adding 0.0 turns -0.0 into 0.0 and no other bit; memory of a `bytes` can not be made writable.
        object.__setattr__(self, "weights_d", np.frombuffer((given + 0.0).tobytes(), dtype=np.float64))

    def __len__(self) -> int:
        return self.weights_d.size

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Mixture) and self.weights_d.tobytes() == other.weights_d.tobytes()

    def __hash__(self) -> int:
        return hash(self.weights_d.tobytes())

    def __reduce__(self) -> tuple[type["Mixture"], tuple[NDArray[np.float64]]]:
        return Mixture, (np.array(self.weights_d),)  # through __post_init__, so a copy is read-only too

    @classmethod
    def natural(cls, catalog: Catalog) -> "Mixture":
        """Every domain by its rows."""
        return cls(catalog.num_rows_d / float(sum(catalog.num_rows_d.tolist())))

    @classmethod
    def uniform(cls, catalog: Catalog) -> "Mixture":
        return cls(np.full(len(catalog), 1.0 / len(catalog)))

    @classmethod
    def from_dict(cls, catalog: Catalog, weights: Mapping[str, float], normalize: bool = False) -> "Mixture":
        """Weights by name, for exactly the catalog's domains; `normalize` divides them by their sum."""
        for name in weights:
            if name not in catalog.index:
                raise ConfigError(f"weights name the {unknown_domain(name, catalog.names)}")
        missing = [name for name in catalog.names if name not in weights]
        if missing:
            raise ConfigError(
                f"weights leave out {_listed(missing)}. Give every domain of the catalog a weight; 0 is one."
            )
        values: list[object] = [weights[name] for name in catalog.names]  # as read, so of any type
        for name, value in zip(catalog.names, values, strict=True):
            if isinstance(value, bool) or not isinstance(value, int | float | np.floating | np.integer):
                raise ConfigError(f"the weight of {name!r} is {value!r}, not a number. Give a number >= 0.")
        given = np.array(values, dtype=np.float64)
        _refuse_bad(given, catalog.names)
        if normalize:
            given = given / given.max()  # first, so that a sum of huge weights stays finite
            given = given / math.fsum(given)
        else:
            _refuse_sum(given, catalog.names)
        return cls(given)

    def to_dict(self, catalog: Catalog) -> dict[str, float]:
        """Weights by name; JSON text of them gives back every float exactly."""
        if len(self) != len(catalog):
            raise ConfigError(
                f"a mixture of {len(self)} weights for a catalog of {len(catalog)} domains. "
                "Use the catalog it was made for."
            )
        return dict(zip(catalog.names, self.weights_d.tolist(), strict=True))

    def holding(self, catalog: Catalog, weights: Mapping[str, float]) -> "Mixture":
        """These weights for the domains that are named; the others share the rest as they shared theirs before."""
        merged = self.to_dict(catalog)
        for name in weights:
            if name not in merged:
                raise ConfigError(f"weights name the {unknown_domain(name, catalog.names)}")
        if len(weights) == len(merged):
            return Mixture.from_dict(catalog, weights)
        named = np.array(list(weights.values()), dtype=np.float64)
        if named.any():
            _refuse_bad(named, list(weights))
        rest = 1.0 - math.fsum(named)
        if rest < 0:
            everything = np.ones(named.size, dtype=bool)
            raise ConfigError(
                f"weights sum to {1.0 - rest!r}, more than 1: {{{_picked(named, list(weights), everything)}}}. "
                "Correct them."
            )
        others = {name: weight for name, weight in merged.items() if name not in weights}
        total = math.fsum(others.values())
        scaled = {name: rest * (weight / total if total else 1 / len(others)) for name, weight in others.items()}
        return Mixture.from_dict(catalog, {**scaled, **weights}, normalize=True)

    def shift(self, other: "Mixture") -> float:
        """The L1 distance: the sum of all changes, twice the share of rows that moved."""
        return math.fsum(np.abs(self.weights_d - other.weights_d))


def unknown_domain(name: str, known: Iterable[str]) -> str:
    """The words for a domain nobody knows, with the one that was perhaps meant."""
    nearest = difflib.get_close_matches(name, list(known), n=1, cutoff=0.0)
    return f"unknown domain {name!r}. " + (f"The nearest known one is {nearest[0]!r}." if nearest else "")


def _refuse_bad(weights_d: NDArray[np.float64], names: Sequence[object]) -> None:
    finite_d = np.isfinite(weights_d)
    if not finite_d.all():
        raise ConfigError(f"weights that are not finite: {_picked(weights_d, names, ~finite_d)}. Give numbers >= 0.")
    if (weights_d < 0).any():
        raise ConfigError(
            f"negative weights: {_picked(weights_d, names, weights_d < 0)}. They need to be >= 0; "
            "0 leaves a domain out."
        )
    if not weights_d.any():
        raise ConfigError(f"all {weights_d.size} weights are 0, so no domain would give a row. Give one some weight.")


def _refuse_sum(weights_d: NDArray[np.float64], names: Sequence[object]) -> None:
    with np.errstate(over="ignore"):
        total = math.fsum(weights_d) if weights_d.max() < 1e300 else float(weights_d.sum())
    if abs(total - 1.0) > SUM_TOLERANCE:
        everything = np.ones(weights_d.size, dtype=bool)
        raise ConfigError(
            f"weights sum to {total!r}, not 1: {{{_picked(weights_d, names, everything)}}}. "
            "Correct them, or ask for them to be normalized."
        )


def _picked(weights_d: NDArray[np.float64], names: Sequence[object], which_d: NDArray[np.bool_]) -> str:
    places = np.flatnonzero(which_d).tolist()
    shown = ", ".join(f"{names[place]}: {float(weights_d[place])!r}" for place in places[:SHOWN])
    return shown + (f" and {len(places) - SHOWN} more" if len(places) > SHOWN else "")


def _listed(names: list[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:SHOWN])
    return shown + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
