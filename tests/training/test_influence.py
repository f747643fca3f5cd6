"""Probes: exact against plain autograd, the same on any ranks, and without a trace in training."""

import pickle
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from mixer.core.errors import ConfigError, DataError
from mixer.core.permute import key_of
from mixer.core.plan import Geometry
from mixer.data.corpus import Corpus
from mixer.data.prepare import PrepareOptions, prepare
from mixer.data.sources import SourceOptions
from mixer.data.tasks import SerialRunner
from mixer.training.evaluation import EvaluationOptions, choose_rows
from mixer.training.influence import InfluenceOptions, Probe, ProbeFacts
from mixer.training.model import Decoder, DecoderOptions, TokenLosses
from mixer.training.optimizer import OptimizerOptions, RateOptions, make_optimizer, set_rate
from mixer.training.step import DomainLosses, StepOptions, StepRows, train_step
from tests.fakes import make_corpus
from tests.training import ranks
from tests.training.making import make_batch

ROW_TOKENS, VOCAB, BYTES = 16, 61, 257
GEOMETRY = Geometry(window_steps=2, batch_rows=8, seed=7)
FACTS = ProbeFacts(num_parameters=30_000)
TEXTS = {
    "code": [f"def f{n}(x):\n    return x + {n % 7}\n" for n in range(40)],
    "prose": [f"Cat {chr(97 + n % 26)} sat on the mat, and thought of mice and men. " for n in range(40)],
    "sums": [f"{n} + {n * 3} = {n * 4}; " for n in range(10)],
}
TARGETS = {"maths": [f"{n} - {n} = 0, {n} * 2 = {2 * n}. " for n in range(60)], "tales": ["Once upon a cat. "] * 4}


def prepared(folder, texts):
    folder.mkdir(parents=True)
    for name, lines in texts.items():
        (folder / f"{name}.txt").write_text("\n\n".join(lines))
    domains = {name: SourceOptions(files=(str(folder / f"{name}.txt"),)) for name in texts}
    options = PrepareOptions(output=str(folder / "out"), domains=domains, row_tokens=ROW_TOKENS)
    prepare(options, SerialRunner())
    return f"{folder}/out/train"


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("influence")
    return prepared(folder / "a", TEXTS), prepared(folder / "b", TARGETS)


def make_probe(folders, *, facts=FACTS, targets=True, **options) -> Any:
    values = {"rows": 6, "parts": 3, "sketch_width": 512, "layers": ("layers.*",)} | options
    return Probe(
        Corpus.open(folders[0]).by_source,
        Corpus.open(folders[1]) if targets else None,
        InfluenceOptions(**values),
        GEOMETRY,
        facts,
    )


def decoder(**options):
    values = {"dim": 16, "num_layers": 1, "num_heads": 2, "init_std": 0.3, "tied": False} | options
    return Decoder(DecoderOptions(**values), BYTES)


def trained(model, probe, steps=3):
    """An AdamW that has made some steps on the probe's own rows."""
    optimizer = make_optimizer(model, OptimizerOptions(rate=RateOptions(peak=3e-3)))
    for step in range(steps):
        set_rate(optimizer, 3e-3)
        optimizer.zero_grad()
        for rows in rows_of(probe, probe.plan(50 + step), range(2)):
            model(rows.tokens_bs, rows.documents, rows.target_bs).loss_bs.sum().backward()
        optimizer.step()
    optimizer.zero_grad()
    return optimizer


def rows_of(probe, plan, parts):
    """The rows of some parts, one by one, read from the shards without the probe."""
    for part in parts:
        for place in np.flatnonzero(plan.part_n == part).tolist():
            group, row = int(plan.group_n[place]), plan.row_n[place : place + 1]
            corpus, domain = (probe.rows.corpus, group) if group < 3 else (probe.target_rows.corpus, group - 3)
            shard, at = (int(value[0]) for value in corpus.locate(np.array([domain]), row))
            found = corpus.shard(shard)
            starts = np.asarray(found.starts[at].as_py(), dtype=np.int32)
            batch = type("One", (), {
                "tokens": found.tokens[at : at + 1].astype(np.int64), "length": found.length[at : at + 1].copy(),
                "starts": starts, "starts_offsets": np.array([0, len(starts)]), "step": 0,
                "domain_index": np.zeros(1), "row": row,
            })  # fmt: skip
            yield StepRows.of(batch)


