"""Evaluation: fixed rows, sums that any number of ranks agrees on, losses and bits worked by hand."""

import json
import logging
import math
import pickle

import numpy as np
import pyarrow.fs as pafs
import pytest
import torch
from torch import nn

from mixer.core.errors import ConfigError, DataError
from mixer.core.signal import GRID
from mixer.data.corpus import Corpus
from mixer.data.prepare import PrepareOptions, prepare
from mixer.data.shards import Shard
from mixer.data.sources import SourceOptions
from mixer.data.tasks import SerialRunner
from mixer.training.evaluation import BAD_ROWS, LOSS, ROWS, TOKENS, EvaluationOptions, Evaluator, choose_rows
from mixer.training.model import Decoder, DecoderOptions, TokenLosses, token_losses
from mixer.training.step import StepRows
from tests.fakes import FAKE_MAX_ROWS, make_corpus

EOS = 256


class Unigram(nn.Module):
    """Gives every token its own fixed probability, whatever came before it."""

    def __init__(self, log_p_v):
        super().__init__()
        self.logits = nn.Parameter(torch.as_tensor(log_p_v, dtype=torch.float32))

    def forward(self, tokens_bs, documents=None, target_bs=None):
        logits = self.logits.expand(*tokens_bs.shape, -1)
        return logits if target_bs is None else token_losses(logits, target_bs)


class Uniform(nn.Module):
    """Has 64 tokens, and thinks nothing of any of them."""

    def forward(self, tokens_bs, documents, target_bs):
        return TokenLosses(torch.where(target_bs >= 0, math.log(64), 0.0), target_bs)


class Looking(nn.Module):
    """Losses that depend on token, target and place in the document, and on no other row; remembers its calls."""

    def __init__(self, bad_token=None):
        super().__init__()
        self.calls, self.bad_token = [], bad_token
        self.dropout, self.frozen = nn.Dropout(), nn.Dropout().eval()

    def forward(self, tokens_bs, documents, target_bs):
        self.calls.append((tokens_bs.clone(), target_bs.clone()))
        self.seen = (self.training, self.frozen.training, torch.is_grad_enabled())
        self.low = torch.is_autocast_enabled("cpu")
        torch.rand(3)
        mixed = tokens_bs * 7919 + target_bs * 104729 + documents.position_bs * 31 + documents.document_bs
        loss = torch.where(target_bs >= 0, (mixed % 1009).float() / 97, 0.0)
        if self.bad_token is not None:
            loss = torch.where((tokens_bs == self.bad_token) & (target_bs >= 0), torch.nan, loss)
        return TokenLosses(loss, torch.zeros_like(loss))


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluation")
    return {
        "validation": make_corpus(folder / "validation", {"a": 100, "b": 7, "c": 1}, shard_rows=9),
        "targets": make_corpus(folder / "targets", {"new": 40}, seed=1),
    }


def prepared(folder, texts, **more):
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    source = {"a": SourceOptions(files=(str(folder / "a.jsonl"),))}
    prepare(
        PrepareOptions(**{"output": str(folder / "out"), "domains": source, "row_tokens": 8, **more}), SerialRunner()
    )
    return Corpus.open(folder / "out/train")


# --- numbers by hand ----------------------------------------------------------------------------------


def test_two_rows_by_hand(tmp_path):
    corpus = prepared(tmp_path, ["abcde", "fghi", "j"])  # rows: a b c d e EOS f g | h i EOS j EOS
    evaluator = Evaluator({"validation": corpus})
    # Targets: b c d e EOS g | i EOS EOS, as f and j begin documents: 9, of which 6 are a byte of text each.
    uniform = evaluator.close(evaluator.measure(Unigram(np.zeros(257))))
    assert list(uniform) == ["validation/a"]
    assert uniform["validation/a"]["loss"] == pytest.approx(math.log(257), abs=1 / GRID)
    assert uniform["validation/a"]["bits_per_byte"] == pytest.approx(9 * math.log2(257) / 6, abs=1e-5)
    # EOS has probability 1/2, every byte 1/512: 3 * 1 + 6 * 9 = 57 bits over 6 bytes.
    log_p = np.full(257, -9 * math.log(2))
    log_p[EOS] = -math.log(2)
    sums = evaluator.measure(Unigram(log_p))
    assert sums[:, 0].tolist()[1:] == [9, 2, 0, 6]
    assert evaluator.close(sums)["validation/a"] == {
        "loss": pytest.approx(57 * math.log(2) / 9, abs=1e-5),
        "bits_per_byte": pytest.approx(57 / 6, abs=1e-5),
        "tokens": 9,
    }


