"""The words are cut where the tokenizers library cuts, and the ids are its ids."""

import json
import sysconfig
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer, pre_tokenizers

from mixer.data import words
from mixer.data.tokens import FileTokenizer, from_text, train_bpe

ALPHABET = "ab Zs'tredvml019_.,!(-\n\r\t\x0b\x0c\x00\x1c\x1f\x7f\x85\xa0éß²½Ⅷ猫ー\u3000\u2028\u200b’“🐈\u0301ſ"
texts = st.one_of(st.text(ALPHABET, max_size=60), st.text(st.characters(codec="utf-8"), max_size=60))


@pytest.fixture(scope="module")
def bpe():
    return train_bpe([*topics.values(), "naïve café, l’été “quoted” 猫が好き 🐈 ½ ²" * 50], 1000)


@given(texts)
@example("  x\u3000 y")
@example("a\xa0 b")
@example("don't 'stop 'RE it's\n\n  indented  ")
@example("caf\u00e9s' 's \u2019s")
@example("\x1c \x1d\x85 \x0b")
def test_cuts_are_true_cuts(text):
    """Encoding word by word cuts exactly as encoding the whole: compare the library's own words."""
    library = pre_tokenizers.ByteLevel(add_prefix_space=False)

    def cut(one):
        return [word for word, _ in library.pre_tokenize_str(one)]

    found = words.PATTERN.findall(text)
    assert "".join(found) == text
    assert [word for one in found for word in cut(one)] == cut(text)


@given(st.lists(texts, max_size=4))
def test_ids_are_the_library_s(bpe, several):
    plain = Tokenizer.from_str(bpe)
    plain.encode_special_tokens = True
    tokenizer = from_text(bpe)
    ids, length = tokenizer.encode(several)
    expected = [one.ids for one in plain.encode_batch(several, add_special_tokens=False)]
    assert ids.tolist() == [number for one in expected for number in [*one, tokenizer.eos]]
    assert length.tolist() == [len(one) + 1 for one in expected]


def test_ids_of_real_source_code(bpe):
    plain = Tokenizer.from_str(bpe)
    tokenizer = from_text(bpe)
    paths = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:60]
    for path in paths:
        text = path.read_text(encoding="utf-8")
        ids, _ = tokenizer.encode([text])
        assert ids[:-1].tolist() == plain.encode(text, add_special_tokens=False).ids, path


def test_memory_is_bounded(monkeypatch):
    monkeypatch.setattr(words, "MAX_WORDS", 3)
    asked = []

    def encode_words(new):
        asked.append(new)
        return [[len(word)] for word in new]

    encoder = words.WordEncoder(encode_words, np.dtype(np.uint16))
    assert encoder.encode("a bb ccc a bb").tolist() == [1, 3, 4, 2, 3]
    assert encoder.encode("a bb d " + "x" * 50).tolist() == [1, 3, 2, 51]
    assert encoder.encode("a d").tolist() == [1, 2]
    assert asked == [["a", " bb", " ccc", " a"], [" d", " " + "x" * 50], [" d"]]


@pytest.mark.parametrize(
    "change",
    [
        {"normalizer": {"type": "NFC"}},
        {"pre_tokenizer": {"type": "Whitespace"}},
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "use_regex": True}},
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}},
        {"added_tokens": [{"id": 0, "content": "<|endoftext|>", "special": False}]},
    ],
)
def test_other_tokenizers_are_left_to_the_library(bpe, change):
    definition = json.loads(bpe)
    assert words.applies_to(definition)
    assert not words.applies_to(definition | change)
    full = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    for token in change.get("added_tokens", []):
        token.update(full)
    if "pre_tokenizer" in change:
        change["pre_tokenizer"].setdefault("trim_offsets", True)
    text = json.dumps(definition | change)
    plain = Tokenizer.from_str(text)
    plain.encode_special_tokens = True
    sample = "It's “naïve” <|endoftext|> 42\n\n  x"
    ids, _ = FileTokenizer(text, "<|endoftext|>", "changed.json").encode([sample])
    assert ids[:-1].tolist() == plain.encode(sample, add_special_tokens=False).ids
