"""How much each row counts in a step's gradient, from the losses of all rows of that step.

The rows are those of the whole step, over ranks and micro-batches: each rank hands four numbers a row to an
exchange and finds the same weights. They are computed where the losses are, on the device, without waiting for it.
They carry no gradient. Losses that are booked for policies stay the unweighted ones, so any policy goes with it.

With w_b a row's weight, S_b its loss summed over its t_b targets, T all targets and l_b = S_b / t_b:

    linupper, quadratic, extremes   w = softmax(f / temperature), and the objective is  sum_b w_b S_b / sum_b w_b t_b,
    clip_quantile                   a mean over targets in which one of row b counts w_b. All w alike: the mean as it
                                    is without. All t alike: sum_b w_b l_b, the objective of the paper
    feasible, per row               sum_b w_b l_b over the number of rows: each row is a constraint, long or short
    feasible, per domain            sum_b w_b S_b / T, with one w for the rows of a domain

linupper, quadratic and extremes are those of arXiv 2502.06733: h maps the step's least loss to -delta and its
greatest to delta, then f = min(h + delta, delta), 1 - (h / delta)^2 or |h|. Departures: its released code scales the
sum by T over the number of rows, which differs from ours by a factor where rows have unlike numbers of targets;
`quantiles` in the place of the extremes, the falling temperature's form, and clip_quantile are ours. clip_quantile
clips each row's loss to the step's quantiles, so that rows beyond them have no gradient.

feasible is the feasible learning of arXiv 2501.14912: no loss is made small, but every row's (or domain's) brought
below `tolerance`. Before the gradient a multiplier goes to [w + rate (l - tolerance - w / price)]+; without a price
those of rows that cannot get there grow for ever. Departures: plain ascent, where the released code has a PI
controller; per domain is ours; and rows' multipliers live in a table of fixed size, each in a place found from its
domain's name and number: two rows of one place push each other out, the later of a step's slots stays.

A row without a usable loss has weight 0 and leaves its multiplier as it was; but the step is left out for it anyway.
"""

import base64
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from mixer.core.catalog import Catalog
from mixer.core.errors import CheckpointError, ConfigError
from mixer.core.permute import key_of
from mixer.core.signal import GRID

LEAST_SPREAD = 1e-6  # of a step's losses, in nats
_MIX_1, _MIX_2 = 0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64  # of splitmix64, as signed numbers
_ODD = 0x9E3779B97F4A7C15 - 2**64


@dataclass(frozen=True, slots=True, kw_only=True)
class FeasibleOptions:
    """Multipliers of `kind: feasible`."""

    tolerance: float | None = None  # nats a target that a row, or a domain, may cost; must be set
    rate: float = 0.1  # of a multiplier, by nat above the tolerance and step
    price: float | None = 1.0  # of slack: multipliers stay below price x excess; null: no slack, no bound
    per: Literal["row", "domain"] = "row"
    remembered_rows: int = 65_536  # places for multipliers of rows; 16 bytes each on every device

    def __post_init__(self) -> None:
        if not self.rate > 0 or not (self.price is None or self.price > 0):
            raise ConfigError(f"rate={self.rate} and price={self.price} must be above 0; price may be null.")
        if self.price is not None and self.rate >= 2 * self.price:
            raise ConfigError(
                f"rate={self.rate} with price={self.price}: multipliers would swing ever wider. "
                "Use a rate below twice the price."
            )
        if self.tolerance is not None and not math.isfinite(self.tolerance):
            raise ConfigError(f"tolerance={self.tolerance}; it must be a number of nats.")
        if self.remembered_rows < 1:
            raise ConfigError(f"remembered_rows={self.remembered_rows}; it must be at least 1.")


