"""What every policy promises, for all kinds there are; a new one is picked up by itself."""

from itertools import pairwise

import numpy as np
import pytest

from mixer.core.errors import ConfigError
from mixer.core.mixture import Mixture
from mixer.core.policies import kinds, load_policy
from tests.core.policies.making import make_catalog, make_setting, make_signal

# Options in which names appear are given by place, for any catalog; defaults are tried for every kind.
BY_PLACE = [0.5, 0.25, 0.125, 0.125]
MORE = {
    "fixed": lambda names: {"weights": dict(zip(names, BY_PLACE, strict=True))},
    "scripted": lambda names: {
        "stages": {
            "early": {"at": 0.1, "weights": dict(zip(names, BY_PLACE, strict=True))},
            "late": {"at": 0.6, "weights": dict(zip(names, BY_PLACE[::-1], strict=True))},
        }
    },
    "odm": lambda names: {"form": "paper"},
    "doremi": lambda names: {"reference": dict(zip(names, REFERENCES, strict=True))},
    "skill_it": lambda names: {"graph": {names[0]: {names[0]: 1.0, names[1]: 0.5}, names[2]: {names[3]: 0.5}}},
}
# What a kind cannot do without, by place too.
NEEDED = {"shearing": lambda names: {"reference": dict(zip(names, REFERENCES, strict=True))}}
REFERENCES = [1.5, 2.0, 0.5, 3.0]
CASES = [(kind, False) for kind in kinds()] + [(kind, True) for kind in MORE]
ROWS = (20, 100, 7, 400)
LOSSES = [[3.0, 2.0, 1.0, 4.0], [2.5, None, 1.0, 3.5], [None] * 4, [float("nan"), 2.0, float("inf"), 3.0], [1.0] * 4]


def options(kind, more, names):
    return (NEEDED[kind](names) if kind in NEEDED else {}) | (MORE[kind](names) if more else {})


def run(kind, more, names="abcd", order=(0, 1, 2, 3), restore=False):
    """Every answer and state of a short run; `order[i]` is the place of domain i in the catalog."""
    named = [names[place] for place in order]
    catalog = make_catalog(*[ROWS[order.index(place)] for place in range(4)], names=names)
    policy = load_policy(kind, options(kind, more, named))
    state = policy.start(make_setting(catalog, Mixture.natural(catalog), first_window=2))
    answers, states = [], [state]
    for window, losses in enumerate(LOSSES):
        if restore:
            state = {
                key: np.frombuffer(value.tobytes(), value.dtype).reshape(value.shape) for key, value in state.items()
            }
        state, weights = policy.update(state, make_signal(catalog, window, [losses[order.index(p)] for p in range(4)]))
        answers.append(np.array(weights)[list(order)])
        states.append(state)
    return answers, states


@pytest.mark.parametrize(("kind", "more"), CASES)
def test_answers_are_mixtures_also_without_rows_and_with_losses_that_are_not_finite(kind, more):
    for weights in run(kind, more)[0]:
        Mixture(weights)


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
    policy = load_policy(kind, options(kind, more, catalog.names))
    state = policy.start(make_setting(catalog))
    for window in range(3):
        assert all(isinstance(value, np.ndarray) and not value.dtype.hasobject for value in state.values())
        before = {key: value.copy() for key, value in state.items()}
        after, _ = policy.update(state, make_signal(catalog, window, [3.0, 1.0, 2.0, 5.0]))
        assert all(np.array_equal(state[key], before[key]) for key in before)
        state = after


@pytest.mark.parametrize(("kind", "more"), CASES)
def test_it_does_not_care_what_the_domains_are_called(kind, more):
    once = run(kind, more)[0]
    for renamed in (run(kind, more, names="efgh")[0], run(kind, more, order=(2, 0, 3, 1))[0]):
        for left, right in zip(once, renamed, strict=True):
            np.testing.assert_allclose(left, right, rtol=0, atol=1e-15)


@pytest.mark.parametrize("kind", kinds())
def test_it_says_what_it_needs(kind):
    assert isinstance(load_policy(kind).NEEDS, frozenset)


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
