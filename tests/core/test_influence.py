"""Influence from inner products of parts: means, errors, and squares without the noise."""

from dataclasses import replace

import numpy as np
import pytest

from mixer.core.errors import SignalError
from mixer.core.influence import Influence, Parts, summarise


def probe(rng, means_gp, noise, num_parts, tokens_n=None):
    """Parts of groups whose true gradients are `means_gp`, each with noise of that variance a token and parameter."""
    group_n = np.repeat(np.arange(len(means_gp)), num_parts)
    tokens_n = np.full(len(group_n), 16) if tokens_n is None else tokens_n
    part_np = (
        means_gp[group_n] + rng.normal(size=(len(group_n), means_gp.shape[1])) * (noise / tokens_n)[:, None] ** 0.5
    )
    rows_n = np.full(len(group_n), 2)
    parts = Parts(group_n=group_n, tokens_n=tokens_n, rows_n=rows_n, loss_n=np.arange(len(group_n), dtype=float))
    return part_np @ part_np.T, parts


def test_by_hand():
    # Domain 0: parts (1, 0) and (3, 0) of 1 and 3 tokens, so its gradient is (2.5, 0). Domain 1: (0, 2) twice.
    # The target: (1, 1) and (1, -1), so (1, 0).
    part_np = np.array([[1.0, 0], [3, 0], [0, 2], [0, 2], [1, 1], [1, -1]])
    parts = Parts(
        group_n=np.array([0, 0, 1, 1, 2, 2]),
        tokens_n=np.array([1, 3, 2, 2, 1, 1]),
        rows_n=np.ones(6, dtype=int),
        loss_n=np.array([4.0, 8, 1, 3, 5, 7]),
    )
    found = summarise(part_np @ part_np.T, parts, num_domains=2, targets=("t",), metric="identity", rate=0.5)
    assert found.benefit_dt.ravel().tolist() == [2.5, 0.0]
    assert found.loss_d.tolist() == [7.0, 2.0]
    assert found.target_loss_t.tolist() == [6.0]
    assert found.gram_dd is not None and found.noise_d is not None and found.target_gram_tt is not None
    np.testing.assert_allclose(found.gram_dd, [[3.0, 0.0], [0.0, 4.0]])  # (1 3) of the one pair there is
    np.testing.assert_allclose(found.target_gram_tt, [[0.0]])
    # Without a part of domain 0 the product is 3 or 1: deviations 0.5 and -1.5, half of their squares' sum is 1.25.
    # Without a part of the target: (1, -1) or (1, 1), products 2.5 each for domain 0 and -2 or 2 for domain 1.
    np.testing.assert_allclose(found.benefit_error_dt.ravel(), [1.25**0.5, (0.5 * (4 + 4)) ** 0.5])
    assert found.tokens == 10


def test_squares_are_without_bias_and_noise_is_found():
    rng = np.random.default_rng(0)
    means = np.array([[1.0, 0, 0, 0], [0.0, 0.5, 0, 0], [0.3, 0.3, 0.3, 0]])
    found = []
    for _ in range(3000):
        products, parts = probe(rng, means, 8.0, 4)
        found.append(summarise(products, parts, num_domains=2, targets=("t",), metric="identity", rate=1.0))
    gram = np.mean([one.gram_dd for one in found], axis=0)
    np.testing.assert_allclose(gram, means[:2] @ means[:2].T, atol=0.06)  # the biased square would be 1.5 and 0.75
    # 4 parameters of variance 8 a token, a row has 8 tokens
    np.testing.assert_allclose(np.mean([one.noise_d for one in found], axis=0), [4.0, 4.0], rtol=0.1)
    benefit = np.array([one.benefit_dt for one in found])
    np.testing.assert_allclose(benefit.mean(0).ravel(), [0.3, 0.15], atol=0.04)
    error = np.sqrt(np.mean([one.benefit_error_dt**2 for one in found], axis=0))
    assert (benefit.std(0) * 0.97 < error).all()
    assert (error < benefit.std(0) * 1.27).all()  # the noise of both sides at once is counted twice


def test_blocks_that_were_not_measured_are_left_out():
    rng = np.random.default_rng(1)
    products, parts = probe(rng, np.eye(3), 1.0, 3)
    products[:6, :6] = np.nan  # of domains with each other
    products[6:, 6:] = np.nan
    found = summarise(products, parts, num_domains=2, targets=("t",), metric="adam", rate=1.0)
    assert found.gram_dd is None and found.noise_d is None and found.target_gram_tt is None
    assert np.isfinite(found.benefit_dt).all() and np.isfinite(found.benefit_error_dt).all()


def test_one_part_has_no_error_and_no_square():
    products, parts = probe(np.random.default_rng(2), np.eye(3), 0.1, 1)
    found = summarise(products, parts, num_domains=2, targets=("t",), metric="adam", rate=1.0)
    assert np.isfinite(found.benefit_dt).all()
    assert np.isnan(found.benefit_error_dt).all()
    assert found.gram_dd is None  # its diagonal is not known


def test_what_cannot_be_is_refused():
    products, parts = probe(np.random.default_rng(3), np.eye(3), 0.1, 2)
    parts = replace(parts, tokens_n=np.array([1, 1, 0, 0, 1, 1]))
    with pytest.raises(SignalError, match=r"groups \[1\] of a probe have no token"):
        summarise(products, parts, num_domains=2, targets=("t",), metric="adam", rate=1.0)
    fields = {"metric": "adam", "targets": ("t",), "rate": 1.0, "loss_d": np.ones(2), "target_loss_t": np.ones(1)}
    with pytest.raises(SignalError, match=r"benefit_dt of an influence must be float64 of shape \(2, 1\)"):
        Influence(benefit_dt=np.ones((1, 2)), benefit_error_dt=np.ones((2, 1)), **fields)
    with pytest.raises(SignalError, match="infinite"):
        Influence(benefit_dt=np.array([[1.0], [np.inf]]), benefit_error_dt=np.ones((2, 1)), **fields)
