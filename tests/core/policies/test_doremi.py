from dataclasses import replace

import numpy as np
import pytest

from mixer.core.errors import ConfigError
from mixer.core.policies import load_policy
from mixer.core.signal import on_grid
from tests.core.policies.making import make_catalog, make_setting, make_signal

CATALOG = make_catalog(10, 10, 10)
REFERENCE = {"a": 2.0, "b": 3.0, "c": 1.5}


def close(found, expected, atol=5e-7):
    np.testing.assert_allclose(found, expected, rtol=0, atol=atol)


def with_excess(signal, excess_d):
    return replace(signal, excess_sum_d=on_grid(np.array(excess_d) * signal.tokens_d))


def first(options, signal):
    policy = load_policy("doremi", options)
    return policy.update(policy.start(make_setting(CATALOG)), signal)


@pytest.mark.parametrize(
    ("smoothing", "expected"),
    [(1e-3, [0.463833, 0.254707, 0.281460]), (1e-4, [0.463950, 0.254636, 0.281413])],
)
def test_worked_by_hand(smoothing, expected):
    below = make_signal(CATALOG, 0, [2.6, 2.8, 1.6], tokens=1 << 20)
    close(first({"smoothing": smoothing, "reference": REFERENCE}, below)[1], expected)
    workers = with_excess(make_signal(CATALOG, 0, [9.0, 9.0, 9.0], tokens=1 << 20), [0.6, 0.0, 0.1])
    close(first({"smoothing": smoothing}, workers)[1], expected)


def test_the_workers_excess_is_per_token_and_goes_before_the_references():
    """Two tokens, 1 above and 1 below their reference: 0.5 by token, 0 after the average."""
    signal = make_signal(CATALOG, 0, [2.0, 3.0, 1.5])
    by_token, _ = first({"reference": REFERENCE}, with_excess(signal, [0.5, 0.0, 0.0]))
    after_mean, weights = first({"reference": REFERENCE}, signal)
    assert by_token["excess_d"].tolist() == [0.5, 0.0, 0.0]
    assert after_mean["excess_d"].tolist() == [0.0, 0.0, 0.0]
    close(weights, [1 / 3] * 3, 1e-15)


def test_an_absent_domain_keeps_its_last_excess():
    policy = load_policy("doremi", {"reference": REFERENCE, "unseen_excess": 0.25, "smoothing": 1e-12})
    state = policy.start(make_setting(CATALOG))
    state, _ = policy.update(state, make_signal(CATALOG, 0, [2.5, None, 1.5]))
    assert state["excess_d"].tolist() == [0.5, 0.25, 0.0]
    state, weights = policy.update(state, make_signal(CATALOG, 1, [None, 3.75, float("nan")]))
    assert state["excess_d"].tolist() == [0.5, 0.75, 0.0]
    close(weights, np.exp([1.0, 1.0, 0.0]) / np.exp([1.0, 1.0, 0.0]).sum(), 1e-10)


def test_the_mean_is_over_all_updates_and_the_last_is_not():
    last = load_policy("doremi", {"reference": REFERENCE})
    mean = load_policy("doremi", {"reference": REFERENCE, "answer": "mean"})
    state, other, seen = last.start(make_setting(CATALOG)), mean.start(make_setting(CATALOG)), []
    averaged, weights = np.zeros(3), np.zeros(3)
    script: list[list[float | None]] = [[3.0, 3.0, 1.5], [2.0, 4.0, 1.5], [2.0, 3.0, 1.5]]
    for window, losses in enumerate(script):
        state, weights = last.update(state, make_signal(CATALOG, window, losses))
        other, averaged = mean.update(other, make_signal(CATALOG, window, losses))
        seen.append(weights)
        close(averaged, np.mean(seen, 0), 1e-15)
    assert np.abs(weights - averaged).max() > 0.01
    assert int(state["updates"]) == 3


def test_what_it_needs_depends_on_where_references_come_from():
    assert sorted(load_policy("doremi").NEEDS) == ["excess"]
    assert sorted(load_policy("doremi", {"reference": REFERENCE}).NEEDS) == ["loss"]
    state, weights = first({}, make_signal(CATALOG, 0, [9.0, 1.0, 1.0]))  # nobody measured an excess
    assert int(state["updates"]) == 0
    close(weights, [1 / 3] * 3, 1e-15)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"eta": 0.0}, "eta"),
        ({"smoothing": 0.0}, "smoothing"),
        ({"answer": "best"}, "answer"),
        ({"unseen_excess": -1.0}, "unseen_excess"),
        ({"reference": {"a": 2.0, "b": 3.0}}, "policy.reference leaves out 'c'"),
        ({"reference": REFERENCE | {"d": 1.0}}, "policy.reference names the unknown domain 'd'"),
        ({"reference": REFERENCE | {"a": float("nan")}}, "policy.reference of 'a' is nan"),
    ],
)
def test_bad_options_are_refused(options, words):
    with pytest.raises(ConfigError, match=words):
        load_policy("doremi", options).start(make_setting(CATALOG))
