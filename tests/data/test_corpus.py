"""Corpora on disk and in a store: opened only if they are what they say, verified to the last byte."""

import hashlib
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.fs as pafs
import pytest

from jobs import corpus as job
from mixer.core.errors import ConfigError, DataError
from mixer.data.corpus import Corpus
from mixer.data.manifest import (
    DomainInfo,
    Manifest,
    TokenizerInfo,
    parse_manifest,
    slug,
    tokenizer_identity,
    write_manifest,
)
from mixer.data.storage import Storage
from mixer.data.verify import verify
from tests.fakes import FAKE_EOS, fake_token, make_corpus

DOMAINS = {"web": 150, "code": 5, "Zeta Ü/x": 70}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    make_corpus(tmp_path / "corpus", DOMAINS)
    return tmp_path / "corpus"


def edited(root: Path, change: Callable[[dict[str, Any]], None], *, sign: bool = True) -> None:
    """Change the manifest's JSON; with `sign` make its fingerprint fit where it can be computed."""
    value = json.loads((root / "manifest.json").read_text())
    change(value)
    if sign:
        value["fingerprint"] = "?"
        try:
            parse_manifest(value)
        except DataError as error:
            if "its content has fingerprint" in str(error):
                value["fingerprint"] = fingerprint_of(value)
    (root / "manifest.json").write_text(json.dumps(value))


def fingerprint_of(value: dict[str, Any]) -> str:
    """The fingerprint by its definition, apart from the code under test."""
    content = {key: value[key] for key in ("row_tokens", "dtype", "metadata", "tokenizer")}
    content["domains"] = {
        name: {key: entry[key] for key in ("rows", "documents", "tokens", "padding")}
        | {
            "shards": [
                [s[key] for key in ("rows", "bytes", "sha256", "head_sha256", "tokens_offset")] for s in entry["shards"]
            ],
            "documents_sha256": entry["documents_file"]["sha256"] if entry["documents_file"] else "",
        }
        for name, entry in value["domains"].items()
    }
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(f"corpus 1\n{text}".encode()).hexdigest()


def test_every_row_is_where_locate_says(root: Path) -> None:
    corpus = Corpus.open(root)
    assert corpus.catalog.names == ("Zeta Ü/x", "code", "web")
    assert corpus.catalog.num_rows_d.tolist() == [70, 5, 150]
    for number, name in enumerate(corpus.catalog.names):
        rows = np.arange(DOMAINS[name])
        shard_n, place_n = corpus.locate(np.full(len(rows), number), rows)
        assert shard_n.dtype == np.int32 and place_n.dtype == np.int64
        for row in rows:
            tokens = corpus.shard(int(shard_n[row])).tokens[place_n[row]]
            assert tokens[0] == fake_token(number, int(row))


@pytest.mark.parametrize(("domain", "row", "message"), [(3, 0, "domain number 3 of 3"), (1, 5, "'code', which has 5")])
def test_rows_that_do_not_exist_are_refused(root: Path, domain: int, row: int, message: str) -> None:
    with pytest.raises(DataError, match=message):
        Corpus.open(root).locate(np.array([0, domain]), np.array([0, row]))


def test_the_fingerprint_names_content_and_not_places(root: Path, tmp_path: Path) -> None:
    corpus = Corpus.open(root)
    assert corpus.fingerprint == fingerprint_of(json.loads((root / "manifest.json").read_text()))
    assert make_corpus(tmp_path / "again", DOMAINS).fingerprint == corpus.fingerprint
    moved = shutil.copytree(root, tmp_path / "moved")
    (moved / "shards/code/00000.arrow").rename(moved / "elsewhere.arrow")
    edited(moved, lambda value: value["domains"]["code"]["shards"][0].update(path="elsewhere.arrow"))
    assert Corpus.open(moved).fingerprint == corpus.fingerprint
    assert Corpus.open(moved).catalog.fingerprint == corpus.catalog.fingerprint
    other = make_corpus(tmp_path / "other", {**DOMAINS, "code": 6})
    assert other.fingerprint != corpus.fingerprint
    web, zeta = corpus.catalog.index["web"], corpus.catalog.index["Zeta Ü/x"]
    for same in (web, zeta):
        assert other.catalog.domains[same] == corpus.catalog.domains[same]


