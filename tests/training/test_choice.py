"""Multiple choice: probabilities worked by hand, tokens at borders, long contexts, and files that are refused."""

import json
import math

import numpy as np
import pytest
import torch
from torch import nn

from mixer.core.errors import ConfigError, DataError
from mixer.data.tokens import from_text, train_bpe
from mixer.training.choice import Question, Share, answer_questions, read_questions
from mixer.training.likelihood import Pair, bits, encode_pairs, log_likelihoods
from mixer.training.model import Decoder, DecoderOptions, token_losses

BYTES = from_text(None)
EOS = 256


class Bigram(nn.Module):
    """The probability of a token by the one before it; remembers what it was shown."""

    def __init__(self, p_uv):
        super().__init__()
        self.log_p = nn.Parameter(torch.as_tensor(p_uv, dtype=torch.float64).log().float())
        self.shown = []

    def forward(self, tokens_bs, documents=None, target_bs=None):
        assert documents is None
        assert not self.training
        self.shown.append(tokens_bs.clone())
        logits = self.log_p[tokens_bs]
        return logits if target_bs is None else token_losses(logits, target_bs)


def halving(**special):
    """After any byte each byte has 1/512 and the EOS a half, but for the pairs that are named."""
    p = np.full((257, 257), 1 / 512)
    p[:, EOS] = 1 / 2
    for pair, probability in special.items():
        p[ord(pair[0]), ord(pair[1])] = probability
    p[:, EOS] = 1 - p[:, :EOS].sum(1)
    return Bigram(p)


def is_share(found, value, stderr):
    return found.value == value and found.stderr == pytest.approx(stderr)


def scores(model, *questions, max_tokens=64, **options):
    listed = [Question(one[0], one[1], one[2], f"q.jsonl, line {n}") for n, one in enumerate(questions, 1)]
    return answer_questions(model, listed, BYTES, max_tokens=max_tokens, **options)


# --- numbers by hand ----------------------------------------------------------------------------------


def test_log_likelihoods_are_sums_over_the_texts_tokens_alone():
    model = halving(ab=1 / 4, bc=1 / 8)
    pairs = [Pair([97], [98, 99]), Pair([98], [99]), Pair([120, 97], [98]), Pair([97, 98], [97])]
    found = log_likelihoods(model, pairs, max_tokens=8)
    assert [round(bits(one.log_p), 4) for one in found] == [2 + 3, 3, 2, 9]
    assert {one.is_greedy for one in found} == {None}
    assert [round(bits(one.log_p), 4) for one in log_likelihoods(model, pairs, max_tokens=8, greedy=True)] == [
        5,
        3,
        2,
        9,
    ]


def test_greedy_means_that_every_token_was_the_likeliest():
    model = halving(ab=7 / 16, bc=7 / 16)  # the EOS has less there, a half elsewhere
    pairs = [Pair([97], [98, 99]), Pair([97], [98, 98]), Pair([120], [98, 99]), Pair([97], [98])]
    assert [one.is_greedy for one in log_likelihoods(model, pairs, max_tokens=8, greedy=True)] == [
        True, False, False, True]  # fmt: skip


def test_answers_by_sum_by_byte_and_by_token():
    # " a": 9 + 5 bits in two bytes with the space, " bbb": 9 + 6 + 1 + 1.
    model = halving(**{" a": 1 / 32, " b": 1 / 64, "bb": 1 / 2})
    found = scores(model, ("q", ("a", "bbb"), 0), ("q", ("a", "bbb"), 1), ("q", ("bbb", "a"), 1))
    assert is_share(found.accuracy, 2 / 3, 1 / 3)  # 14 bits against 17: "a" is more probable
    assert is_share(found.accuracy_by_byte, 1 / 3, 1 / 3)  # 14 / 1 against 17 / 3
    assert is_share(found.accuracy_by_token, 1 / 3, 1 / 3)  # 14 / 2 against 17 / 4
    assert found.answer_bits_per_byte == pytest.approx((14 + 17 + 14) / (2 + 4 + 2))
    assert (found.questions, found.cut) == (3, 0)


