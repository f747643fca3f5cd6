"""What every worker runs: one update after the other, and at the end of each window what was measured.

The ranks of a run talk to each other here and nowhere else:

- before each step, on the host: how many targets all ranks' rows hold together (by which the loss is divided), and
  whether one of them was asked to save or to stop. So all ranks act before the same step, and the device is
  not waited for;
- in the step: gradients, by the wrapper of the model, and four numbers of each row where rows are weighted by
  their losses;
- at the end of a window: one sum of the domains' losses;
- at an evaluation and at a checkpoint.

Nothing of the position is kept but the cursor: after any restart, at any world size, the loop reads the newest
whole checkpoint and asks for the rows from its cursor on. A checkpoint is taken only after the signals of all
windows before it are durable, so none of them will be asked for again; the sums of a window that is half trained
travel in the checkpoint.
"""

import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import ray.train
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from mixer.core.catalog import Catalog
from mixer.core.errors import CheckpointError, ConfigError
from mixer.core.influence import Influence
from mixer.core.plan import Cursor, Geometry
from mixer.core.ports import SignalSink
from mixer.core.signal import Evaluation
from mixer.training.checkpoint import CheckpointOptions, Checkpoints, Saved
from mixer.training.checkpoint_folder import written
from mixer.training.evaluation import EvaluationOptions, Evaluator
from mixer.training.optimizer import OptimizerOptions, make_optimizer
from mixer.training.reweight import Reweighting
from mixer.training.step import BadRow, DomainLosses, StepOptions, StepRows, WindowLosses, train_step
from mixer.training.trace import Trace

logger = logging.getLogger(__name__)

