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
and of nothing else; domains that are already in the corpus as they should be are not read again. The
old manifest goes before the first shard is touched, the new one comes last.

    <output>/train/  validation/  targets/    corpora (see mixer.data.corpus)
    <output>/prepare.json                     which key each finished domain has
    <output>/.staging/                        work in progress; removed at the end
"""

import contextlib
import fcntl
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow.fs as pafs

from mixer.core.errors import ConfigError, DataError, ResumeError
from mixer.data import demo, sampling
from mixer.data import tokens as tokenizers
from mixer.data.assembly import DocumentsJob, ShardJob, Span, UnitPiece, write_documents, write_shard
from mixer.data.corpus import read_manifest
from mixer.data.manifest import (
    MANIFEST,
    TOKENIZER,
    DomainInfo,
    FileInfo,
    Manifest,
    TokenizerInfo,
    documents_path,
    shard_path,
    slug,
    tokenizer_identity,
    write_manifest,
)
from mixer.data.packing import cut_shards, num_rows_of, pieces_between
from mixer.data.shards import Layout, ShardInfo, dtype_for
from mixer.data.sources import (
    MetadataOptions,
    SourceFile,
    SourceOptions,
    check_parquet,
    cut_units,
    find_files,
    refuse_doubles,
)
from mixer.data.staging import TRAIN, VALIDATION, Context, Group, Part, Staged, Unit, key_of, stage_unit
from mixer.data.storage import Storage, local_path, put
from mixer.data.tasks import Runner
from mixer.data.tokens import Tokenizer, TokenizerOptions

VERSION = 1  # part of every key: raise it when the same inputs give other bytes
RECEIPT = "prepare.json"
STAGING = ".staging"
CORPORA = ("train", "targets", "validation")
MAX_GROUPS = 100_000  # each pads one row; more means that the key was not meant to group


@dataclass(frozen=True, slots=True, kw_only=True)
class PrepareOptions:
    """What `mixer prepare` makes of what."""

    output: str  # folder or URI
    domains: dict[str, SourceOptions] = field(default_factory=dict)
    targets: dict[str, SourceOptions] = field(default_factory=dict)
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
        if not self.domains:
            raise ConfigError("prepare.domains is empty; needed at least one domain with its files. Add one.")
        if not 0 <= self.validation_share < 1:
            raise ConfigError(
                f"prepare.validation_share={self.validation_share}; needed 0 up to, not with, 1."
            )
        for name, value in (("unit_mb", self.unit_mb), ("shard_mb", self.shard_mb)):
            if not value > 0:
                raise ConfigError(f"prepare.{name}={value}; it must be above 0. Raise it.")
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """One domain of the config with its files, cut into units."""

    corpus: str  # train or targets
    name: str
    options: SourceOptions
    files: tuple[SourceFile, ...]
    units: tuple[Unit, ...]  # keyed without the tokenizer; see `_with_tokenizer`
    key: str = ""

    @property
    def label(self) -> str:
        return f"{self.corpus}/{self.name}"


def prepare(
    options: PrepareOptions, runner: Runner, on_progress: Callable[[Progress], None] = lambda _: None
) -> Summary:
    """Make the corpora, or complete them. Raises before any work where the inputs cannot be right."""
    return _Preparation(options, runner, on_progress).run()


class _Preparation:
    def __init__(
        self, options: PrepareOptions, runner: Runner, on_progress: Callable[[Progress], None]
    ) -> None:
        self.options = options
        self.runner = runner
        self.on_progress = on_progress
        self.filesystem, self.root = options.storage.locate(options.output)
        self.staging = f"{options.output.rstrip('/')}/{STAGING}"
        self.seconds: dict[str, float] = {}
        self.num_tokens = 0

    def run(self) -> Summary:
        with self._lock():
            with self._stage("inputs"):
                if self.options.demo is not None:
                    demo.make(self.options.demo)
                sources = self._sources()
                receipt = self._receipt()
                previous = {corpus: self._previous(corpus) for corpus in CORPORA}
            num_files_bytes = sum(file.size for source in sources for file in source.files)
            self.runner.expect(num_files_bytes)
            with self._stage("tokenizer"):
                tokenizer = self._tokenizer(sources, receipt, previous)
                self._refuse_mixing(tokenizer, previous)
                sources = [self._with_tokenizer(source, tokenizer) for source in sources]
            layout = self.options.layout(dtype_for(tokenizer.vocab_size))
            finished = [one for one in sources if self._is_finished(one, receipt, previous)]
            missing = [source for source in sources if source not in finished]
            kept = {**receipt, "domains": {one.label: receipt["domains"][one.label] for one in finished}}
            with self._stage("tokenize"):
                staged = self._stage_units(missing, tokenizer)
            with self._stage("assemble"):
                entries = self._assemble(missing, staged, tokenizer, layout, previous, kept)
            with self._stage("finish"):
                for source in finished:
                    entries |= _kept_entries(source, receipt, previous)
                manifests = self._finish(sources, entries, tokenizer, layout)
        return Summary(
            manifests=manifests,
            reused=tuple(source.label for source in finished),
            seconds=self.seconds,
            tokens=self.num_tokens,
            peak_task_bytes=self.runner.peak_task_bytes,
        )

    # --- inputs ----------------------------------------------------------------------------

    def _sources(self) -> list[Source]:
        named = [
            (corpus, section, name, of_domain)
            for corpus, section, domains in (
                ("train", "domains", self.options.domains),
                ("targets", "targets", self.options.targets),
            )
            for name, of_domain in sorted(domains.items())
        ]
        files = {
            f"{section}.{name}": find_files(of_domain, self.options.storage, f"{section}.{name}")
            for _, section, name, of_domain in named
        }
        refuse_doubles(files)
        return [
            self._source(corpus, f"{section}.{name}", name, of_domain, files[f"{section}.{name}"])
            for corpus, section, name, of_domain in named
        ]

    def _source(
        self, corpus: str, where: str, name: str, of_domain: SourceOptions, files: list[SourceFile]
    ) -> Source:
        parquet = [number for number, file in enumerate(files) if file.format == "parquet"]
        checked = check_parquet(
            self.options.storage,
            [files[number] for number in parquet],
            of_domain,
            self.options.metadata,
            where,
        )
        footers = dict(zip(parquet, checked, strict=True))
        share = self.options.validation_share if corpus == "train" else 0.0
        cut = cut_units(files, of_domain, int(self.options.unit_mb * 1e6), footers)
        units: list[Unit] = []
        for slices in cut:
            parts = tuple(Part(files[one.file], one) for one in slices)
            content = [
                VERSION,
                [[asdict(part.file), part.slice.start, part.slice.stop] for part in parts],
                {key: value for key, value in asdict(of_domain).items() if key != "files"},
                {key: asdict(one) for key, one in self.options.metadata.items()},
                share,
                self.options.seed if share else 0,
            ]
            key = key_of(content)
            units.append(Unit(key=key, where=where, options=of_domain, parts=parts, validation_share=share))
        return Source(corpus=corpus, name=name, options=of_domain, files=tuple(files), units=tuple(units))

    def _with_tokenizer(self, source: Source, tokenizer: Tokenizer) -> Source:
        defines = [tokenizer.kind, tokenizer.identity, tokenizer.eos]
        units = tuple(replace(unit, key=key_of([unit.key, *defines])) for unit in source.units)
        key = key_of([[unit.key for unit in units], self.options.row_tokens, self.options.shard_mb])
        return replace(source, units=units, key=key)

    # --- tokenizer -------------------------------------------------------------------------

    def _tokenizer(
        self, sources: list[Source], receipt: Mapping[str, Any], previous: Mapping[str, Manifest | None]
    ) -> Tokenizer:
        chosen = self.options.tokenizer
        if chosen.kind == "byte":
            return tokenizers.from_text(None)
        if chosen.kind == "file":
            assert chosen.path is not None
            return tokenizers.from_text(self._read_text(chosen.path), chosen.eos, chosen.path)
        training = [source for source in sources if source.corpus == "train"]
        self.tokenizer_key = key_of(
            [
                VERSION,
                chosen.vocab_size,
                chosen.sample_mb,
                [[unit.key for unit in one.units] for one in training],
            ]
        )
        name = f"tokenizer-{self.tokenizer_key}.json"
        filesystem, staging = self.options.storage.locate(self.staging)
        text: str | None = None
        if receipt.get("tokenizer") == self.tokenizer_key and previous["train"] is not None:
            text = self._read_if_there(self.filesystem, f"{self.root}/train/{TOKENIZER}")
            if text is not None and not _is_tokenizer(text, previous["train"].tokenizer):
                text = None
        if text is None:
            text = self._read_if_there(filesystem, f"{staging}/{name}")
        if text is None:
            text = self._train(training)
            put(filesystem, staging, name, text.encode())
        return tokenizers.from_text(text, tokenizers.TRAINED_EOS, name)

    def _train(self, training: list[Source]) -> str:
        jobs: list[sampling.SampleJob] = []
        context = self._context(None, None)
        for source in training:
            jobs += sampling.sample_jobs(
                source.units, int(self.options.tokenizer.sample_mb * 1e6 / len(training)), context
            )
        for done, _ in enumerate(self.runner.run(sampling.take_sample, jobs)):
            self.on_progress(Progress("sample for the tokenizer", done + 1, len(jobs), 0))
        self.on_progress(Progress("train the tokenizer", 0, 1, 0))
        job = sampling.TrainJob(
            storage=self.options.storage,
            staging=self.staging,
            keys=tuple(job.key for job in jobs),
            vocab_size=self.options.tokenizer.vocab_size,
        )
        (text,) = (text for _, text in self.runner.run(sampling.train, [job]))
        return text

    def _refuse_mixing(self, tokenizer: Tokenizer, previous: Mapping[str, Manifest | None]) -> None:
        now = tokenizer_info(tokenizer)
        for corpus, manifest in previous.items():
            if manifest is None:
                continue
            at = f"{self.options.output}/{corpus}"
            if manifest.tokenizer != now:
                raise ResumeError(
                    f"{at} was made with tokenizer {manifest.tokenizer} (vocabulary {manifest.tokenizer.vocab_size}, "
                    f"EOS {manifest.tokenizer.eos}); this config has {now} (vocabulary {now.vocab_size}, EOS "
                    f"{now.eos}). Rows of two tokenizers cannot be mixed: choose another output, remove {at}, or "
                    f"keep the tokenizer with tokenizer.kind=file and its {TOKENIZER}."
                )
            if manifest.layout.row_tokens != self.options.row_tokens:
                raise ResumeError(
                    f"{at} has rows of {manifest.layout.row_tokens} tokens; this config has row_tokens="
                    f"{self.options.row_tokens}. Choose another output, or remove {at}."
                )

    # --- stages ----------------------------------------------------------------------------

    def _stage_units(self, sources: list[Source], tokenizer: Tokenizer) -> dict[str, Staged]:
        units = [unit for source in sources for unit in source.units]
        context = self._context(tokenizer.definition, getattr(tokenizer, "eos_name", None))
        staged: dict[str, Staged] = {}
        self.on_progress(Progress("tokenize", 0, len(units), 0))
        for _, one in self.runner.run(Stager(context), units):
            staged[one.key] = one
            self.num_tokens += one.num_tokens
            self.on_progress(Progress("tokenize", len(staged), len(units), self.num_tokens))
        return staged

    def _assemble(
        self,
        sources: list[Source],
        staged: Mapping[str, Staged],
        tokenizer: Tokenizer,
        layout: Layout,
        previous: Mapping[str, Manifest | None],
        kept: Mapping[str, Any],
    ) -> dict[tuple[str, str], DomainInfo]:
        shard_jobs: list[ShardJob] = []
        documents_jobs: list[DocumentsJob] = []
        drafts: list[_Draft] = []
        for source in sources:
            for side in (TRAIN, VALIDATION):
                draft = _Draft(source, side, staged, layout.row_tokens)
                if not draft.num_documents and side == TRAIN:
                    raise DataError(_no_documents(source, staged, self.options))
                if not draft.num_documents:
                    continue
                new = self._shard_jobs(draft, tokenizer, layout)
                draft.shards = range(len(shard_jobs), len(shard_jobs) + len(new))
                shard_jobs += new
                documents_jobs.append(self._documents_job(draft, layout))
                drafts.append(draft)
        if shard_jobs:
            self._set_aside({draft.corpus for draft in drafts}, previous, kept)
        total, tokens = len(shard_jobs) + len(documents_jobs), 0
        shards: dict[int, ShardInfo] = {}
        files: dict[int, FileInfo] = {}
        self.on_progress(Progress("write shards", 0, total, 0))
        for number, info in self.runner.run(write_shard, shard_jobs):
            shards[number] = info
            tokens += sum(span.num_tokens for span in shard_jobs[number].spans)
            self.on_progress(Progress("write shards", len(shards), total, tokens))
        for number, info in self.runner.run(write_documents, documents_jobs):
            files[number] = info
            self.on_progress(Progress("write shards", len(shards) + len(files), total, tokens))
        return {
            (draft.corpus, draft.source.name): draft.entry(
                tuple(shards[place] for place in draft.shards), files[number]
            )
            for number, draft in enumerate(drafts)
        }

    def _shard_jobs(self, draft: "_Draft", tokenizer: Tokenizer, layout: Layout) -> list[ShardJob]:
        shard_rows = max(1, int(self.options.shard_mb * 1e6) // layout.row_bytes)
        common: dict[str, Any] = {
            "storage": self.options.storage,
            "root": f"{self.options.output.rstrip('/')}/{draft.corpus}",
            "staging": self.staging,
            "layout": layout,
            "eos": tokenizer.eos,
            "group_keys": tuple(key for key, one in self.options.metadata.items() if one.group),
            "reductions": tuple(
                (key, one.reduce) for key, one in self.options.metadata.items() if not one.group
            ),
        }
        return [
            ShardJob(**common, path=shard_path(draft.source.name, number), spans=spans)
            for number, spans in enumerate(draft.spans(shard_rows))
        ]

    def _documents_job(self, draft: "_Draft", layout: Layout) -> DocumentsJob:
        return DocumentsJob(
            storage=self.options.storage,
            root=f"{self.options.output.rstrip('/')}/{draft.corpus}",
            staging=self.staging,
            path=documents_path(draft.source.name),
            dtype=layout.dtype,
            pieces=tuple(draft.all_pieces()),
            parts=draft.parts,
        )

    # --- what is there already, and the end ------------------------------------------------

    def _is_finished(
        self, source: Source, receipt: Mapping[str, Any], previous: Mapping[str, Manifest | None]
    ) -> bool:
        """Whether a finished run left this domain as this config wants it, and its files are there."""
        entries = _kept_entries(source, receipt, previous)
        if not entries:
            return False
        files = [
            (f"{self.root}/{corpus}/{one.path}", one.bytes)
            for (corpus, _), entry in entries.items()
            for one in (*entry.shards, *([entry.documents_file] if entry.documents_file else []))
        ]
        found = self.filesystem.get_file_info([path for path, _ in files])
        return all(info.size == size for info, (_, size) in zip(found, files, strict=True))

    def _previous(self, corpus: str) -> Manifest | None:
        """The manifest of an earlier run, be it in its place or set aside by a run that was killed."""
        for root in (f"{self.root}/{corpus}", f"{self.root}/{STAGING}/{corpus}"):
            if self.filesystem.get_file_info(f"{root}/{MANIFEST}").type == pafs.FileType.File:
                try:
                    return read_manifest(self.filesystem, root)
                except DataError as error:
                    raise DataError(f"{error} To make the corpus anew, remove {root}.") from error
        return None

    def _set_aside(
        self, corpora: set[str], previous: Mapping[str, Manifest | None], kept: Mapping[str, Any]
    ) -> None:
        """A manifest must not outlive the shards it names: it goes before the first of them is replaced.

        It is kept aside for the domains that stay, and the receipt from now on names only those.
        """
        if self.filesystem.get_file_info(f"{self.root}/{RECEIPT}").type == pafs.FileType.File:
            self._write_receipt(kept)
        for corpus in sorted(corpora):
            manifest = previous[corpus]
            path = f"{self.root}/{corpus}/{MANIFEST}"
            if manifest is not None and self.filesystem.get_file_info(path).type == pafs.FileType.File:
                write_manifest(self.filesystem, f"{self.root}/{STAGING}/{corpus}", manifest)
                self.filesystem.delete_file(path)

    def _finish(
        self,
        sources: list[Source],
        entries: Mapping[tuple[str, str], DomainInfo],
        tokenizer: Tokenizer,
        layout: Layout,
    ) -> dict[str, Manifest]:
        manifests: dict[str, Manifest] = {}
        for corpus in CORPORA:
            domains = {name: entry for (of, name), entry in entries.items() if of == corpus}
            root = f"{self.root}/{corpus}"
            if not domains:
                self._remove_corpus(root)
                continue
            manifest = Manifest(layout=layout, tokenizer=tokenizer_info(tokenizer), domains=domains)
            if tokenizer.definition is not None:
                put(self.filesystem, root, TOKENIZER, tokenizer.definition.encode())
            self._remove_others(root, manifest)
            write_manifest(self.filesystem, root, manifest)
            manifests[corpus] = manifest
        corpora: dict[str, list[str]] = {source.label: [] for source in sources}
        for corpus, name in sorted(entries):
            corpora[f"{'train' if corpus == 'validation' else corpus}/{name}"].append(corpus)
        receipt: dict[str, Any] = {
            "format": 1,
            "domains": {one.label: {"key": one.key, "corpora": corpora[one.label]} for one in sources},
        }
        if self.options.tokenizer.kind == "train":
            receipt["tokenizer"] = self.tokenizer_key
        self._write_receipt(receipt)
        if not self.options.keep_staging:
            with contextlib.suppress(FileNotFoundError):
                self.filesystem.delete_dir(f"{self.root}/{STAGING}")
        return manifests

    def _remove_others(self, root: str, manifest: Manifest) -> None:
        """Shards and documents files that the manifest does not name: of removed domains, or left by a kill."""
        wanted = {f"{root}/{one.path}" for entry in manifest.domains.values() for one in entry.shards}
        wanted |= {f"{root}/{e.documents_file.path}" for e in manifest.domains.values() if e.documents_file}
        slugs = {slug(name) for name in manifest.domains}
        for folder in ("shards", "documents"):
            selector = pafs.FileSelector(f"{root}/{folder}", recursive=True, allow_not_found=True)
            for info in self.filesystem.get_file_info(selector):
                if info.type == pafs.FileType.File and info.path not in wanted:
                    self.filesystem.delete_file(info.path)
            for info in self.filesystem.get_file_info(
                pafs.FileSelector(f"{root}/{folder}", recursive=False, allow_not_found=True)
            ):
                if info.type == pafs.FileType.Directory and info.base_name not in slugs:
                    self.filesystem.delete_dir(info.path)

    def _remove_corpus(self, root: str) -> None:
        """A corpus that this config no longer makes (no targets, or no validation share)."""
        if self.filesystem.get_file_info(f"{root}/{MANIFEST}").type == pafs.FileType.File:
            self.filesystem.delete_file(f"{root}/{MANIFEST}")
            for folder in ("shards", "documents"):
                with contextlib.suppress(FileNotFoundError):
                    self.filesystem.delete_dir(f"{root}/{folder}")
            if self.filesystem.get_file_info(f"{root}/{TOKENIZER}").type == pafs.FileType.File:
                self.filesystem.delete_file(f"{root}/{TOKENIZER}")
            if local_path(self.filesystem, root) is not None:
                with contextlib.suppress(OSError):
                    os.rmdir(root)

    # --- small things ----------------------------------------------------------------------

    def _context(self, tokenizer: str | None, eos: str | None) -> Context:
        return Context(
            storage=self.options.storage,
            staging=self.staging,
            tokenizer=tokenizer,
            eos=eos,
            metadata=self.options.metadata,
            seed=self.options.seed,
        )

    def _write_receipt(self, receipt: Mapping[str, Any]) -> None:
        put(
            self.filesystem,
            self.root,
            RECEIPT,
            (json.dumps(receipt, indent=1, sort_keys=True) + "\n").encode(),
        )

    def _receipt(self) -> dict[str, Any]:
        text = self._read_if_there(self.filesystem, f"{self.root}/{RECEIPT}")
        try:
            value = json.loads(text or "{}")
        except ValueError:
            value = {}
        is_known = (
            isinstance(value, dict) and value.get("format") == 1 and isinstance(value.get("domains"), dict)
        )
        return value if is_known else {"format": 1, "domains": {}}

    def _read_text(self, location: str) -> str:
        filesystem, path = self.options.storage.locate(location)
        text = self._read_if_there(filesystem, path)
        if text is None:
            raise ConfigError(f"tokenizer.path={location} is not there. Correct the path.")
        return text

    @staticmethod
    def _read_if_there(filesystem: pafs.FileSystem, path: str) -> str | None:
        try:
            with filesystem.open_input_stream(path, compression=None) as stream:
                return stream.read().decode(errors="replace")
        except FileNotFoundError:
            return None
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error}. See that it can be read.") from error

    @contextlib.contextmanager
    def _stage(self, name: str) -> Iterator[None]:
        before = time.monotonic()
        yield
        self.seconds[name] = time.monotonic() - before

    @contextlib.contextmanager
    def _lock(self) -> Iterator[None]:
        """One preparation at a time for an output folder. The lock goes with the process that holds it."""
        local = local_path(self.filesystem, self.root)
        if local is None:
            yield
            return
        try:
            local.mkdir(parents=True, exist_ok=True)
            handle = os.open(local / ".prepare.lock", os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise ConfigError(f"cannot write in {local}: {error}. Choose another output.") from error
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise ResumeError(
                    f"another preparation is at work on {local}. Wait for it, or choose another output."
                ) from error
            yield
        finally:
            os.close(handle)


def _kept_entries(
    source: Source, receipt: Mapping[str, Any], previous: Mapping[str, Manifest | None]
) -> dict[tuple[str, str], DomainInfo]:
    """What a finished run left of a domain, by corpus; nothing unless all of it is as the config wants it."""
    one = receipt["domains"].get(source.label, {})
    if one.get("key") != source.key:
        return {}
    entries: dict[tuple[str, str], DomainInfo] = {}
    for corpus in one["corpora"]:
        manifest = previous[corpus]
        if manifest is None or source.name not in manifest.domains:
            return {}
        entries[corpus, source.name] = manifest.domains[source.name]
    return entries


class Stager:
    """`stage_unit` with its context, as a function of the unit alone."""

    def __init__(self, context: Context) -> None:
        self._context = context

    def __call__(self, unit: Unit) -> Staged:
        return stage_unit(unit, self._context)


class _Draft:
    """One domain of one corpus while it is put together: the pieces of all units, by group."""

    def __init__(self, source: Source, side: int, staged: Mapping[str, Staged], row_tokens: int) -> None:
        self.source = source
        self.corpus = source.corpus if side == TRAIN else "validation"
        self.shards = range(0)
        self.row_tokens = row_tokens
        self.skipped: Counter[str] = Counter()
        pieces: dict[Group, list[UnitPiece]] = {}
        for unit in source.units:
            one = staged[unit.key]
            for piece in one.pieces:
                if piece.side == side:
                    pieces.setdefault(piece.group, []).append((unit.key, piece))
            if side == TRAIN:
                self.skipped.update(one.skipped)
        if len(pieces) > MAX_GROUPS:
            raise DataError(
                f"domain {source.name!r} has {len(pieces)} groups; at most {MAX_GROUPS} are allowed, as each pads a "
                "row. Group by a key with fewer values."
            )
        self.pieces = dict(sorted(pieces.items()))
        self.tokens_g = np.array(
            [sum(p.num_tokens for _, p in of_group) for of_group in self.pieces.values()], np.int64
        )
        self.rows_g = num_rows_of(self.tokens_g, row_tokens)
        self.num_documents = sum(p.num_documents for _, p in self.all_pieces())
        self.parts = self._parts(staged)

    def all_pieces(self) -> Iterator[UnitPiece]:
        for of_group in self.pieces.values():
            yield from of_group

    def spans(self, shard_rows: int) -> list[tuple[Span, ...]]:
        """Per shard, which tokens of which pieces its rows are."""
        groups = list(self.pieces.items())
        ends = [np.cumsum([piece.num_tokens for _, piece in of_group]) for _, of_group in groups]
        documents = np.array([piece.num_documents for _, piece in self.all_pieces()], np.int64)
        first_document = np.concatenate([[0], np.cumsum(documents)])
        first_piece = np.concatenate([[0], np.cumsum([len(of_group) for _, of_group in groups])])
        shards: list[tuple[Span, ...]] = []
        for row_spans in cut_shards(self.rows_g, shard_rows):
            spans: list[Span] = []
            for one in row_spans:
                group, of_group = groups[one.group]
                start = one.start * self.row_tokens
                stop = min(one.stop * self.row_tokens, int(self.tokens_g[one.group]))
                first, last = pieces_between(ends[one.group], start, stop)
                before = int(ends[one.group][first - 1]) if first else 0
                spans.append(
                    Span(
                        group=group,
                        pieces=tuple(of_group[first:last]),
                        skip=start - before,
                        num_tokens=stop - start,
                        first_document=int(first_document[first_piece[one.group] + first]),
                    )
                )
            shards.append(tuple(spans))
        return shards

    def entry(self, shards: tuple[ShardInfo, ...], documents_file: FileInfo) -> DomainInfo:
        rows, tokens = int(self.rows_g.sum()), int(self.tokens_g.sum())
        return DomainInfo(
            rows=rows,
            documents=self.num_documents,
            tokens=tokens,
            padding=rows * self.row_tokens - tokens,
            skipped=dict(self.skipped),
            sources=tuple(file.shown for file in self.source.files),
            shards=shards,
            documents_file=documents_file,
        )

    def _parts(self, staged: Mapping[str, Staged]) -> dict[str, tuple[tuple[int, int], ...]]:
        """Per unit and part: the number of its file, and which record of the file it begins with."""
        passed: Counter[int] = Counter()
        parts: dict[str, tuple[tuple[int, int], ...]] = {}
        for unit in self.source.units:
            of_unit: list[tuple[int, int]] = []
            for part, num_records in zip(unit.parts, staged[unit.key].num_records, strict=True):
                file = part.slice.file
                of_unit.append((file, passed[file]))
                passed[file] += num_records
            parts[unit.key] = tuple(of_unit)
        return parts


def _is_tokenizer(text: str, info: TokenizerInfo) -> bool:
    try:
        return tokenizer_identity(text, info.eos) == info.identity
    except ValueError:
        return False


def tokenizer_info(tokenizer: Tokenizer) -> TokenizerInfo:
    return TokenizerInfo(
        kind=tokenizer.kind, identity=tokenizer.identity, vocab_size=tokenizer.vocab_size, eos=tokenizer.eos
    )


def _no_documents(source: Source, staged: Mapping[str, Staged], options: PrepareOptions) -> str:
    skipped: Counter[str] = Counter()
    for unit in source.units:
        skipped.update(staged[unit.key].skipped)
    why = ", ".join(f"{count} {reason}" for reason, count in sorted(skipped.items())) or "they hold no record"
    held = " (all of its documents fell on the validation side)" if options.validation_share else ""
    return (
        f"empty domain: {source.name!r} of {source.corpus} has {len(source.files)} files and no usable document{held}; "
        f"skipped: {why}. Correct its files or the name of the text field ({source.options.text!r}), or leave it out."
    )
