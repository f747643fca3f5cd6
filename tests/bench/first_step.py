"""From the start of the workers' loop to the first step done: a run resumed at 90 % against a fresh one.

One run is trained to 90 % of its windows and stopped. Then fresh runs and copies of that one take turns, each with new
workers: what is timed goes from a worker that is up to the end of its first step, and holds the model, the
checkpoint, the stream's start, the controller's first answer, the rows. For information the whole command too: from
the start of a process to the same step, a Ray of its own included.

    python -m tests.bench.first_step [--pairs N] [--commands N] [--no-record]
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import ray.train

from mixer.control.client import ControllerClient
from mixer.core.plan import Cursor
from mixer.core.signal import Signal
from mixer.data.corpus import Corpus
from mixer.launch import fit
from mixer.run import Job, RunConfig, make_parts, open_rows
from mixer.training import loop
from tests.bench.peers import runs
from tests.bench.record import record
from tests.bench.training import config_of, corpus_of, is_quiet, own_ray

COMMAND = "python -m tests.bench.first_step"
ROW_TOKENS = 128
STEPS = 2  # of a window
FRESH, RESUMED = "fresh", "resumed"
MEASURED = "first-step.json"
MOST = 1.1


class Stopping:
    """A run's sink that asks to stop from the step on that `asks` is set."""

    def __init__(self, client: ControllerClient) -> None:
        self._client = client
        self.asks = False

    def report(self, signal: Signal, record: Mapping[str, Any] | None = None) -> None:
        self._client.report(signal, record)

    def note(self, record: Mapping[str, Any]) -> None:
        self._client.note(record)

    def settle(self) -> None:
        self._client.settle()

    def wants_stop(self) -> bool:
        return self.asks


def train_until(job: Job, window: int | None) -> None:
    """The loop until `window` begins; for None, until one step is done, with the times of it."""
    began_s, began = time.perf_counter(), time.time()
    client, loaded_s = ControllerClient(job.actor), 0.0
    parts = make_parts(job, client)
    sink = Stopping(client)
    found: dict[str, float] = {}
    load = loop.Checkpoints.load

    def timed(*args: Any) -> Any:
        nonlocal loaded_s
        begin = time.perf_counter()
        try:
            return load(*args)
        finally:
            loaded_s += time.perf_counter() - begin

    def batches(*, rank: int, world_size: int, cursor: Cursor) -> Iterator[Any]:
        ready_s = time.perf_counter()
        for number, batch in enumerate(parts.batches(rank=rank, world_size=world_size, cursor=cursor)):
            if number == 0:
                found["before_stream_s"] = ready_s - began_s
                found["first_rows_s"] = time.perf_counter() - ready_s
            if number == 1:
                found.update(first_step_s=time.perf_counter() - began_s, load_s=loaded_s, done=time.time(), began=began)
            sink.asks = number >= 1 if window is None else batch.window >= window
            yield batch

    with patch.object(loop.Checkpoints, "load", timed):
        loop.train(replace(parts, evaluator=None, batches=batches, sink=sink))
    if ray.train.get_context().get_world_rank() == 0:
        (job.config.run.folder / MEASURED).write_text(json.dumps(found))


def config(corpus: Corpus, folder: Path, windows: int, model: str) -> RunConfig:
    return config_of(
        corpus,
        folder,
        model,
        f"train.windows={windows}",
        f"geometry.window_steps={STEPS}",
        "geometry.batch_rows=4",
        "tracker.kind=none",
    )


def run(config: RunConfig, window: int | None = None) -> dict[str, float]:
    finish = fit(config, open_rows(config), work=lambda job: train_until(job, window))
    if finish.ending != "stopped":
        raise RuntimeError(f"the run {finish.ending} instead of being stopped")
    return json.loads((config.run.folder / MEASURED).read_text())


