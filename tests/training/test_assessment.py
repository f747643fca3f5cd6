"""One model, all measures: what comes out, and that mistakes are found before anything is computed."""

import json
import math

import pytest
import torch
from torch import nn

from mixer.core.errors import ConfigError, DataError
from mixer.data.corpus import Corpus
from mixer.data.prepare import PrepareOptions, prepare
from mixer.data.sources import SourceOptions
from mixer.data.tasks import SerialRunner
from mixer.training.assessment import assess
from mixer.training.evaluation import EvaluationOptions
from mixer.training.model import token_losses


class Halves(nn.Module):
    """The EOS half of the time, else one of 256 bytes."""

    calls = 0

    def forward(self, tokens_bs, documents=None, target_bs=None):
        self.calls += 1
        logits = torch.tensor([-9.0] * 256 + [-1.0]).mul(math.log(2)).expand(*tokens_bs.shape, -1)
        return logits if target_bs is None else token_losses(logits, target_bs)


@pytest.fixture(scope="module")
def train(tmp_path_factory):
    folder = tmp_path_factory.mktemp("assessment")
    for name in ("a", "new"):
        (folder / f"{name}.jsonl").write_text(json.dumps({"text": "abcdefg"}) + "\n")
    prepare(
        PrepareOptions(
            output=str(folder / "out"),
            domains={"a": SourceOptions(files=(str(folder / "a.jsonl"),))},
            targets={"new": SourceOptions(files=(str(folder / "new.jsonl"),))},
            row_tokens=8,
        ),
        SerialRunner(),
    )
    return Corpus.open(folder / "out/train")


def test_all_measures_at_once(train, tmp_path):
    (tmp_path / "letters.jsonl").write_text(json.dumps({"question": "a ", "choices": ["b", "cc"], "answer": 1}) + "\n")
    found = assess(Halves(), train, choices=[tmp_path / "letters.jsonl"])
    # b c d e f g take 9 bits each and a byte, the EOS takes 1 bit and none.
    assert found["sets"]["target/new"]["bits_per_byte"] == pytest.approx(55 / 6, abs=1e-5)
    assert found["sets"]["target/new"]["tokens"] == 7
    assert found["choices"]["letters"]["accuracy"] == {"value": 0.0, "stderr": None}
    assert found["choices"]["letters"]["answer_bits_per_byte"] == pytest.approx(9, abs=1e-5)
    assert found["tasks"] == {}
    assert json.loads(json.dumps(found)) == found


def test_mistakes_are_found_before_anything_is_computed(train, tmp_path):
    model = Halves()
    (tmp_path / "bad.jsonl").write_text("{}\n")
    with pytest.raises(DataError, match=r"bad\.jsonl, line 1"):
        assess(model, train, choices=[tmp_path / "bad.jsonl"])
    with pytest.raises(ConfigError, match="would share the name 'x'"):
        assess(model, train, choices=["a/x.jsonl", "b/x.jsonl"])
    assert model.calls == 0


def test_nothing_to_measure_is_no_error(train):
    found = assess(Halves(), train, EvaluationOptions(sets=()))
    assert found == {"sets": {}, "choices": {}, "tasks": {}}
