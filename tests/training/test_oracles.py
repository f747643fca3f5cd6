"""Oracles: against closed forms, against retraining, and against each other."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import rankdata
from torch import nn

from mixer.core.errors import ConfigError
from mixer.training.oracles import (
    FlatModel,
    ResponseOptions,
    exact_influence,
    measured_response,
    quadratic_response,
    toward_domains,
    unrolled_influence,
)
from mixer.training.step import StepRows
from tests.training.making import make_batch, tiny


def half_square(model, batch):
    x, y = batch
    return 0.5 * (model(x)[..., 0] - y).square().mean()


def mixed_loss(model, weights, batches):
    return torch.stack([w * half_square(model, batch) for w, batch in zip(weights, batches, strict=True)]).sum()


def spearman(one, other):
    return float(np.corrcoef(rankdata(one), rankdata(other))[0, 1])


# --- ridge regression: 4 domains, 2 targets, everything in closed form --------------------------------


class Ridge:
    """Of the mixture's loss plus (damping / 2) |w|^2."""

    damping = 1e-2

    def __init__(self):
        rng = np.random.default_rng(0)
        ws = rng.normal(size=(4, 6))
        x = rng.normal(size=(4, 50, 6)) * np.array([0.5, 1, 1.5, 2])[:, None, None]
        y = np.einsum("knd,kd->kn", x, ws) + 0.1 * rng.normal(size=(4, 50))
        aims = np.stack([0.8 * ws[0] + 0.2 * ws[1], 0.5 * ws[2] + 0.5 * ws[3]])
        seen = rng.normal(size=(2, 40, 6))
        self.hessian = np.einsum("kni,knj->kij", x, x) / 50
        self.moment = np.einsum("kni,kn->ki", x, y) / 50
        self.weights = np.full(4, 0.25)
        self.domains = [(torch.from_numpy(a), torch.from_numpy(b)) for a, b in zip(x, y, strict=True)]
        reached = np.einsum("tnd,td->tn", seen, aims)
        self.targets = [(torch.from_numpy(a), torch.from_numpy(b)) for a, b in zip(seen, reached, strict=True)]
        self.model = self.at(self.solve(self.weights))

    def solve(self, weights):
        hessian = np.tensordot(weights, self.hessian, 1) + self.damping * np.eye(6)
        return np.linalg.solve(hessian, weights @ self.moment)

    @staticmethod
    def at(solution):
        model = nn.Linear(6, 1, bias=False).double()
        model.weight.data = torch.from_numpy(solution)[None].clone()
        return model

    def losses(self, weights):
        model = self.at(self.solve(weights))
        with torch.no_grad():
            return np.array([float(half_square(model, target)) for target in self.targets])

    def influence(self):
        return exact_influence(
            self.model, half_square, domains=self.domains, targets=self.targets, weights_d=self.weights,
            damping=self.damping,
        )  # fmt: skip

    def differences(self, directions, e=1e-4):
        """Minus the derivative along each direction, by solving again: four-point, without an error of third order."""
        found = []
        for direction in directions:
            near, far = (self.losses(self.weights + s * direction) - self.losses(self.weights - s * direction)
                         for s in (e, 2 * e))  # fmt: skip
            found.append(-(8 * near - far) / (12 * e))
        return np.array(found)


BENEFIT = [[0.372796, -0.071754], [0.841816, -0.748426], [-1.568526, 2.984057], [0.324494, -2.163262]]
TOWARD = [[0.380151, -0.071908], [0.849171, -0.748579], [-1.561171, 2.983903], [0.331849, -2.163416]]
REMOVED = [[0.101164, -0.017292], [0.337342, -0.157139], [-0.138186, 1.514403], [1.475318, 0.190590]]
FIRST_ORDER = [[0.093199, -0.017939], [0.210454, -0.187106], [-0.392132, 0.746014], [0.081124, -0.540815]]


def test_exact_influence_is_the_derivative_of_the_minimum():
    ridge = Ridge()
    found = ridge.influence()
    np.testing.assert_allclose(found, BENEFIT, atol=6e-7)
    error = np.abs(ridge.differences(np.eye(4)) - found).max() / np.abs(found).max()
    assert error < 2e-9


def test_toward_domains_is_the_derivative_within_the_simplex():
    ridge = Ridge()
    found = toward_domains(ridge.influence(), ridge.weights)
    np.testing.assert_allclose(found, TOWARD, atol=6e-7)
    error = np.abs(ridge.differences(np.eye(4) - ridge.weights) - found).max() / np.abs(found).max()
    assert error < 2e-9


