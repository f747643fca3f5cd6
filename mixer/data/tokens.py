"""Tokenizers: text -> token ids. Bytes, any Hugging Face tokenizer.json, or a BPE trained here.

Three rules for all of them. Each document ends with the EOS, which occurs nowhere else; special
tokens spelled out in a text are text, not special; and the tokenizer adds nothing of its own (no
BOS, no template). A tokenizer's identity is a hash of what defines it, so rows made by two
tokenizers are never mixed by mistake.

A long document is encoded in pieces of at most `PIECE_CHARS` characters, cut after a line where
there is one: memory stays bounded, and no character is lost. At such a cut a BPE may choose other
tokens than it would have chosen without it.
"""

import hashlib
import itertools
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
import tokenizers
from numpy.typing import NDArray
from tokenizers import decoders, models, pre_tokenizers, trainers

from mixer.core.errors import ConfigError
from mixer.data import words
from mixer.data.manifest import tokenizer_identity
from mixer.data.shards import dtype_for

KINDS = ("byte", "file", "train")
EOS_NAMES = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "<EOS>", "[EOS]")
TRAINED_EOS = "<|endoftext|>"
PIECE_CHARS = 1 << 20
BATCH_CHARS = 1 << 18  # small batches stay in the caches: measured faster than large ones


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizerOptions:
    """`byte`: UTF-8 bytes. `file`: a tokenizer.json. `train`: a byte-level BPE made from the documents."""

    kind: str = "byte"
    path: str | None = None  # file: where the tokenizer.json is
    eos: str | None = None  # file: the token that ends a document; found by its usual names if not given
    vocab_size: int = 32_768  # train
    sample_mb: float = 64.0  # train: text to learn from, an equal part of it from every domain

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ConfigError(f"tokenizer.kind={self.kind!r}; needed one of {', '.join(KINDS)}. Choose one.")
        if (self.kind == "file") != (self.path is not None):
            raise ConfigError(
                f"tokenizer.kind={self.kind} with path={self.path!r}; a path goes with kind=file, and only with it."
            )
        smallest = 256 + 1  # the bytes, and the EOS
        if self.kind == "train" and self.vocab_size < smallest:
            raise ConfigError(
                f"tokenizer.vocab_size={self.vocab_size}; a byte-level BPE needs at least {smallest}. Raise it."
            )
        if self.kind == "train" and not self.sample_mb > 0:
            raise ConfigError(f"tokenizer.sample_mb={self.sample_mb}; it must be above 0. Raise it.")


class Tokenizer(Protocol):
    """Encodes texts. `encode` gives the ids of all texts end to end, each followed by the EOS."""

    @property
    def kind(self) -> str: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def eos(self) -> int: ...
    @property
    def identity(self) -> str: ...

    @property
    def eos_name(self) -> str | None: ...

    @property
    def definition(self) -> str | None:
        """The tokenizer.json that a corpus keeps; None for bytes."""
        ...

    def encode(self, texts: Sequence[str]) -> tuple[NDArray[Any], NDArray[np.int64]]:
        """All ids, and how many each text has (EOS included)."""
        ...

    def decode(self, ids: Sequence[int]) -> str: ...


class ByteTokenizer:
    """The 256 bytes of UTF-8, and 256 for EOS."""

    kind = "byte"
    vocab_size = 257
    eos = 256
    definition = None
    eos_name = None
    identity = hashlib.sha256(b"mixer byte tokenizer 1: utf-8, eos 256").hexdigest()

    def encode(self, texts: Sequence[str]) -> tuple[NDArray[np.uint16], NDArray[np.int64]]:
        encoded = [text.encode() for text in texts]
        length = np.fromiter((len(one) + 1 for one in encoded), np.int64, len(encoded))
        # The EOS does not fit a byte: leave a hole behind each text and fill it afterwards.
        ids = np.frombuffer(b"".join(itertools.chain.from_iterable((one, b"\0") for one in encoded)), np.uint8)
        ids = ids.astype(np.uint16)
        ids[np.cumsum(length) - 1] = self.eos
        return ids, length

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(one for one in ids if one != self.eos).decode(errors="replace")


