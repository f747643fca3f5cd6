"""Our model as EleutherAI's lm-evaluation-harness knows models; an optional package, loaded when asked for.

Tasks that score texts run: multiple choice, and perplexity of whole documents. Tasks that let a model write are
refused. A document's first token is predicted from the EOS, and so is a text without a context.
"""

import importlib
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from mixer.core.errors import ConfigError
from mixer.data.tokens import Tokenizer
from mixer.training.evaluation import Precision
from mixer.training.likelihood import Pair, encode, encode_pairs, log_likelihoods

BOOTSTRAPS = 1000  # resamplings behind the standard errors of metrics that are no means


def run_harness(
    lm: Any, tasks: Sequence[str | dict[str, Any]], *, limit: int | None = None
) -> dict[str, dict[str, Any]]:
    """What the harness finds, by task: its metrics, under the names that it gives them."""
    evaluator = importlib.import_module("lm_eval.evaluator")
    try:
        found: Any = evaluator.simple_evaluate(
            lm, tasks=list(tasks), limit=limit, bootstrap_iters=BOOTSTRAPS, log_samples=False
        )
    except (KeyError, ValueError, OSError) as error:  # a task that it does not know, or whose data it cannot get
        named = ", ".join(str(task) for task in tasks)
        raise ConfigError(f"lm-evaluation-harness cannot run {named}: {error}. Name tasks that it has.") from error
    return {name: dict(values) for name, values in found["results"].items()}


def make_lm(
    model: nn.Module,
    tokenizer: Tokenizer,
    *,
    max_tokens: int,
    batch_rows: int = 16,
    device: torch.device | str = "cpu",
    precision: Precision = "float32",
) -> Any:
    """An instance of the harness's `LM`."""
    measure = partial(
        log_likelihoods, model, max_tokens=max_tokens, batch_rows=batch_rows, device=device, precision=precision
    )

    class MixerLM(_interface()):
        def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
            pairs = encode_pairs(tokenizer, [request.args for request in requests])
            return [(one.log_p, bool(one.is_greedy)) for one in measure(pairs, greedy=True)]

        def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
            texts = encode(tokenizer, [request.args[0] for request in requests])
            windows = [rolling(ids, tokenizer.eos, max_tokens) for ids in texts]
            found = iter(measure([pair for pairs in windows for pair in pairs]))
            return [sum(next(found).log_p for _ in pairs) for pairs in windows]

        def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
            raise ConfigError(
                f"lm-evaluation-harness asked for {len(requests)} texts to be written; mixer only scores texts. "
                "Choose tasks of multiple choice, log-likelihood or perplexity."
            )

    return MixerLM()


def rolling(ids: Sequence[int], eos: int, max_tokens: int) -> list[Pair]:
    """A text of any length in stretches, so that each token is predicted once, from as much as the model sees."""
    whole, pairs = [eos, *ids], []
    for first in range(0, len(ids), max_tokens):
        stop = min(first + max_tokens, len(ids))
        pairs.append(Pair(whole[max(0, stop - max_tokens) : first + 1], whole[first + 1 : stop + 1]))
    return pairs


def _interface() -> Any:
    try:
        return importlib.import_module("lm_eval.api.model").LM
    except ImportError as error:
        raise ConfigError(
            f"tasks of lm-evaluation-harness need the package lm_eval, which cannot be imported ({error}). "
            "Install it: pip install 'mixer[harness]'."
        ) from error
