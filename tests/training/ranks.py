"""Functions run on several processes at once, joined by gloo, as ranks of one run.

They are forked from a server that has imported torch and nothing else, so that starting them is quick and no
thread of the tests' own process is in the way.
"""

import multiprocessing
import pickle
import random
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from mixer.training.optimizer import OptimizerOptions, RateOptions, make_optimizer
from mixer.training.step import DomainLosses, StepOptions, StepRows, train_step
from tests.training.making import make_batch, tiny

PATIENCE_S = 120
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.training.ranks"])


def run(function: Callable[..., Any], world_size: int, *args: Any) -> list[Any]:
    """function(rank, world_size, group, *args) on every rank; group is None where there is one rank. What an
    exception says is returned in the place of a result; a rank that died gives its exit code."""
    with tempfile.TemporaryDirectory() as folder:
        pipes = [_context.Pipe(duplex=False) for _ in range(world_size)]
        ranks = [
            _context.Process(target=_rank, args=(function, rank, world_size, folder, pipes[rank][1], args))
            for rank in range(world_size)
        ]
        for rank, (_, sender) in zip(ranks, pipes, strict=True):
            rank.start()
            sender.close()
        results = []
        for rank, (receiver, _) in zip(ranks, pipes, strict=True):
            try:
                results.append(pickle.loads(receiver.recv_bytes()) if receiver.poll(PATIENCE_S) else "no answer")
            except EOFError:
                rank.join(PATIENCE_S)
                results.append(rank.exitcode)
        for rank in ranks:
            rank.join(5)
            rank.kill()
        return results


def _rank(function: Any, rank: int, world_size: int, folder: str, sender: Any, args: Any) -> None:
    torch.set_num_threads(1)
    try:
        group = None
        if world_size > 1:
            store = dist.FileStore(  # pyright: ignore[reportPrivateImportUsage]
                f"{folder}/store", world_size
            )
            dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
            group = dist.new_group(backend="gloo", timeout=timedelta(seconds=20))
        sender.send_bytes(pickle.dumps(function(rank, world_size, group, *args)))
    except Exception as error:
        sender.send_bytes(pickle.dumps(f"{type(error).__name__}: {error}\n{traceback.format_exc()}"))
    finally:
        sender.close()


def gather(mine: torch.Tensor) -> torch.Tensor:
    """The rows of all ranks, one rank after the other."""
    if not dist.is_initialized():
        return mine
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, mine.numpy())
    return torch.from_numpy(np.concatenate(parts))


# --- a small run --------------------------------------------------------------------------------------


class Run:
    """A tiny model in training: `kind` is plain, ddp or fsdp."""

    def __init__(self, kind: str = "plain", rank: int = 0, world_size: int = 1, *, seed: int = 0, **model: Any) -> None:
        self.rank, self.world_size, self.step = rank, world_size, 0
        torch.manual_seed(100 + seed + rank)
        random.seed(200 + seed + rank)
        self.bare: nn.Module = tiny(seed, **{"tied": False, **model})
        if kind == "fsdp":
            for layer in self.bare.layers:  # pyright: ignore[reportGeneralTypeIssues]
                fully_shard(layer)
            fully_shard(self.bare)
        options = OptimizerOptions(rate=RateOptions(peak=1e-2))
        self.optimizer = make_optimizer(self.bare, options)
        self.model = DistributedDataParallel(self.bare) if kind == "ddp" else self.bare

    def train(self, steps: int) -> "Run":
        for _ in range(steps):
            rows = StepRows.of(make_batch(rows=6, seed=self.step))
            noise = 1 + 0.1 * torch.rand(()).item() + 0.1 * random.random()  # what a dropout would do
            part = rows.part(6 * self.rank // self.world_size, 6 * (self.rank + 1) // self.world_size)
            train_step(
                self.model,
                self.optimizer,
                part,
                DomainLosses(8),
                rate=1e-2 * noise if self.world_size == 1 else 1e-2,
                clip_norm=1.0,
                global_targets=rows.num_targets,
                options=StepOptions(),
                replicas=self.world_size,
            )
            self.step += 1
        return self

    def state(self) -> dict[str, np.ndarray]:
        """Every number of it, whole on each rank; copies."""
        names: dict[Any, str] = {parameter: name for name, parameter in self.bare.named_parameters()}
        out = {name: _whole(parameter) for parameter, name in names.items()}
        for parameter, state in self.optimizer.state.items():
            out |= {f"{names[parameter]}/{key}": _whole(value) for key, value in state.items()}
        return out

    def draws(self) -> tuple[float, float]:
        """What the random generators give next; they are not moved."""
        then = torch.get_rng_state(), random.getstate()
        draws = torch.rand(()).item(), random.random()
        torch.set_rng_state(then[0])
        random.setstate(then[1])
        return draws


def _whole(tensor: Any) -> np.ndarray:
    tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return tensor.detach().clone().numpy()


def differences(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> list[str]:
    """Names whose values are not the same to the last bit."""
    both = one.keys() & other.keys()
    return sorted(one.keys() ^ other.keys()) + sorted(
        name for name in both if one[name].tobytes() != other[name].tobytes() or one[name].shape != other[name].shape
    )