def test_a_corpus_pickles_small_and_without_open_files(root: Path) -> None:
    corpus = Corpus.open(root)
    text = pickle.dumps(corpus)
    assert len(text) < 5_000
    again = pickle.loads(text)
    assert again.catalog == corpus.catalog
    np.testing.assert_array_equal(again.shard(0).tokens, corpus.shard(0).tokens)


def test_every_token_is_traced_to_its_document(root: Path) -> None:
    """Document numbers by walking over the EOS tokens, against `document_of`."""
    corpus = Corpus.open(root)
    number = corpus.catalog.index["web"]
    document = 0
    for row in range(DOMAINS["web"]):
        shard_n, place_n = corpus.locate(np.array([number]), np.array([row]))
        shard = corpus.shard(int(shard_n[0]))
        length = shard.length[place_n[0]]
        for position in range(length):
            found = corpus.document_of("web", row, position)
            assert found.number == document
            assert found.record == document // 2
            assert found.source == ("web/a.jsonl", "web/b.jsonl")[document % 2]
            document += int(shard.tokens[place_n[0], position] == FAKE_EOS)
        if length < shard.layout.row_tokens:
            with pytest.raises(DataError, match=f"position {length} of row {row}.*{length} tokens of text"):
                corpus.document_of("web", row, int(length))
    assert document == corpus.manifest.domains["web"].documents


def remove(path: str) -> Callable[[Path], None]:
    return lambda root: (root / path).unlink()


def link_out(root: Path) -> None:
    target = root.parent / "outside.arrow"
    (root / "shards/code/00000.arrow").rename(target)
    (root / "shards/code/00000.arrow").symlink_to(target)


def link_folder_out(root: Path) -> None:
    (root / "shards/code").rename(root.parent / "outside")
    (root / "shards/code").symlink_to(root.parent / "outside")


def cut(path: str, stop: int) -> Callable[[Path], None]:
    def damage(root: Path) -> None:
        content = (root / path).read_bytes()
        (root / path).unlink()
        (root / path).write_bytes(content[: stop % len(content)])

    return damage


def manifest_text(text: str) -> Callable[[Path], None]:
    def damage(root: Path) -> None:
        (root / "manifest.json").write_text(text)

    return damage


def manifest(change: Callable[[dict[str, Any]], None], *, sign: bool = True) -> Callable[[Path], None]:
    return lambda root: edited(root, change, sign=sign)


def shard_entry(key: str, value: Any) -> Callable[[Path], None]:
    return manifest(lambda v: v["domains"]["web"]["shards"][0].update({key: value}))


def same_path(value: dict[str, Any]) -> None:
    value["domains"]["code"]["shards"][0]["path"] = value["domains"]["web"]["shards"][0]["path"]


def same_content(value: dict[str, Any]) -> None:
    value["domains"]["code"]["shards"][0]["sha256"] = value["domains"]["web"]["shards"][0]["sha256"]


