"""`mixer prepare` against `datasets.map`: tokens a second, same text, same tokenizer, same two cores.

    python -m tests.bench.prepare [--mb 120] [--rounds 3] [--text FOLDER]

Each run is a process of its own; the three take turns, so that a slow minute hits them alike. Ours reads
JSON lines, tokenizes, packs, and writes shards, documents files and manifest. Theirs reads the table that
`load_dataset` made (its making is timed apart) and writes input_ids into its Arrow cache, without packing;
once with `encode_batch`, which most people call, and once with the faster `encode_batch_fast`, which ours
calls. The figure is the ratio to the faster of the two, start-up of Ray and of worker processes included.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

from tests.bench.record import record

NUM_PROCESSES = 2
VOCAB = 8192
FILES = 8


def make_text(folder: Path, num_bytes: int, source: Path | None) -> None:
    """JSON lines of source code: the documents again and again, their blocks in another order each time."""
    root = source or Path(sysconfig.get_paths()["stdlib"])
    paths = [path for path in sorted(root.rglob("*.py" if source is None else "*")) if path.is_file()]
    texts = []
    for path in paths:
        if "site-packages" in path.parts:
            continue
        try:
            texts.append(path.read_text(encoding="utf-8"))
        except UnicodeDecodeError:
            continue
    draw = random.Random(0)
    blocks = [text.split("\n\n") for text in texts if text.strip()]
    folder.mkdir(parents=True)
    lines: list[list[str]] = [[] for _ in range(FILES)]
    written = 0
    while written < num_bytes:
        for number, of_text in enumerate(blocks):
            draw.shuffle(of_text)
            line = json.dumps({"text": "\n\n".join(of_text)}, ensure_ascii=False) + "\n"
            written += len(line.encode())
            lines[number % FILES].append(line)
            if written >= num_bytes:
                break
    for number, of_file in enumerate(lines):
        (folder / f"{number}.jsonl").write_text("".join(of_file), encoding="utf-8")


def train(folder: Path, path: Path) -> None:
    from mixer.data.tokens import train_bpe

    with open(folder / "0.jsonl", encoding="utf-8") as file:
        path.write_text(train_bpe((json.loads(line)["text"] for line in file), VOCAB))


def ours(folder: Path, tokenizer: Path, output: Path) -> dict:
    from mixer.data.prepare import PrepareOptions, prepare
    from mixer.data.sources import SourceOptions
    from mixer.data.tasks import RayRunner
    from mixer.data.tokens import TokenizerOptions

    options = PrepareOptions(
        output=str(output),
        domains={"text": SourceOptions(files=(f"{folder}/*.jsonl",))},
        tokenizer=TokenizerOptions(kind="file", path=str(tokenizer)),
    )
    with RayRunner(num_cpus=NUM_PROCESSES) as runner:
        begin = time.perf_counter()
        runner.start()
        started = time.perf_counter()
        summary = prepare(options, runner)
        end = time.perf_counter()
    info = summary.manifests["train"].domains["text"]
    return {
        "tokens": info.tokens - info.documents,
        "start_s": started - begin,
        "work_s": end - started,
        "stages_s": summary.seconds,
        "peak_mb": summary.peak_task_bytes / 1e6,
    }


def theirs(folder: Path, tokenizer: Path, output: Path, *, fast: bool) -> dict:
    import datasets
    from tokenizers import Tokenizer

    datasets.disable_progress_bars()
    one = Tokenizer.from_file(str(tokenizer))
    encode = one.encode_batch_fast if fast else one.encode_batch

    def tokenize(batch: dict) -> dict:
        return {"input_ids": [encoding.ids for encoding in encode(batch["text"], add_special_tokens=False)]}

    files = sorted(str(path) for path in folder.glob("*.jsonl"))
    begin = time.perf_counter()
    table = datasets.load_dataset("json", data_files=files, split="train", cache_dir=str(output))
    started = time.perf_counter()
    result = table.map(tokenize, batched=True, num_proc=NUM_PROCESSES, remove_columns=["text"])
    end = time.perf_counter()
    tokens = sum(len(ids) for ids in result.data.column("input_ids").chunks for ids in ids)
    return {"tokens": tokens, "start_s": started - begin, "work_s": end - started}


def run(kind: str, folder: Path, tokenizer: Path) -> dict:
    """One run in a process of its own, its output thrown away."""
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        command = [
            sys.executable,
            "-m",
            "tests.bench.prepare",
            "--run",
            kind,
            str(folder),
            str(tokenizer),
            scratch,
        ]
        environment = {
            **os.environ,
            "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_OFFLINE": "1",
            "HF_HOME": scratch,
        }
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mb", type=float, default=120.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--text", type=Path, help="a folder of texts; the standard library's sources if not given")
    parser.add_argument("--record", action="store_true", help="into tests/bench/results")
    parser.add_argument("--run", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        kind, *paths = args.run
        folder, tokenizer, output = map(Path, paths)
        if kind == "ours":
            result = ours(folder, tokenizer, output / "out")
        else:
            result = theirs(folder, tokenizer, output, fast=kind == "datasets_fast")
        print(json.dumps(result))
        return
    kinds = ("ours", "datasets_fast", "datasets")
    results: dict[str, list[dict]] = {kind: [] for kind in kinds}
    with tempfile.TemporaryDirectory() as scratch:
        folder, tokenizer = Path(scratch) / "text", Path(scratch) / "tokenizer.json"
        make_text(folder, int(args.mb * 1e6), args.text)
        train(folder, tokenizer)
        for number in range(args.rounds):
            for kind in kinds[number % 3 :] + kinds[: number % 3]:
                result = run(kind, folder, tokenizer)
                results[kind].append(result)
                print(f"round {number} {kind}: {json.dumps(result)}", file=sys.stderr, flush=True)
    assert len({result["tokens"] for of_kind in results.values() for result in of_kind}) == 1

    def ratio(kind: str, *, with_start: bool) -> float:
        seconds = [
            [one["work_s"] + (one["start_s"] if with_start else 0.0) for one in results[of]] for of in (kind, "ours")
        ]
        return statistics.median(theirs_s / ours_s for theirs_s, ours_s in zip(*seconds, strict=True))

    def rate(kind: str) -> float:
        return statistics.median(one["tokens"] / one["work_s"] for one in results[kind])

    # Ours with Ray's start-up, theirs without the making of their table: the comparison that favours them.
    strict = statistics.median(
        other["work_s"] / (mine["work_s"] + mine["start_s"])
        for mine, other in zip(results["ours"], results["datasets_fast"], strict=True)
    )
    values = {
        "ratio": round(strict, 2),
        "ratio_without_starts": round(ratio("datasets_fast", with_start=False), 2),
        "ratio_with_both_starts": round(ratio("datasets_fast", with_start=True), 2),
        "ratio_to_encode_batch": round(ratio("datasets", with_start=False), 2),
        "tokens_per_s": round(rate("ours")),
        "ray_start_s": round(statistics.median(one["start_s"] for one in results["ours"]), 1),
        "tokens": results["ours"][0]["tokens"],
        "mb": args.mb,
        "rounds": args.rounds,
        "peak_task_mb": round(max(one["peak_mb"] for one in results["ours"])),
    }
    print(json.dumps(values, indent=1))
    if args.record:
        path = record(
            figure="prepare against datasets.map",
            value=values,
            unit="times the tokens a second of datasets.map with encode_batch_fast, same two cores; "
            "Ray's start-up counted for ours, load_dataset not counted for theirs",
            target=">= 1",
            met=strict >= 1,
            peers={f"{kind} tokens/s": round(rate(kind)) for kind in kinds[1:]},
            command=f"python -m tests.bench.prepare --mb {args.mb:g} --rounds {args.rounds} --record",
        )
        print(path, file=sys.stderr)


if __name__ == "__main__":
    main()
