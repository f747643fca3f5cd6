"""Each term by hand, with the others off."""

from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import ArrayLike

from mixer.core.errors import ConfigError
from mixer.core.policies import load_policy
from mixer.core.policies.ado import Ado
from tests.core.policies.making import make_catalog, make_influence, make_setting, make_signal, make_targets

CATALOG = make_catalog(100, 100, 10)
PRIOR = np.array([0.5, 0.25, 0.25])
OFF = {"laws": False, "anchor": 0.0, "max_step": None, "fading": None, "max_rest": 1, "memory": 0.0,
       "scale": "none", "noise_sigmas": 0.0, "rate": 1.0}  # fmt: skip
BENEFIT = np.array([[0.2, 0.1], [0.8, 0.3], [0.4, 0.5]])


def close(found, expected, atol=1e-12):
    np.testing.assert_allclose(found, expected, rtol=0, atol=atol)


def tilted(base, score):
    power = base * np.exp(score)
    return power / power.sum()


def begin(targets=2, planned: int | None = 30, **options):
    policy = load_policy("pilot", OFF | options)
    return policy, policy.start(
        make_setting(CATALOG, PRIOR.tolist(), planned_windows=planned, targets=make_targets(targets))
    )


def probe(window, benefit=BENEFIT, error: ArrayLike = 0.0, rows=(5, 3, 2)):
    signal = make_signal(CATALOG, window, influence=make_influence(benefit, error_dt=error))
    return replace(signal, rows_d=np.array(rows, dtype=np.int64))


def test_influence_alone_is_a_mirror_step():
    policy, state = begin()
    state, weights = policy.update(state, probe(0))
    close(weights, tilted(PRIOR, BENEFIT.mean(1)))
    state, again = policy.update(state, make_signal(CATALOG, 1))  # no probe
    assert again.tolist() == weights.tolist()
    _, twice = policy.update(state, probe(2))
    close(twice, tilted(weights, BENEFIT.mean(1)))


def test_target_weights_count():
    policy, state = begin(target_weights={"goal0": 3.0})
    close(policy.update(state, probe(0))[1], tilted(PRIOR, 0.75 * BENEFIT[:, 0] + 0.25 * BENEFIT[:, 1]))


def test_noise_shrinks_and_hides():
    policy, state = begin(noise_sigmas=1.0)
    error = np.array([[0.0, 0.0], [0.1, 0.0], [0.0, 0.0]])
    mean = PRIOR @ BENEFIT[:, 0]  # 0.4; domain 1 stands 0.4 above it, known to 0.75 * 0.1
    value = BENEFIT.copy()
    value[1, 0] = mean + 0.4 * (1 - (0.075 / 0.4) ** 2)
    close(policy.update(state, probe(0, error=error))[1], tilted(PRIOR, value.mean(1)))
    close(policy.update(state, probe(0, error=10.0))[1], PRIOR)


def test_repeated_rows_fade():
    """Domain 2 has 10 rows: 2 + 0.25 * 290 at the end are 7.45 passes, 3.45 of them too many."""
    policy, state = begin(fading=4.0)
    worth = np.exp(-(7.45 - 4.0) / 4.0)
    score = BENEFIT * np.array([1.0, 1.0, worth])[:, None]
    close(policy.update(state, probe(0))[1], tilted(PRIOR, score.mean(1)))
    harm = BENEFIT - np.array([[0.0], [0.0], [1.0]])
    close(policy.update(state, probe(0, harm))[1], tilted(PRIOR, harm.mean(1)))  # harm does not fade
    policy, state = begin(fading=4.0, planned=None)  # rows so far: 0.2 passes
    close(policy.update(state, probe(0))[1], tilted(PRIOR, BENEFIT.mean(1)))
    state, _ = policy.update(state, probe(0, rows=(0, 0, 80)))
    worth = np.exp(-(8.2 - 4.0) / 4.0)
    before = state["weights_d"]
    score = BENEFIT * np.array([1.0, 1.0, worth])[:, None]
    close(policy.update(state, probe(1))[1], tilted(before, score.mean(1)))


