import numpy as np
import pytest

from mixer.core.errors import ConfigError, DataError, InfeasibleError
from mixer.proxies.evidence import evidence
from tests.proxies.worlds import setting_of, table_of

NAMES = ("a", "b", "c")
WEIGHTS = np.array([[0.2, 0.3, 0.5], [0.5, 0.2, 0.3], [0.1, 0.6, 0.3], [0.3, 0.3, 0.4]])
LOSS = np.array([2.0, 1.9, 2.2, 2.1])


def test_columns_follow_the_catalog_and_targets_are_the_target_sets_in_equal_parts():
    losses = {"target/x": LOSS, "validation/a": LOSS + 1, "target/y": LOSS[::-1].copy()}
    found = evidence(table_of(("c", "a", "b"), WEIGHTS[:, [2, 0, 1]], losses), setting_of(NAMES))
    assert found.weights_rd.tolist() == WEIGHTS.tolist()
    assert found.targets == {"target/x": 0.5, "target/y": 0.5}
    assert found.total(found.losses).tolist() == pytest.approx(((LOSS + LOSS[::-1]) / 2).tolist())
    assert found.notes == ()


def test_without_targets_it_is_the_validation_sets_and_named_ones_come_first():
    table = table_of(NAMES, WEIGHTS, {"validation/a": LOSS, "validation/b": LOSS, "extra": LOSS})
    assert evidence(table, setting_of(NAMES)).targets == {"validation/a": 0.5, "validation/b": 0.5}
    asked = setting_of(NAMES, targets={"extra": 3.0, "validation/b": 1.0, "validation/a": 0.0})
    assert evidence(table, asked).targets == {"extra": 0.75, "validation/b": 0.25}


def test_only_rows_at_the_asked_progress_count_and_runs_without_one_are_named():
    table = table_of(
        NAMES,
        np.repeat(WEIGHTS, 2, axis=0)[:-1],
        {"target/x": np.arange(7.0)},
        run_r=("r0", "r0", "r1", "r1", "r2", "r2", "r3"),
        progress_r=np.array([0.5, 1.0, 0.5, 1.0, 0.5, 1.0, 0.5]),
        tokens_r=np.tile([50, 100], 4)[:-1],
    )
    found = evidence(table, setting_of(NAMES))
    assert found.losses["target/x"].tolist() == [1.0, 3.0, 5.0]
    assert found.notes == ("left out, not measured at 1 of their tokens: r3",)
    assert evidence(table, setting_of(NAMES), progress=0.5).losses["target/x"].tolist() == [0.0, 2.0, 4.0, 6.0]


def test_runs_with_a_loss_that_is_no_number_are_left_out_and_named():
    loss = np.array([2.0, np.nan, 2.2, np.inf])
    found = evidence(table_of(NAMES, WEIGHTS, {"target/x": loss}), setting_of(NAMES))
    assert found.losses["target/x"].tolist() == [2.0, 2.2]
    assert found.notes[0] == "left out, a loss is not finite: run-0001, run-0003"
    assert found.notes[1] == "the mixtures of 2 runs span 2 of 3 dimensions"
    with pytest.raises(DataError, match=r"0 of 4 runs have finite losses of target/x .* needs at least 2. Finish"):
        evidence(table_of(NAMES, WEIGHTS, {"target/x": np.full(4, np.nan)}), setting_of(NAMES))


def test_a_domain_that_never_varied_is_refused_by_name():
    weights_rd = np.array([[0.2, 0.3, 0.5], [0.2, 0.2, 0.6], [0.2, 0.6, 0.2], [0.2, 0.4, 0.4]])
    with pytest.raises(DataError, match=r"the same weight in all 4 runs: a at 0.2. .*Train runs that vary it"):
        evidence(table_of(NAMES, weights_rd, {"target/x": LOSS}), setting_of(NAMES))


def test_losses_that_do_not_vary_have_no_say_and_if_all_do_not_are_refused():
    table = table_of(NAMES, WEIGHTS, {"target/x": LOSS, "target/y": np.full(4, 2.0)})
    assert evidence(table, setting_of(NAMES)).notes == ("the same in all runs, so without a say: target/y",)
    with pytest.raises(DataError, match="losses of target/y are the same in all 4 runs"):
        evidence(table, setting_of(NAMES, targets={"target/y": 1.0}))


def test_other_domains_bad_weights_and_unknown_sets_are_refused():
    table = table_of(NAMES, WEIGHTS, {"target/x": LOSS})
    with pytest.raises(DataError, match="does not know d and knows b, which the catalog lacks"):
        evidence(table, setting_of(("a", "c", "d")))
    with pytest.raises(DataError, match="has no losses of target/z; it has target/x"):
        evidence(table, setting_of(NAMES, targets={"target/z": 1.0}))
    for bad in ([0.5, 0.6, 0.2], [-0.1, 0.6, 0.5], [np.nan, 0.5, 0.5]):
        weights_rd = WEIGHTS.copy()
        weights_rd[2] = bad
        with pytest.raises(DataError, match="run 'run-0002' has the weights"):
            evidence(table_of(NAMES, weights_rd, {"target/x": LOSS}), setting_of(NAMES))
    with pytest.raises(DataError, match=r"no losses of sets target/\.\.\. or validation/"):
        evidence(table_of(NAMES, WEIGHTS, {"extra": LOSS}), setting_of(NAMES))


def test_the_caps_of_a_setting_are_those_of_the_guard_rails():
    rows = {"a": 10, "b": 100, "c": 1000}
    setting = setting_of(NAMES, rows=rows, planned_rows=400, max_epochs=2, epochs={"a": 4}, caps={"c": 0.9})
    assert setting.cap_d.tolist() == [0.1, 0.5, 0.9]
    assert setting_of(NAMES, rows=rows, max_epochs=2, caps={"c": 0.9}).cap_d.tolist() == [1.0, 1.0, 0.9]
    with pytest.raises(InfeasibleError, match="max_epochs=2"):
        setting_of(NAMES, rows=rows, planned_rows=4000, max_epochs=2)
    with pytest.raises(ConfigError, match="folds=1"):
        setting_of(NAMES, folds=1)
    with pytest.raises(ConfigError, match="planned_rows=0"):
        setting_of(NAMES, planned_rows=0)
    with pytest.raises(ConfigError, match=r"targets.target/x=-1"):
        setting_of(NAMES, targets={"target/x": -1.0})
    with pytest.raises(ConfigError, match="all weights of the targets"):
        setting_of(NAMES, targets={"target/x": 0.0})


def test_within_keeps_what_obeys_the_caps_and_moves_the_rest_by_ratios():
    setting = setting_of(NAMES, caps={"a": 0.5})
    kept = np.array([0.5, 0.125, 0.375])
    assert setting.within(kept).tobytes() == kept.tobytes()
    np.testing.assert_allclose(setting.within(np.array([0.8, 0.15, 0.05])), [0.5, 0.375, 0.125], rtol=0, atol=1e-15)
    assert setting.at_caps(np.array([0.5, 0.375, 0.125])) == ("held by their caps: a at 0.5",)
    assert setting.at_caps(np.array([0.4, 0.475, 0.125])) == ()
