from dataclasses import replace

import numpy as np
import pytest

from mixer.core.errors import ConfigError, DataError
from mixer.proxies.methods.tikmix_m import TikmixM
from tests.proxies.worlds import setting_of, table_of, weights_of

NAMES = ("a", "b", "c")
PRIOR = np.array([0.2, 0.2, 0.6])
BENEFIT = np.array([[1.0, 0.1], [0.2, 0.9], [0.5, 0.3]])  # of domains on two sets


def influence(weights_rd, scale=(1.0, 1.0)):
    gain = weights_rd @ BENEFIT * np.array(scale)
    return table_of(NAMES, weights_rd, {"target/x": -gain[:, 0], "target/y": -gain[:, 1]}, quantity="influence")


def proposed(method, setting, scale=(1.0, 1.0)):
    return method.propose(influence(method.candidates(setting), scale), setting)


def test_candidates_are_mixtures_around_the_start_which_is_the_first():
    setting = setting_of(NAMES, PRIOR, caps={"a": 0.4})
    drawn = TikmixM(num_candidates=200).candidates(setting)
    assert drawn.shape == (200, 3)
    np.testing.assert_allclose(drawn[0], PRIOR, rtol=0, atol=1e-15)
    assert (drawn <= setting.cap_d).all()
    np.testing.assert_allclose(drawn.sum(axis=1), 1.0, rtol=0, atol=1e-9)
    np.testing.assert_allclose(drawn.mean(axis=0), PRIOR, rtol=0, atol=0.08)


def test_a_set_that_would_lose_holds_the_search_back():
    # b has the highest sum of benefits; with b alone x would fall from .54 to .2, so a has to keep it up.
    linear = TikmixM(regressor="linear", num_draws=4000, num_best=32)
    proposal = proposed(linear, setting_of(NAMES, PRIOR))
    gain = weights_of(proposal, NAMES) @ BENEFIT
    start = PRIOR @ BENEFIT
    assert (gain >= start - 2e-3).all()
    assert gain.sum() > start.sum() + 0.1
    np.testing.assert_allclose(start, [0.54, 0.38], rtol=0, atol=1e-12)
    free = proposed(
        TikmixM(regressor="linear", num_draws=4000, num_best=32, pareto=False),
        setting_of(NAMES, PRIOR, targets={"target/y": 1.0, "target/x": 0.1}),
    )
    assert free.weights["b"] > 0.95


def test_no_set_rules_by_its_size():
    linear = TikmixM(regressor="linear", num_draws=4000, num_best=32)
    even = weights_of(proposed(linear, setting_of(NAMES, PRIOR)), NAMES)
    large = weights_of(proposed(linear, setting_of(NAMES, PRIOR), scale=(1000.0, 1.0)), NAMES)
    assert np.abs(even - large).sum() < 0.02


def test_trees_find_much_of_it_too():
    proposal = proposed(TikmixM(num_draws=3000, num_best=32, num_candidates=200), setting_of(NAMES, PRIOR))
    gain, start = weights_of(proposal, NAMES) @ BENEFIT, PRIOR @ BENEFIT
    assert gain.sum() > start.sum() + 0.03
    assert (gain > start - 0.03).all()
    assert min(proposal.rank_correlation.values()) > 0.8


def test_where_nothing_is_better_the_start_is_the_answer():
    setting = setting_of(NAMES, PRIOR)
    method = TikmixM(regressor="linear", num_draws=500, num_best=8)
    weights_rd = method.candidates(setting)
    gain = weights_rd @ np.array([1.0, -1.0, 0.0])
    table = table_of(
        NAMES, weights_rd, {"target/x": -gain, "target/y": gain}, quantity="influence"
    )  # what one wins the other loses
    proposal = method.propose(table, setting)
    assert weights_of(proposal, NAMES).tolist() == pytest.approx(PRIOR.tolist(), abs=1e-15)
    assert "no mixture is predicted to be better than the start, which is the answer" in proposal.notes


def test_losses_are_not_taken_for_influence():
    table = influence(TikmixM().candidates(setting_of(NAMES, PRIOR)))
    with pytest.raises(DataError, match="the table holds loss, not influence"):
        TikmixM().propose(replace(table, quantity="loss"), setting_of(NAMES, PRIOR))


def test_options_that_make_no_sense_are_refused():
    with pytest.raises(ConfigError, match="influence has both signs"):
        TikmixM(regressor="exp_linear")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="num_candidates=1"):
        TikmixM(num_candidates=1)
