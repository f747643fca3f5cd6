"""Does influence foretell what training does? Ranks of domains by influence against what small shifts of weights did.

A transformer is trained on the natural mixture of a real corpus. At three points of its training two things are
found out from the same weights and optimizer state:

- predicted: benefit of each domain for each target, by metric (identity, adam, ekfac: of the blocks' matrices;
  "adam, all": of every parameter), from gradients of training rows and of target rows, chosen apart from those that
  the measurement trains and evaluates on;
- measured: it is really trained on for some steps, on the mixture and on ones shifted toward each domain, and the
  targets are evaluated.

What is told is Spearman's correlation of the two over domains, for each target and in the mean over targets, with the
5 % and 95 % points of a bootstrap over the seeds of the measurement's rows; and, as what no prediction can be asked to
exceed, the correlation of the measurement's one half of seeds with the other ("repeated").

The corpus is raw text: train/<domain>/*.parquet and targets/<target>.parquet, with a column `text`. MIXER_CORPUS says
where it lies; without it nothing is measured. `--quick` shows in a minute that everything works, on a tiny model; the
long form trains 4,500 steps of 60 rows beside the run itself, and wants a GPU.

    MIXER_CORPUS=DIR python -m tests.bench.influence_response [--quick] [--folder DIR] [--out FILE] [--device cuda]
"""

import argparse
import functools
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import rankdata
from torch import Tensor, nn

from mixer.config import load
from mixer.core.mixture import Mixture
from mixer.core.plan import Geometry
from mixer.core.schedule import MixtureSchedule
from mixer.data.corpus import CatalogRows, Corpus
from mixer.data.prepare import PrepareOptions, prepare
from mixer.data.reader import WindowReader
from mixer.data.sources import SourceOptions
from mixer.data.tasks import SerialRunner
from mixer.run import RunConfig, make_model
from mixer.training.curvature import CurvatureOptions, measure
from mixer.training.evaluation import EvaluationOptions, Evaluator
from mixer.training.labels import choose_batches
from mixer.training.layers import find_layers
from mixer.training.optimizer import make_optimizer, set_rate
from mixer.training.oracles import Response, ResponseOptions, measured_response, toward_domains
from mixer.training.step import DomainLosses, StepRows, train_step
from tests.bench.record import machine

Floats = NDArray[np.float64]
CORPUS = "MIXER_CORPUS"
REPOSITORY = Path(__file__).parents[2]
METRICS = ("identity", "adam", "ekfac", "adam, all")
RESAMPLED = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """How much is done; `quick` makes each number small."""

    model: str = "2m"
    overrides: tuple[str, ...] = ("optimizer.rate.peak=0.002", "optimizer.rate.warmup_steps=50")
    row_tokens: int = 256
    batch_rows: int = 32
    steps: int = 1500
    points: tuple[int, ...] = (100, 500, 1400)  # steps trained when influence is held against training
    domains: int | None = None  # the first so many; None: all
    targets: int | None = None
    probe_rows: int = 64  # of each domain and each target, for its gradient
    curvature_rows: int = 256  # of all domains
    response_steps: int = 8
    response_rows: int = 4  # of each domain, a step
    evaluated_rows: int = 128  # of each target
    response: ResponseOptions


LONG = Form(response=ResponseOptions(shift=0.1, seeds=tuple(range(6)), clip_norm=1.0))


QUICK = Form(
    overrides=("model.dim=48", "model.num_layers=2", "model.num_heads=3", "optimizer.rate.warmup_steps=4"),
    row_tokens=128,
    batch_rows=8,
    steps=24,
    points=(4, 12, 24),
    domains=4,
    targets=2,
    probe_rows=8,
    curvature_rows=8,
    response_steps=3,
    response_rows=2,
    evaluated_rows=8,
    response=ResponseOptions(shift=0.2, seeds=(0, 1), both_sides=False, clip_norm=1.0),
)


# --- the corpus, and training on it ---------------------------------------------------------------------


