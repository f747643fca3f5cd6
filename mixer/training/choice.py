"""Multiple-choice questions, answered by what a model finds most probable.

A file has a JSON object a line: {"question": text, "choices": [texts], "answer": number of the right one, from 0}.
"context" means the same as "question"; other keys are left alone. The model is shown the question's text as it
stands and, behind one space (none where either side has white space already, or the question is empty), a choice.
Its answer is the choice whose tokens are most probable (`accuracy`), most probable a byte of the choice
(`accuracy_by_byte`: what is widely called acc_norm, which counts letters, the same in ASCII) or a token
(`accuracy_by_token`). Among equals it is the first.

Small models answer at random for long, so there is `answer_bits_per_byte`, too: the bits that the right answers
take, over their bytes. It falls smoothly long before accuracies rise.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from mixer.core.errors import DataError
from mixer.data.tokens import Tokenizer
from mixer.training.evaluation import Precision
from mixer.training.likelihood import bits, encode_pairs, log_likelihoods


@dataclass(frozen=True, slots=True)
class Question:
    context: str
    choices: tuple[str, ...]
    answer: int
    where: str  # file and line

    def pairs(self) -> list[tuple[str, str]]:
        """The context and each choice, with a space where they need one."""
        context = self.context
        return [
            (context, choice if not context or context[-1].isspace() or choice[0].isspace() else f" {choice}")
            for choice in self.choices
        ]


@dataclass(frozen=True, slots=True)
class Share:
    """A share of the questions, and the standard error of that share as an estimate; None with one question."""

    value: float
    stderr: float | None

    @classmethod
    def of(cls, right_n: NDArray[np.bool_]) -> "Share":
        num, value = len(right_n), float(right_n.mean())
        return cls(value, math.sqrt(value * (1 - value) / (num - 1)) if num > 1 else None)


@dataclass(frozen=True, slots=True, kw_only=True)
class ChoiceScores:
    questions: int
    cut: int  # questions of which a choice did not fit behind the whole context
    accuracy: Share
    accuracy_by_byte: Share
    accuracy_by_token: Share
    answer_bits_per_byte: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


# --- questions ----------------------------------------------------------------------------------------


def read_questions(path: str | Path) -> list[Question]:
    """All questions of a file; the first line that holds none is refused by its number."""
    try:
        lines = Path(path).read_bytes().split(b"\n")
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}. Name a file of JSON lines.") from error
    questions = [_question(line, f"{path}, line {number}") for number, line in enumerate(lines, 1) if line.strip()]
    if not questions:
        raise DataError(f'{path} holds no question. Write a line {{"question": ..., "choices": [...], "answer": 0}}.')
    return questions


def _question(line: bytes, where: str) -> Question:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is no JSON: {error}. Each line needs one object.") from error
    if not isinstance(value, dict):
        raise DataError(f"{where} is no JSON object. Each line needs one, with question, choices and answer.")
    names = [name for name in ("question", "context") if name in value]
    if len(names) != 1:
        found = "both question and context" if names else "neither question nor context"
        raise DataError(f"{where} has {found}. Give exactly one of them.")
    context, choices, answer = value[names[0]], value.get("choices"), value.get("answer")
    if not isinstance(context, str):
        raise DataError(f"{where}: {names[0]} is {_shown(context)}; needed a text.")
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(one, str) and one for one in choices):
        raise DataError(f"{where}: choices is {_shown(choices)}; needed a list of at least two texts, none empty.")
    if type(answer) is not int or not 0 <= answer < len(choices):
        raise DataError(f"{where}: answer is {_shown(answer)}; needed the number of a choice, 0 to {len(choices) - 1}.")
    try:
        "".join([context, *choices]).encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{where} has half a surrogate pair, which is no text ({error}). Correct it.") from error
    return Question(context, tuple(choices), answer, where)


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return "missing" if value is None else text if len(text) <= 60 else f"{text[:60]}..."


# --- answers ------------------------------------------------------------------------------------------


def answer_questions(
    model: nn.Module,
    questions: Sequence[Question],
    tokenizer: Tokenizer,
    *,
    max_tokens: int,
    batch_rows: int = 16,
    device: torch.device | str = "cpu",
    precision: Precision = "float32",
) -> ChoiceScores:
    """Score every choice of every question, with contexts cut on the left to `max_tokens`."""
    texts = [pair for question in questions for pair in question.pairs()]
    pairs = encode_pairs(tokenizer, texts)
    question_n = np.repeat(np.arange(len(questions)), [len(question.choices) for question in questions])
    for number, pair in zip(question_n.tolist(), pairs, strict=True):
        if len(pair.text) > max_tokens:
            raise DataError(
                f"{questions[number].where}: a choice has {len(pair.text)} tokens; the model sees {max_tokens}. "
                "Shorten it, or take the line out."
            )
    found = log_likelihoods(
        model, pairs, max_tokens=max_tokens, batch_rows=batch_rows, device=device, precision=precision
    )
    log_p_n = np.array([one.log_p for one in found])
    if not np.isfinite(log_p_n).all():
        bad = int(question_n[np.flatnonzero(~np.isfinite(log_p_n))[0]])
        raise DataError(
            f"{questions[bad].where}: the model gives a choice the log-likelihood {log_p_n[~np.isfinite(log_p_n)][0]}. "
            "Evaluate a checkpoint from before it broke."
        )
    bytes_n = np.array([len(choice.encode()) for question in questions for choice in question.choices])
    tokens_n = np.array([len(pair.text) for pair in pairs])
    cut_n = np.array([len(pair.context) + len(pair.text) - 1 > max_tokens for pair in pairs])
    first_q = np.flatnonzero(np.diff(question_n, prepend=-1))
    right_q = first_q + np.array([question.answer for question in questions])

    def share(score_n: NDArray[np.float64]) -> Share:
        best_q = [int(np.argmax(part)) for part in np.split(score_n, first_q[1:])]
        return Share.of(first_q + np.array(best_q) == right_q)

    return ChoiceScores(
        questions=len(questions),
        cut=int(np.logical_or.reduceat(cut_n, first_q).sum()),
        accuracy=share(log_p_n),
        accuracy_by_byte=share(log_p_n / bytes_n),
        accuracy_by_token=share(log_p_n / tokens_n),
        answer_bits_per_byte=bits(float(log_p_n[right_q].sum()))
        / sum(len(texts[number][1].encode()) for number in right_q.tolist()),
    )
