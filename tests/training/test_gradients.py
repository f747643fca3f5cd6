"""Gradients beside the step's: of the right weights, in the metric, and in few numbers that keep inner products."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed.tensor import Partial, Replicate, Shard

from mixer.core.errors import ConfigError
from mixer.core.permute import key_of
from mixer.training.gradients import CountSketch, Kept, Piece, adam_scales, choose_pieces, probing, sum_gradient
from mixer.training.optimizer import OptimizerOptions, make_optimizer, set_rate
from mixer.training.step import DomainLosses, StepRows
from tests.training.making import make_batch, tiny

MATRICES = ["attention.query", "attention.key", "attention.value", "attention.output", "mlp.gate", "mlp.up"]


def names(model, layers=()):
    return [piece.name for piece in choose_pieces(model, layers)]


# --- of which weights ---------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
def test_by_default_the_matrices_of_the_blocks(tied):
    expected = {f"layers.{n}.{part}.weight" for n in range(2) for part in [*MATRICES, "mlp.output"]}
    assert set(names(tiny(tied=tied))) == expected
    assert len(names(tiny(tied=tied))) == len(expected)


def test_embeddings_inside_of_blocks_and_frozen_weights_are_left_out():
    block = nn.ModuleDict({"bias": nn.Embedding(4, 2), "in": nn.Linear(2, 3), "norm": nn.LayerNorm(3)})
    model = nn.ModuleDict({"h": nn.ModuleList([block]), "head": nn.Linear(3, 4)})
    assert names(model) == ["h.0.in.weight"]
    block["in"].weight.requires_grad_(False)
    with pytest.raises(ConfigError, match=r"no matrix in a numbered block; it has h\.0\.bias\.weight, h\.0\.in\.bias"):
        names(model)


def test_layers_are_chosen_by_name():
    model = tiny(tied=False)
    assert names(model, ["head.*", "*.mlp_norm.*"]) == [
        "layers.0.mlp_norm.weight",
        "layers.1.mlp_norm.weight",
        "head.weight",
    ]
    with pytest.raises(ConfigError, match=r"layers: 'heads\.\*' matches no parameter that is trained\. There are emb"):
        names(model, ["*", "heads.*"])


class Sharded(nn.Parameter):
    """A parameter as it is laid out over a mesh: its shape, and this rank's rows of it."""

    def laid_out(self, placements, mesh, coordinate, rows):
        self.placements, self._rows = placements, rows
        self.device_mesh = type("Mesh", (), {"shape": mesh, "get_coordinate": lambda _: coordinate})()
        return self

    def to_local(self):
        return self.data[: self._rows]


def laid_out(*layout):
    model = nn.ModuleList([nn.Linear(3, 7, bias=False)])
    model[0].weight = Sharded(torch.zeros(7, 3)).laid_out(*layout)
    (piece,) = choose_pieces(model)
    return piece.begin, piece.size, piece.counts


def test_shards_know_where_they_lie():
    rows = Shard(0)
    assert [laid_out((rows,), (4,), (rank,), size) for rank, size in enumerate([2, 2, 2, 1])] == [
        (0, 6, True),
        (6, 6, True),
        (12, 6, True),
        (18, 3, True),
    ]
    assert [laid_out((rows,), (6,), (rank,), size) for rank, size in [(3, 1), (4, 0), (5, 0)]] == [
        (18, 3, True),
        (21, 0, True),
        (21, 0, True),
    ]
    copies = Replicate()
    assert laid_out((copies, rows), (2, 2), (0, 1), 3) == (12, 9, True)
    assert laid_out((copies, rows), (2, 2), (1, 1), 3) == (12, 9, False)
    assert laid_out((copies,), (3,), (2,), 7) == (0, 21, False)
    for placements in [(Shard(1), copies), (rows, rows), (Partial(), rows)]:
        with pytest.raises(ConfigError, match=r"0\.weight is laid out as .*replicated, or cut once along their rows"):
            laid_out(placements, (2, 2), (0, 0), 2)


def test_a_weight_that_is_whole_in_a_sharded_model_is_refused():
    model = nn.ModuleList([nn.Linear(3, 7, bias=False), nn.Linear(3, 7, bias=False)])
    model[0].weight = Sharded(torch.zeros(7, 3)).laid_out((Shard(0),), (2,), (0,), 4)
    with pytest.raises(ConfigError, match=r"1\.weight is whole on every rank of a model that is sharded"):
        choose_pieces(model)
    assert len(choose_pieces(model, ["0.*"])) == 1


# --- gradients ----------------------------------------------------------------------------------------


