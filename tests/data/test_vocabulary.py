"""Bytes of text a token: known for bytes and two families of tokenizers, proved by text, else not given."""

import json

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from mixer.core.errors import DataError
from mixer.data.corpus import Corpus
from mixer.data.prepare import PrepareOptions, prepare
from mixer.data.sources import SourceOptions
from mixer.data.tasks import SerialRunner
from mixer.data.tokens import FileTokenizer, TokenizerOptions, from_text, train_bpe
from mixer.data.vocabulary import SPACE, bytes_of_corpus, open_tokenizer, token_bytes
from tests.fakes import make_corpus

TEXTS = ["the cat sat on the mat\n" * 20, "  def cat(self):\n\treturn 42\n" * 20, "der Kater saß 猫 🐈\n" * 20]


def table_of(tokenizer):
    table = token_bytes(tokenizer)
    assert table is not None
    return table


def count(tokenizer, text):
    return int(table_of(tokenizer)[tokenizer.encode([text])[0].astype(np.int64)].sum())


def fallback(*, prepend=True, bytes_too=True):
    """A tokenizer of the kind that writes a space as U+2581 and unknown letters as bytes."""
    pieces = [f"<0x{byte:02X}>" for byte in range(256)] if bytes_too else []
    letters = [SPACE, *"abcdefghijklmnopqrstuvwxyzß", "th", "the", f"{SPACE}the"]
    vocabulary = {token: number for number, token in enumerate(["</s>", "<unk>", *pieces, *letters])}
    merges = [("t", "h"), ("th", "e"), (SPACE, "the")]
    made = tokenizers.Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=bytes_too))
    replace = normalizers.Replace(" ", SPACE)
    made.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), replace]) if prepend else replace
    made.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    made.add_special_tokens(["</s>", "<unk>"])
    return FileTokenizer(made.to_str(), None, "made here")


def test_a_byte_is_a_byte_and_the_eos_is_none():
    table = table_of(from_text(None))
    assert table.tolist() == [1] * 256 + [0]


def test_the_tokens_of_a_byte_level_bpe_have_the_bytes_of_their_text():
    tokenizer = from_text(train_bpe(TEXTS, 300))
    table = table_of(tokenizer)
    assert table[tokenizer.eos] == 0
    assert table.max() > 3
    for text in [*TEXTS, "", "naïve Größe 猫🐈", "\x00\x7f\t\r\n   ", "<|endoftext|> is text here"]:
        assert count(tokenizer, text) == len(text.encode())
    ids = tokenizer.encode(["the 猫"])[0].tolist()
    by_hand = {tokenizer.decode([one]): int(table[one]) for one in ids[:1]}
    assert by_hand == {"the": 3}


def test_spaces_and_fallback_bytes_count_one_each():
    tokenizer = fallback(prepend=False)
    ids = tokenizer.encode(["the the猫ß"])[0].tolist()
    assert table_of(tokenizer)[ids].tolist() == [3, 4, 1, 1, 1, 2, 0]  # the, " the", three bytes, ß, EOS


def test_a_space_that_the_tokenizer_puts_before_a_text_is_counted_with_it():
    assert count(fallback(prepend=True), "the cat") == 1 + 7


def test_tokenizers_that_lose_text_have_no_table():
    assert token_bytes(fallback(bytes_too=False)) is None  # what it does not know is <unk>
    words = tokenizers.Tokenizer(models.WordLevel({"</s>": 0, "[UNK]": 1, "the": 2, "cat": 3}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    assert token_bytes(FileTokenizer(words.to_str(), "</s>", "made here")) is None
    # byte-level, but every run of spaces becomes one: the table would say too little
    squeezing = json.loads(train_bpe(TEXTS, 290))
    squeezing["normalizer"] = {"type": "Replace", "pattern": {"Regex": " +"}, "content": " "}
    assert token_bytes(FileTokenizer(json.dumps(squeezing), None, "made here")) is None


def test_an_added_token_that_is_text_has_its_bytes_unless_it_swallows_spaces():
    for swallows, expected in [(False, True), (True, False)]:
        made = tokenizers.Tokenizer.from_str(train_bpe(TEXTS, 290))
        made.add_tokens([tokenizers.AddedToken("猫猫", lstrip=swallows, normalized=False)])
        tokenizer = FileTokenizer(made.to_str(), None, "made here")
        table = token_bytes(tokenizer)
        assert (table is not None) == expected
        if table is not None:
            assert table[made.token_to_id("猫猫")] == 6
            assert count(tokenizer, "x 猫猫 y") == 10


@pytest.mark.parametrize("kind", ["byte", "train"])
def test_all_tokens_of_a_corpus_have_the_bytes_of_its_texts(tmp_path, kind):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    options = TokenizerOptions(kind=kind, vocab_size=300)
    source = SourceOptions(files=(str(tmp_path / "a.jsonl"),))
    prepare(
        PrepareOptions(output=str(tmp_path / "out"), domains={"a": source}, row_tokens=16, tokenizer=options),
        SerialRunner(),
    )
    corpus = Corpus.open(tmp_path / "out/train")
    table = bytes_of_corpus(corpus)
    assert table is not None
    assert table[np.concatenate([corpus.shard(n).tokens.reshape(-1) for n in range(len(corpus.shards))])].sum() == sum(
        len(text.encode()) for text in TEXTS
    )
    assert open_tokenizer(corpus).identity == corpus.manifest.tokenizer.identity
    if kind == "train":
        (tmp_path / "out/train/tokenizer.json").write_text(train_bpe(TEXTS, 280))
        with pytest.raises(DataError, match=r"tokenizer\.json is tokenizer .*; the manifest says .* Restore it"):
            open_tokenizer(corpus)
        (tmp_path / "out/train/tokenizer.json").unlink()
        with pytest.raises(DataError, match="cannot be read"):
            open_tokenizer(corpus)


def test_bytes_of_another_making_have_no_table(tmp_path):
    assert bytes_of_corpus(make_corpus(tmp_path, {"a": 3})) is None
