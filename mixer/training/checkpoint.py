"""Model, optimizer, random states and position of a run, saved and loaded as one, on any number of ranks.

Tensors go through `torch.distributed.checkpoint`: every rank writes its part (of what all have alike, a share), and
a rank of another number, or of a model sharded in another way, reads what it needs. What is written is bytes and
JSON (`checkpoint_folder` has the layout), never a pickle; a `.metadata` lying there is neither written nor read.

`save` copies what is saved to buffers on the host, kept from save to save, and returns; a thread writes them. The
optimizer's numbers beside its tensors (betas, decay) are recorded, but its own stay in force when it is loaded.
"""

import hashlib
import json
import logging
import os
import random
import secrets
import warnings
from concurrent.futures import Future as Upload
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, SavePlan
from torch.distributed.checkpoint.staging import AsyncStager
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save, save
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from mixer.core.errors import CheckpointError, ConfigError, DamagedError, MixerError
from mixer.core.plan import Cursor
from mixer.training.checkpoint_folder import File, Record, checksum, find, path_of, prune, sweep, sync_folder

__all__ = ["CheckpointOptions", "Checkpoints", "Saved", "find", "load_model"]

logger = logging.getLogger(__name__)

NAMED = 5  # differences that an error names
_WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.")  # of compiled and recomputed modules, in names
_DTYPES = {str(dtype): dtype for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)}

warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")  # one process is fine


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointOptions:
    """When to save, and what to keep."""

    every_windows: int | None = 16  # null: only at the end, and when told to stop
    keep: int = 3  # the newest
    keep_every_windows: int | None = None  # those at the start of such windows are kept for good, as forks need them
    asynchronous: bool = True

    def __post_init__(self) -> None:
        for name in ("every_windows", "keep", "keep_every_windows"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name}={value}; it must be at least 1{'' if name == 'keep' else ', or null'}.")


@dataclass(frozen=True, slots=True)
class Saved:
    """What a checkpoint holds beside weights, optimizer and random states."""

    cursor: Cursor
    sums: Tensor | None = None  # int64: losses of the part of the window that is trained, summed over ranks
    tokens: int = 0
    extra: dict[str, Any] = field(default_factory=dict)  # JSON