def prepared(raw: Path, folder: Path, form: Form) -> tuple[Corpus, Corpus]:
    """The trained corpus and the targets; made once, in bytes."""
    domains = {one.name: SourceOptions(files=(f"{one}/*.parquet",)) for one in sorted((raw / "train").iterdir())}
    targets = {one.stem: SourceOptions(files=(str(one),)) for one in sorted((raw / "targets").glob("*.parquet"))}
    options = PrepareOptions(
        output=str(folder),
        domains=dict(list(domains.items())[: form.domains]),
        targets=dict(list(targets.items())[: form.targets]),
        row_tokens=form.row_tokens,
    )
    prepare(options, SerialRunner())
    return Corpus.open(str(folder / "train")), Corpus.open(str(folder / "targets"))


class Point(NamedTuple):
    """A model in the middle of its training."""

    step: int
    rate: float
    model: nn.Module
    optimizer: torch.optim.Optimizer


def trained(config: RunConfig, rows: CatalogRows, form: Form, device: torch.device) -> Iterator[Point]:
    """The same model at each of the points; whoever takes one leaves it as it is."""
    geometry = Geometry(window_steps=form.steps, batch_rows=form.batch_rows)
    schedule = MixtureSchedule(rows.catalog, geometry)
    schedule.append(schedule.propose(Mixture.natural(rows.catalog)))
    model = make_model(config, rows.corpus.manifest.tokenizer.vocab_size).to(device)
    optimizer = make_optimizer(model, config.optimizer)
    losses, clip_norm = DomainLosses(len(rows.catalog), device), config.optimizer.clip_norm
    for step, batch in enumerate(WindowReader(rows, schedule, geometry)):
        rate, moved = config.optimizer.rate.at(step, form.steps), StepRows.of(batch).to(device)
        if step in form.points:
            yield Point(step, rate, model, optimizer)
        how: dict[str, Any] = {"global_targets": moved.num_targets, "options": config.step}
        train_step(model, optimizer, moved, losses, rate=rate, clip_norm=clip_norm, **how)
    if form.steps in form.points:
        yield Point(form.steps, config.optimizer.rate.at(form.steps, form.steps), model, optimizer)


def mean_loss(model: nn.Module, rows: StepRows) -> Tensor:
    out: Any = model(rows.tokens_bs, rows.documents, rows.target_bs)
    return out.loss_bs.sum() / rows.num_targets


# --- predicted ----------------------------------------------------------------------------------------


def predicted(
    point: Point, domains: CatalogRows, targets: CatalogRows, form: Form, device: torch.device
) -> dict[str, Floats]:
    """benefit_dt by metric, along p -> (1 - e) p + e e_i."""
    model, weights_d = point.model, Mixture.natural(domains.catalog).weights_d
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    covered = [name for layer in find_layers(model) for name in layer.parameters]
    slope_d, slope_t = (
        [
            _gradient(model, names, _of_domain(rows, number, form.probe_rows, 90), device)
            for number in range(len(rows.catalog))
        ]
        for rows in (domains, targets)
    )
    scale = _adam_scales(point, names)

    def batches() -> Iterator[StepRows]:
        return choose_batches(domains, weights_d, form.curvature_rows, seed=91)

    curvature = measure(model, batches, CurvatureOptions(), device=device)
    solved_t = [curvature.precondition({name: slope[name] for name in covered}) for slope in slope_t]

    def products(kept: Sequence[str], right: Sequence[dict[str, Tensor]], by: dict[str, Tensor] | None) -> Floats:
        found = [
            [
                sum(float((one[name] * other[name] * (by[name] if by else 1.0)).sum()) for name in kept)
                for other in right
            ]
            for one in slope_d
        ]
        return toward_domains(np.array(found), weights_d)

    return {
        "identity": products(covered, slope_t, None),
        "adam": products(covered, slope_t, scale),
        "ekfac": products(covered, solved_t, None),
        "adam, all": products(names, slope_t, scale),
    }


def _gradient(
    model: nn.Module, names: Sequence[str], batches: Sequence[StepRows], device: torch.device
) -> dict[str, Tensor]:
    """Of the mean loss a token."""
    parameters, targets = dict(model.named_parameters()), sum(rows.num_targets for rows in batches)
    total = {name: torch.zeros_like(parameters[name]) for name in names}
    for rows in batches:
        objective = mean_loss(model, rows.to(device)) * (rows.num_targets / targets)
        for name, found in zip(names, torch.autograd.grad(objective, [parameters[n] for n in names]), strict=True):
            total[name] += found
    return total


