"""Small whole runs, and what happens at chosen steps of them."""

import os
import random
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray
import torch

from mixer.config import load
from mixer.control.client import ControllerClient
from mixer.control.journal import read_journal
from mixer.core.errors import MixerError
from mixer.core.plan import Cursor
from mixer.data.prepare import PrepareOptions, prepare
from mixer.data.sources import SourceOptions
from mixer.data.tasks import SerialRunner
from mixer.data.tokens import TokenizerOptions
from mixer.run import Job, RunConfig, make_model, make_parts
from mixer.training import checkpoint, loop
from mixer.training.trace import read_trace

WINDOWS, STEPS, ROWS = 10, 4, 8
ODM = ("policy.kind=odm", "policy.form=paper", "policy.smoothing=0.3")
WORDS = {
    "counting": ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"],
    "greek": ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa", "lambda", "mu"],
    "noise": [format(number * 2654435761 % 2**32, "x") for number in range(200)],
}


def make_texts(folder: Path) -> None:
    """Three domains that a model learns at different speeds, and one target."""
    both = WORDS["counting"] + WORDS["greek"]
    for name, words in (WORDS | {"more": both, "sums": both}).items():
        _write(folder, name, words)
    prepare(prepare_options(folder, folder, *WORDS), SerialRunner())


def prepare_options(texts: Path, output: Path, *domains: str) -> PrepareOptions:
    raw = {name: SourceOptions(files=(f"{texts}/raw/{name}.txt",)) for name in (*WORDS, "more", "sums")}
    return PrepareOptions(
        output=str(output),
        domains={name: raw[name] for name in domains},
        targets={"sums": raw["sums"]},
        row_tokens=32,
        tokenizer=TokenizerOptions(kind="byte"),
        validation_share=0.05,
    )


def _write(folder: Path, name: str, words: list[str]) -> None:
    draw = random.Random(name)
    path = folder / "raw" / f"{name}.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n\n".join(" ".join(draw.choices(words, k=40)) for _ in range(300)))


def config_of(texts: Path, folder: Path, *overrides: str) -> RunConfig:
    """A run of a few seconds, two workers, weights that move in every window."""
    return load(RunConfig, (), options_of(texts, folder, *overrides))


def options_of(texts: Path, folder: Path, *overrides: str) -> list[str]:
    """A policy given whole, as policy={...}, takes the place of that."""
    return [
        f"run.path={folder}",
        f"corpus.path={texts}/train",
        f"train.windows={WINDOWS}",
        "train.num_workers=2",
        "train.cpus_per_worker=0.4",
        "train.threads=1",
        "train.trace=true",
        "train.max_failures=20",
        f"geometry.window_steps={STEPS}",
        f"geometry.batch_rows={ROWS}",
        "model.dim=16",
        "model.num_layers=1",
        "model.num_heads=2",
        "optimizer.rate.peak=0.01",
        "optimizer.rate.warmup_steps=2",
        *([] if any(one.startswith("policy=") for one in overrides) else ODM),
        "checkpoint.every_windows=2",
        "checkpoint.keep=5",
        "evaluation.every_windows=null",
        "evaluation.at_start=false",
        "evaluation.rows=8",
        "tracker.kind=none",
        *overrides,
    ]


@dataclass(frozen=True)
class Fault:
    """What a rank does, once, when it has got the batch of a step."""

    step: int
    rank: int
    kind: str  # rank, controller, driver, node: what is killed. The node is the one without the driver
    # stop: the run is asked to stop before this step (by rank 0). call: `call` is called.
    call: Callable[[], object] | None = None


def kills(seed: int, kind: str, number: int) -> list[Fault]:
    """At random steps, the first and last windows included, by either rank."""
    draw = random.Random(f"{seed} {kind}")
    steps = sorted(draw.sample(range(1, WINDOWS * STEPS), number))
    return [Fault(step, draw.randrange(2), kind) for step in steps]


