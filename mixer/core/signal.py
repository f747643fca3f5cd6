"""What the workers measured in one window, and how the parts of several ranks add up.

Losses of the trained rows are in every signal. What a policy asks for beside them (its `NEEDS`) is a field that is
None where nobody asked, or where this window's turn to measure it has not come:

    need          field           measured
    loss          loss_sum_d      every window
    excess        excess_sum_d    every window, with a reference model: by how much a token's loss lies above its
                                  reference, where it does, summed
    evaluation    evaluation      after the windows of `evaluation.every_windows`
    influence     influence       after the windows of a probe: benefit_dt
    gram          influence       the same with gram_dd and noise_d

Addition is exact: loss sums lie on a grid of 2^-16 nats (`on_grid` puts them there, once, per row),
and every sum below 2^37 nats of such numbers is a float64 without rounding. So the total of a window
is the same for any number of ranks and any order of adding, to the last bit.
"""

from collections.abc import Iterable
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mixer.core.errors import SignalError
from mixer.core.influence import Influence, alike

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

GRID = 2.0**16  # grid points a nat
MOST = 2.0**37  # a sum beyond this many nats could be rounded


def on_grid(loss: ArrayLike) -> Floats:
    """Loss sums rounded to the grid on which addition is exact; what is not finite stays so."""
    return np.rint(np.asarray(loss, dtype=np.float64) * GRID) / GRID


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Evaluation:
    """Losses on text that is not trained on, after the window's last step; sets are target/... and validation/..."""

    sets: tuple[str, ...]
    loss_s: Floats  # mean nats a token; NaN where it could not be measured

    def __post_init__(self) -> None:
        if self.loss_s.dtype != np.float64 or self.loss_s.shape != (len(self.sets),) or np.isinf(self.loss_s).any():
            raise SignalError(f"an evaluation of {len(self.sets)} sets with losses {self.loss_s!r}.")

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Evaluation):
            return NotImplemented
        return self.sets == other.sets and np.array_equal(self.loss_s, other.loss_s, equal_nan=True)

    def of(self, kind: str) -> dict[str, float]:
        """The losses of the sets "<kind>/<name>", by name."""
        found = (one.split("/", 1) for one in self.sets)
        return {name: float(loss) for (head, name), loss in zip(found, self.loss_s, strict=True) if head == kind}

    def at(self, kind: str, names: Iterable[str]) -> Floats:
        """The losses of the sets "<kind>/<name>" for each of these names; NaN where there is no such set."""
        losses = self.of(kind)
        return np.array([losses.get(name, np.nan) for name in names])


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Signal:
    """Sums and counts of one window, per domain in catalog order. Adding two of one window is bookkeeping.

    Rows whose loss was not finite are counted in `bad_rows_d` and in nothing else.
    """

    window: int
    catalog: str  # fingerprint
    loss_sum_d: Floats  # nats, summed over tokens
    tokens_d: Ints
    rows_d: Ints
    bad_rows_d: Ints
    excess_sum_d: Floats | None = None  # nats above the reference
    evaluation: Evaluation | None = None
    influence: Influence | None = None

    def __post_init__(self) -> None:
        size = len(self.loss_sum_d)
        if self.window < 0:
            raise SignalError(f"a signal of window {self.window}. Windows count from 0.")
        for key in ("tokens_d", "rows_d", "bad_rows_d"):
            value = getattr(self, key)
            if value.dtype != np.int64 or value.shape != (size,) or (value < 0).any():
                raise SignalError(f"{key} of window {self.window} must be {size} counts, found {value!r}.")
        for value in (self.loss_sum_d, self.excess_sum_d):
            if value is None:
                continue
            if value.dtype != np.float64 or value.shape != (size,) or not np.isfinite(value).all():
                raise SignalError(
                    f"loss sums of window {self.window} are not finite, or not {size} numbers: {value!r}."
                )
            if (np.abs(value) >= MOST).any():
                raise SignalError(f"loss sums of window {self.window} reach {MOST:.0f} nats; no sum can be that large.")
            if (on_grid(value) != value).any():
                raise SignalError(
                    f"loss sums of window {self.window} are off the grid. Put them through on_grid first."
                )
        if self.influence is not None and len(self.influence.loss_d) != size:
            raise SignalError(
                f"the influence of window {self.window} is of {len(self.influence.loss_d)} domains, not {size}."
            )

    @classmethod
    def from_rows(
        cls,
        window: int,
        catalog: str,
        num_domains: int,
        domain_n: ArrayLike,
        loss_sum_n: ArrayLike,
        tokens_n: ArrayLike,
    ) -> "Signal":
        """The signal of single rows: each row's domain, its loss summed over tokens, and its tokens."""
        domain = np.asarray(domain_n, dtype=np.int64)
        if ((domain < 0) | (domain >= num_domains)).any():
            raise SignalError(
                f"rows of window {window} name domains {domain.min()} to {domain.max()}, the catalog has {num_domains}."
            )
        loss, tokens = on_grid(loss_sum_n), np.asarray(tokens_n, dtype=np.int64)
        good = np.isfinite(loss)

        def total(values: Ints) -> Ints:
            out = np.zeros(num_domains, dtype=np.int64)
            np.add.at(out, domain, values)
            return out

        loss_sum = np.zeros(num_domains)
        np.add.at(loss_sum, domain[good], loss[good])
        return cls(
            window=window,
            catalog=catalog,
            loss_sum_d=loss_sum,
            tokens_d=total(np.where(good, tokens, 0)),
            rows_d=total(good.astype(np.int64)),
            bad_rows_d=total((~good).astype(np.int64)),
        )

    def __add__(self, other: "Signal") -> "Signal":
        if (self.window, self.catalog) != (other.window, other.catalog):
            raise SignalError(
                f"cannot add signals of window {self.window} (catalog {self.catalog[:12]}) and "
                f"window {other.window} (catalog {other.catalog[:12]}). Add parts of one window only."
            )
        if len(self.loss_sum_d) != len(other.loss_sum_d):
            raise SignalError(f"cannot add signals of {len(self.loss_sum_d)} and {len(other.loss_sum_d)} domains.")
        for key in ("evaluation", "influence"):  # of all ranks already
            if getattr(self, key) is not None and getattr(other, key) is not None:
                raise SignalError(f"both parts of window {self.window} hold its {key}. One of them may.")
        mine, others = self.excess_sum_d, other.excess_sum_d
        if (mine is None) != (others is None):
            raise SignalError(f"one part of window {self.window} holds an excess over the reference, the other none.")
        return Signal(
            window=self.window,
            catalog=self.catalog,
            loss_sum_d=self.loss_sum_d + other.loss_sum_d,
            tokens_d=self.tokens_d + other.tokens_d,
            rows_d=self.rows_d + other.rows_d,
            bad_rows_d=self.bad_rows_d + other.bad_rows_d,
            excess_sum_d=None if mine is None or others is None else mine + others,
            evaluation=self.evaluation or other.evaluation,
            influence=self.influence or other.influence,
        )

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Signal):
            return NotImplemented
        return all(alike(getattr(self, f.name), getattr(other, f.name)) for f in fields(self))

    @property
    def loss_d(self) -> Floats:
        """Mean loss per token of each domain; NaN where a domain gave no token."""
        return self._mean(self.loss_sum_d)

    @property
    def excess_d(self) -> Floats:
        """Mean excess per token of each domain; NaN where a domain gave no token, or without a reference."""
        return np.full(len(self.tokens_d), np.nan) if self.excess_sum_d is None else self._mean(self.excess_sum_d)

    def _mean(self, sum_d: Floats) -> Floats:
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.where(self.tokens_d > 0, sum_d / self.tokens_d, np.nan)