def by_autograd(probe, model, number=0, scales=None, names=None):
    """Benefit and Gram matrix of whole groups, their losses, and the targets of each, row by row."""
    plan = probe.plan(number)
    parameters = dict(model.named_parameters())
    chosen = [parameters[name] for name in names or parameters if names or name.startswith("layers.")]
    gradients, losses = [], []
    for group in range(plan.group_p.max() + 1):
        total, loss, tokens = [torch.zeros_like(one) for one in chosen], 0.0, 0
        for rows in rows_of(probe, plan, np.flatnonzero(plan.group_p == group)):
            logits = model(rows.tokens_bs, rows.documents)
            value = F.cross_entropy(logits[0], rows.target_bs[0], ignore_index=-100, reduction="sum")
            found = torch.autograd.grad(value, chosen)
            total = [one + other for one, other in zip(total, found, strict=True)]
            loss, tokens = loss + float(value.detach()), tokens + rows.num_targets
        flat = torch.cat([one.flatten().double() for one in total]) / tokens
        gradients.append(flat if scales is None else flat * scales)
        losses.append(loss / tokens)
    stacked = torch.stack(gradients)
    return (stacked @ stacked.T).numpy(), np.array(losses)


def measured(probe, model, optimizer, window=0, rate=0.5, **how) -> Any:
    return probe.close(probe.measure(model, optimizer, window, **how), rate)


# --- against plain autograd ---------------------------------------------------------------------------


@pytest.mark.parametrize("metric", ["identity", "adam"])
def test_stored_gradients_are_those_of_autograd(folders, metric):
    probe = make_probe(folders, method="store", metric=metric, every_windows=1)
    model = decoder()
    optimizer = trained(model, probe)
    scales = None
    if metric == "adam":
        denominators = [
            (optimizer.state[one]["exp_avg_sq"].double() / (1 - 0.95**3)).sqrt() + 1e-8
            for name, one in model.named_parameters()
            if name.startswith("layers.")
        ]
        scales = torch.cat([one.flatten() for one in denominators]) ** -0.5
    for number in (0, 2):
        found = measured(probe, model, optimizer, number)
        gram, losses = by_autograd(probe, model, number, scales)
        scale = np.sqrt(np.outer(np.diag(gram)[:3], np.diag(gram)[3:]))
        assert np.abs(found.benefit_dt - gram[:3, 3:]).max() < 1e-5 * scale.max()
        np.testing.assert_allclose(np.concatenate([found.loss_d, found.target_loss_t]), losses, rtol=1e-4)
        off = ~np.eye(3, dtype=bool)
        np.testing.assert_allclose(found.gram_dd[off], gram[:3, :3][off], rtol=1e-4, atol=1e-5 * scale.max())
        assert (np.diag(found.gram_dd) < np.diag(gram)[:3]).all()  # without what is only noise
        assert found.noise_d is not None and (found.noise_d > 0).all()
        assert (found.benefit_error_dt > 0).all()
        assert (found.rate, found.metric, found.targets) == (0.5, metric, ("maths", "tales"))


@pytest.mark.parametrize("metric", ["identity", "adam"])
def test_projecting_on_targets_gives_the_same(folders, metric):
    probes = [make_probe(folders, method=method, metric=metric, batch_rows=1) for method in ("store", "targets")]
    model = decoder()
    optimizer = trained(model, probes[0])
    stored, projected = (measured(probe, model, optimizer) for probe in probes)
    for key in ("benefit_dt", "benefit_error_dt", "target_gram_tt", "loss_d", "target_loss_t"):
        np.testing.assert_allclose(getattr(projected, key), getattr(stored, key), rtol=1e-6, atol=0)
    assert projected.gram_dd is None and projected.noise_d is None