def work_with(
    faults: Sequence[Fault] = (),
    *,
    driver: int = 0,
    pause_s: Mapping[int, float] | None = None,
    bad_step: int = -1,
):
    """What every worker does: its work, with the faults. Ranks named in `pause_s` wait so long for every batch; the
    first row that the last rank has in `bad_step` has no finite loss."""

    def work(job: Job) -> None:
        client = ControllerClient(job.actor)
        if client.failure():
            return
        parts = make_parts(job, client)
        folder = job.config.run.folder
        bad = BadRow()

        def batches(*, rank: int, world_size: int, cursor: Cursor) -> Iterator[Any]:
            for batch in parts.batches(rank=rank, world_size=world_size, cursor=cursor):
                step = Cursor(batch.window, batch.step).steps(parts.geometry)
                for fault in faults:
                    chosen = _is_away() if fault.kind == "node" else fault.rank == rank
                    if fault.step == step and chosen and _first_time(folder, fault):
                        _happens(fault, client, driver)
                if step == bad_step and rank == world_size - 1:
                    bad.tokens = torch.as_tensor(batch.tokens[0])
                time.sleep((pause_s or {}).get(rank, 0.0))
                yield batch

        try:
            loop.train(replace(parts, batches=batches, make_model=lambda: bad.put_into(parts.make_model())))
        except MixerError as error:
            client.fail(error)
            raise

    return work


class BadRow:
    """A row that makes the model's loss of it NaN."""

    def __init__(self) -> None:
        self.tokens: torch.Tensor | None = None

    def put_into(self, model: torch.nn.Module) -> torch.nn.Module:
        model.register_forward_hook(self._spoil)
        return model

    def _spoil(self, _: Any, args: Any, out: Any) -> Any:
        if self.tokens is None:
            return out
        bad_b = (args[0] == self.tokens).all(1)
        return out._replace(loss_bs=torch.where(bad_b[:, None], torch.nan, out.loss_bs))


def _is_away() -> bool:
    """Whether this rank is on another node than the head."""
    here = ray.get_runtime_context().get_node_id()
    return not any("node:__internal_head__" in node["Resources"] for node in ray.nodes() if node["NodeID"] == here)


def _happens(fault: Fault, client: ControllerClient, driver: int) -> None:
    if fault.kind == "call":
        assert fault.call is not None
        fault.call()
    elif fault.kind == "stop":
        client.call("stop", "a test asks")
        client.note({"kind": "event", "what": "test", "text": "its answer says that the run is to stop"})
        client.settle()
        assert client.wants_stop()
    else:
        _kill(fault.kind, client, driver)


def _kill(kind: str, client: ControllerClient, driver: int) -> None:
    pid = {"rank": os.getpid, "node": os.getppid, "controller": lambda: client.call("pid"), "driver": lambda: driver}
    os.kill(pid[kind](), signal.SIGKILL)
    if kind in ("node", "driver"):
        time.sleep(600)  # until Ray ends this process too, which takes longer than a small run


def _first_time(folder: Path, fault: Fault) -> bool:
    try:
        (folder / f"fault-{fault.kind}-{fault.rank}-{fault.step}").touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


@dataclass
class Outcome:
    """What two runs must share."""

    schedule: bytes
    rows: dict[int, list[str]]
    weights: dict[str, torch.Tensor]
    config: RunConfig

    @property
    def folder(self) -> Path:
        return self.config.run.folder

    @property
    def records(self) -> list[dict[str, Any]]:
        return [record for _, record in read_journal(self.folder / "journal.jsonl")]

    @property
    def events(self) -> list[str]:
        return [record["what"] for record in self.records if record["kind"] == "event"]

    @property
    def policy(self) -> list[tuple[int, dict[str, float]]]:
        """Its internals after the signal of each window."""
        return [(record["window"], record["values"]) for record in self.records if record["kind"] == "policy"]

    @property
    def losses(self) -> list[float]:
        """By window."""
        return [record["loss"] for record in self.records if record["kind"] == "window"]

    @classmethod
    def of(cls, config: RunConfig) -> "Outcome":
        folder = config.run.folder
        newest = checkpoint.find(folder / "checkpoints")
        assert newest is not None
        model = make_model(config, 257)
        checkpoint.load_model(newest, model)
        return cls((folder / "schedule.jsonl").read_bytes(), read_trace(folder / "trace"), model.state_dict(), config)

    def require_same(self, other: "Outcome") -> None:
        assert self.schedule == other.schedule
        assert self.rows == other.rows
        assert sorted(self.rows) == list(range(self.config.train.planned_windows(1) * STEPS))
        self.require_same_weights(other)

    def require_same_weights(self, other: "Outcome") -> None:
        assert self.weights.keys() == other.weights.keys()
        for name, weight in self.weights.items():
            assert torch.equal(weight, other.weights[name]), name
