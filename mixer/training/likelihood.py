"""How probable a model finds a text behind another: the measure under multiple choice and the harness.

Context and text are tokenized together, as one document, and the text's tokens are those from the first on in which
the two differ from the context alone: so a token that reaches over the border is scored, with all of it. Where
nothing of the context is left, the EOS stands in its place, for something must come before what is predicted.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from mixer.core.errors import ConfigError
from mixer.data.tokens import Tokenizer
from mixer.training.evaluation import Precision, evaluating
from mixer.training.model import IGNORED, token_losses


class Pair(NamedTuple):
    """Token ids; both have at least one."""

    context: list[int]
    text: list[int]

    def fit(self, max_tokens: int) -> "Pair":
        """With as much of the context's end as a model of so many positions sees together with the text."""
        if len(self.text) > max_tokens:
            raise ConfigError(f"a text of {len(self.text)} tokens; the model sees {max_tokens}. Shorten it.")
        return Pair(self.context[-(max_tokens + 1 - len(self.text)) :], self.text)


class Likelihood(NamedTuple):
    log_p: float  # nats, summed over the text's tokens
    is_greedy: bool | None  # whether each token was the likeliest; None: not asked


def encode(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """The ids of each text, without an EOS."""
    ids, length = tokenizer.encode(texts)
    ends = np.cumsum(length)
    return [ids[end - size : end - 1].tolist() for end, size in zip(ends.tolist(), length.tolist(), strict=True)]


def encode_pairs(tokenizer: Tokenizer, pairs: Sequence[tuple[str, str]]) -> list[Pair]:
    """Contexts and what follows them, as tokens. Every text must have at least a letter."""
    alone = encode(tokenizer, [context for context, _ in pairs])
    together = encode(tokenizer, [context + text for context, text in pairs])
    return [_split(before, whole, tokenizer.eos) for before, whole in zip(alone, together, strict=True)]


def _split(before: list[int], whole: list[int], eos: int) -> Pair:
    same = sum(1 for _ in itertools.takewhile(lambda two: two[0] == two[1], zip(before, whole, strict=False)))
    same = min(same, len(whole) - 1)  # a text that left no token of its own
    return Pair(whole[:same] or [eos], whole[same:])


def log_likelihoods(
    model: nn.Module,
    pairs: Sequence[Pair],
    *,
    max_tokens: int,
    batch_rows: int = 16,
    device: torch.device | str = "cpu",
    precision: Precision = "float32",
    greedy: bool = False,
) -> list[Likelihood]:
    """Of each pair, in their order. A batch has as many tokens as `batch_rows` rows of `max_tokens`, and pairs of
    like length, longest first. Contexts that are too long lose their beginning."""
    fitted = [pair.fit(max_tokens) for pair in pairs]
    found: list[Likelihood | None] = [None] * len(fitted)
    with evaluating(model, device, precision):
        for numbers in _batches(fitted, batch_rows * max_tokens):
            tokens_bs, target_bs = _rows([fitted[number] for number in numbers])
            tokens_bs, target_bs = tokens_bs.to(device), target_bs.to(device)
            is_greedy: list[bool] | list[None] = [None] * len(numbers)
            if greedy:
                logits = model(tokens_bs)
                loss_bs = token_losses(logits, target_bs).loss_bs
                is_greedy = ((logits.argmax(-1) == target_bs) | (target_bs < 0)).all(1).tolist()
            else:
                loss_bs = model(tokens_bs, None, target_bs).loss_bs
            log_p = (-loss_bs.double().sum(1)).tolist()
            for number, value, likeliest in zip(numbers, log_p, is_greedy, strict=True):
                found[number] = Likelihood(value, likeliest)
    return [one for one in found if one is not None]


def _batches(pairs: Sequence[Pair], most_tokens: int) -> Iterator[list[int]]:
    size = [len(pair.context) + len(pair.text) - 1 for pair in pairs]
    order = sorted(range(len(pairs)), key=lambda number: -size[number])
    while order:
        num_rows = max(1, most_tokens // size[order[0]])
        yield order[:num_rows]
        order = order[num_rows:]


def _rows(pairs: Sequence[Pair]) -> tuple[Tensor, Tensor]:
    """Inputs, and targets where the text is predicted; filled up behind the text, where no position sees it."""
    width = max(len(pair.context) + len(pair.text) for pair in pairs) - 1
    tokens_bs = torch.zeros(len(pairs), width, dtype=torch.int64)
    target_bs = torch.full_like(tokens_bs, IGNORED)
    for row, (context, text) in enumerate(pairs):
        whole = torch.tensor(context + text)
        tokens_bs[row, : len(whole) - 1] = whole[:-1]
        target_bs[row, len(context) - 1 : len(whole) - 1] = whole[len(context) :]
    return tokens_bs, target_bs


def bits(log_p: float) -> float:
    """A log-likelihood in nats as the bits it takes to write the text."""
    return -log_p / math.log(2)
