"""What influence should be, for models small enough to find it out: by whole Hessians, and by really training.

Four answers to "how much does target t fall by, when domain i gets more weight", positive where it falls:

- `exact_influence`: benefit_dt[i, t] = G_t^T (H + damping)^-1 g_i at the weights as they are, with the whole Hessian
  H = sum_k p_k H_k of the mixture's loss. At a minimum of that loss plus (damping / 2) |theta|^2 it is the derivative
  of the target's loss *at the minimum* by the weight p_i.
- `quadratic_response`: how much losses change when weights change by so much that the Hessian does, too:
  theta -> theta - (H + sum_k delta_k H_k + damping)^-1 (sum_k delta_k g_k), exact for quadratics, also for the
  removal of a domain. First order drops the delta in the inverse.
- `unrolled_influence`: of a *trajectory* of plain gradient descent, not of its end: by the co-state recursion
  lambda_s = lambda_(s+1) - rate_s H_s lambda_(s+1) from lambda_S = G_t(theta_S), what each step's weight of each
  domain did to the target's loss after the last step, rate_s lambda_(s+1)^T g_i(theta_s).
- `measured_response`: trains on, with any optimizer and from its state, on the mixture and on ones shifted a little
  toward each domain, and looks: with errors over several choices of rows.

The first two and the third hold weights to nothing; weights that sum to one move within the simplex, and
`toward_domains` turns a derivative by p_i into one along p -> (1 - e) p + e e_i. The response is measured so.

Losses are functions (model, batch) -> a mean loss; batches are whatever they take. Every function works on copies,
in float64 and on a CPU but for `measured_response`; a model that computes parts of itself in float32 is no more exact
than that.
Whole Hessians take (parameters)^2 numbers: for some thousands of parameters. Leaving a whole domain out is another
question than a small shift of weights: with few large domains their answers need not even agree in sign.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev
from torch.nn.attention import SDPBackend, sdpa_kernel

from mixer.core.errors import ConfigError
from mixer.training.optimizer import clip_gradients

Floats = NDArray[np.float64]
LossOf = Callable[[nn.Module, Any], Tensor]  # the mean loss of a batch
Rows = Callable[[int, int], Sequence[Any]]  # seed, step -> a batch of each domain
HESSIAN_COLUMNS = 64  # that exist at once while a Hessian is made


# --- a model as a function of one vector --------------------------------------------------------------


class FlatModel:
    """A model's trained parameters in one float64 vector; the model itself is only read."""

    def __init__(self, model: nn.Module, loss: LossOf) -> None:
        self._model = copy.deepcopy(model).double().requires_grad_(False)
        self._model.eval()
        self._module = _Lossy(self._model, loss)
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        kept = {name: value for name, value in self._model.named_parameters() if name in trained}
        if not kept:
            raise ConfigError("the model has no trained parameter; influence needs some. Unfreeze what is trained.")
        self.shapes = {name: value.shape for name, value in kept.items()}
        self.start_p = torch.cat([value.detach().flatten() for value in kept.values()])

    def unflatten(self, theta_p: Tensor) -> dict[str, Tensor]:
        parts = theta_p.split([shape.numel() for shape in self.shapes.values()])
        return {name: part.view(shape) for (name, shape), part in zip(self.shapes.items(), parts, strict=True)}

    def loss(self, theta_p: Tensor, batch: Any) -> Tensor:
        named = {f"model.{name}": value for name, value in self.unflatten(theta_p).items()}
        return functional_call(self._module, named, (batch,))

    def gradient(self, theta_p: Tensor, batch: Any) -> Tensor:
        with _twice_differentiable():
            return grad(self.loss)(theta_p, batch).detach()

    def gradients(self, theta_p: Tensor, batches: Sequence[Any]) -> Tensor:
        return torch.stack([self.gradient(theta_p, batch) for batch in batches])

    def hessian(self, theta_p: Tensor, batch: Any) -> Tensor:
        with _twice_differentiable():
            found_pp = jacrev(grad(self.loss), chunk_size=HESSIAN_COLUMNS)(theta_p, batch).detach()
        return (found_pp + found_pp.T) / 2

    def times_hessian(self, theta_p: Tensor, vector_p: Tensor, batches: Sequence[Any], weights_d: Floats) -> Tensor:
        """sum_k p_k H_k v, without any H."""
        theta_p = theta_p.detach().requires_grad_(True)
        with _twice_differentiable():
            total = self.mixed(theta_p, batches, weights_d)
            (slope_p,) = torch.autograd.grad(total, theta_p, create_graph=True)
            return torch.autograd.grad((slope_p * vector_p).sum(), theta_p)[0].detach()

    def mixed(self, theta_p: Tensor, batches: Sequence[Any], weights_d: Floats) -> Tensor:
        losses = [float(w) * self.loss(theta_p, batch) for w, batch in zip(weights_d, batches, strict=True)]
        return torch.stack(losses).sum()


