"""A corpus's own tokenizer, and how many bytes of text each of its tokens stands for.

Losses in nats a token cannot be compared between tokenizers, bits a byte can. The bytes are counted token by
token, from a table, so that any part of a row has an exact number. A table exists for bytes, for byte-level
vocabularies (each letter of an entry is a byte) and for those with byte fallback that write a space as U+2581.
It is proved on a few texts before it is used; other tokenizers lose text, so there is no table.

Tokens that are no text, as the EOS, have 0 bytes. Where a tokenizer normalises text or begins it with a space of
its own, the bytes are those of the text as the model sees it.
"""

import json
import re
from typing import Any

import numpy as np
import tokenizers
from numpy.typing import NDArray
from tokenizers import pre_tokenizers

from mixer.core.errors import DataError
from mixer.data.corpus import Corpus
from mixer.data.manifest import TOKENIZER
from mixer.data.tokens import ByteTokenizer, Tokenizer, from_text

SPACE = "\u2581"
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_PROOF = ("\n", " ", "  x\t y\r\n\n ", "Größe naïve", "猫が好き", "🐈 Ж", "12345678", "don't THE_end();\x7f")


def open_tokenizer(corpus: Corpus) -> Tokenizer:
    """The tokenizer that made a corpus, read from it; refused if it is not the one of the manifest."""
    info = corpus.manifest.tokenizer
    where = f"{corpus.root}/{TOKENIZER}"
    if info.kind == "byte":
        found = from_text(None)
    else:
        try:
            with corpus.filesystem.open_input_stream(where, compression=None) as stream:
                text = stream.read().decode()
            eos = tokenizers.Tokenizer.from_str(text).id_to_token(info.eos)
        except Exception as error:  # the library raises no narrower one
            raise DataError(f"{where} cannot be read: {error}. Restore it, or prepare the corpus again.") from error
        found = from_text(text, eos, where)
    if found.identity != info.identity:
        raise DataError(
            f"{where} is tokenizer {found.identity[:16]}; the manifest says {info.identity[:16]}. "
            "Restore it, or prepare the corpus again."
        )
    return found


def bytes_of_corpus(corpus: Corpus) -> NDArray[np.int64] | None:
    """`token_bytes` of the tokenizer that made a corpus; None also where its bytes are of another making."""
    info = corpus.manifest.tokenizer
    if info.kind == "byte" and info.identity != ByteTokenizer.identity:
        return None
    return token_bytes(open_tokenizer(corpus))


def token_bytes(tokenizer: Tokenizer) -> NDArray[np.int64] | None:
    """By token id, how many bytes of text it stands for; None for tokenizers that do not allow it."""
    if tokenizer.definition is None:
        table_v = np.ones(tokenizer.vocab_size, np.int64)
        table_v[tokenizer.eos] = 0
        return table_v
    definition: dict[str, Any] = json.loads(tokenizer.definition)
    length_of = _byte_level if _has(definition, "ByteLevel") else _with_fallback
    library = tokenizers.Tokenizer.from_str(tokenizer.definition)
    vocabulary = library.get_vocab(with_added_tokens=False)
    if length_of is _byte_level and not vocabulary.keys() >= set(pre_tokenizers.ByteLevel.alphabet()):
        return None
    if length_of is _with_fallback and not (definition.get("model") or {}).get("byte_fallback"):
        return None
    table_v = np.zeros(tokenizer.vocab_size, np.int64)
    for token, number in vocabulary.items():
        table_v[number] = length_of(token)
    for number, added in library.get_added_tokens_decoder().items():
        if not added.special and (added.lstrip or added.rstrip):  # it swallows white space beside it
            return None
        table_v[number] = 0 if added.special else len(added.content.encode())
    table_v[tokenizer.eos] = 0
    return table_v if _proved(tokenizer, table_v) else None


def _has(definition: dict[str, Any], kind: str) -> bool:
    """Whether a step of this kind cuts the text or joins the tokens."""
    steps = [definition.get("pre_tokenizer"), definition.get("decoder")]
    while steps:
        step = steps.pop() or {}
        if step.get("type") == kind:
            return True
        steps += [*step.get("pretokenizers", ()), *step.get("decoders", ())]
    return False


def _byte_level(token: str) -> int:
    return len(token)


def _with_fallback(token: str) -> int:
    return 1 if _BYTE.fullmatch(token) else len(token.replace(SPACE, " ").encode())


def _proved(tokenizer: Tokenizer, table_v: NDArray[np.int64]) -> bool:
    """Behind a letter, which takes what a tokenizer may put before a text, every text has its own bytes."""

    def count(text: str) -> int:
        return int(table_v[tokenizer.encode([text])[0].astype(np.int64)].sum())

    before = count("a")
    return all(count(f"a{text}") - before == len(text.encode()) for text in _PROOF)
