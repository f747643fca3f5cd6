"""Gradients of some rows beside those of the step: of which weights, in which metric, and in how few numbers.

**Weights** (`choose_pieces`). By default the matrices of the numbered blocks, without embeddings and output head:
what those two say of two texts is above all which words they share, and it would drown what the rest of the model
has to learn of either. Gains and biases are too few to matter. Or the parameters whose names match globs.

**Sharded models.** Each rank holds its piece of a parameter; a `Piece` says where in the whole parameter it lies,
counted in elements row by row, and whether this rank's copy is the one that counts. So anything that is summed
over elements (inner products, sketches) is summed over pieces first and over ranks afterwards, by the caller.

**Metrics.** `adam`: both sides of a product are divided by the square root of D = sqrt(v / (1 - beta2^steps)) + eps,
AdamW's own denominator as it stands, so that <a, D^-1 b> is what a step along b does to a, and products of one side
with itself are squares. A parameter that learns at a multiple of the run's rate has that multiple in it. Left out:
momentum (it averages the same gradients), weight decay (the same whatever is trained on) and clipping (one factor
for all); and elements that never had a gradient, because 1 / eps of theirs would be all that is seen, while the
optimizer would count the new gradient among the second moments before it divides. `ekfac`, and whatever else is
symmetric but has no square root at hand, goes on the targets alone: see `Preconditioner`.

**Sketches** (`CountSketch`): Charikar, Chen, Farach-Colton 2002; as feature hashing, Weinberger et al., 0902.2206.
Each element goes, with a random sign, to one of k sums, so inner products of sketches are those of gradients on
average, with variance at most (|x|^2 |y|^2 + <x, y>^2 - 2 sum x_i^2 y_i^2) / k. Departure: places are not drawn
element by element, but k neighbouring elements of a parameter go to k different sums, all moved round by one random
number. So neighbours do not meet at all, others meet in one of k cases as they should, and sums can be taken block by
block: no scattered addition, whose order a GPU does not keep. Signs are bits of a splitmix64 hash. Keys are the seed
and the parameter's *name*, and numbers count within the parameter: any cut into shards, and any choice of further
parameters, gives each element its place and sign.
"""

import fnmatch
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F  # noqa: N812  # its name everywhere
from torch import Tensor, nn

from mixer.core.errors import ConfigError
from mixer.core.permute import key_of
from mixer.training.step import DomainLosses, StepRows

Precision = Literal["float32", "bfloat16"]
CHUNK = 1 << 22  # elements that are widened or hashed at a time
SHOWN = 6


class Preconditioner(Protocol):
    """M^-1 of a metric, applied to whole gradients by parameter name; linear, and the same on all ranks.

    It is given the gradient of every chosen parameter, in the parameter's own shape, and answers with as many.
    """

    def precondition(self, gradients: Mapping[str, Tensor]) -> Mapping[str, Tensor]: ...


# --- of which weights ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class Piece:
    """What one rank holds of a parameter: elements begin .. begin + size of it, row by row."""

    name: str
    parameter: nn.Parameter
    begin: int
    size: int
    counts: bool  # false on ranks that hold a copy of what another one counts

    def local(self, tensor: Tensor) -> Tensor:
        """This piece, flat, of a gradient or of a state of the parameter: sharded as it is, or whole."""
        if is_sharded(tensor):
            return tensor.to_local().reshape(-1)  # pyright: ignore[reportAttributeAccessIssue,reportCallIssue]
        flat = tensor.reshape(-1)
        return flat if len(flat) == self.size else flat[self.begin : self.begin + self.size]


def is_sharded(tensor: Tensor) -> bool:
    return hasattr(tensor, "placements")


def choose_pieces(model: nn.Module, layers: Sequence[str] = ()) -> list[Piece]:
    """Of the parameters whose names match one of the globs `layers`; without any, of the blocks' matrices."""
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    if layers:
        for glob in layers:
            if not fnmatch.filter(trained, glob):
                raise ConfigError(
                    f"layers: {glob!r} matches no parameter that is trained. There are {_listed(list(trained))}: "
                    "correct the pattern."
                )
        chosen = [name for name in trained if any(fnmatch.fnmatchcase(name, glob) for glob in layers)]
    else:
        embeddings = {id(part.weight) for part in model.modules() if isinstance(part, nn.Embedding)}
        chosen = [
            name
            for name, weight in trained.items()
            if weight.ndim >= 2 and id(weight) not in embeddings and any(part.isdigit() for part in name.split("."))
        ]
        if not chosen:
            raise ConfigError(
                f"the model has no matrix in a numbered block; it has {_listed(list(trained))}. "
                "Name those to take gradients of in `layers`."
            )
    whole = any(is_sharded(weight) for weight in model.parameters())
    return [_piece(name, trained[name], whole) for name in chosen]


