"""Numbers given by domain name in options."""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from mixer.core.catalog import Catalog
from mixer.core.errors import ConfigError
from mixer.core.mixture import unknown_domain

Floats = NDArray[np.float64]


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