def _adam_scales(point: Point, names: Sequence[str]) -> dict[str, Tensor]:
    """1 / (sqrt(v / (1 - beta2^steps)) + eps), times the multiple of the rate that a parameter learns at."""
    parameters, scales = dict(point.model.named_parameters()), dict[str, Tensor]()
    group_of = {id(weight): group for group in point.optimizer.param_groups for weight in group["params"]}
    for name in names:
        state, group = point.optimizer.state[parameters[name]], group_of[id(parameters[name])]
        corrected = state["exp_avg_sq"] / (1 - group["betas"][1] ** float(state["step"]))
        # An element without any gradient so far is left out: 1 / eps of it would be all that is seen.
        scale = group.get("rate_scale", 1.0) / (corrected.sqrt() + group["eps"])
        scales[name] = torch.where(corrected > 0, scale, 0.0)
    return scales


def _of_domain(rows: CatalogRows, domain: int, num: int, seed: int, probe: int = 0) -> list[StepRows]:
    only_d = np.eye(len(rows.catalog))[domain]
    most = min(num, int(rows.catalog.num_rows_d[domain]))
    return list(choose_batches(rows, only_d, most, probe=probe, seed=seed, batch_rows=8))


# --- measured -----------------------------------------------------------------------------------------


def responded(
    point: Point, config: RunConfig, domains: CatalogRows, evaluator: Evaluator, form: Form, device: torch.device
) -> Response:
    num = len(domains.catalog)

    @functools.cache
    def rows(seed: int, step: int) -> list[StepRows]:
        chosen = [_of_domain(domains, d, form.response_rows, 1000 + seed, step)[0] for d in range(num)]
        return [one.to(device) for one in chosen]

    def losses(model: nn.Module) -> Floats:
        found = evaluator.close(evaluator.measure(model, device=device))
        return np.array([one["loss"] for one in found.values()])

    def make(model: nn.Module) -> torch.optim.Optimizer:
        optimizer = make_optimizer(model, config.optimizer)
        set_rate(optimizer, point.rate)
        return optimizer

    state = point.optimizer.state_dict()
    for group in state["param_groups"]:  # at the rate of the point, not of the step before it
        group["lr"] = point.rate * group.get("rate_scale", 1.0)
    return measured_response(
        point.model,
        make,
        mean_loss,
        rows=rows,
        targets=losses,
        weights_d=Mixture.natural(domains.catalog).weights_d,
        steps=form.response_steps,
        optimizer_state=state,
        options=form.response,
    )


# --- how well they agree ------------------------------------------------------------------------------


def spearman(one: Floats, other: Floats) -> float:
    return float(np.corrcoef(rankdata(one), rankdata(other))[0, 1])


def agreement(benefit_dt: Floats, response: Response, targets: Sequence[str]) -> dict[str, Any]:
    """Spearman over domains by target and in the mean, each with points of a bootstrap over the seeds of rows."""
    seeds = len(response.benefit_kdt)
    rng = np.random.default_rng(0)

    def by_target(measured_dt: Floats) -> list[float]:
        each = [spearman(benefit_dt[:, t], measured_dt[:, t]) for t in range(len(targets))]
        return [*each, float(np.mean(each))]

    value = by_target(response.benefit_dt)
    drawn = [by_target(response.benefit_kdt[rng.integers(0, seeds, seeds)].mean(0)) for _ in range(RESAMPLED)]
    low, high = np.quantile(drawn, [0.05, 0.95], axis=0)
    return {
        name: {"spearman": value[t], "low": float(low[t]), "high": float(high[t])}
        for t, name in enumerate([*targets, "mean"])
    }


def repeated(response: Response, targets: Sequence[str]) -> dict[str, float]:
    """Of one half of the seeds with the other, by target; the mean over targets is `mean`."""
    half = len(response.benefit_kdt) // 2
    first, second = response.benefit_kdt[:half].mean(0), response.benefit_kdt[half:].mean(0)
    each = [spearman(first[:, t], second[:, t]) for t in range(len(targets))]
    return {**dict(zip(targets, each, strict=True)), "mean": float(np.mean(each))}


