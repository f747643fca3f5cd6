"""The one assembly point: from a config to catalog, schedule, reader, controller, workers.

Nothing is decided here; every part is made by its own module and handed to the next.
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import ray
import ray.train
import torch
from numpy.typing import NDArray
from torch import nn

from mixer import config as configs
from mixer.control.client import ControllerClient
from mixer.control.controller import ControllerOptions
from mixer.control.openrun import Charge
from mixer.control.rundir import load_schedule
from mixer.control.tracker import TrackerOptions
from mixer.core.catalog import Catalog
from mixer.core.errors import ConfigError, MixerError, ResumeError
from mixer.core.mixture import Mixture
from mixer.core.plan import Cursor, Geometry
from mixer.core.policies import policy_class
from mixer.core.ports import Policy, SignalSink
from mixer.core.rails import GuardRails, Progress
from mixer.core.schedule import MixtureSchedule
from mixer.data.catalogs import open_catalog
from mixer.data.corpus import CatalogRows, Corpus
from mixer.data.prepare import PrepareOptions
from mixer.data.reader import WindowReader
from mixer.data.storage import Storage
from mixer.data.stream import StreamingOptions, WindowStream
from mixer.proxies.options import SwarmOptions
from mixer.training import loop
from mixer.training.checkpoint import CheckpointOptions, find, load_model
from mixer.training.evaluation import EvaluationOptions, Evaluator, corpora_beside
from mixer.training.influence import InfluenceOptions, Probe, ProbeFacts
from mixer.training.loop import Parts, TrainOptions
from mixer.training.model import Decoder, DecoderOptions
from mixer.training.optimizer import OptimizerOptions
from mixer.training.pretrained import CausalModel, CausalOptions
from mixer.training.step import StepOptions


@dataclass(frozen=True, slots=True, kw_only=True)
class CorpusOptions:
    """Which corpus, and which catalog over it."""

    path: str = ""  # folder or URI; empty: the train corpus that this config prepares
    catalog: str | None = None  # a catalog file over it; None: one domain a source
    storage: Storage = field(default_factory=Storage)


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamOptions:
    """A mixture that moves from `start` to `end` in equal steps, for looking at a corpus as a run would."""

    windows: int = 32
    start: dict[str, float] = field(default_factory=dict[str, float])  # by name, any scale; empty: by rows
    end: dict[str, float] = field(default_factory=dict[str, float])  # by name, any scale; empty: all alike

    def __post_init__(self) -> None:
        if self.windows < 1:
            raise ConfigError(f"windows={self.windows}; it must be at least 1.")


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOptions:
    """Where a run is kept, and on which Ray it runs."""

    path: str = "runs/run"  # its folder; on a cluster, one that every node can reach
    address: str | None = None  # of a running Ray; null: RAY_ADDRESS, or else a Ray of its own on this machine
    num_cpus: int | None = None  # of the Ray started here; null: all
    object_store_mb: int | None = None  # of the Ray started here; null: as Ray finds right

    @property
    def folder(self) -> Path:
        if "://" in self.path:
            raise ConfigError(f"run.path={self.path} is not a folder of a file system. Name one that all nodes mount.")
        return Path(os.path.abspath(self.path))


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig:
    """Every option of a run. Each section's options stand beside the code they configure."""

    run: RunOptions = field(default_factory=RunOptions)
    prepare: PrepareOptions | None = None
    corpus: CorpusOptions = field(default_factory=CorpusOptions)
    geometry: Geometry = field(default_factory=Geometry)
    train: TrainOptions = field(default_factory=TrainOptions)
    model: DecoderOptions = field(default_factory=DecoderOptions)
    pretrained: CausalOptions | None = None  # a model of transformers instead of `model`
    optimizer: OptimizerOptions = field(default_factory=OptimizerOptions)
    step: StepOptions = field(default_factory=StepOptions)
    policy: dict[str, Any] = field(default_factory=lambda: {"kind": "natural"})
    prior: Literal["natural", "uniform"] | dict[str, float] = "natural"  # or weights by name, of any scale
    rails: GuardRails = field(default_factory=GuardRails)
    controller: ControllerOptions = field(default_factory=ControllerOptions)
    streaming: StreamingOptions = field(default_factory=StreamingOptions)
    checkpoint: CheckpointOptions = field(default_factory=CheckpointOptions)
    evaluation: EvaluationOptions = field(default_factory=EvaluationOptions)
    influence: InfluenceOptions = field(default_factory=InfluenceOptions)
    tracker: TrackerOptions = field(default_factory=TrackerOptions)
    stream: StreamOptions = field(default_factory=StreamOptions)
    swarm: SwarmOptions | None = None  # of small runs beside this one, see `mixer swarm`


