"""Runs of a policy over a list of probes."""

from collections.abc import Sequence

from mixer.core.influence import Influence
from mixer.core.policies import load_policy
from tests.core.policies.making import make_catalog, make_setting, make_signal, make_targets


def guided(kind, options, probes: Sequence[Influence | None], prior: Sequence[float]):
    """The state and the answer after each probe; None is a window without."""
    catalog = make_catalog(*[100] * len(prior))
    policy = load_policy(kind, options)
    first = next((probe for probe in probes if probe is not None), None)
    targets = make_targets(0) if first is None else first.targets
    state = policy.start(make_setting(catalog, prior, targets=targets))
    found = []
    for window, probe in enumerate(probes):
        state, weights = policy.update(state, make_signal(catalog, window, influence=probe))
        found.append((state, weights))
    return found
