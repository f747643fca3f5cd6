"""Which of several policies is best for the targets, of what their runs measured: functions of arrays alone.

All runs have the same training tokens and were evaluated after the same ones (`tokens_e`), so curves lie on one grid.
The loss that counts is the plain mean over the targets of each target's mean loss of a token. Letters: s seeds,
e evaluations, t targets, d domains, p contenders.

Bands are t-intervals over the seeds: mean +- t * s / sqrt(n), with n - 1 degrees of freedom, and none for one seed.
They hold for seeds whose losses are normal, and with two or three seeds are as wide as that little is known.

Against the reference, contenders are compared seed by seed: both runs of a seed begin with the same weights and draw
rows by the same keys, so what the seed does to both cancels out. `p` is of the two-sided paired t-test; `p_holm` is it
after Holm's correction for as many contenders as were compared. A contender's difference needs two seeds.

Overhead: what was computed beside the training tokens, in tokens. Those of a policy's own probes were counted by its
runs; those of proxies that were trained before are told by who asks. Evaluation is not counted, though a policy may
learn from it; nor are the forward passes of a reference model.

At equal total compute: with T training tokens and X beside them, a run of T * T / (T + X) tokens, with its overhead in
the same proportion, would have cost T in all. Its loss is read off the contender's own curve at that place. That is a
lower bound on how good it would be, as the learning rate was planned for T and is not down yet at that place; and a
kind one to proxies, whose cost does not shrink with the run.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Floats = NDArray[np.float64]

LEVEL = 0.95
AT_FLOOR = 1.05  # times the floor: a weight below that lies on it


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Runs:
    """The runs of one contender, in the order of their seeds."""

    seeds: tuple[int, ...]
    loss_set: Floats  # seeds, evaluations, targets
    final_sd: Floats  # weights of the last window
    mean_sd: Floats  # weights, the mean of all windows
    probe_tokens_s: Floats
    held_s: Floats | None = None  # the share of windows in which the policy's answer was refused; None: never
    cost_tokens: float = 0.0  # of what was done before all runs, as training proxies


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Race:
    """All that a verdict is spoken on."""

    reference: str  # the contender that others are compared with
    targets: tuple[str, ...]
    domains: tuple[str, ...]
    floor_d: Floats
    tokens_e: Floats
    runs: Mapping[str, Runs]  # by label

    @property
    def tokens(self) -> float:
        return float(self.tokens_e[-1])


# ---- numbers of a few seeds --------------------------------------------------------------------------------


class Band(NamedTuple):
    """A mean, and how far the interval around it reaches to either side; NaN for one seed."""

    mean: float
    half: float
    seeds: int


def band(value_s: Floats, level: float = LEVEL) -> Band:
    value_s = np.asarray(value_s, dtype=np.float64)
    mean, half = bands(value_s[:, None], level)
    return Band(float(mean[0]), float(half[0]), len(value_s))


def bands(value_sx: Floats, level: float = LEVEL) -> tuple[Floats, Floats]:
    """The means over the seeds, and half the widths of their t-intervals."""
    num = len(value_sx)
    mean_x = value_sx.mean(axis=0)
    if num < 2:
        return mean_x, np.full_like(mean_x, np.nan)
    factor = float(stats.t.ppf((1 + level) / 2, num - 1)) / np.sqrt(num)
    return mean_x, factor * value_sx.std(axis=0, ddof=1)


class Paired(NamedTuple):
    """The mean difference over the seeds that both have, its interval, and the paired t-test's p."""

    mean: float
    half: float
    p: float
    seeds: int


def paired(value: Mapping[int, float], other: Mapping[int, float], level: float = LEVEL) -> Paired:
    both = sorted(value.keys() & other.keys())
    if not both:
        return Paired(np.nan, np.nan, np.nan, 0)
    difference_s = np.array([value[seed] - other[seed] for seed in both])
    mean, half, num = band(difference_s, level)
    if num < 2:
        return Paired(mean, np.nan, np.nan, num)
    error = difference_s.std(ddof=1) / np.sqrt(num)
    if error == 0:
        return Paired(mean, half, 1.0 if mean == 0 else 0.0, num)
    return Paired(mean, half, float(2 * stats.t.sf(abs(mean) / error, num - 1)), num)