BAD: dict[str, tuple[Callable[[Path], None], str]] = {
    "no manifest": (remove("manifest.json"), "manifest.json is missing.*mixer prepare"),
    "torn manifest": (cut("manifest.json", -9), "is not a manifest"),
    "empty manifest": (manifest_text(""), "is not a manifest"),
    "garbage manifest": (
        manifest_text("\x00{"),
        "not a manifest",
    ),
    "deep manifest": (
        manifest_text("[" * 10**5),
        "not a manifest",
    ),
    "a list": (manifest_text("[]"), "needed a mapping"),
    "domain twice": (
        manifest_text('{"format": 1, "domains": {"a": {}, "a": {}}}'),
        "key 'a' stands there twice",
    ),
    "newer format": (
        manifest(lambda v: v.update(format=2)),
        "of format 2; this version reads up to 1.*newer",
    ),
    "edited count": (
        manifest(lambda v: v["domains"]["web"].update(documents=1), sign=False),
        "its content has fingerprint",
    ),
    "unknown key": (manifest(lambda v: v.update(metdata={})), "the key 'metdata'; needed 'metadata'"),
    "missing key": (manifest(lambda v: v.pop("tokenizer")), "no 'tokenizer'"),
    "bad dtype": (manifest(lambda v: v.update(dtype="uint16")), "dtype is uint16; needed uint32"),
    "bad row length": (manifest(lambda v: v.update(row_tokens=6)), "multiple of 4"),
    "negative count": (manifest(lambda v: v["domains"]["web"].update(rows=-1)), r"domains.web.rows is -1"),
    "count that is true": (
        manifest(lambda v: v["domains"]["web"].update(rows=True)),
        "domains.web.rows is True",
    ),
    "count as text": (manifest(lambda v: v["domains"]["web"].update(rows="9")), "domains.web.rows is '9'"),
    "count as float": (
        manifest(lambda v: v["domains"]["web"].update(tokens=1.5)),
        "domains.web.tokens is 1.5",
    ),
    "rows do not add up": (
        manifest(lambda v: v["domains"]["web"].update(rows=149)),
        "149; needed the sum over",
    ),
    "padding does not add up": (
        manifest(lambda v: v["domains"]["web"].update(padding=0)),
        "tokens . padding",
    ),
    "bad sha256": (shard_entry("sha256", "xyz"), r"shards\[0\].sha256 is 'xyz'"),
    "shard too small for its rows": (shard_entry("bytes", 100), "room for 64 rows"),
    "bad eos": (manifest(lambda v: v["tokenizer"].update(eos=1 << 20)), "tokenizer.eos is 1048576"),
    "bad tokenizer": (manifest(lambda v: v["tokenizer"].update(kind="word")), "tokenizer.kind is 'word'"),
    "path up": (
        shard_entry("path", "../other/00000.arrow"),
        r"'../other/00000.arrow'; needed a plain relative",
    ),
    "path up inside": (shard_entry("path", "shards/../../x.arrow"), "needed a plain relative path"),
    "absolute path": (shard_entry("path", "/etc/passwd"), "'/etc/passwd'; needed a plain relative path"),
    "path with newline": (shard_entry("path", "shards/a\nb.arrow"), "needed a plain relative path"),
    "path not normal": (shard_entry("path", "shards//web/./0.arrow"), "needed a plain relative path"),
    "path of a store": (shard_entry("path", "s3://bucket/0.arrow"), "needed a plain relative path"),
    "path with backslash": (shard_entry("path", "shards\\0.arrow"), "needed a plain relative path"),
    "link out of the root": (link_out, "is a link to .*outside.arrow, outside of the corpus"),
    "linked folder": (link_folder_out, "is a link to .*outside.*outside of the corpus"),
    "path in two domains": (manifest(same_path), "is listed in domain 'code' and again in domain 'web'"),
    "content in two domains": (
        manifest(same_content),
        "of domain 'web' has the content of .* of domain 'code'",
    ),
    "missing shard": (remove("shards/web/00001.arrow"), "00001.arrow of domain 'web' is missing"),
    "cut shard": (
        cut("shards/web/00001.arrow", -100),
        "00001.arrow of domain 'web' has .* bytes; the manifest says",
    ),
    "empty shard": (cut("shards/web/00001.arrow", 0), "00001.arrow of domain 'web' has 0 bytes"),
    "other schema": (
        manifest(lambda v: v.update(metadata={"topic": "string"})),
        r"another schema.*found \[.*needed \[.*topic: string",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_corpus_is_refused_with_one_clear_error(root: Path, case: str) -> None:
    damage, message = BAD[case]
    damage(root)
    with pytest.raises(DataError, match=message) as caught:
        Corpus.open(root)
    assert "\n" not in str(caught.value)
    assert str(caught.value).rstrip().endswith(".")


def test_an_empty_domain_is_refused_unless_dropped(tmp_path: Path) -> None:
    make_corpus(tmp_path, {"web": 9, "nothing": 0})
    with pytest.raises(DataError, match=r"domain 'nothing' of .* has no rows.*drop it"):
        _ = Corpus.open(tmp_path).catalog
    assert Corpus.open(tmp_path, drop_empty=True).catalog.names == ("web",)


def test_a_manifest_that_could_not_be_read_again_is_not_written(root: Path, tmp_path: Path) -> None:
    good = Corpus.open(root).manifest
    tokenizer = TokenizerInfo(kind="byte", identity="ab" * 8, vocab_size=257, eos=300)
    wrong = Manifest(layout=good.layout, tokenizer=tokenizer, domains=good.domains)
    with pytest.raises(DataError, match=r"tokenizer\.eos"):
        write_manifest(pafs.LocalFileSystem(), str(tmp_path / "new"), wrong)
    assert not (tmp_path / "new").exists()


def test_slugs_are_tame_and_differ() -> None:
    names = ["web", "Web", "a/b", "a-b", "..", ".hidden", "Ü", "Ö", "x" * 300, "x" * 301, "con.", "a b"]
    slugs = [slug(name) for name in names]
    assert slugs[0] == "web" and slugs[3] == "a-b"
    assert len({text.lower() for text in slugs}) == len(names)
    for text in slugs:
        assert text.isascii() and "/" not in text and not text.startswith(".") and len(text) < 80


def test_uris_with_credentials_are_refused_and_not_repeated() -> None:
    with pytest.raises(ConfigError, match="holds credentials") as caught:
        Storage().locate("s3://key:s3cret@bucket/corpus")
    assert "s3cret" not in str(caught.value) and "key" not in str(caught.value).split("holds")[0]


def test_a_corpus_in_a_store_opens_by_its_listing(s3: Any, tmp_path: Path) -> None:
    local = make_corpus(tmp_path, {"web": 300, "code": 20}, row_tokens=256)
    make_corpus("corpora/whole", {"web": 300, "code": 20}, row_tokens=256, filesystem=s3.filesystem)
    s3.log.clear()
    storage = Storage(endpoint=s3.endpoint, region="us-east-1")
    corpus = Corpus.open("s3://corpora/whole", storage=storage)
    assert corpus.fingerprint == local.fingerprint and corpus.catalog == local.catalog
    gets = [path for path, _, _ in s3.gets() if path.endswith(".arrow")]
    assert gets == []
    shard_n, row_n = corpus.locate(np.array([1]), np.array([299]))
    assert corpus.shard(int(shard_n[0])).take(row_n)[0, 0] == fake_token(1, 299)
    assert corpus.document_of("web", 299, 0) == local.document_of("web", 299, 0)
    assert verify(corpus) == []
    again = pickle.loads(pickle.dumps(corpus))
    assert again.shard(0).take(np.array([3]))[0, 0] == fake_token(0, 3)
    s3.filesystem.delete_file("corpora/whole/shards/web/00002.arrow")
    with pytest.raises(DataError, match=r"shards/web/00002.arrow of domain 'web' is missing"):
        Corpus.open("s3://corpora/whole", storage=storage)


def test_verify_finds_every_flipped_byte(root: Path) -> None:
    """100 random places over all shards and documents files, and every one is named."""
    corpus = Corpus.open(root)
    rng = np.random.default_rng(7)
    files = [(name, path, size) for name, path, size in corpus.files() if path.startswith("shards/")]
    for _ in range(100):
        name, path, size = files[rng.integers(len(files))]
        place, bit = int(rng.integers(size)), int(rng.integers(8))
        flip(root / path, place, bit)
        lines = verify(Corpus.open(root, check="none"))
        assert lines and all(path in line for line in lines if "sha256" in line), (path, place, bit)
        assert any(path in line and repr(name) in line for line in lines)
        flip(root / path, place, bit)
    assert verify(Corpus.open(root, check="none")) == []


def flip(path: Path, place: int, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1 << bit
    path.write_bytes(bytes(content))


def test_verify_names_everything_that_differs(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    corpus = Corpus.open(root)
    web = corpus.manifest.domains["web"].shards
    flip(root / web[0].path, web[0].tokens_offset + 3 * corpus.manifest.layout.row_bytes, 0)
    flip(root / web[0].path, web[0].tokens_offset + 9 * corpus.manifest.layout.row_bytes, 0)
    (root / web[1].path).unlink()
    cut("shards/code/00000.arrow", -8)(root)
    flip(root / "documents/web.arrow", 200, 1)
    assert job.main(["verify", str(root)]) == 1
    text = capsys.readouterr().out
    for part in (
        "shards/web/00000.arrow has sha256",
        "shards/web/00000.arrow row 3 does not add up",
        "shards/web/00000.arrow row 9 does not add up",
        "shards/web/00001.arrow is missing",
        "shards/code/00000.arrow has",
        "documents/web.arrow has",
    ):
        assert part in text, part
    with pytest.raises(DataError):
        Corpus.open(root)


def test_verify_compares_counts_tokens_and_documents(root: Path) -> None:
    """Files that are as listed, under a manifest that counts wrongly."""

    def lie(value: dict[str, Any]) -> None:
        value["domains"]["web"]["tokens"] -= 1
        value["domains"]["web"]["padding"] += 1
        value["domains"]["code"]["documents"] += 1
        value["domains"]["Zeta Ü/x"]["sources"] = ["one"]
        value["tokenizer"]["vocab_size"] = FAKE_EOS - 1
        value["tokenizer"]["eos"] = 1

    num_documents = Corpus.open(root).manifest.domains["code"].documents
    edited(root, lie)
    text = "\n".join(verify(Corpus.open(root)))
    for part in (
        "domain 'web' has ",
        "padding; the manifest says",
        f"lists {num_documents} documents; the manifest says {num_documents + 1}",
        "names sources outside of the 1",
        "has tokens outside of the vocabulary of 1048574",
        "has padding that is not EOS",
    ):
        assert part in text, part


def test_verify_knows_the_tokenizer(root: Path) -> None:
    text = json.dumps({"version": "1.0", "model": {"vocab": {"a": 0}}, "truncation": None})
    identity = tokenizer_identity(text, FAKE_EOS)
    edited(root, lambda value: value["tokenizer"].update(kind="hf", identity=identity))
    assert verify(Corpus.open(root)) == ["tokenizer.json is missing"]
    (root / "tokenizer.json").write_text(text)
    assert verify(Corpus.open(root)) == []
    (root / "tokenizer.json").write_text(text.replace('"a"', '"b"'))
    assert "tokenizer.json is tokenizer" in verify(Corpus.open(root))[0]


def test_the_corpus_job_shows_and_verifies(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert job.main(["show", str(root)]) == 0
    shown = capsys.readouterr().out
    line = next(line for line in shown.splitlines() if line.startswith("web"))
    web = Corpus.open(root).manifest.domains["web"]
    num_bytes = sum(shard.bytes for shard in web.shards)
    assert line.split() == [
        "web",
        *(f"{n:,}" for n in (web.documents, 150, web.tokens, web.padding, 3, num_bytes)),
    ]
    assert Corpus.open(root).fingerprint in shown
    assert job.main(["verify", str(root), "--threads", "2"]) == 0
    assert "6 shards, 225 rows: as its manifest says" in capsys.readouterr().out


def test_an_opened_corpus_stays_small_in_memory_maps(root: Path) -> None:
    corpus = Corpus.open(root)
    assert corpus.shard(0) is corpus.shard(0)
    assert corpus.open_shard(0) is not corpus.shard(0)


def test_domains_keep_their_info(root: Path) -> None:
    value = json.loads((root / "manifest.json").read_text())
    parsed = parse_manifest(value)
    assert parsed.to_dict() == value
    assert isinstance(parsed.domains["web"], DomainInfo)
    assert os.path.basename(parsed.domains["web"].shards[2].path) == "00002.arrow"
