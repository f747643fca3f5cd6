import numpy as np
import pytest

from mixer.core.errors import ConfigError, DataError
from mixer.proxies.scaling import fit_sizes, fit_tokens
from tests.proxies.worlds import table_of

# Losses of models of growing width under muP, by millions of parameters (arXiv 2304.06875).
SIZES = np.array([8.53, 21.56, 39.09, 61.12, 87.65, 118.68, 154.21, 194.24, 676.48, 1446.72])
LOSSES = np.array([3.9181, 3.6054, 3.4431, 3.3542, 3.2902, 3.2478, 3.2240, 3.1797, 3.0854, 3.0425])


def test_seven_small_widths_predict_three_larger_ones():
    fit = fit_sizes(SIZES[:7], LOSSES[:7])
    assert fit.law.scale == pytest.approx(2.4694, abs=5e-5)
    assert -fit.law.alpha == pytest.approx(-0.42311, abs=5e-6)
    assert fit.law.floor == pytest.approx(2.9233, abs=5e-5)
    band = fit.predict(SIZES[7:])
    np.testing.assert_allclose(band.loss_x, [3.1890, 3.0800, 3.0369], rtol=0, atol=5e-5)
    assert (np.abs(band.loss_x - LOSSES[7:]) < 0.01).all()
    assert (band.low_x < band.loss_x).all()
    assert (band.loss_x < band.high_x).all()
    assert (np.diff(band.high_x - band.low_x) > 0).all()  # less is known the farther away


def test_the_band_holds_the_truth_as_often_as_it_says():
    x, far = np.geomspace(1.0, 50.0, 12), np.array([300.0])
    held = 0
    for seed in range(40):
        noise = 0.01 * np.random.default_rng(seed).normal(size=12)
        band = fit_sizes(x, 2.0 + 1.5 * x**-0.5 + noise, bootstraps=60, seed=seed).predict(far, level=0.9)
        held += bool(band.low_x[0] <= 2.0 + 1.5 * 300.0**-0.5 <= band.high_x[0])
    assert 29 <= held <= 40  # 0.9 of 40 is 36; a residual bootstrap is known to be a little narrow


def courses(runs=3, points=10):
    progress = np.tile(np.linspace(0.1, 1.0, points), runs)
    tokens = (progress * 1e6).astype(np.int64)
    names = tuple(f"run-{run}" for run in range(runs) for _ in range(points))
    floor = np.repeat(np.linspace(2.0, 2.4, runs), points)
    loss = floor + 40.0 * tokens**-0.35
    weights = np.tile([0.5, 0.5], (runs * points, 1))
    return table_of(("a", "b"), weights, {"target/x": loss}, run_r=names, progress_r=progress, tokens_r=tokens)


def test_courses_over_tokens_are_fitted_on_checkpoints_without_the_earliest():
    table = courses()
    table.losses["target/x"][table.progress_r <= 0.1 + 1e-9] += 5.0  # no power law yet
    fits = fit_tokens(table, "target/x", earliest=0.1 + 1e-9, bootstraps=5)
    assert [fits[f"run-{run}"].law.floor for run in range(3)] == pytest.approx([2.0, 2.2, 2.4], abs=1e-4)
    assert {round(fit.law.alpha, 5) for fit in fits.values()} == {0.35}
    assert fits["run-0"].predict(np.array([1e8])).loss_x[0] == pytest.approx(2.0 + 40.0 * 1e8**-0.35, abs=1e-3)


def test_the_same_seed_gives_the_same_band():
    one, other = (fit_sizes(SIZES, LOSSES, bootstraps=20, seed=3).predict(SIZES) for _ in range(2))
    assert one.low_x.tobytes() == other.low_x.tobytes()
    third = fit_sizes(SIZES, LOSSES, bootstraps=20, seed=4).predict(SIZES)
    assert one.low_x.tobytes() != third.low_x.tobytes()


def test_what_cannot_be_fitted_is_refused():
    with pytest.raises(DataError, match="3 of 3 runs, 'run-0' first, have fewer than 4 losses of 'target/x'"):
        fit_tokens(courses(points=4), "target/x", earliest=0.5)
    with pytest.raises(DataError, match="no losses of 'target/y'; it has target/x"):
        fit_tokens(courses(), "target/y")
    with pytest.raises(ConfigError, match="earliest=1"):
        fit_tokens(courses(), "target/x", earliest=1.0)
    with pytest.raises(ConfigError, match="level=1"):
        fit_sizes(SIZES, LOSSES, bootstraps=2).predict(SIZES, level=1.0)