class Checkpoints:
    """The checkpoints of a run, from one of its ranks. All ranks call `save`, `wait` and `load*`, in the same order.

    `group` is a process group of the CPU, for this alone: a save uses it while training goes on.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        rank: int = 0,
        world_size: int = 1,
        group: Any = None,
        options: CheckpointOptions | None = None,
    ) -> None:
        if world_size > 1 and group is None:
            raise ConfigError(f"{world_size} ranks save together, and no group was given. Give a group of the CPU.")
        self.folder, self.options = Path(folder), options or CheckpointOptions()
        self._rank, self._world_size, self._group = rank, world_size, group
        self._buffers: dict[str, Tensor] = {}
        self._pending: tuple[_Writer, Upload] | None = None

    def save(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        saved: Saved,
        *,
        geometry_steps: int,
        wait: bool = False,
    ) -> None:
        """Save everything as it is now; with `wait`, or unless asynchronous, it is on disk when this returns.

        A save still under way is waited for first, and its error raised here: then nothing new is saved.
        """
        self.wait()
        tensors = _tensors_of(model, optimizer) | _random_states(self._rank)
        if saved.sums is not None:
            tensors["sums"] = saved.sums
        path = path_of(self.folder, geometry_steps)
        record = Record(
            cursor=saved.cursor,
            steps=geometry_steps,
            tokens=saved.tokens,
            extra=_plain(saved.extra),
            world_size=self._world_size,
            groups=_groups_of(optimizer),
            index="",
            files={},
        )
        writer = _Writer(path, record, self._rank, self.options, self._buffers)
        how: dict[str, Any] = {
            "storage_writer": writer,
            "planner": DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False),
            "process_group": self._group,
        }
        if self.options.asynchronous and not wait:
            upload: Any = async_save(tensors, **how)
            self._pending = writer, getattr(upload, "upload_completion", upload)
            return
        writer.use(tensors)
        self._finish(writer, lambda: save(tensors, **how))

    def wait(self) -> None:
        """Until the save under way is on disk; raises what went wrong with it."""
        if self._pending is not None:
            (writer, upload), self._pending = self._pending, None
            self._finish(writer, upload.result)

    def _finish(self, writer: "_Writer", result: Any) -> None:
        try:
            result()
        except (Exception, CheckpointException) as error:
            writer.discard()
            rank, cause = _cause(error)
            raise CheckpointError(
                f"{writer.path} was not saved: {cause} (rank {rank}). Earlier checkpoints are as they were. "
                "Make room or restore the folder, then save again."
            ) from error

    def newest(self) -> Path | None:
        return find(self.folder)

    def load_newest(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[Path, Saved] | None:
        """Load the newest that is whole and unharmed; those whose data turn out damaged are named and passed over."""
        path = self.newest()
        while path is not None:
            try:
                return path, self.load(path, model, optimizer)
            except DamagedError as error:
                logger.warning("%s The one before it is tried.", error)
                path = find(self.folder, int(path.name) - 1)
        return None

    def load(self, path: str | Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> Saved:
        """Set model, optimizer and this rank's random states; each byte used is checked against its checksum.

        With an error the model may be partly loaded: load another checkpoint, or stop.
        """
        self.wait()
        reader = _Reader(Path(path))
        targets = _model_targets(model, reader, dtypes=True) | _optimizer_targets(model, optimizer, reader)
        targets |= reader.empty_like(lambda name: name == "sums" or name.startswith("random/"))
        reader.read(targets, self._group)
        _set_model(model, targets)
        _set_optimizer(model, optimizer, targets, reader.record.groups)
        _set_random_states(targets, self._rank)
        return reader.saved(targets)


def load_model(path: str | Path, model: nn.Module) -> Saved:
    """The weights alone, in this process alone, from a run on any number of ranks."""
    reader = _Reader(Path(path))
    targets = _model_targets(model, reader, dtypes=False) | reader.empty_like(lambda name: name == "sums")
    reader.read(targets, None, alone=True)
    _set_model(model, targets)
    return reader.saved(targets)


# --- what is saved ------------------------------------------------------------------------------------


def _plain(value: Any) -> Any:
    try:
        return json.loads(json.dumps(value))
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"extra={value!r} cannot be saved: {error}. It must be plain JSON.") from error


def _name(name: str) -> str:
    """A parameter's name without its wrappers'."""
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def _bare(model: nn.Module) -> nn.Module:
    while isinstance(model, nn.parallel.DistributedDataParallel) or hasattr(model, "_orig_mod"):
        model = getattr(model, "module" if isinstance(model, nn.parallel.DistributedDataParallel) else "_orig_mod")
    return model


def _model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Weights and buffers; what two names share, as tied embeddings, under the first."""
    first: dict[Tensor, str] = {}
    for name, parameter in _bare(model).named_parameters(remove_duplicate=False):
        first.setdefault(parameter, _name(name))
    again = {_name(name) for name, parameter in _bare(model).named_parameters(remove_duplicate=False)}
    again -= set(first.values())
    tensors = {}
    for name, value in get_model_state_dict(model).items():
        if not isinstance(value, Tensor):
            raise CheckpointError(f"{name} of the model is a {type(value).__name__}. Only tensors can be saved.")
        if name not in again:
            tensors[f"model/{name}"] = value
    return tensors


def _parameters(model: nn.Module) -> dict[Tensor, str]:
    return {parameter: _name(name) for name, parameter in _bare(model).named_parameters()}


def _tensors_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    tensors = _model_tensors(model)
    names = _parameters(model)
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            tensors[f"optimizer/{names[parameter]}/{key}"] = torch.as_tensor(value)
    return tensors


