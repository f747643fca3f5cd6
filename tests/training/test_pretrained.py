"""Models of the transformers package behind our call: documents apart, losses as ours, weights from the seed."""

import importlib.util
import sys
from typing import Any

import pytest
import torch

from mixer.core.errors import ConfigError
from mixer.training.optimizer import OptimizerOptions, make_optimizer
from mixer.training.pretrained import CausalModel, CausalOptions
from mixer.training.step import DomainLosses, StepOptions, StepRows, train_step
from tests.training.making import VOCAB, farthest, gradients, make_batch

installed = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="the package transformers is not installed"
)
LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.1,
}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "initializer_range": 0.1,
        "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}  # fmt: skip
KINDS = [("llama", LLAMA), ("gpt2", GPT2)]


def made(kind: str, config: dict[str, Any], **options: Any) -> CausalModel:
    return CausalModel(CausalOptions(kind=kind, config=config, **options), VOCAB)


@installed
@pytest.mark.parametrize(("kind", "config"), KINDS)
@torch.no_grad()
def test_another_documents_tokens_change_nothing(kind: str, config: dict[str, Any]) -> None:
    model = made(kind, config)
    rows = StepRows.of(make_batch(1, 16, starts=[[0, 5, 11]], length=[14]))
    before = model(rows.tokens_bs, rows.documents)
    assert before.shape == (1, 16, VOCAB)
    for begin, end in [(0, 5), (5, 11), (11, 14), (14, 16)]:
        changed = rows.tokens_bs.clone()
        changed[0, begin:end] = (changed[0, begin:end] + 1) % VOCAB
        after = model(changed, rows.documents)
        inside = torch.zeros(16, dtype=torch.bool)
        inside[begin:end] = True
        assert torch.equal(after[0, ~inside], before[0, ~inside]), f"document {begin} to {end} leaks"
        assert not torch.isclose(after[0, inside], before[0, inside]).all(-1).any()


@installed
@pytest.mark.parametrize(("kind", "config"), KINDS)
def test_it_trains_in_our_step(kind: str, config: dict[str, Any]) -> None:
    rows = StepRows.of(make_batch(4))
    whole = gradients(made(kind, config), rows)
    for recompute in (False, True):
        assert farthest(gradients(made(kind, config, recompute=recompute), rows, micro_batches=3), whole) < 1e-6
    model = made(kind, config)
    assert len(model.layers) == 2
    optimizer = make_optimizer(model, OptimizerOptions())
    got = []
    for precision in ("float32", "float32", "bfloat16"):
        options = StepOptions(precision=precision)
        result = train_step(model, optimizer, rows, DomainLosses(3), rate=0.01, clip_norm=1.0,
                            global_targets=rows.num_targets, options=options)  # fmt: skip
        got.append(result.loss.item())
    assert got[0] > got[1] > got[2]


@installed
def test_counts_by_hand() -> None:
    model = made("llama", LLAMA)
    layer = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48
    assert model.flops_per_token(10) == 6 * (2 * layer + VOCAB * 32) + 12 * 2 * 32 * 10
    assert model.num_parameters == 2 * (layer + 2 * 32) + 2 * VOCAB * 32 + 32


@installed
def test_the_seed_decides_and_the_programs_own_random_state_is_left_alone() -> None:
    options = CausalOptions(kind="llama", config=LLAMA)
    torch.manual_seed(5)
    one = CausalModel(options, VOCAB, seed=1)
    after = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(after, torch.rand(1))
    same, other = CausalModel(options, VOCAB, seed=1), CausalModel(options, VOCAB, seed=2)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), same.parameters(), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


@installed
def test_what_it_has_not_is_refused(tmp_path: Any) -> None:
    with pytest.raises(ConfigError, match=r"no causal model for 'lama'"):
        CausalModel(CausalOptions(kind="lama"), VOCAB)
    with pytest.raises(ConfigError, match=r"no causal model for '.*nowhere'"):
        CausalModel(CausalOptions(name=str(tmp_path / "nowhere")), VOCAB)
    with pytest.raises(ConfigError, match="the model has 7 tokens, the corpus 61"):
        made("llama", LLAMA | {"vocab_size": 7})


@installed
def test_weights_of_a_folder_are_loaded(tmp_path: Any) -> None:
    model = CausalModel(CausalOptions(kind="llama", config=LLAMA), VOCAB, seed=3)
    model.model.save_pretrained(tmp_path)
    again = CausalModel(CausalOptions(name=str(tmp_path)), VOCAB)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    shape_only = CausalModel(CausalOptions(name=str(tmp_path), weights=False), VOCAB)
    assert not all(torch.equal(a, b) for a, b in zip(model.parameters(), shape_only.parameters(), strict=True))


def test_without_the_package_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ConfigError, match=r"Install it: pip install 'mixer\[transformers\]'"):
        made("llama", LLAMA)


@pytest.mark.parametrize("options", [{}, {"name": "a", "kind": "b"}])
def test_name_or_kind(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="needed exactly one of the two"):
        CausalOptions(**options)
