"""The adapter of lm-evaluation-harness: against the package where it is installed, else against its interface alone."""

import abc
import importlib.util
import json
import math
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from mixer.core.errors import ConfigError
from mixer.data.tokens import from_text
from mixer.training.harness import make_lm, rolling, run_harness
from mixer.training.likelihood import Pair
from mixer.training.model import token_losses

BYTES = from_text(None)
INSTALLED = importlib.util.find_spec("lm_eval") is not None


class Next(nn.Module):
    """Half of the probability on the byte after the one that it saw last; the rest on all others alike."""

    def __init__(self):
        super().__init__()
        p = np.full((257, 257), 1 / 512)
        p[np.arange(257), (np.arange(257) + 1) % 257] = 1 / 2
        self.log_p = nn.Parameter(torch.as_tensor(np.log(p)).float())

    def forward(self, tokens_bs, documents=None, target_bs=None):
        logits = self.log_p[tokens_bs]
        return logits if target_bs is None else token_losses(logits, target_bs)


@pytest.fixture
def interface(monkeypatch):
    """The harness's own interface, or one with the same methods."""
    if INSTALLED:
        return

    class LM(abc.ABC):  # noqa: B024
        loglikelihood = loglikelihood_rolling = generate_until = abc.abstractmethod(lambda self, requests: None)

    for name in ("lm_eval", "lm_eval.api", "lm_eval.api.model"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setattr(sys.modules["lm_eval.api.model"], "LM", LM, raising=False)


def asked(*args):
    return SimpleNamespace(args=args)


def test_log_likelihoods_and_whether_they_are_greedy(interface):
    lm = make_lm(Next(), BYTES, max_tokens=8)
    found = lm.loglikelihood([asked("a", "bc"), asked("a", "bb"), asked("", "a"), asked("0123456789", ":")])
    assert [(round(-log_p / math.log(2), 4), greedy) for log_p, greedy in found] == [
        (2, True), (10, False), (9, False), (1, True)]  # fmt: skip
    assert all(type(log_p) is float and type(greedy) is bool for log_p, greedy in found)


def test_a_text_of_any_length_is_predicted_token_by_token_once(interface):
    assert rolling(range(10), 99, 4) == [
        Pair([99], [0, 1, 2, 3]),
        Pair([3], [4, 5, 6, 7]),
        Pair([5, 6, 7], [8, 9]),
    ]
    assert rolling([], 99, 4) == []
    lm = make_lm(Next(), BYTES, max_tokens=4)
    found = lm.loglikelihood_rolling([asked("abcdefghij"), asked(""), asked("aa")])
    assert [round(-one / math.log(2), 4) for one in found] == [9 + 9, 0, 18]


def test_writing_is_refused(interface):
    with pytest.raises(ConfigError, match=r"asked for 1 texts to be written; mixer only scores texts\. Choose"):
        make_lm(Next(), BYTES, max_tokens=4).generate_until([asked("a", {"until": ["."]})])


@pytest.mark.skipif(INSTALLED, reason="lm_eval is installed here")
def test_without_the_package_it_is_named():
    with pytest.raises(ConfigError, match=r"need the package lm_eval, .* pip install 'mixer\[harness\]'"):
        make_lm(Next(), BYTES, max_tokens=4)


@pytest.mark.skipif(not INSTALLED, reason="needs the package lm_eval")
def test_a_task_of_the_harness_itself(tmp_path):
    lines = [{"q": "a", "choices": ["b", "x"], "gold": 0}, {"q": "c", "choices": ["x", "d"], "gold": 0},
             {"q": "e", "choices": ["x", "f"], "gold": 1}, {"q": "g", "choices": ["h", "x"], "gold": 0}]  # fmt: skip
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    task = {
        "task": "next_letter",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "data.jsonl")}, "cache_dir": str(tmp_path / "cache")},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{q}}",
        "doc_to_choice": "choices",
        "doc_to_target": "gold",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}],
    }
    lm = make_lm(Next(), BYTES, max_tokens=16)
    found = run_harness(lm, [task])
    assert found["next_letter"]["acc,none"] == 0.75
    assert found["next_letter"]["acc_stderr,none"] == pytest.approx(0.25)
    with pytest.raises(ConfigError, match="cannot run no_such_task"):
        run_harness(lm, ["no_such_task"])