def holm(p: Sequence[float]) -> list[float]:
    """Holm's step-down correction; a NaN was no comparison and stays one."""
    known = sorted((value, place) for place, value in enumerate(p) if np.isfinite(value))
    corrected, least = list(map(float, p)), 0.0
    for rank, (value, place) in enumerate(known):
        least = max(least, min(1.0, (len(known) - rank) * value))
        corrected[place] = least
    return corrected


# ---- curves ------------------------------------------------------------------------------------------------


def tokens_to_reach(tokens_e: Floats, loss_e: Floats, goal: float) -> float:
    """The first place at which the curve, straight between evaluations, is as low as `goal`; NaN: it never is."""
    known = np.isfinite(loss_e)
    x, y = tokens_e[known], loss_e[known]
    low = np.flatnonzero(y <= goal)
    if not low.size or not np.isfinite(goal):
        return np.nan
    at = int(low[0])
    if at == 0 or y[at] == goal:
        return float(x[at])
    share = (y[at - 1] - goal) / (y[at - 1] - y[at])
    return float(x[at - 1] + share * (x[at] - x[at - 1]))


def loss_at(tokens_e: Floats, loss_e: Floats, tokens: float) -> float:
    """The curve at so many tokens, straight between evaluations; NaN outside of what was measured."""
    known = np.isfinite(loss_e)
    if not known.any():
        return np.nan
    return float(np.interp(tokens, tokens_e[known], loss_e[known], left=np.nan, right=np.nan))


def equal_compute(tokens: float, overhead: float) -> float:
    """The training tokens of the run that costs `tokens` in all, its overhead in the same proportion."""
    return tokens * tokens / (tokens + overhead)


def mean_ranks(loss_pt: Floats) -> Floats:
    """Each contender's mean over the targets of its place by loss, 1 the lowest; equals share their places' mean."""
    return np.mean([stats.rankdata(column) for column in loss_pt.T], axis=0)


# ---- the verdict -------------------------------------------------------------------------------------------


def judge(race: Race, level: float = LEVEL) -> dict[str, Any]:
    """All numbers by contender, in plain data; what is not known is None."""
    labels = list(race.runs)
    final_pt = np.array([runs.loss_set[:, -1].mean(axis=0) for runs in race.runs.values()])
    rank_p = mean_ranks(final_pt)
    final = {label: _by_seed(runs) for label, runs in race.runs.items()}
    best = labels[int(np.argmin([_curves(runs).mean(axis=0)[-1] for runs in race.runs.values()]))]
    others = [label for label in labels if label != race.reference]
    against = {label: paired(final[label], final[race.reference], level) for label in others}
    corrected = dict(zip(others, holm([against[label].p for label in others]), strict=True))
    contenders: dict[str, Any] = {}
    for label, rank in zip(labels, rank_p.tolist(), strict=True):
        one = {"rank": rank} | _alone(race, race.runs[label], level) | _reach(race, race.runs[label])
        if label != race.reference:
            one["against_reference"] = _pair(against[label]) | {"p_holm": _number(corrected[label])}
        one["against_best"] = None if label == best else _pair(paired(final[label], final[best], level))
        contenders[label] = one
    return {
        "reference": race.reference,
        "best": best,
        "level_with_best": _level_with(best, contenders, level),
        "better_than_reference": _told_apart(contenders, level, -1),
        "worse_than_reference": _told_apart(contenders, level, 1),
        "level": level,
        "bands": "t-intervals over seeds; p of paired t-tests, two-sided; p_holm corrected for all contenders",
        "tokens": race.tokens,
        "evaluated_at": race.tokens_e.tolist(),
        "targets": list(race.targets),
        "floor": dict(zip(race.domains, race.floor_d.tolist(), strict=True)),
        "contenders": contenders,
    }


def _curves(runs: Runs) -> Floats:
    """The mean target loss, by seed and evaluation; all other means are made of these, to the last bit."""
    return runs.loss_set.mean(axis=2)


