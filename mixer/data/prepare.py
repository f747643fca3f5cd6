"""Raw text -> tokens -> packed shards. Where everything about `mixer prepare` comes together.

    input files --cut--> units --stage 1--> staging --stage 2--> shards, documents files --> manifest
                                 (tokenize)          (assemble)

Up to three corpora come out under `output`: `train`, `validation` (a share of the same domains'
documents, chosen by their text) and `targets`. All have one tokenizer and one row length.

Nothing depends on how many tasks run, or in which order: units follow from the inputs, a unit's
staging from the unit, and once all units are counted, every row's place is arithmetic. So the bytes
of a corpus are the same for any parallelism.

Everything is named by a hash of what it depends on. A run that was killed is continued by running it
again: what is found whole is kept. A changed input or option changes the names of what depends on it,
and of nothing else; domains that are already in the corpus as they should be are not read again.
What is where in the output folder: `mixer.data.output`.
"""

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from mixer.core.catalog import Domain
from mixer.core.errors import ConfigError, DataError
from mixer.data import demo, sampling
from mixer.data import tokens as tokenizers
from mixer.data.assembly import DocumentsJob, ShardJob, write_documents, write_shard
from mixer.data.draft import Draft, Source
from mixer.data.manifest import (
    TOKENIZER,
    FileInfo,
    Manifest,
    TokenizerInfo,
    documents_path,
    shard_path,
    tokenizer_identity,
)
from mixer.data.output import CORPORA, STAGING, Entries, Output
from mixer.data.shards import Layout, ShardInfo, dtype_for
from mixer.data.sources import (
    MetadataOptions,
    SourceFile,
    SourceOptions,
    check_parquet,
    cut_units,
    find_files,
    found_in,
    refuse_doubles,
)
from mixer.data.staging import TRAIN, VALIDATION, Context, Part, Staged, Unit, key_of, stage_unit
from mixer.data.storage import Storage
from mixer.data.tasks import Runner
from mixer.data.tokens import Tokenizer, TokenizerOptions

