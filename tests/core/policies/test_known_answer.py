"""A world with a known best mixture: influence is its exact slope, so what descends it must arrive."""

import numpy as np
import pytest
from scipy.optimize import minimize

from mixer.core.policies import load_policy
from tests.core.policies.making import make_catalog, make_influence, make_setting, make_signal, make_targets

DOMAINS, TARGETS = 6, 3
# Three domains made for one target each, one that helps all a little, and two that help nobody.
HELP = np.concatenate([np.diag([4.0, 3.0, 5.0]) + 0.2, np.full((1, 3), 0.9), np.full((2, 3), [0.0, 0.1, -0.5])])
START = np.log([2.0, 1.0, 1.5])


def losses(weights_d):
    """L_t(w) = 1 + exp(start_t - sum_i w_i help[i, t])"""
    return 1.0 + np.exp(START - weights_d @ HELP)


def probe(weights_d):
    return make_influence((losses(weights_d) - 1.0) * HELP, target_loss_t=losses(weights_d))


def least(loss):
    """The best mixture, by somebody else's solver."""
    uniform, inside = np.full(DOMAINS, 1 / DOMAINS), {"type": "eq", "fun": lambda w: w.sum() - 1}
    found = minimize(loss, uniform, method="SLSQP", bounds=[(0, 1)] * DOMAINS, constraints=[inside], tol=1e-10)
    return found.x / found.x.sum()


def arrive(kind, options, windows=80):
    catalog = make_catalog(*[100] * DOMAINS)
    policy = load_policy(kind, options)
    state = policy.start(make_setting(catalog, targets=make_targets(TARGETS)))
    weights = np.full(DOMAINS, 1 / DOMAINS)
    for window in range(windows):
        state, weights = policy.update(state, make_signal(catalog, window, influence=probe(weights)))
    return weights


@pytest.mark.parametrize(
    ("kind", "options", "loss"),
    [
        ("ftrl", {"scale": "none", "rate": 2.0}, lambda w: losses(w).mean()),
        ("ftrl", {"scale": "none", "rate": 2.0, "score": "log"}, lambda w: np.log(losses(w)).mean()),
        ("dga", {"scale": "none", "rate": 2.0}, lambda w: losses(w).mean()),
        ("tikmix_d", {"scale": "none", "spread": 0.0, "entropy": 0.0, "keep_targets": False, "max_shift": 0.02},
         lambda w: losses(w).mean()),
    ],
)  # fmt: skip
def test_regret_is_below_a_twentieth_of_that_of_uniform(kind, options, loss):
    uniform, best, found = np.full(DOMAINS, 1 / DOMAINS), least(loss), arrive(kind, options)
    assert best[:3].min() > 0.05  # the answer is no corner
    assert -1e-6 < loss(found) - loss(best) < 0.05 * (loss(uniform) - loss(best))
