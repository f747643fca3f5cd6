"""Aioli (arXiv 2411.05735): now and then train on one domain after the other, see which losses fall, and follow that.

The run is cut into rounds of `round_windows`. A round begins with sweeps: each asks for every domain j once, in a
random order, for `perturb_windows` windows with the weight `share` on j and the others alike. From the evaluations in
between come matrix A_tj, by how much domain j lowers loss t per perturbation; the rest of the round is trained on
    A <- A / sum(A), after taking its least entry off if that is negative        (`normalize`)
    mean A <- (1 - ema) A + ema * mean A;     w_j proportional to exp(eta * sum_t mean A_tj)       (with `ema`)
    w_j proportional to w_j * exp(eta * sum_t A_tj)                                 (`ema` is null: from the last w)
The losses are `validation` (one per domain, and the paper's) or `target`. It descends the sum of those losses.

How A is solved. Every two evaluations of a sweep give one equation for each loss: (loss before - loss after) =
sum_j q_j A_tj, scaled by the windows between them, where q are the shares of rows that were *really trained*, as
their signals count them. So guard rails may clip what was asked: floors and caps only make the q more alike, and A
is still without bias, but noisier. Directions in which the q of a sweep differ by less than `rank_tolerance` of the
largest singular value count as not measured. What was not measured stays as it was measured before; before any
measurement all domains count alike.

What it needs of evaluations: one before a round and one after each perturbation. `evaluation.every_windows` = 1 does;
else it must divide `perturb_windows`, `round_windows` and first_window. With fewer, fewer directions are measured:
`rank` in the state is how many the last round found (all is the number of domains); 0 leaves the weights as they are.
A window whose signal is missing (it was refused, its row held) breaks the equation that it lies in, which is left
out: the domain is not asked for again in this round. `sweeps` above 1 measures it all the same.

Windows are found by their numbers: the answer to signal j is the mixture of window j + first_window, so between the
end of the sweeps and the use of what they found lie first_window - 1 windows on the weights of the round before. No
sweep begins that would not end two of its lengths before the run does.

Departures from the released code: it counts steps (2 sweeps of 10 steps of each of 7 domains in rounds of 200), takes
asked for shares as trained, and averages sweeps where we solve for all of them at once by least squares (the same if
nothing is missing). Permutations are of our own seed, over domains by size, as names are to have no say. The
rounds' length (by default 4 times their sweeps) is ours.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from mixer.core.errors import ConfigError
from mixer.core.mirror import step
from mixer.core.ports import Setting, State
from mixer.core.signal import Signal

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Aioli:
    NEEDS: ClassVar[frozenset[str]] = frozenset({"evaluation"})
    losses: Literal["validation", "target"] = "validation"
    round_windows: int | None = None  # None: 4 times the sweeps
    perturb_windows: int = 1
    sweeps: int = 1
    share: float = 0.75
    eta: float = 1.0
    ema: float | None = 0.1
    normalize: bool = True
    rank_tolerance: float = 0.02
    seed: int = 0

    def __post_init__(self) -> None:
        if self.losses not in ("validation", "target"):
            raise ConfigError(f"policy.losses={self.losses!r}; it needs to be validation or target.")
        for key in ("perturb_windows", "sweeps"):
            if (value := getattr(self, key)) < 1:
                raise ConfigError(f"policy.{key}={value}; it needs to be at least 1.")
        if not 0 < self.share <= 1:
            raise ConfigError(f"policy.share={self.share!r}; it needs to be above 0 and at most 1.")
        if not 0 < self.eta < np.inf:
            raise ConfigError(f"policy.eta={self.eta!r}; it needs to be above 0.")
        if self.ema is not None and not 0 <= self.ema < 1:
            raise ConfigError(f"policy.ema={self.ema!r}; it needs to be at least 0 and below 1, or null.")
        if not 0 < self.rank_tolerance < 1:
            raise ConfigError(f"policy.rank_tolerance={self.rank_tolerance!r}; it needs to be between 0 and 1.")
        if self.seed < 0:
            raise ConfigError(f"policy.seed={self.seed}; it needs to be at least 0.")

    def start(self, setting: Setting) -> State:
        catalog, num = setting.catalog, len(setting.catalog)
        sweep = self.perturb_windows * self.sweeps * num
        length = self.round_windows or 4 * sweep
        if length < sweep + setting.first_window:
            raise ConfigError(
                f"policy.round_windows={length}: the sweeps over {num} domains take {sweep} windows, and "
                f"{setting.first_window} more pass before they show. It needs to be at least "
                f"{sweep + setting.first_window}."
            )
        names = catalog.names if self.losses == "validation" else setting.targets
        if not names:
            raise ConfigError("policy.losses=target, but the run has no targets. Give it some, or use validation.")
        by_size_d = np.lexsort((np.array([domain.content for domain in catalog.domains]), catalog.num_rows_d))
        origin = setting.start_window + setting.first_window
        return {
            "names": np.array(names, dtype=np.str_),
            "by_size_d": by_size_d.astype(np.int64),
            # first decided window, answer's distance, sweep, round, end of the run (0: open)
            "plan": np.array([origin, setting.first_window, sweep, length, setting.planned_windows or 0]),
            # last signal, last evaluation, last round solved, round of the equations
            "seen": np.array([setting.start_window - 1, -1, -1, -1]),
            "rank": np.array(0, dtype=np.int64),
            "loss_t": np.zeros(len(names)),
            "known_t": np.zeros(len(names), dtype=np.bool_),
            "rows_d": np.zeros(num),  # since the last evaluation
            # Equations of this round: windows that they span, shares trained, falls of losses.
            "span_q": np.zeros(sweep),
            "share_qd": np.zeros((sweep, num)),
            "fall_qt": np.zeros((sweep, len(names))),
            "known_qt": np.zeros((sweep, len(names)), dtype=np.bool_),
            "matrix_td": np.zeros((len(names), num)),
            "measured_t": np.zeros(len(names), dtype=np.bool_),
            "mean_td": np.zeros((len(names), num)),
            "weights_d": setting.prior.weights_d,
        }

    def update(self, state: State, signal: Signal) -> tuple[State, Floats]:
        origin, ahead, sweep, length, _ = state["plan"].tolist()
        state = self._noted(state, signal, origin, sweep, length)
        place = signal.window - origin
        last, evaluated, solved, noted = state["seen"].tolist()
        if place >= 0 and place // length > solved and place % length >= sweep - 1:
            if noted == place // length and state["span_q"].any():
                state = self._solved(state)
            state = state | {"seen": np.array([last, evaluated, place // length, noted])}
        perturbed = self._perturbation(state, signal.window + ahead)
        if perturbed is None:
            return state, state["weights_d"]
        num = len(state["weights_d"])
        asked_d = np.full(num, (1.0 - self.share) / max(num - 1, 1))
        asked_d[perturbed] = self.share
        return state, asked_d

    def _perturbation(self, state: State, window: int) -> int | None:
        """The domain that a window is to try; None outside of sweeps."""
        origin, _, sweep, length, end = state["plan"].tolist()
        number, place = divmod(window - origin, length)
        if window < origin or place >= sweep or (end and origin + number * length + 3 * sweep > end):
            return None
        turn, one = divmod(place // self.perturb_windows, len(state["weights_d"]))
        order = np.random.default_rng([self.seed, number, turn]).permutation(state["by_size_d"])
        return int(order[one])

    def _noted(self, state: State, signal: Signal, origin: int, sweep: int, length: int) -> State:
        """With the signal's rows, and the equation that its evaluation closes."""
        last, evaluated, solved, noted = state["seen"].tolist()
        number, place = divmod(signal.window - origin, length)
        after = dict(state)
        if signal.window != last + 1:
            evaluated = -1  # a window is missing: what it trained is not known
        if number != noted:
            after |= {"span_q": np.zeros(sweep), "known_qt": np.zeros_like(state["known_qt"])}
        rows_d = state["rows_d"] + signal.rows_d
        if signal.evaluation is not None:
            loss_t = signal.evaluation.at(self.losses, state["names"].tolist())
            loss_t = np.where(np.abs(loss_t) < 1e6, loss_t, np.nan)
            span = signal.window - evaluated
            if evaluated >= 0 and rows_d.any() and number >= 0 and span <= place + 1 <= sweep:
                free = int(np.argmin(after["span_q"] > 0))
                known_t = state["known_t"] & np.isfinite(loss_t)
                row = {
                    "span_q": float(span),
                    "share_qd": rows_d / rows_d.sum(),
                    "fall_qt": np.where(known_t, state["loss_t"] - loss_t, 0.0),
                    "known_qt": known_t,
                }
                for key, value in row.items():
                    after[key] = after[key].copy()
                    after[key][free] = value
            known_t = np.isfinite(loss_t)
            after |= {"loss_t": np.where(known_t, loss_t, 0.0), "known_t": known_t}
            evaluated, rows_d = signal.window, np.zeros_like(rows_d)
        return after | {"rows_d": rows_d, "seen": np.array([signal.window, evaluated, solved, number])}

    def _solved(self, state: State) -> State:
        """With A, and the weights that follow from it."""
        given_q = state["span_q"] > 0
        scale_q = state["span_q"][given_q] / self.perturb_windows
        share_qd, known_qt = state["share_qd"][given_q], state["known_qt"][given_q]
        fall_qt = state["fall_qt"][given_q] / scale_q[:, None]
        matrix_td, measured_t, rank = state["matrix_td"].copy(), state["measured_t"].copy(), 0
        for t in range(len(measured_t)):
            known_q = known_qt[:, t]
            if not known_q.any():
                continue
            before_d = matrix_td[t] if measured_t[t] else np.full(share_qd.shape[1], fall_qt[known_q, t].mean())
            missed_q = fall_qt[known_q, t] - share_qd[known_q] @ before_d
            inverse_dq = np.linalg.pinv(share_qd[known_q], rcond=self.rank_tolerance)
            matrix_td[t], measured_t[t] = before_d + inverse_dq @ missed_q, True
            rank = max(rank, int(np.linalg.matrix_rank(inverse_dq)))
        if not measured_t.any():
            return state
        scaled_td = matrix_td[measured_t]
        if self.normalize:
            scaled_td = scaled_td - min(float(scaled_td.min()), 0.0)
            scaled_td = scaled_td / (float(scaled_td.sum()) or 1.0)
        whole_td = np.zeros_like(matrix_td)
        whole_td[measured_t] = scaled_td
        if self.ema is None:
            base_d, mean_td = state["weights_d"], whole_td
        else:
            keep = self.ema if state["measured_t"].any() else 0.0
            base_d = np.full(len(state["weights_d"]), 1.0)
            mean_td = (1.0 - keep) * whole_td + keep * state["mean_td"]
        return state | {
            "matrix_td": matrix_td,
            "measured_t": measured_t,
            "mean_td": mean_td,
            "rank": np.array(rank, dtype=np.int64),
            "weights_d": step(base_d, self.eta * mean_td.sum(0)),
        }