# Sections and options that change nothing of what is trained, so a run may go on under other values of them.
# Of `corpus` its rows matter, and they are compared by fingerprint; `geometry` is compared with the schedule.
MAY_DIFFER = (
    *("run", "prepare", "corpus", "geometry", "streaming", "checkpoint", "tracker", "stream", "swarm"),
    *("evaluation", "influence"),  # but where the policy learns from them
    *(f"train.{key}" for key in ("num_workers", "cpus_per_worker", "gpu", "resources_per_worker", "strategy")),
    *(f"train.{key}" for key in ("compile", "threads", "max_failures", "timeout_s", "peak_flops", "trace")),
    *("step.micro_rows", "step.bad_loss", "controller.max_held", "controller.max_waiting"),
)


def require_same(config: RunConfig, folder: Path) -> None:
    """Refuse to go on with the run in `folder` under options that would make it another run."""
    for key, old, new in differences(configs.load(RunConfig, [folder / "run.yaml"]), config):
        raise ResumeError(
            f"resume refused: {folder / 'run.yaml'} has {key}={old}, this config has {new}. The run would not be "
            f"the same any more. Use {old}, start another run with run.path=..., or fork this one."
        )


def differences(before: RunConfig, now: RunConfig) -> Iterator[tuple[str, Any, Any]]:
    """The options, with both values, by which two configs would train differently."""
    old, new = deciding(before), deciding(now)
    for key in sorted(old.keys() | new.keys()):
        if old.get(key) != new.get(key):
            yield key, old.get(key), new.get(key)


def deciding(config: RunConfig) -> dict[str, Any]:
    """The options, by dotted key, that say what is trained."""
    needs = make_policy(config).NEEDS  # named like the sections that say how it is measured
    learnt = needs | ({"influence"} if "gram" in needs else frozenset())
    free = [key for key in MAY_DIFFER if key not in learnt]
    flat = _flat(configs.to_plain(config))
    return {key: value for key, value in flat.items() if not any(_within(key, section) for section in free)}


def _within(key: str, section: str) -> bool:
    return key == section or key.startswith(f"{section}.")