def test_sketches_agree_within_the_errors_they_report(folders):
    model = decoder()
    wide = make_probe(folders, method="store", metric="identity")
    optimizer = trained(model, wide)
    exact = measured(wide, model, optimizer)
    narrow = [make_probe(folders, method="sketch", metric="identity", sketch_width=128, seed=s) for s in range(16)]
    found = [measured(probe, model, optimizer) for probe in narrow]
    benefit = np.stack([one.benefit_dt for one in found])
    own = np.stack([np.sqrt(one.benefit_error_dt**2 - exact.benefit_error_dt**2 * 0.5) for one in found])
    deviation = benefit - exact.benefit_dt
    assert np.abs(deviation.mean(0) / (deviation.std(0) / 16**0.5)).max() < 4  # right on average
    assert 0.4 < np.sqrt((deviation**2).mean()) / np.sqrt((own**2).mean()) < 1.1
    full = make_probe(folders, method="sketch", metric="identity", sketch_width=1 << 15)
    close = measured(full, model, optimizer)
    scale = np.sqrt(np.diag(exact.gram_dd).max() * np.diag(exact.target_gram_tt).max())
    assert np.abs(close.benefit_dt - exact.benefit_dt).max() < 0.02 * scale
    assert np.abs(close.gram_dd - exact.gram_dd).max() < 0.02 * scale


def test_layers_are_those_chosen(folders):
    names = ["head.weight", "norm.weight"]
    probe = make_probe(folders, method="store", metric="identity", layers=tuple(names))
    model = decoder()
    found = measured(probe, model, trained(model, probe))
    gram, _ = by_autograd(probe, model, names=names)
    np.testing.assert_allclose(found.benefit_dt, gram[:3, 3:], rtol=1e-4)


class Halving:
    """M = 2 on one matrix, and everything else left out."""

    def precondition(self, gradients):
        self.shapes = {name: tuple(one.shape) for name, one in gradients.items()}
        return {name: one * (0.5 if "query" in name else 0.0) for name, one in gradients.items()}


@pytest.mark.parametrize("method", ["targets", "sketch", "store"])
def test_a_preconditioner_goes_on_the_targets_alone(folders, method):
    options = {"metric": "ekfac", "method": method, "sketch_width": 1 << 15}
    probe = make_probe(folders, **options)
    model, halving = decoder(), Halving()
    optimizer = trained(model, probe)
    found = measured(probe, model, optimizer, preconditioner=halving)
    assert halving.shapes["layers.0.attention.query.weight"] == (16, 16)
    names = ["layers.0.attention.query.weight"]
    gram, _ = by_autograd(probe, model, names=names)
    atol = 0.03 * np.abs(gram).max() if method == "sketch" else 1e-6
    np.testing.assert_allclose(found.benefit_dt, 0.5 * gram[:3, 3:], rtol=1e-4, atol=atol)
    assert found.gram_dd is None and found.target_gram_tt is None
    with pytest.raises(ConfigError, match="ekfac needs one"):
        probe.measure(model, optimizer, 0)


# --- what a step along a domain does ------------------------------------------------------------------


