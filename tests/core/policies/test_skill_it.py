from dataclasses import replace

import numpy as np
import pytest

from mixer.core.errors import ConfigError
from mixer.core.mixture import Mixture
from mixer.core.policies import load_policy
from tests.core.policies.making import make_catalog, make_evaluation, make_setting, make_signal

CATALOG = make_catalog(10, 10, 10)
GRAPH = {"a": {"a": 1.0, "b": 0.5}, "b": {"b": 1.0, "c": 0.5}, "c": {"c": 1.0}}


def close(found, expected, atol=5e-7):
    np.testing.assert_allclose(found, expected, rtol=0, atol=atol)


def evaluated(window, losses, kind="validation", names="abc"):
    evaluation = make_evaluation({f"{kind}/{name}": loss for name, loss in zip(names, losses, strict=True)})
    return replace(make_signal(CATALOG, window, [1.0] * 3), evaluation=evaluation)


def run(policy, losses, setting=None, **kind):
    state = policy.start(setting or make_setting(CATALOG))
    weights = state["weights_d"]
    for window, some in enumerate(losses):
        state, weights = policy.update(state, evaluated(window, some, **kind))
    return weights


def test_worked_by_hand():
    policy = load_policy("skill_it", {"graph": GRAPH, "eta": 0.5})
    state = policy.start(make_setting(CATALOG))
    close(policy.update(state, make_signal(CATALOG, 0, [1.0] * 3))[1], [0.359867, 0.359867, 0.280265])
    three = [[2, 1, 0.5], [1.8, 1, 0.5], [1.5, 0.9, 0.5]]
    close(run(policy, three), [0.778399, 0.165214, 0.056387])
    close(run(policy, [[9, 9, 9], [0, 7, 0], *three]), [0.778399, 0.165214, 0.056387])  # three windows, no more


def test_it_starts_from_the_prior_each_time():
    policy = load_policy("skill_it", {"graph": GRAPH, "eta": 0.5, "window": 1})
    setting = make_setting(CATALOG, Mixture(np.array([0.5, 0.3, 0.2])))
    once = np.array([0.5, 0.3, 0.2]) * np.exp(0.5 * np.array([2.5, 1.25, 0.5]))
    for times in (1, 4):
        close(run(policy, [[2, 1, 0.5]] * times, setting), once / once.sum(), 1e-14)


def test_relative_losses_are_divided_by_the_first_ones():
    policy = load_policy("skill_it", {"eta": 1.0, "window": 1, "relative": True})
    power = np.exp([0.5, 0.75, 1.0])
    close(run(policy, [[4, 2, 1], [2, 1.5, 1]]), power / power.sum(), 1e-14)


def test_a_loss_that_is_missing_is_the_one_before_and_nothing_before_it_was_seen():
    nan = float("nan")
    policy = load_policy("skill_it", {"eta": 1.0, "window": 1})
    close(run(policy, [[2, nan, 1]]), np.exp([2, 0, 1]) / np.exp([2, 0, 1]).sum(), 1e-14)
    close(run(policy, [[2, 3, 1], [nan, 1, nan]]), np.exp([2, 1, 1]) / np.exp([2, 1, 1]).sum(), 1e-14)
    close(run(policy, [[nan] * 3]), [1 / 3] * 3, 1e-15)


def test_targets_need_a_graph():
    setting = replace(make_setting(CATALOG), targets=("x", "y"))
    graph = {"a": {"x": 1.0}, "b": {"y": 0.5}}
    policy = load_policy("skill_it", {"graph": graph, "losses": "target", "eta": 1.0, "window": 1})
    close(
        run(policy, [[2, 3]], setting, kind="target", names="xy"),
        np.exp([2, 1.5, 0]) / np.exp([2, 1.5, 0]).sum(),
        1e-14,
    )
    with pytest.raises(ConfigError, match="no graph from domains to targets"):
        load_policy("skill_it", {"losses": "target"}).start(setting)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"losses": "train"}, "losses"),
        ({"eta": 0.0}, "eta"),
        ({"window": 0}, "window"),
        ({"graph": {"x": {"a": 1.0}}}, "policy.graph names the unknown domain 'x'"),
        ({"graph": {"a": {"x": 1.0}}}, "policy.graph.a names 'x'"),
        ({"graph": {"a": {"b": float("inf")}}}, "policy.graph.a.b is inf"),
    ],
)
def test_bad_options_are_refused(options, words):
    with pytest.raises(ConfigError, match=words):
        load_policy("skill_it", options).start(make_setting(CATALOG))