def _flat(value: dict[str, Any], path: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, item in value.items():
        if isinstance(item, dict) and item:
            flat |= _flat(item, f"{path}{key}.")
        else:
            flat[f"{path}{key}"] = item
    return flat


# ---- the parts of a config -------------------------------------------------------------------------------


def make_policy(config: RunConfig) -> Policy:
    options = dict(config.policy)
    kind = options.pop("kind", None)
    if not isinstance(kind, str):
        raise ConfigError(f"policy.kind={kind!r}; needed the name of a policy. Set policy.kind, as in policy.kind=odm.")
    return configs.build(policy_class(kind), options, "policy")


def make_prior(config: RunConfig, catalog: Catalog) -> Mixture:
    if isinstance(config.prior, dict):
        return Mixture.from_dict(catalog, config.prior, normalize=True)
    return Mixture.natural(catalog) if config.prior == "natural" else Mixture.uniform(catalog)


def make_model(config: RunConfig, vocab_size: int) -> nn.Module:
    if config.pretrained is not None:
        return CausalModel(config.pretrained, vocab_size, seed=config.train.seed)
    return Decoder(config.model, vocab_size, seed=config.train.seed)


def make_reference(config: RunConfig, corpus: Corpus) -> Callable[[], nn.Module] | None:
    """Makes the model over whose losses the excess is measured, with its weights; None where nobody needs it."""
    asked, path = config.step.measure_excess, config.step.reference
    if not (asked if asked is not None else "excess" in make_policy(config).NEEDS):
        return None
    if path is None:
        raise ConfigError(
            "the excess over a reference is asked for, by the policy or step.measure_excess, and step.reference is "
            "empty. Set it to the folder of a run over the same tokens, or of one of its checkpoints."
        )
    folder, checkpoint = Path(path), find(Path(path) / "checkpoints")
    if checkpoint is None:
        folder, checkpoint = Path(path).parents[1] if len(Path(path).parts) > 2 else Path(), Path(path)
    if not (folder / "run.yaml").is_file() or not checkpoint.is_dir():
        raise ConfigError(
            f"step.reference={path} is neither the folder of a run with a checkpoint nor a checkpoint in one. Name "
            "either, as runs/small or runs/small/checkpoints/000001000."
        )
    its, tokenizer = load_schedule(folder).last_catalog.tokenizer, corpus.by_source.catalog.tokenizer
    if its != tokenizer:
        raise ConfigError(
            f"step.reference={path} was trained on text tokenized by {its}, this corpus by {tokenizer}. Its losses "
            "cannot be compared token by token. Use a reference of the same tokenizer."
        )

    def make() -> nn.Module:
        model = make_model(configs.load(RunConfig, [folder / "run.yaml"]), corpus.manifest.tokenizer.vocab_size)
        load_model(checkpoint, model)
        return model

    return make


def open_rows(config: RunConfig) -> CatalogRows:
    """The catalog of a config, and where its rows lie."""
    options, made = config.corpus, config.prepare
    path = options.path or (f"{made.output.rstrip('/')}/train" if made else "")
    if not path:
        raise ConfigError("corpus.path is empty, and nothing is prepared. Set corpus.path to a corpus.")
    corpus = Corpus.open(path, storage=options.storage if options.path or not made else made.storage)
    return open_catalog(corpus, options.catalog) if options.catalog else corpus.by_source


def moving_schedule(catalog: Catalog, geometry: Geometry, rails: GuardRails, options: StreamOptions) -> MixtureSchedule:
    """A whole schedule between two mixtures, within the guard rails."""
    natural = Mixture.natural(catalog)
    start = Mixture.from_dict(catalog, options.start, normalize=True) if options.start else natural
    end = Mixture.from_dict(catalog, options.end, normalize=True) if options.end else Mixture.uniform(catalog)
    rules = rails.bind(catalog, natural)
    slots = geometry.window_slots
    rules.check(Progress.start(catalog, slots, options.windows * slots))
    schedule = MixtureSchedule(catalog, geometry)
    previous = None
    for window in range(options.windows):
        way = window / max(1, options.windows - 1)
        progress = Progress.before(schedule, slots_left=(options.windows - window) * slots)
        proposal = (1 - way) * start.weights_d + way * end.weights_d
        previous = rules.apply(proposal, previous=previous, progress=progress)
        schedule.append(schedule.propose(previous, limit_d=rules.rows_left(progress), reason="moving"))
    return schedule


@dataclass(frozen=True, slots=True)
class Streamed:
    """What one window asked for and what was handed out, in rows."""

    window: int
    asked_d: NDArray[np.float64]
    given_d: NDArray[np.int64]
    tokens: int


def stream(rows: CatalogRows, schedule: MixtureSchedule) -> Iterator[Streamed]:
    """Read a whole schedule, and count what really arrives."""
    geometry = schedule.geometry
    given_d = np.zeros(len(rows.catalog), dtype=np.int64)
    tokens = 0
    for batch in WindowReader(rows, schedule, geometry):
        given_d += np.bincount(batch.domain_index, minlength=len(given_d))
        tokens += int(batch.length.sum())
        if batch.step == geometry.window_steps - 1:
            asked_d = schedule.row(batch.window).weights_d * geometry.window_slots
            yield Streamed(batch.window, asked_d, given_d, tokens)
            given_d, tokens = np.zeros_like(given_d), 0


# ---- training --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Job:
    """What every worker of a run is sent."""

    config: RunConfig
    rows: CatalogRows
    feed: Any  # a MixtureFeed: the controller's client, or a saved schedule
    actor: Any
    planned_windows: int
    older: tuple[CatalogRows, ...] = ()  # catalogs that a saved schedule switches from


def plan_length(config: RunConfig, catalog: Catalog) -> int:
    return config.train.planned_windows(config.geometry.window_slots * catalog.row_tokens)


def older_rows(schedule: MixtureSchedule, rows: CatalogRows) -> tuple[CatalogRows, ...]:
    """Those of the catalogs that a schedule switches from, each of which must be a part of the last one."""
    found: dict[str, CatalogRows] = {}
    for window in [0, *schedule.switches]:
        catalog = schedule.row(window).catalog
        if catalog.fingerprint == rows.catalog.fingerprint or catalog.fingerprint in found:
            continue
        known = {name: rows.spans_of(place) for name, place in rows.catalog.index.items() if name in catalog.index}
        part = CatalogRows(rows.corpus, known) if known else rows
        if part.catalog.fingerprint != catalog.fingerprint:
            raise ResumeError(
                f"window {window} of the schedule is bound to a catalog that is no part of this one: "
                f"{'; '.join(catalog.differences(part.catalog)[:5])}. Use a catalog that holds all of its domains."
            )
        found[catalog.fingerprint] = part
    return tuple(found.values())


def target_names(config: RunConfig, rows: CatalogRows) -> tuple[str, ...]:
    """The targets that are measured: those prepared beside the trained corpus."""
    found = corpora_beside(rows.corpus, [one for one in config.evaluation.sets if one == "targets"])
    return found["targets"].catalog.names if found else ()


def require_measured(config: RunConfig, policy: Policy, targets: tuple[str, ...]) -> None:
    """Refuse a policy that asks for what this config does not measure."""
    kind, needs = config.policy.get("kind"), policy.NEEDS
    if "evaluation" in needs and config.evaluation.every_windows is None:
        raise ConfigError(
            f"policy {kind!r} learns from evaluations, but evaluation.every_windows is null. Set it to a number of "
            "windows."
        )
    judged = {"validation": "validation", "target": "targets"}[getattr(policy, "losses", "validation")]
    if "evaluation" in needs and judged not in config.evaluation.sets:
        raise ConfigError(
            f"policy {kind!r} learns from losses on the {judged} corpus, but evaluation.sets is "
            f"{list(config.evaluation.sets)}. Add {judged} there."
        )
    if "influence" in needs and "gram" not in needs and not targets:  # with a Gram matrix, a policy says so itself
        raise ConfigError(
            f"policy {kind!r} learns from influence on targets, and there are none beside the corpus. Prepare some "
            "(prepare.targets), and keep targets in evaluation.sets."
        )


def make_charge(config: RunConfig, rows: CatalogRows, *, follows: bool = False) -> Charge:
    """What the run's actor is started with; `follows` a schedule that is in its folder already."""
    catalog, targets = rows.catalog, target_names(config, rows)
    policy = None if follows else make_policy(config)
    if policy is not None:
        require_measured(config, policy, targets)
    return Charge(
        folder=config.run.folder,
        options=config.controller,
        policy=policy,
        catalog=catalog,
        geometry=config.geometry,
        prior=make_prior(config, catalog),
        rails=config.rails,
        planned_windows=plan_length(config, catalog),
        targets=targets,
        config=configs.to_text(config),
        tracker=replace(config.tracker, tags={"mixer.corpus": rows.corpus.fingerprint} | dict(config.tracker.tags)),
    )


def work(job: Job) -> None:
    """On every worker."""
    client = ControllerClient(job.actor)
    if client.failure():  # another attempt would meet the same
        return
    try:
        loop.train(make_parts(job, client))
    except MixerError as error:
        client.fail(error)
        raise


def make_parts(job: Job, sink: SignalSink) -> Parts:
    config, rows = job.config, job.rows
    folder, needs = config.run.folder, make_policy(config).NEEDS

    def batches(*, rank: int, world_size: int, cursor: Cursor) -> Iterator[Any]:
        return iter(
            WindowStream(
                [rows, *job.older],
                job.feed,
                config.geometry,
                rank=rank,
                world_size=world_size,
                cursor=cursor,
                windows=job.planned_windows,
                options=config.streaming,
            )
        )

    return Parts(
        options=config.train,
        step=config.step,
        optimizer=config.optimizer,
        checkpoint=config.checkpoint,
        evaluation=config.evaluation,
        geometry=config.geometry,
        planned_windows=job.planned_windows,
        catalog_of=lambda window: job.feed.row(window).catalog,
        make_model=lambda: make_model(config, rows.corpus.manifest.tokenizer.vocab_size),
        batches=batches,
        sink=sink,
        checkpoints=folder / "checkpoints",
        evaluator=Evaluator.beside(
            rows.corpus, config.evaluation, cross_document_targets=config.step.cross_document_targets
        ),
        probe=make_probe(config, rows, needs),
        needs=needs,
        make_reference=make_reference(config, rows.corpus),
        trace=folder / "trace" if config.train.trace else None,
    )


def make_probe(config: RunConfig, rows: CatalogRows, needs: frozenset[str]) -> Probe | None:
    """What measures influence, if somebody asks for it."""
    if not (needs & {"influence", "gram"} or config.influence.always):
        return None
    for key, value, other in (("metric", "ekfac", "adam"), ("harvest", True, "false")):
        if getattr(config.influence, key) == value:
            raise ConfigError(f"influence.{key}={value}: whole runs do not keep what that needs yet. Use {other}.")
    with torch.device("meta"):  # only counted
        model = make_model(config, rows.corpus.manifest.tokenizer.vocab_size)
    facts = ProbeFacts(
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        world_size=config.train.workers[1],
        sharded=config.train.strategy == "fsdp",
        needs_gram="gram" in needs,
        cross_document_targets=config.step.cross_document_targets,
        evaluation=config.evaluation,
    )
    return Probe.beside(rows, config.influence, config.geometry, facts)


def make_trainer(job: Job, work: Callable[[Job], None]) -> Any:
    """Ray Train over the workers of the options."""
    from ray.train.torch import TorchConfig, TorchTrainer  # noqa: PLC0415  # loads torch's parts of Ray

    options, folder = job.config.train, job.config.run.folder
    gpu = options.gpu if options.gpu is not None else ray.cluster_resources().get("GPU", 0) > 0
    least, most = options.workers
    return TorchTrainer(
        lambda: work(job),
        torch_config=TorchConfig(backend="cpu:gloo,cuda:nccl" if gpu else "gloo", timeout_s=int(options.timeout_s)),
        scaling_config=ray.train.ScalingConfig(
            num_workers=least if least == most else (least, most),
            use_gpu=gpu,
            resources_per_worker={"CPU": options.cpus_per_worker, "GPU": float(gpu)} | options.resources_per_worker,
        ),
        run_config=ray.train.RunConfig(
            name=f"attempt-{os.getpid()}",
            storage_path=str(folder / "ray"),
            failure_config=ray.train.FailureConfig(max_failures=options.max_failures),
        ),
    )
