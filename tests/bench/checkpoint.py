"""How long a checkpoint holds up training: written behind its back against written while it waits.

One process trains a model of 30 M parameters, and saves in turns in both ways. What an asynchronous save costs is the
call, and what the steps take longer until it is on disk; beside it, how long that is.

    python -m tests.bench.checkpoint [--model 30m] [--saves N] [--no-record]
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from mixer.config import load
from mixer.core.plan import Cursor
from mixer.run import RunConfig, make_model
from mixer.training.checkpoint import CheckpointOptions, Checkpoints, Saved, find
from mixer.training.model import find_documents
from mixer.training.optimizer import make_optimizer
from tests.bench.peers.runs import REPOSITORY
from tests.bench.record import record
from tests.bench.training import is_quiet

COMMAND = "python -m tests.bench.checkpoint"
VOCABULARY = 32_000
TOKENS = 64  # of a step: short steps show best what is written beside them
STEPS = 8  # before each save, for what a step takes alone
AIM = 0.25


def make_step(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> Callable[[], float]:
    tokens = torch.randint(0, VOCABULARY, (1, TOKENS))
    documents, targets = find_documents([0], [0, 1], [TOKENS], TOKENS), tokens.roll(-1, 1)

    def step() -> float:
        begin = time.perf_counter()
        model(tokens, documents, targets).loss_bs.sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        return time.perf_counter() - begin

    return step


def is_written(folder: Path, steps: int) -> bool:
    return find(folder, steps) == folder / f"{steps:09}"


def measure(folder: Path, model_name: str, saves: int, say: Callable[[str], None] = print) -> dict[str, list[float]]:
    """Seconds of both, by what they are made up of; the first save of each way makes buffers and is left out."""
    config = load(RunConfig, [REPOSITORY / f"configs/model/{model_name}.yaml"], ["train.windows=1"])
    model = make_model(config, VOCABULARY)
    optimizer = make_optimizer(model, config.optimizer)
    keeper = Checkpoints(folder, options=CheckpointOptions(keep=2))
    step, number = make_step(model, optimizer), 0
    found: dict[str, list[float]] = {"waiting": [], "call": [], "slower": [], "until written": [], "alone": []}
    for turn in range(saves + 1):
        alone = statistics.median(step() for _ in range(STEPS))
        number += 1
        begin = time.perf_counter()
        keeper.save(model, optimizer, Saved(Cursor(number)), geometry_steps=number, wait=True)
        waiting = time.perf_counter() - begin
        number += 1
        begin = time.perf_counter()
        keeper.save(model, optimizer, Saved(Cursor(number)), geometry_steps=number)
        call, beside = time.perf_counter() - begin, 0.0
        while not is_written(folder, number):
            beside += max(0.0, step() - alone)
        written = time.perf_counter() - begin
        keeper.wait()
        if turn:
            for name, value in zip(found, (waiting, call, beside, written, alone), strict=True):
                found[name].append(value)
            say(f"waiting {waiting:.2f} s, not waiting {call:.3f} s and {beside:.2f} s in the steps of {written:.2f} s")
    found["bytes"] = [float(sum(file.stat().st_size for file in (folder / f"{number:09}").rglob("*")))]
    return found


def stall(found: dict[str, list[float]], *parts: str) -> float:
    """What these parts of an asynchronous save take of a save that is waited for."""
    taken = [sum(values) for values in zip(*(found[part] for part in parts), strict=True)]
    return round(statistics.median(some / all_ for some, all_ in zip(taken, found["waiting"], strict=True)), 3)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where it is written (default: a new one of the system's)")
    parser.add_argument("--model", default="30m")
    parser.add_argument("--saves", type=int, default=5, help="in each way")
    parser.add_argument("--no-record", action="store_true")
    given = parser.parse_args(argv)
    quiet = is_quiet()
    torch.set_num_threads(1)  # a core is left for the writing, as for the data in a run
    with tempfile.TemporaryDirectory(dir=given.folder) as temporary:
        found = measure(Path(temporary), given.model, given.saves)
    ratio = {"stall": stall(found, "call"), "stall and slower steps": stall(found, "call", "slower")}
    peers = {f"{name}_s": round(statistics.median(found[name]), 3) for name in found if name != "bytes"}
    peers["megabytes"] = round(found["bytes"][0] / 1e6, 1)
    print(f"of what a save costs that is waited for: {ratio}; {peers}")
    if quiet and not given.no_record:
        record(
            figure=f"checkpoint of {given.model}: what an asynchronous save costs training against one waited for",
            value=ratio,
            unit="ratio, median of pairs",
            target=f"stall <= {AIM}",
            met=ratio["stall"] <= AIM,
            peers=peers,
            command=COMMAND,
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
