"""All policies that go by probes, over random ones: answers stay mixtures, equals stay equal, units do not matter."""

import numpy as np
import pytest

from mixer.core.mixture import Mixture
from mixer.core.policies import kinds, load_policy, policy_class
from tests.core.policies.making import make_catalog, make_influence, make_setting, make_signal, make_targets

PROBED = [kind for kind in kinds() if policy_class(kind).NEEDS and {"influence", "gram"} >= policy_class(kind).NEEDS]
VARIANTS = [(kind, {}) for kind in PROBED] + [
    ("ftrl", {"score": "worst", "base": "average", "noise": "shrink", "memory": 0.8}),
    ("ftrl", {"score": "log", "base": "prior", "scale": "none", "rate": 1e6}),
    ("dga", {"scale": "none", "average": 0.0, "memory": 0.5}),
    ("doge", {"toward": "domains", "noise": "shrink"}),
    ("grape", {"scale": "none", "target_every": 2, "target_smoothing": 0.1}),
    ("rnb", {"scale": "cosine", "base": "prior", "memory": 0.5}),
    ("rnb", {"scale": "none"}),
    ("pike", {"scale": "none", "fairness": 2.0}),
    ("tikmix_d", {"entropy": 0.0, "memory": 0.8}),
    ("tikmix_d", {"max_shift": 0.2, "keep_targets": False, "noise": "shrink", "scale": "none"}),
    ("bids_balance", {"base": "previous", "rate": 20.0}),
    ("quad_ucb", {"arms": 1.0, "smoothing": 0.0, "explore": 0.0, "forget": 0.5}),
]
# Kinds whose answers change with the unit of the gradients: DoGE's scores are clipped at given numbers.
UNIT_MATTERS = {"doge"}


def random_probe(rng, num, goals, *, unit=1.0, noise=0.5, missing=0.0, twins=False):
    """Gradients, and what a probe of them with noise finds; the twins are domains 0 and 1."""
    domain, target = rng.normal(size=(num, 6)), rng.normal(size=(goals, 6))
    benefit_noise, gram_noise = noise * rng.normal(size=(num, goals)), noise * rng.normal(size=(num, num))
    loss, spread = rng.uniform(1, 4, size=num), rng.uniform(0, 5, size=num)
    gone = rng.uniform(size=(num, goals)) < missing
    if twins:
        domain[1], benefit_noise[1], loss[1], spread[1] = domain[0], benefit_noise[0], loss[0], spread[0]
        gram_noise[:2, :2], gram_noise[1], gram_noise[:, 1] = 0.3, gram_noise[0], gram_noise[:, 0]
        gone[1] = gone[0]
    benefit = np.where(gone, np.nan, domain @ target.T + benefit_noise) * unit
    gram = (domain @ domain.T + (gram_noise + gram_noise.T) / 2) * unit
    return make_influence(
        benefit,
        error_dt=noise * unit,
        gram_dd=gram,
        gram_error_dd=noise * unit,
        noise_d=spread * unit,
        loss_d=loss,
        target_loss_t=np.linspace(1, 3, goals),
    )


def answers(kind, options, probes, prior):
    catalog = make_catalog(*[100] * len(prior))
    policy = load_policy(kind, options)
    state = policy.start(make_setting(catalog, prior, targets=make_targets(len(probes[0].targets))))
    found = []
    for window, probe in enumerate(probes):
        state, weights = policy.update(state, make_signal(catalog, window, influence=probe))
        assert all(np.isfinite(value).all() for value in state.values() if value.dtype.kind == "f"), (kind, options)
        found.append(Mixture(weights).weights_d)
    return found


@pytest.mark.parametrize(("kind", "options"), VARIANTS)
@pytest.mark.parametrize(("num", "goals"), [(1, 1), (1, 3), (2, 1), (7, 3), (500, 4)])
def test_random_probes_with_noise_and_gaps_give_mixtures(kind, options, num, goals):
    for seed in range(1 if num == 500 else 2):
        rng = np.random.default_rng(seed)
        prior = rng.dirichlet(np.ones(num))
        if num > 2 and seed % 2:
            prior[0] = 0.0
        probes = [
            random_probe(rng, num, goals, noise=noise, missing=missing)
            for noise, missing in ((0.3, 0.0), (0.0, 0.3), (3.0, 0.9), (0.3, 0.0))
        ]
        answers(kind, options, probes[: 1 if num == 500 else 4], prior / prior.sum())


@pytest.mark.parametrize(("kind", "options"), VARIANTS)
def test_no_unit_is_too_large_or_too_small(kind, options):
    rng = np.random.default_rng(1)
    for unit in (1e-300, 1e-30, 1e30, 1e150, 1e300):
        answers(kind, options, [random_probe(rng, 4, 2, unit=unit), random_probe(rng, 4, 2)], [0.4, 0.3, 0.2, 0.1])


@pytest.mark.parametrize(("kind", "options"), VARIANTS)
def test_equal_domains_stay_equal(kind, options):
    for seed in range(3):
        rng = np.random.default_rng(seed)
        probes = [random_probe(rng, 6, 3, noise=0.3, missing=0.1, twins=True) for _ in range(3)]
        for weights in answers(kind, options, probes, [0.1, 0.1, 0.2, 0.3, 0.2, 0.1]):
            assert weights[0] == pytest.approx(weights[1], rel=1e-12, abs=1e-15), (kind, options, seed)


@pytest.mark.parametrize("kind", PROBED)
def test_the_unit_of_the_gradients_does_not_matter_by_default(kind):
    prior = [0.4, 0.3, 0.2, 0.1]
    found = []
    for unit in (1.0, 1e-12, 1e9):
        rng = np.random.default_rng(3)
        found.append(answers(kind, {}, [random_probe(rng, 4, 3, unit=unit, noise=0.1) for _ in range(2)], prior)[-1])
    same = np.allclose(found[0], found[1], rtol=0, atol=1e-6) and np.allclose(found[0], found[2], rtol=0, atol=1e-6)
    assert same == (kind not in UNIT_MATTERS)
    assert np.abs(found[0] - prior).sum() > 1e-3


# Those that stay where they are if nothing is known; rnb always starts anew, quad_ucb always chooses arms.
STAYING = ["bids_balance", "dga", "doge", "ftrl", "grape", "pike", "tikmix_d"]


@pytest.mark.parametrize("kind", STAYING)
def test_pure_noise_moves_little(kind):
    """Benefits that are nothing but their stated noise: at two sigmas one of some twenty entries is heard."""
    moved, heard = [], []
    for seed in range(10):
        rng = np.random.default_rng(seed)
        noise, gram = rng.normal(size=(8, 2)), rng.normal(size=(8, 8))
        for error, shifts in ((1.0, moved), (0.0, heard)):
            probe = make_influence(
                noise, error_dt=error, gram_dd=(gram + gram.T) / 2 + 3 * np.eye(8), gram_error_dd=error
            )
            shifts.append(np.abs(answers(kind, {}, [probe], [0.125] * 8)[0] - 0.125).sum())
    assert np.median(moved) <= 0.5 * np.median(heard)
