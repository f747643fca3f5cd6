from dataclasses import replace

import numpy as np
import pytest

from mixer.core.errors import ConfigError, DataError
from mixer.proxies.methods.olmix import Olmix
from tests.proxies.worlds import ExpWorld, setting_of, table_of, weights_of

NAMES = ("a", "b", "c")
SLOPES = np.array([[-2.0, 0.5, 0.0], [0.3, -1.5, 0.2]])
PRIOR = (0.2, 0.3, 0.5)


def world_of_three():
    return ExpWorld(slope_td=SLOPES, log_floor_t=np.array([0.1, 0.5]), prior_d=np.array(PRIOR), names=NAMES)


@pytest.mark.parametrize(
    ("caps", "expected"),
    [
        ({}, [0.511392, 0.470571, 0.018037]),
        (dict.fromkeys(NAMES, 0.5), [0.5, 0.479472, 0.020528]),
    ],
)
def test_runs_of_a_known_law_lead_to_the_known_mixture(caps, expected):
    proposal = Olmix(kl=0.1).propose(world_of_three().table(60), setting_of(NAMES, PRIOR, caps=caps))
    np.testing.assert_allclose(weights_of(proposal, NAMES), expected, rtol=0, atol=2e-4)
    assert proposal.rank_correlation["target/0"] > 0.999
    assert ("held by their caps: a at 0.5" in proposal.notes) == bool(caps)


def test_the_pull_leads_from_the_laws_minimum_to_the_prior():
    table, setting = world_of_three().table(60), setting_of(NAMES, PRIOR, folds=0)
    far = [
        np.abs(weights_of(Olmix(kl=kl).propose(table, setting), NAMES) - PRIOR).sum() for kl in (0.0, 0.1, 1.0, 100.0)
    ]
    assert far == sorted(far, reverse=True)
    assert far[-1] < 0.02


def test_the_simulation_agrees_with_the_exact_program():
    table, setting = world_of_three().table(60), setting_of(NAMES, PRIOR, caps={"a": 0.45})
    exact = weights_of(Olmix().propose(table, setting), NAMES)
    found = weights_of(Olmix(proposer="simulation", num_draws=4000).propose(table, setting), NAMES)
    assert np.abs(found - exact).sum() < 0.05


def test_the_search_answers_with_the_best_run_that_obeys_the_caps():
    world = world_of_three()
    table = world.table(40)
    setting = setting_of(NAMES, PRIOR, caps={"a": 0.4})
    allowed = table.weights_rd[table.weights_rd[:, 0] <= 0.4]
    proposal = Olmix(proposer="search").propose(table, setting)
    assert weights_of(proposal, NAMES).tolist() == pytest.approx(allowed[np.argmin(world.total(allowed))].tolist())
    assert proposal.predicted["target/0"] in table.losses["target/0"]
    with pytest.raises(DataError, match="none of 40 runs obeys the caps"):
        Olmix(proposer="search").propose(table, setting_of(NAMES, PRIOR, caps={"a": 1e-5}))


RATIOS = {"b": 0.37, "c": 0.11, "d": 0.52}


def reused(seed=0, runs=40, domains=("a", "b", "c", "d", "e")):
    """Runs in which b, c and d keep their ratios."""
    world = ExpWorld.drawn(seed, domains=5, targets=2)
    rng = np.random.default_rng(seed)
    share = np.array(list(RATIOS.values())) / sum(RATIOS.values())
    outer = rng.dirichlet(np.ones(3), runs)
    weights_rd = np.concatenate([outer[:, :1], outer[:, 1:2] * share, outer[:, 2:]], axis=1)
    return table_of(domains, weights_rd, world.losses(weights_rd)), world


