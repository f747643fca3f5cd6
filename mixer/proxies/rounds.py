"""Which mixtures a swarm trains next: all at once, or in rounds of which each follows from the ones before.

The runs given by name come first, in the first round. Only `climb` has more than one: the method's own options, under
`swarm.fit.climb`, say how many runs each round has (`swarm.runs` does not count then) and how they are chosen. A round
is decided when the ones before it are finished and by what their runs measured, whatever else the table holds: so it
is the same again after a restart.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mixer import config as configs
from mixer.core.catalog import Catalog
from mixer.core.errors import DataError
from mixer.proxies import mixtures
from mixer.proxies.fitting import setting_of
from mixer.proxies.methods.climb import Climb
from mixer.proxies.mixtures import normalised
from mixer.proxies.options import SwarmOptions
from mixer.proxies.table import read_table
from mixer.run import RunConfig

Mixtures = dict[str, NDArray[np.float64]]  # by run


def rounds(config: RunConfig, options: SwarmOptions, catalog: Catalog, table: Path) -> Iterator[Mixtures]:
    """Round after round; each but the first needs the runs of those before it in the table."""
    first = make_mixtures(options, catalog)
    if options.generator != "climb":
        yield first
        return
    setting, climb = setting_of(config, catalog), climb_of(options)
    made = 0
    known = set(first)
    for number, runs in enumerate(climb.rounds):
        found = None
        if number:
            whole = read_table(table)
            found = whole.take([run in known for run in whole.run_r])
        weights_rd = normalised(climb.next_mixtures(found, setting, number=number))
        now = {f"{made + place:05}": weights_d for place, weights_d in enumerate(weights_rd)}
        yield first | now if number == 0 else now
        made, known = made + runs, known | set(now)


def num_runs(options: SwarmOptions) -> int:
    """Of all rounds together."""
    if options.generator == "climb":
        return len(options.given) + sum(climb_of(options).rounds)
    return len(options.given) + (0 if options.generator == "given" else options.runs)


def climb_of(options: SwarmOptions) -> Climb:
    return configs.build(Climb, options.fit.get("climb", {}), "swarm.fit.climb")


def make_mixtures(options: SwarmOptions, catalog: Catalog) -> dict[str, NDArray[np.float64]]:
    """The mixtures of a swarm by run, those given first; each sums to 1."""
    given_rd, made_rd = mixtures.given(catalog, options.given), np.zeros((0, len(catalog)))
    if options.generator == "regmix" and options.runs:
        prior_d = catalog.num_rows_d / float(catalog.num_rows_d.sum())
        made_rd = mixtures.regmix(prior_d, options.runs, options.regmix, options.seed)
    elif options.generator == "olmix" and options.runs:
        earlier_rd = np.concatenate([_weights_of(Path(path), catalog) for path in options.earlier] + [given_rd])
        made_rd = mixtures.olmix(catalog, options.runs, options.olmix, options.seed, earlier_rd)
    elif options.generator == "dirichlet":
        made_rd = mixtures.dirichlet(len(catalog), options.runs, options.seed)
    made = {f"given-{number:05}": weights_d for number, weights_d in enumerate(normalised(given_rd))}
    return made | {f"{number:05}": weights_d for number, weights_d in enumerate(normalised(made_rd))}


def _weights_of(path: Path, catalog: Catalog) -> NDArray[np.float64]:
    table = read_table(path)
    if table.domains != catalog.names:
        raise DataError(
            f"swarm.earlier: {path} is about {', '.join(table.domains)}; this catalog has {', '.join(catalog.names)}. "
            "Leave the table out."
        )
    return table.at(1.0).weights_rd
