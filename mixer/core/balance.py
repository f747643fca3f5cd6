"""The mixture of the largest balanced gain: a concave program over mixtures, solved in its few dual variables.

    maximise   gain * m * sum_t u_t P_t(w)  -  spread * std_t(P_t(w))  +  entropy * H(w)
    where      P_t(w) = sum_i w_i B[i, t]
    over       mixtures w with  P_t(w) >= P_t(start) for every target t          (`keep_targets`)
               and  sum_i |w_i - start_i| <= max_shift                           (if given)

for D domains and m targets with weights u (summing to 1): std is the weighted one, sqrt(sum_t u_t (P_t - mean)^2).

Both the spread and the floors are maxima of linear functions of P: spread * std = max of <q(y), P> over |y| <= spread,
with q_t = sqrt(u_t) y_t - u_t sum_s sqrt(u_s) y_s; and the floors are priced by c_t >= 0. For given y and c the best
mixture is the largest of <s, w> + entropy * H(w) with s = B (gain m u - q + c), and that is known:
softmax(s / entropy), or within a shift of the start its projection in KL divergence (`mixer.core.simplex`). What is
left is to minimise a smooth convex function of 2 m numbers, with the gradient (-dq/dy . P, P - floor): a ball and an
orthant to project on, so accelerated projected gradient does (with restarts, and steps that the gradients themselves
allow). An entropy of 0, or a very small one, is approached by larger ones, each beginning where the one before it
ended; it ends at 1e-4 of the program's scale. Domains may be many: nothing but sums over them is needed, and equal
domains get equal weights.

The start is the answer where nothing feasible is better, which includes programs in which all mixtures are alike.
"""

import math
from dataclasses import dataclass

import numpy as np

from mixer.core.mirror import TINY, Floats, normalised, total, total_t
from mixer.core.simplex import onto_box_near, relative

STAGES = 10.0 ** np.arange(0.0, -4.5, -1.0)  # of the entropy, by the program's scale
STEPS, EARLY_STEPS = 1500, 150
PRECISION, EARLY_PRECISION = 1e-8, 1e-3  # of the gradient, by the scale of benefits
FEASIBLE = 1e-6  # by how much a floor may be missed, by the same
BETTER = 1e-9  # by how much an answer must be better than the start, by the program's scale
GROWTH = 1.3


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Program:
    benefit_dt: Floats
    start_d: Floats
    target_t: Floats  # weights, summing to 1
    gain: float
    spread: float
    entropy: float
    keep_targets: bool = True
    max_shift: float | None = None

    def value(self, weights_d: Floats) -> float:
        """What is to be maximised."""
        progress_t = total_t(weights_d[:, None] * self.benefit_dt)
        mean = total(self.target_t * progress_t)
        deviation = math.sqrt(total(self.target_t * (progress_t - mean) ** 2))
        gain = self.gain * len(self.target_t) * mean
        return gain - self.spread * deviation + self.entropy * _entropy(weights_d)

    def missed(self, weights_d: Floats) -> float:
        """By how much the target that loses most falls below its floor."""
        if not self.keep_targets:
            return 0.0
        return float(total_t((self.start_d - weights_d)[:, None] * self.benefit_dt).max(initial=0.0))

    def best(self, score_d: Floats, entropy: float) -> Floats:
        """The largest of <score, w> + entropy * H(w) among the mixtures within the shift."""
        with np.errstate(under="ignore"):
            weights_d = normalised(np.exp((score_d - score_d.max()) / entropy))
        if self.max_shift is None or total(np.abs(weights_d - self.start_d)) <= self.max_shift:
            return weights_d
        ones_d = np.ones(len(score_d))
        ratios = (relative(weights_d), relative(self.start_d), ones_d)
        return onto_box_near(ratios, np.zeros(len(score_d)), ones_d, self.start_d, self.max_shift)