class _Lossy(nn.Module):
    def __init__(self, model: nn.Module, loss: LossOf) -> None:
        super().__init__()
        self.model, self._loss = model, loss

    def forward(self, batch: Any) -> Tensor:
        return self._loss(self.model, batch).double()


@contextmanager
def _twice_differentiable() -> Iterator[None]:
    """Attention as plain products: the fast kernels have no second derivative. Random states are kept."""
    with sdpa_kernel(SDPBackend.MATH), torch.random.fork_rng([]):
        yield


# --- at the weights as they are ------------------------------------------------------------------------


def exact_influence(
    model: nn.Module,
    loss: LossOf,
    *,
    domains: Sequence[Any],
    targets: Sequence[Any],
    weights_d: Floats,
    damping: float,
) -> Floats:
    """benefit_dt by the whole damped Hessian of the mixture's loss; `domains` has a batch of each."""
    flat = FlatModel(model, loss)
    hessian_pp = torch.zeros(len(flat.start_p), len(flat.start_p), dtype=torch.float64)
    for weight, batch in zip(_checked(weights_d, domains), domains, strict=True):
        hessian_pp += float(weight) * flat.hessian(flat.start_p, batch)
    solved_tp = _solve(hessian_pp, damping, flat.gradients(flat.start_p, targets).T).T
    return (flat.gradients(flat.start_p, domains) @ solved_tp.T).numpy()


def quadratic_response(
    model: nn.Module,
    loss: LossOf,
    *,
    domains: Sequence[Any],
    targets: Sequence[Any],
    weights_d: Floats,
    shifts_kd: Floats,
    damping: float,
) -> Floats:
    """(shifts, targets): how much the loss of each target *falls* when the weights move by each of the shifts,
    from a minimum of the damped loss of the mixture. A shift of -p_i in place i takes domain i away."""
    flat = FlatModel(model, loss)
    theta_p = flat.start_p
    hessian_dpp = torch.stack([flat.hessian(theta_p, batch) for batch in domains])
    slope_dp = flat.gradients(theta_p, domains)
    with torch.no_grad():
        before_t = [float(flat.loss(theta_p, target)) for target in targets]
    found_kt = np.zeros((len(shifts_kd), len(targets)))
    for k, shift_d in enumerate(shifts_kd):
        shift = torch.from_numpy(_checked(shift_d, domains))
        weight = torch.from_numpy(_checked(weights_d, domains)) + shift
        step_p = _solve(torch.einsum("d,dpq->pq", weight, hessian_dpp), damping, shift @ slope_dp)
        with torch.no_grad():
            after_t = [float(flat.loss(theta_p - step_p, target)) for target in targets]
        found_kt[k] = np.subtract(before_t, after_t)
    return found_kt


def toward_domains(benefit_dt: Floats, weights_d: Floats) -> Floats:
    """From derivatives by each weight alone to those along p -> (1 - e) p + e e_i."""
    return benefit_dt - weights_d @ benefit_dt


def _solve(hessian_pp: Tensor, damping: float, right: Tensor) -> Tensor:
    damped_pp = hessian_pp + damping * torch.eye(len(hessian_pp), dtype=torch.float64)
    factor_pp, failed = torch.linalg.cholesky_ex(damped_pp)
    if int(failed):
        least = float(torch.linalg.eigvalsh(hessian_pp)[0])
        raise ConfigError(
            f"the Hessian's least eigenvalue is {least:.4g}, the damping {damping:.4g}: their sum must be positive. "
            f"Use a damping above {max(0.0, -least):.4g}, or weights nearer to a minimum."
        )
    columns = right if right.ndim == 2 else right[:, None]
    return torch.cholesky_solve(columns, factor_pp).reshape(right.shape)


def _checked(weights_d: Floats, domains: Sequence[Any]) -> Floats:
    weights_d = np.asarray(weights_d, dtype=np.float64)
    if weights_d.shape != (len(domains),) or not np.isfinite(weights_d).all():
        raise ConfigError(f"weights {weights_d} for {len(domains)} domains; needed a finite one of each. Give those.")
    return weights_d


# --- along a trajectory --------------------------------------------------------------------------------