def test_the_gradient_is_that_of_summed_losses_and_leaves_nothing():
    model = tiny(num_layers=1)
    rows = StepRows.of(make_batch(rows=4, domains=1))
    out = model(rows.tokens_bs, rows.documents, rows.target_bs)
    out.loss_bs.sum().backward()
    pieces = choose_pieces(model)
    expected = {piece.name: torch.clone(piece.parameter.grad) for piece in pieces}  # pyright: ignore
    before = {name: parameter.grad for name, parameter in model.named_parameters()}
    called, losses = [], DomainLosses(1)
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda _: called.append(1))
    draws = torch.get_rng_state()
    with probing(model, "cpu", "float32"):
        found = sum_gradient(model, pieces, [rows.part(0, 1), rows.part(1, 4)], losses, 1)
        torch.rand(3)
    assert list(found) == [piece.name for piece in pieces]
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-5)
    assert not called
    assert all(parameter.grad is before[name] for name, parameter in model.named_parameters())
    assert torch.equal(torch.get_rng_state(), draws)
    assert losses.sums[1].tolist() == [rows.num_targets]
    assert losses.sums[2].tolist() == [4]


def test_dropout_is_off_and_then_as_it_was():
    model = nn.ModuleList([nn.Dropout(), nn.Dropout().eval(), nn.Linear(1, 1)])
    with probing(model, "cpu", "float32"):
        assert [part.training for part in model] == [False, False, True]
    assert [part.training for part in model] == [True, False, True]


def test_a_row_without_a_usable_loss_makes_the_gradient_nan():
    model = tiny(num_layers=1)
    with torch.no_grad():
        model.embedding.weight[7] = torch.nan
    batch = make_batch(rows=2, domains=1)
    batch.tokens[0] = 7
    batch.tokens[1] = 8
    losses = DomainLosses(1)
    with probing(model, "cpu", "float32"):
        found = sum_gradient(model, choose_pieces(model), [StepRows.of(batch)], losses, 1)
    assert all(gradient.isnan().all() for gradient in found.values())
    assert losses.sums[3].tolist() == [2]  # the logits of all words are NaN


# --- the adam metric ----------------------------------------------------------------------------------


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(2, 1, bias=False), nn.Linear(1, 1, bias=False)])

    def rate_scales(self):
        return {"layers.0.weight": 1.0, "layers.1.weight": 0.25}


def test_adam_scales_by_hand():
    model = Two()
    optimizer = make_optimizer(model, OptimizerOptions(beta2=0.75, eps=0.5, fused=False))
    pieces = choose_pieces(model)
    assert adam_scales(pieces, optimizer) is None
    for gradients in [([[2.0, 0.0]], [[4.0]]), ([[6.0, 0.0]], [[0.0]])]:
        for piece, gradient in zip(pieces, gradients, strict=True):
            piece.parameter.grad = torch.tensor(gradient)
        set_rate(optimizer, 0.1)
        optimizer.step()
    # v = .75 (.25 * 4) + .25 * 36 = 9.75, and 3 for the other; divided by 1 - .75^2 = .4375. Without any gradient: 0.
    scales = adam_scales(pieces, optimizer)
    assert scales is not None
    first = 1 / ((9.75 / 0.4375) ** 0.5 + 0.5)
    second = 0.25 / ((3.0 / 0.4375) ** 0.5 + 0.5)
    np.testing.assert_allclose(scales["layers.0.weight"].numpy() ** 2, [first, 0.0], rtol=1e-6)
    np.testing.assert_allclose(scales["layers.1.weight"].numpy() ** 2, [second], rtol=1e-6)


def test_adam_scales_are_those_of_the_next_step():
    """Along any direction, AdamW without momentum divides by what the scales are the inverse square of."""
    model = Two().double()
    optimizer = make_optimizer(model, OptimizerOptions(beta1=0.0, beta2=1 - 1e-12, weight_decay=0.0, fused=False))
    pieces = choose_pieces(model)
    for piece in pieces:
        piece.parameter.grad = torch.full_like(piece.parameter, 3.0)
    set_rate(optimizer, 0.5)
    optimizer.step()
    scales = adam_scales(pieces, optimizer)
    assert scales is not None
    before = [piece.parameter.detach().clone() for piece in pieces]
    for piece in pieces:
        piece.parameter.grad = torch.full_like(piece.parameter, 0.01)
        optimizer.state[piece.parameter]["step"] -= 1  # so that the moments stay what they were
    optimizer.step()
    for piece, old in zip(pieces, before, strict=True):
        moved = (old - piece.parameter).flatten()
        torch.testing.assert_close(moved, 0.5 * 0.01 * scales[piece.name] ** 2, rtol=1e-4, atol=0.0)


def test_an_optimizer_without_second_moments_is_refused():
    model = Two()
    sgd = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.raises(ConfigError, match=r"metric adam: SGD keeps no second moments of layers\.0\.weight\. Train it"):
        adam_scales(choose_pieces(model), sgd)


