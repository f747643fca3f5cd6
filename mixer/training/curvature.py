"""Curvature of a model's linear layers in Kronecker factors, to precondition the gradients of targets.

A layer computes z = W a at every position of a row (where its bias is covered, a ends in 1 and W in the bias). Let s
be the derivative of a row's summed loss with respect to z, where the labels are *drawn from the model*, so that what
is measured is the true Fisher matrix and not the one of the data's own labels. G = sum over positions of s a^T is
then a row's gradient, and the layer's Fisher matrix, a token, is

    F = E[vec(G) vec(G)^T] / (mean targets a row)

- K-FAC (Martens and Grosse, 1503.05671): F ~ S (x) A, with A = E[a a^T] and S = E[s s^T] over positions with a
  target. It takes positions to be independent of each other, and a of s.
- EK-FAC (George et al., 1806.03884): keeps the eigenvectors of A and S, and measures the second moments
  L = E[(U_S^T G U_A)^2] along their products, of whole rows: what positions of one row have in common is in them.
  On the rows of both measurements, the same, no other L comes nearer to F; so |F - EK-FAC| <= |F - K-FAC| in
  Frobenius norm. That does not make an influence better by itself.

and, for either, M^-1 V = U_S [(U_S^T V U_A) / (L + damping)] U_A^T, with the damping a share (0.1) of the mean of L
in each layer: as in Grosse et al. (2308.03296), who precondition with it for influence. Only the few gradients of
*targets* are ever preconditioned; domains' gradients stay as they are.

Departures from 2308.03296: any linear layer that is named, attention included, and not only those of the
feed-forward; moments are a token's and not a sequence's, which scales all influences alike; one label is drawn a
position and row. Sides of a layer are decomposed whole, however wide. From memory, not checked against the paper:
which layers it leaves out beyond the feed-forward, and how many sequences its factors take.

Measuring leaves no trace: hooks stand only meanwhile; weights, gradients, modes and random states are as before, and
labels are drawn by a key of row and place. Nothing here talks to other ranks. `measure_*` give this rank's sums,
additive over ranks: who calls adds them up, between the two passes and after them. Under FSDP2 all ranks must pass
equally many batches; gradients that are sharded are made whole a layer at a time (`full_tensor()`, an exchange that
all ranks enter), and each rank gets its own part of the result. Sums take 8 (d_in^2 + d_out^2) bytes a layer, so
name layers (`layers`) where a model is wide.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol, Self, cast

import torch
from torch import Tensor, nn

from mixer.core.errors import CheckpointError, ConfigError, SignalError
from mixer.training.evaluation import Precision
from mixer.training.labels import SampledLoss, of_rows
from mixer.training.layers import Layer, find_layers, passes

Kind = Literal["kfac", "ekfac"]


@dataclass(frozen=True, slots=True, kw_only=True)
class CurvatureOptions:
    """Which layers, on how much text, how strongly damped, and how often anew."""

    kind: Kind = "ekfac"
    rows: int = 64  # of all domains together, shared out by their weights
    batch_rows: int = 1  # of a rank, computed at once; all logits of so many rows exist
    damping: float = 0.1  # as a share of each layer's mean second moment
    refresh: int = 4  # at every so many probes; in between, the factors of the last time
    layers: tuple[str, ...] = ()  # globs of parameters' names; none: the linear layers' weights in numbered blocks
    seed: int = 0  # of the choice of rows and of labels

    def __post_init__(self) -> None:
        for name in ("rows", "batch_rows", "refresh"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}; it must be at least 1.")
        if not 0 < self.damping < float("inf"):
            raise ConfigError(f"damping={self.damping}; it must be positive and finite: factors alone are singular.")

    def due(self, probe: int) -> bool:
        """Whether the factors are measured at this probe, counted from 0."""
        return probe % self.refresh == 0


# --- sums, and what follows from them -----------------------------------------------------------------


def measure_covariances(
    model: nn.Module,
    layers: Sequence[Layer],
    batches: Iterable[Any],
    sampled_loss: SampledLoss,
    *,
    device: torch.device | str = "cpu",
    precision: Precision = "float32",
) -> Tensor:
    """This rank's sums, flat, float64: for each layer those of a a^T, of s s^T, and the number of places."""
    sizes = [layer.inputs**2 + layer.outputs**2 + 1 for layer in layers]
    sums = torch.zeros(sum(sizes), dtype=torch.float64, device=device)
    part_of = dict(zip([layer.name for layer in layers], sums.split(sizes), strict=True))
    for layer, a_bsi, s_bso, places in passes(model, layers, batches, sampled_loss, device, precision):
        a_ni, s_no = a_bsi.flatten(0, 1), s_bso.flatten(0, 1)
        products = [(a_ni.T @ a_ni).flatten(), (s_no.T @ s_no).flatten(), places.reshape(1)]
        part_of[layer.name].add_(torch.cat([product.double() for product in products]))
    return sums