def looked_at(
    point: Point, config: RunConfig, domains: CatalogRows, evaluator: Evaluator, form: Form, device: torch.device
) -> dict[str, Any]:
    """One point's entry in the file."""
    began_s = time.perf_counter()
    found = predicted(point, domains, evaluator.corpora["targets"].by_source, form, device)
    told_s = time.perf_counter()
    response = responded(point, config, domains, evaluator, form, device)
    return {
        "step": point.step,
        "rate": point.rate,
        "loss": dict(zip(evaluator.sets, response.loss_kt.mean(0).tolist(), strict=True)),
        "agreement": {metric: agreement(found[metric], response, evaluator.sets) for metric in METRICS},
        "repeated": repeated(response, evaluator.sets),
        # What multiplies a prediction to meet the measurement, in least squares; rate x steps, were adam exact.
        "scale": {metric: float((one * response.benefit_dt).sum() / (one**2).sum()) for metric, one in found.items()},
        "predicted": {metric: benefit.tolist() for metric, benefit in found.items()},
        "measured": response.benefit_dt.tolist(),
        "measured_error": response.error_dt.tolist(),
        "predicted_s": told_s - began_s,
        "measured_s": time.perf_counter() - told_s,
    }


def table(entries: Sequence[dict[str, Any]], targets: Sequence[str]) -> str:
    columns = [*targets, "mean"]
    lines = [f"{'step':>6}  {'metric':<10}" + "".join(f"{name.removeprefix('target/'):>24}" for name in columns)]
    for entry in entries:
        for metric, values in entry["agreement"].items():
            text = "".join(f"{_cell(values[name]):>24}" for name in columns)
            lines.append(f"{entry['step']:>6}  {metric:<10}{text}")
        text = "".join(f"{entry['repeated'][name]:>24.3f}" for name in columns)
        lines.append(f"{entry['step']:>6}  {'repeated':<10}{text}")
    return "\n".join(lines)


def _cell(found: dict[str, float]) -> str:
    return f"{found['spearman']:.3f} [{found['low']:.2f}, {found['high']:.2f}]"


def bench(raw: Path, folder: Path, form: Form, device: torch.device, say: Callable[[str], None]) -> dict[str, Any]:
    train, targets = prepared(raw, folder, form)
    config = load(RunConfig, [REPOSITORY / f"configs/model/{form.model}.yaml"], list(form.overrides))
    rows = train.by_source
    options = EvaluationOptions(rows=form.evaluated_rows, sets=("targets",))
    evaluator = Evaluator({"targets": targets}, options, like=train.manifest)
    entries: list[dict[str, Any]] = []
    for point in trained(config, rows, form, device):
        entries.append(looked_at(point, config, rows, evaluator, form, device))
        say(f"step {point.step}: measured in {entries[-1]['measured_s']:.0f} s")
    return {
        "domains": list(rows.catalog.names),
        "targets": list(evaluator.sets),
        "parameters": sum(p.numel() for p in make_model(config, train.manifest.tokenizer.vocab_size).parameters()),
        "form": asdict(form),
        "machine": machine(),
        "device": str(device),
        "points": entries,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tiny model and little text: whether it works at all")
    parser.add_argument("--folder", type=Path, help="where the corpus is prepared, or was; else one that is removed")
    parser.add_argument("--out", type=Path, help="where the JSON is written; else beside the prepared corpus")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(arguments)
    raw = os.environ.get(CORPUS)
    if not raw or not (Path(raw) / "train").is_dir():
        found = f"{CORPUS}={raw!r}, which has no folder train" if raw else f"{CORPUS} is not set"
        print(f"skipped: {found}; name a folder with train/<domain>/*.parquet and targets/*.parquet", file=sys.stderr)
        return 0
    form = QUICK if options.quick else LONG
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if options.quick else threads)  # tiny products only wait for each other
    try:
        result = _measured(Path(raw), form, options)
    finally:
        torch.set_num_threads(threads)
    print(f"\n{result['parameters']:,} parameters\n{table(result['points'], result['targets'])}")
    return 0


def _measured(raw: Path, form: Form, options: argparse.Namespace) -> dict[str, Any]:
    """Measured and written."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = (options.folder or Path(temporary)) / f"rows-{form.row_tokens}-{form.domains}"
        result = bench(raw, folder, form, torch.device(options.device), lambda text: print(text, flush=True))
    out = options.out or Path(options.folder or ".") / "influence_response.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written to {out}")
    return result


if __name__ == "__main__":
    sys.exit(main())
