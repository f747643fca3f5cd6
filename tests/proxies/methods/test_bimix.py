import numpy as np
import pytest

from mixer.core.errors import DataError
from mixer.proxies.methods.bimix import Bimix, shares
from tests.proxies.worlds import setting_of, table_of


def test_shares_of_equal_domains_and_of_one_four_times_as_heavy():
    ones, half = np.ones(2), np.full(2, 0.5)
    np.testing.assert_allclose(shares(ones, half, ones, half), [0.5, 0.5], rtol=0, atol=1e-12)
    np.testing.assert_allclose(shares(np.array([4.0, 1.0]), ones, ones, half), [2 / 3, 1 / 3], rtol=0, atol=1e-12)


def test_shares_meet_the_conditions_of_a_minimum_also_at_caps():
    rng = np.random.default_rng(0)
    for _ in range(20):
        scale, alpha = rng.uniform(0.1, 4.0, 6), rng.uniform(0.02, 1.5, 6)
        cap = np.minimum(1.0, rng.dirichlet(np.ones(6)) * 2.0 + 0.05)
        x = shares(scale, alpha, cap, np.ones(6) / 6)
        marginal = scale * alpha * x ** (-alpha - 1)
        free = x < cap * (1 - 1e-9)
        assert abs(x.sum() - 1.0) < 1e-9
        np.testing.assert_allclose(marginal[free], marginal[free].mean(), rtol=1e-6)
        assert (marginal[~free] >= marginal[free].mean() * (1 - 1e-6)).all()


def test_domains_without_a_law_get_what_the_others_cannot_take():
    x = shares(
        np.array([1.0, 0.0, 0.0]), np.array([0.5, 0.0, 0.0]), np.array([0.4, 1.0, 1.0]), np.array([0.5, 0.2, 0.3])
    )
    np.testing.assert_allclose(x, [0.4, 0.24, 0.36], rtol=0, atol=1e-12)


def runs(fall=(0.8, 0.4, 0.6), floor=(1.7, 1.2, 2.2), alpha=(0.06, 0.12, 0.03), beta=(0.5, 0.3, 0.4)):
    rng = np.random.default_rng(1)
    weights_rd = np.repeat(rng.dirichlet(np.ones(3), 8), 5, axis=0)
    s = np.tile(np.linspace(0.2, 1.0, 5), 8)
    losses = {
        f"validation/{name}": (fall[place] * s ** -beta[place] + floor[place]) * weights_rd[:, place] ** -alpha[place]
        for place, name in enumerate("abc")
    }
    return table_of(
        "abc", weights_rd, losses, run_r=tuple(f"r{run}" for run in range(8) for _ in range(5)), progress_r=s,
        tokens_r=np.tile(np.arange(1, 6) * 100, 8),
    )  # fmt: skip


@pytest.mark.parametrize("horizon", [1.0, 10.0])
def test_runs_of_a_known_law_lead_to_its_minimum_at_the_horizon(horizon):
    proposal = Bimix(horizon=horizon).propose(runs(), setting_of("abc"))
    scale = np.array([0.8 * horizon**-0.5 + 1.7, 0.4 * horizon**-0.3 + 1.2, 0.6 * horizon**-0.4 + 2.2])
    alpha = np.array([0.06, 0.12, 0.03])
    expected = shares(scale, alpha, np.ones(3), np.ones(3) / 3)
    np.testing.assert_allclose(list(proposal.weights.values()), expected, rtol=0, atol=1e-4)
    loss = scale[0] * expected[0] ** -0.06
    assert proposal.predicted["validation/a"] == pytest.approx(loss, abs=1e-4)


def test_targets_weigh_and_runs_without_a_domain_are_left_out_of_its_law():
    table = runs()
    table.weights_rd[0] = [0.0, 0.5, 0.5]
    table.losses["validation/a"][0] = 9.0
    even = Bimix().propose(table, setting_of("abc"))
    heavy = Bimix().propose(table, setting_of("abc", targets={"validation/a": 5, "validation/b": 1, "validation/c": 1}))
    assert heavy.weights["a"] > even.weights["a"] + 0.1
    assert "a: 1 measurements without its rows or loss left out" in even.notes
    assert even.rank_correlation["validation/b"] > 0.999


def test_sets_that_are_no_domains_own_are_refused():
    with pytest.raises(DataError, match=r"bimix knows a domain's own losses \(validation/<domain>\), not target/x"):
        Bimix().propose(runs(), setting_of("abc", targets={"target/x": 1.0}))
    table = runs()
    table.weights_rd[:] = [0.2, 0.3, 0.5]
    with pytest.raises(DataError, match="40 measurements of 'a' with rows of it, all at one weight"):
        Bimix().propose(table, setting_of("abc"))
