import math
import pickle
from functools import reduce
from operator import add
from typing import Any

import numpy as np
import pytest

from mixer.core.errors import SignalError
from mixer.core.signal import GRID, MOST, Evaluation, Signal, on_grid


def signal_of(window: int = 3, catalog: str = "c" * 64, **fields: Any) -> Signal:
    values = {"loss_sum_d": [1.5, 0.0], "tokens_d": [10, 0], "rows_d": [1, 0], "bad_rows_d": [0, 2]} | fields
    counts: dict[str, Any] = {
        key: np.array(values[key], dtype=np.int64) for key in ("tokens_d", "rows_d", "bad_rows_d")
    }
    more = {key: fields[key] for key in ("excess_sum_d", "evaluation", "influence") if key in fields}
    loss_sum_d = np.array(values["loss_sum_d"], dtype=np.float64)
    return Signal(window=window, catalog=catalog, loss_sum_d=loss_sum_d, **counts, **more)


def test_losses_are_put_on_a_grid_of_two_to_the_minus_sixteen() -> None:
    assert GRID == 65536.0
    assert on_grid([0.1, 1e-6, -0.5, 3.0]).tolist() == [6554 / 65536, 0.0, -0.5, 3.0]
    assert np.isnan(on_grid(math.nan))
    assert on_grid(math.inf) == math.inf


def test_rows_are_booked_on_their_domains() -> None:
    signal = Signal.from_rows(4, "abc", 3, [2, 0, 2], [1.25, 2.0, 0.5], [10, 20, 30])
    assert signal.loss_sum_d.tolist() == [2.0, 0.0, 1.75]
    assert signal.tokens_d.tolist() == [20, 0, 40]
    assert signal.rows_d.tolist() == [1, 0, 2]
    assert signal.bad_rows_d.tolist() == [0, 0, 0]
    np.testing.assert_array_equal(signal.loss_d, [0.1, math.nan, 1.75 / 40])


def test_rows_without_a_finite_loss_are_counted_apart() -> None:
    signal = Signal.from_rows(0, "abc", 2, [0, 0, 1, 1], [math.nan, 1.0, math.inf, -math.inf], [5, 6, 7, 8])
    assert signal.loss_sum_d.tolist() == [1.0, 0.0]
    assert signal.tokens_d.tolist() == [6, 0]
    assert signal.rows_d.tolist() == [1, 0]
    assert signal.bad_rows_d.tolist() == [1, 2]


def test_no_rows_are_a_signal_of_nothing() -> None:
    signal = Signal.from_rows(0, "abc", 2, [], [], [])
    assert signal.tokens_d.tolist() == [0, 0]
    assert np.isnan(signal.loss_d).all()


@pytest.mark.parametrize("seed", range(10))
def test_any_split_over_ranks_and_any_order_gives_the_same_bits(seed: int) -> None:
    rng = np.random.default_rng(seed)
    num, domains = 400, 7
    domain_n = rng.integers(0, domains, num)
    loss_n = rng.lognormal(5, 5, num)  # from well below the grid to millions of nats
    loss_n[rng.random(num) < 0.02] = math.nan
    tokens_n = rng.integers(0, 4096, num)

    def part(rows: np.ndarray) -> Signal:
        return Signal.from_rows(1, "abc", domains, domain_n[rows], loss_n[rows], tokens_n[rows])

    whole = part(np.arange(num))
    for ranks in (1, 2, 3, 4, 8):
        for _ in range(5):
            rank_n = rng.integers(0, ranks, num)
            shuffled = rng.permutation(num)
            parts = [part(shuffled[rank_n[shuffled] == rank]) for rank in rng.permutation(ranks)]
            total = reduce(add, parts)
            assert total == whole, f"seed {seed}, {ranks} ranks"
            assert total.loss_sum_d.tobytes() == whole.loss_sum_d.tobytes(), f"seed {seed}, {ranks} ranks"


