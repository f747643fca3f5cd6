import json
import random

import pytest

from mixer.data.prepare import PrepareOptions, prepare
from mixer.data.sources import SourceOptions
from mixer.data.tasks import SerialRunner
from mixer.data.tokens import TokenizerOptions
from tests.runs.making import WORDS


@pytest.fixture(scope="session")
def texts(tmp_path_factory):
    """Three domains that a model learns at different speeds, a validation share of each, and one target."""
    folder = tmp_path_factory.mktemp("proxies")
    both = WORDS["counting"] + WORDS["greek"]
    for name, words in (WORDS | {"sums": both}).items():
        draw = random.Random(name)
        lines = [json.dumps({"text": " ".join(draw.choices(words, k=40))}) for _ in range(300)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    raw = {name: SourceOptions(files=(f"{folder}/{name}.jsonl",)) for name in (*WORDS, "sums")}
    options = PrepareOptions(
        output=str(folder),
        domains={name: raw[name] for name in WORDS},
        targets={"sums": raw["sums"]},
        row_tokens=32,
        tokenizer=TokenizerOptions(kind="byte"),
        validation_share=0.05,
    )
    prepare(options, SerialRunner())
    return folder