class Small(nn.Module):
    """Two layers between words and words, in float64 throughout."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(BYTES, 8)
        self.layers = nn.ModuleList([nn.Linear(8, 12), nn.Linear(12, BYTES)])
        self.double()

    def forward(self, tokens_bs, documents, target_bs):
        logits = self.layers[1](torch.tanh(self.layers[0](self.embedding(tokens_bs))))
        log_p = logits.log_softmax(-1)
        chosen = log_p.gather(-1, target_bs.clamp_min(0)[..., None])[..., 0]
        loss = torch.where(target_bs >= 0, -chosen, 0.0)
        return TokenLosses(loss, loss)


@pytest.mark.parametrize("metric", ["identity", "adam"])
@pytest.mark.parametrize("method", ["store", "targets"])
def test_benefit_is_the_fall_of_the_targets_loss_a_step_of_a_domain(folders, metric, method):
    probe = make_probe(folders, method=method, metric=metric, layers=("*",))
    model = Small()
    optimizer = trained(model, probe)
    found = measured(probe, model, optimizer)
    plan = probe.plan(0)

    def group(number):
        total: Any = 0.0
        tokens = 0
        for rows in rows_of(probe, plan, np.flatnonzero(plan.group_p == number)):
            total = total + model(rows.tokens_bs, rows.documents, rows.target_bs).loss_bs.sum()
            tokens += rows.num_targets
        return total / tokens

    rate = 1e-5 if metric == "adam" else 1e-3
    start = {name: value.clone() for name, value in model.state_dict().items()}
    before = [float(group(3 + t).detach()) for t in range(2)]
    for domain in range(3):
        model.load_state_dict(start)
        gradients = torch.autograd.grad(group(domain), list(model.parameters()))
        with torch.no_grad():
            for parameter, gradient in zip(model.parameters(), gradients, strict=True):
                if metric == "adam":
                    moment = optimizer.state[parameter]["exp_avg_sq"]
                    gradient = (moment > 0) * gradient / ((moment / (1 - 0.95**3)).sqrt() + 1e-8)
                parameter -= rate * gradient
            fall = [before[t] - float(group(3 + t)) for t in range(2)]
        np.testing.assert_allclose(fall, rate * found.benefit_dt[domain], rtol=0.03, atol=1e-9)


# --- ranks --------------------------------------------------------------------------------------------


def on_ranks(rank, world_size, group, folders, kind, probes, steps, share):
    """Train a step and probe, again and again: what all probes found, the weights, what random numbers come next.
    Ranks share the rows of a step, or each trains on all of them, so that weights are those of one rank."""
    # 14 rows of some weights and 6 of others: shards are uneven, and one is empty.
    run = ranks.Run(kind, rank, world_size, num_layers=1, num_heads=2, num_kv_heads=1, dim=14, head_dim=6)
    found = []
    for window in range(steps):
        rows = StepRows.of(make_batch(rows=6, seed=window))
        mine = rows.part(6 * rank // world_size, 6 * (rank + 1) // world_size) if share else rows
        torch.rand(1)  # as dropout would
        train_step(
            run.model,
            run.optimizer,
            mine,
            DomainLosses(8),
            rate=1e-3,
            clip_norm=1.0,
            global_targets=rows.num_targets * (1 if share else world_size),
            options=StepOptions(),
            replicas=world_size,
        )
        for options in probes:
            probe = make_probe(folders, rows=6, parts=3, every_windows=1, layers=("layers.*", "embedding.*"), **options)
            halving = Halving() if options["metric"] == "ekfac" else None
            sums = probe.measure(
                FewWords(run.bare), run.optimizer, window, rank=rank, world_size=world_size, preconditioner=halving
            )
            if group is not None:
                torch.distributed.all_reduce(sums, group=group)
            found.append(probe.close(sums, 0.1))
    return found, run.state(), run.draws()


class FewWords(nn.Module):
    """A model of few words on rows of bytes; its names are the model's own."""

    def __init__(self, model):
        super().__init__()
        self._inner: Any = lambda: model  # not as a part of this one, which would change the names

    def named_parameters(self, *args, **kwargs):
        return self._inner().named_parameters(*args, **kwargs)

    def modules(self):
        return self._inner().modules()

    def forward(self, tokens_bs, documents, target_bs):
        target = torch.where(target_bs >= 0, target_bs % VOCAB, target_bs)
        return self._inner()(tokens_bs % VOCAB, documents, target)


PROBES = [
    {"method": method, "metric": metric, "sketch_width": 300}
    for method in ("targets", "sketch", "store")
    for metric in ("adam", "identity", "ekfac")
]
FIELDS = ("benefit_dt", "benefit_error_dt", "gram_dd", "target_gram_tt", "noise_d", "loss_d", "target_loss_t")


@pytest.fixture(scope="module")
def on_one_rank(folders):
    (alone,) = ranks.run(on_ranks, 1, folders, "plain", PROBES, 1, False)
    assert not isinstance(alone, str), alone
    return alone[0]


@pytest.mark.parametrize(("kind", "world_size"), [("ddp", 2), ("ddp", 4), ("fsdp", 2), ("fsdp", 4)])
def test_any_ranks_measure_the_same(folders, on_one_rank, kind, world_size):
    for result in ranks.run(on_ranks, world_size, folders, kind, PROBES, 1, False):
        assert not isinstance(result, str), result
        for place, (expected, found) in enumerate(zip(on_one_rank, result[0], strict=True)):
            for key in FIELDS:
                value = getattr(expected, key)
                if value is None:
                    assert getattr(found, key) is None
                    continue
                atol = 1e-5 * np.abs(value).max()
                np.testing.assert_allclose(getattr(found, key), value, rtol=1e-5, atol=atol, err_msg=f"{place} {key}")


