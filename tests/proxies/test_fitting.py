"""From a table, or a steered proxy's schedule, to the policy that a run is given."""

from dataclasses import replace

import numpy as np
import pytest

from jobs.swarm import main, table_lines
from mixer.config import load, save
from mixer.core.errors import ConfigError, DataError
from mixer.core.mixture import Mixture
from mixer.core.plan import Geometry
from mixer.core.schedule import MixtureSchedule
from mixer.proxies import mixtures, reference
from mixer.proxies.fitting import methods, policy_of, propose, setting_of
from mixer.proxies.proposal import Proposal, ProposedStage
from mixer.proxies.reference import mean_weights, propose_of, trajectory_mean
from mixer.proxies.table import RunTable, write_table
from mixer.run import RunConfig, make_policy, open_rows
from tests.core.policies.making import make_catalog
from tests.proxies.making import config_of

NAMES = ("counting", "greek", "noise")
GEOMETRY = Geometry(window_steps=2, batch_rows=8)


def schedule_of(*rows: tuple[str, tuple[float, ...]]) -> MixtureSchedule:
    schedule = MixtureSchedule(make_catalog(1000, 1000, 1000), GEOMETRY)
    for reason, weights in rows:
        through = -1 if reason == "prior" else max(-1, len(schedule) - 2)
        schedule.extend(Mixture(np.array(weights)), signals_through=through, reason=reason)
    return schedule


def table_of(runs: int = 40, **options) -> RunTable:
    """Losses of an exact law: greek is best for the one set, counting for the other."""
    weights_rd = mixtures.dirichlet(3, runs, 1)
    return RunTable(
        domains=NAMES,
        run_r=tuple(f"{run:05}" for run in range(runs)),
        progress_r=np.ones(runs),
        tokens_r=np.full(runs, 3072),
        weights_rd=weights_rd,
        losses={
            "target/sums": np.exp(weights_rd @ [-0.2, -1.5, 0.4]) + 2,
            "validation/counting": np.exp(weights_rd @ [-1.5, 0.1, 0.2]) + 1,
        },
        **options,
    )


# ---- the mean of a trajectory ------------------------------------------------------------------------------


def test_the_mean_is_of_what_the_policy_decided():
    schedule = schedule_of(
        ("prior", (0.8, 0.1, 0.1)),
        ("prior", (0.8, 0.1, 0.1)),
        ("policy", (0.5, 0.25, 0.25)),
        ("held: not finite", (0.5, 0.25, 0.25)),
        ("policy", (0.2, 0.7, 0.1)),
    )
    assert trajectory_mean(schedule) == pytest.approx({"a": 0.4, "b": 0.4, "c": 0.2}, abs=1e-15)
    assert sum(trajectory_mean(schedule).values()) == pytest.approx(1, abs=1e-12)
    with pytest.raises(ConfigError, match="2 windows that all carry the prior has no trajectory"):
        trajectory_mean(schedule_of(("prior", (0.8, 0.1, 0.1)), ("prior", (0.8, 0.1, 0.1))))


def test_what_never_moved_keeps_its_last_bit():
    third = 1 / 3
    schedule = schedule_of(*[("policy", (third, 0.1, 1 - 0.1 - third))] * 3)
    mean_d = mean_weights(schedule)
    assert mean_d.tolist() == schedule.row(0).weights_d.tolist()
    assert np.mean([0.1] * 3) != 0.1  # as an ordinary mean would not


@pytest.mark.parametrize("method", reference.METHODS)
def test_a_steered_proxy_proposes_its_mean(texts, tmp_path, method):
    config = config_of(texts, tmp_path / "proxy", f"policy={{kind: {method}}}")
    config.run.folder.mkdir()
    save(config, config.run.folder / "run.yaml")
    with pytest.raises(ConfigError, match=rf"no schedule.jsonl. Train a proxy under policy.kind={method}"):
        propose_of(method, config.run.folder)
    schedule = schedule_of(("prior", (0.8, 0.1, 0.1)), ("policy", (0.5, 0.25, 0.25)), ("policy", (0.1, 0.75, 0.15)))
    (config.run.folder / "schedule.jsonl").write_text(schedule.to_text())
    proposal = propose(method, config, open_rows(config).catalog)
    assert proposal.weights == pytest.approx({"a": 0.3, "b": 0.5, "c": 0.2})
    assert proposal.notes == (f"the mean of 2 of 3 windows of {config.run.folder}; 1 carried the prior",)
    other = next(one for one in reference.METHODS if one != method)
    with pytest.raises(ConfigError, match=f"was run under policy.kind={method}; needed {other}"):
        propose_of(other, config.run.folder)


# ---- fits --------------------------------------------------------------------------------------------------


def test_a_fit_is_asked_for_the_run_that_the_configuration_describes(texts, tmp_path):
    more = ("rails={max_epochs: 2, epochs: {noise: 1}, caps: {greek: 0.5}, cap: 0.9}", "swarm.targets={target/sums: 2}")
    config = config_of(texts, tmp_path, *more, "train.windows=90", "prior=uniform", "swarm.seed=3")
    catalog = open_rows(config).catalog
    setting = setting_of(config, catalog)
    assert setting.planned_rows == 90 * 2 * 8 and setting.seed == 3 and setting.targets == {"target/sums": 2}
    assert setting.prior == Mixture.uniform(catalog)
    rows_d = catalog.num_rows_d
    caps = [min(0.9, 2 * rows_d[0] / 1440), min(0.5, 2 * rows_d[1] / 1440), min(0.9, rows_d[2] / 1440)]
    np.testing.assert_allclose(setting.cap_d, caps, rtol=2e-3)
    free = setting_of(replace(config, train=replace(config.train, windows=None)), catalog)
    assert free.planned_rows is None and free.cap_d.tolist() == [0.9, 0.5, 0.9]