def _by_seed(runs: Runs) -> dict[int, float]:
    return dict(zip(runs.seeds, _curves(runs)[:, -1].tolist(), strict=True))


def _level_with(best: str, contenders: Mapping[str, Any], level: float) -> list[str]:
    """Those that these seeds cannot tell from the best one."""
    found: list[str] = []
    for label, one in contenders.items():
        if label != best:
            p = one["against_best"]["p"]
            found += [label] if p is None or p > 1 - level else []
    return found


def _told_apart(contenders: Mapping[str, Any], level: float, sign: int) -> list[str]:
    found: list[str] = []
    for label, one in contenders.items():
        pair = one.get("against_reference")
        if pair and pair["p_holm"] is not None and pair["p_holm"] <= 1 - level and pair["difference"] * sign > 0:
            found.append(label)
    return found


def _alone(race: Race, runs: Runs, level: float) -> dict[str, Any]:
    """What a contender's own runs say."""
    mean_se = _curves(runs)
    curve_e, half_e = bands(mean_se, level)
    probe = float(runs.probe_tokens_s.mean())
    overhead = probe + runs.cost_tokens
    equal = equal_compute(race.tokens, overhead)
    at_equal_s = np.array([loss_at(race.tokens_e, loss_e, equal) for loss_e in mean_se])
    targets = {
        name: _band(band(runs.loss_set[:, -1, place], level))
        | {"at_equal_compute": _number(loss_at(race.tokens_e, runs.loss_set[:, :, place].mean(axis=0), equal))}
        for place, name in enumerate(race.targets)
    }
    return {
        "seeds": list(runs.seeds),
        "held_share": 0.0 if runs.held_s is None else float(runs.held_s.mean()),
        "final_loss": _band(band(mean_se[:, -1], level)) | {"by_seed": mean_se[:, -1].tolist()},
        "targets": targets,
        "overhead": {
            "probe_tokens": probe,
            "cost_tokens": runs.cost_tokens,
            "share": overhead / race.tokens,
            "total_tokens": race.tokens + overhead,
        },
        "equal_compute": {"tokens": equal} | _band(band(at_equal_s, level)),
        "curve": {"loss": _numbers(curve_e), "half": _numbers(half_e), "by_seed": [_numbers(one) for one in mean_se]},
        "weights": {
            name: {
                "final": float(runs.final_sd[:, d].mean()),
                "mean": float(runs.mean_sd[:, d].mean()),
                "floor": float(race.floor_d[d]),
                "at_floor": bool(runs.final_sd[:, d].mean() <= AT_FLOOR * race.floor_d[d]),
            }
            for d, name in enumerate(race.domains)
        },
    }


def _reach(race: Race, runs: Runs) -> dict[str, Any]:
    """Tokens until the reference's final loss: of the seeds' mean curves, and of each seed against its own."""
    reference = race.runs[race.reference]
    goal = float(_curves(reference).mean(axis=0)[-1])
    reached = tokens_to_reach(race.tokens_e, _curves(runs).mean(axis=0), goal)
    share = 1 + (float(runs.probe_tokens_s.mean()) + runs.cost_tokens) / race.tokens
    goals = _by_seed(reference)
    by_seed = {
        str(seed): _number(tokens_to_reach(race.tokens_e, loss_e, goals[seed]))
        for seed, loss_e in zip(runs.seeds, _curves(runs), strict=True)
        if seed in goals
    }
    return {
        "to_reach_reference": {
            "loss": goal,
            "tokens": _number(reached),
            "total_tokens": _number(reached * share),
            "times_faster": _number(race.tokens / reached),
            "by_seed": by_seed,
        }
    }


def _band(found: Band) -> dict[str, Any]:
    return {"mean": _number(found.mean), "half": _number(found.half)}


def _pair(found: Paired) -> dict[str, Any]:
    return {
        "difference": _number(found.mean),
        "half": _number(found.half),
        "p": _number(found.p),
        "seeds": found.seeds,
    }


def _number(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def _numbers(values: Floats) -> list[float | None]:
    return [_number(value) for value in values.tolist()]