@pytest.mark.parametrize(("kind", "world_size"), [("plain", 1), ("ddp", 2), ("fsdp", 2)])
def test_training_does_not_feel_a_probe(folders, kind, world_size):
    without = ranks.run(on_ranks, world_size, folders, kind, [], 3, True)
    for one, other in zip(without, ranks.run(on_ranks, world_size, folders, kind, PROBES[::3], 3, True), strict=True):
        assert not isinstance(other, str), other
        assert len(other[0]) == 9
        assert np.isfinite(other[0][-1].benefit_dt).all()
        assert len(one[1]) > 20
        assert not ranks.differences(one[1], other[1])
        assert one[2] == other[2]


# --- which rows, and when -----------------------------------------------------------------------------


def test_targets_are_probed_away_from_what_is_evaluated(folders):
    facts = ProbeFacts(num_parameters=1, evaluation=EvaluationOptions(rows=3))
    probe = make_probe(folders, facts=facts)
    sizes = probe.target_rows.catalog.num_rows_d.tolist()
    evaluated = [
        set(choose_rows(size, 3, key_of("evaluation", 0, f"target/{name}")).tolist())
        for size, name in zip(sizes, probe.targets, strict=True)
    ]
    assert sizes[0] > 60 and sizes[1] < 6
    seen = [set(), set()]
    for number in range(60):
        plan = probe.plan(number)
        for target in range(2):
            seen[target] |= set(plan.row_n[plan.group_n == 3 + target].tolist())
    assert seen[0] == set(range(sizes[0])) - evaluated[0]
    assert seen[1] == set(range(sizes[1]))  # too small to leave any alone
    assert len({tuple(probe.plan(number).row_n[:6]) for number in range(3)}) == 3


