"""The step that exponentiated-gradient policies share, and losses given by domain name in options."""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from mixer.core.catalog import Catalog
from mixer.core.errors import ConfigError
from mixer.core.mixture import unknown_domain

Floats = NDArray[np.float64]


def tilted(base_d: Floats, score_d: Floats) -> Floats:
    """base * exp(score) scaled to sum 1, in log space, so that no score is too large; a base of 0 stays 0."""
    with np.errstate(divide="ignore", over="ignore"):
        log_d = np.log(base_d) + score_d
        power_d = np.exp(log_d - log_d.max())
    return power_d / power_d.sum()


def smoothed(weights_d: Floats, share: float) -> Floats:
    """With that share of uniform mixed in."""
    return (1.0 - share) * weights_d + share / len(weights_d)


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
