import numpy as np
import pytest

from mixer.core.errors import DataError
from mixer.proxies.methods.mixmin import Likelihoods, Mixmin
from tests.proxies.worlds import setting_of, weights_of

# Two models of one coin and a target that falls 7 to 3: ten samples of one toss.
TOSS = np.log(np.array([[0.8, 0.2]] * 7 + [[0.2, 0.8]] * 3))
LENGTHS = np.ones(10, dtype=np.int64)


def test_the_mixture_of_models_takes_the_targets_probability():
    proposal = Mixmin().propose(Likelihoods(domains=("a", "b"), log_zd=TOSS, tokens_z=LENGTHS), setting_of(("a", "b")))
    assert proposal.weights["a"] == pytest.approx(5 / 6, abs=1e-7)
    entropy = -(0.7 * np.log(0.7) + 0.3 * np.log(0.3))
    assert proposal.predicted["target/mixture_of_models"] == pytest.approx(entropy, abs=1e-12)


def test_exponentiated_gradient_as_released_ends_at_the_same_place():
    x = np.array([0.5, 0.5])
    for _ in range(100):
        share = np.exp(TOSS) / (np.exp(TOSS) @ x)[:, None]
        x = x * np.exp(share.mean(axis=0))
        x = x / x.sum()
    assert x[0] == pytest.approx(0.833333, abs=1e-6)


def test_lengths_divide_and_offsets_of_a_sample_do_not_matter():
    rng = np.random.default_rng(0)
    log_zd, tokens = rng.normal(-900.0, 3.0, (40, 3)), rng.integers(5, 50, 40)
    setting = setting_of(("a", "b", "c"))
    found = Mixmin().propose(Likelihoods(domains=("a", "b", "c"), log_zd=log_zd, tokens_z=tokens), setting)
    moved = log_zd + rng.normal(0, 100.0, (40, 1))
    again = Mixmin().propose(Likelihoods(domains=("a", "b", "c"), log_zd=moved, tokens_z=tokens), setting)
    np.testing.assert_allclose(weights_of(found, "abc"), weights_of(again, "abc"), rtol=0, atol=1e-6)

    def surprise(x):
        largest = log_zd.max(axis=1)
        return -np.mean((largest + np.log(np.exp(log_zd - largest[:, None]) @ x)) / tokens)

    least = surprise(weights_of(found, "abc"))
    assert found.predicted["target/mixture_of_models"] == pytest.approx(least)
    for _ in range(200):
        assert least <= surprise(rng.dirichlet(np.ones(3))) + 1e-10


def test_caps_hold():
    proposal = Mixmin().propose(
        Likelihoods(domains=("a", "b"), log_zd=TOSS, tokens_z=LENGTHS), setting_of(("a", "b"), caps={"a": 0.6})
    )
    np.testing.assert_allclose(weights_of(proposal, "ab"), [0.6, 0.4], rtol=0, atol=1e-9)
    assert proposal.weights["a"] <= 0.6


def test_likelihoods_that_are_none_are_refused():
    with pytest.raises(DataError, match=r"shape \(10, 2\) for 9 samples and 2 domains"):
        Likelihoods(domains=("a", "b"), log_zd=TOSS, tokens_z=LENGTHS[:9])
    with pytest.raises(DataError, match="is no number"):
        Likelihoods(domains=("a", "b"), log_zd=TOSS * np.nan, tokens_z=LENGTHS)
    with pytest.raises(DataError, match="impossible under every"):
        Likelihoods(domains=("a", "b"), log_zd=TOSS - np.inf, tokens_z=LENGTHS)