@dataclass(frozen=True, slots=True, kw_only=True)
class ReweightOptions:
    """Weights of rows by their losses. Where a rank computes several micro-batches, the losses cost one more forward
    pass of all rows, about a third of a step; where it computes one, nothing but the exchange."""

    kind: Literal["none", "linupper", "quadratic", "extremes", "clip_quantile", "feasible"] = "none"
    temperature: float = 0.4  # small: the weights differ more; large: all rows alike
    temperature_start: float | None = None  # after the burn-in, falling by equal factors; null: as `temperature`
    anneal: float = 0.2  # share of the run's steps in which it falls from `temperature_start` to `temperature`
    burn_in: float = 0.05  # share of the run's steps, from its first, in which all rows count alike
    delta: float = 1.0  # losses are mapped to -delta .. delta
    quantiles: tuple[float, float] = (0.0, 1.0)  # of a step's losses, that stand for its least and its greatest
    feasible: FeasibleOptions = field(default_factory=FeasibleOptions)

    def __post_init__(self) -> None:
        for key in ("temperature", "temperature_start", "delta"):
            if (value := getattr(self, key)) is not None and not (value > 0 and math.isfinite(value)):
                raise ConfigError(f"{key}={value}; it must be above 0 and finite.")
        for key in ("anneal", "burn_in"):
            if not 0 <= (value := getattr(self, key)) <= 1:
                raise ConfigError(f"{key}={value}; it is a share of the run's steps, from 0 to 1.")
        low, high = self.quantiles
        if not 0 <= low < high <= 1:
            raise ConfigError(f"quantiles={self.quantiles}; needed are two shares of rows, 0 <= low < high <= 1.")
        if self.kind == "clip_quantile" and (low, high) == (0.0, 1.0):
            raise ConfigError(
                "kind=clip_quantile with quantiles=(0.0, 1.0) clips nothing. Set quantiles, as in [0.0, 0.95]."
            )
        if self.kind == "feasible" and self.feasible.tolerance is None:
            raise ConfigError("kind=feasible without feasible.tolerance. Set the nats a target that a row may cost.")

    def temperature_at(self, step: int, num_steps: int) -> float | None:
        """Of the update `step`, counted from 0; None in the burn-in, when all rows count alike."""
        begin = self.burn_in * num_steps
        if step < begin:
            return None
        start, span = self.temperature_start, self.anneal * num_steps
        if start is None or step >= begin + span:
            return self.temperature
        return start * (self.temperature / start) ** ((step - begin) / span)


# --- weights of one step ------------------------------------------------------------------------------


def quantile(value_n: Tensor, good_n: Tensor, share: float) -> Tensor:
    """Of the good values, between neighbours linearly; NaN or inf where there is none. Waits for nothing."""
    ordered_n = torch.where(good_n, value_n, torch.inf).sort().values
    at = share * (good_n.sum() - 1).clamp_min(0).double()
    low, high = (ordered_n.gather(0, place.long()[None])[0] for place in (at.floor(), at.ceil()))
    return torch.lerp(low, high, at - at.floor())


def shaped(
    kind: str, loss_n: Tensor, good_n: Tensor, *, delta: float = 1.0, quantiles: tuple[float, float] = (0.0, 1.0)
) -> Tensor:
    """f of every row's loss: the logarithm of its weight, before the temperature."""
    low, high = (quantile(loss_n, good_n, share) for share in quantiles)
    if kind == "clip_quantile":
        return torch.zeros_like(loss_n).masked_fill((loss_n < low) | (loss_n > high), -torch.inf)
    loss_n = torch.minimum(torch.maximum(loss_n, low), high)
    h_n = 2 * delta * (loss_n - (low + high) / 2) / (high - low).clamp_min(LEAST_SPREAD)
    if kind == "linupper":
        return (h_n + delta).clamp_max(delta)
    return 1 - (h_n / delta).square() if kind == "quadratic" else h_n.abs()


def row_weights(
    kind: str,
    loss_n: Tensor,
    good_n: Tensor,
    temperature: float,
    *,
    delta: float = 1.0,
    quantiles: tuple[float, float] = (0.0, 1.0),
) -> Tensor:
    """Weights of a step's rows by their mean losses; those of good rows sum to 1, others are 0."""
    f_n = shaped(kind, loss_n, good_n, delta=delta, quantiles=quantiles)
    f_n = torch.where(good_n, f_n, -torch.inf) / temperature
    return torch.where(good_n, f_n.softmax(0), 0.0)


def ascended(multiplier_n: Tensor, loss_n: Tensor, options: FeasibleOptions) -> Tensor:
    """Multipliers after one step of their own."""
    assert options.tolerance is not None
    slack_n = 0.0 if options.price is None else multiplier_n / options.price
    return (multiplier_n + options.rate * (loss_n - options.tolerance - slack_n)).clamp_min(0)


