"""Measure a run's model: losses on validation and target corpora, multiple-choice files, tasks of lm-eval."""

import argparse
import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from mixer import cli
from mixer.config import load
from mixer.control.fence import write_whole
from mixer.core.errors import ConfigError, ResumeError
from mixer.data.corpus import Corpus
from mixer.run import RunConfig, make_model, open_rows
from mixer.training.assessment import assess
from mixer.training.checkpoint import load_model
from mixer.training.checkpoint_folder import find

LINE_S = 10.0  # between lines where no terminal shows them in place


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="mixer evaluate", description=__doc__)
    top.add_argument("run", type=Path, help="folder of the run")
    top.add_argument("--checkpoint", default="newest", help="the newest at or before so many steps; default: newest")
    top.add_argument("--corpus", help="the trained corpus, where it has moved; the others are looked for beside it")
    top.add_argument("--rows", help="of each set, or all; default: as in the run")
    top.add_argument("--choices", nargs="+", default=[], metavar="FILE", help="JSON lines of questions")
    top.add_argument("--harness", default="", metavar="TASKS", help="of lm-evaluation-harness, joined by commas")
    top.add_argument("--harness-limit", type=int, metavar="N", help="questions of each task")
    top.add_argument("--json", type=Path, metavar="OUT", help="also write all numbers there")
    top.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    top.add_argument("--precision", choices=("float32", "bfloat16"), help="default: as the run was trained")
    return top


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    if args.json and not args.json.absolute().parent.is_dir():
        raise ConfigError(f"{args.json} cannot be written: its folder does not exist. Make it, or name another file.")
    config = load(RunConfig, [args.run / "run.yaml"])
    options = config.evaluation
    if args.rows is not None:
        options = replace(options, rows=None if args.rows == "all" else _number(args.rows, "--rows"))
    checkpoint = find_checkpoint(args.run, args.checkpoint)
    train = Corpus.open(args.corpus) if args.corpus else open_rows(config).corpus
    model = make_model(config, train.manifest.tokenizer.vocab_size)
    saved = load_model(checkpoint, model)
    about: dict[str, Any] = {
        "run": str(args.run),
        "steps": saved.cursor.steps(config.geometry),
        "window": saved.cursor.window,
        "tokens": saved.tokens,
    }
    print(f"{args.run} after {about['steps']} steps, {saved.tokens / 1e6:.2f} M tokens", flush=True)
    result = about | assess(
        model.to(args.device),
        train,
        options,
        cross_document_targets=config.step.cross_document_targets,
        choices=args.choices,
        tasks=[task for task in args.harness.split(",") if task],
        task_limit=args.harness_limit,
        device=args.device,
        precision=args.precision or config.step.precision,
        on_rows=Progress(),
    )
    print("\n".join(lines(result)))
    if args.json:
        write_json(args.json, result)
    return 0


class Progress:
    """How many rows are done: in place on a terminal, else a line now and then."""

    def __init__(self) -> None:
        self._is_terminal, self._said_s = sys.stderr.isatty(), time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        if self._is_terminal:
            print(f"\r\x1b[K{done:,} of {total:,} rows", end="" if done < total else "\n", file=sys.stderr, flush=True)
        elif time.monotonic() - self._said_s >= LINE_S:
            print(f"{done:,} of {total:,} rows", file=sys.stderr, flush=True)
            self._said_s = time.monotonic()


def find_checkpoint(run: Path, wanted: str) -> Path:
    steps = None if wanted == "newest" else _number(wanted, "--checkpoint")
    found = find(run / "checkpoints", steps)
    if found is None:
        upto = "" if steps is None else f" at or before {steps} steps"
        raise ResumeError(f"{run} has no whole checkpoint{upto}. Name a run that saved one, or other steps.")
    return found


def write_json(path: Path, result: dict[str, Any]) -> None:
    try:
        write_whole(path, (json.dumps(result, indent=1, default=str) + "\n").encode())
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}. Name a file in a folder that can.") from error


def lines(result: dict[str, Any]) -> list[str]:
    """The tables of what was measured."""
    width = max([12, *(len(name) for part in ("sets", "choices", "tasks") for name in result[part])])
    shown: list[str] = []
    if result["sets"]:
        shown.append(f"{'set':{width}}      loss  bits/byte      tokens")
    for name, one in result["sets"].items():
        bad = f"  {one['bad_rows']} rows without a loss" if "bad_rows" in one else ""
        shown.append(f"{name:{width}}{_float(one['loss'])} {_float(one['bits_per_byte'])}{one['tokens']:>12,}{bad}")
    if result["choices"]:
        shown.append(f"{'questions':{width}}  accuracy          by byte         by token  answer b/B  number")
    for name, one in result["choices"].items():
        shares = "".join(_share(one[key]) for key in ("accuracy", "accuracy_by_byte", "accuracy_by_token"))
        cut = f", {one['cut']} cut on the left" if one["cut"] else ""
        shown.append(f"{name:{width}}{shares}{_float(one['answer_bits_per_byte'])}  {one['questions']:>8,}{cut}")
    for name, one in result["tasks"].items():
        numbers = {key: value for key, value in one.items() if isinstance(value, float)}
        shown += [f"{name:{width}}  {key} {value:.4f}" for key, value in numbers.items()]
    return shown or ["nothing to measure: no corpus beside the trained one, no --choices, no --harness"]


def _float(value: float | None) -> str:
    return f"{'-':>10}" if value is None else f"{value:10.4f}"


def _share(share: dict[str, float | None]) -> str:
    error = "" if share["stderr"] is None else f" ± {share['stderr']:.4f}"
    return f"{share['value']:8.4f}{error:9}"


def _number(text: str, option: str) -> int:
    try:
        return int(text)
    except ValueError as error:
        raise ConfigError(f"{option}={text}; needed a whole number. Correct it.") from error


if __name__ == "__main__":
    raise SystemExit(cli.main(["evaluate", *sys.argv[1:]]))