def test_a_removed_domain_is_a_matter_of_second_order():
    ridge = Ridge()
    removed = -np.diag(ridge.weights)
    falls = quadratic_response(
        ridge.model, half_square, domains=ridge.domains, targets=ridge.targets, weights_d=ridge.weights,
        shifts_kd=removed, damping=ridge.damping,
    )  # fmt: skip
    really = np.stack([ridge.losses(ridge.weights + shift) - ridge.losses(ridge.weights) for shift in removed])
    np.testing.assert_allclose(-falls, really, rtol=1e-11, atol=1e-13)
    np.testing.assert_allclose(-falls, REMOVED, atol=6e-7)
    first = ridge.weights[:, None] * ridge.influence()
    np.testing.assert_allclose(first, FIRST_ORDER, atol=6e-7)
    # With a quarter of all rows taken away, first order is wrong in sign, and 18 times too small.
    assert (first[3, 1] < 0) and (really[3, 1] > 0)
    assert really[3, 0] / first[3, 0] == pytest.approx(18.19, abs=0.01)


# --- many domains: leaving one out is then a small shift ------------------------------------------------


def many_domains(seed, spread):
    """20 domains of 100 points in 20 dimensions, their inputs' variances exp(spread x normal), the aim of domain k
    w0 + 0.7 C_k with noise 0.1, ridge 0.01; the target is 100 fresh points of domain 0 without noise."""
    rng = np.random.default_rng(seed)
    w0, differs = rng.normal(size=20), rng.normal(size=(20, 20))
    width = np.exp(0.5 * spread * rng.normal(size=(20, 20)))
    aims = w0 + 0.7 * differs
    x = rng.normal(size=(20, 100, 20)) * width[:, None]
    y = np.einsum("knd,kd->kn", x, aims) + 0.1 * rng.normal(size=(20, 100))
    seen = rng.normal(size=(100, 20)) * width[0]
    return x, y, seen, seen @ aims[0]


def rank_correlations(seed, spread):
    """Spearman of influence (exact, diagonal, plain, cosine) with the rise of loss when a domain is left out."""
    x, y, seen, reached = many_domains(seed, spread)
    hessian, moment = np.einsum("kni,knj->kij", x, x) / 100, np.einsum("kni,kn->ki", x, y) / 100
    weights = np.full(20, 1 / 20)

    def solve(weights):
        return np.linalg.solve(np.tensordot(weights, hessian, 1) + 0.01 * np.eye(20), weights @ moment)

    def loss(solution):
        return 0.5 * np.mean((seen @ solution - reached) ** 2)

    theta = solve(weights)
    mixed = np.tensordot(weights, hessian, 1) + 0.01 * np.eye(20)
    slopes, aim = hessian @ theta - moment, seen.T @ (seen @ theta - reached) / 100
    left_out = np.stack([np.where(np.eye(20)[k] > 0, 0, 1 / 19) for k in range(20)])
    rise = [loss(solve(one)) - loss(theta) for one in left_out]
    exact = slopes @ np.linalg.solve(mixed, aim)
    others = [slopes @ (aim / np.diag(mixed)), slopes @ aim, slopes @ aim / np.linalg.norm(slopes, axis=1)]
    return exact, [spearman(one, rise) for one in (exact, *others)]


# Exact, diagonal, plain, cosine: means over 20 seeds that others found, whose draws are not told.
KNOWN = {
    0.0: (0.997, 0.988, 0.988, 0.975),
    0.5: (0.990, 0.985, 0.977, 0.970),
    1.0: (0.974, 0.969, 0.943, 0.936),
    1.5: (0.947, 0.941, 0.881, 0.866),
}


@pytest.mark.parametrize("spread", KNOWN)
def test_influence_ranks_many_domains_as_leaving_them_out_does(spread):
    found = np.array([rank_correlations(seed, spread)[1] for seed in range(20)])
    np.testing.assert_allclose(found.mean(0), KNOWN[spread], atol=0.005 if spread < 0.1 else 0.03)
    if spread == 1.5:  # the gates of the estimators
        exact, diagonal, plain, _ = found.mean(0)
        assert exact >= 0.93
        assert diagonal >= 0.90
        assert plain >= 0.85
        assert exact > diagonal > plain


