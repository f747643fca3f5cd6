"""Preparations on Ray: the same bytes for any number of tasks, through kills, in bounded memory."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mixer.core.errors import DataError
from mixer.data.corpus import Corpus
from mixer.data.prepare import PrepareOptions, prepare
from mixer.data.sources import SourceOptions
from mixer.data.tasks import RayRunner, SerialRunner
from mixer.data.tokens import TokenizerOptions

pytestmark = pytest.mark.ray

ROOT = Path(__file__).parents[2]
WAIT_S = 120.0


def contents(folder):
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(Path(folder).rglob("*"))
        if path.is_file()
    }


def make_texts(folder, num_domains=3, lines=20_000):
    folder.mkdir()
    for domain in range(num_domains):
        with open(folder / f"d{domain}.jsonl", "w") as file:
            for line in range(lines):
                words = " ".join(f"w{(line * 7919 + k * 104729 + domain) % 997}" for k in range(line % 40))
                file.write(json.dumps({"text": f"{domain} {line} {words}"}) + "\n")


def write_config(tmp_path):
    (tmp_path / "config.yaml").write_text(
        f"""
prepare:
  output: {tmp_path}/out
  row_tokens: 128
  unit_mb: 0.2
  shard_mb: 0.25
  validation_share: 0.1
  tokenizer: {{kind: train, vocab_size: 1000, sample_mb: 0.5}}
  domains:
    d0: {{files: ["{tmp_path}/raw/d0.jsonl"]}}
    d1: {{files: ["{tmp_path}/raw/d1.jsonl"]}}
    d2: {{files: ["{tmp_path}/raw/d2.jsonl"]}}
"""
    )


def start(tmp_path, output, *more):
    command = [sys.executable, "-m", "mixer.cli", "prepare", str(tmp_path / "config.yaml")]
    return subprocess.Popen(
        [*command, f"prepare.output={output}", "--object-store-mb=100", *more],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell that starts the tests in the background has interrupts ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # noqa: PLW1509
    )


def finish(process):
    out, err = process.communicate(timeout=WAIT_S)
    assert process.returncode == 0, err
    return out


def wait_for(process, folder, pattern, count):
    """Until so many files are there; the preparation must still be running then."""
    end = time.monotonic() + WAIT_S
    while len(list(Path(folder).glob(pattern))) < count:
        assert process.poll() is None, f"it ended before {count} x {pattern}: {process.communicate()}"
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """The texts, the config, and what one CPU makes of them."""
    tmp_path = tmp_path_factory.mktemp("prepared")
    make_texts(tmp_path / "raw")
    write_config(tmp_path)
    finish(start(tmp_path, tmp_path / "one", "--cpus=1"))
    return tmp_path, contents(tmp_path / "one")


def test_two_cpus_write_the_same_bytes(prepared):
    tmp_path, expected = prepared
    assert len([path for path in expected if path.endswith(".arrow")]) > 20
    finish(start(tmp_path, tmp_path / "two", "--cpus=2"))
    assert contents(tmp_path / "two") == expected


@pytest.mark.slow
@pytest.mark.parametrize(
    ("pattern", "count"),
    [(".staging/*.sample.json", 1), (".staging/[0-9a-f]*.tokens", 9), ("*/shards/*/*.arrow", 4)],
)
def test_killed_and_run_again(prepared, pattern, count):
    tmp_path, expected = prepared
    output = tmp_path / f"killed{count}"
    process = start(tmp_path, output, "--cpus=2")
    wait_for(process, output, pattern, count)
    process.kill()
    process.communicate()
    assert not list(output.glob("*/manifest.json"))
    finish(start(tmp_path, output, "--cpus=2"))
    assert contents(output) == expected


@pytest.mark.slow
def test_interrupted_and_run_again(prepared):
    tmp_path, expected = prepared
    output = tmp_path / "interrupted"
    process = start(tmp_path, output, "--cpus=2")
    wait_for(process, output, ".staging/*.tokens", 5)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=WAIT_S)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert "run the same command again" in err
    finish(start(tmp_path, output, "--cpus=2"))
    assert contents(output) == expected


def test_an_error_in_a_task_is_one_line(tmp_path, ray_session):
    (tmp_path / "a.jsonl").write_text('{"text": "good"}\n{"text": 7}\n')
    options = PrepareOptions(
        output=str(tmp_path / "out"),
        domains={"a": SourceOptions(files=(str(tmp_path / "a.jsonl"),))},
        row_tokens=8,
    )
    with pytest.raises(DataError) as caught:
        prepare(options, RayRunner())
    assert str(caught.value).startswith(f"domains.a: {tmp_path}/a.jsonl, line 2: 'text' is int, not a string.")
    assert "\n" not in str(caught.value)


def test_a_ray_that_was_there_stays(tmp_path, ray_session):
    (tmp_path / "a.txt").write_text("a text")
    source = SourceOptions(files=(str(tmp_path / "a.txt"),))
    options = PrepareOptions(output=str(tmp_path / "ray"), domains={"a": source}, row_tokens=8)
    with RayRunner(small_bytes=1 << 30) as runner:  # small, but Ray runs already
        prepare(options, runner)
    assert ray_session.is_initialized()
    prepare(PrepareOptions(output=str(tmp_path / "here"), domains={"a": source}, row_tokens=8), SerialRunner())
    assert contents(tmp_path / "ray") == contents(tmp_path / "here")


@pytest.mark.slow
def test_a_corpus_ten_times_the_object_store(tmp_path, ray_session, record_property):
    """1 GB of text through a store of 100 MB; no process grows with the corpus."""
    raw = tmp_path / "raw"
    raw.mkdir()
    line = (json.dumps({"text": "the quick brown fox jumps over the lazy dog " * 200}) + "\n").encode()
    block = line * (10_000_000 // len(line))
    for number in range(10):
        with open(raw / f"{number}.jsonl", "wb") as file:
            for _ in range(10):
                file.write(block)
    num_bytes = sum(path.stat().st_size for path in raw.iterdir())
    assert num_bytes > 990_000_000
    options = PrepareOptions(
        output=str(tmp_path / "out"),
        domains={"a": SourceOptions(files=(f"{raw}/*.jsonl",))},
        tokenizer=TokenizerOptions(kind="byte"),
    )
    begin = time.monotonic()
    summary = prepare(options, RayRunner())
    seconds = time.monotonic() - begin
    info = summary.manifests["train"].domains["a"]
    assert info.tokens > 980_000_000
    assert info.tokens + info.padding == info.rows * 2048
    Corpus.open(tmp_path / "out/train")
    record_property("peak_task_mb", summary.peak_task_bytes / 1e6)
    record_property("seconds", seconds)
    print(f"1 GB in {seconds:.0f} s, at most {summary.peak_task_bytes / 1e6:.0f} MB in a task's process")
    assert summary.peak_task_bytes < 1_000_000_000
    assert os.path.getsize(tmp_path / "out/train/manifest.json") < 100_000
