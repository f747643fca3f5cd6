import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.signal import savgol_filter

from mixer.core.power_law import GRID, filtered, fitted, predicted

LAW = np.array([2.0, 0.8, 0.3])


def samples_at(steps: range) -> NDArray[np.float64]:
    return 256.0 * np.array(steps, dtype=np.float64)


@pytest.mark.parametrize("starts", [1, 4, pytest.param(None, marks=pytest.mark.slow)])
def test_a_law_without_noise_comes_back(starts):
    samples = samples_at(range(1, 98_001, 1600))
    found = fitted(samples, predicted(LAW, samples), starts=starts)
    assert found is not None
    np.testing.assert_allclose(found, LAW, rtol=1e-2)
    np.testing.assert_allclose(predicted(found, np.array([1e9])), predicted(LAW, np.array([1e9])), rtol=1e-4)


def test_predictions_are_those_worked_by_hand():
    laws = np.array([[1.0, 0.5, 0.3], [0.5, 0.7, 0.2], [1.5, 0.9, 0.1]])
    np.testing.assert_allclose(predicted(laws, np.full(3, 1e5)), [1.734681, 2.178625, 3.876838], atol=5e-7)


def test_noise_and_single_outliers_move_it_little():
    samples = samples_at(range(100, 40_000, 100))
    loss = predicted(LAW, samples) * np.exp(0.003 * np.random.default_rng(0).standard_normal(len(samples)))
    loss[::40] *= 1.5
    found = fitted(samples, loss)
    assert found is not None
    np.testing.assert_allclose(predicted(found, samples), predicted(LAW, samples), rtol=2e-3)


def test_limits_hold_and_small_losses_loosen_one():
    samples = samples_at(range(1, 2000))
    steep = fitted(samples, predicted(np.array([9.0, 0.8, 1.2]), samples))
    assert steep is not None and steep[0] <= 6.5 and steep[2] <= 0.8
    low = fitted(samples, predicted(np.array([4.0, 0.4, 0.3]), samples))
    assert low is not None and low[1] == 0.5  # losses of 2.5 nats and more: the released limit stands in the way
    bytes_law = np.array([1.0, -0.7, 0.3])
    found = fitted(samples, predicted(bytes_law, samples))
    assert found is not None
    np.testing.assert_allclose(found, bytes_law, rtol=1e-2)


def test_the_filter_is_cubic_and_shrinks_with_the_history():
    rng = np.random.default_rng(1)
    loss = 3 + rng.normal(size=40)
    np.testing.assert_allclose(filtered(loss, 11), np.asarray(savgol_filter(loss, 11, 3)))
    np.testing.assert_allclose(filtered(loss[:8], 101), np.asarray(savgol_filter(loss[:8], 7, 3)))
    cubic = np.arange(20.0) ** 3 - 7 * np.arange(20.0)
    np.testing.assert_allclose(filtered(cubic, 7), cubic, atol=1e-9)
    assert filtered(loss[:4], 101).tolist() == loss[:4].tolist()


@pytest.mark.parametrize(
    ("samples", "loss"),
    [(np.arange(1.0, 5), np.ones(4)), (np.full(20, 7.0), np.ones(20)), (np.arange(1.0, 9), np.full(8, np.nan))],
)
def test_what_cannot_be_fitted_is_none(samples, loss):
    assert fitted(samples, loss) is None


def test_the_grid_is_the_released_one():
    assert len(GRID) == 512
    assert [sorted({round(one[axis], 9) for one in GRID}) for axis in range(3)] == [
        [-2, -1, 0, 1, 2, 3, 4, 5],
        [-2, -1.5, -1, -0.5, 0, 0.5, 1, 1.5],
        [0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7],
    ]
