import numpy as np
import pytest

from mixer.core.errors import ConfigError, DataError
from mixer.proxies.methods.olmix import Olmix
from mixer.proxies.methods.regmix import Regmix
from mixer.proxies.methods.regmix_d import RegmixD, common_points, stage_at
from mixer.proxies.proposal import Proposal
from tests.proxies.worlds import ExpWorld, setting_of, table_of, weights_of


def test_the_proposal_is_the_mean_of_the_best_draws_around_the_prior():
    world = ExpWorld.drawn(0, domains=4, targets=1)
    table = world.table(40)
    proposal = Regmix(regressor="linear", num_draws=3000, num_best=10).propose(table, world.setting(seed=7))
    law = np.linalg.lstsq(table.weights_rd, table.losses["target/0"], rcond=None)[0]
    best = world.names[int(np.argmin(law))]  # straight lines end in a corner
    assert proposal.weights[best] > 0.97
    other = Regmix(regressor="linear", num_draws=3000, num_best=10).propose(table, world.setting(seed=8))
    assert other.weights != proposal.weights


@pytest.mark.parametrize("regressor", ["lightgbm", "exp_linear"])
def test_the_proposal_beats_prior_and_the_best_run(regressor):
    world = ExpWorld.drawn(3, domains=6, targets=3, spread=3.0)
    table = world.table(128, noise=0.005)
    found = Regmix(regressor=regressor, num_draws=20_000, num_best=64).propose(table, world.setting(folds=0))
    loss = float(world.total(weights_of(found, world.names))[0])
    least, prior = float(world.total(world.minimum())[0]), float(world.total(world.prior_d)[0])
    assert loss - least < 0.25 * (prior - least)
    assert loss < np.quantile(world.total(table.weights_rd), 0.05)


def test_caps_shape_the_draws_and_are_named_in_the_notes_of_what_reaches_them():
    world = ExpWorld.drawn(0, domains=4, targets=1)
    free = Regmix(regressor="linear", num_draws=2000).propose(world.table(40), world.setting())
    best = max(free.weights, key=lambda name: free.weights[name])
    capped = Regmix(regressor="linear", num_draws=2000).propose(world.table(40), world.setting(caps={best: 0.25}))
    assert capped.weights[best] > 0.24  # nearly all of the best draws are at the cap
    assert capped.weights[best] <= 0.25
    exact = Olmix(kl=0.0).propose(world.table(40), world.setting(caps={best: 0.25}, folds=0))
    assert exact.weights[best] == pytest.approx(0.25, abs=1e-9)
    assert any(note.startswith(f"held by their caps: {best} at 0.25") for note in exact.notes)


def test_options_that_make_no_sense_are_refused():
    with pytest.raises(ConfigError, match="num_best=9, num_draws=8"):
        Regmix(num_best=9, num_draws=8)
    with pytest.raises(ConfigError, match="strength=0"):
        Regmix(strength=0)
    with pytest.raises(ConfigError, match="regressor='trees'"):
        Regmix(regressor="trees")  # type: ignore[arg-type]


def staged(points=(0.25, 0.5, 1.0)):
    """At first only a teaches, at the end only b."""
    rng = np.random.default_rng(0)
    share = rng.dirichlet(np.ones(3), 30)
    progress = np.tile(points, 30)
    weights = np.repeat(share, len(points), axis=0)
    loss = 4.0 - 2.0 * progress - (1 - progress) * weights[:, 0] - (progress - 0.3) * weights[:, 1]
    return table_of(
        "abc", weights, {"target/x": loss}, run_r=tuple(f"r{run:02d}" for run in range(30) for _ in points),
        progress_r=progress, tokens_r=(progress * 100).astype(np.int64),
    )  # fmt: skip


def test_every_stage_has_the_mixture_of_its_point_and_holds_from_the_point_before():
    proposal = RegmixD(regressor="linear", num_draws=3000, num_best=8).propose(staged(), setting_of("abc"))
    assert [stage.at for stage in proposal.stages] == [0.0, 0.25, 0.5]
    assert [max(stage.weights, key=lambda name: stage.weights[name]) for stage in proposal.stages] == ["a", "a", "b"]
    early, middle, late = (np.array(list(stage.weights.values())) for stage in proposal.stages)
    mean = 0.25 * early + 0.25 * middle + 0.5 * late
    np.testing.assert_allclose(weights_of(proposal, "abc"), mean, rtol=0, atol=1e-12)
    assert [round(stage.predicted["target/x"], 1) for stage in proposal.stages] == [2.8, 2.5, 1.3]
    assert proposal.predicted == proposal.stages[-1].predicted
    script = proposal.scripted()
    assert script["between"] == "step"
    assert script["stages"]["stage_1"] == {"at": 0.25, "weights": dict(proposal.stages[1].weights)}


def test_named_stages_and_the_stage_of_an_observed_loss():
    proposal = RegmixD(regressor="linear", stages=(1.0, 0.25), num_draws=500, num_best=8).propose(
        staged(), setting_of("abc")
    )
    assert [stage.at for stage in proposal.stages] == [0.0, 0.25]
    predicted = [stage.predicted["target/x"] for stage in proposal.stages]
    assert stage_at(proposal, {"target/x": predicted[0] + 0.1, "target/y": 1.0}) == 0
    assert stage_at(proposal, {"target/x": predicted[1] - 0.1}) == 1
    with pytest.raises(DataError, match="none in common"):
        stage_at(proposal, {"target/y": 1.0})
    with pytest.raises(DataError, match="no stages"):
        stage_at(Proposal(weights={"a": 1.0}, predicted={}), {"target/x": 1.0})
    with pytest.raises(ConfigError, match="stages="):
        RegmixD(stages=(0.0, 1.0))


def test_points_are_those_that_all_runs_reached():
    table = staged()
    assert common_points(table) == (0.25, 0.5, 1.0)
    table.progress_r[1] = 0.6
    assert common_points(table) == (0.25, 1.0)
    table.progress_r[[0, 2]] = [0.3, 0.9]
    with pytest.raises(DataError, match="30 runs of the table were never measured at the same share"):
        common_points(table)
