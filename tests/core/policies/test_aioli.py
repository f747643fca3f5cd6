from dataclasses import replace

import numpy as np
import pytest

from mixer.core.errors import ConfigError
from mixer.core.policies import load_policy
from tests.core.policies.making import make_catalog, make_evaluation, make_setting, make_signal

CATALOG = make_catalog(10, 20, 30)
MATRIX = np.array([[0.4, 0.1, 0], [0.05, 0.3, 0.1], [0, 0.05, 0.2]])
WEIGHTS = [0.336099, 0.336099, 0.327801]
OPTIONS = {"eta": 0.2, "ema": 0.0, "round_windows": 9}


def close(found, expected, atol):
    np.testing.assert_allclose(found, expected, rtol=0, atol=atol)


def drive(options, windows, *, first_window=1, clip=None, lose=(), every=1, matrix=MATRIX, kind="validation", start=0):
    """A linear world, L <- L - matrix @ shares: every answer by the window it decides, the states, and the world's
    shares. `clip` is what guard rails do to an answer, `lose` are signals nobody is shown."""
    policy = load_policy("aioli", OPTIONS | options)
    setting = replace(make_setting(CATALOG, first_window=first_window, planned_windows=None), start_window=start)
    state = policy.start(replace(setting, targets=("a", "b", "c")))
    loss_t, shares, answers, states = np.full(3, 50.0), {}, {}, {}
    for window in range(start, start + windows):
        asked = answers.get(window, np.full(3, 1 / 3))
        share = np.rint((asked if clip is None else clip(asked)) * 4800) / 4800
        shares[window] = share
        loss_t = loss_t - matrix @ share
        if window in lose:
            continue
        signal = replace(make_signal(CATALOG, window, [1.0] * 3), rows_d=np.rint(share * 4800).astype(np.int64))
        if (window + 1) % every == 0:
            named = make_evaluation({f"{kind}/{name}": loss for name, loss in zip("abc", loss_t, strict=True)})
            signal = replace(signal, evaluation=named)
        state, answers[window + first_window] = policy.update(state, signal)
        states[window] = state
    return answers, states, shares


@pytest.mark.parametrize("first_window", [1, 2, 4])
@pytest.mark.parametrize("kind", ["validation", "target"])
@pytest.mark.parametrize("start", [0, 7])
def test_the_matrix_is_recovered_and_the_weights_are_those_worked_by_hand(first_window, kind, start):
    answers, states, _ = drive({"losses": kind}, 12, first_window=first_window, kind=kind, start=start)
    begin = start + first_window
    swept = [answers[window] for window in range(begin, begin + 3)]
    assert sorted(int(np.argmax(weights)) for weights in swept) == [0, 1, 2]
    assert all(sorted(weights.tolist()) == [0.125, 0.125, 0.75] for weights in swept)
    for window in range(begin + 3, begin + 2 + first_window):
        close(answers[window], [1 / 3] * 3, 1e-15)  # decided before the sweep was seen
    state = states[begin + 2]
    close(state["matrix_td"], MATRIX, 1e-12)
    assert int(state["rank"]) == 3
    close(answers[begin + 2 + first_window], WEIGHTS, 1e-6)


def test_the_falls_are_those_worked_by_hand():
    _, states, _ = drive({}, 8)
    falls = {
        int(np.argmax(share)): fall for share, fall in zip(states[3]["share_qd"], states[3]["fall_qt"], strict=True)
    }
    delta = np.array([[0.3125, 0.125, 0.0625], [0.0875, 0.24375, 0.11875], [0.03125, 0.0625, 0.15625]])
    close(np.array([falls[j] for j in range(3)]).T, delta, 1e-12)


def test_rails_that_clip_the_shares_leave_the_matrix_as_it_is():
    """Asked for 0.75, 0.125, 0.125; what was trained is near 0.4, 0.3, 0.3, and differs from what was asked."""
    _, states, shares = drive({}, 8, clip=lambda asked: 0.25 * asked + 0.75 * np.array([0.5, 0.3, 0.2]))
    assert max(share.max() for share in shares.values()) < 0.57
    close(states[3]["matrix_td"], MATRIX, 1e-11)
    _, states, _ = drive({}, 8, clip=lambda asked: np.full(3, 1 / 3))  # nothing is left of them
    assert int(states[3]["rank"]) == 1
    close(states[3]["matrix_td"], np.repeat(MATRIX.mean(1)[:, None], 3, 1), 1e-12)  # all domains alike
    close(states[3]["weights_d"], [1 / 3] * 3, 1e-12)


