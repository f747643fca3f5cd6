"""The decoder against a naive one written out, and what it promises about documents, widths and counts."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from mixer.core.errors import ConfigError
from mixer.training.model import (
    IGNORED,
    Decoder,
    DecoderOptions,
    Documents,
    Mup,
    TokenLosses,
    attention_mask,
    find_documents,
    token_losses,
)
from mixer.training.optimizer import OptimizerOptions, RateOptions, make_optimizer
from mixer.training.step import StepRows
from tests.training.making import VOCAB, farthest, gradients, make_batch, tiny


def documents_of(batch: Any) -> Documents:
    return find_documents(batch.starts, batch.starts_offsets, batch.length, batch.tokens.shape[1])


# --- documents ----------------------------------------------------------------------------------------


def test_documents_by_hand() -> None:
    batch = make_batch(3, 8, starts=[[0, 3], [2], []], length=[8, 5, 7])
    document, position = documents_of(batch)
    assert document.tolist() == [[1, 1, 1, 2, 2, 2, 2, 2], [0, 0, 1, 1, 1, 2, 2, 2], [0] * 7 + [1]]
    assert position.tolist() == [[0, 1, 2, 0, 1, 2, 3, 4], [0, 1, 0, 1, 2, 0, 1, 2], [0, 1, 2, 3, 4, 5, 6, 0]]


def test_the_mask_by_hand() -> None:
    batch = make_batch(1, 4, starts=[[0, 2]], length=[4])
    seen = attention_mask(documents_of(batch))
    assert seen.shape == (1, 1, 4, 4)
    assert seen[0, 0].int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]


@pytest.mark.parametrize("attention", ["sdpa", "flex"])
@pytest.mark.parametrize("positions", ["document", "row"])
@pytest.mark.filterwarnings("ignore:flex_attention called without")
@torch.no_grad()
def test_another_documents_tokens_change_nothing(attention: Any, positions: Any) -> None:
    model = tiny(attention=attention, positions=positions)
    batch = make_batch(2, 16, starts=[[0, 5, 11], [4, 9]], length=[16, 13])
    documents = documents_of(batch)
    tokens = torch.tensor(batch.tokens)
    before = model(tokens, documents)
    for row, begin, end in [(0, 0, 5), (0, 5, 11), (0, 11, 16), (1, 0, 4), (1, 4, 9), (1, 9, 13), (1, 13, 16)]:
        changed = tokens.clone()
        changed[row, begin:end] = (changed[row, begin:end] + 1) % VOCAB
        after = model(changed, documents)
        inside = torch.zeros(2, 16, dtype=torch.bool)
        inside[row, begin:end] = True
        assert torch.equal(after[~inside], before[~inside]), f"row {row}, document {begin} to {end} leaks"
        assert not torch.isclose(after[inside], before[inside]).all(-1).any()


@torch.no_grad()
def test_later_tokens_change_nothing_and_without_documents_all_earlier_ones_are_seen() -> None:
    model = tiny()
    tokens = torch.tensor(make_batch(1, 12).tokens)
    before = model(tokens)
    changed = tokens.clone()
    changed[0, 5] = (changed[0, 5] + 1) % VOCAB
    after = model(changed)
    assert torch.equal(after[0, :5], before[0, :5])
    assert not torch.isclose(after[0, 5:], before[0, 5:]).all(-1).any()


@torch.no_grad()
def test_a_document_is_read_alike_wherever_it_stands_when_positions_start_anew() -> None:
    batch = make_batch(1, 16, starts=[[0, 6]], length=[16])
    alone = torch.tensor(batch.tokens)[:, 6:]
    # A shift by whole positions turns queries and keys alike, so row positions agree too: to rounding only.
    for positions, far in [("document", 1e-6), ("row", 1e-4)]:
        model = tiny(positions=positions)
        packed = model(torch.tensor(batch.tokens), documents_of(batch))[:, 6:]
        torch.testing.assert_close(packed, model(alone), rtol=0, atol=far)


def test_flex_attention_gives_what_sdpa_gives() -> None:
    batch = make_batch(3, 32)
    with torch.no_grad():
        logits = [tiny(attention=kind)(torch.tensor(batch.tokens), documents_of(batch)) for kind in ("sdpa", "flex")]
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-5, atol=1e-5)


# --- against a naive decoder --------------------------------------------------------------------------


def naive(model: Decoder, tokens: list[int], position: list[int], document: list[int]) -> Tensor:
    """One row in float64, head by head and position by position, as the formulae are written."""
    options = model.options
    w = {name: value.detach().double() for name, value in model.named_parameters()}
    size, head, half = len(tokens), options.head_size, options.head_size // 2

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return torch.stack([v / torch.sqrt((v * v).mean() + options.norm_eps) * weight for v in x])

    def turn(v: Tensor, at: int) -> Tensor:
        out = v.clone()
        for e in range(half):
            angle = at * options.rope_base ** (-2 * e / head)
            cos, sin = math.cos(angle), math.sin(angle)
            out[e], out[e + half] = v[e] * cos - v[e + half] * sin, v[e + half] * cos + v[e] * sin
        return out

    x = w["embedding.weight"][tokens]
    for number in range(options.num_layers):
        at = f"layers.{number}."
        y = norm(x, w[at + "attention_norm.weight"])
        out = torch.zeros(size, options.num_heads * head, dtype=torch.float64)
        for h in range(options.num_heads):
            g = h // (options.num_heads // options.kv_heads)
            rows = slice(h * head, (h + 1) * head)
            shared = slice(g * head, (g + 1) * head)
            query = [turn(w[at + "attention.query.weight"][rows] @ v, p) for v, p in zip(y, position, strict=True)]
            key = [turn(w[at + "attention.key.weight"][shared] @ v, p) for v, p in zip(y, position, strict=True)]
            value = [w[at + "attention.value.weight"][shared] @ v for v in y]
            for i in range(size):
                seen = [j for j in range(i + 1) if document[j] == document[i]]
                score = torch.stack([query[i] @ key[j] for j in seen]) * options.attention_scale
                share = torch.exp(score) / torch.exp(score).sum()
                out[i, rows] = sum(s * value[j] for s, j in zip(share, seen, strict=True))
        x = x + out @ w[at + "attention.output.weight"].T
        y = norm(x, w[at + "mlp_norm.weight"])
        gate = y @ w[at + "mlp.gate.weight"].T
        x = x + (gate * torch.sigmoid(gate) * (y @ w[at + "mlp.up.weight"].T)) @ w[at + "mlp.output.weight"].T
    output = w["embedding.weight"] if options.tied else w["head.weight"]
    return (norm(x, w["norm.weight"]) * model.logit_scale @ output.T)[:, : model.vocab_size]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_kv_heads": 1, "tied": False, "positions": "row"},
        {"num_kv_heads": 4, "head_dim": 6, "mlp_dim": 20},
        {"mup": Mup(base_dim=16, base_head_dim=4, output_multiplier=3.0)},
    ],
)
@torch.no_grad()
def test_the_formulae_written_out(options: dict[str, Any]) -> None:
    model = tiny(**options)
    batch = make_batch(1, 11, starts=[[0, 4]], length=[9])
    documents = documents_of(batch)
    position = list(range(11)) if model.options.positions == "row" else documents.position_bs[0].tolist()
    expected = naive(model, batch.tokens[0].tolist(), position, documents.document_bs[0].tolist())
    got = model(torch.tensor(batch.tokens), documents)[0].double()
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


# --- losses -------------------------------------------------------------------------------------------


def test_losses_by_hand() -> None:
    logits = torch.log(torch.tensor([[[1.0, 2.0, 5.0], [2.0, 2.0, 4.0], [9.0, 9.0, 9.0]]]))
    loss, log_z = token_losses(logits, torch.tensor([[1, 0, IGNORED]]))
    torch.testing.assert_close(loss, torch.tensor([[math.log(4), math.log(4), 0.0]]))
    torch.testing.assert_close(log_z, torch.tensor([[math.log(8), math.log(8), 0.0]]))


def test_losses_are_the_cross_entropy_of_the_logits() -> None:
    model = tiny()
    rows = StepRows.of(make_batch())
    logits = model(rows.tokens_bs, rows.documents)
    assert logits.shape == (6, 24, VOCAB)  # those that fill up the embeddings are left out
    expected = F.cross_entropy(logits.transpose(1, 2), rows.target_bs, ignore_index=IGNORED, reduction="none")
    torch.testing.assert_close(model(rows.tokens_bs, rows.documents, rows.target_bs).loss_bs, expected)


@pytest.mark.parametrize("options", [{"recompute": True}, {"loss_positions": 7}, {"loss_positions": 24}])
def test_what_saves_memory_gives_equal_gradients(options: dict[str, Any]) -> None:
    rows = StepRows.of(make_batch())
    expected = gradients(tiny(), rows)
    got = gradients(tiny(**options), rows)
    if "recompute" in options:
        assert all(torch.equal(got[name], expected[name]) for name in expected)
    assert farthest(got, expected) < 1e-6


def kept_for_the_backward_pass(**options: Any) -> list[tuple[int, ...]]:
    """The shapes of all tensors that a forward pass keeps."""
    shapes: list[tuple[int, ...]] = []

    def keep(tensor: Tensor) -> Tensor:
        shapes.append(tuple(tensor.shape))
        return tensor

    rows = StepRows.of(make_batch())
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        tiny(**options)(rows.tokens_bs, rows.documents, rows.target_bs)
    return shapes


def test_recomputing_keeps_no_activations_of_layers() -> None:
    plain, recomputed = (
        sum(map(math.prod, kept_for_the_backward_pass(num_layers=6, recompute=on))) for on in (False, True)
    )
    assert recomputed < plain / 3


def test_losses_by_parts_keep_no_logits() -> None:
    assert (6, 24, VOCAB) in kept_for_the_backward_pass()
    assert not [shape for shape in kept_for_the_backward_pass(loss_positions=8) if shape[-1:] == (VOCAB,)]


# --- making -------------------------------------------------------------------------------------------


def test_weights_depend_on_seed_and_name_only() -> None:
    few, many, other = tiny(), tiny(num_layers=4), tiny(seed=1)
    shared = dict(many.named_parameters())
    for name, value in few.named_parameters():
        if name.endswith("output.weight"):  # narrower by the root of the number of layers
            torch.testing.assert_close(value, shared[name] * math.sqrt(2))
        else:
            assert torch.equal(value, shared[name]), name
    assert not torch.equal(few.embedding.weight, other.embedding.weight)


def test_initial_spread() -> None:
    model = tiny(dim=128, num_layers=2, init_std=0.02, tied=False)
    expected = dict.fromkeys(("embedding.weight", "head.weight", "layers.0.attention.query.weight"), 0.02)
    expected |= dict.fromkeys(("layers.1.attention.output.weight", "layers.1.mlp.output.weight"), 0.01)
    for name, value in model.named_parameters():
        if name in expected:
            assert float(value.detach().std()) == pytest.approx(expected[name], rel=0.05), name
        if value.ndim == 1:
            assert torch.equal(value, torch.ones_like(value))


def test_a_model_made_on_meta_becomes_the_same() -> None:
    with torch.device("meta"):
        model = tiny()
    model.to_empty(device="cpu")
    model.initialise(0)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), tiny().parameters(), strict=True))


@pytest.mark.parametrize(("tied", "expected"), [(True, 64 * 32), (False, 2 * 64 * 32)])
def test_counts_by_hand(tied: bool, expected: int) -> None:
    model = tiny(tied=tied, mlp_dim=48)
    layer = 32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 48
    assert model.num_parameters == expected + 2 * (layer + 2 * 32) + 32
    assert model.flops_per_token(100) == 6 * (2 * layer + 64 * 32) + 12 * 2 * 32 * 100


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_kv_heads": 3}, "num_heads=4 is no multiple of num_kv_heads=3"),
        ({"dim": 30}, "dim=30 is no multiple of num_heads=4. Change one, or set head_dim"),
        ({"head_dim": 7}, "heads are 7 wide; rotary positions need an even number"),
        ({"num_layers": 0}, "num_layers=0; it must be at least 1"),
        ({"loss_positions": 0}, "loss_positions=0"),
        ({"init_std": 0.0}, "must be positive"),
    ],
)
def test_shapes_that_cannot_be_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DecoderOptions(**options)
    with pytest.raises(ConfigError, match="All must be"):
        Mup(base_dim=0)


@pytest.mark.parametrize("options", [{"loss_positions": 12, "recompute": True}, {"attention": "flex"}])
def test_the_whole_model_is_one_graph(options: dict[str, Any]) -> None:
    torch.compiler.reset()
    model = tiny(num_layers=1, **options)
    rows = StepRows.of(make_batch())
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.set_grad_enabled(options.get("attention") != "flex"):
        got: TokenLosses = compiled(rows.tokens_bs, rows.documents, rows.target_bs)
        expected: TokenLosses = model(rows.tokens_bs, rows.documents, rows.target_bs)
        torch.testing.assert_close(got.loss_bs, expected.loss_bs)
    if got.loss_bs.requires_grad:
        got.loss_bs.sum().backward()
        assert model.embedding.weight.grad is not None


def test_flex_attention_trains_on_a_cpu_as_sdpa() -> None:
    rows = StepRows.of(make_batch())
    assert farthest(gradients(tiny(attention="flex"), rows), gradients(tiny(), rows)) == 0


# --- muP ----------------------------------------------------------------------------------------------


def test_mup_at_the_base_width_is_the_standard_parametrization() -> None:
    plain = tiny()
    scaled = tiny(mup=Mup(base_dim=32, base_head_dim=8))
    rows = StepRows.of(make_batch())
    assert set(scaled.rate_scales().values()) == {1.0}
    got, expected = gradients(scaled, rows), gradients(plain, rows)
    assert farthest(got, expected) < 1e-6


def test_mup_scales_by_hand() -> None:
    model = tiny(dim=128, mup=Mup(base_dim=32, base_head_dim=8), tied=False)
    assert model.logit_scale == 0.25
    assert model.options.attention_scale == math.sqrt(8) / 32
    scales = model.rate_scales()
    slow = {name for name, scale in scales.items() if scale == 0.25}
    assert slow == {name for name, p in model.named_parameters() if name.startswith("layers.") and p.ndim == 2}
    assert all(scale == 1.0 for name, scale in scales.items() if name not in slow)
    spread = {key: float(weight.std()) for key, weight in model.state_dict().items()}
    assert spread["layers.0.mlp.gate.weight"] == pytest.approx(0.1 / 2, rel=0.05)
    assert spread["embedding.weight"] == pytest.approx(0.1, rel=0.05)


def coordinates(dim: int, mup: Mup | None, steps: int = 3) -> dict[str, float]:
    """By how much, root mean square, what a model computes has moved after some updates."""
    options = DecoderOptions(dim=dim, num_layers=2, num_heads=dim // 16, init_std=0.05, mup=mup, tied=False)
    model = Decoder(options, VOCAB)
    optimizer = make_optimizer(model, OptimizerOptions(rate=RateOptions(peak=0.01), weight_decay=0.0))
    rows = StepRows.of(make_batch(4, 24))
    seen: dict[str, Tensor] = {}

    def look() -> dict[str, Tensor]:
        with torch.no_grad():
            logits = model(rows.tokens_bs, rows.documents)
        return {"logits": logits, **seen}

    def keep(name: str) -> Any:
        return lambda module, given, out: seen.update({name: out.detach()})

    for name in ("layers.0", "layers.1", "layers.1.attention.query"):
        model.get_submodule(name).register_forward_hook(keep(name))
    before = look()
    for param_group in optimizer.param_groups:
        param_group["lr"] = 0.01 * param_group["rate_scale"]
    for _ in range(steps):
        optimizer.zero_grad()
        losses: TokenLosses = model(rows.tokens_bs, rows.documents, rows.target_bs)
        (losses.loss_bs.sum() / rows.num_targets).backward()
        optimizer.step()
    after = look()
    return {name: float((after[name] - before[name]).square().mean().sqrt()) for name in before}


def test_coordinate_check() -> None:
    """With muP what the layers compute moves by the same amount at any width; without, by more and more."""
    widths = [64, 128, 256, 512]

    def growth(mup: Mup | None) -> dict[str, float]:
        """By which power of the width movement grows, fitted over the widths."""
        moved = [coordinates(width, mup) for width in widths]
        x = torch.tensor([math.log(width) for width in widths])
        out = {}
        for name in moved[0]:
            y = torch.tensor([math.log(one[name]) for one in moved])
            out[name] = float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())
        return out

    with_mup, without = growth(Mup(base_dim=64, base_head_dim=16)), growth(None)
    assert all(abs(power) < 0.2 for power in with_mup.values()), with_mup
    assert all(power > 0.3 for power in without.values()), without


def test_options_are_plain_values() -> None:
    options = replace(DecoderOptions(), mup=Mup())
    assert options.width_ratio == 1.0
    assert (options.head_size, options.kv_heads, options.mlp_size) == (64, 4, 704)
