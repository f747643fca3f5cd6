"""What every policy promises, for all kinds there are; a new one is picked up by itself.

Signals carry what a kind's NEEDS name and nothing else: losses in every window, evaluations and probes in some.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from mixer.core.errors import ConfigError
from mixer.core.mixture import Mixture
from mixer.core.policies import kinds, load_policy
from tests.core.policies.making import (
    make_catalog,
    make_evaluation,
    make_influence,
    make_setting,
    make_signal,
    make_targets,
)

# Options in which names appear are given by place, for any catalog; defaults are tried for every kind.
BY_PLACE = [0.5, 0.25, 0.125, 0.125]
MORE: dict[str, Any] = {
    "fixed": lambda names: {"weights": dict(zip(names, BY_PLACE, strict=True))},
    "scripted": lambda names: {
        "stages": {
            "early": {"at": 0.1, "weights": dict(zip(names, BY_PLACE, strict=True))},
            "late": {"at": 0.6, "weights": dict(zip(names, BY_PLACE[::-1], strict=True))},
        }
    },
    "odm": lambda names: {"form": "paper"},
    "ado": lambda names: {"form": "paper", "warmup_windows": 5, "skipped_windows": 0},
    "doremi": lambda names: {"reference": dict(zip(names, REFERENCES, strict=True))},
    "skill_it": lambda names: {"graph": {names[0]: {names[0]: 1.0, names[1]: 0.5}, names[2]: {names[3]: 0.5}}},
    "ftrl": lambda names: {"score": "worst", "base": "average", "noise": "shrink", "memory": 0.5, "smoothing": 0.05},
    "dga": lambda names: {"target_weights": {"goal1": 3.0}, "memory": 0.8, "scale": "none"},
    "doge": lambda names: {"toward": "domains", "mu": 1e-4},
    "grape": lambda names: {"target_every": 2, "memory": 0.5, "min_stability": -1.0},
    "rnb": lambda names: {"scale": "cosine", "base": "prior", "judged_by": {names[1]: 2.0, names[2]: 1.0}},
    "pike": lambda names: {"scale": "none", "fairness": 1.0},
    "tikmix_d": lambda names: {"entropy": 0.0, "max_shift": 0.3, "memory": 0.5, "target_weights": {"goal2": 0.0}},
    "bids_balance": lambda names: {"base": "previous", "target_weights": {"goal0": 0.5}},
    "quad_ucb": lambda names: {"arms": 2, "forget": 0.5},
    "pilot": lambda names: {"influence": False},
}
# What a kind cannot do without, by place too.
NEEDED: dict[str, Any] = {"shearing": lambda names: {"reference": dict(zip(names, REFERENCES, strict=True))}}
REFERENCES = [1.5, 2.0, 0.5, 3.0]
CASES = [(kind, False) for kind in kinds()] + [(kind, True) for kind in MORE]
ROWS = (20, 100, 7, 400)
TARGETS = make_targets(3)
NAN = float("nan")


@dataclass
class Measured:
    """One window, by place of the domain; None is what its turn has not come for."""

    losses: list
    excess: list
    validation: list | None = None  # of the domains
    goals: list | None = None  # losses of the targets
    probe: bool = False
    benefit: Any = 0.0
    error: Any = 0.0
    noise: Any = 1.0


BENEFIT = [[3.0, 1.0, -0.5], [0.5, 2.0, 0.1], [-1.0, 0.2, 0.3], [0.1, 0.1, 0.2]]
OTHER = [[0.2, 1.0, 0.0], [2.0, NAN, 0.4], [NAN, NAN, NAN], [0.1, 0.3, -0.2]]
EXCESS = [0.5, 0.0, 0.25, 1.0]
WINDOWS = [
    Measured([3.0, 2.0, 1.0, 4.0], EXCESS, validation=[3.0, 2.0, 1.5, 4.0], goals=[4.0, 3.0, 2.0]),
    Measured([3.0, 2.0, 1.0, 4.0], EXCESS, probe=True, benefit=BENEFIT, error=0.05),
    Measured([2.5, None, 1.0, 3.5], EXCESS[::-1], validation=[2.5, NAN, 1.5, 3.0], goals=[3.5, NAN, 1.5]),
    Measured([None] * 4, [0.0] * 4, probe=True, benefit=OTHER, error=[[0.1, NAN, 0.1]] * 4, noise=[2.0, NAN, 1.0, 4.0]),
    Measured([NAN, 2.0, float("inf"), 3.0], [0.0] * 4, validation=[NAN] * 4, goals=[NAN] * 3),
    Measured([1.0] * 4, [1e3] * 4, probe=True, benefit=NAN, error=NAN, noise=NAN),
    Measured([1.0] * 4, [0.0] * 4, validation=[2.0] * 4, goals=[2.0] * 3, probe=True, benefit=0.7, error=0.0),
    Measured([2.0, 1.0, 1.5, 1.0], EXCESS, probe=True, benefit=BENEFIT[::-1], error=10.0),
    Measured([2.0, 1.0, 1.5, 1.0], EXCESS, validation=[1.9, 1.1, 1.6, 1.2], goals=[3.0, 2.0, 1.0]),
    Measured([2.0, 1.0, 1.5, 1.0], EXCESS, probe=True, benefit=BENEFIT[::-1], error=0.05, noise=[1.0, 2.0, 0.0, 8.0]),
]


def make(kind, more, names: Sequence[str] = "abcd"):
    options = (NEEDED[kind](names) if kind in NEEDED else {}) | (MORE[kind](names) if more else {})
    return load_policy(kind, options)


def needs(kind, *what):
    """What it needs of this; by default options, of which it may depend."""
    return make(kind, False).NEEDS & set(what)


def measured(kind, catalog, window, order=(0, 1, 2, 3)):
    """What the kind needs of one window, with domain i at the place `order[i]` of the catalog."""
    given = WINDOWS[window]
    places = [order.index(place) for place in range(4)]
    evaluation = influence = None
    if needs(kind, "evaluation") and given.validation is not None and given.goals is not None:
        losses = {f"target/{name}": loss for name, loss in zip(TARGETS, given.goals, strict=True)}
        evaluation = make_evaluation(
            losses | {f"validation/{catalog.names[order[i]]}": given.validation[i] for i in places}
        )
    if needs(kind, "influence", "gram") and given.probe:
        benefit = np.array(np.broadcast_to(given.benefit, (4, 3)))[places]
        gram = benefit @ benefit.T  # of what would have these benefits for targets along the axes
        influence = make_influence(
            benefit,
            error_dt=np.broadcast_to(given.error, (4, 3))[places],
            loss_d=np.array([2.0, 3.0, 1.0, 4.0])[places],
            target_loss_t=[3.0, 2.0, 1.0],
            gram_dd=gram if needs(kind, "gram") else None,
            gram_error_dd=np.where(np.isnan(gram), NAN, 0.1),
            noise_d=np.broadcast_to(given.noise, 4)[places],
            target_gram_tt=np.eye(3),
        )
    return make_signal(
        catalog,
        window,
        [given.losses[i] for i in places],
        excess=[given.excess[i] for i in places] if needs(kind, "excess") else None,
        evaluation=evaluation,
        influence=influence,
    )


def run(kind, more, names="abcd", order=(0, 1, 2, 3), restore=False):
    """Every answer and state of a short run; `order[i]` is the place of domain i in the catalog."""
    named = [names[place] for place in order]
    catalog = make_catalog(*[ROWS[order.index(place)] for place in range(4)], names=names)
    policy = make(kind, more, named)
    state = policy.start(make_setting(catalog, Mixture.natural(catalog), first_window=2, targets=TARGETS))
    answers, states = [], [state]
    for window in range(len(WINDOWS)):
        if restore:
            state = {
                key: np.frombuffer(value.tobytes(), value.dtype).reshape(value.shape) for key, value in state.items()
            }
        state, weights = policy.update(state, measured(kind, catalog, window, order))
        answers.append(np.array(weights)[list(order)])
        states.append(state)
    return answers, states


@pytest.mark.parametrize(("kind", "more"), CASES)
def test_answers_are_mixtures_also_without_rows_and_with_losses_that_are_not_finite(kind, more):
    for weights in run(kind, more)[0]:
        Mixture(weights)


@pytest.mark.parametrize(("kind", "more"), CASES)
def test_its_state_stays_finite(kind, more):  # the controller refuses any other
    for state in run(kind, more)[1]:
        assert [key for key, value in state.items() if value.dtype.kind == "f" and not np.isfinite(value).all()] == []


@pytest.mark.parametrize(("kind", "more"), CASES)
def test_it_is_deterministic_and_restores_from_its_state_exactly(kind, more):
    once, states = run(kind, more)
    for again, others in (run(kind, more), run(kind, more, restore=True)):
        assert [w.tobytes() for w in once] == [w.tobytes() for w in again]
        for state, other in zip(states, others, strict=True):
            assert {k: (v.dtype, v.tobytes()) for k, v in state.items()} == {
                k: (v.dtype, v.tobytes()) for k, v in other.items()
            }


@pytest.mark.parametrize(("kind", "more"), CASES)
def test_its_state_holds_plain_arrays_which_updates_leave_alone(kind, more):
    catalog = make_catalog(*ROWS)
    policy = make(kind, more, catalog.names)
    state = policy.start(make_setting(catalog, targets=TARGETS))
    for window in range(len(WINDOWS)):
        assert all(isinstance(value, np.ndarray) and not value.dtype.hasobject for value in state.values())
        before = {key: value.copy() for key, value in state.items()}
        after, _ = policy.update(state, measured(kind, catalog, window))
        assert all(np.array_equal(state[key], before[key]) for key in before)
        state = after


@pytest.mark.parametrize(("kind", "more"), CASES)
def test_it_does_not_care_what_the_domains_are_called(kind, more):
    once = run(kind, more)[0]
    for renamed in (run(kind, more, names="efgh")[0], run(kind, more, order=(2, 0, 3, 1))[0]):
        for left, right in zip(once, renamed, strict=True):
            np.testing.assert_allclose(left, right, rtol=0, atol=1e-15)


@pytest.mark.parametrize(("kind", "more"), [case for case in CASES if needs(case[0], "influence", "gram")])
def test_without_a_probe_or_with_one_that_measured_nothing_the_last_answer_stands(kind, more):
    if not {"influence", "gram"} >= make(kind, more).NEEDS:
        pytest.skip("it goes by other measurements, too")
    answers = [np.array(ROWS) / sum(ROWS), *run(kind, more)[0]]
    silent = [window for window, given in enumerate(WINDOWS) if not given.probe or np.isnan(given.benefit).all()]
    assert silent == [0, 2, 4, 5, 8]
    for window in silent:
        assert answers[window + 1].tolist() == answers[window].tolist()
    assert answers[2].tolist() != answers[1].tolist()  # it does listen to the others


@pytest.mark.parametrize("kind", kinds())
def test_it_says_what_it_needs(kind):
    assert {"loss", "excess", "evaluation", "influence", "gram"} >= make(kind, False).NEEDS


def test_unknown_kinds_and_options_are_refused_with_the_nearest():
    with pytest.raises(ConfigError, match=r"'unifrom' is not known. The nearest known one is 'uniform'"):
        load_policy("unifrom")
    with pytest.raises(ConfigError, match=r"policy.expnent is no option of policy 'temperature'.*'exponent'"):
        load_policy("temperature", {"expnent": 0.5})
    with pytest.raises(ConfigError, match="natural"):
        load_policy("natural", {"rate": 0.5})


def test_kinds_are_sorted_and_whole():
    assert {"fixed", "natural", "uniform", "temperature", "unimax", "scripted", "odm"} <= set(kinds())
    assert all(left < right for left, right in pairwise(kinds()))