def test_exact_influence_is_that_of_the_closed_form_with_many_domains():
    x, y, seen, reached = (torch.from_numpy(part) for part in many_domains(0, 1.0))
    hessian, moment = torch.einsum("kni,knj->ij", x, x) / 2000, torch.einsum("kni,kn->i", x, y) / 2000
    model = nn.Linear(20, 1, bias=False).double()
    model.weight.data = torch.linalg.solve(hessian + 0.01 * torch.eye(20, dtype=torch.float64), moment)[None]
    found = exact_influence(
        model, half_square, domains=list(zip(x, y, strict=True)), targets=[(seen, reached)],
        weights_d=np.full(20, 0.05), damping=0.01,
    )  # fmt: skip
    np.testing.assert_allclose(found[:, 0], rank_correlations(0, 1.0)[0], rtol=1e-9, atol=1e-12)


# --- a tiny network -------------------------------------------------------------------------------------

CORNERS = np.array([0.5, 0.3, 0.2])


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1)).double()


def curves(num=30, seed=0, shift=0.0):
    """Points of three domains with different inputs and different aims."""
    rng = np.random.default_rng(seed)
    parts = []
    for k in range(3):
        x = rng.normal(size=(num, 3)) + shift + 0.7 * np.eye(3)[k]
        parts.append((torch.from_numpy(x), torch.from_numpy(np.sin(x[:, k]) + 0.3 * x[:, (k + 1) % 3])))
    return parts


def descend(model, steps, weights_sd, rates):
    """By hand; with a weight for every step and domain."""
    model = copy.deepcopy(model)
    for batches, weights, rate in zip(steps, weights_sd, rates, strict=True):
        model.zero_grad()
        mixed_loss(model, weights, batches).backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= rate * parameter.grad
    return model


def test_the_unrolled_adjoint_is_the_derivative_of_retraining():
    model, targets = network(), curves(20, seed=99, shift=0.3)[:2]
    steps = [curves(10, seed=s) for s in range(12)]
    rates = [0.2 / (1 + 0.1 * s) for s in range(12)]
    found = unrolled_influence(
        model, half_square, steps=steps, targets=targets, weights_d=CORNERS, rates=rates
    )  # fmt: skip
    assert found.shape == (12, 3, 2)

    def losses(weights_sd):
        after = descend(model, steps, weights_sd, rates)
        return np.array([half_square(after, target).item() for target in targets])

    weights_sd, e = np.tile(CORNERS, (12, 1)), 1e-4
    for s, i in [(0, 0), (3, 1), (7, 2), (11, 0)]:
        moved = np.zeros_like(weights_sd)
        moved[s, i] = e
        difference = (losses(weights_sd - moved) - losses(weights_sd + moved)) / (2 * e)
        np.testing.assert_allclose(found[s, i], difference, rtol=1e-6, atol=1e-9)
    for i in range(3):  # held through all steps
        moved = np.zeros_like(weights_sd)
        moved[:, i] = e
        difference = (losses(weights_sd - moved) - losses(weights_sd + moved)) / (2 * e)
        np.testing.assert_allclose(found.sum(0)[i], difference, rtol=1e-6)


def test_the_measured_response_is_the_unrolled_adjoint_of_descent():
    model, targets = network(), curves(20, seed=99, shift=0.3)[:2]
    steps = {seed: [curves(10, seed=100 * seed + s) for s in range(8)] for seed in (0, 1)}
    unrolled = [
        toward_domains(
            unrolled_influence(
                model, half_square, steps=steps[seed], targets=targets, weights_d=CORNERS, rates=[0.2] * 8
            ).sum(0),
            CORNERS,
        )
        for seed in (0, 1)
    ]
    found = measured_response(
        model,
        lambda one: torch.optim.SGD(one.parameters(), lr=0.2),
        half_square,
        rows=lambda seed, step: steps[seed][step],
        targets=targets,
        weights_d=CORNERS,
        steps=8,
        options=ResponseOptions(shift=1e-4, seeds=(0, 1)),
    )
    np.testing.assert_allclose(found.benefit_kdt, unrolled, rtol=1e-6, atol=1e-10)
    np.testing.assert_allclose(found.benefit_dt, np.mean(unrolled, 0), rtol=1e-6, atol=1e-10)
    # Of two seeds the standard error is half their distance.
    np.testing.assert_allclose(found.error_dt, np.abs(unrolled[0] - unrolled[1]) / 2, rtol=1e-4, atol=1e-9)
    after = descend(model, steps[0], np.tile(CORNERS, (8, 1)), [0.2] * 8)
    assert found.loss_kt[0, 1] == pytest.approx(half_square(after, targets[1]).item(), rel=1e-12)