def _groups_of(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """The numbers of each group of parameters, as JSON has them."""
    return [
        {
            key: json.loads(json.dumps(value.item() if isinstance(value, Tensor) else value))
            for key, value in group.items()
            if key != "params"
        }
        for group in optimizer.param_groups
    ]


def _random_states(rank: int) -> dict[str, Tensor]:
    python = np.frombuffer(json.dumps(random.getstate()).encode(), dtype=np.uint8)
    states = {"torch": torch.get_rng_state(), "python": torch.from_numpy(python.copy())}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return {f"random/{rank}/{kind}": state for kind, state in states.items()}


def _local(tensor: Tensor) -> Tensor:
    """This rank's part of a sharded tensor."""
    return tensor.to_local().detach() if hasattr(tensor, "to_local") else tensor.detach()  # pyright: ignore[reportAttributeAccessIssue]


# --- how it is set again ------------------------------------------------------------------------------


def _model_targets(model: nn.Module, reader: "_Reader", *, dtypes: bool) -> dict[str, Tensor]:
    targets = _model_tensors(model)
    there = {name for name in reader.index if name.startswith("model/")}
    found = [f"{name} is missing in the checkpoint" for name in sorted(targets.keys() - there)]
    found += [f"{name} is in the checkpoint alone" for name in sorted(there - targets.keys())]
    for name in sorted(there & targets.keys()):
        shape, dtype = reader.shape(name), reader.dtype(name)
        if shape != targets[name].shape:
            found.append(f"{name} is {list(shape)} in the checkpoint and {list(targets[name].shape)} here")
        elif dtypes and dtype != targets[name].dtype:
            found.append(f"{name} is {dtype} in the checkpoint and {targets[name].dtype} here")
    reader.refuse(found, "model")
    return targets


def _optimizer_targets(model: nn.Module, optimizer: torch.optim.Optimizer, reader: "_Reader") -> dict[str, Tensor]:
    """Room for the optimizer's tensors in the checkpoint, sharded as its parameters are here."""
    held = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    parameters = {name: parameter for parameter, name in _parameters(model).items() if parameter in held}
    targets, found = {}, []
    for full in (name for name in reader.index if name.startswith("optimizer/")):
        name = full.split("/")[1]
        shape, dtype = reader.shape(full), reader.dtype(full)
        if name not in parameters:
            found.append(f"{full} belongs to no parameter that is trained here")
        elif shape == parameters[name].shape:
            targets[full] = torch.empty_like(parameters[name], dtype=dtype, requires_grad=False)
        elif not shape:
            targets[full] = torch.empty((), dtype=dtype)
        else:
            found.append(f"{full} is {list(shape)} in the checkpoint and {list(parameters[name].shape)} here")
    reader.refuse(found, "optimizer")
    return targets


def _set_model(model: nn.Module, targets: dict[str, Tensor]) -> None:
    """The tensors of `targets` are the model's own, and loaded; wrappers that keep others hear of them here."""
    state = get_model_state_dict(model)
    state.update({name.removeprefix("model/"): value for name, value in targets.items() if name.startswith("model/")})
    set_model_state_dict(model, state)


def _set_optimizer(
    model: nn.Module, optimizer: torch.optim.Optimizer, targets: dict[str, Tensor], groups: list[dict[str, Any]]
) -> None:
    names, state = _parameters(model), optimizer.state_dict()
    by_name: dict[str, dict[str, Tensor]] = {}
    for full, value in targets.items():
        if full.startswith("optimizer/"):
            _, name, key = full.split("/")
            by_name.setdefault(name, {})[key] = value
    order = [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]
    state["state"] = {number: by_name[name] for number, name in enumerate(order) if name in by_name}
    mine = _groups_of(optimizer)
    if len(groups) == len(mine):
        for group, then in zip(state["param_groups"], groups, strict=True):
            group["lr"] = then.get("lr", group["lr"])
        pairs = zip(groups, mine, strict=True)
        other = {
            f"{key}={now[key]} (saved with {then[key]})"
            for then, now in pairs
            for key in now.keys() & then.keys() - {"lr", "initial_lr", "fused", "foreach"}
            if now[key] != then[key]
        }
        if other:
            logger.warning("the optimizer goes on with its own %s", ", ".join(sorted(other)))
    optimizer.load_state_dict(state)


def _set_random_states(targets: dict[str, Tensor], rank: int) -> None:
    """A rank that was not there when they were saved gets states drawn from the first rank's."""
    if f"random/{rank}/torch" not in targets:
        digest = hashlib.sha256(targets["random/0/torch"].numpy().tobytes() + f":{rank}".encode()).digest()
        seed = int.from_bytes(digest[:8], "big") >> 1
        torch.manual_seed(seed)  # of all devices
        random.seed(seed)
        return
    torch.set_rng_state(targets[f"random/{rank}/torch"])
    version, state, gauss = json.loads(targets[f"random/{rank}/python"].numpy().tobytes())
    random.setstate((version, tuple(state), gauss))
    if torch.cuda.is_available() and f"random/{rank}/cuda" in targets:
        torch.cuda.set_rng_state(targets[f"random/{rank}/cuda"])


def _cause(error: BaseException) -> tuple[int, BaseException]:
    """The rank that failed first by number, and with what."""
    if isinstance(error, CheckpointException) and error.failures:
        rank, (cause, _) = min(error.failures.items(), key=lambda item: item[0])
        return rank, cause
    return 0, error


# --- bytes in and out ---------------------------------------------------------------------------------


class _Writer(StorageWriter, AsyncStager):
    """One save of one rank. `stage` fills the buffers; the rest is called by the thread that writes."""

    _synchronize_after_execute = False

    def __init__(
        self, path: Path, record: Record, rank: int, options: CheckpointOptions, buffers: dict[str, Tensor]
    ) -> None:
        self.path = path
        self._record, self._rank, self._options, self._buffers = record, rank, options, buffers
        self._values: dict[str, Tensor] = {}
        self._file: Path | None = None

    def use(self, state_dict: dict[str, Tensor]) -> None:
        self._values = {name: _local(tensor) for name, tensor in state_dict.items()}

    @torch.no_grad()
    def stage(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        self.use(state_dict)
        devices = set()
        for name, value in self._values.items():
            buffer = self._buffers.get(name)
            if buffer is None or buffer.shape != value.shape or buffer.dtype != value.dtype:
                buffer = torch.empty(value.shape, dtype=value.dtype, pin_memory=value.is_cuda)
                self._buffers[name] = buffer
            buffer.copy_(value, non_blocking=value.is_cuda)
            if value.is_cuda:
                devices.add(value.device)
            self._values[name] = buffer
        for name in self._buffers.keys() - self._values.keys():
            del self._buffers[name]
        for device in devices:
            torch.cuda.current_stream(device).synchronize()
        return state_dict  # for its shapes and shards; what is written are the buffers

    def reset(self, checkpoint_id: Any = None) -> None: ...

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None: ...

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        sweep(self.path.parent)
        self.path.mkdir(parents=True, exist_ok=True)
        sync_folder(self.path.parent)
        save = secrets.token_hex(4)
        return [replace(plan, storage_data=save) for plan in plans]

    def write_data(self, plan: SavePlan, planner: Any) -> Future[list[WriteResult]]:
        file = self.path / f"{self._rank:05d}-{plan.storage_data}.data"
        results, begin = [], 0
        self.path.mkdir(parents=True, exist_ok=True)
        with open(file, "xb", buffering=0) as stream:
            self._file = file
            for item in plan.items:
                value = self._values[item.index.fqn]
                data = memoryview(value.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())  # pyright: ignore[reportArgumentType]
                piece = (file.name, begin, checksum(data))
                results.append(WriteResult(item.index, data.nbytes, piece))
                begin += data.nbytes
                while data:
                    data = data[stream.write(data) :]
            os.fsync(stream.fileno())
        sync_folder(self.path)
        return _done(results)

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """By the first rank, after all have written."""
        pieces = {result.index: result.storage_data for rank in results for result in rank}
        index = {}
        for name, tensor in metadata.state_dict_metadata.items():
            assert isinstance(tensor, TensorStorageMetadata), name
            chunks = [
                [list(chunk.offsets), list(chunk.sizes), *pieces[MetadataIndex(name, chunk.offsets)]]
                for chunk in tensor.chunks
            ]
            index[name] = {"dtype": str(tensor.properties.dtype), "shape": list(tensor.size), "pieces": chunks}
        files = {}
        for rank in results:
            for name in {result.storage_data[0] for result in rank}:
                sums = b"".join(bytes.fromhex(result.storage_data[2]) for result in rank)
                files[name] = File(sum(result.size_in_bytes for result in rank), checksum(sums))
        self._write_record(index, files)
        sweep(self.path.parent)
        prune(self.path.parent, self.path, self._options.keep, self._options.keep_every_windows)

    def _write_record(self, index: dict[str, Any], files: dict[str, File]) -> None:
        data = json.dumps(index, separators=(",", ":")).encode()
        assert self._file is not None
        name = f"index-{self._file.stem.split('-')[1]}.json"
        with open(self.path / name, "xb", buffering=0) as stream:
            view = memoryview(data)
            while view:
                view = view[stream.write(view) :]
            os.fsync(stream.fileno())
        files[name] = File(len(data), checksum(data))
        replace(self._record, index=name, files=files).write(self.path)

    def discard(self) -> None:
        """After a failure: remove what this rank wrote, so that it takes no room, unless it counts after all."""
        if self._file is None:
            return
        try:
            if self._file.name in Record.read(self.path).files:
                return
        except CheckpointError:
            pass
        try:
            self._file.unlink(missing_ok=True)
        except OSError as error:
            logger.warning("%s is of no use and cannot be removed: %s", self._file, error)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return True


class _Reader(StorageReader):
    """One checkpoint, read by one rank."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.record = Record.read(path)
        self.record.check(path)
        self.index = self.record.read_index(path)

    def shape(self, name: str) -> torch.Size:
        return torch.Size(self.index[name]["shape"])

    def dtype(self, name: str) -> torch.dtype:
        return _DTYPES[self.index[name]["dtype"]]

    def refuse(self, found: list[str], what: str) -> None:
        if found:
            more = f"; and {len(found) - NAMED} more" if len(found) > NAMED else ""
            raise CheckpointError(
                f"{self.path} is of another {what}: {'; '.join(found[:NAMED])}{more}. "
                "Load it into what it was saved from, or name another checkpoint."
            )

    def empty_like(self, wanted: Any) -> dict[str, Tensor]:
        return {name: torch.empty(self.shape(name), dtype=self.dtype(name)) for name in self.index if wanted(name)}

    def saved(self, targets: dict[str, Tensor]) -> Saved:
        record = self.record
        return Saved(record.cursor, targets.get("sums"), record.tokens, record.extra)

    def read(self, targets: dict[str, Tensor], group: Any, *, alone: bool = False) -> None:
        planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        try:
            load(targets, storage_reader=self, planner=planner, process_group=group, no_dist=alone)
        except (Exception, CheckpointException) as error:
            rank, cause = _cause(error)
            if isinstance(cause, MixerError):
                raise type(cause)(str(cause)) from error
            raise CheckpointError(
                f"{self.path} could not be loaded: {cause!r} (rank {rank}). Load it into the model it was saved from, "
                "or name another checkpoint."
            ) from error

    def reset(self, checkpoint_id: Any = None) -> None: ...

    def read_metadata(self) -> Metadata:
        tensors: dict[str, Any] = {}
        for name, tensor in self.index.items():
            chunks = [ChunkStorageMetadata(torch.Size(piece[0]), torch.Size(piece[1])) for piece in tensor["pieces"]]
            properties = TensorProperties(dtype=self.dtype(name))
            tensors[name] = TensorStorageMetadata(properties, self.shape(name), chunks)
        return Metadata(tensors)

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None: ...

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return replace(plan, storage_data=(str(self.path.name), self.record.index))

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        if len(views := {plan.storage_data for plan in plans}) > 1:
            raise CheckpointError(
                f"ranks load different checkpoints: {sorted(views)}. All must see one folder; check how it is shared."
            )
        return plans

    def read_data(self, plan: LoadPlan, planner: Any) -> Future[None]:
        pieces = {
            MetadataIndex(name, piece[0]): piece for name, tensor in self.index.items() for piece in tensor["pieces"]
        }
        for item in plan.items:
            name = item.storage_index.fqn
            part = self._piece(name, pieces[item.storage_index])
            for dim, (begin, length) in enumerate(zip(item.storage_offsets, item.lengths, strict=True)):
                part = part.narrow(dim, begin, length)
            target = planner.resolve_tensor(item).detach()
            target.copy_(part)
            planner.commit_tensor(item, target)
        return _done(None)

    def _piece(self, name: str, piece: Any) -> Tensor:
        _, sizes, file, begin, check = piece
        path, dtype = self.path / file, self.dtype(name)
        data = torch.empty(int(np.prod(sizes)) * dtype.itemsize, dtype=torch.uint8)
        try:
            with open(path, "rb", buffering=0) as stream:
                stream.seek(begin)
                view = memoryview(data.numpy())  # pyright: ignore[reportArgumentType]
                while view and (read := stream.readinto(view)):
                    view = view[read:]
        except OSError as error:
            raise DamagedError(
                f"{path} cannot be read: {error.strerror or error}. Load an earlier checkpoint, or restore the file."
            ) from error
        if len(view) or checksum(data.numpy()) != check:
            raise DamagedError(
                f"{path} is damaged: {name}, {len(data)} bytes from {begin} on, is not as it was written. "
                "Load an earlier checkpoint, or restore the file from a copy."
            )
        return data.view(dtype).reshape(sizes)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return True


def _done(value: Any) -> Future[Any]:
    future: Future[Any] = Future()
    future.set_result(value)
    return future
