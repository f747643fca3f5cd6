import math

import numpy as np
import pytest

from mixer.core.apportion import Apportionment, apportion
from mixer.core.errors import InfeasibleError


def array(*values: float) -> np.ndarray:
    return np.array(values, dtype=np.float64)


def limits(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int64)


def is_sound(given: Apportionment, carry_d: np.ndarray, slots: int) -> bool:
    """The sums add up and the promise holds."""
    assert int(given.count_d.sum()) == slots
    assert (given.count_d >= 0).all()
    assert (given.share_d >= 0).all()
    assert math.isclose(given.share_d.sum(), slots, rel_tol=1e-12)
    np.testing.assert_allclose(given.carry_d, carry_d + given.share_d - given.count_d, rtol=0, atol=1e-9)
    assert np.abs(given.carry_d).max() < 1.0
    return True


def test_the_largest_remainders_get_what_the_floors_leave() -> None:
    given = apportion(array(3.5, 2.3, 2.2), np.zeros(3), 8)
    assert given.count_d.tolist() == [4, 2, 2]
    np.testing.assert_allclose(given.carry_d, [-0.5, 0.3, 0.2], rtol=0, atol=1e-12)
    assert not given.settled


def test_what_is_owed_is_paid_in_the_next_window() -> None:
    # owed 3.0, 2.6, 2.4: floors 3, 2, 2, and the one row left goes to the .6
    given = apportion(array(3.5, 2.3, 2.2), array(-0.5, 0.3, 0.2), 8)
    assert given.count_d.tolist() == [3, 3, 2]
    np.testing.assert_allclose(given.carry_d, [0.0, -0.4, 0.4], rtol=0, atol=1e-12)


def test_three_thirds_take_turns() -> None:
    carry_d, counts = np.zeros(3), []
    for _ in range(3):
        given = apportion(np.full(3, 4 / 3), carry_d, 4)
        counts.append(given.count_d.tolist())
        carry_d = given.carry_d
    assert counts == [[2, 1, 1], [1, 2, 1], [1, 1, 2]]
    np.testing.assert_allclose(carry_d, 0, rtol=0, atol=1e-12)


def test_ties_go_in_catalog_order() -> None:
    assert apportion(np.full(4, 0.5), np.zeros(4), 2).count_d.tolist() == [1, 1, 0, 0]


def test_one_domain_gets_everything() -> None:
    given = apportion(array(1024.0), np.zeros(1), 1024)
    assert (given.count_d.tolist(), given.carry_d.tolist()) == ([1024], [0.0])


def test_a_window_of_one_slot_goes_round() -> None:
    carry_d, turns = np.zeros(2), []
    for _ in range(8):
        given = apportion(array(0.75, 0.25), carry_d, 1)
        turns.append(int(given.count_d.argmax()))
        carry_d = given.carry_d
    assert turns == [0, 0, 1, 0, 0, 0, 1, 0]


def test_a_share_a_hair_below_a_whole_number_counts_as_whole() -> None:
    given = apportion(array(3.0 - 1e-12, 5.0 + 1e-12), np.zeros(2), 8)
    assert given.count_d.tolist() == [3, 5]


def test_five_thousand_domains_share_one_slot() -> None:
    carry_d, total_d = np.zeros(5_000), np.zeros(5_000, dtype=np.int64)
    for _ in range(200):
        given = apportion(np.full(5_000, 1 / 5_000), carry_d, 1)
        carry_d, total_d = given.carry_d, total_d + given.count_d
    assert total_d.tolist() == [1] * 200 + [0] * 4_800


def test_a_domain_may_owe_a_share_of_zero_one_row_but_no_second_one() -> None:
    carry_d, given_d = array(0.9, -0.9), np.zeros(2, dtype=np.int64)
    for _ in range(10):
        given = apportion(array(0.0, 4.0), carry_d, 4)
        assert is_sound(given, carry_d, 4)
        carry_d, given_d = given.carry_d, given_d + given.count_d
    assert given_d.tolist() == [1, 39]


