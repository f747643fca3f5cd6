"""fixed, natural, uniform, temperature, unimax: by worked example."""

import numpy as np
import pytest

from mixer.core.errors import ConfigError
from mixer.core.mixture import Mixture
from mixer.core.policies import load_policy
from tests.core.policies.making import make_catalog, make_setting, make_signal

CATALOG = make_catalog(1, 5, 100, 400)


def answer(kind, options=None, **setting):
    policy = load_policy(kind, options)
    state = policy.start(make_setting(CATALOG, **setting))
    return policy.update(state, make_signal(CATALOG, 0, [1.0] * 4))[1]


@pytest.mark.parametrize(
    ("kind", "options", "expected"),
    [
        ("natural", {}, [1 / 506, 5 / 506, 100 / 506, 400 / 506]),
        ("uniform", {}, [0.25, 0.25, 0.25, 0.25]),
        ("temperature", {"exponent": 0.3}, [0.079140, 0.128258, 0.315060, 0.477542]),
        ("temperature", {"exponent": 1.0}, [1 / 506, 5 / 506, 100 / 506, 400 / 506]),
        ("temperature", {"exponent": 0.0}, [0.25, 0.25, 0.25, 0.25]),
        ("unimax", {"max_epochs": 4}, [0.013333, 0.066667, 0.46, 0.46]),
        ("unimax", {"max_epochs": 4, "budget_rows": 300}, [0.013333, 0.066667, 0.46, 0.46]),
        ("fixed", {"weights": {"a": 0.1, "b": 0.2, "c": 0.3, "d": 0.4}}, [0.1, 0.2, 0.3, 0.4]),
        ("fixed", {"weights": {"a": 1, "b": 2, "c": 3, "d": 4}, "normalize": True}, [0.1, 0.2, 0.3, 0.4]),
    ],
)
def test_worked_answers(kind, options, expected):
    np.testing.assert_allclose(answer(kind, options), expected, rtol=0, atol=5e-7)


def test_fixed_without_weights_keeps_the_prior():
    prior = Mixture.natural(CATALOG)
    assert answer("fixed", prior=prior).tolist() == prior.weights_d.tolist()


@pytest.mark.parametrize(
    ("kind", "options"),
    [("temperature", {"exponent": -1}), ("unimax", {"max_epochs": 0}), ("unimax", {"budget_rows": 0})],
)
def test_values_out_of_range_are_refused(kind, options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        load_policy(kind, options)


def test_unimax_needs_a_budget():
    with pytest.raises(ConfigError, match="budget"):
        answer("unimax", planned_windows=None)
