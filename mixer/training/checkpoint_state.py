"""What a checkpoint holds, as tensors by name, and how it is set again.

    model/<parameter or buffer>
    optimizer/<parameter>/<key>     as exp_avg, step
    random/<rank>/<torch, cuda, python>
    sums                            of the window under way

Names are those of the model without its wrappers, so that what was saved under one wrapper is loaded under another.
Nothing here speaks to other ranks.
"""

import hashlib
import json
import logging
import random
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from mixer.core.errors import CheckpointError

logger = logging.getLogger(__name__)

_WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.")  # of compiled and recomputed modules, in names
_FREE = {"lr", "initial_lr", "fused", "foreach"}  # numbers of a group that may differ without a word


class Kind(NamedTuple):
    """What a tensor of the checkpoint is."""

    dtype: torch.dtype
    shape: torch.Size


# --- names --------------------------------------------------------------------------------------------


def _name(name: str) -> str:
    """A parameter's name without its wrappers'."""
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def _bare(model: nn.Module) -> nn.Module:
    while (wrapped := isinstance(model, nn.parallel.DistributedDataParallel)) or hasattr(model, "_orig_mod"):
        model = getattr(model, "module" if wrapped else "_orig_mod")
    return model


def parameters_of(model: nn.Module) -> dict[Tensor, str]:
    """Every parameter's name; the first, where it has several."""
    return {parameter: _name(name) for name, parameter in _bare(model).named_parameters()}


def other_names(model: nn.Module) -> set[str]:
    """Names, beside the first, of parameters that have several, as tied embeddings have."""
    names = {_name(name) for name, _ in _bare(model).named_parameters(remove_duplicate=False)}
    return names - set(parameters_of(model).values())


# --- the optimizer ------------------------------------------------------------------------------------


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    names = parameters_of(model)
    if not optimizer.state.keys() <= names.keys():
        raise CheckpointError("the optimizer holds parameters that are not the model's. Save it with its own model.")
    return {
        f"optimizer/{names[parameter]}/{key}": torch.as_tensor(value)
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
    }


def groups_of(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """The numbers of each group of parameters, as JSON has them."""
    return [
        {
            key: json.loads(json.dumps(value.item() if isinstance(value, Tensor) else value))
            for key, value in group.items()
            if key != "params"
        }
        for group in optimizer.param_groups
    ]


def optimizer_targets(
    model: nn.Module, optimizer: torch.optim.Optimizer, there: Mapping[str, Kind]
) -> tuple[dict[str, Tensor], list[str]]:
    """Room for the optimizer's tensors of a checkpoint, sharded as its parameters are here; and what does not fit."""
    held = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    parameters = {name: parameter for parameter, name in parameters_of(model).items() if parameter in held}
    targets, found = {}, []
    for full, kind in there.items():
        if not full.startswith("optimizer/"):
            continue
        name = full.split("/")[1]
        if name not in parameters:
            found.append(f"{full} belongs to no parameter that is trained here")
        elif kind.shape == parameters[name].shape:
            targets[full] = torch.empty_like(parameters[name], dtype=kind.dtype, requires_grad=False)
        elif not kind.shape:
            targets[full] = torch.empty((), dtype=kind.dtype)
        else:
            found.append(f"{full} is {list(kind.shape)} in the checkpoint and {list(parameters[name].shape)} here")
    return targets, found


def set_optimizer(
    model: nn.Module, optimizer: torch.optim.Optimizer, targets: dict[str, Tensor], groups: list[dict[str, Any]]
) -> None:
    names, state = parameters_of(model), optimizer.state_dict()
    by_name: dict[str, dict[str, Tensor]] = {}
    for full, value in targets.items():
        if full.startswith("optimizer/"):
            _, name, key = full.split("/")
            by_name.setdefault(name, {})[key] = value
    order = [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]
    state["state"] = {number: by_name[name] for number, name in enumerate(order) if name in by_name}
    mine = groups_of(optimizer)
    if len(groups) == len(mine):
        for group, then in zip(state["param_groups"], groups, strict=True):
            group["lr"] = then.get("lr", group["lr"])
        pairs = zip(groups, mine, strict=True)
        other = {
            f"{key}={now[key]} (saved with {then[key]})"
            for then, now in pairs
            for key in now.keys() & then.keys() - _FREE
            if now[key] != then[key]
        }
        if other:
            logger.warning("the optimizer goes on with its own %s", ", ".join(sorted(other)))
    optimizer.load_state_dict(state)


# --- the model ----------------------------------------------------------------------------------------


def model_differences(tensors: Mapping[str, Tensor], there: Mapping[str, Kind], *, dtypes: bool) -> list[str]:
    """What of the model is not as in the checkpoint, name by name."""
    saved = {name for name in there if name.startswith("model/")}
    found = [f"{name} is missing in the checkpoint" for name in sorted(tensors.keys() - saved)]
    found += [f"{name} is in the checkpoint alone" for name in sorted(saved - tensors.keys())]
    for name in sorted(saved & tensors.keys()):
        kind, value = there[name], tensors[name]
        if kind.shape != value.shape:
            found.append(f"{name} is {list(kind.shape)} in the checkpoint and {list(value.shape)} here")
        elif dtypes and kind.dtype != value.dtype:
            found.append(f"{name} is {kind.dtype} in the checkpoint and {value.dtype} here")
    return found


def _is_sharded(tensor: Tensor) -> bool:
    return hasattr(tensor, "to_local")


def local_part(tensor: Tensor) -> Tensor:
    """This rank's part of a sharded tensor."""
    return (tensor.to_local() if _is_sharded(tensor) else tensor).detach()  # pyright: ignore[reportAttributeAccessIssue]


def share_of(tensors: Mapping[str, Tensor], rank: int, world_size: int) -> dict[str, Tensor]:
    """What a rank saves: its part of each sharded tensor, and about as many bytes as the others of those that all have
    alike. Every rank must hold the same names."""
    share, load = {}, [0] * world_size
    for name, tensor in tensors.items():
        if not _is_sharded(tensor):
            owner = load.index(min(load))
            load[owner] += tensor.nbytes
            if owner != rank:
                continue
        share[name] = tensor
    return share


# --- random numbers -----------------------------------------------------------------------------------


def random_states(rank: int) -> dict[str, Tensor]:
    python = np.frombuffer(json.dumps(random.getstate()).encode(), dtype=np.uint8)
    states = {"torch": torch.get_rng_state(), "python": torch.from_numpy(python.copy())}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return {f"random/{rank}/{kind}": state for kind, state in states.items()}


def set_random_states(targets: dict[str, Tensor], rank: int) -> None:
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
