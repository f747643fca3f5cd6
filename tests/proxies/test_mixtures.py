"""What the generators promise: of RegMix and Olmix, to the letter of their code; and the same again by seed."""

import numpy as np
import pytest

from mixer.core.catalog import Catalog, Domain
from mixer.core.errors import ConfigError
from mixer.proxies import mixtures
from mixer.proxies.mixtures import OlmixOptions, RegmixOptions, dirichlet, given, normalised, olmix, regmix
from tests.core.policies.making import make_catalog

# As skewed as the shares of the Pile's 17 domains.
ROWS = (11329, 7961, 391, 18538, 5108, 1596, 10175, 371, 6653, 175, 2709, 23687, 1184, 793, 803, 3883, 4645)
PILE = Catalog(2048, "fake", tuple(Domain(f"domain{n:02}", rows, f"{n}") for n, rows in enumerate(ROWS)))
PRIOR = PILE.num_rows_d / PILE.num_rows_d.sum()
SOURCES = make_catalog(100, 200, 300, 400, 1000)  # a to e
GROUPS = {"web": ("b", "d", "e"), "books": ("a",)}


# ---- RegMix ----------------------------------------------------------------------------------------------


def test_regmix_weights_are_multiples_within_the_bound_and_differ():
    options = RegmixOptions()
    found = regmix(PRIOR, 128, options, 42)
    assert found.shape == (128, 17)
    np.testing.assert_allclose(found / 2e-4, np.round(found / 2e-4), atol=1e-6)
    assert (np.abs(found.sum(axis=1) - 1) <= 17 * 1e-4 + 1e-12).all()
    # The bound is looked at before small weights go and the rest is scaled up, by 17 * 2e-4 at most.
    assert (found <= np.minimum(15 * PRIOR, 1) / (1 - 17 * 2e-4) + 1e-4).all()
    apart = np.abs(found[:, None] - found[None]).sum(axis=2)[~np.eye(128, dtype=bool)]
    assert apart.min() > 1e-5
    bound = 15 * PRIOR
    assert bound.min() < 0.03 and (found[:, bound < 1].max(axis=0) > 0.5 * bound[bound < 1]).any()


def test_regmix_the_least_domain_hits_its_bound_where_nothing_else_would_stop_it():
    """Without the bound draws at strength 0.1 are nearly vertices, the rarest domain's among them."""
    rare = int(np.argmin(PRIOR))
    free = regmix(PRIOR, 256, RegmixOptions(max_usage=1e6), 1)
    bound = regmix(PRIOR, 256, RegmixOptions(max_usage=15), 1)
    assert free[:, rare].max() > 0.9
    assert bound[:, rare].max() <= 15 * PRIOR[rare] / (1 - 17 * 2e-4) + 1e-4


def test_regmix_draws_around_the_square_root_of_the_prior():
    found = normalised(regmix(PRIOR, 512, RegmixOptions(max_usage=1e6), 7))
    tempered = np.sqrt(PRIOR) / np.sqrt(PRIOR).sum()
    error = np.sqrt(tempered * (1 - tempered) / 512)
    assert (np.abs(found.mean(axis=0) - tempered) < 4.5 * error).all()
    assert (np.abs(found.mean(axis=0) - PRIOR) > 4.5 * error).any()  # and not around the prior


def test_regmix_strengths_range_from_a_vertex_to_the_middle():
    found = regmix(PRIOR, 512, RegmixOptions(), 7)
    largest = found.max(axis=1)
    assert largest.max() > 0.99 and largest.min() < 0.35
    narrow = regmix(PRIOR, 512, RegmixOptions(strengths=(5.0, 5.0), num_strengths=1), 7)
    assert narrow.max(axis=1).mean() < largest.mean() - 0.1


def test_regmix_is_decided_by_its_seed():
    one = regmix(PRIOR, 32, RegmixOptions(), 42)
    np.testing.assert_array_equal(one, regmix(PRIOR, 32, RegmixOptions(), 42))
    assert not np.array_equal(one, regmix(PRIOR, 32, RegmixOptions(), 43))


