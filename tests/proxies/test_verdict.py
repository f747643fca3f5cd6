"""The verdict on curves made by hand, whose numbers are worked out beside them."""

import math
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from mixer.proxies.verdict import (
    Race,
    Runs,
    band,
    equal_compute,
    holm,
    judge,
    loss_at,
    mean_ranks,
    paired,
    tokens_to_reach,
)

TOKENS = np.array([0.0, 100.0, 200.0, 400.0])


def runs(curves, *, probes=0.0, cost=0.0, seeds=None, weights=((0.5, 0.5),)):
    """Of mean curves by seed; the two targets lie 0.5 above and below."""
    loss_se = np.array(curves, dtype=float)
    num = len(loss_se)
    weight_sd = np.array(list(weights) * (num // len(weights)), dtype=float)
    return Runs(
        seeds=seeds or tuple(range(num)),
        loss_set=np.stack([loss_se - 0.5, loss_se + 0.5], axis=2),
        final_sd=weight_sd,
        mean_sd=(weight_sd + 0.5) / 2,
        probe_tokens_s=np.full(num, probes),
        cost_tokens=cost,
    )


def race(**contenders):
    return Race(
        reference="natural",
        targets=("x", "y"),
        domains=("good", "noise"),
        floor_d=np.array([0.01, 0.02]),
        tokens_e=TOKENS,
        runs=contenders,
    )


NATURAL = runs([[6, 5, 4, 3.0], [6, 5, 4, 3.2]])
FAST = runs([[6, 4, 3, 2.5], [6, 4.4, 3.4, 2.9]], probes=40.0, cost=60.0, weights=[(0.98, 0.02)])
SLOW = runs([[6, 6, 5, 4.0], [6, 6, 5, 4.2]])


def test_a_band_is_the_t_interval():
    found = band(np.array([1.0, 2.0, 6.0]))
    assert found.mean == 3.0
    assert found.half == pytest.approx(4.302653 * math.sqrt(7.0) / math.sqrt(3), rel=1e-6)
    assert band(np.array([1.0, 3.0]), 0.9).half == pytest.approx(6.313752 * 1.0, rel=1e-6)
    assert math.isnan(band(np.array([4.0])).half)


def test_pairs_are_by_seed_whatever_else_was_run():
    found = paired({0: 1.0, 1: 2.0, 2: 3.0, 7: 9.0}, {2: 3.5, 1: 2.7, 0: 1.3, 8: -100.0})
    assert (found.seeds, found.mean) == (3, pytest.approx(-0.5))
    expected = stats.ttest_rel([1.0, 2.0, 3.0], [1.3, 2.7, 3.5])
    assert found.p == pytest.approx(expected.pvalue)
    assert found.half == pytest.approx(4.302653 * 0.2 / math.sqrt(3), rel=1e-6)
    one = paired({3: 1.0}, {3: 1.5})
    assert one.mean == -0.5 and math.isnan(one.p) and math.isnan(one.half)
    assert paired({0: 1.0}, {1: 1.0}).seeds == 0
    assert paired({0: 1.0, 1: 2.0}, {0: 1.0, 1: 2.0}).p == 1.0
    assert paired({0: 1.0, 1: 2.0}, {0: 2.0, 1: 3.0}).p == 0.0


def test_holm_by_hand():
    # sorted 0.01, 0.02, 0.03, 0.5 times 4, 3, 2, 1, and never falling
    assert holm([0.03, 0.01, math.nan, 0.5, 0.02]) == pytest.approx([0.06, 0.04, math.nan, 0.5, 0.06], nan_ok=True)
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


@pytest.mark.parametrize(
    ("curve", "goal", "tokens"),
    [
        ([6, 4, 3, 2.5], 3.1, 190.0),  # 0.9 of the way from 4 to 3
        ([6, 4, 3, 2.5], 3.0, 200.0),
        ([6, 4, 3, 2.5], 7.0, 0.0),
        ([6, 4, 3, 2.5], 2.4, math.nan),
        ([6, 3, 5, 2.5], 3.5, 250 / 3),  # the first time, though it rises again: 2.5 of 3 of the way
        ([6, math.nan, 3, 2.5], 4.5, 100.0),  # straight over what has no loss
        ([6, 4, 3, 2.5], math.nan, math.nan),
        ([math.nan] * 4, 1.0, math.nan),
    ],
)
def test_tokens_to_reach_a_loss(curve, goal, tokens):
    assert tokens_to_reach(TOKENS, np.array(curve, dtype=float), goal) == pytest.approx(tokens, nan_ok=True)


def test_losses_between_evaluations():
    curve = np.array([6, 4, 3, 2.5])
    assert loss_at(TOKENS, curve, 300.0) == pytest.approx(2.75)
    assert loss_at(TOKENS, curve, 400.0) == 2.5
    assert math.isnan(loss_at(TOKENS, curve, 401.0))
    assert math.isnan(loss_at(TOKENS[1:], curve[1:], 50.0))


def test_equal_compute_shrinks_run_and_overhead_alike():
    tokens = equal_compute(400.0, 100.0)
    assert tokens == 320.0
    assert tokens * (1 + 100.0 / 400.0) == 400.0
    assert equal_compute(400.0, 0.0) == 400.0


def test_ranks_are_means_over_targets_and_equals_share():
    assert mean_ranks(np.array([[1.0, 5.0], [2.0, 4.0], [2.0, 6.0]])).tolist() == [1.5, 1.75, 2.75]


def test_the_verdict_on_three():
    found = judge(race(natural=NATURAL, fast=FAST, slow=SLOW))
    assert found["best"] == "fast"
    assert found["tokens"] == 400.0
    fast, natural, slow = (found["contenders"][name] for name in ("fast", "natural", "slow"))
    assert fast["final_loss"]["mean"] == pytest.approx(2.7)
    assert fast["final_loss"]["half"] == pytest.approx(12.706205 * 0.2, rel=1e-6)
    assert fast["targets"]["x"]["mean"] == pytest.approx(2.2)
    assert [one["rank"] for one in (fast, natural, slow)] == [1.0, 2.0, 3.0]
    # overhead 40 + 60 of 400: the curves at 320 tokens, 0.6 of the way from 3 to 2.5 and from 3.4 to 2.9
    assert fast["overhead"] == {"probe_tokens": 40.0, "cost_tokens": 60.0, "share": 0.25, "total_tokens": 500.0}
    assert fast["equal_compute"]["tokens"] == 320.0
    assert fast["equal_compute"]["mean"] == pytest.approx((2.7 + 3.1) / 2)
    assert fast["targets"]["y"]["at_equal_compute"] == pytest.approx(3.4)
    assert natural["equal_compute"]["mean"] == natural["final_loss"]["mean"] == pytest.approx(3.1)
    # natural ends at 3.1; fast's mean curve is 3.2 at 200 and 2.7 at 400
    reach = fast["to_reach_reference"]
    assert reach["tokens"] == pytest.approx(240.0)
    assert reach["total_tokens"] == pytest.approx(300.0)
    assert reach["times_faster"] == pytest.approx(400 / 240)
    assert reach["by_seed"] == {"0": pytest.approx(200.0), "1": pytest.approx(280.0)}
    assert natural["to_reach_reference"]["tokens"] == 400.0
    assert slow["to_reach_reference"]["tokens"] is None
    assert slow["to_reach_reference"]["by_seed"] == {"0": None, "1": None}


def test_who_is_told_from_whom():
    found = judge(race(natural=NATURAL, fast=FAST, slow=SLOW))
    slow, fast = found["contenders"]["slow"], found["contenders"]["fast"]
    # slow is 1.0 worse in both seeds; fast 0.5 and 0.3 better, which t with one degree of freedom gives p = 0.156
    assert slow["against_reference"]["p"] == pytest.approx(0.0, abs=1e-9)
    assert fast["against_reference"]["difference"] == pytest.approx(-0.4)
    assert fast["against_reference"]["p"] == pytest.approx(0.155958, abs=1e-6)
    assert found["worse_than_reference"] == ["slow"]
    assert found["better_than_reference"] == []
    assert found["level_with_best"] == ["natural"]  # 0.5 and 0.3 apart; slow 1.5 and 1.3
    assert "against_reference" not in found["contenders"]["natural"]
    assert found["contenders"]["fast"]["against_best"] is None


def test_holm_decides_who_is_better_than_the_reference():
    # differences -0.5 +- a little: p = 0.041 alone, 0.082 among two
    natural = runs([[6, 5, 4, 3.0], [6, 5, 4, 3.2], [6, 5, 4, 3.1]])
    better = runs([[6, 5, 4, 2.35], [6, 5, 4, 2.9], [6, 5, 4, 2.55]])
    alone = judge(race(natural=natural, better=better))
    p = alone["contenders"]["better"]["against_reference"]["p"]
    assert 0.04 < p < 0.042
    assert alone["better_than_reference"] == ["better"]
    among = judge(race(natural=natural, better=better, same=natural))
    assert among["contenders"]["better"]["against_reference"]["p_holm"] == pytest.approx(2 * p)
    assert among["better_than_reference"] == []


def test_weights_stand_against_their_floors():
    found = judge(race(natural=NATURAL, fast=FAST))["contenders"]
    assert found["fast"]["weights"]["noise"] == {"final": 0.02, "mean": 0.26, "floor": 0.02, "at_floor": True}
    assert found["fast"]["weights"]["good"]["at_floor"] is False
    assert found["natural"]["weights"]["noise"]["at_floor"] is False


def test_one_seed_has_no_bands_and_no_test():
    found = judge(race(natural=runs([[6, 5, 4, 3.0]]), fast=runs([[6, 4, 3, 2.0]])))
    fast = found["contenders"]["fast"]
    assert fast["final_loss"] == {"mean": 2.0, "half": None, "by_seed": [2.0]}
    assert fast["against_reference"] == {"difference": -1.0, "half": None, "p": None, "seeds": 1, "p_holm": None}
    assert found["better_than_reference"] == [] and found["level_with_best"] == ["natural"]


def test_seeds_that_are_missing_are_left_out_of_pairs_alone():
    part = runs([[6, 4, 3, 2.0]], seeds=(1,))
    found = judge(race(natural=NATURAL, part=part))["contenders"]["part"]
    assert found["against_reference"]["difference"] == pytest.approx(-1.2)
    assert found["to_reach_reference"]["by_seed"].keys() == {"1"}


def test_windows_in_which_an_answer_was_refused_are_told():
    held = replace(FAST, held_s=np.array([0.25, 0.0]))
    found = judge(race(natural=NATURAL, held=held))["contenders"]
    assert (found["held"]["held_share"], found["natural"]["held_share"]) == (0.125, 0.0)