def command(corpus: Corpus, folder: Path, windows: int, model: str) -> float:
    """From the start of a process to the first step."""
    begin = time.time()
    words = [sys.executable, "-m", "tests.bench.first_step", "--once", corpus.root, str(folder), str(windows), model]
    done = subprocess.run(
        words, check=False, capture_output=True, text=True, cwd=runs.REPOSITORY, env=runs.environment()
    )
    if done.returncode:
        raise RuntimeError(f"the run in {folder} failed:\n{done.stderr[-2000:]}")
    return json.loads((folder / MEASURED).read_text())["done"] - begin


def once(corpus: str, folder: str, windows: str, model: str) -> int:
    """As `mixer train` does it, with all that its command loads."""
    import jobs.train  # noqa: F401

    with own_ray():
        run(config(Corpus.open(corpus), Path(folder), int(windows), model))
    return 0


def measure(corpus: Corpus, folder: Path, given: argparse.Namespace) -> dict[str, list[dict[str, float]]]:
    """Both ways in turns, in one Ray."""
    before, found = folder / "before", dict[str, list[dict[str, float]]]({FRESH: [], RESUMED: []})
    with own_ray():
        run(config(corpus, before, given.windows, given.model), given.windows * 9 // 10)
        print("trained to 90 %", flush=True)
        for pair in range(-given.warm, given.pairs):
            for name in (FRESH, RESUMED) if pair % 2 else (RESUMED, FRESH):
                place = folder / f"{name}-{pair}"
                if name == RESUMED:
                    shutil.copytree(before, place)
                answer = run(config(corpus, place, given.windows, given.model))
                if (answer["load_s"] > 0) != (name == RESUMED):
                    raise RuntimeError(f"a {name} run loaded a checkpoint for {answer['load_s']} s")
                print(f"{name} {pair}: first step after {answer['first_step_s']:.2f} s", flush=True)
                if pair >= 0:  # the first ones warm up
                    found[name].append(answer)
                shutil.rmtree(place)
    return found


def measure_command(corpus: Corpus, folder: Path, given: argparse.Namespace) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {FRESH: [], RESUMED: []}
    for pair in range(given.commands):
        for name, seconds in found.items():
            place = folder / f"command-{name}-{pair}"
            if name == RESUMED:
                shutil.copytree(folder / "before", place)
            seconds.append(command(corpus, place, given.windows, given.model))
            print(f"{name} {pair}: first step {seconds[-1]:.1f} s after the command", flush=True)
            shutil.rmtree(place)
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--warm", type=int, default=1, help="pairs before those that count")
    parser.add_argument("--commands", type=int, default=3, help="pairs of whole commands")
    parser.add_argument("--windows", type=int, default=300, help="of the run, of which 90 %% are trained")
    parser.add_argument("--model", default="2m")
    parser.add_argument("--no-record", action="store_true")
    parser.add_argument("--once", nargs=4, help=argparse.SUPPRESS)
    given = parser.parse_args(argv)
    if given.once:
        return once(*given.once)
    quiet = is_quiet()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        corpus = corpus_of(folder, ROW_TOKENS)
        found = measure(corpus, folder, given)
        commands = measure_command(corpus, folder, given)
    steps_s = {name: [answer["first_step_s"] for answer in answers] for name, answers in found.items()}
    ratios = [after / before for after, before in zip(steps_s[RESUMED], steps_s[FRESH], strict=True)]
    ratio = statistics.median(ratios)
    peers: dict[str, float] = {}
    for name, answers in found.items():
        for key in ("first_step_s", "before_stream_s", "load_s", "first_rows_s"):
            peers[f"{name}_{key}"] = round(statistics.median(answer[key] for answer in answers), 3)
        if commands[name]:
            peers[f"{name}_whole_command_s"] = round(statistics.median(commands[name]), 2)
    print(f"resumed by fresh {ratio:.3f} ({min(ratios):.2f} to {max(ratios):.2f}, {len(ratios)} pairs)")
    print("\n".join(f"  {name} {value}" for name, value in peers.items()))
    if quiet and not given.no_record:
        record(
            figure="resume at 90 %: the workers' first step against a fresh run's",
            value=round(ratio, 3),
            unit="ratio, median of pairs; the checkpoint's loading included",
            target=f"<= {MOST}",
            met=ratio <= MOST,
            peers=peers,
            command=COMMAND,
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
