import hashlib
import json
import operator
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mixer.config import load
from mixer.data import demo
from mixer.data.corpus import Corpus
from mixer.data.prepare import prepare
from mixer.data.tasks import SerialRunner
from mixer.data.verify import verify
from mixer.run import RunConfig

CONFIG = Path(__file__).parents[2] / "configs/demo.yaml"
DOMAINS = ("arithmetic", "brackets", "code", "docstrings", "documentation", "repeated", "shuffled", "tables")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "raw"
    demo.make(str(folder))
    return folder


def documents(path):
    return [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]


def sums(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.rglob("*.jsonl"))}


def test_eight_domains_and_three_targets_of_a_few_megabytes(made):
    domains = {path.stem: documents(path) for path in (made / "domains").iterdir()}
    targets = {path.stem: documents(path) for path in (made / "targets").iterdir()}
    assert tuple(sorted(domains)) == DOMAINS
    assert sorted(targets) == ["arithmetic_new", "code_new", "documentation_new"]
    assert 3e6 < sum(len(text) for texts in domains.values() for text in texts) < 6e6
    assert all(sum(map(len, texts)) > 30_000 for texts in targets.values())
    trained = {text for texts in domains.values() for text in texts}
    assert not trained & {text for texts in targets.values() for text in texts}
    assert len(set(domains["repeated"])) == 1


def test_the_texts_are_what_they_say(made):
    for text in documents(made / "domains/arithmetic.jsonl")[:200]:
        for sum_ in text.partition("Answer: ")[2].split(". ")[0].split(", and "):
            left, sign, right, _, answer = sum_.split()
            found = {"+": operator.add, "-": operator.sub, "*": operator.mul}[sign](int(left), int(right))
            assert found == int(answer)
    for text in documents(made / "domains/brackets.jsonl")[:200]:
        while (shorter := text.replace("()", "").replace("[]", "").replace("{}", "")) != text:
            text = shorter
        assert text == ""
    header, *rows, total = documents(made / "domains/tables.jsonl")[0].splitlines()
    columns = list(zip(*(map(int, row.split(",")[1:]) for row in rows), strict=True))
    assert [sum(column) for column in columns] == list(map(int, total.split(",")[1:]))
    assert header.startswith("city,")
    pairs = zip(
        documents(made / "domains/shuffled.jsonl"),
        documents(made / "domains/documentation.jsonl"),
        strict=True,
    )
    for shuffled, text in list(pairs)[:20]:
        assert sorted(shuffled) == sorted(text)


def test_the_same_texts_in_another_process(made, tmp_path):
    program = f"from mixer.data import demo; demo.make({str(tmp_path / 'raw')!r})"
    subprocess.run([sys.executable, "-c", program], check=True, env={**os.environ, "PYTHONHASHSEED": "7"})
    assert sums(tmp_path / "raw") == sums(made)


def test_made_once(made):
    before = {path: os.stat(path).st_mtime_ns for path in made.rglob("*.jsonl")}
    demo.make(str(made))
    assert {path: os.stat(path).st_mtime_ns for path in made.rglob("*.jsonl")} == before


def test_the_config_prepares(made, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data/demo").mkdir(parents=True)
    (tmp_path / "data/demo/raw").symlink_to(made)
    options = load(RunConfig, [CONFIG]).prepare
    assert options is not None
    prepare(options, SerialRunner())
    train, targets, held_out = (
        Corpus.open(tmp_path / "data/demo" / name) for name in ("train", "targets", "validation")
    )
    assert train.catalog.names == DOMAINS
    assert targets.catalog.names == ("arithmetic_new", "code_new", "documentation_new")
    assert set(held_out.catalog.names) >= {"arithmetic", "brackets", "code", "docstrings", "tables"}
    assert train.manifest.tokenizer.vocab_size == 2048
    assert 1e6 < sum(info.tokens for info in train.manifest.domains.values()) < 3e6
    assert [verify(corpus) for corpus in (train, targets, held_out)] == [[], [], []]
