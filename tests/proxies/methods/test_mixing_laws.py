import numpy as np
import pytest

from mixer.core.errors import ConfigError, DataError
from mixer.proxies.methods.mixing_laws import MixingLaws
from tests.proxies.worlds import ExpWorld, setting_of, table_of, weights_of


def test_two_targets_that_pull_apart_meet_in_the_middle():
    r = np.linspace(0.05, 0.95, 12)
    losses = {"target/1": 1 + np.exp(-2 * r), "target/2": 1 + np.exp(-2 * (1 - r))}
    table = table_of(("a", "b"), np.stack([r, 1 - r], axis=1), losses)
    proposal = MixingLaws().propose(table, setting_of(("a", "b")))
    assert proposal.weights["a"] == pytest.approx(0.5, abs=1e-4)
    assert proposal.predicted["target/1"] == pytest.approx(1 + np.exp(-1.0), abs=1e-4)
    tilted = MixingLaws().propose(table, setting_of(("a", "b"), targets={"target/1": np.e, "target/2": 1.0}))
    assert tilted.weights["a"] == pytest.approx(0.75, abs=1e-3)  # where e * exp(-2 r) = exp(-2 (1 - r))


@pytest.mark.parametrize("seed", range(3))
def test_the_proposal_is_the_worlds_minimum_under_caps(seed):
    world = ExpWorld.drawn(seed, domains=7)
    cap_d = np.minimum(1.0, 3 * world.prior_d)
    setting = world.setting(caps=dict(zip(world.names, cap_d.tolist(), strict=True)), folds=0)
    found = weights_of(MixingLaws().propose(world.table(50, seed), setting), world.names)
    assert np.abs(found - world.minimum(cap_d)).sum() < 0.02


def test_the_horizon_looks_past_the_runs_end():
    # a teaches quickly and little, b slowly and much: at the runs' end a is ahead, at sixteen times of it b is.
    rng = np.random.default_rng(0)
    share, progress = rng.dirichlet(np.ones(2), 16), np.linspace(0.2, 1.0, 9)
    floor = 2.0 + 0.5 * np.exp(-2.0 * share[:, 1])
    scale = np.exp(2.0 * share[:, 1]) * 0.2
    loss = floor[:, None] + scale[:, None] * progress**-0.5
    table = table_of(
        ("a", "b"),
        np.repeat(share, 9, axis=0),
        {"target/x": loss.ravel()},
        run_r=tuple(f"run-{run:02d}" for run in range(16) for _ in range(9)),
        progress_r=np.tile(progress, 16),
        tokens_r=np.tile((progress * 1000).astype(np.int64), 16),
    )
    setting = setting_of(("a", "b"))
    now, later = (MixingLaws(horizon=horizon).propose(table, setting) for horizon in (1.0, 400.0))
    assert now.weights["a"] > 0.99
    assert later.weights["b"] > 0.99
    expected = floor[np.argmax(share[:, 1])] + scale[np.argmax(share[:, 1])] / 20
    assert later.predicted["target/x"] == pytest.approx(expected, abs=0.05)
    with pytest.raises(DataError, match="horizon=2.0 needs 3 losses of 'target/0' from each run after its first tenth"):
        MixingLaws(horizon=2.0).propose(
            ExpWorld.drawn(0, domains=3).table(20), setting_of(("d00", "d01", "d02"), targets={"target/0": 1})
        )
    with pytest.raises(ConfigError, match="horizon=0.5"):
        MixingLaws(horizon=0.5)
