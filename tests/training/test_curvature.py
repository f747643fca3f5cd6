"""Curvature: factors against Fisher matrices worked out whole, and measuring that leaves no trace."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from mixer.core.errors import CheckpointError, ConfigError, SignalError
from mixer.training.curvature import (
    Curvature,
    CurvatureOptions,
    measure,
    measure_covariances,
)
from mixer.training.labels import Sampled, choose_batches, draw_labels, of_rows, uniforms
from mixer.training.layers import find_layers
from mixer.training.step import StepRows
from tests.fakes import make_corpus
from tests.training import ranks
from tests.training.making import gradients, make_batch, tiny

ALL = CurvatureOptions(layers=("*.weight", "*.bias"))


def matrix(curvature, names=None):
    """M^-1 of the covered parameters, in the order of `names`, by preconditioning every unit vector."""
    names = names or curvature.names
    shapes = {}
    for layer in curvature.layers:
        shapes[layer.parameters[0]] = (layer.outputs, layer.inputs - layer.has_bias)
        if layer.has_bias:
            shapes[layer.parameters[1]] = (layer.outputs,)
    sizes = [int(np.prod(shapes[name])) for name in names]
    columns = []
    for unit in torch.eye(sum(sizes), dtype=torch.float64):
        parts = dict(zip(names, unit.split(sizes), strict=True))
        out = curvature.precondition({name: part.reshape(shapes[name]) for name, part in parts.items()})
        columns.append(torch.cat([out[name].flatten() for name in names]))
    return torch.stack(columns, 1)


def approximation(curvature):
    """What the factors take the Fisher matrix to be: M without its damping."""
    (factors,) = curvature.factors
    damping = curvature.damping * factors.moment_oi.mean()
    return torch.linalg.inv(matrix(curvature)) - float(damping) * torch.eye(
        factors.moment_oi.numel(), dtype=torch.float64
    )


# --- a softmax regression, whose Fisher matrix is known -------------------------------------------------


class Softmax:
    """400 points of 5 inputs, 4 classes. Every point is passed with every label, each scaled so that the mean over
    labels is the expectation under the model: what sampling many labels tends to."""

    def __init__(self):
        self.rng = np.random.default_rng(0)
        self.x = self.rng.normal(size=(400, 5)) * np.array([2, 1, 1, 0.5, 0.2])
        weight = self.rng.normal(size=(4, 5))
        self.model = nn.Linear(5, 4, bias=False).double()
        self.model.weight.data = torch.from_numpy(weight)
        logits = self.x @ weight.T
        self.p = np.exp(logits - logits.max(1, keepdims=True))
        self.p /= self.p.sum(1, keepdims=True)
        hessian = np.stack([np.diag(p) - np.outer(p, p) for p in self.p])
        self.fisher = np.einsum("ncd,ni,nj->cidj", hessian, self.x, self.x).reshape(20, 20) / 400

    def batches(self):
        return [(torch.from_numpy(self.x), torch.full((400,), label)) for label in range(4)]

    @staticmethod
    def loss(model, batch):
        points, label = batch
        log_p = torch.log_softmax(model(points), -1)
        chosen = log_p.gather(1, label[:, None])[:, 0]
        return Sampled(-(chosen * (4 * chosen.exp()).sqrt().detach()).sum(), None)

    def measured(self, kind):
        options = CurvatureOptions(kind=kind, layers=("weight",))
        return measure(self.model, self.batches, options, sampled_loss=self.loss)

    def relative(self, found):
        return float(np.linalg.norm(np.asarray(found) - self.fisher) / np.linalg.norm(self.fisher))


def test_errors_of_a_softmax_regression_are_the_known_ones():
    known = Softmax()
    kfac, ekfac = (known.relative(approximation(known.measured(kind))) for kind in ("kfac", "ekfac"))
    assert kfac == pytest.approx(0.5327, abs=5e-5)
    assert ekfac == pytest.approx(0.1916, abs=5e-5)
    assert known.relative(np.diag(np.diag(known.fisher))) == pytest.approx(0.6035, abs=5e-5)


def test_damped_influences_of_a_softmax_regression_follow_the_exact_ones():
    """Ten queries against all other points, labels drawn from the model. Which draws the known correlations
    (.980, .979, .962, identity .892) are of is not told; those of factors hardly depend on it."""
    known = Softmax()
    label = np.array([known.rng.choice(4, p=p) for p in known.p])
    gradient = np.einsum("nc,ni->nci", known.p - np.eye(4)[label], known.x).reshape(400, 20)
    damping = 0.1 * np.trace(known.fisher) / 20
    exact = np.linalg.inv(known.fisher + damping * np.eye(20))
    inverses = {kind: matrix(known.measured(kind)).numpy() for kind in ("kfac", "ekfac")}
    inverses |= {"diagonal": np.diag(1 / (np.diag(known.fisher) + damping)), "identity": np.eye(20)}
    found = {
        name: np.corrcoef((gradient[:10] @ inverse @ gradient[10:].T).ravel(),
                          (gradient[:10] @ exact @ gradient[10:].T).ravel())[0, 1]
        for name, inverse in inverses.items()
    }  # fmt: skip
    assert found["kfac"] == pytest.approx(0.9802, abs=0.003)
    assert found["ekfac"] == pytest.approx(0.9792, abs=0.003)
    assert found["diagonal"] == pytest.approx(0.9624, abs=0.006)
    assert found["identity"] == pytest.approx(0.8216, abs=1e-4)  # of these draws


def test_labels_drawn_from_the_model_give_the_same_moments():
    known = Softmax()

    def sampled(model, points):
        logits = model(points)
        labels = draw_labels(logits, torch.rand(len(points), generator=source, dtype=torch.float64))
        return Sampled(nn.functional.cross_entropy(logits, labels, reduction="sum"), None)

    source = torch.Generator().manual_seed(1)
    points = [torch.from_numpy(known.x)] * 100
    drawn = measure(known.model, lambda: points, CurvatureOptions(layers=("weight",)), sampled_loss=sampled)
    exact = known.measured("ekfac")
    # 40,000 draws; the basis is the same but for signs, as A is exact and S nearly so.
    np.testing.assert_allclose(approximation(drawn), approximation(exact), atol=0.02 * np.abs(known.fisher).max())


def test_a_uniform_number_falls_on_a_label_as_often_as_it_is_probable():
    logits = torch.log(torch.tensor([0.5, 0.0, 0.3, 0.2])).expand(1000, 4)
    labels = draw_labels(logits, (torch.arange(1000) + 0.5) / 1000)
    assert torch.bincount(labels, minlength=4).tolist() == [500, 0, 300, 200]
    assert draw_labels(logits[:1], torch.ones(1)).tolist() == [3]


# --- squared loss, where both are exact -----------------------------------------------------------------


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", ["kfac", "ekfac"])
def test_a_linear_layer_with_squared_loss_gives_its_gauss_newton_matrix(kind, bias):
    """I (x) A exactly; labels of unit variance, passed as the corners that have it."""
    torch.manual_seed(0)
    x = torch.randn(40, 4, dtype=torch.float64) @ torch.randn(4, 4, dtype=torch.float64)
    model = nn.Linear(4, 3, bias=bias).double()

    def corner(model, output):
        return Sampled(3**0.5 * model(x)[:, output].sum(), None)

    found = measure(model, lambda: range(3), CurvatureOptions(kind=kind, layers=("*",)), sampled_loss=corner)
    whole = torch.cat([x, torch.ones(40, 1)], 1) if bias else x
    a = whole.T @ whole / 40
    damping = 0.1 * torch.trace(a) / len(a)
    target = torch.randn(40, 3, dtype=torch.float64)
    grads = torch.autograd.grad((model(x) - target).square().sum() / 80, list(model.parameters()))
    joined = torch.cat([part.reshape(3, -1) for part in grads], 1)
    got = found.precondition(dict(zip(found.names, grads, strict=True)))
    expected = joined @ torch.linalg.inv(a + damping * torch.eye(len(a), dtype=torch.float64))
    joined_got = torch.cat([part.reshape(3, -1) for part in got.values()], 1)
    torch.testing.assert_close(joined_got, expected, rtol=1e-10, atol=1e-12)
    assert [part.shape for part in got.values()] == [part.shape for part in grads]
    # Hardly damped, it is Newton's step to the least squares.
    newton = Curvature(found.layers, found.factors, 1e-12).precondition(dict(zip(found.names, grads, strict=True)))
    weights = torch.cat([p.detach().reshape(3, -1) for p in model.parameters()], 1)
    step = torch.cat([part.reshape(3, -1) for part in newton.values()], 1)
    torch.testing.assert_close((weights - step).T, torch.linalg.lstsq(whole, target).solution, rtol=1e-8, atol=1e-8)


# --- a decoder ------------------------------------------------------------------------------------------

SMALL = {"dim": 8, "num_heads": 2, "num_kv_heads": 1, "mlp_dim": 12, "init_std": 0.3}


def rows_of(num=5, seed=0):
    rows = StepRows.of(make_batch(rows=num, row_tokens=12, seed=seed))
    return rows, [rows.part(n, n + 1) for n in range(num)]


def row_gradients(model, parts, name, seed=0):
    """By autograd, a row at a time, of labels that the model draws."""
    weight = dict(model.named_parameters())[name]
    return [torch.autograd.grad(of_rows(seed)(model, part).loss, weight)[0].double() for part in parts]


@pytest.mark.parametrize("name", ["layers.0.attention.value", "layers.1.mlp.gate", "layers.1.mlp.output"])
def test_moments_of_a_decoder_are_those_of_whole_rows_gradients(name):
    model, (rows, parts) = tiny(**SMALL), rows_of()
    found = measure(model, lambda: [rows.part(0, 2), rows.part(2, 5)], CurvatureOptions(layers=(f"{name}.weight",)))
    (factors,) = found.factors
    fisher = torch.stack([g.flatten() for g in row_gradients(model, parts, f"{name}.weight")])
    fisher = fisher.T @ fisher / rows.num_targets
    basis = torch.kron(factors.basis_oo, factors.basis_ii).double()
    torch.testing.assert_close(
        torch.diag(basis.T @ fisher @ basis), factors.moment_oi.double().flatten(), rtol=2e-4, atol=1e-7
    )
    # So no other moments in this basis come nearer to it, and K-FAC's do not.
    kfac = measure(model, lambda: [rows], CurvatureOptions(layers=(f"{name}.weight",), kind="kfac"))
    errors = [float((approximation(one) - fisher).norm() / fisher.norm()) for one in (found, kfac)]
    assert errors[0] < errors[1]
    assert errors[0] < 0.95


def test_covariances_of_a_decoder_leave_out_places_without_a_target():
    model, (rows, parts) = tiny(**SMALL), rows_of()
    layers = find_layers(model, ("layers.0.attention.query.weight",))
    sums = measure_covariances(model, layers, parts, of_rows(0))
    a_sum, _, places = sums.split([64, 64, 1])
    assert 0 < rows.num_targets < rows.tokens_bs.numel()
    assert places.tolist() == [rows.num_targets]
    with torch.no_grad():
        entered = model.layers[0].attention_norm(model.embedding(rows.tokens_bs))[rows.target_bs >= 0]  # pyright: ignore
    torch.testing.assert_close(a_sum.reshape(8, 8), (entered.T @ entered).double(), rtol=1e-5, atol=1e-5)


def test_a_whole_decoder_is_preconditioned_by_its_layers():
    model, (rows, _) = tiny(**SMALL), rows_of()
    found = measure(model, lambda: [rows])
    expected = {name for name, p in model.named_parameters() if p.ndim == 2 and name.startswith("layers.")}
    assert set(found.names) == expected
    assert len(found.names) == 14
    grads = {name: grad for name, grad in gradients(model, rows).items() if name in found.names}
    got = found.precondition(grads)
    again = Curvature.from_tensors(found.layers, found.tensors(), CurvatureOptions()).precondition(grads)
    assert all(torch.equal(again[name], got[name]) for name in grads)
    one = "layers.0.mlp.up.weight"
    layer = dict(zip(found.names, found.factors, strict=True))[one]
    turned = layer.basis_oo.T @ grads[one] @ layer.basis_ii / (layer.moment_oi + 0.1 * layer.moment_oi.mean())
    torch.testing.assert_close(got[one], layer.basis_oo @ turned @ layer.basis_ii.T)
    torch.testing.assert_close(found.precondition({one: grads[one]})[one], got[one])
    # M is positive: a gradient's product with itself stays positive, and M^-1 is symmetric.
    assert all(float((grads[name] * got[name]).sum()) > 0 for name in grads)
    other = {name: torch.randn_like(grad, generator=None) for name, grad in grads.items()}
    left = sum(float((got[name] * other[name]).sum()) for name in grads)
    right = sum(float((grads[name] * part).sum()) for name, part in found.precondition(other).items())
    assert left == pytest.approx(right, rel=1e-4)


def test_sums_of_ranks_add_up_to_those_of_one():
    model, (rows, parts) = tiny(**SMALL), rows_of()
    layers = find_layers(model)
    whole = measure_covariances(model, layers, parts, of_rows(0))
    empty = StepRows.nothing(12, "cpu")
    shared = [measure_covariances(model, layers, some, of_rows(0)) for some in (parts[:3], [*parts[3:], empty])]
    torch.testing.assert_close(shared[0] + shared[1], whole, rtol=1e-12, atol=0)
    curvature = Curvature.of_covariances(layers, whole)
    moments = [curvature.measure(model, some, of_rows(0)) for some in (parts[:3], [*parts[3:], empty])]
    torch.testing.assert_close(sum(moments), curvature.measure(model, parts, of_rows(0)), rtol=1e-12, atol=0)
    # In one batch of several rows they are the same but for rounding: rows' labels do not depend on the batch.
    torch.testing.assert_close(measure_covariances(model, layers, [rows], of_rows(0)), whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("how", ["recomputed", "compiled", "logits by parts"])
def test_layers_are_heard_however_the_model_runs(how):
    model, (_, parts) = tiny(**SMALL), rows_of()
    expected = measure_covariances(model, find_layers(model), parts, of_rows(0))
    options = {"recomputed": {"recompute": True}, "logits by parts": {"loss_positions": 5}}.get(how, {})
    other = tiny(**SMALL, **options)
    if how == "compiled":
        for layer in other.layers:
            layer.compile(backend="eager")
        other(parts[0].tokens_bs, parts[0].documents)
    torch.testing.assert_close(measure_covariances(other, find_layers(other), parts, of_rows(0)), expected)


def test_labels_are_a_rows_own():
    rows, parts = rows_of()
    whole = uniforms(rows, 3)
    assert whole.shape == rows.tokens_bs.shape
    assert torch.equal(torch.cat([uniforms(part, 3) for part in parts]), whole)
    assert not torch.equal(uniforms(rows, 4), whole)
    assert len(set(whole.flatten().tolist())) == whole.numel()
    many = uniforms(rows._replace(tokens_bs=torch.zeros(5, 20_000)), 0)
    assert float(many.mean()) == pytest.approx(0.5, abs=0.005)
    assert float(many.max()) < 1


def test_losses_are_of_the_models_own_labels():
    model, (rows, _) = tiny(**SMALL), rows_of()
    found = of_rows(5)(model, rows)
    assert found.counted is not None
    assert torch.equal(found.counted, rows.target_bs >= 0)
    logits = model(rows.tokens_bs, rows.documents)
    assert isinstance(logits, torch.Tensor)
    chances = torch.softmax(logits.double(), -1).cumsum(-1)
    labels = (chances < uniforms(rows, 5)[..., None]).sum(-1)[found.counted]
    expected = nn.functional.cross_entropy(logits[found.counted], labels, reduction="sum")
    torch.testing.assert_close(found.loss, expected)


class Noisy(nn.Module):
    """Draws random numbers, and has a part that is trained and one that is not."""

    def __init__(self, fails=False):
        super().__init__()
        self.one, self.two, self.fails = nn.Linear(3, 4), nn.Linear(4, 2), fails
        self.frozen, self.dropout = nn.Linear(4, 4).requires_grad_(False), nn.Dropout().eval()

    def forward(self, x):
        torch.rand(3)
        if self.fails:
            raise RuntimeError("as asked")
        return self.two(self.frozen(self.dropout(self.one(x)).tanh()))


def squares(model, x):
    assert not model.training
    return Sampled(model(x).square().sum(), None)


@pytest.mark.parametrize("fails", [False, True])
def test_measuring_leaves_no_trace(fails):
    model, x = Noisy(fails), torch.randn(6, 3)
    model.one.weight.grad = torch.full_like(model.one.weight, 7.0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    if fails:
        with pytest.raises(RuntimeError, match="as asked"):
            measure(model, lambda: [x], ALL, sampled_loss=squares)
    else:
        assert measure(model, lambda: [x], ALL, sampled_loss=squares).names == (
            "one.weight", "one.bias", "two.weight", "two.bias",
        )  # fmt: skip
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(model.one.weight.grad, torch.full_like(model.one.weight, 7.0))
    assert [p.grad is None for p in (model.one.bias, model.two.weight, model.two.bias)] == [True] * 3
    assert (model.training, model.dropout.training, model.one.training) == (True, False, True)
    assert not any(module._forward_hooks for module in model.modules())


# --- sharded ---------------------------------------------------------------------------------------------


def _sharded(rank, world_size, group):
    def total(sums):
        if group is not None:
            torch.distributed.all_reduce(sums, group=group)
        return sums

    rows = StepRows.of(make_batch(rows=4, seed=9))
    parts = [rows.part(n, n + 1) for n in range(rank, 4, world_size)]
    run = ranks.Run("fsdp" if group else "plain", rank, world_size)
    found = measure(run.bare, lambda: parts, total=total)
    part = rows.part(rank * 4 // world_size, (rank + 1) * 4 // world_size)
    grads = gradients(run.bare, part, global_targets=rows.num_targets, replicas=world_size)
    grads = {name: grads[name] for name in found.names}
    out = found.precondition(grads)
    shapes = [(out[name].shape, grads[name].shape) for name in grads]
    if group is not None:
        both: list[tuple[Any, Any]] = [(out[name], grads[name]) for name in grads]
        shapes += [(one.to_local().shape, other.to_local().shape) for one, other in both]
    run.bare.zero_grad()
    untouched = ranks.Run("fsdp" if group else "plain", rank, world_size)
    if group is None:
        return {name: ranks._whole(value) for name, value in out.items()}, shapes, []
    odd = ranks.differences(untouched.train(2).state(), run.train(2).state())
    return {name: ranks._whole(value) for name, value in out.items()}, shapes, odd


def test_sharded_models_are_measured_and_their_gradients_preconditioned():
    wanted, _, _ = _sharded(0, 1, None)
    for answer in ranks.run(_sharded, 2):
        assert isinstance(answer, tuple), answer
        got, shapes, odd = answer
        assert all(one == other for one, other in shapes)
        assert odd == []  # of the steps after it
        for name, value in wanted.items():
            np.testing.assert_allclose(got[name], value, rtol=2e-3, atol=2e-3 * float(np.abs(value).max()))


# --- rows ------------------------------------------------------------------------------------------------


def test_rows_follow_the_weights_and_are_shared_by_ranks(tmp_path):
    rows = make_corpus(tmp_path / "train", {"a": 50, "b": 30, "c": 2}).by_source
    weights = np.array([0.5, 0.25, 0.25])

    def seen(**how):
        found = list(choose_batches(rows, weights, 12, batch_rows=2, **how))
        return [list(zip(one.domain_b.tolist(), one.row_b.tolist(), strict=True)) for one in found]

    alone = [row for batch in seen() for row in batch]
    assert np.bincount([domain for domain, _ in alone]).tolist()[2] == 2  # all that it has
    assert len(set(alone)) == len(alone) == 12
    assert np.bincount([domain for domain, _ in alone]).tolist() == [7, 3, 2]
    shared = [seen(rank=rank, world_size=4) for rank in range(4)]
    assert [len(one) for one in shared] == [2] * 4
    assert sorted(row for one in shared for batch in one for row in batch) == sorted(alone)
    assert seen() == seen()
    assert seen(probe=1) != seen()
    assert seen(seed=1) != seen()


# --- options, and what is refused -------------------------------------------------------------------------


def test_layers_are_found_by_the_names_of_their_parameters():
    model = tiny(tied=False)
    every = {name for name, p in model.named_parameters() if name.startswith("layers.") and p.ndim == 2}
    assert {name for layer in find_layers(model) for name in layer.parameters} == every
    only = find_layers(model, ("*.mlp.up.*", "*.1.mlp.output.weight"))
    assert [layer.name for layer in only] == ["layers.0.mlp.up", "layers.1.mlp.up", "layers.1.mlp.output"]
    noisy = Noisy()
    assert find_layers(noisy, ("one.weight",))[0] == ("one", 4, 3, False)
    assert find_layers(noisy, ("one.*",))[0] == ("one", 4, 4, True)
    assert [CurvatureOptions(refresh=3).due(probe) for probe in range(5)] == [True, False, False, True, False]


def test_what_cannot_be_is_refused():
    model, (rows, _) = tiny(**SMALL), rows_of()
    for wrong, text in [
        ({"rows": 0}, r"rows=0; it must be at least 1"),
        ({"refresh": 0}, r"refresh=0"),
        ({"damping": 0.0}, r"damping=0\.0; it must be positive and finite"),
        ({"damping": float("nan")}, r"damping=nan"),
    ]:
        with pytest.raises(ConfigError, match=text):
            CurvatureOptions(**wrong)
    with pytest.raises(ConfigError, match=r"layers=\['none'\] leaves no linear layer that is trained"):
        find_layers(model, ("none",))
    with pytest.raises(ConfigError, match=r"embedding\.weight, layers\.0\..* cannot have a curvature: layers=\['\*'\]"):
        find_layers(model, ("*",))
    with pytest.raises(ConfigError, match=r"one\.bias cannot have a curvature"):
        find_layers(Noisy(), ("one.bias", "two.*"))
    untied = tiny(**SMALL, tied=False)  # its head is multiplied, not called
    with pytest.raises(ConfigError, match=r"layers head were not called just once in a pass"):
        measure(untied, lambda: [rows], CurvatureOptions(layers=("head.weight",)))
    found = measure(model, lambda: [rows], CurvatureOptions(layers=("*.up.weight",)))
    grads = gradients(model, rows)
    with pytest.raises(ConfigError, match=r"parameters embedding\.weight, .* have no curvature; covered are 2"):
        found.precondition(grads)
    with pytest.raises(ConfigError, match=r"sums of shape \(3,\); needed"):
        Curvature.of_covariances(found.layers, torch.zeros(3))
    with pytest.raises(ConfigError, match=r"sums of shape \(3,\); needed"):
        found.refined(torch.zeros(3))
    with pytest.raises(SignalError, match=r"layer layers\.0\.mlp\.up have 0 places and 0 numbers"):
        measure(model, lambda: [StepRows.nothing(12, "cpu")], CurvatureOptions(layers=("*.up.weight",)))
    kept = {name: value for name, value in found.tensors().items() if not name.endswith("up/moment_oi")}
    with pytest.raises(CheckpointError, match=r"lack layers\.0\.mlp\.up/moment_oi, layers\.1.* of 2 layers"):
        Curvature.from_tensors(found.layers, kept, CurvatureOptions())
    sums = measure_covariances(model, found.layers, [rows], of_rows(0))
    sums[3] = torch.nan
    with pytest.raises(SignalError, match=r"and 1 numbers that are not finite"):
        Curvature.of_covariances(found.layers, sums)
    noisy = Noisy()
    both = measure(noisy, lambda: [torch.randn(6, 3)], ALL, sampled_loss=squares)
    with pytest.raises(ConfigError, match=r"of layer one only one\.weight was given"):
        both.precondition({"one.weight": torch.zeros(4, 3)})


def test_a_layer_without_curvature_gives_nothing():
    model = Noisy()
    nn.init.zeros_(model.two.weight)
    found = measure(model, lambda: [torch.randn(6, 3)], ALL, sampled_loss=squares)
    out = found.precondition({"one.weight": torch.zeros(4, 3), "one.bias": torch.zeros(4)})
    assert all(torch.equal(value, torch.zeros_like(value)) for value in out.values())
