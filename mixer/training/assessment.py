"""All that is measured of one model at once: losses by set, multiple-choice files, tasks of the harness.

The three have nothing in common but the model and the tokenizer of its corpus, which must be the same. What comes
out is plain data, ready for JSON.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mixer.core.errors import ConfigError
from mixer.data.corpus import Corpus
from mixer.data.vocabulary import open_tokenizer
from mixer.training.choice import answer_questions, read_questions
from mixer.training.evaluation import EvaluationOptions, Evaluator, Precision
from mixer.training.harness import make_lm, run_harness


def assess(
    model: nn.Module,
    train: Corpus,
    options: EvaluationOptions | None = None,
    *,
    cross_document_targets: bool = False,
    choices: Sequence[str | Path] = (),
    tasks: Sequence[str | dict[str, Any]] = (),
    task_limit: int | None = None,
    device: torch.device | str = "cpu",
    precision: Precision = "float32",
    on_rows: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Measure a model of the corpus `train` on the corpora beside it, on files of questions and on tasks.

    What cannot be had (a file with a mistake, a package that is missing) is refused before anything is computed.
    `on_rows` is told how many rows of the sets are done, and of how many.
    """
    options = options or EvaluationOptions()
    rows = train.manifest.layout.row_tokens
    scoring: Any = {"max_tokens": rows, "batch_rows": options.batch_rows, "device": device, "precision": precision}
    questions = {name: read_questions(path) for name, path in _named(choices).items()}
    tokenizer = open_tokenizer(train) if questions or tasks else None
    lm = make_lm(model, tokenizer, **scoring) if tasks and tokenizer else None
    evaluator = Evaluator.beside(train, options, cross_document_targets=cross_document_targets)
    sums = evaluator.measure(
        model, device=device, precision=precision, on_rows=lambda done: on_rows(done, evaluator.num_rows)
    )
    result: dict[str, Any] = {
        "sets": evaluator.close(sums),
        "choices": {},
        "tasks": {},
    }
    if tokenizer:
        for name, listed in questions.items():
            result["choices"][name] = answer_questions(model, listed, tokenizer, **scoring).to_dict()
    if lm:
        result["tasks"] = run_harness(lm, tasks, limit=task_limit)
    return result


def _named(choices: Sequence[str | Path]) -> dict[str, Path]:
    """Files by the names that their results have: without folder and ending."""
    named: dict[str, Path] = {}
    for path in map(Path, choices):
        if path.stem in named:
            raise ConfigError(f"{named[path.stem]} and {path} would share the name {path.stem!r}. Rename one of them.")
        named[path.stem] = path
    return named