def test_one_side_has_an_error_of_first_order_and_both_have_none():
    ridge = Ridge()

    def response(shift, both_sides):
        return measured_response(
            ridge.model,
            lambda one: torch.optim.SGD(one.parameters(), lr=0.1),
            half_square,
            rows=lambda seed, step: ridge.domains,
            targets=ridge.targets,
            weights_d=ridge.weights,
            steps=5,
            options=ResponseOptions(shift=shift, seeds=(0,), both_sides=both_sides),
        ).benefit_dt

    exact = response(1e-5, True)
    one, half = (np.abs(response(shift, False) - exact).max() for shift in (0.1, 0.05))
    assert one / half == pytest.approx(2, abs=0.1)
    one, half = (np.abs(response(shift, True) - exact).max() for shift in (0.1, 0.05))
    assert one / half == pytest.approx(4, abs=0.2)


def test_long_training_near_a_minimum_responds_as_exact_influence_says():
    ridge = Ridge()
    found = measured_response(
        ridge.model,
        lambda one: torch.optim.SGD(one.parameters(), lr=0.3, weight_decay=ridge.damping),
        half_square,
        rows=lambda seed, step: ridge.domains,
        targets=ridge.targets,
        weights_d=ridge.weights,
        steps=60,
        options=ResponseOptions(shift=1e-3, seeds=(0,)),
    )
    np.testing.assert_allclose(found.benefit_dt, TOWARD, rtol=1e-3)
    assert np.isnan(found.error_dt).all()


def test_noisy_training_of_a_network_ranks_domains_as_exact_influence_does():
    """Near convergence, on random halves of the rows; what exact influence says lies within the error bars."""
    model, domains = network(), curves(40)
    targets, decay = curves(40, seed=5, shift=0.2), 0.02
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=600, tolerance_grad=1e-9, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = mixed_loss(model, CORNERS, domains) + decay / 2 * sum(p.square().sum() for p in model.parameters())
        loss.backward()
        return loss

    optimizer.step(closure)
    exact = toward_domains(
        exact_influence(
            model, half_square, domains=domains, targets=targets, weights_d=CORNERS, damping=decay
        ),
        CORNERS,
    )  # fmt: skip

    def rows(seed, step):
        rng = np.random.default_rng([seed, step])
        chosen = [rng.permutation(40)[:20] for _ in domains]
        return [(x[some], y[some]) for (x, y), some in zip(domains, chosen, strict=True)]

    found = measured_response(
        model,
        lambda one: torch.optim.SGD(one.parameters(), lr=0.3, weight_decay=decay),
        half_square,
        rows=rows,
        targets=targets,
        weights_d=CORNERS,
        steps=80,
        options=ResponseOptions(shift=0.02, both_sides=False, seeds=(0, 1, 2)),
    )
    assert spearman(found.benefit_dt.ravel(), exact.ravel()) > 0.9
    sure = np.abs(found.benefit_dt) > 3 * found.error_dt
    assert sure.sum() >= 5
    assert (np.sign(found.benefit_dt) == np.sign(exact))[sure].all()


# --- a decoder ------------------------------------------------------------------------------------------


def mean_loss(model, rows):
    return model(rows.tokens_bs, rows.documents, rows.target_bs).loss_bs.sum() / rows.num_targets


def test_a_decoder_has_a_hessian_and_an_influence():
    model = tiny(dim=4, num_heads=1, num_kv_heads=1, num_layers=1, mlp_dim=4, vocab_multiple=1, init_std=0.3)
    parts = [StepRows.of(make_batch(rows=2, row_tokens=8, seed=seed)) for seed in range(4)]
    flat = FlatModel(model, mean_loss)
    assert len(flat.start_p) == model.num_parameters
    hessian = flat.hessian(flat.start_p, parts[0])
    torch.manual_seed(0)
    vector = torch.randn(len(flat.start_p), dtype=torch.float64)
    vector /= vector.norm()
    e = 1e-3  # parts of the model compute in float32
    slopes = [flat.gradient(flat.start_p + s * e * vector, parts[0]) for s in (1, -1)]
    scale = float((hessian @ vector).abs().max())
    torch.testing.assert_close((slopes[0] - slopes[1]) / (2 * e), hessian @ vector, rtol=0, atol=5e-3 * scale)
    product = flat.times_hessian(flat.start_p, vector, parts[:2], np.array([1.0, 0.0]))
    torch.testing.assert_close(product, hessian @ vector, rtol=0, atol=1e-5 * scale)
    damping = 1.0 - float(torch.linalg.eigvalsh(hessian)[0])
    found = exact_influence(
        model, mean_loss, domains=parts[:1], targets=parts[1:3], weights_d=np.ones(1), damping=damping
    )
    left = flat.gradients(flat.start_p, parts[1:3])
    middle = torch.linalg.solve(hessian + damping * torch.eye(len(vector), dtype=torch.float64), left.T)
    np.testing.assert_allclose(found[0], flat.gradient(flat.start_p, parts[0]) @ middle, rtol=1e-6)