class FileTokenizer:
    """A Hugging Face tokenizer.json."""

    kind = "hf"

    def __init__(self, text: str, eos: str | None, where: str) -> None:
        # One thread: the pipeline already runs one task a core.
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(text)
            definition: dict[str, Any] = json.loads(text)
        except Exception as error:  # the library raises no narrower one
            raise ConfigError(f"tokenizer {where} cannot be read: {error}. Give a tokenizer.json.") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        name = _find_eos(vocabulary, eos, where)
        self.eos_name: str | None = name
        self.eos = vocabulary[name]
        self.vocab_size = max(vocabulary.values()) + 1
        # Neither is obeyed here, so neither defines what the tokens are.
        definition |= {"truncation": None, "padding": None}
        self.definition: str | None = json.dumps(definition, sort_keys=True, ensure_ascii=False, indent=1) + "\n"
        self.identity = tokenizer_identity(self.definition, self.eos)
        self._dtype = np.dtype(dtype_for(self.vocab_size))
        by_words = words.applies_to(definition)
        self._words = words.WordEncoder(self._encode_pieces, self._dtype) if by_words else None

    def encode(self, texts: Sequence[str]) -> tuple[NDArray[Any], NDArray[np.int64]]:
        parts = self._encode_by_words(texts) if self._words else self._encode_by_batches(texts)
        end = np.array([self.eos], self._dtype)
        flat: list[NDArray[Any]] = []
        length = np.ones(len(texts), dtype=np.int64)
        for number, ids, is_last in parts:
            length[number] += len(ids)
            flat.append(ids)
            if is_last:
                flat.append(end)
        return np.concatenate(flat) if flat else np.empty(0, self._dtype), length

    def _encode_by_words(self, texts: Sequence[str]) -> Iterator[tuple[int, NDArray[Any], bool]]:
        assert self._words is not None
        for number, text in enumerate(texts):
            pieces = pieces_of(text)
            for place, piece in enumerate(pieces):
                yield number, self._words.encode(piece), place == len(pieces) - 1

    def _encode_by_batches(self, texts: Sequence[str]) -> Iterator[tuple[int, NDArray[Any], bool]]:
        for batch in _batches(texts):
            encoded = self._encode_pieces([text for _, text, _ in batch])
            for (number, _, is_last), ids in zip(batch, encoded, strict=True):
                yield number, np.array(ids, self._dtype), is_last

    def _encode_pieces(self, pieces: list[str]) -> list[list[int]]:
        encodings = self._tokenizer.encode_batch_fast(pieces, add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode([one for one in ids if one != self.eos], skip_special_tokens=False)


def _batches(texts: Sequence[str]) -> Iterable[list[tuple[int, str, bool]]]:
    """(number of the text, a piece of it, is it the last one), some hundred thousand characters a time."""
    batch: list[tuple[int, str, bool]] = []
    chars = 0
    for number, text in enumerate(texts):
        pieces = pieces_of(text)
        for place, piece in enumerate(pieces):
            batch.append((number, piece, place == len(pieces) - 1))
            chars += len(piece)
            if chars >= BATCH_CHARS:
                yield batch
                batch, chars = [], 0
    if batch:
        yield batch


def pieces_of(text: str, piece_chars: int = PIECE_CHARS) -> list[str]:
    """The text, cut after a line end (else before a space, else anywhere) into pieces of bounded length."""
    if len(text) <= piece_chars:
        return [text]
    pieces: list[str] = []
    start = 0
    while len(text) - start > piece_chars:
        end = text.rfind("\n", start, start + piece_chars) + 1
        if end <= start:
            end = text.rfind(" ", start + 1, start + piece_chars)
        if end <= start:
            end = start + piece_chars
        pieces.append(text[start:end])
        start = end
    pieces.append(text[start:])
    return pieces


def _find_eos(vocabulary: dict[str, int], eos: str | None, where: str) -> str:
    if eos is not None:
        if eos not in vocabulary:
            raise ConfigError(f"tokenizer {where} has no token {eos!r}. Set tokenizer.eos to one that it has.")
        return eos
    for name in EOS_NAMES:
        if name in vocabulary:
            return name
    raise ConfigError(
        f"tokenizer {where} has none of the usual end-of-text tokens ({', '.join(EOS_NAMES)}). "
        "Set tokenizer.eos to the token that ends a document."
    )


@lru_cache(maxsize=4)
def from_text(text: str | None, eos: str | None = None, where: str = "tokenizer.json") -> Tokenizer:
    """The tokenizer that a tokenizer.json's content defines; the byte tokenizer for None.

    Remembered, because reading a large vocabulary takes a second and a worker runs many tasks.
    """
    return ByteTokenizer() if text is None else FileTokenizer(text, eos, where)


def train_bpe(texts: Iterable[str], vocab_size: int) -> str:
    """A byte-level BPE learnt from the texts, as the text of a tokenizer.json. Same texts, same answer."""
    tokenizer: tokenizers.Tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[TRAINED_EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return json.dumps(json.loads(tokenizer.to_str()), indent=1, ensure_ascii=False)