def test_near_equal_neighbours_are_one():
    rows = np.array([[0.5, 0.5], [0.5 + 4e-6, 0.5], [0.2, 0.8], [0.5 + 2e-5, 0.5]])
    np.testing.assert_array_equal(mixtures._unlike(rows), [rows[0], rows[3], rows[2]])


def test_too_few_are_refused_with_the_count():
    prior = np.array([0.5, 0.5])
    with pytest.raises(ConfigError, match=r"runs=200; of 20000 drawn mixtures 101 are different"):
        regmix(prior, 200, RegmixOptions(minimum=0.01), 0)


# ---- Olmix -----------------------------------------------------------------------------------------------


def test_olmix_weights_keep_minimum_caps_and_distance():
    options = OlmixOptions(budget_tokens=float(SOURCES.num_rows_d.sum() * SOURCES.row_tokens), groups=GROUPS)
    found = olmix(SOURCES, 100, options, 3)
    assert found.shape == (100, 5)
    np.testing.assert_allclose(found.sum(axis=1), 1, atol=1e-12)
    assert ((found == 0) | (found >= 0.002 * 0.98)).all() and (found == 0).any()
    caps = 5 * SOURCES.num_rows_d / SOURCES.num_rows_d.sum()
    assert (found <= np.minimum(caps, 1) + 1e-12).all()
    assert found[:, 0].max() > 0.8 * caps[0]  # a's 0.25, so the cap did something
    apart = np.sqrt(((found[:, None] - found[None]) ** 2).sum(axis=2))[~np.eye(100, dtype=bool)]
    assert apart.min() >= 0.01


def test_olmix_equal_minima_round_to_multiples():
    found = olmix(SOURCES, 50, OlmixOptions(), 3)
    least = np.array([row[row > 0].min() for row in found])
    for row, small in zip(found, least, strict=True):
        parts = row / small  # all are whole multiples of one unit, of which the least holds a few
        units = [unit for unit in range(1, 501) if np.allclose(parts * unit, np.round(parts * unit), atol=1e-6)]
        assert units


def test_olmix_by_level_sources_and_domains_have_minima_of_their_own():
    options = OlmixOptions(groups=GROUPS, minimum=0.05, minimum_inside=0.2)
    found = olmix(SOURCES, 60, options, 5)
    web = found[:, [1, 3, 4]]
    total = web.sum(axis=1)
    sources = np.stack([found[:, 0], found[:, 2], total], axis=1)
    assert ((sources == 0) | (sources >= 0.05 * 0.99)).all() and (sources == 0).any()
    inside = web[total > 0] / total[total > 0, None]
    assert ((inside == 0) | (inside >= 0.2)).all() and (inside == 0).any()


def test_olmix_shares_are_those_of_the_groups_and_in_them():
    """The mean of a Dirichlet is its share: the group's first, then the domain's in it, and not domain by domain."""
    options = OlmixOptions(groups=GROUPS, minimum=0, minimum_inside=0, distance=0)
    found = olmix(SOURCES, 1500, options, 1)
    share = SOURCES.num_rows_d / SOURCES.num_rows_d.sum()
    np.testing.assert_allclose(found.mean(axis=0), share, atol=0.04)
    # A domain's share of its group has the mean and the variance q (1 - q) / (s + 1) of a draw in the group; the
    # strength s has its 15 values alike often.
    inside_r = found[:, 4] / found[:, [1, 3, 4]].sum(axis=1)
    q, strengths = 1000 / 1600, np.geomspace(0.1, 5, 15)
    assert abs(inside_r.mean() - q) < 0.04
    assert abs(inside_r.var() - q * (1 - q) * (1 / (strengths + 1)).mean()) < 0.01


def test_olmix_temperature_flattens():
    options = OlmixOptions(minimum=0, minimum_inside=0, distance=0, temperature=0.1)
    assert olmix(SOURCES, 1000, options, 1).mean(axis=0).max() < 0.3  # natural: 0.5