def test_longer_perturbations_and_more_sweeps_give_the_same_matrix_per_perturbation():
    _, states, _ = drive({"perturb_windows": 2, "round_windows": 30}, 20)
    close(states[6]["matrix_td"], 2 * MATRIX, 1e-11)
    _, states, _ = drive({"perturb_windows": 2, "round_windows": 30}, 20, every=2, first_window=2)
    close(states[7]["matrix_td"], 2 * MATRIX, 1e-11)
    _, states, _ = drive({"sweeps": 2, "round_windows": 30}, 20, lose={4})
    close(states[6]["matrix_td"], MATRIX, 1e-11)
    assert int(states[6]["rank"]) == 3


def test_what_a_missing_signal_would_have_measured_is_as_it_was_before():
    moved = MATRIX + np.array([[0.1, 0.1, 0.1]] * 3)
    whole = drive({}, 30)[1]
    lost = drive({}, 30, lose={11})[1]  # the second of the second sweep, windows 10 to 12
    close(lost[12]["matrix_td"], MATRIX, 1e-11)  # nothing has changed, so the old measurement is right
    assert int(whole[12]["rank"]) == 3
    assert int(lost[12]["rank"]) < 3
    early = drive({}, 30, lose={2}, matrix=moved)[1]  # the first round: never measured before
    assert int(early[3]["rank"]) < 3
    close(early[12]["matrix_td"], moved, 1e-11)  # the second round finds it all


def test_too_few_evaluations_show_in_the_rank_and_leave_the_weights_alone():
    answers, states, _ = drive({}, 9, every=100)
    assert int(states[8]["rank"]) == 0
    close(answers[9], [1 / 3] * 3, 1e-15)
    _, states, _ = drive({}, 13, every=4)  # after windows 3, 7, 11: what lies outside of sweeps is in each
    assert not states[12]["span_q"].any()
    _, states, _ = drive({"sweeps": 2}, 9, every=3)
    assert int(states[8]["rank"]) == 1


def test_the_mean_matrix_and_the_multiplied_weights():
    _, states, _ = drive({"ema": 0.25}, 30)
    sums = MATRIX.sum(0) / MATRIX.sum()
    close(states[12]["mean_td"].sum(0), sums, 1e-11)
    close(states[12]["weights_d"], np.exp(0.2 * sums) / np.exp(0.2 * sums).sum(), 1e-11)
    _, states, _ = drive({"ema": None, "normalize": False}, 30)
    close(states[12]["weights_d"], np.exp(0.4 * MATRIX.sum(0)) / np.exp(0.4 * MATRIX.sum(0)).sum(), 1e-11)
    below = MATRIX - 0.05
    _, states, _ = drive({}, 9, matrix=below)
    close(states[3]["mean_td"], (below + 0.05) / (below + 0.05).sum(), 1e-11)


def test_orders_differ_by_round_and_seed_and_no_sweep_begins_too_late():
    def orders(seed):
        policy = load_policy("aioli", {"seed": seed, "round_windows": 8})
        state = policy.start(make_setting(CATALOG, planned_windows=60))
        found = []
        for window in range(60):
            state, weights = policy.update(state, make_signal(CATALOG, window, [1.0] * 3))
            found.append(int(np.argmax(weights)) if weights.max() > 0.7 else -1)
        return found

    once = orders(0)
    assert once == orders(0) != orders(1)
    rounds = [tuple(once[8 * k : 8 * k + 3]) for k in range(7)]
    assert all(set(one) == {0, 1, 2} for one in rounds[:6])
    assert len(set(rounds[:6])) > 2
    assert [index for index, one in enumerate(once) if one >= 0][-1] == 8 * 6 + 2  # windows 49 to 51 of 60
    assert once[8 * 7 :] == [-1] * 4


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"losses": "train"}, "losses"),
        ({"perturb_windows": 0}, "perturb_windows"),
        ({"sweeps": 0}, "sweeps"),
        ({"share": 0.0}, "share"),
        ({"eta": 0.0}, "eta"),
        ({"ema": 1.0}, "ema"),
        ({"rank_tolerance": 0.0}, "rank_tolerance"),
        ({"seed": -1}, "seed"),
        ({"round_windows": 4, "sweeps": 2}, "take 6 windows, and 1 more pass before they show. .* at least 7"),
        ({"losses": "target"}, "no targets"),
    ],
)
def test_bad_options_are_refused(options, words):
    with pytest.raises(ConfigError, match=words):
        load_policy("aioli", options).start(make_setting(CATALOG))
