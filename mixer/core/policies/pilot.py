"""Pilot, a policy of our own: follow influence toward the targets as far as it is sure, and mind repetition.

At every probe, with w the last answer and a the mean of all answers:

1. *Influence.* Benefits are read with their error bars (`mixer.core.benefit`): each target's column on one scale, what
   is small next to its noise shrunk toward the mixture in force, successive probes averaged while rankings of domains
   are stable (`memory`). That gives V[i, t], what a row of domain i is worth to target t.
2. *Repetition.* A domain will have been passed over P_i times at the end: rows so far, and the rest of the run at w_i.
   Rows seen more than `free_passes` times are worth exp(-(P_i - free_passes) / fading) of fresh ones: V[i, t] times
   that where it is positive. (`fading: null`: off. Without a planned end P_i counts rows so far.)
3. *Step.* score_i = sum_t u_t (V[i, t] - sum_k w_k V[k, t]) with target weights u; then
       v = w^(1 - anchor) a^anchor exp(rate * score) / norm
   The pull to the mean of all answers (`anchor`) damps the swing that comes of steps whose effect shows later.
4. *Trust.* The answer goes from w toward v by at most `max_step` in L1, on the straight line. (null: off)
5. *Rest.* While Spearman's correlation of successive rankings is at least `calm` and the last step was below 0.05,
   steps become rare: every second probe, then every fourth, up to `max_rest`; the first probe with moved rankings is
   followed at once. A policy cannot change how often probes are taken; it can only let them pass. Those that pass are
   still averaged in. (1: off)

Where targets are silent, since the run has none, or since nothing in a probe stands out from its noise, v is what the
domains' loss laws ask for instead: ADO's preference (`mixer.core.policies.ado`, its laws fitted every 20 windows),
damped by repetition and within the trust region as above. (`laws: false`: w is kept.) Without targets a step is made
after every window.

Nothing here is of a paper but its parts: mirror steps on alignment as in DGA, the semi-dynamic idea of TiKMiX, ADO's
laws. The worth of repeated rows is a rule of thumb for published findings that some four passes cost little.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from mixer.core.benefit import Noise, Reading, Scale
from mixer.core.errors import ConfigError
from mixer.core.influence import Influence
from mixer.core.mirror import TINY, Floats, answered, begin, check_above_zero, check_share, normalised, step, total_t
from mixer.core.policies._named import NeedsByOptions
from mixer.core.policies.ado import Ado
from mixer.core.ports import Setting, State
from mixer.core.signal import Signal

MOST_FADED = 100.0  # beyond it rows are worth nothing anyway
SMALL = 0.05  # a step after which there is not much to gain, in L1
LAW = "law."  # before the names of the laws' part of the state


@dataclass(frozen=True, slots=True, kw_only=True)
class Pilot:
    NEEDS = NeedsByOptions({"loss", "influence"}, lambda p: {"loss", "influence"} if p.influence else {"loss"})
    influence: bool = True
    laws: bool = True
    law_form: Literal["released", "paper"] = "released"
    rate: float = 0.5
    anchor: float = 0.3
    max_step: float | None = 0.4
    free_passes: float = 4.0
    fading: float | None = 4.0  # passes; null: off
    calm: float = 0.8
    max_rest: int = 4
    target_weights: Mapping[str, float] = field(default_factory=dict[str, float])
    scale: Scale = "columns"
    noise: Noise = "shrink"
    noise_sigmas: float = 1.0
    memory: float = 0.5
    min_stability: float = 0.5

    def __post_init__(self) -> None:
        check_above_zero("rate", self.rate)
        check_share("anchor", self.anchor)
        for key in ("max_step", "fading"):
            if (value := getattr(self, key)) is not None:
                check_above_zero(key, value)
        if not self.free_passes >= 0:
            raise ConfigError(f"policy.free_passes={self.free_passes!r}; it needs to be 0 or more passes.")
        if self.max_rest < 1:
            raise ConfigError(f"policy.max_rest={self.max_rest}; it needs to be at least 1 probe.")
        if not -1 <= self.calm <= 1:
            raise ConfigError(f"policy.calm={self.calm!r}; it needs to be -1 to 1, a correlation.")
        if not (self.influence or self.laws):
            raise ConfigError("policy.influence and policy.laws are both off; pilot needs one of them to go by.")
        assert self.reading and self.ado  # their options are judged as they are made

    @property
    def reading(self) -> Reading:
        return Reading.of(self)

    @property
    def ado(self) -> Ado:
        return Ado(form=self.law_form, refit_windows=20)

    def start(self, setting: Setting) -> State:
        laws = self.ado.start(setting) if self.laws else {}
        slots, first = setting.window_slots, setting.start_window
        return (
            begin(setting.prior.weights_d)
            | self.reading.start(setting)
            | {f"{LAW}{key}": value for key, value in laws.items()}
            | {
                "num_rows_d": setting.catalog.num_rows_d.astype(np.float64),
                "given_d": setting.prior.weights_d * float(slots * first),
                "slots": np.array(slots, dtype=np.int64),
                "planned_windows": np.array(setting.planned_windows or 0, dtype=np.int64),
                "rest": np.array([1, 1], dtype=np.int64),  # probes between steps, probes until the next
                "moved": np.array(2.0),  # by the last step, in L1
            }
        )

    def update(self, state: State, signal: Signal) -> tuple[State, NDArray[np.float64]]:
        state = state | {"given_d": state["given_d"] + signal.rows_d}
        if self.laws:
            laws, _ = self.ado.update({k[len(LAW) :]: v for k, v in state.items() if k.startswith(LAW)}, signal)
            state = state | {f"{LAW}{key}": value for key, value in laws.items()}
        has_targets = self.influence and len(state["target_t"]) > 0
        if not has_targets:
            return self._by_laws(state, signal.window)
        if signal.influence is None:
            return state, state["weights_d"]
        return self._by_influence(state, signal.influence, signal.window)

    def _by_influence(self, state: State, found: Influence, window: int) -> tuple[State, Floats]:
        read = self.reading.read(state, found.benefit_dt, found.benefit_error_dt)
        if read is None:
            return self._by_laws(state, window)
        state, benefits = read
        rest, left = state["rest"].tolist()
        is_calm = float(state["stability"]) >= self.calm and float(state["moved"]) < SMALL
        rest, left = (rest, left - 1) if is_calm else (1, 0)
        if left > 0:
            return state | {"rest": np.array([rest, left])}, state["weights_d"]
        rest = min(2 * rest, self.max_rest) if is_calm else 1
        state = state | {"rest": np.array([rest, rest])}
        if not (benefits.relative_dt * state["target_t"]).any():
            return self._by_laws(state, window)
        worth_d, weights_d = self._worth(state, window), state["weights_d"]
        value_dt = np.where(benefits.value_dt > 0, benefits.value_dt * worth_d[:, None], benefits.value_dt)
        score_d = ((value_dt - total_t(weights_d[:, None] * value_dt)) * state["target_t"]).sum(1)
        return self._moved(state, step(self._base(state), score_d, self.rate))

    def _by_laws(self, state: State, window: int) -> tuple[State, Floats]:
        if not self.laws or not state[f"{LAW}has_law_d"].any():
            return state, state["weights_d"]
        return self._moved(state, step(state[f"{LAW}weights_d"], np.log(self._worth(state, window))))

    def _worth(self, state: State, window: int) -> Floats:
        """Of one more row of each domain, next to a fresh one."""
        if self.fading is None:
            return np.ones(len(state["given_d"]))
        left = max(int(state["planned_windows"]) - window - 1, 0) * int(state["slots"])
        passes_d = (state["given_d"] + left * state["weights_d"]) / state["num_rows_d"]
        with np.errstate(over="ignore"):
            faded_d = np.maximum(passes_d - self.free_passes, 0.0) / self.fading
        return np.exp(-np.minimum(faded_d, MOST_FADED))

    def _base(self, state: State) -> Floats:
        last_d, mean_d = np.maximum(state["weights_d"], TINY), np.maximum(state["average_d"], TINY)
        return normalised(np.exp((1.0 - self.anchor) * np.log(last_d) + self.anchor * np.log(mean_d)))

    def _moved(self, state: State, wanted_d: Floats) -> tuple[State, Floats]:
        weights_d = state["weights_d"]
        length = math.fsum(np.abs(wanted_d - weights_d).tolist())
        part = 1.0 if self.max_step is None or length <= self.max_step else self.max_step / length
        moved_d = normalised((1.0 - part) * weights_d + part * wanted_d)
        return answered(state, moved_d) | {"moved": np.array(part * length)}, moved_d