# --- exact products -----------------------------------------------------------------------------------


def test_products_of_kept_gradients(monkeypatch):
    monkeypatch.setattr("mixer.training.gradients.CHUNK", 7)
    pieces = choose_pieces(Two())
    kept = Kept(pieces, 2)
    kept.put(0, [torch.tensor([1.0, 2.0]), torch.tensor([3.0])])
    kept.put(1, [torch.tensor([0.0, 1.0]), torch.tensor([1.0])])
    kept.put(1, [torch.tensor([1.0, 0.0]), torch.tensor([1.0])])
    assert kept.products([torch.tensor([1.0, 10.0]), torch.tensor([100.0])]).tolist() == [321.0, 211.0]
    assert kept.gram().tolist() == [[14.0, 9.0], [9.0, 6.0]]


def test_copies_are_counted_once():
    copy = [Piece(piece.name, piece.parameter, 0, piece.size, False) for piece in choose_pieces(Two())]
    gradient = [torch.tensor([1.0, 2.0]), torch.tensor([3.0])]
    kept = Kept(copy, 1)
    kept.put(0, gradient)
    assert kept.gram().tolist() == [[0.0]]
    sums = torch.zeros(8, dtype=torch.float64)
    CountSketch(8, 0).add_gradient(sums, copy, gradient)
    assert not sums.any()


# --- sketches -----------------------------------------------------------------------------------------


def sketch(flat, *, width=32, seed=0, name="a", begin=0):
    sums = torch.zeros(width, dtype=torch.float64)
    CountSketch(width, seed).add(sums, name, torch.as_tensor(flat), begin)
    return sums.numpy()


def by_definition(flat, width, seed, name):
    """Element by element, in whole numbers."""

    def hashed(what, number):
        x = (key_of("sketch", what, seed, name) + (number + 1) * 0x9E3779B97F4A7C15) % 2**64
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
        return x ^ (x >> 31)

    sums = np.zeros(width)
    for number, value in enumerate(flat.tolist()):
        sign = 1 - 2 * (hashed("sign", number // 64) >> (number % 64) & 1)
        sums[(number + (hashed("place", number // width) >> 1)) % width] += sign * value
    return sums


@pytest.mark.parametrize("width", [1, 7, 32, 100, 5000])
def test_places_and_signs_are_as_defined(width, monkeypatch):
    monkeypatch.setattr("mixer.training.gradients.CHUNK", 300)
    flat = torch.from_numpy(np.random.default_rng(0).normal(size=1234))
    np.testing.assert_allclose(sketch(flat, width=width, seed=3), by_definition(flat, width, 3, "a"), atol=1e-12)


def test_pieces_add_up_wherever_they_are_cut():
    rng = np.random.default_rng(1)
    flat = torch.from_numpy(rng.normal(size=1000))
    whole = sketch(flat)
    for _ in range(20):
        cuts = [0, *sorted(rng.integers(0, 1000, 3).tolist()), 1000]
        parts = [sketch(flat[a:b], begin=a) for a, b in pairwise(cuts)]
        np.testing.assert_allclose(sum(parts), whole, atol=1e-12)
    assert np.abs(sketch(flat, name="b") - whole).max() > 1
    assert np.abs(sketch(flat, seed=1) - whole).max() > 1


@pytest.mark.parametrize("shape", ["dense", "columns", "few"])
def test_inner_products_are_right_on_average_with_the_variance_of_the_formula(shape):
    rng, size, width, trials = np.random.default_rng(2), 2048, 16, 1500
    x = rng.normal(size=size)
    if shape == "columns":  # as of a matrix with few rows that matter, at the sketch's own distance
        x *= np.arange(size) % width == 3
    if shape == "few":
        x *= rng.random(size) < 0.02
    y = 0.5 * x + rng.normal(size=size) * (x != 0)
    found = np.array([sketch(x, width=width, seed=seed) @ sketch(y, width=width, seed=seed) for seed in range(trials)])
    variance = ((x @ x) * (y @ y) + (x @ y) ** 2 - 2 * (x * x) @ (y * y)) / width
    assert abs(found.mean() - x @ y) < 4 * (variance / trials) ** 0.5
    assert 0.8 * variance < found.var() < 1.2 * variance


def test_a_gradient_that_fits_is_kept_exactly():
    rng = np.random.default_rng(3)
    x, y = rng.normal(size=(2, 40))
    assert sketch(x, width=64) @ sketch(y, width=64) == pytest.approx(x @ y, abs=1e-12)
    with pytest.raises(ConfigError, match="sketch_width=0"):
        CountSketch(0, 0)