def test_halving_the_set_to_those_owed_most_is_settled() -> None:
    """Rounding alone would owe the last one log2(1024) / 2 = 5 rows."""
    carry_d, live_d, settled = np.zeros(1024), np.ones(1024, dtype=bool), 0
    while live_d.sum() > 1:
        slots = int(live_d.sum()) // 2
        given = apportion(np.where(live_d, 0.5, 0.0), carry_d, slots)
        assert is_sound(given, carry_d, slots)
        carry_d, settled = given.carry_d, settled + given.settled
        live_d &= given.count_d == 0
    assert settled > 0


def test_one_domain_left_pays_for_those_given_ahead() -> None:
    carry_d = array(0.9, -0.3, -0.3, -0.3)
    given = apportion(array(0.2, 0.3, 0.3, 0.2), carry_d, 1)  # owed 1.1, 0, 0, -0.1
    assert given.count_d.tolist() == [1, 0, 0, 0]
    assert is_sound(given, carry_d, 1)
    # Owed 1.4, 1.4, -0.9, -0.9; of the two the second gets the row. The first may stay owed 0.9, so its share
    # falls by 0.5. The other three take a third of that each: the last two pay for rows they had before.
    carry_d = array(0.9, 0.9, -0.9, -0.9)
    given = apportion(array(0.5, 0.5, 0.0, 0.0), carry_d, 1)
    assert is_sound(given, carry_d, 1)
    assert given.settled
    np.testing.assert_allclose(given.share_d, [0, 2 / 3, 1 / 6, 1 / 6], rtol=0, atol=1e-9)


def test_settling_leaves_out_who_has_no_weight() -> None:
    # The last domain never had weight and is owed nothing; only those that were given ahead may pay.
    carry_d = array(0.9, 0.9, -0.9, -0.9, 0.0)
    given = apportion(array(0.5, 0.5, 0.0, 0.0, 0.0), carry_d, 1)
    assert given.settled
    assert given.share_d[4] == 0.0
    assert given.carry_d[4] == 0.0


def test_a_tie_among_remainders_never_gives_a_row_to_who_has_no_weight() -> None:
    # A catalog switch leaves carries that do not sum to zero. Owed: 0, 10, 10, 11; two rows are missing.
    given = apportion(array(0.0, 10.9, 10.9, 11.2), array(0.0, -0.9, -0.9, -0.2), 33)
    assert given.count_d.tolist() == [0, 11, 11, 11]


def test_carries_that_do_not_sum_to_zero_keep_the_promise() -> None:
    for seed in range(50):
        rng = np.random.default_rng(seed)
        num, slots = int(rng.integers(1, 40)), int(rng.integers(1, 40))
        carry_d = rng.uniform(-0.9, 0.9) + rng.uniform(-0.09, 0.09, num)
        for _ in range(20):
            share_d = rng.random(num) * (rng.random(num) < 0.3)
            share_d[rng.integers(num)] += 1e-3
            share_d *= slots / share_d.sum()
            given = apportion(share_d, carry_d, slots)
            assert is_sound(given, carry_d, slots), f"seed {seed}"
            carry_d = given.carry_d


# ---- limits ------------------------------------------------------------------------------------------


def test_limits_that_do_not_bind_change_nothing() -> None:
    free = apportion(array(3.5, 2.3, 2.2), np.zeros(3), 8)
    bound = apportion(array(3.5, 2.3, 2.2), np.zeros(3), 8, limits(4, 3, 1 << 62))
    assert bound.count_d.tolist() == free.count_d.tolist()
    assert bound.share_d.tolist() == free.share_d.tolist()
    assert not bound.settled


def test_a_domain_that_runs_dry_gives_exactly_what_it_has() -> None:
    given = apportion(array(50.0, 40.0, 10.0, 0.0), np.zeros(4), 100, limits(10, 1000, 1000, 1000))
    assert given.count_d.tolist() == [10, 72, 18, 0]  # 90 rows in the ratio 40 : 10, and none without weight
    np.testing.assert_allclose(given.share_d, [10, 72, 18, 0], rtol=0, atol=1e-9)
    assert given.settled


def test_one_running_dry_may_drain_the_next() -> None:
    given = apportion(array(50.0, 40.0, 5.0, 5.0), np.zeros(4), 100, limits(10, 60, 1000, 1000))
    assert given.count_d.tolist() == [10, 60, 15, 15]


