"""What several policies share: numbers given by domain name in options, and NEEDS that depend on options."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mixer.core.catalog import Catalog
from mixer.core.errors import ConfigError
from mixer.core.mixture import unknown_domain

Floats = NDArray[np.float64]


class NeedsByOptions:
    """A policy's NEEDS: of the class by default options, of an instance by its own."""

    def __init__(self, default: set[str], of: Callable[[Any], set[str]]) -> None:
        self._default, self._of = frozenset(default), of

    def __get__(self, policy: Any, kind: type) -> frozenset[str]:
        return self._default if policy is None else frozenset(self._of(policy))


def by_name(catalog: Catalog, option: str, given: Mapping[str, float]) -> Floats:
    """Numbers of an option in catalog order: one for every domain, and for no other."""
    for name, value in given.items():
        if name not in catalog.index:
            raise ConfigError(f"policy.{option} names the {unknown_domain(name, catalog.names)}")
        if not np.isfinite(value):
            raise ConfigError(f"policy.{option} of {name!r} is {value!r}. Give a finite number.")
    missing = [name for name in catalog.names if name not in given]
    if missing:
        raise ConfigError(f"policy.{option} leaves out {', '.join(map(repr, missing))}. Give one for every domain.")
    return np.array([float(given[name]) for name in catalog.names])