VERSION = 1  # part of every key: raise it when the same inputs give other bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class PrepareOptions:
    """What `mixer prepare` makes of what."""

    output: str  # folder or URI
    domains: dict[str, SourceOptions] = field(default_factory=dict)
    targets: dict[str, SourceOptions] = field(default_factory=dict)
    folder: str | None = None  # train/<domain>/<files> and targets/<target>.<...> in it, beside what is named above
    row_tokens: int = 2048
    tokenizer: TokenizerOptions = field(default_factory=TokenizerOptions)
    metadata: dict[str, MetadataOptions] = field(default_factory=dict)
    validation_share: float = 0.0  # of the domains' documents, kept out of training
    seed: int = 0  # of the choice of validation documents
    demo: str | None = None  # a folder: make the demo's texts there before anything else
    storage: Storage = field(default_factory=Storage)
    unit_mb: float = 8.0  # raw text a task reads; raise it for very large corpora
    shard_mb: float = 64.0
    keep_staging: bool = False

    def __post_init__(self) -> None:
        if not self.output:
            raise ConfigError("prepare.output is empty; needed a folder or URI. Set it.")
        if not self.domains and not self.folder:
            raise ConfigError("prepare.domains is empty; needed at least one domain with its files. Add one.")
        if not 0 <= self.validation_share < 1:
            raise ConfigError(f"prepare.validation_share={self.validation_share}; needed 0 up to, not with, 1.")
        for name, value in (("unit_mb", self.unit_mb), ("shard_mb", self.shard_mb)):
            if not value > 0:
                raise ConfigError(f"prepare.{name}={value}; it must be above 0. Raise it.")
        for name in (*self.domains, *self.targets):
            Domain(name, 1, "")  # refuses names that no catalog can have
        self.layout("uint16")  # refuses row lengths and metadata keys that no shard can have

    def layout(self, dtype: str) -> Layout:
        kinds = {key: one.kind for key, one in sorted(self.metadata.items())}
        return Layout(row_tokens=self.row_tokens, dtype=dtype, metadata=kinds)


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a stage is."""

    stage: str
    done: int
    total: int
    tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """What was made, and what it took."""

    manifests: dict[str, Manifest]  # by corpus: train, targets, validation
    reused: tuple[str, ...]  # domains that an earlier run had finished
    seconds: dict[str, float]  # by stage
    tokens: int  # encoded or found encoded in this run
    peak_task_bytes: int


def prepare(
    options: PrepareOptions, runner: Runner, on_progress: Callable[[Progress], None] = lambda _: None
) -> Summary:
    """Make the corpora, or complete them. Raises before any work where the inputs cannot be right."""
    return _Preparation(options, runner, on_progress).run()


class _Preparation:
    def __init__(self, options: PrepareOptions, runner: Runner, on_progress: Callable[[Progress], None]) -> None:
        self.options = options
        self.runner = runner
        self.on_progress = on_progress
        self.output = Output(options.storage, options.output)
        self.seconds: dict[str, float] = {}
        self.num_tokens = 0
        self.tokenizer_key: str | None = None  # of a trained one

    def run(self) -> Summary:
        with self.output.lock():
            with self._stage("inputs"):
                if self.options.demo is not None:
                    demo.make(self.options.demo)
                sources = find_sources(self.options)
                self.output.look()
                self.runner.expect(sum(file.size for source in sources for file in source.files))
            with self._stage("tokenizer"):
                tokenizer = self._tokenizer([source for source in sources if source.corpus == "train"])
                info = _info(tokenizer)
                self.output.refuse_mixing(info, self.options.row_tokens)
                sources = [self._with_tokenizer(source, info) for source in sources]
            layout = self.options.layout(dtype_for(tokenizer.vocab_size))
            entries: Entries = {}
            kept: list[Source] = []
            for source in sources:
                if of_source := self.output.finished(source):
                    entries |= of_source
                    kept.append(source)
            missing = [source for source in sources if source not in kept]
            with self._stage("tokenize"):
                staged = self._stage_units(missing, tokenizer)
            with self._stage("assemble"):
                drafts = self._drafts(missing, staged)
                if drafts:
                    self.output.set_aside({draft.corpus for draft in drafts}, kept)
                entries |= self._assemble(drafts, tokenizer, layout)
            with self._stage("finish"):
                manifests = _manifests(entries, layout, info)
                self.output.finish(
                    manifests,
                    sources,
                    tokenizer_json=tokenizer.definition,
                    tokenizer_key=self.tokenizer_key,
                    keep_staging=self.options.keep_staging,
                )
        return Summary(
            manifests=manifests,
            reused=tuple(source.label for source in kept),
            seconds=self.seconds,
            tokens=self.num_tokens,
            peak_task_bytes=self.runner.peak_task_bytes,
        )

    # --- tokenizer -------------------------------------------------------------------------

    def _tokenizer(self, training: Sequence[Source]) -> Tokenizer:
        chosen = self.options.tokenizer
        if chosen.kind == "byte":
            return tokenizers.from_text(None)
        if chosen.kind == "file":
            assert chosen.path is not None
            return tokenizers.from_text(self._read_tokenizer(chosen.path), chosen.eos, chosen.path)
        units = [[unit.key for unit in source.units] for source in training]
        self.tokenizer_key = key_of([VERSION, chosen.vocab_size, chosen.sample_mb, units])
        name = f"{STAGING}/tokenizer-{self.tokenizer_key}.json"
        text = self._earlier_tokenizer() or self.output.read_text(name)
        if text is None:
            text = self._train(training)
            self.output.write_text(name, text)
        return tokenizers.from_text(text, tokenizers.TRAINED_EOS, name)

    def _earlier_tokenizer(self) -> str | None:
        """The tokenizer that a finished run trained on the same sample."""
        manifest = self.output.previous["train"]
        if manifest is None or self.output.receipt.get("tokenizer") != self.tokenizer_key:
            return None
        text = self.output.read_text(f"train/{TOKENIZER}")
        try:
            same = text and tokenizer_identity(text, manifest.tokenizer.eos) == manifest.tokenizer.identity
        except ValueError:
            same = False
        return text if same else None

    def _read_tokenizer(self, location: str) -> str:
        filesystem, path = self.options.storage.locate(location)
        try:
            with filesystem.open_input_stream(path, compression=None) as stream:
                return stream.read().decode()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"tokenizer.path={location} cannot be read: {error}. Correct the path.") from error

    def _train(self, training: Sequence[Source]) -> str:
        chosen = self.options.tokenizer
        per_domain = int(chosen.sample_mb * 1e6 / len(training))
        context = self._context(None)
        jobs = [job for one in training for job in sampling.sample_jobs(one.units, per_domain, context)]
        for done, _ in enumerate(self.runner.run(sampling.take_sample, jobs), 1):
            self.on_progress(Progress("take sample", done, len(jobs), 0))
        job = sampling.TrainJob(
            storage=self.options.storage,
            staging=self.output.staging,
            keys=tuple(job.key for job in jobs),
            vocab_size=chosen.vocab_size,
        )
        self.on_progress(Progress("train bpe", 0, 1, 0))
        (text,) = (text for _, text in self.runner.run(sampling.train, [job]))
        self.on_progress(Progress("train bpe", 1, 1, 0))
        return text

    def _with_tokenizer(self, source: Source, info: TokenizerInfo) -> Source:
        units = tuple(replace(unit, key=key_of([unit.key, asdict(info)])) for unit in source.units)
        key = key_of([[unit.key for unit in units], self.options.row_tokens, self.options.shard_mb])
        return replace(source, units=units, key=key)

    # --- the two halves --------------------------------------------------------------------

    def _stage_units(self, sources: Sequence[Source], tokenizer: Tokenizer) -> dict[str, Staged]:
        units = [unit for source in sources for unit in source.units]
        staged: dict[str, Staged] = {}
        for _, one in self.runner.run(Stager(self._context(tokenizer)), units):
            staged[one.key] = one
            self.num_tokens += one.num_tokens
            self.on_progress(Progress("tokenize", len(staged), len(units), self.num_tokens))
        return staged

    def _drafts(self, sources: Sequence[Source], staged: Mapping[str, Staged]) -> list[Draft]:
        drafts: list[Draft] = []
        for source in sources:
            of_source = [Draft(source, side, staged, self.options.row_tokens) for side in (TRAIN, VALIDATION)]
            if not of_source[TRAIN].num_documents:
                raise DataError(_no_documents(source, of_source[TRAIN].skipped, self.options))
            drafts += [draft for draft in of_source if draft.num_documents]
        return drafts

    def _assemble(self, drafts: Sequence[Draft], tokenizer: Tokenizer, layout: Layout) -> Entries:
        of_draft = [self._shard_jobs(draft, tokenizer.eos, layout) for draft in drafts]
        shard_jobs = [job for jobs in of_draft for job in jobs]
        documents_jobs = [self._documents_job(draft, layout) for draft in drafts]
        total, tokens = len(shard_jobs) + len(documents_jobs), 0
        shards: dict[str, ShardInfo] = {}
        files: dict[int, FileInfo] = {}
        for number, info in self.runner.run(write_shard, shard_jobs):
            job = shard_jobs[number]
            shards[job.root + job.path] = info
            tokens += sum(span.num_tokens for span in job.spans)
            self.on_progress(Progress("write shards", len(shards), total, tokens))
        for number, info in self.runner.run(write_documents, documents_jobs):
            files[number] = info
            self.on_progress(Progress("write shards", len(shards) + len(files), total, tokens))
        return {
            (draft.corpus, draft.source.name): draft.entry(
                tuple(shards[job.root + job.path] for job in jobs), files[number]
            )
            for number, (draft, jobs) in enumerate(zip(drafts, of_draft, strict=True))
        }

    def _shard_jobs(self, draft: Draft, eos: int, layout: Layout) -> list[ShardJob]:
        shard_rows = max(1, int(self.options.shard_mb * 1e6) // layout.row_bytes)
        metadata = self.options.metadata.items()
        common: dict[str, Any] = {
            "storage": self.options.storage,
            "root": self.output.corpus(draft.corpus),
            "staging": self.output.staging,
            "layout": layout,
            "eos": eos,
            "group_keys": tuple(key for key, one in metadata if one.group),
            "reductions": tuple((key, one.reduce) for key, one in metadata if not one.group),
        }
        return [
            ShardJob(**common, path=shard_path(draft.source.name, number), spans=spans)
            for number, spans in enumerate(draft.spans(shard_rows))
        ]

    def _documents_job(self, draft: Draft, layout: Layout) -> DocumentsJob:
        return DocumentsJob(
            storage=self.options.storage,
            root=self.output.corpus(draft.corpus),
            staging=self.output.staging,
            path=documents_path(draft.source.name),
            dtype=layout.dtype,
            pieces=tuple(draft.all_pieces()),
            parts=draft.parts,
        )

    def _context(self, tokenizer: Tokenizer | None) -> Context:
        return Context(
            storage=self.options.storage,
            staging=self.output.staging,
            tokenizer=tokenizer.definition if tokenizer else None,
            eos=tokenizer.eos_name if tokenizer else None,
            metadata=self.options.metadata,
            seed=self.options.seed,
        )

    @contextlib.contextmanager
    def _stage(self, name: str) -> Iterator[None]:
        before = time.monotonic()
        yield
        self.seconds[name] = time.monotonic() - before


class Stager:
    """`stage_unit` with its context, as a function of the unit alone."""

    def __init__(self, context: Context) -> None:
        self._context = context

    def __call__(self, unit: Unit) -> Staged:
        return stage_unit(unit, self._context)


def find_sources(options: PrepareOptions) -> list[Source]:
    """All domains and targets with their files, cut into units; refused where they cannot be right."""
    found = found_in(options.folder, options.storage) if options.folder else {"train": {}, "targets": {}}
    sections = {
        "train": ("domains", found["train"] | options.domains),
        "targets": ("targets", found["targets"] | options.targets),
    }
    files: dict[tuple[str, str], list[SourceFile]] = {}
    for corpus, (section, of_corpus) in sections.items():
        for name, of_domain in sorted(of_corpus.items()):
            files[corpus, name] = find_files(of_domain, options.storage, f"{section}.{name}")
    refuse_doubles({f"{sections[corpus][0]}.{name}": found for (corpus, name), found in files.items()})
    return [
        _source(options, corpus, name, sections[corpus][1][name], found, f"{sections[corpus][0]}.{name}")
        for (corpus, name), found in files.items()
    ]


def _source(
    options: PrepareOptions,
    corpus: str,
    name: str,
    of_domain: SourceOptions,
    files: Sequence[SourceFile],
    where: str,
) -> Source:
    parquet = [number for number, file in enumerate(files) if file.format == "parquet"]
    checked = check_parquet(options.storage, [files[number] for number in parquet], of_domain, options.metadata, where)
    footers = dict(zip(parquet, checked, strict=True))
    share = options.validation_share if corpus == "train" else 0.0
    common = [
        VERSION,
        {key: value for key, value in asdict(of_domain).items() if key != "files"},
        {key: asdict(one) for key, one in options.metadata.items()},
        [share, options.seed] if share else None,
    ]
    units: list[Unit] = []
    for slices in cut_units(files, of_domain, int(options.unit_mb * 1e6), footers):
        parts = tuple(Part(files[one.file], one) for one in slices)
        key = key_of([common, [asdict(part) for part in parts]])
        units.append(Unit(key=key, where=where, options=of_domain, parts=parts, validation_share=share))
    return Source(corpus=corpus, name=name, options=of_domain, files=tuple(files), units=tuple(units))


def _info(tokenizer: Tokenizer) -> TokenizerInfo:
    return TokenizerInfo(
        kind=tokenizer.kind, identity=tokenizer.identity, vocab_size=tokenizer.vocab_size, eos=tokenizer.eos
    )


def _manifests(entries: Entries, layout: Layout, tokenizer: TokenizerInfo) -> dict[str, Manifest]:
    manifests: dict[str, Manifest] = {}
    for corpus in CORPORA:
        domains = {name: entry for (of, name), entry in entries.items() if of == corpus}
        if domains:
            manifests[corpus] = Manifest(layout=layout, tokenizer=tokenizer, domains=domains)
    return manifests


def _no_documents(source: Source, skipped: Counter[str], options: PrepareOptions) -> str:
    why = ", ".join(f"{count} {reason}" for reason, count in sorted(skipped.items())) or "they hold no record"
    held = " (all of its documents fell on the validation side)" if options.validation_share else ""
    return (
        f"empty domain: {source.name!r} of {source.corpus} has {len(source.files)} files and no usable "
        f"document{held}; skipped: {why}. Correct its files or the name of the text field "
        f"({source.options.text!r}), or leave it out."
    )
