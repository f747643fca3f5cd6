"""Linear layers: which of a model's, and what passes through them forth and back.

What enters a layer and the derivative with respect to what leaves it are heard by hooks that stand during one pass;
weights, gradients, modes and random states are afterwards as they were. The derivatives are taken with respect to
layers' outputs alone, so that no parameter gets a gradient, sharded or not.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mixer.core.errors import ConfigError
from mixer.training.evaluation import Precision
from mixer.training.labels import SampledLoss


class Layer(NamedTuple):
    """A linear layer; with its bias, `inputs` counts the constant 1."""

    name: str
    outputs: int
    inputs: int
    has_bias: bool

    @property
    def parameters(self) -> tuple[str, ...]:
        """As `named_parameters` of the model calls them."""
        prefix = f"{self.name}." if self.name else ""
        return (f"{prefix}weight", f"{prefix}bias") if self.has_bias else (f"{prefix}weight",)


def find_layers(model: nn.Module, layers: Sequence[str] = ()) -> tuple[Layer, ...]:
    """Those that have the trained parameters whose names match one of the globs; without any, all linear layers in
    numbered blocks, by their weights alone. Of a layer the weight may stand alone, the bias not."""
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    chosen = {name for name in trained if any(fnmatchcase(name, glob) for glob in layers)}
    if not layers:
        numbered = [name for name in trained if name.endswith(".weight") and any(map(str.isdigit, name.split(".")))]
        chosen = {name for name in numbered if name.removesuffix(".weight") in linear}
    found: list[Layer] = []
    for name, module in linear.items():
        outputs, inputs = module.weight.shape
        layer = Layer(name, outputs, inputs + 1, True)
        if layer.parameters[0] in chosen:
            has_bias = layer.parameters[1] in chosen
            found.append(layer if has_bias else layer._replace(inputs=inputs, has_bias=False))
    if beside := sorted(chosen - {name for layer in found for name in layer.parameters}):
        raise ConfigError(
            f"{', '.join(beside[:5])} cannot have a curvature: layers={list(layers)} must name weights of linear "
            "layers, and biases beside them. Narrow the globs."
        )
    if not found:
        raise ConfigError(
            f"layers={list(layers)} leaves no linear layer that is trained; there are {', '.join([*linear][:5])}. "
            "Name some, or use another metric."
        )
    return tuple(found)


# --- what passes through the layers -------------------------------------------------------------------


class Passed(NamedTuple):
    """Of one layer and one batch, a row at the front: (rows, positions, width), what is not counted being 0."""

    layer: Layer
    input_bsi: Tensor
    grad_bso: Tensor
    places: Tensor  # how many count


@contextmanager
def _listening(model: nn.Module, layers: Sequence[Layer]) -> Iterator[dict[str, list[tuple[Tensor, Tensor]]]]:
    """What goes in and out of the layers, while inside; evaluation mode, nothing compiled, random states kept."""
    heard: dict[str, list[tuple[Tensor, Tensor]]] = {layer.name: [] for layer in layers}
    modules = dict(model.named_modules())
    modes = [(module, module.training) for module in model.modules()]
    devices = list({parameter.device for parameter in model.parameters() if parameter.is_cuda})

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...], Tensor], None]:
        return lambda module, args, output: heard[name].append((args[0].detach(), output))

    handles = [modules[layer.name].register_forward_hook(hook(layer.name)) for layer in layers]
    try:
        model.eval()
        with torch.enable_grad(), torch.random.fork_rng(devices), torch.compiler.set_stance("force_eager"):
            yield heard
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes:
            module.training = mode


def passes(
    model: nn.Module,
    layers: Sequence[Layer],
    batches: Iterable[Any],
    sampled_loss: SampledLoss,
    device: torch.device | str,
    precision: Precision,
) -> Iterator[Passed]:
    kind = torch.device(device).type
    for batch in batches:
        with _listening(model, layers) as heard:
            moved = batch.to(device) if hasattr(batch, "to") else batch
            with torch.autocast(kind, torch.bfloat16, enabled=precision == "bfloat16"):
                sampled = sampled_loss(model, moved)
            calls = [heard[layer.name][0] for layer in layers if len(heard[layer.name]) == 1]
            if len(calls) < len(layers):
                odd = [layer.name for layer in layers if len(heard[layer.name]) != 1]
                raise ConfigError(
                    f"layers {', '.join(odd[:5])} were not called just once in a pass. Curvature needs layers that "
                    "are modules called once: name others in `layers`."
                )
            grads = torch.autograd.grad(sampled.loss, [output for _, output in calls], allow_unused=True)
        for layer, (entered, left), grad in zip(layers, calls, grads, strict=True):
            grad = torch.zeros_like(left) if grad is None else grad
            yield _passed(layer, entered, grad.detach(), sampled.counted)


def _passed(layer: Layer, entered: Tensor, grad: Tensor, counted: Tensor | None) -> Passed:
    wide = torch.promote_types(entered.dtype, torch.float32)
    entered, grad = entered.to(wide), grad.to(wide)
    if layer.has_bias:
        entered = torch.cat([entered, torch.ones_like(entered[..., :1])], -1)
    if counted is None:
        counted = torch.ones(entered.shape[:-1], dtype=torch.bool, device=entered.device)
    if counted.shape != entered.shape[:-1]:
        raise ConfigError(
            f"layer {layer.name} takes {tuple(entered.shape[:-1])} places, {tuple(counted.shape)} are counted. "
            "Name other layers in `layers`, or count its places."
        )
    entered, grad = entered * counted[..., None], grad * counted[..., None]
    rows = entered.shape[0] if entered.ndim > 1 else 1
    return Passed(layer, entered.reshape(rows, -1, layer.inputs), grad.reshape(rows, -1, layer.outputs), counted.sum())