# --- weights through a run ----------------------------------------------------------------------------


class Weigh(Protocol):
    """By what each of a rank's rows is multiplied in the sum of losses over T; losses of bad rows are NaN."""

    def __call__(self, loss_b: Tensor, targets_b: Tensor, domain_b: Tensor, row_b: Tensor) -> Tensor: ...


class Reweighting:
    """The weights of a run's rows, and what is remembered of them.

    `exchange` gets this rank's rows by four numbers and returns those of the whole step, in the order of its slots,
    the same on every rank; `mine` are this rank's among them.
    """

    def __init__(
        self,
        options: ReweightOptions,
        exchange: Callable[[Tensor], Tensor] = lambda rows: rows,
        mine: slice = slice(None),
        device: torch.device | str = "cpu",
    ) -> None:
        self.options, self._exchange, self._mine, self._device = options, exchange, mine, device
        self._catalog, self._names = "", ()
        self._known: dict[str, float] = {}  # multipliers of domains, also of catalogs before
        self._key_d = torch.zeros(0, dtype=torch.int64, device=device)
        self._multiplier_d = torch.zeros(0, dtype=torch.float64, device=device)
        places = options.feasible.remembered_rows + 1 if self._remembers_rows else 1  # the last is for what is dropped
        self._key_m = torch.zeros(places, dtype=torch.int64, device=device)
        self._multiplier_m = torch.zeros(places, dtype=torch.float64, device=device)

    @property
    def _remembers_rows(self) -> bool:
        return self.options.kind == "feasible" and self.options.feasible.per == "row"

    def enter(self, catalog: Catalog) -> None:
        """Rows are of this catalog from now on. Multipliers of domains go by name, those of rows by the domain's
        name and content and the row's number in it."""
        if catalog.fingerprint == self._catalog:
            return
        known = self._of_domains()
        self._catalog, self._names = catalog.fingerprint, catalog.names
        keys = np.array([key_of("rows", domain.name, domain.content) for domain in catalog.domains], dtype=np.uint64)
        self._key_d = torch.from_numpy(keys.view(np.int64)).to(self._device)
        values = [known.get(name, 0.0) for name in self._names]
        self._multiplier_d = torch.tensor(values, dtype=torch.float64, device=self._device)

    def at(self, step: int, num_steps: int) -> Weigh | None:
        """The weights of one update of the run; None if all rows count alike."""
        if self.options.kind == "none" or (temperature := self.options.temperature_at(step, num_steps)) is None:
            return None
        return partial(self._weigh, temperature)

    @torch.no_grad()
    def _weigh(self, temperature: float, loss_b: Tensor, targets_b: Tensor, domain_b: Tensor, row_b: Tensor) -> Tensor:
        parts = [loss_b, targets_b, domain_b, row_b]
        sum_n, targets_n, domain_n, row_n = self._exchange(torch.stack([part.double() for part in parts], 1)).T
        good_n = sum_n.isfinite() & (targets_n > 0)
        loss_n = torch.where(good_n, sum_n / targets_n.clamp_min(1), 0.0)
        options = self.options
        if options.kind == "feasible" and options.feasible.per == "domain":
            factor_n = self._by_domain(sum_n, targets_n, good_n, domain_n.long())
        elif options.kind == "feasible":
            weight_n = self._by_row(loss_n, good_n, domain_n.long(), row_n.long())
            factor_n = weight_n * (targets_n.sum() / good_n.sum()) / targets_n
        else:
            weight_n = row_weights(
                options.kind, loss_n, good_n, temperature, delta=options.delta, quantiles=options.quantiles
            )
            factor_n = weight_n * (targets_n.sum() / (weight_n * targets_n).sum())
        return torch.where(good_n, factor_n, 0.0)[self._mine]

    # ---- multipliers ------------------------------------------------------------------------------------

    def _by_domain(self, sum_n: Tensor, targets_n: Tensor, good_n: Tensor, domain_n: Tensor) -> Tensor:
        """Sums are of whole numbers, so that every rank keeps the same multipliers to the last bit."""
        points_n = torch.where(good_n, sum_n * GRID, 0.0).round().long()
        counted_n = torch.where(good_n, targets_n, 0.0).long()
        sums = torch.zeros(2, len(self._multiplier_d), dtype=torch.int64, device=sum_n.device)
        sums.index_add_(1, domain_n, torch.stack([points_n, counted_n]))
        points_d, targets_d = sums.double()
        new_d = ascended(self._multiplier_d, points_d / GRID / targets_d.clamp_min(1), self.options.feasible)
        self._multiplier_d = torch.where(targets_d > 0, new_d, self._multiplier_d)
        return self._multiplier_d[domain_n]

    def _by_row(self, loss_n: Tensor, good_n: Tensor, domain_n: Tensor, row_n: Tensor) -> Tensor:
        key_n = keys_of(self._key_d[domain_n], row_n)
        nowhere = len(self._key_m) - 1
        place_n = torch.where(good_n, self._place(key_n), nowhere)
        old_n = torch.where(self._key_m[place_n] == key_n, self._multiplier_m[place_n], 0.0)
        new_n = ascended(old_n, loss_n, self.options.feasible)
        # Of rows with one place the last is kept: no place but the last of all is written twice.
        sorted_n, order = place_n.sort(stable=True)
        is_last_n = torch.ones_like(good_n)
        is_last_n[:-1] = sorted_n[1:] != sorted_n[:-1]
        target_n = torch.where(is_last_n, sorted_n, nowhere)
        self._key_m.index_copy_(0, target_n, key_n[order])
        self._multiplier_m.index_copy_(0, target_n, new_n[order])
        self._key_m[nowhere] = 0
        return new_n

    def _place(self, key_n: Tensor) -> Tensor:
        return (key_n >> 1) % max(1, len(self._key_m) - 1)

    # ---- in a checkpoint --------------------------------------------------------------------------------

    def _of_domains(self) -> dict[str, float]:
        self._known |= zip(self._names, self._multiplier_d.tolist(), strict=True)
        return self._known

    def state(self) -> dict[str, Any]:
        """What is remembered, as JSON can hold it, exactly; the same on every rank. Waits for the device."""
        if self.options.kind != "feasible":
            return {}
        if not self._remembers_rows:
            return {"domains": dict(self._of_domains())}
        key_m, multiplier_m = self._key_m.cpu().numpy(), self._multiplier_m.cpu().numpy()
        used = np.flatnonzero(key_m)
        return {
            "rows": base64.b64encode(key_m[used].astype("<i8").tobytes()).decode(),
            "multipliers": base64.b64encode(multiplier_m[used].astype("<f8").tobytes()).decode(),
        }

    def load(self, state: dict[str, Any]) -> None:
        """What `state` gave, or nothing of it; before `enter`."""
        try:
            self._catalog, self._names, self._multiplier_d = "", (), self._multiplier_d[:0]
            self._known = {str(name): float(value) for name, value in state.get("domains", {}).items()}
            if "rows" in state:
                keys = np.frombuffer(base64.b64decode(state["rows"], validate=True), "<i8").astype(np.int64)
                values = np.frombuffer(base64.b64decode(state["multipliers"], validate=True), "<f8").astype(np.float64)
                key_u, multiplier_u = torch.from_numpy(keys).to(self._device), torch.from_numpy(values).to(self._device)
                place_u = self._place(key_u)
                self._key_m.zero_().index_copy_(0, place_u, key_u)
                self._multiplier_m.zero_().index_copy_(0, place_u, multiplier_u)
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise CheckpointError(
                f"the multipliers in the checkpoint cannot be understood: {error!r}. Load an earlier checkpoint."
            ) from error


def keys_of(key_n: Tensor, row_n: Tensor) -> Tensor:
    """One positive, odd number for each row of a domain's key: never 0, which is an empty place."""
    x = key_n + (row_n + 1) * _ODD
    x = (x ^ _shifted(x, 30)) * _MIX_1
    x = (x ^ _shifted(x, 27)) * _MIX_2
    return (x ^ _shifted(x, 31)) & (2**63 - 1) | 1


def _shifted(x: Tensor, bits: int) -> Tensor:
    """Zeros come in from the left, also with the sign set."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