def test_a_dry_domain_stays_dry_and_is_not_owed_for_it() -> None:
    carry_d, left_d, total_d = np.zeros(3), limits(7, 1 << 60, 1 << 60), np.zeros(3, dtype=np.int64)
    for _ in range(50):
        given = apportion(array(3.3, 1.1, 3.6), carry_d, 8, left_d - total_d)
        assert is_sound(given, carry_d, 8)
        carry_d, total_d = given.carry_d, total_d + given.count_d
    assert total_d[0] == 7
    assert total_d.sum() == 400


def test_a_dry_domain_gets_no_row_that_it_is_owed_from_before() -> None:
    # Owed 0.6 and 7.4; of the remainders 0.6 is the larger, but there is nothing to give.
    given = apportion(array(4.0, 4.0), array(0.6, -0.6), 8, limits(0, 100))
    assert given.count_d.tolist() == [0, 8]
    assert is_sound(given, array(0.6, -0.6), 8)
    given = apportion(array(0.0, 8.0), array(0.6, -0.6), 8, limits(0, 100))
    assert given.count_d.tolist() == [0, 8]


def test_the_very_last_rows_can_be_had() -> None:
    carry_d = array(0.4, -0.4)
    given = apportion(array(4.0, 4.0), carry_d, 8, limits(3, 5))
    assert given.count_d.tolist() == [3, 5]
    assert is_sound(given, carry_d, 8)
    given = apportion(array(8.0, 0.0), array(0.6, -0.6), 8, limits(8, 9))
    assert given.count_d.tolist() == [8, 0]


def test_rounding_makes_no_share_negative_when_all_rows_that_are_left_are_taken() -> None:
    for seed in range(300):
        rng = np.random.default_rng(seed)
        left_d = rng.integers(0, 40, 9) * rng.integers(0, 2, 9)
        left_d[0] += 1
        slots = int(left_d.sum())
        carry_d = rng.uniform(-0.5, 0.5, 9) * (left_d > 0)  # sums to zero, but for what rounding leaves
        carry_d[left_d > 0] -= carry_d.sum() / (left_d > 0).sum()
        share_d = rng.random(9) + 1e-6
        given = apportion(share_d * (slots / share_d.sum()), carry_d, slots, left_d)
        assert given.count_d.tolist() == left_d.tolist(), f"seed {seed}"
        assert is_sound(given, carry_d, slots), f"seed {seed}"


def test_a_window_that_cannot_be_filled_is_refused() -> None:
    with pytest.raises(InfeasibleError, match="7 rows are left in the domains with weight, a window needs 8"):
        apportion(array(4.0, 4.0), np.zeros(2), 8, limits(3, 4))


def test_rows_of_domains_without_weight_are_no_help() -> None:
    with pytest.raises(InfeasibleError, match="3 rows are left in the domains with weight, a window needs 8"):
        apportion(array(8.0, 0.0), np.zeros(2), 8, limits(3, 1000))


def test_limits_below_zero_are_zero_and_the_largest_do_not_overflow() -> None:
    most = np.iinfo(np.int64).max
    assert apportion(array(4.0, 4.0), np.zeros(2), 8, limits(-3, most)).count_d.tolist() == [0, 8]
    assert apportion(array(4.0, 4.0), np.zeros(2), 8, limits(most, most)).count_d.tolist() == [4, 4]


def test_random_limits_are_kept() -> None:
    for seed in range(50):
        rng = np.random.default_rng(seed)
        num, slots = int(rng.integers(1, 30)), int(rng.integers(1, 50))
        left_d = rng.integers(0, 60, num)
        carry_d = np.zeros(num)
        while True:
            share_d = rng.random(num) ** 3 * (rng.random(num) < 0.7) + 1e-9
            share_d *= slots / share_d.sum()
            if left_d.sum() < slots:
                break
            given = apportion(share_d, carry_d, slots, left_d)
            assert is_sound(given, carry_d, slots), f"seed {seed}"
            assert (given.count_d <= left_d).all(), f"seed {seed}"
            carry_d, left_d = given.carry_d, left_d - given.count_d
