"""The manifest: what a corpus consists of. Parsing is a pure function that trusts nothing in the file.

`manifest.json` is written last and whole, so a folder without one is no corpus. Counts: `tokens` of a
domain is its text with the EOS of each document, `padding` is the rest of its rows, so that
tokens + padding = rows * row_tokens. Everything that identifies content is in the fingerprint; where
shards and sources lie is not.
"""

import difflib
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import PurePosixPath
from typing import Any, TypeVar

import pyarrow.fs as pafs

from mixer.core.errors import DataError, MixerError
from mixer.data.shards import Layout, ShardInfo, dtype_for
from mixer.data.storage import put

FORMAT = 1
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.json"
MAX_COUNT = 1 << 62
MAX_SLUG = 60
MIN_SHARD_BYTES = 16
TOKENIZER_KINDS = ("byte", "hf")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizerInfo:
    """Which tokenizer made the tokens. For "hf" see `tokenizer_identity`."""

    kind: str
    identity: str
    vocab_size: int
    eos: int

    def __str__(self) -> str:
        return f"{self.kind}:{self.identity}"


@dataclass(frozen=True, slots=True, kw_only=True)
class FileInfo:
    """A file of the corpus that is not a shard."""

    path: str
    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class DomainInfo:
    """One source domain: what was counted, what was left out and why, and where it lies."""

    rows: int
    documents: int
    tokens: int
    padding: int
    skipped: Mapping[str, int] = field(default_factory=dict)
    sources: tuple[str, ...] = ()
    shards: tuple[ShardInfo, ...] = ()
    documents_file: FileInfo | None = None  # None only where there are no documents


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """All of a corpus but its bytes. Domains are in order of their names."""

    layout: Layout
    tokenizer: TokenizerInfo
    domains: Mapping[str, DomainInfo]

    def __post_init__(self) -> None:
        object.__setattr__(self, "domains", dict(sorted(self.domains.items())))

    @cached_property
    def fingerprint(self) -> str:
        return manifest_fingerprint(self)

    def to_dict(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "row_tokens": self.layout.row_tokens,
            "dtype": self.layout.dtype,
            "tokenizer": _plain(self.tokenizer),
            "metadata": dict(sorted(self.layout.metadata.items())),
            "domains": {
                name: _plain(domain)
                | {
                    "skipped": dict(sorted(domain.skipped.items())),
                    "sources": list(domain.sources),
                    "shards": [_plain(shard) for shard in domain.shards],
                    "documents_file": None if domain.documents_file is None else _plain(domain.documents_file),
                }
                for name, domain in self.domains.items()
            },
            "fingerprint": self.fingerprint,
        }