def test_a_fitted_mixture_is_a_policy_that_a_run_loads(texts, tmp_path, capsys):
    write_table(tmp_path / "swarm.parquet", table_of())
    config = config_of(texts, tmp_path, "policy={kind: odm}", "rails={}")
    save(config, tmp_path / "config.yaml")
    call = [str(tmp_path / "config.yaml"), "--fit", "olmix", "--out", str(tmp_path / "mix.yaml")]
    assert main(call) == 0
    text = capsys.readouterr().out
    assert "target/sums: predicted" in text and "mixer train CONFIG" in text
    trained = load(RunConfig, [tmp_path / "config.yaml", tmp_path / "mix.yaml"])
    assert trained.policy["kind"] == "fixed" and trained.policy["weights"].keys() == set(NAMES)
    weights = make_policy(trained).weights  # type: ignore[attr-defined]
    Mixture.from_dict(open_rows(config).catalog, weights)  # sums to 1 as it stands
    assert weights["greek"] > 0.5 > weights["noise"]
    # Of another set another mixture; options of a method are the configuration's.
    main([*call, "swarm.targets={validation/counting: 1}", "swarm.fit.olmix.kl=0.001"])
    other = load(RunConfig, [tmp_path / "mix.yaml"]).policy["weights"]
    assert other["counting"] > 0.9


def test_a_proposal_in_stages_is_a_script(texts, tmp_path):
    early: dict[str, float] = {"counting": 0.25, "greek": 0.25, "noise": 0.5}
    late: dict[str, float] = {"counting": 0.5, "greek": 0.5, "noise": 0.0}
    stages = tuple(ProposedStage(at=at, weights=weights, predicted={}) for at, weights in ((0.0, early), (0.5, late)))
    save(policy_of(Proposal(weights=late, predicted={}, stages=stages)), tmp_path / "mix.yaml")
    config = load(RunConfig, [tmp_path / "mix.yaml"])
    policy = make_policy(config)
    assert config.policy["kind"] == "scripted" and [s.at for s in policy.stages.values()] == [0.0, 0.5]  # type: ignore[attr-defined]


def test_what_does_not_fit_is_refused(texts, tmp_path):
    config = config_of(texts, tmp_path)
    catalog = open_rows(config).catalog
    assert {"doge", "doremi", "olmix", "regmix", "tikmix_m"} <= set(methods()) and "mixmin" not in methods()
    with pytest.raises(ConfigError, match="--fit nonsense is no method .* bimix"):
        propose("nonsense", config, catalog)
    with pytest.raises(DataError, match=r"swarm.parquet is not there"):
        propose("olmix", config, catalog)
    write_table(tmp_path / "swarm.parquet", table_of(quantity="influence"))
    with pytest.raises(ConfigError, match="is a table of influence; --fit olmix reads one of loss"):
        propose("olmix", config, catalog)
    write_table(tmp_path / "swarm.parquet", table_of())
    with pytest.raises(ConfigError, match="is a table of loss; --fit tikmix_m reads one of influence"):
        propose("tikmix_m", config, catalog)
    with pytest.raises(ConfigError, match="unknown option `swarm.fit.olmix.kll`"):
        propose("olmix", config_of(texts, tmp_path, "swarm.fit.olmix.kll=3"), catalog)
    for call in ([], ["a.yaml", "--out", "x"]):
        with pytest.raises(ConfigError, match="no configuration was named|belong to --fit"):
            main(call)


def test_a_table_of_predicted_influence_is_fitted_by_what_reads_it(texts, tmp_path):
    write_table(tmp_path / "swarm.parquet", table_of(quantity="influence"))
    config = config_of(texts, tmp_path, "rails={}", "prior=uniform", "swarm.fit.tikmix_m.regressor=linear")
    weights = propose("tikmix_m", config, open_rows(config).catalog).weights
    assert weights["greek"] > 0.4 and weights["noise"] < 1 / 3


def test_a_table_is_shown_in_the_columns_that_there_is_room_for():
    found = table_of(4)
    head, names, first, *_ = table_lines(found, 200)
    assert head == "4 runs, loss at 1 of their tokens"
    assert names.split()[:3] == ["run", "tokens", "target/sums"] and names.split()[-1] == "validation/counting"
    assert sorted(names.split()[3:6]) == list(NAMES)
    row = dict(zip(names.split(), first.split(), strict=True))
    assert row["run"] == "00000" and row["tokens"] == "3,072"
    assert row["target/sums"] == f"{found.losses['target/sums'][0]:.4f}"
    assert row["greek"] == f"{found.weights_rd[0, 1]:.3f}"
    spread = found.weights_rd.std(axis=0)
    assert names.split()[3] == NAMES[int(np.argmax(spread))]
    narrow = table_lines(found, 42)
    assert narrow[0] == "4 runs, loss at 1 of their tokens; 2 of 5 columns fit"
    assert all(len(line) <= 42 for line in narrow[1:]) and narrow[1].split() == names.split()[:4]


def test_a_table_is_printed(tmp_path, capsys):
    write_table(tmp_path / "swarm.parquet", table_of(4))
    assert main(["--show", str(tmp_path / "swarm.parquet")]) == 0
    assert "target/sums" in capsys.readouterr().out