NOTICE_EVERY_S = 5.0  # between looks for a notice that a node will go away
PEAK_FLOPS = {  # of dense bfloat16 products, by a part of the device's name, as their makers state them
    "H200": 989e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10G": 70e12,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainOptions:
    """How long a run is, who trains it, and how they share the model."""

    windows: int | None = None  # the run's length; exactly one of windows and tokens
    tokens: float | None = None  # places for tokens, up to whole windows
    num_workers: int | tuple[int, int] = 1  # or [least, most]: as many as the cluster has
    cpus_per_worker: float = 1.0
    gpu: bool | None = None  # one for each worker; null: if the cluster has any
    resources_per_worker: dict[str, float] = field(default_factory=dict[str, float])  # others that Ray knows
    strategy: Literal["ddp", "fsdp"] = "ddp"
    compile: bool = False
    threads: int | None = None  # of torch in a worker; null: cpus_per_worker. The last bits of a sum depend on it
    seed: int = 0  # of the model's first weights
    max_failures: int = 3  # restarts of the workers, beside those for nodes taken away
    timeout_s: float = 600.0  # of one exchange between ranks, after which the workers are restarted
    peak_flops: float | None = None  # of one device, for its use; null: known for some GPUs
    trace: bool = False  # write down every row that is trained, for checks

    def __post_init__(self) -> None:
        if self.windows is not None and self.tokens is not None:
            raise ConfigError(f"windows={self.windows} and tokens={self.tokens}; set one of the two.")
        for key in ("windows", "tokens", "cpus_per_worker", "timeout_s", "peak_flops", "threads"):
            if (value := getattr(self, key)) is not None and value <= 0:
                raise ConfigError(f"{key}={value}; it must be above 0.")
        least, most = self.workers
        if not 1 <= least <= most:
            raise ConfigError(f"num_workers={self.num_workers}; needed is a number above 0, or [least, most].")
        if self.max_failures < -1:
            raise ConfigError(f"max_failures={self.max_failures}; it must be at least 0, or -1 for no end.")

    @property
    def workers(self) -> tuple[int, int]:
        return (self.num_workers, self.num_workers) if isinstance(self.num_workers, int) else self.num_workers

    def planned_windows(self, window_tokens: int) -> int:
        """The run's length in windows of so many places for tokens."""
        if self.windows is not None:
            return self.windows
        if self.tokens is None:
            raise ConfigError("train.windows and train.tokens are both empty. Set one: how long is the run?")
        return max(1, -int(-self.tokens // window_tokens))


class Batches(Protocol):
    """Makes one rank's batches from a cursor on."""

    def __call__(self, *, rank: int, world_size: int, cursor: Cursor) -> Iterator[Any]: ...


class Probing(Protocol):
    """Measures influence after the last step of some windows; like an `Evaluator`, it leaves adding up to the loop."""

    @property
    def catalog(self) -> Catalog: ...

    def due(self, window: int) -> bool: ...

    def measure(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        window: int,
        *,
        rank: int,
        world_size: int,
        device: torch.device,
        precision: Literal["float32", "bfloat16"],
    ) -> Tensor:
        """This rank's sums."""
        ...

    def close(self, sums: Tensor, rate: float) -> Influence: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """What a worker is given to run with."""

    options: TrainOptions
    step: StepOptions
    optimizer: OptimizerOptions
    checkpoint: CheckpointOptions
    evaluation: EvaluationOptions
    geometry: Geometry
    planned_windows: int
    catalog_of: Callable[[int], Catalog]  # of a window
    make_model: Callable[[], nn.Module]
    batches: Batches
    sink: SignalSink
    checkpoints: Path
    evaluator: Evaluator | None = None
    probe: Probing | None = None
    needs: frozenset[str] = frozenset()  # what the policy asks for; see `mixer.core.signal`
    make_reference: Callable[[], nn.Module] | None = None  # the model over whose losses the excess is measured
    trace: Path | None = None


Ending = Literal["finished", "stopped", "bad_loss"]


def train(parts: Parts) -> Ending:
    """Train from the newest checkpoint to the end of the run, or until it is asked to stop. Within Ray Train."""
    context = ray.train.get_context()
    loop = _Loop(parts, context.get_world_rank(), context.get_world_size(), _device(), _preemption)
    try:
        return loop.run()
    finally:
        loop.close()


def train_here(parts: Parts, device: torch.device | str | None = None) -> Ending:
    """The same in this process alone, without Ray: one rank, on a device of its own."""
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    threads = torch.get_num_threads()
    backend = "cpu:gloo,cuda:nccl" if place.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)  # pyright: ignore[reportPrivateImportUsage]
    try:
        loop = _Loop(parts, 0, 1, place, lambda: None)
        try:
            return loop.run()
        finally:
            loop.close()
    finally:
        dist.destroy_process_group()
        torch.set_num_threads(threads)


class _Asked(NamedTuple):
    """What all ranks agreed on before a step."""

    targets: int
    save: bool
    stop: bool
    look: bool


class _Loop:
    def __init__(
        self, parts: Parts, rank: int, world_size: int, device: torch.device, preemption: Callable[[], Any]
    ) -> None:
        self.parts, self.rank, self.world_size, self.device = parts, rank, world_size, device
        options = parts.options
        torch.set_num_threads(options.threads or max(1, int(options.cpus_per_worker)))
        # Sums on the host, and the exchanges of a checkpoint that is written behind the loop's back.
        patience = timedelta(seconds=options.timeout_s)
        self._host = dist.new_group(backend="gloo", timeout=patience)
        self._saving = dist.new_group(backend="gloo", timeout=patience)
        torch.manual_seed(options.seed * world_size + rank)
        self.model = parts.make_model().to(self.device)
        self._call = self._wrap()
        self.optimizer = make_optimizer(self.model, parts.optimizer)
        self._checkpoints = Checkpoints(
            parts.checkpoints, rank=rank, world_size=world_size, group=self._saving, options=parts.checkpoint
        )
        first = parts.catalog_of(0)
        self._row_tokens = first.row_tokens
        self._reference = self._make_reference()
        self._losses = self._make_losses(len(first))
        mine = parts.geometry.rank_slots(rank, world_size)
        exchange = partial(exchange_rows, mine, parts.geometry.batch_rows if world_size > 1 else None)
        self._reweighting = Reweighting(parts.step.reweight, exchange, mine, self.device)
        self._reweighting.enter(first)
        self._cursor, self._tokens = Cursor(), 0
        self._notice = _Notice(preemption)
        self._trace = Trace(parts.trace, rank, world_size) if parts.trace else None
        self._micro = parts.step.micro_batches(parts.geometry.batch_rows, world_size)
        self._failed_saves = 0

    # ---- the model --------------------------------------------------------------------------------------

    def _wrap(self) -> nn.Module:
        """The model as it is called: data parallel, or sharded in place."""
        options, layers = self.parts.options, list(getattr(self.model, "layers", []))
        if options.compile:
            for part in layers or [self.model]:
                part.compile()
        if options.strategy == "fsdp":
            low = torch.bfloat16 if self.parts.step.precision == "bfloat16" else None
            # Activations keep the types that autocast gives them, as they do without sharding.
            policy = MixedPrecisionPolicy(
                param_dtype=low, reduce_dtype=torch.float32 if low else None, cast_forward_inputs=False
            )
            for part in [*layers, self.model]:
                fully_shard(part, mp_policy=policy)
            return self.model
        if self.world_size == 1:
            return self.model
        places = [self.device] if self.device.type == "cuda" else None
        return DistributedDataParallel(self.model, device_ids=places, gradient_as_bucket_view=True)

    def _no_sync(self) -> AbstractContextManager[Any]:
        if isinstance(self._call, DistributedDataParallel):
            return self._call.no_sync()
        return _without_exchange(self.model) if self.parts.options.strategy == "fsdp" else nullcontext()

    def _settle_buckets(self) -> None:
        """A backward pass over nothing. Data parallel lays out its exchange anew after the first one; so a run
        that was just resumed sums its first gradients in the same order as one that was never stopped."""
        nothing = StepRows.nothing(self._row_tokens, self.device)
        for _ in range(2):
            out: Any = self._call(nothing.tokens_bs, nothing.documents, nothing.target_bs)
            out.loss_bs.sum().backward()
        self.optimizer.zero_grad(set_to_none=True)

    def _make_reference(self) -> nn.Module | None:
        """Whole on every rank, whatever the strategy; random states are as they would be without."""
        if self.parts.make_reference is None:
            return None
        with torch.random.fork_rng(devices=[]):
            return self.parts.make_reference().requires_grad_(False).eval().to(self.device)

    def _make_losses(self, domains: int) -> DomainLosses:
        return DomainLosses(domains, self.device, excess=self._reference is not None)

    # ---- the run ----------------------------------------------------------------------------------------

    def run(self) -> Ending:
        parts, geometry = self.parts, self.parts.geometry
        end = parts.planned_windows * geometry.window_steps
        if self.rank == 0:
            self._event("workers", f"{self.world_size} on {self.device.type}")
        if isinstance(self._call, DistributedDataParallel):
            self._settle_buckets()
        self._resume()
        if self._cursor.steps(geometry) == 0 and parts.evaluation.at_start:
            self._evaluate(0)
        if self._cursor.steps(geometry) >= end:
            return self._finish("finished")
        batches = parts.batches(rank=self.rank, world_size=self.world_size, cursor=self._cursor)
        self._begin_window()
        while (steps := self._cursor.steps(geometry)) < end:
            batch = self._next(batches)
            rows = StepRows.of(batch, cross_document_targets=parts.step.cross_document_targets)
            asked = self._ask(rows.num_targets)
            if asked.save or asked.stop:
                self._save(wait=True)
            if asked.stop:
                return self._finish("stopped")
            if asked.look and (news := self._notice.look()) and self.rank == 0:
                self._event("preemption", news)
            if batch.step == 0:
                self._enter(batch.window)
            if self._trace:
                self._trace.add(steps, batch)
            self._step(rows.to(self.device), steps, end, asked.targets)
            self._cursor = self._cursor.after(1, geometry)
            if self._cursor.step == 0 and not self._close_window(batch.window):
                self._save(wait=True)
                return self._finish("bad_loss")
        return self._finish("finished")

    def _next(self, batches: Iterator[Any]) -> Any:
        begin = time.perf_counter()
        batch = next(batches)
        self._waited_s += time.perf_counter() - begin
        if Cursor(batch.window, batch.step) != self._cursor:
            raise AssertionError(f"the stream gave step {batch.step} of window {batch.window}, not {self._cursor}")
        return batch

    def _ask(self, targets: int) -> _Asked:
        stop = self.rank == 0 and self.parts.sink.wants_stop()
        look = self.rank == 0 and self._notice.is_due()
        sums = torch.tensor([targets, self._notice.save, stop, look], dtype=torch.int64)
        dist.all_reduce(sums, group=self._host)
        targets, *flags = sums.tolist()
        if flags[0]:
            self._notice.save = False
        return _Asked(targets, *map(bool, flags))

    def _step(self, rows: StepRows, steps: int, end: int, targets: int) -> None:
        parts = self.parts
        self._rate = parts.optimizer.rate.at(steps, end)
        self._result = train_step(
            self._call,
            self.optimizer,
            rows,
            self._losses,
            rate=self._rate,
            clip_norm=parts.optimizer.clip_norm,
            global_targets=targets,
            options=parts.step,
            replicas=self.world_size,
            micro_batches=self._micro,
            no_sync=self._no_sync,
            weigh=self._reweighting.at(steps, end),
            reference=self._reference,
        )

    # ---- windows ----------------------------------------------------------------------------------------

    def _begin_window(self) -> None:
        self._began_s, self._waited_s = time.perf_counter(), 0.0

    def _enter(self, window: int) -> None:
        """The sums of a window have as many domains as its catalog."""
        catalog = self.parts.catalog_of(window)
        if len(catalog) != self._losses.sums.shape[1]:
            self._losses = self._make_losses(len(catalog))
        self._reweighting.enter(catalog)

    def _close_window(self, window: int) -> bool:
        """Add up and report the window; false if the rules say that the run ends here."""
        parts, catalog = self.parts, self.parts.catalog_of(window)
        waited_us = torch.tensor([int(self._waited_s * 1e6)], dtype=torch.int64, device=self.device)
        sums = torch.cat([self._losses.sums.flatten(), waited_us])
        dist.all_reduce(sums)
        self._losses.sums.copy_(sums[:-1].view_as(self._losses.sums))
        waited_s = int(sums[-1]) / 1e6 / self.world_size
        measured = self._losses.close(window, catalog.fingerprint)
        self._tokens += int(measured.signal.tokens_d.sum())
        bad = self._bad_rows(measured) if measured.signal.bad_rows_d.any() else ""
        record = self._record(measured, waited_s)
        done = window + 1
        last = done == parts.planned_windows
        evaluates, saves = parts.evaluation.every_windows, parts.checkpoint.every_windows
        evaluates = last or (evaluates is not None and done % evaluates == 0)
        # What the policy asks for is a part of the signal; else the signal need not wait for it.
        first = evaluates and "evaluation" in parts.needs
        evaluation = self._evaluate(done) if first else None
        influence = self._probe(window, record)
        if self.rank == 0:
            parts.sink.report(replace(measured.signal, evaluation=evaluation, influence=influence), record)
            if bad or measured.skipped_steps:
                text = f"{measured.skipped_steps} steps were left out; rows without a usable loss: {bad or 'none'}"
                logger.warning("window %d: %s", window, text)
                parts.sink.note({"kind": "event", "what": "bad_rows", "text": text, "window": window})
        if evaluates and not first:
            self._evaluate(done)
        stops = measured.skipped_steps > 0 and parts.step.bad_loss == "stop"
        if not stops and (last or (saves and done % saves == 0)):
            self._save(wait=last)
        self._begin_window()
        return not stops

    def _bad_rows(self, measured: WindowLosses) -> str:
        """The bad rows of all ranks by name, as many as each kept."""
        mine = torch.full((len(measured.bad_rows), 3), -1, dtype=torch.int64)
        for place, row in enumerate(measured.bad_rows):
            mine[place] = torch.tensor(row)
        counts = [torch.zeros(1, dtype=torch.int64) for _ in range(self.world_size)]
        dist.all_gather(counts, torch.tensor([len(mine)]), group=self._host)
        most = max(int(count) for count in counts)
        padded = torch.cat([mine, torch.full((most - len(mine), 3), -1, dtype=torch.int64)])
        found = [torch.empty_like(padded) for _ in range(self.world_size)]
        dist.all_gather(found, padded, group=self._host)
        rows = [BadRow(*line) for part in found for line in part.tolist() if line[0] >= 0]
        names = self.parts.catalog_of(measured.signal.window).names
        return ", ".join(f"{names[row.domain]} row {row.row} in step {row.step}" for row in rows)

    def _record(self, measured: WindowLosses, waited_s: float) -> dict[str, Any]:
        signal = measured.signal
        seconds = time.perf_counter() - self._began_s
        tokens = int(signal.tokens_d.sum())
        speed = tokens / seconds
        return {
            "kind": "window",
            "window": signal.window,
            "steps": self._cursor.steps(self.parts.geometry),
            "tokens": self._tokens,
            "seconds": seconds,
            "data_wait_s": waited_s,
            "tokens_per_s": speed,
            "mfu": self._use(speed),
            "rate": self._rate,
            "grad_norm": float(self._result.grad_norm),
            "loss": float(signal.loss_sum_d.sum()) / tokens if tokens else None,
            "skipped_steps": measured.skipped_steps,
            "world_size": self.world_size,
        }

    def _use(self, tokens_per_s: float) -> float | None:
        """The share of the devices' peak that the model's products make up."""
        peak = self.parts.options.peak_flops
        if peak is None and self.device.type == "cuda":
            name = torch.cuda.get_device_name(self.device)
            peak = next((flops for part, flops in PEAK_FLOPS.items() if part in name), None)
        if peak is None or not hasattr(self.model, "flops_per_token"):
            return None
        flops: Any = self.model.flops_per_token
        return flops(self._row_tokens) * tokens_per_s / (peak * self.world_size)

    def _evaluate(self, window: int) -> Evaluation | None:
        """Before that window is trained; what was found, on the first rank."""
        evaluator = self.parts.evaluator
        if evaluator is None:
            return None
        sums = evaluator.measure(
            self._call, rank=self.rank, world_size=self.world_size, device=self.device,
            precision=self.parts.step.precision,
        )  # fmt: skip
        dist.all_reduce(sums)
        if self.rank != 0:
            return None
        steps, sets = self._cursor.steps(self.parts.geometry), evaluator.close(sums)
        record = {"kind": "evaluation", "window": window, "steps": steps, "tokens": self._tokens}
        self.parts.sink.note(record | {"sets": sets})
        losses = [math.nan if one["loss"] is None else one["loss"] for one in sets.values()]
        return Evaluation(sets=tuple(sets), loss_s=np.array(losses, dtype=np.float64))

    def _probe(self, window: int, record: dict[str, Any]) -> Influence | None:
        """After that window was trained; what was found, on the first rank. The record is told what it cost."""
        probe = self.parts.probe
        if probe is None or not probe.due(window) or self.parts.catalog_of(window) != probe.catalog:
            return None
        begin = time.perf_counter()
        sums = probe.measure(
            self.model, self.optimizer, window, rank=self.rank, world_size=self.world_size, device=self.device,
            precision=self.parts.step.precision,
        )  # fmt: skip
        dist.all_reduce(sums)
        if self.rank != 0:
            return None
        found = probe.close(sums, self._rate)
        record["probe_s"] = time.perf_counter() - begin
        record["probe_tokens"] = found.tokens
        return found

    # ---- checkpoints ------------------------------------------------------------------------------------

    def _resume(self) -> None:
        found = self._checkpoints.load_newest(self.model, self.optimizer)
        if found is None:
            folder = self.parts.checkpoints
            if damaged := written(folder):
                raise CheckpointError(
                    f"every checkpoint of {folder} is damaged: {', '.join(path.name for path in damaged)}. "
                    "Restore one from a copy, or remove the folder to train from the first step."
                )
            return
        newest, saved = found
        self._cursor, self._tokens = saved.cursor, saved.tokens
        self._reweighting.load(saved.extra.get("reweight", {}))
        if saved.sums is not None:
            self._reweighting.enter(self.parts.catalog_of(saved.cursor.window))
            self._losses = self._make_losses(saved.sums.shape[1])
            self._losses.count_skipped(torch.tensor(saved.extra.get("skipped_steps", 0), device=self.device))
            if self.rank == 0:
                self._losses.restore(saved.sums)
        if self.rank == 0:
            self._event("resumed", f"{self.world_size} workers go on from {newest.name}")

    def _save(self, *, wait: bool) -> None:
        """All ranks together; what was reported before is durable first."""
        if self.rank == 0:
            self.parts.sink.settle()
        sums: Tensor | None = None
        extra: dict[str, Any] = {}
        if kept := self._reweighting.state():
            extra["reweight"] = kept
        if self._cursor.step:
            sums = self._losses.sums.clone()
            dist.all_reduce(sums)
            extra["skipped_steps"] = self._losses.skipped_steps
        steps = self._cursor.steps(self.parts.geometry)
        saved = Saved(cursor=self._cursor, sums=sums, tokens=self._tokens, extra=extra)
        self._saves(self._checkpoints.wait, last=False)  # the one before
        save = partial(self._checkpoints.save, self.model, self.optimizer, saved, geometry_steps=steps, wait=wait)
        if self._saves(save, last=wait) and self.rank == 0:
            self._event("checkpoint", f"{steps} steps")

    def _saves(self, save: Callable[[], None], *, last: bool) -> bool:
        """Whether it went well, on every rank alike. Else older checkpoints must do, until too many fail."""
        before = self._checkpoints.num_done
        try:
            save()
            if self._checkpoints.num_done > before:
                self._failed_saves = 0
        except CheckpointError as error:
            self._failed_saves += 1
            if last or self._failed_saves >= self.parts.checkpoint.max_failed:
                raise
            logger.warning("%s", error)
            if self.rank == 0:
                self._event("no_checkpoint", str(error))
            return False
        return True

    def _event(self, what: str, text: str) -> None:
        steps = self._cursor.steps(self.parts.geometry)
        self.parts.sink.note(
            {"kind": "event", "what": what, "text": text, "window": self._cursor.window, "steps": steps}
        )

    def _finish(self, ending: Ending) -> Ending:
        self._checkpoints.wait()
        if self.rank == 0:
            self._event(ending, f"after {self._cursor.steps(self.parts.geometry)} steps")
            self.parts.sink.settle()
        return ending

    def close(self) -> None:
        if self._trace:
            self._trace.close()


class _Notice:
    """Whether somebody says that a node of the run will be taken away."""

    def __init__(self, preemption: Callable[[], Any]) -> None:
        self.save = False
        self._preemption = preemption
        self._seen: object = None
        self._next_s = time.monotonic() + NOTICE_EVERY_S

    def is_due(self) -> bool:
        return time.monotonic() >= self._next_s

    def look(self) -> str:
        """What is new, if anything; all ranks must look together."""
        info = self._preemption()
        self._next_s = time.monotonic() + NOTICE_EVERY_S
        if info is None or info == self._seen:
            return ""
        self.save, self._seen = True, info
        return f"nodes {', '.join(info.preempted_node_ids)} will be taken away; saving now"


def exchange_rows(mine: slice, batch_rows: int | None, rows: Tensor) -> Tensor:
    """What all ranks know of the rows of a step, slot by slot, from this rank's; None: there is no other rank. Each
    rank adds to 0 in the places of the others, so that no sum is rounded, and ranks may have unlike numbers of rows."""
    if batch_rows is None:
        return rows
    whole = rows.new_zeros(batch_rows, rows.shape[1])
    whole[mine] = rows
    dist.all_reduce(whole)
    return whole


def _preemption() -> Any:
    return ray.train.get_preemption_info() if hasattr(ray.train, "get_preemption_info") else None


def _device() -> torch.device:
    from ray.train.torch import get_device  # noqa: PLC0415

    device = get_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


@contextmanager
def _without_exchange(model: Any) -> Iterator[None]:
    """Of a sharded model."""
    model.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        model.set_requires_gradient_sync(True)
