"""Boosted trees over mixtures, by LightGBM, as RegMix (arXiv 2407.01492) uses them.

Its released settings: plain boosting, squares as the loss, rate 0.01, at most 1,000 trees, 31 leaves, seed 42, and an
end when 3 more trees do not better the squares. Departures:

- its notebook watches the *test* mixtures for that; here a fifth of the runs is held out, the number of trees is read
  off there, and all runs are fitted again with that number;
- LightGBM's least 20 runs a leaf would keep a tree of 40 runs from splitting at all: with fewer than 80 runs it is
  a quarter of them (at least 2).

Trees are constant beyond what they have seen: they cannot tell a mixture outside the runs' range from its edge.
"""

import importlib
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mixer.core.errors import ConfigError, DataError

Floats = NDArray[np.float64]

MOST_TREES, PATIENCE, FOLDS, LEAST_RUNS = 1000, 3, 5, 10


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Trees:
    num_trees: int
    _booster: Any = field(repr=False)

    def predict(self, weights_rd: Floats) -> Floats:
        return np.asarray(self._booster.predict(weights_rd), dtype=np.float64)


def fit_trees(weights_rd: Floats, loss_r: Floats, *, seed: int = 42) -> Trees:
    runs = len(loss_r)
    if runs < LEAST_RUNS:
        raise DataError(
            f"{runs} usable runs for boosted trees; they need at least {LEAST_RUNS}. Train more, or use linear."
        )
    package = _package()
    order = np.random.default_rng([seed, 0x747265]).permutation(runs)
    held, kept = order[: runs // FOLDS], np.sort(order[runs // FOLDS :])
    options = {
        "objective": "regression",
        "metric": "l2",
        "learning_rate": 0.01,
        "seed": seed,
        "verbosity": -1,
        "num_threads": 1,  # sums of more threads come in no fixed order
        "deterministic": True,
        "force_row_wise": True,
    }
    train = package.Dataset(weights_rd[kept], loss_r[kept], params={"verbosity": -1})
    watched = package.Dataset(weights_rd[held], loss_r[held], reference=train)
    probe = package.train(
        options | {"min_data_in_leaf": _leaf(len(kept))},
        train,
        num_boost_round=MOST_TREES,
        valid_sets=[watched],
        callbacks=[package.early_stopping(PATIENCE, verbose=False)],
    )
    num_trees = max(int(probe.best_iteration), 1)
    everything = package.Dataset(weights_rd, loss_r, params={"verbosity": -1})
    options |= {"min_data_in_leaf": _leaf(runs)}
    return Trees(num_trees=num_trees, _booster=package.train(options, everything, num_boost_round=num_trees))


def _leaf(runs: int) -> int:
    return min(20, max(runs // 4, 2))


def _package() -> Any:
    try:
        return importlib.import_module("lightgbm")
    except (ImportError, OSError) as error:  # OSError: its library lacks one of the system's (libgomp)
        raise ConfigError(
            f"regressor=lightgbm needs the package lightgbm, which cannot be imported ({error}). "
            "Install it: pip install 'mixer[swarm]', or use regressor=exp_linear."
        ) from error