def balanced(program: Program) -> Floats:
    """The solution; the start if nothing feasible is better."""
    benefit_dt = program.benefit_dt
    largest = float(np.abs(benefit_dt).max(initial=0.0))
    if len(benefit_dt) < 2 or not len(program.target_t):
        return program.start_d.copy()
    if largest > 0:  # so that the numbers below mean the same for any unit of benefit
        program = Program(
            benefit_dt=benefit_dt / largest,
            start_d=program.start_d,
            target_t=program.target_t,
            gain=program.gain,
            spread=program.spread,
            entropy=program.entropy / largest,
            keep_targets=program.keep_targets,
            max_shift=program.max_shift,
        )
    scale = max(program.spread, program.gain * len(program.target_t), program.entropy, TINY)
    stages = [float(part * scale) for part in STAGES if part * scale > program.entropy]
    if program.entropy >= STAGES[-1] * scale:
        stages.append(program.entropy)
    answer_d, most = program.start_d.copy(), program.value(program.start_d) + BETTER * scale
    dual = np.zeros(2 * len(program.target_t))
    for entropy in stages:
        last = entropy == stages[-1]
        dual, weights_d = _descend(program, dual, entropy, last, scale)
        value = program.value(weights_d)
        if value > most and program.missed(weights_d) <= FEASIBLE:
            answer_d, most = weights_d, value
    return answer_d


def _descend(program: Program, dual: Floats, entropy: float, last: bool, scale: float) -> tuple[Floats, Floats]:
    """Accelerated projected gradient on the dual variables (y, c), for one entropy."""
    steps, precision = (STEPS, PRECISION) if last else (EARLY_STEPS, EARLY_PRECISION)
    floor_t = total_t(program.start_d[:, None] * program.benefit_dt)
    ahead, momentum, size = dual, 1.0, scale
    slope, weights_d = _slope(program, ahead, entropy, floor_t)
    for _ in range(steps):
        while True:
            moved = _allowed(program, ahead - size * slope)
            change = moved - ahead
            slope_there, weights_d = _slope(program, moved, entropy, floor_t)
            # By convexity the function falls as the quadratic model says if its slope changes by no more than this.
            if (slope_there - slope) @ change <= change @ change / (2.0 * size) or size < TINY:
                break
            size /= 2.0
        if np.abs(change).max() <= precision * size:
            return moved, weights_d
        if (ahead - moved) @ (moved - dual) > 0:  # the momentum leads uphill
            momentum, ahead, slope = 1.0, moved, slope_there
        else:
            following = (1.0 + math.sqrt(1.0 + 4.0 * momentum**2)) / 2.0
            ahead = moved + (momentum - 1.0) / following * (moved - dual)
            momentum = following
            slope, _ = _slope(program, ahead, entropy, floor_t)
        dual, size = moved, size * GROWTH
    return dual, weights_d


def _slope(program: Program, dual: Floats, entropy: float, floor_t: Floats) -> tuple[Floats, Floats]:
    """The gradient of the dual function, and the mixture that is best there."""
    target_t, root_t = program.target_t, np.sqrt(program.target_t)
    num = len(target_t)
    leaning_t = root_t * dual[:num] - target_t * total(root_t * dual[:num])
    price_t = program.gain * num * target_t - leaning_t + dual[num:]
    weights_d = program.best((program.benefit_dt * price_t).sum(1), entropy)
    progress_t = (program.benefit_dt * weights_d[:, None]).sum(0)
    mean = total(target_t * progress_t)
    return np.concatenate([-root_t * (progress_t - mean), progress_t - floor_t]), weights_d


def _allowed(program: Program, dual: Floats) -> Floats:
    num = len(program.target_t)
    leaning, price = dual[:num], np.maximum(dual[num:], 0.0) if program.keep_targets else np.zeros(num)
    length = math.hypot(*leaning.tolist())
    if length > program.spread:
        leaning = leaning * (program.spread / length)
    return np.concatenate([leaning, price])


def _entropy(weights_d: Floats) -> float:
    positive = weights_d[weights_d > 0]
    return -total(positive * np.log(positive))