class Factors(NamedTuple):
    """Of one layer: eigenvectors of A and S in their columns, and the second moments along their products."""

    basis_ii: Tensor
    basis_oo: Tensor
    moment_oi: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Curvature:
    """M of some layers, ready to precondition; K-FAC as `of_covariances` makes it, EK-FAC after `refined`."""

    layers: tuple[Layer, ...]
    factors: tuple[Factors, ...]
    damping: float = 0.1
    kind: Kind = "kfac"

    @classmethod
    def of_covariances(
        cls, layers: Sequence[Layer], sums: Tensor, damping: float = 0.1, dtype: torch.dtype = torch.float32
    ) -> "Curvature":
        """From sums that were added up over the ranks; decomposed in float64, kept in `dtype`."""
        expected = sum(layer.inputs**2 + layer.outputs**2 + 1 for layer in layers)
        if sums.shape != (expected,):
            raise ConfigError(f"sums of shape {tuple(sums.shape)}; needed ({expected},). Give what was measured.")
        factors: list[Factors] = []
        begin = 0
        for layer in layers:
            a, s, places = sums[begin : begin + (size := layer.inputs**2 + layer.outputs**2 + 1)].split(
                [layer.inputs**2, layer.outputs**2, 1]
            )
            begin += size
            _require_sums(layer, torch.cat([a, s, places]), float(places))
            a_i, basis_ii = torch.linalg.eigh((a / places).reshape(layer.inputs, -1).double())
            s_o, basis_oo = torch.linalg.eigh((s / places).reshape(layer.outputs, -1).double())
            moment_oi = torch.outer(s_o.clamp_min(0), a_i.clamp_min(0))
            factors.append(Factors(basis_ii.to(dtype), basis_oo.to(dtype), moment_oi.to(dtype)))
        return cls(tuple(layers), tuple(factors), damping)

    def measure(
        self,
        model: nn.Module,
        batches: Iterable[Any],
        sampled_loss: SampledLoss,
        *,
        device: torch.device | str = "cpu",
        precision: Precision = "float32",
    ) -> Tensor:
        """This rank's sums of second moments in the eigenbasis, flat, float64, with each layer's places."""
        sizes = [layer.outputs * layer.inputs + 1 for layer in self.layers]
        sums = torch.zeros(sum(sizes), dtype=torch.float64, device=device)
        part_of = dict(zip([layer.name for layer in self.layers], sums.split(sizes), strict=True))
        factors_of = dict(zip([layer.name for layer in self.layers], self.factors, strict=True))
        for layer, a_bsi, s_bso, places in passes(model, self.layers, batches, sampled_loss, device, precision):
            basis_ii, basis_oo, _ = factors_of[layer.name]
            a_bsi, s_bso = a_bsi @ basis_ii.to(a_bsi), s_bso @ basis_oo.to(s_bso)
            square_oi = torch.einsum("bso,bsi->boi", s_bso, a_bsi).double().square().sum(0)
            part_of[layer.name].add_(torch.cat([square_oi.flatten(), places.double().reshape(1)]))
        return sums

    def refined(self, sums: Tensor) -> "Curvature":
        """EK-FAC: with the second moments of sums that were added up over the ranks."""
        expected = sum(layer.outputs * layer.inputs + 1 for layer in self.layers)
        if sums.shape != (expected,):
            raise ConfigError(f"sums of shape {tuple(sums.shape)}; needed ({expected},). Give what was measured.")
        factors: list[Factors] = []
        begin = 0
        for layer, old in zip(self.layers, self.factors, strict=True):
            part = sums[begin : begin + (size := layer.outputs * layer.inputs + 1)]
            begin += size
            _require_sums(layer, part, float(part[-1]))
            moment_oi = (part[:-1] / part[-1]).reshape(layer.outputs, layer.inputs)
            factors.append(old._replace(moment_oi=moment_oi.to(old.moment_oi.dtype)))
        return Curvature(self.layers, tuple(factors), self.damping, "ekfac")

    # ---- keeping, use -----------------------------------------------------------------------------------

    def tensors(self) -> dict[str, Tensor]:
        """All of it by name, for a checkpoint: measured seldom, it is needed by a run that goes on."""
        return {
            f"{layer.name}/{key}": value
            for layer, factors in zip(self.layers, self.factors, strict=True)
            for key, value in factors._asdict().items()
        }

    @classmethod
    def from_tensors(cls, layers: Sequence[Layer], tensors: Mapping[str, Tensor], options: CurvatureOptions) -> Self:
        wanted = [[f"{layer.name}/{key}" for key in Factors._fields] for layer in layers]
        if missing := sorted({name for names in wanted for name in names} - tensors.keys()):
            raise CheckpointError(
                f"saved factors lack {', '.join(missing[:3])}; needed are those of {len(layers)} layers. Measure anew."
            )
        factors = tuple(Factors(*(tensors[name] for name in names)) for names in wanted)
        return cls(tuple(layers), factors, options.damping, options.kind)

    @property
    def names(self) -> tuple[str, ...]:
        """The parameters that it covers."""
        return tuple(name for layer in self.layers for name in layer.parameters)

    def precondition(self, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """M^-1 times a gradient, by parameter name; of covered parameters only, and of a layer all."""
        unknown = sorted(gradients.keys() - set(self.names))
        if unknown:
            raise ConfigError(
                f"parameters {', '.join(unknown[:5])} have no curvature; covered are {len(self.names)}, such as "
                f"{self.names[0]}. Leave them out, or widen the filters of the layers."
            )
        result: dict[str, Tensor] = {}
        for layer, factors in zip(self.layers, self.factors, strict=True):
            given = [name for name in layer.parameters if name in gradients]
            if not given:
                continue
            if len(given) < len(layer.parameters):
                raise ConfigError(f"of layer {layer.name} only {given[0]} was given. Give its weight and its bias.")
            whole = [_whole(gradients[name]) for name in layer.parameters]
            wide = torch.promote_types(whole[0].dtype, factors.moment_oi.dtype)
            vector_oi = torch.cat([part.to(wide).reshape(layer.outputs, -1) for part in whole], 1)
            solved_oi = self._solve(factors, vector_oi)
            widths = [layer.inputs - layer.has_bias] + [1] * layer.has_bias
            for name, part in zip(layer.parameters, solved_oi.split(widths, 1), strict=True):
                given_one = gradients[name]
                result[name] = _part_like(part.reshape(given_one.shape).to(given_one.dtype), given_one)
        return result

    def _solve(self, factors: Factors, vector_oi: Tensor) -> Tensor:
        basis_ii, basis_oo, moment_oi = (factor.to(vector_oi) for factor in factors)
        weight_oi = moment_oi + self.damping * moment_oi.mean()
        turned_oi = basis_oo.T @ vector_oi @ basis_ii
        # A layer that has no curvature at all has no gradient either: nothing to divide.
        solved_oi = torch.where(weight_oi > 0, turned_oi / weight_oi, 0.0)
        return basis_oo @ solved_oi @ basis_ii.T


def measure(
    model: nn.Module,
    batches: Callable[[], Iterable[Any]],
    options: CurvatureOptions | None = None,
    *,
    sampled_loss: SampledLoss | None = None,
    total: Callable[[Tensor], Tensor] = lambda sums: sums,
    device: torch.device | str = "cpu",
    precision: Precision = "float32",
) -> Curvature:
    """Both passes over the same batches; `total` adds sums up over the ranks, where there are others."""
    options = options or CurvatureOptions()
    layers, loss = find_layers(model, options.layers), sampled_loss or of_rows(options.seed)
    dtype = torch.promote_types(next(model.parameters()).dtype, torch.float32)
    how: dict[str, Any] = {"device": device, "precision": precision}
    sums = total(measure_covariances(model, layers, batches(), loss, **how))
    curvature = Curvature.of_covariances(layers, sums, options.damping, dtype)
    if options.kind == "kfac":
        return curvature
    return curvature.refined(total(curvature.measure(model, batches(), loss, **how)))


def _require_sums(layer: Layer, sums: Tensor, places: float) -> None:
    if places <= 0 or not bool(sums.isfinite().all()):
        raise SignalError(
            f"the sums of layer {layer.name} have {places:g} places and "
            f"{int((~sums.isfinite()).sum())} numbers that are not finite; needed some places and none such. "
            "Keep the factors of the last probe, or measure on rows that have targets."
        )


class _Sharded(Protocol):
    """A tensor of which each rank holds a part, as FSDP2 makes them."""

    device_mesh: Any
    placements: Any

    def full_tensor(self) -> Tensor: ...
    def to_local(self) -> Tensor: ...


def _whole(tensor: Tensor) -> Tensor:
    return cast(_Sharded, tensor).full_tensor() if hasattr(tensor, "full_tensor") else tensor


def _part_like(whole: Tensor, like: Tensor) -> Tensor:
    """This rank's part of a tensor that is sharded like another one; the tensor itself where that one is whole."""
    if not hasattr(like, "full_tensor"):
        return whole
    sharded = cast(_Sharded, like)
    mesh, (placement, *others) = sharded.device_mesh, sharded.placements
    if others or not placement.is_shard():
        raise ConfigError(
            f"a gradient is placed {sharded.placements}; preconditioning needs one mesh axis that shards it. "
            "Use fully_shard over a mesh of one axis."
        )
    parts = whole.chunk(mesh.size(), placement.dim)
    rank, size = mesh.get_local_rank(), sharded.to_local().shape
    local = parts[rank] if rank < len(parts) else whole.new_zeros(size)
    make = cast(Any, type(like)).from_local
    return make(local.contiguous(), mesh, sharded.placements, run_check=False, shape=like.shape, stride=like.stride())