def test_a_byte_counts_for_length_where_a_letter_has_several():
    # "ab": 9 + 9 bits over 2 bytes or letters; "ä": 9 + 9 over 2 bytes but one letter: alike by byte, the first wins
    found = scores(halving(), (" ", ("ä", "ab"), 0), (" ", ("ab", "ä"), 1))
    assert found.accuracy_by_byte.value == 0.5
    assert found.accuracy.value == 0.5


def test_standard_errors():
    assert is_share(Share.of(np.array([True, True, True, False])), 0.75, math.sqrt(0.75 * 0.25 / 3))
    assert Share.of(np.array([True])) == Share(1.0, None)


def test_a_space_stands_between_unless_there_is_white_space():
    def texts(context, choice):
        return Question(context, (choice, "x"), 0, "").pairs()[0]

    assert texts("Is it?", "yes") == ("Is it?", " yes")
    assert texts("Is it?\n", "yes") == ("Is it?\n", "yes")
    assert texts("Is it?", " yes") == ("Is it?", " yes")
    assert texts("", "yes") == ("", "yes")


# --- tokens -------------------------------------------------------------------------------------------


def test_an_empty_context_is_the_eos():
    assert encode_pairs(BYTES, [("", "ab"), ("a", "b")]) == [Pair([EOS], [97, 98]), Pair([97], [98])]


def test_a_token_over_the_border_is_scored_whole():
    tokenizer = from_text(train_bpe(["the cat\n" * 30], 300))
    whole = tokenizer.encode(["the cat"])[0].tolist()[:-1]
    assert len(whole) == 2
    assert encode_pairs(tokenizer, [("the c", "at"), ("the", " cat"), ("th", "e")]) == [
        Pair(whole[:1], whole[1:]),
        Pair(whole[:1], whole[1:]),
        Pair([tokenizer.eos], whole[:1]),
    ]


def test_long_contexts_lose_their_beginning():
    model = halving()
    found = scores(model, ("abcdefgh", ("xy", "z"), 0), ("a", ("x", "y"), 0), max_tokens=5)
    shown = {tuple(row[row > 0].tolist()) for batch in model.shown for row in batch}
    # The last token of a choice is predicted, not shown: e f g h and a space of the first, " x" and " z" cut to fit.
    assert {bytes(row) for row in shown} == {b"fgh x", b"efgh ", b"a "}
    assert found.cut == 1
    with pytest.raises(DataError, match=r"q\.jsonl, line 1: a choice has 6 tokens; the model sees 5\. Shorten"):
        scores(model, ("a", ("bcdef", "b"), 0), max_tokens=5)
    with pytest.raises(ConfigError, match="a text of 6 tokens; the model sees 5"):
        log_likelihoods(model, [Pair([1], [1] * 6)], max_tokens=5)


def test_batches_hold_like_lengths_within_the_budget_and_answers_keep_their_order():
    model = halving(ab=1 / 4)
    pairs = [Pair([97] * n, [98]) for n in (3, 12, 1, 7, 2, 12, 5)]
    found = log_likelihoods(model, pairs, max_tokens=12, batch_rows=2)
    assert [tuple(batch.shape) for batch in model.shown] == [(2, 12), (3, 7), (2, 2)]
    assert [round(bits(one.log_p), 4) for one in found] == [2] * 7


