from dataclasses import replace

import numpy as np
import pytest

from mixer.core.catalog import Catalog, Domain
from mixer.core.errors import ConfigError
from mixer.core.mixture import Mixture
from mixer.core.policies import load_policy
from mixer.core.power_law import predicted
from mixer.core.signal import on_grid
from tests.core.policies.making import make_setting, make_signal

CATALOG = Catalog(1024, "fake", tuple(Domain(name, 100, name) for name in "abc"))
PRIOR = Mixture(np.array([0.6, 0.3, 0.1]))
LAWS = np.array([[1.0, 0.5, 0.3], [0.5, 0.7, 0.2], [1.5, 0.9, 0.1]])


def close(found, expected, atol=5e-7):
    np.testing.assert_allclose(found, expected, rtol=0, atol=atol)


def signal_of(window, losses, rows=(6, 3, 1)):
    return replace(make_signal(CATALOG, window, losses), rows_d=np.array(rows, dtype=np.int64))


def in_the_middle(form="released", **more):
    """10^5 samples after 1,000 windows, with given laws."""
    policy = load_policy("ado", {"form": form})
    state = policy.start(replace(make_setting(CATALOG, PRIOR), start_window=9_000))
    known = {"law_d3": LAWS, "has_law_d": np.ones(3, dtype=bool), "fitted_at": np.array(999)}
    return policy, state | known | more


def test_worked_by_hand():
    policy, state = in_the_middle()
    state, weights = policy.update(state, signal_of(9_999, [2.0, 2.0, 2.0]))
    close(weights, [0.594764, 0.294758, 0.110478])
    close(state["mean_d"], [0.599948, 0.299948, 0.100105])
    close((weights - 0.9 * PRIOR.weights_d) / 0.1, [0.547639, 0.247578, 0.204783], 1e-6)


def test_the_credit_is_of_realised_shares_and_its_root_counts():
    policy, state = in_the_middle()
    state, weights = policy.update(state, signal_of(9_999, [2.0, 2.0, 2.0], (0, 0, 10)))
    close(state["credit_d"], [0.54, 0.27, 0.19], 1e-15)
    rho = (weights - 0.9 * PRIOR.weights_d) / 0.1
    before = np.array([0.547639, 0.247578, 0.204783])
    expected = before * np.sqrt(state["credit_d"] / PRIOR.weights_d)
    close(rho, expected / expected.sum(), 2e-6)


def test_the_papers_form_counts_each_domains_own_samples():
    own = np.array([5e4, 2e4, 1e3])
    policy, state = in_the_middle("paper", own_d=own - [6, 3, 1])
    _, weights = policy.update(state, signal_of(9_999, [2.0, 2.0, 2.0]))
    slope = LAWS[:, 2] * np.exp(LAWS[:, 0]) * own ** -(LAWS[:, 2] + 1)
    rho = PRIOR.weights_d**1.5 * slope
    close((weights - 0.9 * PRIOR.weights_d) / 0.1, rho / rho.sum(), 1e-12)


@pytest.mark.parametrize(("form", "least"), [("released", 0.00981), ("paper", 0.01)])
def test_the_floor_of_the_released_code_ends_below_itself(form, least):
    laws = LAWS.copy()
    laws[1:, 0] = -30.0
    policy, state = in_the_middle(form, law_d3=laws, own_d=np.full(3, 1e5))
    _, weights = policy.update(state, signal_of(9_999, [2.0, 2.0, 2.0]))
    rho = (weights - 0.9 * PRIOR.weights_d) / 0.1
    close(rho[1:], [least] * 2, 1e-5)
    assert (rho.min() < 0.0099) == (form == "released")


@pytest.mark.parametrize("form", ["released", "paper"])
def test_laws_come_back_from_a_run_and_decide_it(form):
    """Every domain follows its own law in the samples that this form counts."""
    policy = load_policy("ado", {"form": form, "filter_windows": 1, "refit_windows": 50, "history": 32})
    state = policy.start(replace(make_setting(CATALOG, PRIOR), window_slots=1000))
    own = np.zeros(3)
    for window in range(100):
        own += [600, 300, 100]
        samples = np.full(3, 1000.0 * (window + 1)) if form == "released" else own
        loss = predicted(LAWS, samples)
        signal = signal_of(window, [1.0] * 3, (600, 300, 100))
        tokens = np.full(3, 1 << 20)
        state, weights = policy.update(state, replace(signal, tokens_d=tokens, loss_sum_d=on_grid(loss * tokens)))
        if window < 10:
            assert weights.tolist() == PRIOR.weights_d.tolist()
    assert int(state["entries"]) <= 32
    assert int(state["stride"]) == 4
    assert state["time_h"][: int(state["entries"])].tolist() == list(range(5, 101, 4))
    falls = LAWS[:, 2] * np.exp(LAWS[:, 0]) * samples ** -LAWS[:, 2]
    found = state["law_d3"]
    fall = found[:, 2] * (predicted(found, samples) - np.exp(found[:, 1]))
    np.testing.assert_allclose(fall, falls, rtol=0.03)
    assert weights.tolist() != PRIOR.weights_d.tolist()


def test_missing_losses_are_the_ones_before_or_the_mean_of_the_others():
    policy = load_policy("ado", {"skipped_windows": 0})
    state = policy.start(make_setting(CATALOG, PRIOR))
    state, _ = policy.update(state, make_signal(CATALOG, 0, [4.0, 2.0, None]))
    state, _ = policy.update(state, make_signal(CATALOG, 1, [3.5, None, 5.0]))
    state, _ = policy.update(state, make_signal(CATALOG, 2, [None] * 3))
    assert state["loss_hd"][:2].tolist() == [[4.0, 2.0, 3.0], [3.5, 2.0, 5.0]]
    assert int(state["entries"]) == 2


@pytest.mark.parametrize(
    "options",
    [{"form": "x"}, {"warmup_windows": 0}, {"history": 2}, {"refit_windows": 0}, {"starts": 0}, {"floor": 2.0}],
)
def test_values_out_of_range_are_refused(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        load_policy("ado", options)