# --- nothing leaks, and what is refused -----------------------------------------------------------------


class Noisy(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.dropout = network(), nn.Dropout(0.5)

    def forward(self, x):
        return self.inner(self.dropout(x))


def test_the_given_model_and_optimizer_stay_as_they_are():
    torch.manual_seed(3)
    model, domains = Noisy(), curves()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    half_square(model, domains[0]).backward()
    optimizer.step()
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict(), [p.grad for p in model.parameters()]))
    random = torch.get_rng_state()
    how: dict[str, Any] = {"domains": domains, "targets": domains, "weights_d": CORNERS}
    exact_influence(model, half_square, damping=10.0, **how)
    quadratic_response(model, half_square, damping=10.0, shifts_kd=0.1 * np.eye(3), **how)
    unrolled_influence(model, half_square, steps=[domains] * 2, targets=domains, weights_d=CORNERS, rates=[0.1] * 2)
    found = measured_response(
        model,
        lambda one: torch.optim.AdamW(one.parameters(), lr=0.05),
        half_square,
        rows=lambda seed, step: domains,
        targets=domains,
        weights_d=CORNERS,
        steps=2,
        optimizer_state=optimizer.state_dict(),
        options=ResponseOptions(seeds=(0, 1), clip_norm=0.1),
    )
    after = (model.state_dict(), optimizer.state_dict(), [p.grad for p in model.parameters()])
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), random)
    assert model.training
    # All copies drew the same dropout: two seeds with the same rows answer alike.
    assert np.array_equal(found.benefit_kdt[0], found.benefit_kdt[1])


@pytest.mark.parametrize("clip_norm", [None, 0.01])
def test_the_response_goes_on_from_the_optimizers_state(clip_norm):
    def make(model):
        return torch.optim.AdamW(model.parameters(), lr=0.05)

    model, domains = network(), curves()
    optimizer = make(model)

    def step(weights):
        optimizer.zero_grad()
        mixed_loss(model, weights, domains).backward()
        if clip_norm is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
        optimizer.step()

    for _ in range(5):
        step(CORNERS)
    found = measured_response(
        model,
        make,
        half_square,
        rows=lambda seed, step: domains,
        targets=lambda one: np.array([half_square(one, domains[1]).item()]),
        weights_d=CORNERS,
        steps=3,
        optimizer_state=optimizer.state_dict(),
        options=ResponseOptions(seeds=(0,), clip_norm=clip_norm),
    )
    for _ in range(3):
        step(CORNERS)
    assert found.loss_kt[0, 0] == pytest.approx(half_square(model, domains[1]).item(), rel=1e-9)


def test_what_cannot_be_is_refused():
    model, domains = network(), curves()
    how: dict[str, Any] = {"domains": domains, "targets": domains, "weights_d": CORNERS}
    with pytest.raises(ConfigError, match=r"the Hessian's least eigenvalue is -[\d.e-]+, the damping 0: .* above"):
        exact_influence(model, half_square, damping=0.0, **how)
    with pytest.raises(ConfigError, match=r"weights \[1\.\] for 3 domains; needed a finite one of each"):
        exact_influence(model, half_square, domains=domains, targets=domains, weights_d=np.ones(1), damping=1.0)
    with pytest.raises(ConfigError, match=r"1 rates for 2 steps; needed one of each"):
        unrolled_influence(
            model, half_square, steps=[domains] * 2, targets=domains, weights_d=CORNERS, rates=[0.1]
        )  # fmt: skip
    with pytest.raises(ConfigError, match=r"the model has no trained parameter"):
        FlatModel(network().requires_grad_(False), half_square)
    for wrong, text in [({"shift": 0.0}, r"shift=0\.0"), ({"seeds": ()}, r"seeds=\[\]"), ({"seeds": (1, 1)}, "seeds")]:
        with pytest.raises(ConfigError, match=text):
            ResponseOptions(**wrong)