def manifest_fingerprint(manifest: Manifest) -> str:
    """sha256 over everything that identifies content: not where shards and sources lie."""
    content = {
        "row_tokens": manifest.layout.row_tokens,
        "dtype": manifest.layout.dtype,
        "metadata": dict(manifest.layout.metadata),
        "tokenizer": _plain(manifest.tokenizer),
        "domains": {
            name: {
                "rows": domain.rows,
                "documents": domain.documents,
                "tokens": domain.tokens,
                "padding": domain.padding,
                "shards": [
                    [shard.rows, shard.bytes, shard.sha256, shard.head_sha256, shard.tokens_offset]
                    for shard in domain.shards
                ],
                "documents_sha256": "" if domain.documents_file is None else domain.documents_file.sha256,
            }
            for name, domain in manifest.domains.items()
        },
    }
    text = json.dumps(content, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(f"corpus {FORMAT}\n{text}".encode()).hexdigest()


def tokenizer_identity(text: str, eos: int) -> str:
    """The identity of a tokenizer.json: what it defines and the EOS chosen, not how the file is laid out."""
    definition: dict[str, Any] = json.loads(text)
    definition.pop("truncation", None)
    definition.pop("padding", None)
    canonical = json.dumps(definition, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(f"{eos}\n{canonical}".encode()).hexdigest()


def slug(domain: str) -> str:
    """A folder name for a domain: itself where that is harmless, else a likeness and a few hash digits."""
    tame = re.sub(r"[^a-z0-9._-]+", "-", domain.lower())[:MAX_SLUG].strip("-.")
    return tame if tame == domain else f"{tame or 'domain'}-{hashlib.sha256(domain.encode()).hexdigest()[:10]}"


def shard_path(domain: str, number: int) -> str:
    return f"shards/{slug(domain)}/{number:05d}.arrow"


def documents_path(domain: str) -> str:
    return f"documents/{slug(domain)}.arrow"


def write_manifest(filesystem: pafs.FileSystem, root: str, manifest: Manifest) -> None:
    """Write the manifest, whole or not at all; one that could not be read again is not written."""
    value = manifest.to_dict()
    parse_manifest(value)
    put(filesystem, root, MANIFEST, (json.dumps(value, indent=1) + "\n").encode())


def parse_manifest(value: object) -> Manifest:
    """Check every field of a manifest read from JSON. A `DataError` says where and what is wrong."""
    top = _mapping(value, "manifest")
    version = _count(top.get("format"), "format")
    if version > FORMAT:
        raise DataError(
            f"manifest of format {version}; this version reads up to {FORMAT}. Use a newer version of mixer."
        )
    _keys(top, "manifest", ("format", "row_tokens", "dtype", "tokenizer", "metadata", "domains", "fingerprint"))
    metadata = {
        _text(key, "metadata"): _text(kind, f"metadata.{key}")
        for key, kind in _mapping(top["metadata"], "metadata").items()
    }
    try:
        layout = Layout(
            row_tokens=_count(top["row_tokens"], "row_tokens"),
            dtype=_text(top["dtype"], "dtype"),
            metadata=metadata,
        )
    except MixerError as error:
        raise DataError(f"manifest: {error}") from error
    tokenizer = _tokenizer(_mapping(top["tokenizer"], "tokenizer"))
    if layout.dtype != dtype_for(tokenizer.vocab_size):
        raise _wrong("dtype", layout.dtype, f"{dtype_for(tokenizer.vocab_size)} for {tokenizer.vocab_size} tokens")
    domains = {
        name: _domain(_mapping(entry, f"domains.{name}"), f"domains.{name}", layout)
        for name, entry in _mapping(top["domains"], "domains").items()
    }
    for name in domains:
        if not name or name != name.strip() or not name.isprintable():
            raise _wrong("domains", repr(name), "a printable name without spaces around it")
    _refuse_doubles(domains)
    manifest = Manifest(layout=layout, tokenizer=tokenizer, domains=domains)
    if manifest.fingerprint != top["fingerprint"]:
        raise DataError(
            f"manifest: its content has fingerprint {manifest.fingerprint[:16]}..., but it says "
            f"{str(top['fingerprint'])[:16]}.... It was edited or damaged: restore it, or prepare the corpus "
            "again."
        )
    return manifest


def normal_path(path: object, where: str) -> str:
    """A relative path below the root in its one normal form, or an error: no `..`, no tricks."""
    text = _text(path, where)
    parts = PurePosixPath(text).parts
    if (
        not text.isprintable()
        or "\\" in text
        or "://" in text
        or text.startswith(("/", "~"))
        or ".." in parts
        or str(PurePosixPath(text)) != text
        or text == "."
    ):
        raise _wrong(where, repr(text), "a plain relative path below the corpus, as shards/web/00000.arrow")
    return text


def _domain(entry: Mapping[str, Any], where: str, layout: Layout) -> DomainInfo:
    _keys(entry, where, [item.name for item in fields(DomainInfo)])
    counts = {key: _count(entry[key], f"{where}.{key}") for key in ("rows", "documents", "tokens", "padding")}
    shards = tuple(
        _shard(_mapping(item, f"{where}.shards[{place}]"), f"{where}.shards[{place}]", layout)
        for place, item in enumerate(_list(entry["shards"], f"{where}.shards"))
    )
    file = entry["documents_file"]
    domain = DomainInfo(
        **counts,
        skipped={
            _text(key, where): _count(number, f"{where}.skipped.{key}")
            for key, number in _mapping(entry["skipped"], f"{where}.skipped").items()
        },
        sources=tuple(_text(item, f"{where}.sources") for item in _list(entry["sources"], f"{where}.sources")),
        shards=shards,
        documents_file=None if file is None else _file(_mapping(file, f"{where}.documents_file"), where),
    )
    if sum(shard.rows for shard in shards) != domain.rows:
        raise _wrong(f"{where}.rows", domain.rows, f"the sum over its shards, {sum(shard.rows for shard in shards)}")
    if domain.tokens + domain.padding != domain.rows * layout.row_tokens:
        raise _wrong(
            f"{where}: tokens + padding",
            domain.tokens + domain.padding,
            f"rows * row_tokens = {domain.rows * layout.row_tokens}",
        )
    if domain.documents and domain.documents_file is None:
        raise _wrong(f"{where}.documents_file", None, f"the file that lists its {domain.documents} documents")
    return domain


def _shard(entry: Mapping[str, Any], where: str, layout: Layout) -> ShardInfo:
    _keys(entry, where, [item.name for item in fields(ShardInfo)])
    shard = ShardInfo(
        path=normal_path(entry["path"], f"{where}.path"),
        sha256=_sha256(entry["sha256"], f"{where}.sha256"),
        head_sha256=_sha256(entry["head_sha256"], f"{where}.head_sha256"),
        **{key: _count(entry[key], f"{where}.{key}") for key in ("rows", "bytes", "tokens_offset")},
    )
    if shard.rows == 0:
        raise _wrong(f"{where}.rows", 0, "at least 1: a shard without rows is left out")
    if shard.tokens_offset + shard.rows * layout.row_bytes + MIN_SHARD_BYTES > shard.bytes:
        raise _wrong(f"{where}.bytes", shard.bytes, f"room for {shard.rows} rows from byte {shard.tokens_offset} on")
    return shard


def _file(entry: Mapping[str, Any], where: str) -> FileInfo:
    where = f"{where}.documents_file"
    _keys(entry, where, [item.name for item in fields(FileInfo)])
    return FileInfo(
        path=normal_path(entry["path"], f"{where}.path"),
        bytes=_count(entry["bytes"], f"{where}.bytes"),
        sha256=_sha256(entry["sha256"], f"{where}.sha256"),
    )


def _tokenizer(entry: Mapping[str, Any]) -> TokenizerInfo:
    _keys(entry, "tokenizer", [item.name for item in fields(TokenizerInfo)])
    info = TokenizerInfo(
        kind=_text(entry["kind"], "tokenizer.kind"),
        identity=_text(entry["identity"], "tokenizer.identity"),
        vocab_size=_count(entry["vocab_size"], "tokenizer.vocab_size"),
        eos=_count(entry["eos"], "tokenizer.eos"),
    )
    if info.kind not in TOKENIZER_KINDS:
        raise _wrong("tokenizer.kind", repr(info.kind), " or ".join(TOKENIZER_KINDS))
    if not re.fullmatch(r"[0-9a-f]{8,64}", info.identity):
        raise _wrong("tokenizer.identity", repr(info.identity), "8 to 64 hexadecimal digits")
    if not 0 < info.vocab_size <= 1 << 32 or info.eos >= info.vocab_size:
        raise _wrong("tokenizer.eos", info.eos, f"a token of the vocabulary of {info.vocab_size}")
    return info


def _refuse_doubles(domains: Mapping[str, DomainInfo]) -> None:
    """No file belongs to two places, and no two domains share a shard's content."""
    owner_of_path: dict[str, str] = {}
    owner_of_content: dict[str, tuple[str, str]] = {}
    for name, domain in domains.items():
        files = [shard.path for shard in domain.shards]
        files += [domain.documents_file.path] if domain.documents_file else []
        for path in files:
            if path in owner_of_path:
                raise DataError(
                    f"manifest: {path} is listed in domain {owner_of_path[path]!r} and again in domain "
                    f"{name!r}. "
                    "A file belongs to one place of one domain: take it out of the other."
                )
            owner_of_path[path] = name
        for shard in domain.shards:
            owner, path = owner_of_content.setdefault(shard.sha256, (name, shard.path))
            if owner != name:
                raise DataError(
                    f"manifest: {shard.path} of domain {name!r} has the content of {path} of domain "
                    f"{owner!r} (sha256 {shard.sha256[:16]}...). Rows belong to one domain: leave "
                    "one of the two out."
                )


def _plain(value: Any) -> dict[str, Any]:
    return {item.name: getattr(value, item.name) for item in fields(value)}


def _keys(entry: Mapping[str, Any], where: str, known: Iterable[str]) -> None:
    known = list(known)
    for key in known:
        if key not in entry:
            raise _wrong(where, f"no {key!r}", f"the keys {', '.join(known)}")
    for key in entry:
        if key not in known:
            nearest = difflib.get_close_matches(str(key), known, 1)
            raise _wrong(where, f"the key {key!r}", f"{nearest[0]!r}, perhaps" if nearest else ", ".join(known))


def _checked(kind: type[_T], what: str) -> Callable[[object, str], _T]:
    def check(value: object, where: str) -> _T:
        if not isinstance(value, kind):
            raise _wrong(where, repr(value)[:60], what)
        return value

    return check


_text = _checked(str, "text")
_list: Callable[[object, str], list[Any]] = _checked(list, "a list")
_mapping: Callable[[object, str], dict[str, Any]] = _checked(dict, "a mapping")


def _count(value: object, where: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= MAX_COUNT:
        raise _wrong(where, repr(value)[:60], "a whole number, not negative")
    return value


def _sha256(value: object, where: str) -> str:
    text = _text(value, where)
    if not _SHA256.fullmatch(text):
        raise _wrong(where, repr(text[:80]), "a sha256 of 64 hexadecimal digits")
    return text


def _wrong(where: str, found: object, needed: str) -> DataError:
    return DataError(
        f"manifest: {where} is {found}; needed {needed}. Restore the manifest, or prepare the corpus again."
    )
