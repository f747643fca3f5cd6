from dataclasses import replace

import numpy as np
import pytest

from mixer.core.errors import ConfigError
from mixer.core.mixture import Mixture
from mixer.core.policies import load_policy
from tests.core.policies.making import make_catalog, make_evaluation, make_setting, make_signal

CATALOG = make_catalog(10, 10, 10)
REFERENCE = {"a": 2.0, "b": 3.0, "c": 1.5}
PRIOR = Mixture(np.array([0.5, 0.3, 0.2]))


def close(found, expected, atol=5e-7):
    np.testing.assert_allclose(found, expected, rtol=0, atol=atol)


def evaluated(window, gaps):
    losses = {f"validation/{name}": REFERENCE[name] + gap for name, gap in zip("abc", gaps, strict=True)}
    return replace(
        make_signal(CATALOG, window, [1.0] * 3),
        evaluation=make_evaluation(losses),
    )


def begin(**options):
    policy = load_policy("shearing", {"reference": REFERENCE, "smoothing": 0.0} | options)
    return policy, policy.start(make_setting(CATALOG, PRIOR))


@pytest.mark.parametrize(
    ("form", "expected"), [("signed", [0.559020, 0.248498, 0.192483]), ("clipped", [0.544783, 0.267635, 0.187582])]
)
def test_worked_by_hand(form, expected):
    policy = load_policy("shearing", {"reference": REFERENCE, "form": form})
    _, weights = policy.update(policy.start(make_setting(CATALOG, PRIOR)), evaluated(0, [0.2, -0.1, 0.05]))
    close(weights, expected)


def test_without_an_evaluation_it_answers_as_before():
    policy, state = begin()
    state, moved = policy.update(state, evaluated(0, [0.5, 0.0, 0.0]))
    again, weights = policy.update(state, make_signal(CATALOG, 1, [9.0, 1.0, 1.0]))
    assert weights.tolist() == moved.tolist()
    assert again is state


def test_a_domain_that_was_not_evaluated_keeps_its_weight():
    policy, state = begin()
    _, weights = policy.update(state, evaluated(0, [0.2, float("nan"), 0.05]))
    assert weights[1] == 0.3
    close(weights[0] / weights[2], 0.5 / 0.2 * np.exp(0.15), 1e-12)
    close(weights.sum(), 1.0, 1e-15)
    _, weights = policy.update(state, evaluated(0, [float("nan")] * 3))
    assert weights.tolist() == [0.5, 0.3, 0.2]


def test_a_reference_out_of_reach_does_not_wind_up():
    """However long it stayed above, four evaluations below it are enough for the way back."""
    policy, state = begin(max_log_change=2.0)
    for window in range(1000):
        state, weights = policy.update(state, evaluated(window, [1.0, 0.0, 0.0]))
    floors = PRIOR.weights_d[1:] * np.exp(-2.0)
    close(weights, [1.0 - floors.sum(), *floors], 1e-15)
    for window in range(1000, 1004):
        state, weights = policy.update(state, evaluated(window, [-1.0, 0.0, 0.0]))
    assert weights[0] < 0.5


def test_the_way_back_is_long_without_a_limit():
    policy, state = begin(max_log_change=600.0)
    for window in range(100):
        state, _ = policy.update(state, evaluated(window, [1.0, 0.0, 0.0]))
    for window in range(100, 104):
        state, weights = policy.update(state, evaluated(window, [-1.0, 0.0, 0.0]))
    assert weights[0] > 0.999


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"form": "bandit"}, "form"),
        ({"eta": -1.0}, "eta"),
        ({"smoothing": 2.0}, "smoothing"),
        ({"max_log_change": 0.0}, "max_log_change"),
        ({"reference": {}}, r"no reference losses of the 3 domains.*policy.reference.a="),
        ({"reference": {"a": 1.0, "c": 1.0}}, "leaves out 'b'"),
    ],
)
def test_bad_options_are_refused(options, words):
    with pytest.raises(ConfigError, match=words):
        begin(**options)