def test_a_reused_block_keeps_its_ratios_to_the_last_bit():
    names = ("a", "b", "c", "d", "e")
    olmix = Olmix(reuse={"old": RATIOS})
    rho = olmix.ratios()["old"]
    tables = [reused(seed)[0] for seed in range(4)]
    for table, caps in zip(tables, [{}, {"a": 0.2}, {"c": 0.02}, {"d": 0.1, "e": 0.4}], strict=True):
        proposal = olmix.propose(table, setting_of(names, caps=caps, folds=0))
        weights, block = proposal.weights, sum(proposal.weights[name] for name in RATIOS)
        near = block + np.arange(-8, 9) * np.spacing(block)
        exact = [share for share in near if all(share * rho[name] == weights[name] for name in RATIOS)]
        assert exact, (block, weights)
        assert all(weights[name] <= cap for name, cap in caps.items())
        assert abs(sum(weights.values()) - 1.0) < 1e-12


def test_a_block_is_one_domain_to_the_fit():
    names = ("a", "b", "c", "d", "e")
    table, world = reused(seed=2)
    proposal = Olmix(kl=0.0, reuse={"old": RATIOS}).propose(table, setting_of(names, folds=0))
    # by hand: the world of three domains in which the block's slope is its members' mean
    share = np.array(list(RATIOS.values())) / sum(RATIOS.values())
    slope = np.stack([world.slope_td[:, 0], world.slope_td[:, 1:4] @ share, world.slope_td[:, 4]], axis=1)
    three = replace(world, slope_td=slope, prior_d=np.ones(3) / 3, names=("a", "old", "e"))
    least = three.minimum()
    found = [proposal.weights["a"], sum(proposal.weights[name] for name in RATIOS), proposal.weights["e"]]
    np.testing.assert_allclose(found, least, rtol=0, atol=0.02)
    few = Olmix(reuse={"old": RATIOS}).propose(
        reused(seed=2, runs=5)[0], setting_of(names, folds=0)
    )  # 4 coefficients, not 6
    assert abs(sum(few.weights.values()) - 1.0) < 1e-12


def test_a_domain_that_is_gone_needs_no_new_runs():
    world = ExpWorld.drawn(4, domains=4, targets=2)
    table = world.table(40)
    gone = int(np.argmax(world.minimum()))  # the one that would get most
    kept = [place for place in range(4) if place != gone]
    left = [world.names[place] for place in kept]
    proposal = Olmix(kl=0.0).propose(table, setting_of(left, folds=0))
    assert list(proposal.weights) == left
    least = world.minimum(np.where(np.arange(4) == gone, 0.0, 1.0))
    np.testing.assert_allclose(weights_of(proposal, left), least[kept], rtol=0, atol=0.02)
    assert f"left out, no longer in the catalog: {world.names[gone]}" in proposal.notes


def test_blocks_that_cannot_be_are_refused():
    names, (table, _) = ("a", "b", "c", "d", "e"), reused()
    for reuse, text in [
        ({"old": {"b": 1.0, "x": 1.0}}, "reuse.old names the unknown domain 'x'"),
        ({"a": {"b": 1.0, "c": 1.0}}, "a domain has that name too"),
        ({"old": {"b": 1.0}, "new": {"b": 1.0, "c": 1.0}}, "b in more than one block"),
    ]:
        with pytest.raises(ConfigError, match=text):
            Olmix(reuse=reuse).propose(table, setting_of(names))
    with pytest.raises(DataError, match=r"run 'run-00\d\d' gives the domains of a reused block other ratios"):
        Olmix(reuse={"old": {"b": 1.0, "c": 1.0, "d": 1.0}}).propose(table, setting_of(names))
    with pytest.raises(ConfigError, match="proposer=exact needs regressor=exp_linear"):
        Olmix(regressor="lightgbm")
    with pytest.raises(ConfigError, match="kl=-1"):
        Olmix(kl=-1.0)


def test_domains_without_a_prior_get_nothing_while_there_is_a_pull():
    setting = setting_of(NAMES, (0.4, 0.6, 0.0))
    assert Olmix(kl=0.1).propose(world_of_three().table(60), setting).weights["c"] == 0.0
    with pytest.raises(ConfigError, match="caps of the domains that the prior knows sum to 0.7 < 1"):
        Olmix(kl=0.1).propose(world_of_three().table(60), setting_of(NAMES, (0.4, 0.6, 0.0), caps={"a": 0.2, "b": 0.5}))
