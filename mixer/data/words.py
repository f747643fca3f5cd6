"""Encoding word by word, from memory: several times faster for byte-level BPE than the library alone.

A byte-level BPE with GPT-2's pattern first cuts a text into words (" the", " 42", "\\n\\n", ...) and then
encodes each alone. Natural text has few different words, so a dictionary from word to the bytes of its
ids answers nearly all of them, and a text's ids are one join. The library encodes only words not met
before, so every id still is its own.

That is exact as long as we cut only where the pattern cuts, and that is kept simple to see:

- Where all is ASCII, `PATTERN` below is GPT-2's, its classes \\p{L}, \\p{N} and \\s written out for ASCII.
- A word that touches a character beyond ASCII is not judged here. From where it begins (a true cut) to
  the next space that follows a visible ASCII character (always a true cut: nothing in the pattern matches
  a visible character with white space after it), the stretch goes to the library as it is.

    GPT-2:  's|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

_BEYOND = r"[^\x00-\x7f]"
PATTERN = re.compile(
    r"'(?:s|t|re|ve|m|ll|d)"
    rf"| ?[A-Za-z]++(?!{_BEYOND})"
    rf"| ?[0-9]++(?!{_BEYOND})"
    rf"| ?[^\sA-Za-z0-9\x80-\U0010ffff]++(?!{_BEYOND})"
    rf"|(?=\s++(?!{_BEYOND}))(?:\s+(?!\S)|[\t-\r])"  # a lone space belongs to the word after it
    r"|.+?(?:(?<=[!-~])(?= )|\Z)",
    re.ASCII | re.DOTALL,
)
MAX_WORDS = 1 << 18  # remembered; some ten megabytes
MAX_CHARS = 32  # of a word that is remembered
MOSTLY_BEYOND = 1.5  # UTF-8 bytes a character: so much beyond ASCII that hardly a word would be remembered


def applies_to(definition: dict[str, Any]) -> bool:
    """Whether a tokenizer.json is a byte-level BPE with GPT-2's pattern and nothing acts across words."""
    model, cut = definition.get("model") or {}, definition.get("pre_tokenizer") or {}
    return (
        model.get("type") == "BPE"
        and not model.get("dropout")
        and definition.get("normalizer") is None
        and cut.get("type") == "ByteLevel"
        and cut.get("add_prefix_space") is False
        and cut.get("use_regex", True) is True
        # Special tokens are told to be text; others would be found anywhere in it.
        and all(token.get("special") for token in definition.get("added_tokens") or ())
    )


class WordEncoder:
    """Ids of texts by remembered words. `encode_words` is the library: the ids of each of many words."""

    def __init__(self, encode_words: Callable[[list[str]], list[list[int]]], dtype: np.dtype[Any]) -> None:
        self._encode_words = encode_words
        self._dtype = dtype
        self._known: dict[str, bytes] = {}

    def encode(self, text: str) -> NDArray[Any]:
        if not text.isascii() and len(text.encode()) >= MOSTLY_BEYOND * len(text):
            return np.array(self._encode_words([text])[0], self._dtype)
        words = PATTERN.findall(text)
        found: list[Any] = list(map(self._known.get, words))
        try:
            return np.frombuffer(b"".join(found), self._dtype)
        except TypeError:  # None among them: words that are not known yet
            new = self._learn([word for word, ids in zip(words, found, strict=True) if ids is None])
            for place, ids in enumerate(found):
                if ids is None:
                    found[place] = new[words[place]]
            return np.frombuffer(b"".join(found), self._dtype)

    def _learn(self, words: Sequence[str]) -> dict[str, bytes]:
        different = list(dict.fromkeys(words))
        new = {
            word: np.array(ids, self._dtype).tobytes()
            for word, ids in zip(different, self._encode_words(different), strict=True)
        }
        if len(self._known) < MAX_WORDS:
            self._known.update((word, ids) for word, ids in new.items() if len(word) <= MAX_CHARS)
        return new