def test_the_largest_sums_still_add_exactly() -> None:
    largest = MOST / 2 - 1 / GRID
    a = signal_of(loss_sum_d=[largest, 1 / GRID])
    total = a + a
    assert total.loss_sum_d.tolist() == [MOST - 2 / GRID, 2 / GRID]
    with pytest.raises(SignalError, match="reach 137438953472 nats"):
        _ = total + a


def test_signals_of_different_windows_or_catalogs_do_not_add() -> None:
    with pytest.raises(SignalError, match=r"window 3 .* and window 4 .*Add parts of one window only"):
        _ = signal_of() + signal_of(window=4)
    with pytest.raises(SignalError, match=r"catalog c{12}\) and window 3 \(catalog d{12}\)"):
        _ = signal_of() + signal_of(catalog="d" * 64)
    three = signal_of(loss_sum_d=[0, 0, 0], tokens_d=[0, 0, 0], rows_d=[0, 0, 0], bad_rows_d=[0, 0, 0])
    with pytest.raises(SignalError, match="signals of 2 and 3 domains"):
        _ = signal_of() + three


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tokens_d": [1, -1]}, "tokens_d of window 3 must be 2 counts"),
        ({"rows_d": [1]}, "rows_d of window 3 must be 2 counts"),
        ({"bad_rows_d": [-1, 0]}, "bad_rows_d of window 3 must be 2 counts"),
        ({"loss_sum_d": [math.nan, 0]}, "loss sums of window 3 are not finite"),
        ({"loss_sum_d": [MOST, 0]}, "loss sums of window 3 reach"),
        ({"loss_sum_d": [0.1, 0]}, "off the grid. Put them through on_grid first"),
    ],
)
def test_what_is_no_measurement_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(SignalError, match=message):
        signal_of(**fields)


def test_counts_must_be_whole_numbers_and_windows_not_negative() -> None:
    with pytest.raises(SignalError, match=r"a signal of window -1. Windows count from 0"):
        signal_of(window=-1)
    with pytest.raises(SignalError, match="tokens_d of window 0 must be 1 counts"):
        Signal(
            window=0,
            catalog="abc",
            loss_sum_d=np.zeros(1),
            tokens_d=np.zeros(1),  # pyright: ignore[reportArgumentType]  # floats are what is tested
            rows_d=np.zeros(1, dtype=np.int64),
            bad_rows_d=np.zeros(1, dtype=np.int64),
        )


@pytest.mark.parametrize("domain", [-1, 2])
def test_a_domain_the_catalog_does_not_have_is_refused(domain: int) -> None:
    with pytest.raises(SignalError, match=rf"name domains {min(domain, 0)} to {max(domain, 0)}, the catalog has 2"):
        Signal.from_rows(0, "abc", 2, [0, domain], [1.0, 1.0], [1, 1])


def test_equal_signals_are_equal_after_a_pickle() -> None:
    signal = signal_of()
    assert pickle.loads(pickle.dumps(signal)) == signal
    assert signal != signal_of(rows_d=[2, 0])
    assert signal != 3


def test_excess_adds_up_and_one_part_holds_what_all_ranks_measured() -> None:
    evaluation = Evaluation(sets=("target/code", "validation/a"), loss_s=np.array([2.0, np.nan]))
    one = signal_of(excess_sum_d=np.array([0.5, 0.0]), evaluation=evaluation)
    both = one + signal_of(excess_sum_d=np.array([0.25, 0.0]))
    assert both.excess_d.tolist()[:1] == [0.75 / 20]
    assert math.isnan(both.excess_d[1])
    assert both.evaluation == evaluation
    assert evaluation.of("target") == {"code": 2.0}
    assert np.array_equal(evaluation.at("validation", ["b", "a"]), [np.nan, np.nan], equal_nan=True)
    with pytest.raises(SignalError, match="one part of window 3 holds an excess"):
        _ = one + signal_of()
    with pytest.raises(SignalError, match="both parts of window 3 hold its evaluation"):
        _ = one + one
    assert one != signal_of(excess_sum_d=np.array([0.5, 0.0]))