def test_olmix_pinned_groups_keep_their_ratios():
    pins = {"web": {"b": 1.0, "d": 2.0, "e": 5.0}}
    found = olmix(SOURCES, 40, OlmixOptions(groups=GROUPS, pins=pins), 2)
    has = found[:, 1] > 0
    assert has.any() and not has.all()
    np.testing.assert_allclose(found[has][:, [3, 4]] / found[has][:, [1]], [[2.0, 5.0]] * has.sum(), rtol=1e-12)
    # Its cap is that of the member whose rows are gone first: e, with 1000 rows at a ratio of 5/8.
    tokens = float(SOURCES.num_rows_d.sum() * SOURCES.row_tokens)
    capped = olmix(SOURCES, 40, OlmixOptions(groups=GROUPS, pins=pins, budget_tokens=tokens, max_repetition=1.2), 2)
    assert capped[:, [1, 3, 4]].sum(axis=1).max() <= 0.96 + 1e-9
    assert (capped[:, [1, 3, 4]] <= 1.2 * SOURCES.num_rows_d[[1, 3, 4]] / 2000 + 1e-9).all()


def test_olmix_stays_away_from_earlier_mixtures():
    first = olmix(SOURCES, 60, OlmixOptions(), 9)
    again = olmix(SOURCES, 60, OlmixOptions(), 9, earlier_rd=first)
    assert np.sqrt(((first[:, None] - again[None]) ** 2).sum(axis=2)).min() >= 0.01


def test_a_larger_swarm_begins_with_the_smaller_one():
    np.testing.assert_array_equal(olmix(SOURCES, 90, OlmixOptions(), 4)[:30], olmix(SOURCES, 30, OlmixOptions(), 4))
    np.testing.assert_array_equal(dirichlet(5, 90, 4)[:30], dirichlet(5, 30, 4))


def test_olmix_refuses_what_it_cannot_do():
    with pytest.raises(ConfigError, match=r"olmix.groups.web names the unknown domain 'x'"):
        olmix(SOURCES, 2, OlmixOptions(groups={"web": ("x",)}), 0)
    with pytest.raises(ConfigError, match=r"has 'a' in web and in books"):
        olmix(SOURCES, 2, OlmixOptions(groups={"web": ("a",), "books": ("a",)}), 0)
    with pytest.raises(ConfigError, match=r"olmix.pins.web is about b; the group has b, d, e"):
        olmix(SOURCES, 2, OlmixOptions(groups=GROUPS, pins={"web": {"b": 1.0}}), 0)
    with pytest.raises(ConfigError, match=r"olmix.pins names web, which olmix.groups does not"):
        OlmixOptions(pins={"web": {"b": 1.0}})
    with pytest.raises(ConfigError, match=r"swarm.runs=5; of 50 attempts 50 were over"):
        olmix(SOURCES, 5, OlmixOptions(budget_tokens=1e9), 0)
    with pytest.raises(ConfigError, match=r"of 60 attempts 0 were over .* 5\d lay within olmix.distance=0.99"):
        olmix(SOURCES, 6, OlmixOptions(distance=0.99), 0)


# ---- others ----------------------------------------------------------------------------------------------


def test_dirichlet_is_uniform_on_the_simplex():
    found = dirichlet(4, 4000, 0)
    np.testing.assert_allclose(found.sum(axis=1), 1, atol=1e-12)
    np.testing.assert_allclose(found.mean(axis=0), 0.25, atol=0.015)
    np.testing.assert_allclose((found**2).mean(axis=0), 2 / 20, atol=0.01)  # E w^2 = 2 / (n (n + 1))
    assert abs((found > 0.5).any(axis=1).mean() - 4 * 0.5**3) < 0.03  # P(w > x) = (1 - x)^(n - 1)


def test_given_mixtures_are_taken_by_name_and_scaled():
    found = given(SOURCES, {"one": dict(zip("abcde", (1, 1, 2, 0, 0), strict=True)), "two": dict.fromkeys("edcba", 3)})
    np.testing.assert_array_equal(found, [[0.25, 0.25, 0.5, 0, 0], [0.2] * 5])
    with pytest.raises(ConfigError, match=r"swarm.given.two: weights leave out 'b'"):
        given(SOURCES, {"two": {"a": 1.0}})
