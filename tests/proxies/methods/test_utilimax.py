import numpy as np
import pytest

from mixer.core.errors import ConfigError
from mixer.proxies.methods.utilimax import Utilimax, portfolio
from tests.proxies.worlds import setting_of, table_of, weights_of


def test_equal_utilities_give_the_portfolio_of_least_variance():
    ones, start = np.ones(3), np.ones(3) / 3
    np.testing.assert_allclose(portfolio(ones, ones, start, 1.0), start, rtol=0, atol=1e-9)
    covariance = np.diag([1.0, 2.0, 4.0])
    found = portfolio(ones, ones, start, 1.0, covariance)
    np.testing.assert_allclose(found, np.array([4.0, 2.0, 1.0]) / 7.0, rtol=0, atol=1e-8)


def test_utility_moves_the_weights_and_caps_hold_them():
    # 2 risk x_i = u_i + nu: from (1/3, 1/3, 1/3) by (u_i - mean) / 2
    utility = np.array([0.3, 0.0, -0.3])
    found = portfolio(utility, np.ones(3), np.ones(3) / 3, 1.0)
    np.testing.assert_allclose(found, 1 / 3 + utility / 2, rtol=0, atol=1e-8)
    found = portfolio(utility, np.array([0.4, 1.0, 1.0]), np.ones(3) / 3, 1.0)
    np.testing.assert_allclose(found, [0.4, 0.375, 0.225], rtol=0, atol=1e-8)


def test_utilities_are_read_off_the_runs_in_units_of_each_target():
    rng = np.random.default_rng(0)
    weights_rd = rng.dirichlet(np.ones(3), 20)
    slope = np.array([1.0, 2.0, 3.0])
    losses = {"target/x": weights_rd @ slope, "target/y": 100.0 * (weights_rd @ slope) + 7.0}
    proposal = Utilimax(risk=2.0).propose(table_of("abc", weights_rd, losses), setting_of("abc"))
    unit = np.sqrt(1.5)  # of (1, 0, -1)
    np.testing.assert_allclose(weights_of(proposal, "abc"), 1 / 3 + np.array([unit, 0, -unit]) / 4, rtol=0, atol=1e-7)
    with pytest.raises(ConfigError, match="risk=-1"):
        Utilimax(risk=-1.0)