def test_targets_across_documents_are_counted_where_training_has_them(tmp_path):
    evaluator = Evaluator({"validation": prepared(tmp_path, ["abcde", "fghi", "j"])}, cross_document_targets=True)
    sums = evaluator.measure(Unigram(np.zeros(257)))
    assert sums[:, 0].tolist()[1:] == [11, 2, 0, 8]


def test_a_uniform_model_has_the_log_of_the_vocabulary_in_every_set(corpora):
    found = Evaluator(corpora).close(Evaluator(corpora).measure(Uniform()))
    assert list(found) == ["validation/a", "validation/b", "validation/c", "target/new"]
    for one in found.values():
        assert one["loss"] == pytest.approx(math.log(64), abs=1e-6)
        assert one["bits_per_byte"] is None  # nothing says how many bytes these made-up tokens have
        assert one["tokens"] > 0


def test_a_decoder_is_measured_as_it_would_be_row_by_row(tmp_path):
    corpus = prepared(tmp_path, [f"the {n} cats sat on {n * n} mats" for n in range(30)])
    model = Decoder(DecoderOptions(dim=32, num_layers=2, num_heads=2, init_std=0.2), 257)
    evaluator = Evaluator({"targets": corpus}, EvaluationOptions(rows=None, batch_rows=5))
    sums = evaluator.measure(model)
    assert sums[ROWS].tolist() == [corpus.manifest.domains["a"].rows]
    shard, points, tokens = corpus.shard(0), 0, 0
    for row in range(len(shard)):
        starts = np.asarray(shard.starts[row].as_py())
        length = shard.length[row : row + 1].copy()
        batch = type("One", (), {"tokens": shard.tokens[row : row + 1].astype(np.int64), "length": length,
                                 "starts": starts, "starts_offsets": np.array([0, len(starts)]), "step": 0,
                                 "domain_index": np.zeros(1), "row": np.zeros(1)})  # fmt: skip
        rows = StepRows.of(batch)
        points += float(model(rows.tokens_bs, rows.documents, rows.target_bs).loss_bs.detach().double().sum()) * GRID
        tokens += rows.num_targets
    assert int(sums[TOKENS, 0]) == tokens
    assert int(sums[LOSS, 0]) == pytest.approx(points, rel=1e-6)


# --- which rows, and how ranks share them -------------------------------------------------------------


def seen_rows(model):
    """(row numbers by domain number) of all rows that had targets, from the tokens."""
    rows = [tokens[0].item() for call in model.calls for tokens, target in zip(*call, strict=True) if target.max() >= 0]
    return sorted(divmod(one, FAKE_MAX_ROWS) for one in rows)


