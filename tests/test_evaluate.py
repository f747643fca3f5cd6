"""`mixer evaluate` on a run's folder: which checkpoint, which corpora, what it prints and writes."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mixer import cli, config
from mixer.core.plan import Cursor, Geometry
from mixer.data.prepare import PrepareOptions, prepare
from mixer.data.sources import SourceOptions
from mixer.data.tasks import SerialRunner
from mixer.run import CorpusOptions, RunConfig, make_model
from mixer.training.checkpoint import Checkpoints, Saved
from mixer.training.model import DecoderOptions

EOS = 256


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run with checkpoints after 4 and 8 steps; the newer model finds every token alike."""
    folder = tmp_path_factory.mktemp("evaluate")
    for name in ("a", "new"):
        (folder / f"{name}.jsonl").write_text(
            "".join(json.dumps({"text": f"abcdefg{n % 10}"}) + "\n" for n in range(20))
        )
    prepare(
        PrepareOptions(
            output=str(folder / "out"),
            domains={"a": SourceOptions(files=(str(folder / "a.jsonl"),))},
            targets={"new": SourceOptions(files=(str(folder / "new.jsonl"),))},
            row_tokens=16,
        ),
        SerialRunner(),
    )
    options = RunConfig(
        corpus=CorpusOptions(path=str(folder / "out/train")),
        model=DecoderOptions(dim=16, num_layers=1, num_heads=1),
        geometry=Geometry(window_steps=4, batch_rows=2),
    )
    run = folder / "run"
    (run / "checkpoints").mkdir(parents=True)
    config.save(options, run / "run.yaml")
    model = make_model(options, 257)
    checkpoints = Checkpoints(run / "checkpoints")
    for window in (1, 2):
        if window == 2:
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.zero_()
        optimizer = torch.optim.AdamW(model.parameters())
        saved = Saved(Cursor(window, 0), tokens=window * 1_000_000)
        checkpoints.save(model, optimizer, saved, geometry_steps=4 * window, wait=True)
    return run


def evaluate(capsys, *args):
    status = cli.main(["evaluate", *map(str, args), "--device", "cpu"])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_the_newest_checkpoint_is_measured_and_written(run, tmp_path, capsys):
    (tmp_path / "some.jsonl").write_text('{"question": "a ", "choices": ["b", "cc"], "answer": 0}\n')
    out = tmp_path / "out.json"
    status, text, _ = evaluate(capsys, run, "--choices", tmp_path / "some.jsonl", "--json", out)
    assert status == 0
    found = json.loads(out.read_text())
    assert {key: found[key] for key in ("steps", "window", "tokens")} == {"steps": 8, "window": 2, "tokens": 2_000_000}
    # 20 documents of 8 letters and an EOS: 11 rows of 16 tokens. A row's first token is no target, nor a document's.
    assert list(found["sets"]) == ["target/new"]
    one = found["sets"]["target/new"]
    assert one["loss"] == pytest.approx(math.log(257), abs=1e-5)
    firsts = {row * 16 for row in range(12)} | {document * 9 for document in range(20)}
    targets = [place for place in range(180) if place not in firsts]
    num_bytes = sum(place % 9 != 8 for place in targets)
    assert one["tokens"] == len(targets)
    assert one["bits_per_byte"] == pytest.approx(len(targets) * math.log2(257) / num_bytes, abs=1e-4)
    assert found["choices"]["some"]["accuracy"]["value"] == 1.0  # 8 bits against 16
    lines = text.splitlines()
    assert lines[0] == f"{run} after 8 steps, 2.00 M tokens"
    assert lines[2].split() == ["target/new", f"{one['loss']:.4f}", f"{one['bits_per_byte']:.4f}", str(len(targets))]
    assert lines[4].split() == ["some", "1.0000", "1.0000", "1.0000", "8.0056", "1"]


def test_an_older_checkpoint_fewer_rows_and_another_place_of_the_corpus(run, tmp_path, capsys):
    written = {}
    for steps, rows in [("4", "all"), ("7", "3"), ("newest", "3")]:
        assert evaluate(capsys, run, "--checkpoint", steps, "--rows", rows, "--json", tmp_path / "out.json")[0] == 0
        written[steps] = json.loads((tmp_path / "out.json").read_text())
    assert [written[steps]["steps"] for steps in ("4", "7", "newest")] == [4, 4, 8]
    assert written["7"]["sets"]["target/new"]["tokens"] < 60 < written["4"]["sets"]["target/new"]["tokens"]
    assert written["7"]["sets"]["target/new"]["loss"] != written["newest"]["sets"]["target/new"]["loss"]
    moved = tmp_path / "moved"
    (run.parent / "out").rename(moved)
    try:
        assert evaluate(capsys, run, "--corpus", moved / "train", "--json", tmp_path / "out.json")[0] == 0
        assert json.loads((tmp_path / "out.json").read_text())["sets"]["target/new"]["tokens"] > 60
        assert evaluate(capsys, run)[0] == 2
    finally:
        moved.rename(run.parent / "out")


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (("--checkpoint", "3"), "has no whole checkpoint at or before 3 steps"),
        (("--checkpoint", "last"), "--checkpoint=last; needed a whole number"),
        (("--rows", "0"), "rows=0; it must be at least 1"),
        (("--choices", "none.jsonl"), "none.jsonl cannot be read"),
        (("--json", "no/such/folder/out.json"), "out.json cannot be written: its folder does not exist"),
    ],
)
def test_what_cannot_be_is_refused_in_a_line(run, capsys, args, text):
    status, _, error = evaluate(capsys, run, *args)
    assert status == 2
    assert text in error
    assert error.splitlines()[-1].startswith("mixer: ")


def test_a_model_of_another_corpus_is_refused(run, tmp_path, capsys):
    options = config.load(RunConfig, [run / "run.yaml"])
    other = tmp_path / "run"
    other.mkdir()
    config.save(replace(options, model=DecoderOptions(dim=32, num_layers=1, num_heads=1)), other / "run.yaml")
    (other / "checkpoints").symlink_to(run / "checkpoints")
    status, _, error = evaluate(capsys, other)
    assert status == 2
    assert "000000008" in error