def test_the_anchor_pulls_to_the_mean_of_all_answers():
    policy, state = begin(anchor=0.4)
    state, one = policy.update(state, probe(0))
    state, two = policy.update(state, probe(1))
    close(two, tilted(one, BENEFIT.mean(1)))  # so far the mean is the last answer
    mean = (one + two) / 2
    close(policy.update(state, probe(2))[1], tilted(two**0.6 * mean**0.4, BENEFIT.mean(1)))


def test_the_trust_region_shortens_the_step_and_keeps_its_direction():
    policy, state = begin(rate=5.0, max_step=0.1)
    _, weights = policy.update(state, probe(0))
    wanted = tilted(PRIOR, 5 * BENEFIT.mean(1))
    assert np.abs(wanted - PRIOR).sum() > 0.2
    close(weights, PRIOR + 0.1 * (wanted - PRIOR) / np.abs(wanted - PRIOR).sum())


def test_it_rests_while_rankings_are_stable_and_steps_are_short_and_wakes_at_once():
    policy, state = begin(max_rest=4, rate=0.01)
    moved, last = [], PRIOR
    for window in range(14):
        benefit = BENEFIT[::-1] if window == 12 else BENEFIT
        state, weights = policy.update(state, probe(window, benefit))
        if weights.tolist() != last.tolist():
            moved.append(window)
        last = weights
    assert moved == [0, 1, 3, 7, 11, 12, 13]
    policy, state = begin(max_rest=4, rate=3.0)  # as long as steps are long, none is left out
    for window in range(3):
        state, weights = policy.update(state, probe(window))
        assert weights.tolist() != last.tolist()
        last = weights


@pytest.mark.parametrize("silence", ["no targets", "noise", "nothing measured"])
def test_loss_laws_speak_where_targets_are_silent(silence):
    targets = 0 if silence == "no targets" else 2
    policy, state = begin(targets=targets, laws=True, noise_sigmas=1.0)
    ado = Ado(refit_windows=20)
    other = ado.start(make_setting(CATALOG, PRIOR.tolist()))
    weights = PRIOR
    for window in range(14):
        fall = np.array([1.0, 3.0, 2.0]) * (window + 1.0) ** -np.array([0.1, 0.5, 0.3])
        signal = make_signal(CATALOG, window, (2.0 + fall).tolist(), tokens=1 << 16)
        if silence != "no targets":
            benefit = np.full((3, 2), np.nan) if silence == "nothing measured" else BENEFIT
            signal = replace(signal, influence=make_influence(benefit, error_dt=10.0))
        other, asked = ado.update(other, signal)
        state, weights = policy.update(state, signal)
        close(weights, asked if window >= 10 else PRIOR)
    assert np.abs(weights - PRIOR).sum() > 0.01
    loud, _ = begin(laws=True), None
    _, heard = loud[0].update(loud[1], probe(0))
    close(heard, tilted(PRIOR, BENEFIT.mean(1)))


def test_what_it_needs_depends_on_its_terms():
    assert sorted(load_policy("pilot").NEEDS) == ["influence", "loss"]
    assert sorted(load_policy("pilot", {"influence": False}).NEEDS) == ["loss"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rate": 0.0}, "rate"),
        ({"anchor": 1.0}, "anchor"),
        ({"max_step": 0.0}, "max_step"),
        ({"fading": -1.0}, "fading"),
        ({"free_passes": -1.0}, "free_passes"),
        ({"max_rest": 0}, "max_rest"),
        ({"calm": 2.0}, "calm"),
        ({"influence": False, "laws": False}, "both off"),
        ({"law_form": "x"}, "form"),
        ({"noise": "x"}, "noise"),
    ],
)
def test_bad_options_are_refused(options, words):
    with pytest.raises(ConfigError, match=words):
        begin(**options)
