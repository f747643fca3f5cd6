"""No signal that a worker can send, however odd, makes a policy answer or remember what is not finite."""

from dataclasses import replace

import numpy as np
import pytest

from mixer.core.mixture import Mixture
from mixer.core.policies import kinds, load_policy
from mixer.core.signal import MOST, Evaluation, on_grid
from tests.core.policies.making import make_catalog, make_influence, make_setting, make_signal, make_targets

CATALOG = make_catalog(5, 100, 30, 1)
TARGETS = make_targets(2)
ODD = np.array([0.0, 1.0, -1.0, 1e-300, 1e300, -1e300, 1e150, np.nan, 3.0, 1e17])
NEEDED = {"shearing": {"reference": dict.fromkeys("abcd", 1e300)}}
MORE = {
    "doremi": {"reference": {"a": -1e300, "b": 1e300, "c": 0.0, "d": 2.0}, "eta": 1e300},
    "shearing": {"reference": {"a": -1e300, "b": 1e300, "c": 0.0, "d": 2.0}, "eta": 1e300, "smoothing": 0.0},
    "skill_it": {"graph": {"a": {"b": 1e300}, "b": {"a": -1e300}}, "eta": 1e5},
    "aioli": {"eta": 1e300, "ema": None, "normalize": False},
    "ado": {"form": "paper", "warmup_windows": 5, "refit_windows": 3},
    "pilot": {"rate": 1e300, "anchor": 0.0, "max_step": None, "fading": 1e-300, "free_passes": 0.0},
}
CASES = [(kind, NEEDED.get(kind, {})) for kind in kinds()] + list(MORE.items())


def odd_signal(rng, window):
    def some(*shape):
        values = rng.choice(ODD, size=shape)
        return np.where(rng.random(shape) < 0.5, rng.standard_normal(shape), values)

    tokens_d = rng.choice([0, 1, 1 << 40], size=4)
    rows_d = np.where(tokens_d > 0, rng.choice([0, 1, 1 << 30], size=4), 0)
    sums_d = on_grid(np.where(tokens_d > 0, rng.choice([0.0, 1.0, MOST / 2, 7.5], size=4), 0.0))
    signal = replace(make_signal(CATALOG, window), tokens_d=tokens_d, rows_d=rows_d, loss_sum_d=sums_d)
    if rng.random() < 0.5:
        signal = replace(signal, excess_sum_d=on_grid(np.where(tokens_d > 0, rng.choice([0.0, MOST / 2], 4), 0.0)))
    if rng.random() < 0.7:
        sets = tuple(f"validation/{name}" for name in "abcd") + tuple(f"target/{name}" for name in TARGETS)
        kept = rng.random(6) < 0.8
        losses = some(6)[kept]
        signal = replace(signal, evaluation=Evaluation(sets=tuple(np.array(sets)[kept].tolist()), loss_s=losses))
    if rng.random() < 0.7:
        gram = some(4, 4) if rng.random() < 0.7 else None
        influence = make_influence(
            some(4, 2), error_dt=np.abs(some(4, 2)), loss_d=some(4), target_loss_t=some(2), gram_dd=gram,
            gram_error_dd=np.abs(some(4, 4)), noise_d=np.abs(some(4)),
        )  # fmt: skip
        signal = replace(signal, influence=influence)
    return signal


@pytest.mark.parametrize(("kind", "options"), CASES, ids=[f"{k}{i}" for i, (k, _) in enumerate(CASES)])
def test_answers_and_states_stay_finite(kind, options):
    policy = load_policy(kind, options)
    for seed in range(4):
        rng = np.random.default_rng(seed)
        prior = Mixture(np.array([0.25, 0.5, 0.25, 0.0])) if seed % 2 else None
        state, window = policy.start(make_setting(CATALOG, prior, first_window=2, targets=TARGETS)), 0
        for _ in range(25):
            state, weights = policy.update(state, odd_signal(rng, window))
            window += int(rng.integers(1, 3))  # some windows are refused
            where = f"seed {seed}, window {window}"
            assert np.isfinite(weights).all() and (weights >= 0).all() and weights.sum() > 0, where
            bad = [key for key, value in state.items() if value.dtype.kind == "f" and not np.isfinite(value).all()]
            assert not bad, f"{where}: {bad}"
