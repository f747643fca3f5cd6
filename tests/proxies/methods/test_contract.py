"""What every method that proposes mixtures must do; each new module of the folder is tested here by itself."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mixer.core.errors import ConfigError, DataError
from mixer.core.policies import load_policy
from mixer.core.ports import Setting
from mixer.proxies.methods import kinds, load_method, method_class
from mixer.proxies.methods.mixmin import Likelihoods
from mixer.proxies.table import RunTable
from tests.proxies.worlds import setting_of, table_of, weights_of

NAMES = ("ant", "bee", "cat", "dog", "eel")
PRIOR = np.array([0.3, 0.25, 0.2, 0.15, 0.1])
QUICK: dict[str, dict[str, Any]] = {
    "climb": {"num_draws": 2000, "num_top": 100, "num_best": 16},
    "olmix": {},
    "regmix": {"num_draws": 2000, "num_best": 16},
    "regmix_d": {"num_draws": 2000, "num_best": 16},
    "tikmix_m": {"num_draws": 1000, "num_best": 16, "rounds": 3},
}
CHEAP = ("bimix", "mixing_laws", "mixmin", "olmix", "utilimax")


def method_of(kind):
    return load_method(kind, QUICK.get(kind))


def course(kind, runs=48, seed=0):
    """Runs in a world where a domain's loss falls with its weight, its neighbour's a little, and tokens."""
    rng = np.random.default_rng(seed)
    if method_class(kind).READS == "likelihoods":
        return Likelihoods(domains=NAMES, log_zd=rng.normal(-20.0, 2.0, (runs, 5)), tokens_z=np.full(runs, 10))
    weights_rd = np.repeat(rng.dirichlet(np.full(5, 1.5), runs), 2, axis=0)
    progress_r = np.tile([0.5, 1.0], runs)
    losses = {}
    for place, name in enumerate(NAMES):
        reach_r = 0.02 + weights_rd[:, place] + 0.2 * weights_rd[:, place - 1]
        losses[f"validation/{name}"] = (1.5 + 0.5 * progress_r**-0.4) * reach_r ** -(0.05 + 0.02 * place)
    if method_class(kind).READS == "influence":
        losses = {name: loss_r - loss_r.mean() for name, loss_r in losses.items()}
    return table_of(
        NAMES,
        weights_rd,
        losses,
        run_r=tuple(f"run-{run:03d}" for run in range(runs) for _ in range(2)),
        progress_r=progress_r,
        tokens_r=np.tile([500, 1000], runs),
        quantity="influence" if method_class(kind).READS == "influence" else "loss",
    )


def setting_with(caps=(1.0, 0.3, 0.25, 0.3, 0.2), **options):
    options = {"targets": {"validation/ant": 2.0, "validation/eel": 1.0}, **options}
    return setting_of(NAMES, PRIOR, caps=dict(zip(NAMES, caps, strict=True)), seed=3, **options)


@pytest.fixture(scope="module", params=kinds())
def asked(request):
    setting = setting_with(folds=2)
    return request.param, setting, method_of(request.param).propose(course(request.param), setting)


def test_a_proposal_is_a_mixture_within_the_caps(asked):
    _, setting, proposal = asked
    for weights in (proposal.weights, *(stage.weights for stage in proposal.stages)):
        assert tuple(weights) == NAMES
        weights_d = np.array(list(weights.values()))
        assert (weights_d >= 0).all()
        assert (weights_d <= setting.cap_d).all()
        assert abs(weights_d.sum() - 1.0) < 1e-12
    assert proposal.predicted
    assert np.isfinite(list(proposal.predicted.values())).all()
    assert all(isinstance(note, str) for note in proposal.notes)


def test_the_same_question_has_the_same_answer(asked):
    kind, _, proposal = asked
    again = method_of(kind).propose(course(kind), setting_with(folds=2))
    assert again == proposal


def test_the_order_of_a_tables_columns_is_no_matter(asked):
    kind, _, proposal = asked
    table = course(kind)
    turned = [3, 0, 4, 1, 2]
    if isinstance(table, Likelihoods):
        table = replace(table, domains=[NAMES[place] for place in turned], log_zd=table.log_zd[:, turned])
    else:
        table = replace(table, domains=tuple(NAMES[place] for place in turned), weights_rd=table.weights_rd[:, turned])
    assert method_of(kind).propose(table, setting_with(folds=0)).weights == proposal.weights


def test_a_run_that_failed_changes_nothing(asked):
    kind, _, proposal = asked
    table = course(kind)
    if not isinstance(table, RunTable):
        pytest.skip("reads no table")
    failed = {name: np.append(loss_r, [np.nan, np.nan]) for name, loss_r in table.losses.items()}
    table = replace(
        table,
        run_r=(*table.run_r, "run-999", "run-999"),
        progress_r=np.append(table.progress_r, [0.5, 1.0]),
        tokens_r=np.append(table.tokens_r, [500, 1000]),
        weights_rd=np.concatenate([table.weights_rd, np.tile([0.2, 0.2, 0.2, 0.2, 0.2], (2, 1))]),
        losses=failed,
    )
    assert method_of(kind).propose(table, setting_with(folds=0)).weights == proposal.weights


@pytest.mark.parametrize("kind", kinds())
def test_a_table_too_small_or_of_other_domains_is_refused(kind):
    table = course(kind)
    if isinstance(table, RunTable):
        first = np.array([run in ("run-000", "run-001", "run-002") for run in table.run_r])
        few = replace(
            table,
            run_r=tuple(np.array(table.run_r)[first].tolist()),
            progress_r=table.progress_r[first],
            tokens_r=table.tokens_r[first],
            weights_rd=table.weights_rd[first],
            losses={name: loss_r[first][:6] * np.nan for name, loss_r in table.losses.items()},
        )
        with pytest.raises(DataError, match=r"\. [A-Z]"):  # what was found and needed, and what to do
            method_of(kind).propose(few, setting_with())
    strangers = setting_of(("ant", "bee", "cat", "dog", "elk"), PRIOR)
    with pytest.raises(DataError, match="elk"):
        method_of(kind).propose(table, strangers)


@pytest.mark.parametrize("kind", CHEAP)
@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 10_000), room=st.floats(1.0, 3.0), runs=st.integers(10, 30))
def test_no_prior_and_no_caps_lead_out_of_the_simplex(kind, seed, room, runs):
    rng = np.random.default_rng(seed)
    prior_d = rng.dirichlet(np.full(5, 0.4)) * (1 - 5e-4) + 1e-4
    cap_d = np.minimum(prior_d * room + 1e-9, 1.0)
    setting = setting_of(NAMES, prior_d / prior_d.sum(), caps=dict(zip(NAMES, cap_d.tolist(), strict=True)), folds=0)
    weights_d = weights_of(method_of(kind).propose(course(kind, runs, seed), setting), NAMES)
    assert (weights_d >= 0).all()
    assert (weights_d <= setting.cap_d).all()
    assert abs(weights_d.sum() - 1.0) < 1e-12


def test_caps_follow_from_rows_and_repetition():
    rows = {"ant": 50, "bee": 1000, "cat": 1000, "dog": 1000, "eel": 20}
    setting = setting_of(NAMES, PRIOR, rows=rows, planned_rows=1000, max_epochs=4, folds=0)
    weights = method_of("mixing_laws").propose(course("mixing_laws"), setting).weights
    assert weights["ant"] <= 0.2
    assert weights["eel"] <= 0.08


def test_what_is_proposed_can_be_scripted(asked):
    _, setting, proposal = asked
    policy = load_policy("scripted", proposal.scripted())
    state = policy.start(Setting(catalog=setting.catalog, prior=setting.prior, window_slots=8, planned_windows=10))
    first = proposal.stages[0].weights if proposal.stages else proposal.weights
    assert state["weights_md"][0].tolist() == list(first.values())
    assert len(state["at_m"]) == max(len(proposal.stages), 1)


def test_unknown_methods_and_options_are_refused_with_what_there_is():
    with pytest.raises(ConfigError, match="method 'regmx' is not known. The nearest known one is 'regmix'"):
        method_class("regmx")
    with pytest.raises(ConfigError, match="num_drawers is no option of method 'regmix'. It has regressor, num_draws"):
        load_method("regmix", {"num_drawers": 3})
