from dataclasses import replace

import numpy as np
import pytest

from mixer.core.errors import ConfigError
from mixer.core.policies import load_policy
from tests.core.policies.making import make_catalog, make_setting, make_signal

CATALOG = make_catalog(10, 10, 10)


def close(found, expected):
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)


def test_released_worked_by_hand():
    policy = load_policy("odm", {"form": "released"})
    state = policy.start(make_setting(CATALOG))
    state, weights = policy.update(state, make_signal(CATALOG, 0, [3.0, 2.0, 1.0]))
    close(state["reward_d"], [2.008554, 0.738906, 0.271828])
    close(weights, [1 / 3] * 3)
    state, weights = policy.update(state, make_signal(CATALOG, 9, [2.5, 2.0, 1.0]))
    close(state["reward_d"], [3.025948, 1.403921, 0.516474])
    close(state["epsilon"], 0.191365)
    close(weights, [0.451915, 0.312250, 0.235836])
    state, weights = policy.update(state, make_signal(CATALOG, 999, [2.0, 2.0, 1.0]))
    close(weights, [0.545392, 0.323502, 0.131106])


def test_paper_worked_by_hand():
    policy = load_policy("odm", {"form": "paper"})
    state = policy.start(make_setting(CATALOG))
    for window, losses in ((0, [3.0, None, None]), (1, [None, 2.0, None]), (9, [2.5, None, None])):
        state, weights = policy.update(state, make_signal(CATALOG, window, losses))
    close(weights, [0.374892, 0.324633, 0.300475])


def test_paper_divides_by_the_weights_that_decided_the_window():
    policy = load_policy("odm", {"form": "paper", "smoothing": 0.0})
    state = policy.start(make_setting(CATALOG, first_window=3))
    asked = []
    for window in range(20, 26):
        before = state["pi_wd"][window % 3].copy()
        if window >= 23:
            assert before.tolist() == asked[window - 23].tolist()
        state, weights = policy.update(state, make_signal(CATALOG, window, [3.0, 2.0, 1.0]))
        close(state["reward_d"], np.array([3.0, 2.0, 1.0]) / before)
        asked.append(weights)


def test_losses_beyond_reason_are_held_to_the_largest():
    policy = load_policy("odm", {"max_loss": 5.0})
    state = policy.start(make_setting(CATALOG))
    far, _ = policy.update(state, make_signal(CATALOG, 9, [1e6, 2.0, -1.0]))
    near, _ = policy.update(state, make_signal(CATALOG, 9, [5.0, 2.0, 0.0]))
    assert far["reward_d"].tolist() == near["reward_d"].tolist()


@pytest.mark.parametrize("options", [{"form": "exp3"}, {"smoothing": 1.0}, {"max_loss": 0.0}])
def test_values_out_of_range_are_refused(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        load_policy("odm", options)


@pytest.mark.parametrize("form", ["released", "paper"])
def test_a_policy_that_starts_at_a_fork_explores_as_one_at_the_start_of_a_run(form):
    policy = load_policy("odm", {"form": form})
    early = policy.start(make_setting(CATALOG, first_window=3))
    late = policy.start(replace(make_setting(CATALOG, first_window=3), start_window=30))
    for window in range(8):
        early, before = policy.update(early, make_signal(CATALOG, window, [3.0, 2.0, 1.0 + window]))
        late, after = policy.update(late, make_signal(CATALOG, 30 + window, [3.0, 2.0, 1.0 + window]))
        assert before.tolist() == after.tolist()
    with pytest.raises(ConfigError, match="start_window=-1"):
        replace(make_setting(CATALOG), start_window=-1)