def test_rows_are_spread_evenly_and_chosen_by_seed_and_name():
    chosen = choose_rows(1000, 100, 7)
    assert (chosen // 10).tolist() == list(range(100))  # one of each ten
    assert len(set((chosen % 10).tolist())) == 10  # at any place of it
    assert choose_rows(1000, 100, 7).tolist() == chosen.tolist()
    assert choose_rows(1000, 100, 8).tolist() != chosen.tolist()
    for size, most in [(5, 5), (5, 256), (5, None), (1, 3)]:
        assert choose_rows(size, most, 3).tolist() == list(range(size))
    uneven = choose_rows(10, 4, 1)
    assert [low <= row < high for row, low, high in zip(uneven, [0, 2, 5, 7], [2, 5, 7, 10], strict=True)] == [True] * 4


def test_a_set_keeps_its_rows_whatever_else_is_measured(corpora):
    options = EvaluationOptions(rows=10)
    one, all_of_them, other = Looking(), Looking(), Looking()
    Evaluator({"targets": corpora["targets"]}, options).measure(one)
    Evaluator(corpora, options).measure(all_of_them)
    Evaluator({"targets": corpora["targets"]}, EvaluationOptions(rows=10, seed=1)).measure(other)
    assert len(seen_rows(one)) == 10
    assert len(seen_rows(all_of_them)) == 10 + 10 + 7 + 1
    new = [tokens[target.max(1).values >= 0].tolist() for tokens, target in one.calls]
    assert new == [tokens[target.max(1).values >= 0].tolist() for tokens, target in all_of_them.calls[-1:]]
    assert seen_rows(one) != seen_rows(other)


@pytest.mark.parametrize("world_size", [1, 2, 3, 5, 16])
def test_ranks_share_the_rows_and_agree_on_every_integer(corpora, world_size):
    options = EvaluationOptions(rows=30, batch_rows=4)
    alone = Evaluator(corpora, options)
    expected = alone.measure(Looking())
    assert expected[ROWS].tolist() == [30, 7, 1, 30]
    models, total = [Looking() for _ in range(world_size)], torch.zeros_like(expected)
    for rank, model in enumerate(models):
        total += Evaluator(corpora, options).measure(model, rank=rank, world_size=world_size)
    assert total.tolist() == expected.tolist()
    assert alone.close(total) == alone.close(expected)
    shapes = {tuple(tokens.shape) for model in models for tokens, _ in model.calls}
    assert shapes == {(4, 16)}
    assert len({len(model.calls) for model in models}) == 1  # as models that exchange something in each call need
    together = [row for model in models for row in seen_rows(model)]
    one = Looking()
    alone.measure(one)
    assert sorted(together) == seen_rows(one)
    assert len(together) == 30 + 7 + 1 + 30


def test_an_evaluator_travels_to_workers_and_measures_the_same_there(corpora):
    evaluator = Evaluator(corpora)
    again = pickle.loads(pickle.dumps(evaluator))
    assert again.measure(Looking()).tolist() == evaluator.measure(Looking()).tolist()


def test_from_an_object_store_every_row_is_fetched_once(corpora, monkeypatch):
    fsspec = pytest.importorskip("fsspec")
    memory = fsspec.filesystem("memory")
    for corpus in corpora.values():
        memory.put(corpus.root, f"/evaluation{corpus.root}", recursive=True)
    filesystem = pafs.PyFileSystem(pafs.FSSpecHandler(memory))
    remote = {
        name: Corpus.open(f"/evaluation{one.root}", filesystem=filesystem, check="none")
        for name, one in corpora.items()
    }
    evaluator = Evaluator(remote)
    expected = Evaluator(corpora).measure(Looking()).tolist()
    assert evaluator.measure(Looking()).tolist() == expected
    monkeypatch.setattr(Shard, "take", None)
    assert evaluator.measure(Looking()).tolist() == expected
    memory.rm("/evaluation", recursive=True)


# --- the model is left alone --------------------------------------------------------------------------


def test_modes_gradients_and_random_states_are_as_before(corpora):
    model = Looking()
    before = torch.get_rng_state()
    evaluator = Evaluator(corpora)
    evaluator.measure(model)
    assert torch.equal(torch.get_rng_state(), before)
    assert model.seen == (False, False, False)
    assert (model.training, model.dropout.training, model.frozen.training) == (True, True, False)
    assert torch.is_grad_enabled()
    model.forward = None  # pyright: ignore
    with pytest.raises(TypeError):
        evaluator.measure(model)
    assert (model.training, model.frozen.training) == (True, False)
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_precision_is_that_of_matrix_products(corpora, precision):
    model = Looking()
    Evaluator(corpora).measure(model, precision=precision)
    assert model.low == (precision == "bfloat16")
    assert not torch.is_autocast_enabled("cpu")


def test_a_set_with_a_row_without_a_loss_has_none(corpora):
    evaluator = Evaluator(corpora)
    sums = evaluator.measure(Looking(bad_token=1 * FAKE_MAX_ROWS + 3))  # row 3 of b
    assert sums[BAD_ROWS].tolist() == [0, 1, 0, 0]
    found, sound = evaluator.close(sums), evaluator.close(evaluator.measure(Looking()))
    assert found["validation/b"]["loss"] is None
    assert found["validation/b"]["bits_per_byte"] is None
    assert found["validation/b"]["bad_rows"] == 1
    assert found["validation/a"] == sound["validation/a"]


# --- what is refused, and what is absent --------------------------------------------------------------


def test_corpora_are_found_beside_the_trained_one_and_absent_ones_are_named(tmp_path, caplog):
    train = make_corpus(tmp_path / "train", {"a": 9})
    make_corpus(tmp_path / "targets", {"new": 4, "old": 0}, seed=3)
    with caplog.at_level(logging.WARNING):
        evaluator = Evaluator.beside(train)
    assert evaluator.sets == ("target/new",)
    assert evaluator.num_rows == 4
    assert caplog.messages == [f"there is no corpus {tmp_path}/validation: nothing is evaluated on validation"]
    assert Evaluator.beside(train, EvaluationOptions(sets=())).close(torch.zeros(5, 0)) == {}
    nothing = Evaluator.beside(train, EvaluationOptions(sets=()))
    assert nothing.close(nothing.measure(Looking())) == {}


def test_a_damaged_corpus_is_refused_rather_than_absent(tmp_path):
    train = make_corpus(tmp_path / "train", {"a": 9})
    make_corpus(tmp_path / "targets", {"new": 4})
    (tmp_path / "targets/manifest.json").write_text("{")
    with pytest.raises(DataError, match="is not a manifest"):
        Evaluator.beside(train)


def test_another_tokenizer_or_row_length_is_refused(tmp_path, corpora):
    other = make_corpus(tmp_path / "long", {"a": 3}, row_tokens=32)
    with pytest.raises(DataError, match=r"long has rows of 32 tokens; training has 16\. Prepare both"):
        Evaluator({"targets": other}, like=corpora["validation"].manifest)
    with pytest.raises(DataError, match=r"long has rows of 32 tokens"):
        Evaluator(corpora | {"targets": other})
    (tmp_path / "bytes").mkdir()
    real = prepared(tmp_path / "bytes", ["abcdefghijklmnop"] * 4, row_tokens=16)
    with pytest.raises(DataError, match=r"was made with tokenizer byte:.* \(EOS 256\); training has byte:fafa"):
        Evaluator({"targets": real}, like=corpora["validation"].manifest)


def test_options_and_sums_that_cannot_be_are_refused(corpora):
    for wrong, text in [
        ({"rows": 0}, r"rows=0; it must be at least 1, or null"),
        ({"batch_rows": 0}, r"batch_rows=0; it must be at least 1\."),
        ({"every_windows": -1}, r"every_windows=-1"),
        ({"sets": ("valid",)}, r"sets=\['valid'\]; needed different ones of validation, targets"),
        ({"sets": ("targets", "targets")}, r"needed different ones"),
    ]:
        with pytest.raises(ConfigError, match=text):
            EvaluationOptions(**wrong)
    with pytest.raises(ConfigError, match="rank 2 of 2; it must be 0 to 1"):
        Evaluator(corpora).measure(Looking(), rank=2, world_size=2)
    with pytest.raises(ConfigError, match=r"sums of shape \(4, 4\); needed \(5, 4\)"):
        Evaluator(corpora).close(torch.zeros(4, 4))


def test_every_so_many_windows():
    assert [window for window in range(9) if EvaluationOptions(every_windows=4).is_due(window)] == [3, 7]
    assert not any(EvaluationOptions(every_windows=None).is_due(window) for window in range(9))