def test_filling_and_company_change_nothing_for_a_real_model():
    model = Decoder(DecoderOptions(dim=32, num_layers=2, num_heads=2, init_std=0.2), 257)
    rng = np.random.default_rng(0)
    pairs = [Pair(rng.integers(0, 256, c).tolist(), rng.integers(0, 256, t).tolist())
             for c, t in [(3, 2), (9, 5), (1, 1), (4, 8), (2, 2)]]  # fmt: skip
    together = log_likelihoods(model, pairs, max_tokens=32)
    alone = [log_likelihoods(model, [pair], max_tokens=32)[0] for pair in pairs]
    by_hand = []
    for context, text in pairs:
        logits = model(torch.tensor([context + text])).detach()[0].log_softmax(-1)
        by_hand.append(sum(float(logits[len(context) + n - 1, token]) for n, token in enumerate(text)))
    assert [one.log_p for one in together] == pytest.approx(by_hand, abs=1e-4)
    assert [one.log_p for one in alone] == pytest.approx(by_hand, abs=1e-4)
    assert model.training


def test_a_broken_model_is_named_by_question():
    model = halving()
    model.log_p.data[ord("!")] = math.nan
    with pytest.raises(DataError, match=r"q\.jsonl, line 2: the model gives a choice the log-likelihood nan"):
        scores(model, ("a", ("b", "c"), 0), ("!", ("b", "c"), 0))


# --- files --------------------------------------------------------------------------------------------


def test_a_file_of_questions(tmp_path):
    file = tmp_path / "some.jsonl"
    lines = [
        {"question": "q", "choices": ["a", "b"], "answer": 1},
        {"context": "", "choices": ["ä"] * 3, "answer": 0, "id": 7},
    ]
    file.write_text("\n\n".join(json.dumps(line, ensure_ascii=False) for line in lines))
    assert read_questions(file) == [
        Question("q", ("a", "b"), 1, f"{file}, line 1"),
        Question("", ("ä", "ä", "ä"), 0, f"{file}, line 3"),
    ]


GOOD = {"question": "q", "choices": ["a", "b"], "answer": 1}


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ('{"question": "q"', "is no JSON"),
        (b"\xff{}", "is no JSON"),
        ("[" * 100_000, "is no JSON"),
        ("[1]", "is no JSON object"),
        (json.dumps({"choices": ["a", "b"], "answer": 1}), "has neither question nor context"),
        (json.dumps(GOOD | {"context": "c"}), "has both question and context"),
        (json.dumps(GOOD | {"question": 3}), "question is 3; needed a text"),
        (json.dumps(GOOD | {"choices": "ab"}), 'choices is "ab"; needed a list'),
        (json.dumps(GOOD | {"choices": ["a"]}), r'choices is \["a"\]; needed a list of at least two'),
        (json.dumps(GOOD | {"choices": ["a", ""]}), "none empty"),
        (json.dumps(GOOD | {"choices": ["a", 1]}), "needed a list of at least two texts"),
        (json.dumps(GOOD | {"answer": 2}), "answer is 2; needed the number of a choice, 0 to 1"),
        (json.dumps(GOOD | {"answer": -1}), "answer is -1"),
        (json.dumps(GOOD | {"answer": True}), "answer is true"),
        (json.dumps(GOOD | {"answer": "1"}), 'answer is "1"'),
        (json.dumps({"question": "q", "choices": ["a", "b"]}), "answer is missing"),
        (json.dumps(GOOD | {"question": "\ud800"}), "half a surrogate pair"),
    ],
)
def test_lines_that_hold_no_question_are_refused_by_file_and_number(tmp_path, line, text):
    file = tmp_path / "bad.jsonl"
    file.write_bytes(json.dumps(GOOD).encode() + b"\n\n" + (line if isinstance(line, bytes) else line.encode()) + b"\n")
    with pytest.raises(DataError, match=text) as caught:
        read_questions(file)
    assert str(caught.value).startswith(f"{file}, line 3")


def test_files_without_questions_are_refused(tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(DataError, match=r"empty\.jsonl holds no question"):
        read_questions(tmp_path / "empty.jsonl")
    with pytest.raises(DataError, match=r"none\.jsonl cannot be read: No such file"):
        read_questions(tmp_path / "none.jsonl")
