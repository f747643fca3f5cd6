"""From a table of a swarm, or from the folder of a single proxy, to the policy that a run is given.

What the mixture is for, is the configuration itself: its catalog, length, prior and the caps of its guard rails.
`swarm.targets` are the weights of the sets that it is to be good at, `swarm.fit.METHOD` the options of a method.

    losses        methods that read what proxies measured: regmix, olmix, ...
    influence     those that read a table of predicted influence (`quantity` of `mixer.proxies.table`): tikmix_m
    likelihoods   those that read no table of runs, and are not offered here: mixmin
    reference     those of a single proxy that a policy steered: doremi, doge (`mixer.proxies.reference`)
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mixer import config as configs
from mixer.core.catalog import Catalog
from mixer.core.errors import ConfigError
from mixer.proxies import reference
from mixer.proxies.methods import kinds, method_class
from mixer.proxies.options import SwarmOptions
from mixer.proxies.proposal import FitSetting, Proposal
from mixer.proxies.table import TABLE, RunTable, read_table
from mixer.run import RunConfig, make_prior, plan_length


@dataclass(frozen=True, slots=True)
class PolicyFile:
    """A section `policy`, as it is written to a YAML file."""

    policy: dict[str, Any] = field(default_factory=dict[str, Any])


def methods() -> tuple[str, ...]:
    """Every name that --fit takes."""
    return tuple(sorted((*reference.METHODS, *(kind for kind in kinds() if method_class(kind).READS != "likelihoods"))))


def setting_of(config: RunConfig, catalog: Catalog) -> FitSetting:
    """What a fit is asked for: a mixture for the run that the configuration describes."""
    options, rails, known = config.swarm or SwarmOptions(), config.rails, config.train
    length = known.windows is not None or known.tokens is not None
    capped = dict.fromkeys(catalog.names, rails.cap) if rails.cap < 1 else {}
    return FitSetting(
        catalog=catalog,
        prior=make_prior(config, catalog),
        planned_rows=plan_length(config, catalog) * config.geometry.window_slots if length else None,
        max_epochs=rails.max_epochs,
        epochs=rails.epochs,
        caps=capped | dict(rails.caps),
        targets=options.targets,
        seed=options.seed,
    )


def propose(method: str, config: RunConfig, catalog: Catalog, source: Path | None = None) -> Proposal:
    """What a method proposes; `source` is a table or a run's folder, by default the one of the configuration."""
    if method not in methods():
        raise ConfigError(f"--fit {method} is no method that fits a swarm. There are {', '.join(methods())}.")
    if method in reference.METHODS:
        weights, note = reference.propose_of(method, source or config.run.folder)
        return Proposal(weights=weights, predicted={}, notes=(note,))
    options = (config.swarm or SwarmOptions()).fit.get(method, {})
    fit = configs.build(method_class(method), options, f"swarm.fit.{method}")
    path = source or config.run.folder / TABLE
    return fit.propose(_fitting(method, read_table(path), path), setting_of(config, catalog))


def _fitting(method: str, table: RunTable, path: Path) -> RunTable:
    needed = "influence" if method_class(method).READS == "influence" else "loss"
    if table.quantity != needed:
        raise ConfigError(
            f"{path} is a table of {table.quantity}; --fit {method} reads one of {needed}. Name one with --table."
        )
    return table


def policy_of(proposal: Proposal) -> PolicyFile:
    """The policy that carries a proposal out: one mixture, or a script where there are stages."""
    if proposal.stages:
        return PolicyFile({"kind": "scripted", **proposal.scripted()})
    return PolicyFile({"kind": "fixed", "weights": dict(proposal.weights)})


def proposal_lines(proposal: Proposal, prior: Mapping[str, float]) -> list[list[str]]:
    """Weights beside the prior's, largest change first: for a table of name, prior, weight, change."""
    lines = [
        [name, f"{prior[name]:.4f}", f"{weight:.4f}", f"{weight - prior[name]:+.4f}"]
        for name, weight in proposal.weights.items()
    ]
    return sorted(lines, key=lambda line: -abs(float(line[3])))