def _piece(name: str, parameter: nn.Parameter, is_model_sharded: bool) -> Piece:
    if not is_sharded(parameter):
        if is_model_sharded:
            raise ConfigError(
                f"{name} is whole on every rank of a model that is sharded. Shard it too, or leave it out of `layers`."
            )
        return Piece(name, parameter, 0, parameter.numel(), True)
    value: Any = parameter
    begin, rows, counts, cut = 0, int(value.shape[0]), True, 0
    for place, size, coordinate in zip(
        value.placements, value.device_mesh.shape, value.device_mesh.get_coordinate(), strict=True
    ):
        if type(place).__name__ == "Replicate":
            counts = counts and coordinate == 0
        elif type(place).__name__ == "Shard" and place.dim == 0 and not cut:
            chunk = -(-rows // size)
            cut, begin = chunk, min(coordinate * chunk, rows)
            rows = min(begin + chunk, rows) - begin
        else:
            raise ConfigError(
                f"{name} is laid out as {value.placements}; gradients of weights that are replicated, or cut once "
                "along their rows, can be measured. Leave it out of `layers`."
            )
    row = value.numel() // max(1, int(value.shape[0]))
    size = value.to_local().numel()
    assert size == rows * row, f"{name}: {size} elements here, {rows * row} expected"
    return Piece(name, parameter, begin * row, size, counts)


def _listed(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


# --- gradients ----------------------------------------------------------------------------------------


@contextmanager
def probing(model: nn.Module, device: torch.device | str, precision: Precision) -> Iterator[None]:
    """As in training, but without dropout, and nothing stays: modes, random states and `.grad` are as they were."""
    device = torch.device(device)
    noisy = [part for part in model.modules() if isinstance(part, _NOISY) and part.training]
    kept = [(parameter, parameter.grad) for parameter in model.parameters()]
    try:
        for part in noisy:
            part.training = False
        for parameter, _ in kept:
            parameter.grad = None
        with (
            torch.enable_grad(),
            torch.random.fork_rng([device] if device.type == "cuda" else []),
            torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"),
        ):
            yield
    finally:
        for part in noisy:
            part.training = True
        for parameter, gradient in kept:
            parameter.grad = gradient


_NOISY = (nn.modules.dropout._DropoutNd, nn.modules.batchnorm._BatchNorm)  # random, or remembering what they saw


def sum_gradient(
    model: nn.Module, pieces: Sequence[Piece], batches: Sequence[StepRows], losses: DomainLosses, replicas: int
) -> dict[str, Tensor]:
    """The gradient of the loss summed over all targets of these batches, by name; books losses by `domain_b`.

    Within `probing`. A whole model's parameters keep no gradient, not even for a while, so hooks that wait for one
    do not see it. Those of a sharded model do until this returns, because sharding works by such hooks; then the
    gradient is that of all ranks' batches, which must be equally many, and `replicas` is the number of ranks.
    A row without a usable loss makes the gradient NaN.
    """
    parameters = [piece.parameter for piece in pieces]
    sharded = any(is_sharded(parameter) for parameter in parameters)
    total: list[Tensor] = []
    for rows in batches:
        out: Any = model(rows.tokens_bs, rows.documents, rows.target_bs)
        loss_b = out.loss_bs.double().sum(1)
        objective = loss_b.sum()
        if len(rows.domain_b):
            bad = losses.add(rows, loss_b.detach(), (rows.target_bs >= 0).sum(1))
            objective = objective * torch.where(bad.any(), torch.nan, 1.0)
        if sharded:
            (objective * replicas).backward()
        else:
            found = torch.autograd.grad(objective, parameters, materialize_grads=True, allow_unused=True)
            total = [one.add_(other) for one, other in zip(total, found, strict=True)] if total else list(found)
    if sharded:
        total = [torch.zeros_like(one) if one.grad is None else one.grad for one in parameters]
        for parameter in model.parameters():
            parameter.grad = None
    return {piece.name: gradient for piece, gradient in zip(pieces, total, strict=True)}


# --- metrics ------------------------------------------------------------------------------------------


@torch.no_grad()
def adam_scales(pieces: Sequence[Piece], optimizer: torch.optim.Optimizer) -> dict[str, Tensor] | None:
    """By name, what an element of each piece is multiplied by: D^-1/2. None before the first update."""
    groups = {id(weight): group for group in optimizer.param_groups for weight in group["params"]}
    scales: dict[str, Tensor] = {}
    for piece in pieces:
        group = groups.get(id(piece.parameter))
        state: dict[str, Any] = optimizer.state.get(piece.parameter, {})
        if group is None or (state and "exp_avg_sq" not in state) or "betas" not in group:
            raise ConfigError(
                f"metric adam: {type(optimizer).__name__} keeps no second moments of {piece.name}. "
                "Train it with AdamW, or choose metric=identity."
            )
        if not state:
            return None
        moment = piece.local(state["exp_avg_sq"])
        steps = torch.as_tensor(state["step"], dtype=torch.float64, device=moment.device)
        corrected = moment / (1.0 - group["betas"][1] ** steps)
        denominator = corrected.sqrt() + group["eps"]
        scale = (group.get("rate_scale", 1.0) / denominator).sqrt()
        scales[piece.name] = torch.where(moment > 0, scale, 0.0).to(moment.dtype)
    return scales


# --- inner products -----------------------------------------------------------------------------------


class Kept:
    """Gradients that are kept as they are, for exact inner products: `num` of them, this rank's pieces."""

    def __init__(self, pieces: Sequence[Piece], num: int) -> None:
        self._counts = [piece.counts for piece in pieces]
        self._kept = [
            torch.zeros(num, piece.size, dtype=piece.parameter.dtype, device=piece.parameter.device) for piece in pieces
        ]

    @torch.no_grad()
    def put(self, place: int, gradient: Sequence[Tensor]) -> None:
        for kept, one in zip(self._kept, gradient, strict=True):
            kept[place] += one

    @torch.no_grad()
    def products(self, gradient: Sequence[Tensor]) -> Tensor:
        """With each of them, over this rank's pieces; float64."""
        num = len(self._kept[0])
        total = torch.zeros(num, dtype=torch.float64, device=self._kept[0].device)
        size = max(1, CHUNK // max(1, num))
        for kept, one, counts in zip(self._kept, gradient, self._counts, strict=True):
            for first in range(0, len(one) if counts else 0, size):
                part = slice(first, first + size)
                total += kept[:, part].double() @ one[part].double()
        return total

    def gram(self) -> Tensor:
        """Of all with all."""
        num = len(self._kept[0])
        return torch.stack([self.products([kept[place] for kept in self._kept]) for place in range(num)])


class CountSketch:
    """Signed sums of `width` numbers; see the module's docstring."""

    def __init__(self, width: int, seed: int) -> None:
        if width < 1:
            raise ConfigError(f"sketch_width={width}; it must be at least 1.")
        self.width, self.seed = width, seed

    @torch.no_grad()
    def add(self, sums_k: Tensor, name: str, flat: Tensor, begin: int) -> None:
        """Add elements begin .. begin + len(flat) of parameter `name` to the float64 sums."""
        width, device = self.width, flat.device
        signs, turns = (_signed(key_of("sketch", what, self.seed, name)) for what in ("sign", "place"))
        bits = _bits(device, flat.dtype)
        chunk = max(1, CHUNK // width) * width
        first, end = begin, begin + len(flat)
        while first < end:
            last = min(end, (first // chunk + 1) * chunk)
            part = flat[first - begin : last - begin] * _signs(signs, first, last, bits)
            low = first // width
            part = F.pad(part, (first - low * width, -last % width)).view(-1, width)
            block_b = torch.arange(len(part), device=device)
            turn_b = _shifted(_splitmix(turns, low + block_b), 1) % width
            # Each block turned round by its number: a window of the block written twice.
            turned = torch.cat([part, part], 1).view(-1).unfold(0, width, 1)[(2 * block_b + 1) * width - turn_b]
            sums_k += turned.sum(0)
            first = last

    def add_gradient(self, sums_k: Tensor, pieces: Sequence[Piece], gradient: Sequence[Tensor]) -> None:
        for piece, one in zip(pieces, gradient, strict=True):
            if piece.counts:
                self.add(sums_k, piece.name, one, piece.begin)


def _bits(device: torch.device, dtype: torch.dtype) -> Tensor:
    """For each byte the signs that its bits say, the lowest first."""
    byte_v = torch.arange(256, device=device)[:, None]
    return (1 - 2 * ((byte_v >> torch.arange(8, device=device)) & 1)).to(dtype)


def _signs(key: int, first: int, last: int, bits: Tensor) -> Tensor:
    """+1 or -1 of elements first .. last: one bit each of a hash for 64."""
    low = first // 64
    word_w = _splitmix(key, torch.arange(low, -(-last // 64), device=bits.device))
    return F.embedding(word_w.view(torch.uint8).int(), bits).view(-1)[first - low * 64 : last - low * 64]


def _splitmix(key: int, number_n: Tensor) -> Tensor:
    """A hash of each number (the generator splitmix64, at that place of its stream); products wrap."""
    x = (number_n + 1) * _signed(0x9E3779B97F4A7C15) + key
    x = (x ^ _shifted(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shifted(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """To the right, filled up with zeros."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _signed(number: int) -> int:
    """The same 64 bits as a signed number, which is what torch computes with."""
    return number - (1 << 64) if number >> 63 else number
