"""Frozen blocks: domains that keep their ratios among each other, and so count as one.

A block is one *place* of the arrays `_r`, a domain outside of blocks is a place of its own. A block's
member i gets w_i = W * rho_i of the block's weight W, with the same rho_i in every window, bit for bit.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mixer.core.catalog import Catalog
from mixer.core.errors import ConfigError
from mixer.core.mixture import Mixture
from mixer.core.simplex import Floats, relative


@dataclass(frozen=True, slots=True, kw_only=True)
class FrozenBlock:
    """Domains that keep their ratios: `ratios` by name (default: the prior's), `share` to pin their sum."""

    domains: tuple[str, ...]
    ratios: dict[str, float] | None = None
    share: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "domains", tuple(self.domains))
        if not self.domains:
            raise ConfigError("frozen: a block without domains. Name at least one, or leave the block out.")
        if len(set(self.domains)) < len(self.domains):
            raise ConfigError(f"frozen: a block names a domain twice: {', '.join(self.domains)}.")
        if self.share is not None:
            in_range("share", self.share, 0, 1)
        if self.ratios is not None:
            if set(self.ratios) != set(self.domains):
                raise ConfigError(
                    f"frozen: ratios for {sorted(self.ratios)}, domains {sorted(self.domains)}. "
                    "Give each domain of the block one ratio."
                )
            for name, value in self.ratios.items():
                in_range(f"ratios.{name}", value, 0, math.inf)
            if not any(self.ratios.values()):
                raise ConfigError("frozen: all ratios of a block are 0. Give at least one domain some.")


def in_range(key: str, value: float, least: float, most: float) -> None:
    if not least <= value <= most or math.isinf(value):  # a NaN is not in any range
        raise ConfigError(f"{key}={value!r}; it needs to be a number from {least} to {most}.")


class Places:
    """The places of a catalog, and the way between weights of domains (`_d`) and weights of places (`_r`)."""

    def __init__(self, frozen: dict[str, FrozenBlock], catalog: Catalog, prior: Mixture) -> None:
        self.blocks: list[NDArray[np.intp]] = []  # members
        block_d = np.full(len(catalog), -1)
        self.rho_d = np.ones(len(catalog))
        for number, (block_name, block) in enumerate(frozen.items()):
            members = np.array(sorted(catalog.index[name] for name in block.domains))
            ratios = prior.weights_d[members]
            if block.ratios is not None:
                ratios = np.array([block.ratios[catalog.names[member]] for member in members.tolist()])
            if not ratios.any():
                raise ConfigError(
                    f"frozen.{block_name}: the prior gives its domains nothing, so they have no ratios. State `ratios`."
                )
            ratios = relative(ratios)
            self.rho_d[members] = ratios / math.fsum(ratios)
            block_d[members] = number
            self.blocks.append(members)
        alone_d = block_d < 0
        self.place_d = np.where(alone_d, np.cumsum(alone_d) - 1, alone_d.sum() + block_d)
        self.names: list[str | None] = [None] * int(alone_d.sum()) + list(frozen)  # of blocks
        self.share_r = np.full(len(self.names), np.nan)  # pinned; NaN: free
        for place, block in enumerate(frozen.values(), start=int(alone_d.sum())):
            self.share_r[place] = np.nan if block.share is None else block.share
        self._used_d = self.rho_d > 0

    def __len__(self) -> int:
        return len(self.names)

    def members(self, place: int) -> NDArray[np.intp]:
        """The domains at a place, without those that its ratios leave out."""
        return np.flatnonzero((self.place_d == place) & self._used_d)

    def least(self, lo_d: Floats) -> Floats:
        """The least W that keeps each W * rho_i, after rounding, at or above its bound; inf if none does."""
        if not self.blocks:
            return lo_d.copy()
        rho, place = self.rho_d[self._used_d], self.place_d[self._used_d]
        with np.errstate(over="ignore"):
            lo = lo_d[self._used_d] / rho
        lo = np.where(lo * rho < lo_d[self._used_d], np.nextafter(lo, np.inf), lo)
        lo_r = np.zeros(len(self))
        np.maximum.at(lo_r, place, lo)
        lo_r[self.place_d[~self._used_d & (lo_d > 0)]] = np.inf
        return lo_r

    def most(self, hi_d: Floats) -> Floats:
        """The largest W <= 1 that keeps each W * rho_i, after rounding, at or below its bound."""
        if not self.blocks:
            return np.minimum(hi_d, 1.0)
        rho, place = self.rho_d[self._used_d], self.place_d[self._used_d]
        with np.errstate(over="ignore"):
            hi = hi_d[self._used_d] / rho
        hi = np.where(hi * rho > hi_d[self._used_d], np.nextafter(hi, -np.inf), hi)
        hi_r = np.ones(len(self))
        np.minimum.at(hi_r, place, hi)
        return hi_r

    def gather(self, weights_d: Floats) -> Floats:
        """Weights of the places; a block that is some W * rho already gives a W that spreads back."""
        sums_r: Floats = np.bincount(self.place_d, weights=weights_d, minlength=len(self)).astype(np.float64)
        for members in self.blocks:
            rho, weights = self.rho_d[members], weights_d[members]
            widest = int(np.argmax(rho))
            near = weights[widest] / rho[widest]
            guesses = np.maximum(near + np.arange(-2, 3) * np.spacing(near), 0.0)
            exact = (guesses[:, None] * rho == weights).all(axis=1)
            if exact.any():
                sums_r[self.place_d[members[0]]] = guesses[int(np.argmax(exact))]
        return sums_r

    def snapped(self, weights_r: Floats, lo_r: Floats, hi_r: Floats) -> Floats:
        """Weights moved to a bound where their domains do not feel it: more than one W has the same bits."""
        if not self.blocks:
            return weights_r
        at_bound_r = np.minimum(np.maximum(weights_r, lo_r), hi_r)
        same_r = np.ones(len(self), dtype=np.bool_)
        np.logical_and.at(same_r, self.place_d, self.spread(at_bound_r) == self.spread(weights_r))
        return np.where(same_r, at_bound_r, weights_r)

    def spread(self, weights_r: Floats) -> Floats:
        return weights_r[self.place_d] * self.rho_d
