"""Every policy in a world where its assumption holds; the rails are judged in every run (see drive.py)."""

from dataclasses import replace
from functools import cache

import numpy as np
import pytest

from mixer.core.mixture import Mixture
from mixer.core.policies import kinds, load_policy
from mixer.core.rails import GuardRails
from mixer.core.simplex import onto_box
from tests.simulator.cases import (
    ALL,
    CASES,
    GOAL,
    LAWS,
    NUM,
    NUM_ROWS,
    OWN,
    OWN_LAWS,
    REFERENCES,
    ROWS,
    TARGETS,
    WINDOWS,
    WORST_GAP,
    played,
    regret,
    regrets,
)
from tests.simulator.drive import run
from tests.simulator.world import Sensor, catalog_of

GATED = [name for name, case in CASES.items() if case.most is not None]
LONG = {"tikmix_d"}  # some 5 s
UNGATED = {"fixed", "scripted", "temperature", "unimax", "natural", "uniform", "odm", "ado"}


def test_the_best_mixtures_are_where_they_must_be():
    np.testing.assert_allclose(WORST_GAP.best(), GOAL, atol=1e-6)  # all gaps are equal there, and inside
    p = TARGETS.best()
    slopes = TARGETS.world.benefits(p, ROWS)[:, NUM:].mean(1)
    inside = p > 0.0101
    assert inside.tolist() == [True, True, True, False, True]
    np.testing.assert_allclose(slopes[inside], slopes[0], rtol=1e-3)  # equal where nothing binds
    assert slopes[3] < slopes[0]
    own = OWN.losses(GOAL, ROWS)
    step = 1e-6 * np.eye(NUM)[2]
    found = -(OWN.losses(GOAL + step, ROWS) - own) / 1e-6
    np.testing.assert_allclose(OWN.benefits(GOAL, ROWS)[2], found, rtol=1e-4)


def test_the_controls_are_far_from_the_best():
    assert regret(TARGETS, Mixture.natural(catalog_of(TARGETS.world)).weights_d) == pytest.approx(1.0)
    assert regret(TARGETS, np.full(NUM, 1 / NUM)) > 0.2


def test_every_policy_that_learns_is_judged():
    assert {case.kind for case in CASES.values() if case.most is not None} == set(kinds()) - UNGATED


@cache
def of_case(name):
    return regrets(CASES[name], played(CASES[name]))


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in LONG else name for name in GATED]
)
def test_it_comes_within_its_regret(name):
    case = CASES[name]
    assert case.most is not None
    found = of_case(name)
    assert found[case.judged] < case.most, found


def by_true_laws(found, form):
    """ADO's answer to the run as it went, had it known the laws. The last answer goes by all signals but two."""
    prior = np.array(NUM_ROWS) / sum(NUM_ROWS)
    credit, mean, own, answer = prior, prior, np.zeros(NUM), prior
    for time, counts in enumerate(found.counts_wd[: WINDOWS - 2], start=1):
        own = own + counts
        credit = 0.9 * credit + 0.1 * counts / counts.sum()
        if time <= 10:
            continue
        samples = np.full(NUM, own.sum()) if form == "released" else np.maximum(own, 1)
        rho = prior * np.sqrt(credit) * LAWS[:, 2] * np.exp(LAWS[:, 0]) * samples ** -(LAWS[:, 2] + 1)
        rho = rho / rho.sum()
        if form == "released":
            rho = np.maximum(rho, 0.01) / np.maximum(rho, 0.01).sum()
        else:
            rho = onto_box((rho, np.ones(NUM)), np.full(NUM, 0.01), np.ones(NUM))
        answer, mean = 0.9 * mean + 0.1 * rho, mean + (rho - mean) / (time + 1)
    return prior, answer


@pytest.mark.parametrize("form", ["released", "paper"])
def test_ado_finds_what_it_would_do_with_the_true_laws(form):
    world = replace(OWN_LAWS, by_total=form == "released")
    sensor = Sensor(world=world, catalog=catalog_of(world), probe_every=1000, evaluate_every=1000)
    found = run(load_policy("ado", {"form": form, "refit_windows": 40}), sensor, WINDOWS)
    prior, answer = by_true_laws(found, form)
    missed = np.abs(found.weights_wd[-1] - answer).sum() / np.abs(answer - prior).sum()
    assert missed < 0.05


TIGHT = GuardRails(floor=0.05, cap=0.4, max_shift=0.08, max_epochs=1.5)


@pytest.mark.parametrize("kind", sorted(kinds()))
def test_tight_rails_hold_under_noise(kind):
    """Rows of two domains run out; every weight, shift and pass is within its limit (`run` judges them)."""
    world = replace(ALL, num_rows=(4_000, 1_500, 1_200, 9_000, 3_000))
    options = {"reference": REFERENCES} if kind in ("shearing", "doremi") else {}
    sensor = Sensor(world=world, catalog=catalog_of(world), noise=0.1, seed=3)
    found = run(load_policy(kind, options), sensor, 30, rails=TIGHT, prior=Mixture.uniform(catalog_of(world)), lag=2)
    assert found.rows == 30 * 256


def test_pilot_is_no_worse_than_its_parts():
    for kind in ("dga", "ftrl"):
        for judged, found in of_case("pilot").items():
            assert found <= of_case(kind)[judged], (kind, judged)
