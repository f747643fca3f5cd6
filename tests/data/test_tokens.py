import json
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixer.core.errors import ConfigError
from mixer.data import tokens
from mixer.data.manifest import tokenizer_identity
from mixer.data.tokens import ByteTokenizer, TokenizerOptions, from_text, pieces_of, train_bpe

TEXTS = [
    "the cat sat on the mat\n" * 20,
    "def cat(self):\n    return self.cat\n" * 20,
    "der Kater saß 猫 🐈\n" * 20,
]


@pytest.fixture(scope="module")
def bpe():
    return train_bpe(TEXTS, 290)


def test_bytes_and_eos():
    ids, length = ByteTokenizer().encode(["ab", "é", ""])
    assert ids.dtype == np.uint16
    assert ids.tolist() == [97, 98, 256, 0xC3, 0xA9, 256, 256]
    assert length.tolist() == [3, 3, 1]


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"])), max_size=5))
def test_bytes_come_back(texts):
    ids, length = ByteTokenizer().encode(texts)
    ends = np.cumsum(length)
    found = [ids[end - n : end].tolist() for n, end in zip(length, ends, strict=True)]
    assert [ByteTokenizer().decode(one) for one in found] == texts


def test_a_trained_bpe_is_the_same_in_any_process(bpe):
    program = f"from mixer.data.tokens import train_bpe; print(train_bpe({TEXTS!r}, 290), end='')"
    for threads in ("1", "4"):
        other = subprocess.run(
            [sys.executable, "-c", program],
            capture_output=True,
            check=True,
            env={"PATH": "", "RAYON_NUM_THREADS": threads, "PYTHONHASHSEED": threads},
        )
        assert other.stdout.decode() == bpe


def test_a_bpe_gives_texts_back_with_eos_at_their_ends(bpe):
    tokenizer = from_text(bpe)
    assert (tokenizer.kind, tokenizer.eos, tokenizer.vocab_size) == ("hf", 0, 290)
    ids, length = tokenizer.encode(TEXTS)
    assert ids.dtype == np.uint16
    assert np.flatnonzero(ids == 0).tolist() == (np.cumsum(length) - 1).tolist()
    end = int(length[0])
    assert tokenizer.decode(ids[:end].tolist()) == TEXTS[0]


def test_special_tokens_spelled_out_in_a_text_are_text(bpe):
    tokenizer = from_text(bpe)
    text = "before<|endoftext|>after"
    ids, _ = tokenizer.encode([text])
    assert np.count_nonzero(ids == tokenizer.eos) == 1
    assert tokenizer.decode(ids.tolist()) == text


def test_nothing_is_added_by_a_template(bpe):
    value = json.loads(bpe)
    value["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
        ],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}},
    }
    templated = from_text(json.dumps(value))
    assert templated.encode(["the cat"])[0].tolist() == from_text(bpe).encode(["the cat"])[0].tolist()


def test_identity_is_of_what_defines_the_tokens(bpe):
    tokenizer = from_text(bpe)
    assert tokenizer.definition is not None
    assert tokenizer.identity == tokenizer_identity(tokenizer.definition, 0)
    spaced = json.dumps(json.loads(bpe) | {"truncation": None}, indent=7)
    assert from_text(spaced).identity == tokenizer.identity
    assert from_text(train_bpe(TEXTS, 291)).identity != tokenizer.identity


def test_long_texts_are_cut_after_lines_and_lose_nothing():
    text = "".join(f"line {n} with words\n" for n in range(100))
    pieces = pieces_of(text, 100)
    assert "".join(pieces) == text
    assert all(0 < len(piece) <= 100 for piece in pieces)
    assert all(piece.endswith("\n") for piece in pieces)
    assert pieces_of("aaa bbb ccc", 8) == ["aaa bbb", " ccc"]
    assert pieces_of("a" * 10, 4) == ["aaaa", "aaaa", "aa"]


def test_a_long_text_is_one_document(bpe, monkeypatch):
    monkeypatch.setattr(tokens, "PIECE_CHARS", 50)
    monkeypatch.setattr(tokens, "BATCH_CHARS", 64)
    tokenizer = from_text(bpe)
    ids, length = tokenizer.encode(TEXTS)
    assert len(length) == 3
    assert int(length.sum()) == len(ids)
    ends = np.cumsum(length).tolist()
    assert tokenizer.decode(ids[ends[0] : ends[1]].tolist()) == TEXTS[1]


def test_eos_is_named_found_or_refused(bpe):
    assert from_text(bpe, "the").eos == from_text(bpe).encode(["the"])[0][0]
    with pytest.raises(ConfigError, match="has no token '</s>'"):
        from_text(bpe, "</s>")
    renamed = bpe.replace("<|endoftext|>", "<stop>")
    with pytest.raises(ConfigError, match="none of the usual end-of-text tokens"):
        from_text(renamed, None, "mine.json")
    with pytest.raises(ConfigError, match=r"mine\.json cannot be read"):
        from_text("{}", None, "mine.json")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "bpe"}, "needed one of byte, file, train"),
        ({"kind": "file"}, "a path goes with kind=file"),
        ({"kind": "byte", "path": "x"}, "a path goes with kind=file"),
        ({"kind": "train", "vocab_size": 256}, "at least 257"),
    ],
)
def test_options_that_cannot_be_obeyed(options, message):
    with pytest.raises(ConfigError, match=message):
        TokenizerOptions(**options)