def unrolled_influence(
    model: nn.Module,
    loss: LossOf,
    *,
    steps: Sequence[Sequence[Any]],
    targets: Sequence[Any],
    weights_d: Floats,
    rates: Sequence[float],
) -> Floats:
    """benefit_sdt of training on `steps` (of each step a batch of each domain) by plain gradient descent: minus the
    derivative of each target's loss after the last step by the weight of a domain in that step. Its sum over steps
    is that by a weight held through all of them; every step's weights are kept in memory."""
    if len(rates) != len(steps):
        raise ConfigError(f"{len(rates)} rates for {len(steps)} steps; needed one of each. Give those.")
    flat = FlatModel(model, loss)
    theta_p, path = flat.start_p, []
    for batches, rate in zip(steps, rates, strict=True):
        weights = torch.from_numpy(_checked(weights_d, batches))
        slope_dp = flat.gradients(theta_p, batches)
        path.append((theta_p, slope_dp))
        theta_p = theta_p - rate * (weights @ slope_dp)
    found_sdt = np.zeros((len(steps), len(weights_d), len(targets)))
    for t, target in enumerate(targets):
        state_p = flat.gradient(theta_p, target)
        for s in range(len(steps) - 1, -1, -1):
            before_p, slope_dp = path[s]
            found_sdt[s, :, t] = rates[s] * (slope_dp @ state_p).numpy()
            state_p = state_p - rates[s] * flat.times_hessian(before_p, state_p, steps[s], weights_d)
    return found_sdt


# --- by training ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class ResponseOptions:
    """How far weights are shifted, and for how long it is trained so."""

    shift: float = 0.05  # e of p -> (1 - e) p + e e_i
    both_sides: bool = True  # also p -> (1 + e) p - e e_i: twice the work, and no error of first order in e
    seeds: tuple[int, ...] = (0, 1, 2, 3)  # of rows; errors need two
    clip_norm: float | None = None

    def __post_init__(self) -> None:
        if not 0 < self.shift < 1:
            raise ConfigError(f"shift={self.shift}; it must lie between 0 and 1.")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ConfigError(f"seeds={list(self.seeds)}; needed at least one, and different ones.")


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Response:
    """What training showed: minus the derivative of targets' losses along p -> (1 - e) p + e e_i."""

    benefit_kdt: Floats  # by seed
    loss_kt: Floats  # of targets after training on the mixture itself, by seed

    @property
    def benefit_dt(self) -> Floats:
        return self.benefit_kdt.mean(0)

    @property
    def error_dt(self) -> Floats:
        """Standard errors over the seeds; NaN of one seed."""
        seeds = len(self.benefit_kdt)
        if seeds < 2:
            return np.full(self.benefit_kdt.shape[1:], np.nan)
        return self.benefit_kdt.std(0, ddof=1) / np.sqrt(seeds)


def measured_response(
    model: nn.Module,
    make_optimizer: Callable[[nn.Module], torch.optim.Optimizer],
    loss: LossOf,
    *,
    rows: Rows,
    targets: Callable[[nn.Module], Floats] | Sequence[Any],
    weights_d: Floats,
    steps: int,
    optimizer_state: Mapping[str, Any] | None = None,
    options: ResponseOptions | None = None,
) -> Response:
    """Train copies for so many steps from the model's weights and the optimizer's state, and compare.

    A step's loss is sum_i w_i (mean loss of domain i's batch); all copies of one seed get the same batches, so that
    only the weights tell them apart. `targets` are batches, or a function that measures their losses. The mixture
    stands in the loss, not in how many rows are drawn: the noise that drawing adds has no part in the derivative.
    """
    options = options or ResponseOptions()
    weights_d = np.asarray(weights_d, dtype=np.float64)
    devices = list({parameter.device for parameter in model.parameters() if parameter.is_cuda})

    def trained(seed: int, shifted_d: Floats) -> Floats:
        branch = copy.deepcopy(model)
        optimizer = make_optimizer(branch)
        if optimizer_state is not None:
            optimizer.load_state_dict(copy.deepcopy(dict(optimizer_state)))
        with torch.random.fork_rng(devices):  # so that all copies draw alike, and nobody else notices
            for step in range(steps):
                optimizer.zero_grad(set_to_none=True)
                batches = rows(seed, step)
                for weight, batch in zip(_checked(shifted_d, batches), batches, strict=True):
                    if weight:
                        (loss(branch, batch) * float(weight)).backward()
                if options.clip_norm is not None:
                    clip_gradients(branch.parameters(), options.clip_norm)
                optimizer.step()
            return _measure(branch, loss, targets)

    base_kt = np.stack([trained(seed, weights_d) for seed in options.seeds])
    benefit_kdt = np.zeros((len(options.seeds), len(weights_d), base_kt.shape[1]))
    for k, seed in enumerate(options.seeds):
        for i in range(len(weights_d)):
            away_d = options.shift * (np.eye(len(weights_d))[i] - weights_d)
            toward_t = trained(seed, weights_d + away_d)
            other_t = trained(seed, weights_d - away_d) if options.both_sides else base_kt[k]
            benefit_kdt[k, i] = (other_t - toward_t) / (options.shift * (1 + options.both_sides))
    return Response(benefit_kdt=benefit_kdt, loss_kt=base_kt)


def _measure(model: nn.Module, loss: LossOf, targets: Callable[[nn.Module], Floats] | Sequence[Any]) -> Floats:
    if callable(targets):
        return np.asarray(targets(model), dtype=np.float64)
    with torch.no_grad():
        return np.array([float(loss(model, target)) for target in targets])
