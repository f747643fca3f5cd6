"""The folder that a preparation writes into: what an earlier run left there, and how it is replaced.

    <output>/train/  validation/  targets/    corpora (see mixer.data.corpus)
    <output>/prepare.json                     the receipt: the key of each finished domain, and its corpora
    <output>/.staging/                        work in progress; removed at the end
    <output>/.prepare.lock                    held while a preparation runs

A manifest must not outlive the shards it names: it is set aside before the first of them is replaced, and
from then on the receipt names only the domains that stay as they are.
"""

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pyarrow.fs as pafs

from mixer.core.errors import ConfigError, DataError, ResumeError
from mixer.data.corpus import read_manifest
from mixer.data.draft import Source
from mixer.data.manifest import MANIFEST, TOKENIZER, DomainInfo, Manifest, TokenizerInfo, write_manifest
from mixer.data.storage import Storage, local_path, put

FORMAT = 1  # of the receipt
RECEIPT = "prepare.json"
STAGING = ".staging"
LOCK = ".prepare.lock"
CORPORA = ("train", "targets", "validation")

Entries = dict[tuple[str, str], DomainInfo]  # (corpus, domain) -> what its manifest says


class Output:
    """One output folder, and what was in it when the preparation began."""

    def __init__(self, storage: Storage, location: str) -> None:
        self.location = location.rstrip("/")
        self.filesystem, self.root = storage.locate(location)
        self.receipt: dict[str, Any] = {"domains": {}}
        self.previous: dict[str, Manifest | None] = dict.fromkeys(CORPORA)

    @property
    def staging(self) -> str:
        return f"{self.location}/{STAGING}"

    def corpus(self, name: str) -> str:
        return f"{self.location}/{name}"

    def look(self) -> None:
        """Read the receipt and the manifests of an earlier run."""
        self.receipt = self._receipt()
        self.previous = {corpus: self._previous(corpus) for corpus in CORPORA}

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """One preparation at a time for a local folder. The lock goes with the process that holds it."""
        local = local_path(self.filesystem, self.root)
        if local is None:
            yield
            return
        try:
            local.mkdir(parents=True, exist_ok=True)
            handle = os.open(local / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
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

    def refuse_mixing(self, tokenizer: TokenizerInfo, row_tokens: int) -> None:
        """Rows of two tokenizers or lengths never come into one corpus."""
        for corpus, manifest in self.previous.items():
            if manifest is None:
                continue
            at, was = self.corpus(corpus), manifest.tokenizer
            if was != tokenizer:
                raise ResumeError(
                    f"{at} was made with tokenizer {was} (vocabulary {was.vocab_size}, EOS {was.eos}); "
                    f"this config has {tokenizer} (vocabulary {tokenizer.vocab_size}, EOS {tokenizer.eos}). "
                    f"Rows of two tokenizers cannot be mixed: choose another output, remove {at}, or keep "
                    f"the tokenizer with tokenizer.kind=file and its {TOKENIZER}."
                )
            if manifest.layout.row_tokens != row_tokens:
                raise ResumeError(
                    f"{at} has rows of {manifest.layout.row_tokens} tokens; this config has row_tokens="
                    f"{row_tokens}. Choose another output, or remove {at}."
                )

    def finished(self, source: Source) -> Entries:
        """What an earlier run left of a domain; nothing unless all of it is there as the config wants it."""
        one = self.receipt["domains"].get(source.label, {})
        if one.get("key") != source.key:
            return {}
        entries: Entries = {}
        files: list[tuple[str, int]] = []
        for corpus in one["corpora"]:
            manifest = self.previous[corpus]
            if manifest is None or source.name not in manifest.domains:
                return {}
            entry = entries[corpus, source.name] = manifest.domains[source.name]
            of_domain = (*entry.shards, *([entry.documents_file] if entry.documents_file else []))
            files += [(f"{self.root}/{corpus}/{file.path}", file.bytes) for file in of_domain]
        found = self.filesystem.get_file_info([path for path, _ in files])
        whole = all(info.size == size for info, (_, size) in zip(found, files, strict=True))
        return entries if whole else {}

    def set_aside(self, corpora: set[str], kept: Sequence[Source]) -> None:
        """Before shards of these corpora are replaced; `kept` are the domains that stay."""
        if self._exists(RECEIPT):
            domains = {source.label: self.receipt["domains"][source.label] for source in kept}
            self._write_receipt({**self.receipt, "domains": domains})
        for corpus in sorted(corpora):
            manifest = self.previous[corpus]
            if manifest is not None and self._exists(f"{corpus}/{MANIFEST}"):
                write_manifest(self.filesystem, f"{self.root}/{STAGING}/{corpus}", manifest)
                self.filesystem.delete_file(f"{self.root}/{corpus}/{MANIFEST}")

    def finish(
        self,
        manifests: Mapping[str, Manifest],
        sources: Sequence[Source],
        *,
        tokenizer_json: str | None,
        tokenizer_key: str | None,
        keep_staging: bool,
    ) -> None:
        """Write the manifests, each after all that it names; remove what no manifest names."""
        for corpus in CORPORA:
            root = f"{self.root}/{corpus}"
            manifest = manifests.get(corpus)
            if manifest is None:
                self._remove_corpus(corpus)
                continue
            if tokenizer_json is not None:
                put(self.filesystem, root, TOKENIZER, tokenizer_json.encode())
            self._remove_others(root, manifest)
            write_manifest(self.filesystem, root, manifest)
        domains = {
            one.label: {
                "key": one.key,
                "corpora": [
                    corpus
                    for corpus, manifest in manifests.items()
                    if (corpus == "targets") == (one.corpus == "targets") and one.name in manifest.domains
                ],
            }
            for one in sources
        }
        self._write_receipt({"format": FORMAT, "domains": domains, "tokenizer": tokenizer_key})
        if not keep_staging:
            with contextlib.suppress(FileNotFoundError):
                self.filesystem.delete_dir(f"{self.root}/{STAGING}")

    def read_text(self, path: str) -> str | None:
        """A small file of the folder, if it is there."""
        try:
            with self.filesystem.open_input_stream(f"{self.root}/{path}", compression=None) as stream:
                return stream.read().decode(errors="replace")
        except FileNotFoundError:
            return None
        except OSError as error:
            raise DataError(f"{self.location}/{path} cannot be read: {error}. See that it can be read.") from error

    def write_text(self, path: str, text: str) -> None:
        put(self.filesystem, self.root, path, text.encode())

    def _receipt(self) -> dict[str, Any]:
        try:
            value = json.loads(self.read_text(RECEIPT) or "{}")
        except ValueError:
            value = {}
        known = isinstance(value, dict) and value.get("format") == FORMAT and isinstance(value["domains"], dict)
        return value if known else {"format": FORMAT, "domains": {}}

    def _write_receipt(self, receipt: Mapping[str, Any]) -> None:
        self.write_text(RECEIPT, json.dumps(receipt, indent=1, sort_keys=True) + "\n")

    def _previous(self, corpus: str) -> Manifest | None:
        """The manifest of an earlier run, be it in its place or set aside by a run that was killed."""
        for folder in (corpus, f"{STAGING}/{corpus}"):
            if self._exists(f"{folder}/{MANIFEST}"):
                try:
                    return read_manifest(self.filesystem, f"{self.root}/{folder}")
                except DataError as error:
                    raise DataError(f"{error} To make it anew, remove {self.location}/{folder}.") from error
        return None

    def _exists(self, path: str) -> bool:
        return self.filesystem.get_file_info(f"{self.root}/{path}").type == pafs.FileType.File

    def _remove_others(self, root: str, manifest: Manifest) -> None:
        """Files that the manifest does not name: of removed domains, or left by a killed run."""
        wanted = {f"{root}/{one.path}" for entry in manifest.domains.values() for one in entry.shards}
        wanted |= {f"{root}/{e.documents_file.path}" for e in manifest.domains.values() if e.documents_file}
        folders = {os.path.dirname(path) for path in wanted}
        for folder in ("shards", "documents"):
            selector = pafs.FileSelector(f"{root}/{folder}", recursive=True, allow_not_found=True)
            infos = self.filesystem.get_file_info(selector)
            for info in sorted(infos, key=lambda one: one.path, reverse=True):  # a folder after what is in it
                if info.type == pafs.FileType.File and info.path not in wanted:
                    self.filesystem.delete_file(info.path)
                elif info.type == pafs.FileType.Directory and info.path not in folders:
                    self.filesystem.delete_dir(info.path)

    def _remove_corpus(self, corpus: str) -> None:
        """A corpus that this config no longer makes (no targets, or no validation share)."""
        if not self._exists(f"{corpus}/{MANIFEST}"):
            return
        self.filesystem.delete_file(f"{self.root}/{corpus}/{MANIFEST}")
        for folder in ("shards", "documents"):
            with contextlib.suppress(FileNotFoundError):
                self.filesystem.delete_dir(f"{self.root}/{corpus}/{folder}")
        if self._exists(f"{corpus}/{TOKENIZER}"):
            self.filesystem.delete_file(f"{self.root}/{corpus}/{TOKENIZER}")
        local = local_path(self.filesystem, f"{self.root}/{corpus}")
        if local is not None:
            with contextlib.suppress(OSError):  # something else is in it: not ours
                local.rmdir()