def test_cadence_cost_and_share(folders):
    probe = make_probe(folders, metric="identity", method="targets")
    rows = probe.plan(0).rows_p
    assert probe.cost_rows == rows.sum() == 6 * 3 + 6 + min(6, probe.target_rows.catalog.num_rows_d[1])
    assert probe.cadence.every_windows == -(-probe.cost_rows // (0.02 * 16))
    assert [window for window in range(3) if probe.due(window)] == [0]
    assert probe.spent_share(1) == probe.cost_rows / 16
    assert probe.spent_share(probe.cadence.every_windows) <= 0.02
    model = decoder()
    found = measured(probe, model, trained(model, probe))
    assert found.tokens == probe.cost_rows * ROW_TOKENS
    many = ProbeFacts(num_parameters=1, world_size=4)
    targets = probe.cost_rows - 18
    assert make_probe(folders, facts=many, method="targets").cost_rows == 18 + 4 * targets
    assert make_probe(folders, facts=many, method="sketch").cost_rows == 18 + targets
    assert make_probe(folders, facts=many, method="sketch", harvest=True).cost_rows == targets
    assert make_probe(folders, every_windows=3, start_windows=2).cadence.due(4)


def test_the_method_that_auto_chooses(folders):
    def method(needs_gram=False, num_parameters=1000, **options):
        facts = ProbeFacts(num_parameters=num_parameters, needs_gram=needs_gram)
        return make_probe(folders, facts=facts, **options).method

    assert method() == "targets"
    assert method(needs_gram=True) == "sketch"
    assert method(num_parameters=1 << 30) == "sketch"  # 2 targets, 3 parts: 24 GiB
    assert method(num_parameters=1 << 30, memory_mb=24 * 1024) == "targets"
    assert method(harvest=True) == "sketch"
    assert method(targets=False, needs_gram=True) == "sketch"


def test_a_probe_travels_to_workers(folders):
    probe = make_probe(folders, method="targets")
    model = decoder()
    optimizer = trained(model, probe)
    sums = probe.measure(model, optimizer, 0)
    assert torch.equal(pickle.loads(pickle.dumps(probe)).measure(model, optimizer, 0), sums)


def test_without_targets_the_domains_gram_is_measured(folders):
    facts = ProbeFacts(num_parameters=1, needs_gram=True)
    probe = make_probe(folders, targets=False, facts=facts, metric="identity")
    model = decoder()
    found = measured(probe, model, trained(model, probe))
    assert found.targets == () and found.benefit_dt.shape == (3, 0)
    assert found.gram_dd is not None and np.isfinite(found.gram_dd).all()


# --- what cannot be measured --------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["targets", "sketch", "store"])
def test_before_the_first_update_adam_measures_nothing(folders, method):
    probe = make_probe(folders, method=method)
    model = decoder()
    optimizer = make_optimizer(model, OptimizerOptions())
    found = measured(probe, model, optimizer)
    assert np.isnan(found.benefit_dt).all() and np.isnan(found.loss_d).all() and np.isnan(found.target_loss_t).all()
    assert found.gram_dd is None
    assert np.isfinite(
        measured(make_probe(folders, method=method, metric="identity"), model, optimizer).benefit_dt
    ).all()


class Bad(nn.Module):
    """Has no loss for rows with a digit in them."""

    def __init__(self, model):
        super().__init__()
        self.layers = nn.ModuleList([model])

    def forward(self, tokens_bs, documents, target_bs):
        out = self.layers[0](tokens_bs, documents, target_bs)
        digit = ((tokens_bs >= 48) & (tokens_bs < 58)).any(1, keepdim=True)
        return TokenLosses(torch.where(digit, torch.nan, out.loss_bs), out.log_z_bs)


@pytest.mark.parametrize("method", ["targets", "sketch", "store"])
def test_a_row_without_a_usable_loss_takes_out_its_group_alone(folders, method):
    probe = make_probe(folders, method=method, metric="identity", layers=("*mlp*",))
    model = decoder()
    good, bad = (measured(probe, one, make_optimizer(one, OptimizerOptions())) for one in (model, Bad(model)))
    lost = [name in ("code", "sums") for name in ("code", "prose", "sums")]
    assert np.isnan(bad.loss_d).tolist() == lost
    assert np.isnan(bad.target_loss_t).tolist() == [True, False]
    assert np.isnan(bad.benefit_dt).tolist() == [[True, True], [True, False], [True, True]]
    np.testing.assert_allclose(bad.loss_d[1], good.loss_d[1], rtol=1e-12)
    np.testing.assert_allclose(bad.target_loss_t[1], good.target_loss_t[1], rtol=1e-12)
    if method != "sketch":  # where names are part of the hash
        np.testing.assert_allclose(bad.benefit_dt[1, 1], good.benefit_dt[1, 1], rtol=1e-12)


def test_what_cannot_be_is_refused(folders, tmp_path):
    for wrong, text in [
        ({"rows": 0}, "rows=0; it must be at least 1"),
        ({"start_windows": 0}, "start_windows=0; it must be at least 1"),
        ({"budget": 0.0}, r"budget=0\.0; it must be above 0"),
        ({"harvest": True, "method": "store"}, "harvest with method=store"),
    ]:
        with pytest.raises(ConfigError, match=text):
            InfluenceOptions(**wrong)
    gram = ProbeFacts(num_parameters=1, needs_gram=True)
    for facts, more, text in [
        (FACTS, {"targets": False}, "there is nothing to measure"),
        (gram, {"metric": "ekfac"}, "ekfac is applied to targets alone"),
        (gram, {"method": "targets"}, "method=targets with 2 targets, Gram matrix needed: True"),
        (ProbeFacts(num_parameters=1, sharded=True), {"harvest": True}, "harvest of a model that is sharded"),
    ]:
        with pytest.raises(ConfigError, match=text):
            make_probe(folders, facts=facts, **more)
    other = make_corpus(tmp_path / "other", {"x": 5})
    with pytest.raises(DataError, match="was made with tokenizer"):
        Probe(Corpus.open(folders[0]).by_source, other, InfluenceOptions(), GEOMETRY, FACTS)
    probe, model = make_probe(folders), decoder()
    optimizer = trained(model, probe)
    with pytest.raises(ConfigError, match="rank 2 of 2; it must be 0 to 1"):
        probe.measure(model, optimizer, 0, rank=2, world_size=2)
    with pytest.raises(ConfigError, match=r"sums of shape \(3,\); needed"):
        probe.close(torch.zeros(3), 0.1)


def test_a_probe_is_found_beside_the_trained_corpus(tmp_path):
    train = make_corpus(tmp_path / "train", {"a": 9})
    make_corpus(tmp_path / "targets", {"new": 4}, seed=3)
    probe = Probe.beside(train.by_source, InfluenceOptions(), GEOMETRY, FACTS)
    assert probe.targets == ("new",)
    assert probe.num_domains == 1
