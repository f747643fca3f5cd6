"""Whole preparations, in this process; those on Ray are in test_prepare_ray.py."""

import hashlib
import json
import os
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mixer.core.errors import ConfigError, DataError, ResumeError
from mixer.data import documents
from mixer.data import prepare as module
from mixer.data.corpus import Corpus
from mixer.data.prepare import PrepareOptions, prepare
from mixer.data.sources import MetadataOptions, SourceOptions
from mixer.data.tasks import SerialRunner
from mixer.data.tokens import ByteTokenizer, TokenizerOptions, from_text
from mixer.data.verify import verify


def jsonl(path, records):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return SourceOptions(files=(str(path),))


def options_for(tmp_path, domains, **more):
    return PrepareOptions(**{"output": str(tmp_path / "out"), "domains": domains, "row_tokens": 8, **more})


def rows_of(corpus, domain):
    """[(tokens without padding, padding, starts, first document, metadata)] of a domain's rows, in order."""
    rows = []
    for number, (info, of) in enumerate(zip(corpus.shards, corpus.shard_domains, strict=True)):
        if of != domain:
            continue
        shard = corpus.shard(number)
        for row in range(info.rows):
            tokens, length = shard.tokens[row].tolist(), int(shard.length[row])
            keys = {key: shard.metadata(key)[row].as_py() for key in corpus.manifest.layout.metadata}
            starts = shard.starts[row].as_py()
            rows.append((tokens[:length], tokens[length:], starts, int(shard.first_document[row]), keys))
    return rows


def documents_in(corpus, domain, eos):
    """The documents that the rows say they hold: number -> tokens, by starts and first_document alone."""
    found: dict[int, list[int]] = {}
    for tokens, _, starts, first_document, _ in rows_of(corpus, domain):
        cuts = [0, *(start for start in starts if start), len(tokens)]
        for number, (start, stop) in enumerate(pairwise(cuts), first_document):
            assert (start in starts) == (number not in found)
            found.setdefault(number, []).extend(tokens[start:stop])
    assert all(tokens[-1] == eos and eos not in tokens[:-1] for tokens in found.values())
    return found


def contents(folder):
    root = Path(folder)
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


# --- what comes out ----------------------------------------------------------------------------------


def test_by_hand(tmp_path):
    a = jsonl(tmp_path / "a.jsonl", [{"text": "abcde"}, {"text": ""}, {"text": "fghi"}, {"text": "j"}])
    summary = prepare(options_for(tmp_path, {"a": a}), SerialRunner())
    eos = 256
    corpus = Corpus.open(tmp_path / "out/train")
    assert rows_of(corpus, "a") == [
        ([97, 98, 99, 100, 101, eos, 102, 103], [], [0, 6], 0, {}),
        ([104, 105, eos, 106, eos], [eos] * 3, [3], 1, {}),
    ]
    info = corpus.manifest.domains["a"]
    assert (info.rows, info.documents, info.tokens, info.padding) == (2, 3, 13, 3)
    assert info.skipped == {"empty": 1}
    assert info.sources == (str(tmp_path / "a.jsonl"),)
    assert info.documents_file is not None
    table = documents.read(corpus.filesystem, corpus.root, info.documents_file)
    assert table.to_pydict() == {"file": [0, 0, 0], "record": [0, 2, 3], "tokens": [6, 5, 2]}
    assert corpus.manifest.tokenizer.identity == ByteTokenizer.identity
    assert summary.manifests["train"].fingerprint == corpus.fingerprint
    assert not (tmp_path / "out/.staging").exists()


words = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=20)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    texts=st.lists(st.tuples(words, st.sampled_from(["x", "y", "z"])), min_size=1, max_size=40),
    row_tokens=st.sampled_from([4, 8, 20]),
    shard_rows=st.integers(1, 5),
    unit_bytes=st.integers(1, 400),
    grouped=st.booleans(),
    section=st.integers(1, 60),
)
def test_any_documents_come_back_exactly(
    tmp_path_factory, monkeypatch, texts, row_tokens, shard_rows, unit_bytes, grouped, section
):
    """Token for token, with starts and numbers, whatever the rows, shards, units, groups and sections."""
    monkeypatch.setattr("mixer.data.staging.SECTION_TOKENS", section)
    monkeypatch.setattr("mixer.data.staging.ENCODE_CHARS", 10)
    monkeypatch.setattr("mixer.data.assembly.DOCUMENTS_BATCH", 3)
    tmp_path = tmp_path_factory.mktemp("any")
    texts = [*texts, ("end", "x")]
    source = jsonl(tmp_path / "a.jsonl", [{"text": text, "topic": topic} for text, topic in texts])
    options = options_for(
        tmp_path,
        {"a": source},
        row_tokens=row_tokens,
        unit_mb=unit_bytes / 1e6,
        shard_mb=shard_rows * row_tokens * 2 / 1e6,
        metadata={"topic": MetadataOptions(group=True)} if grouped else {},
    )
    prepare(options, SerialRunner())
    corpus = Corpus.open(tmp_path / "out/train")
    usable = [(n, text, topic) for n, (text, topic) in enumerate(texts) if text and not text.isspace()]
    if grouped:
        usable.sort(key=lambda one: one[2])
    found = documents_in(corpus, "a", 256)
    assert [bytes(found[n][:-1]).decode() for n in range(len(found))] == [text for _, text, _ in usable]
    info = corpus.manifest.domains["a"]
    assert info.documents_file is not None
    table = documents.read(corpus.filesystem, corpus.root, info.documents_file)
    assert table.column("record").to_pylist() == [n for n, _, _ in usable]
    assert table.column("tokens").to_pylist() == [len(text.encode()) + 1 for _, text, _ in usable]
    rows = rows_of(corpus, "a")
    assert sum(len(tokens) for tokens, *_ in rows) == info.tokens == sum(table.column("tokens").to_pylist())
    padded = [row for row in rows if row[1]]
    assert len(padded) <= (len({topic for _, _, topic in usable}) if grouped else 1)
    if grouped:
        for _, _, starts, first, keys in rows:
            inside = range(first, first + len(starts) + (0 if starts[:1] == [0] else 1))
            assert {usable[n][2] for n in inside} == {keys["topic"]}
    assert verify(corpus) == []


def test_groups_are_never_mixed_and_values_are_reduced(tmp_path):
    records = [
        {"text": "aaa", "topic": "t2", "score": 1.0},  # 4 tokens
        {"text": "bbbbbbb", "topic": "t1", "score": 0.5},  # 8 tokens
        {"text": "ccccccccccc", "topic": "t2", "score": 3},  # 12 tokens
    ]
    source = jsonl(tmp_path / "a.jsonl", records)
    metadata = {
        "topic": MetadataOptions(group=True),
        "score": MetadataOptions(),
        "best": MetadataOptions(reduce="max", default=7.0),
    }
    prepare(options_for(tmp_path, {"a": source}, metadata=metadata), SerialRunner())
    corpus = Corpus.open(tmp_path / "out/train")
    assert dict(corpus.manifest.layout.metadata) == {"topic": "string", "score": "float64", "best": "float64"}
    rows = rows_of(corpus, "a")
    assert [keys for *_, keys in rows] == [
        {"topic": "t1", "score": 0.5, "best": 7.0},
        {"topic": "t2", "score": (4 * 1.0 + 4 * 3.0) / 8, "best": 7.0},
        {"topic": "t2", "score": 3.0, "best": 7.0},
    ]
    assert [first for _, _, _, first, _ in rows] == [0, 1, 2]


def test_three_corpora_of_one_tokenizer(tmp_path):
    many = [{"text": f"document number {n % 150}"} for n in range(300)]  # each text twice
    options = options_for(
        tmp_path,
        {"a": jsonl(tmp_path / "a.jsonl", many), "b": jsonl(tmp_path / "b.jsonl", many[:20])},
        targets={"t": jsonl(tmp_path / "t.jsonl", [{"text": "target"}])},
        validation_share=0.25,
        tokenizer=TokenizerOptions(kind="train", vocab_size=280),
    )
    summary = prepare(options, SerialRunner())
    corpora = {name: Corpus.open(tmp_path / "out" / name) for name in ("train", "validation", "targets")}
    assert summary.manifests.keys() == corpora.keys()
    assert len({corpus.manifest.tokenizer for corpus in corpora.values()}) == 1
    text = (tmp_path / "out/train/tokenizer.json").read_text()
    assert [verify(corpus) for corpus in corpora.values()] == [[], [], []]
    tokenizer = from_text(text)
    sides = {}
    for name, corpus in corpora.items():
        found = documents_in(corpus, "t" if name == "targets" else "a", tokenizer.eos)
        sides[name] = Counter(tokenizer.decode(tokens) for tokens in found.values())
    assert sides["targets"] == {"target": 1}
    assert not sides["train"].keys() & sides["validation"].keys()
    assert sides["train"] + sides["validation"] == Counter(record["text"] for record in many)
    assert set(sides["validation"].values()) == {2}
    assert 20 <= len(sides["validation"]) <= 55  # 150 * 0.25 = 37.5, 3.3 standard deviations
    other = replace(options, output=str(tmp_path / "other"), seed=1)
    prepare(other, SerialRunner())
    assert Corpus.open(tmp_path / "other/validation").fingerprint != corpora["validation"].fingerprint


def test_a_parquet_domain_and_many_small_texts(tmp_path):
    (tmp_path / "p").mkdir()
    pq.write_table(pa.table({"body": [f"row {n}" for n in range(50)]}), tmp_path / "p/a.parquet", row_group_size=7)
    for n in range(30):
        (tmp_path / "p" / f"{n:02d}.md").write_text(f"file {n}")
    options = options_for(
        tmp_path,
        {
            "rows": SourceOptions(files=(f"{tmp_path}/p/*.parquet",), text="body"),
            "files": SourceOptions(files=(f"{tmp_path}/p/*.md",)),
        },
        unit_mb=0.0001,
    )
    prepare(options, SerialRunner())
    corpus = Corpus.open(tmp_path / "out/train")
    found = documents_in(corpus, "files", 256)
    assert [bytes(found[n][:-1]).decode() for n in range(30)] == [f"file {n}" for n in range(30)]
    found = documents_in(corpus, "rows", 256)
    assert [bytes(found[n][:-1]).decode() for n in range(50)] == [f"row {n}" for n in range(50)]
    document = corpus.document_of("files", corpus.manifest.domains["files"].rows - 1, 0)
    assert document.source.endswith("/29.md")


def test_a_document_longer_than_everything_else(tmp_path):
    """50 MB in one document: it spans rows and shards, and is one document."""
    text = "All work and no play. " * 2_300_000
    (tmp_path / "a.txt").write_text(text)
    (tmp_path / "b.txt").write_text("short")
    options = options_for(tmp_path, {"a": SourceOptions(files=(f"{tmp_path}/*.txt",))}, row_tokens=2048, shard_mb=16)
    prepare(options, SerialRunner())
    corpus = Corpus.open(tmp_path / "out/train")
    info = corpus.manifest.domains["a"]
    assert (info.documents, info.tokens) == (2, len(text) + 1 + 6)
    assert len(info.shards) == 7
    last = corpus.shard(6)
    assert bytes(last.tokens[-1][: last.length[-1] - 7].tolist()) == text.encode()[-(int(last.length[-1]) - 7) :]
    assert last.first_document.tolist() == [0] * len(last)
    assert last.starts[-1].as_py() == [int(last.length[-1]) - 6]


# --- refusals ---------------------------------------------------------------------------------------


def test_an_empty_domain_is_refused_and_says_why(tmp_path):
    good = jsonl(tmp_path / "good.jsonl", [{"text": "good"}])
    bad = jsonl(tmp_path / "bad.jsonl", [{"body": "a"}, {"text": " "}, {"body": "a"}])
    with pytest.raises(DataError, match=r"empty domain: 'bad' of train .* skipped: 1 blank, 2 missing"):
        prepare(options_for(tmp_path, {"bad": bad, "good": good}), SerialRunner())
    assert not (tmp_path / "out/train/manifest.json").exists()
    (tmp_path / "none.txt").write_text("")
    none = SourceOptions(files=(str(tmp_path / "none.txt"),), split="lines")
    with pytest.raises(DataError, match=r"empty domain: 'none' of targets .* they hold no record"):
        prepare(options_for(tmp_path, {"good": good}, targets={"none": none}), SerialRunner())


def test_a_file_in_two_domains_is_refused(tmp_path):
    source = jsonl(tmp_path / "a.jsonl", [{"text": "good"}])
    with pytest.raises(DataError, match=r"a\.jsonl is in domains\.a and in targets\.t"):
        prepare(options_for(tmp_path, {"a": source}, targets={"t": source}), SerialRunner())


def test_another_tokenizer_or_row_length_is_refused(tmp_path):
    source = jsonl(tmp_path / "a.jsonl", [{"text": "good text"}])
    options = options_for(tmp_path, {"a": source})
    prepare(options, SerialRunner())
    before = contents(tmp_path / "out")
    trained = replace(options, tokenizer=TokenizerOptions(kind="train", vocab_size=257))
    with pytest.raises(
        ResumeError, match=rf"made with tokenizer byte:{ByteTokenizer.identity} .* has hf:[0-9a-f]{{64}}"
    ):
        prepare(trained, SerialRunner())
    with pytest.raises(ResumeError, match="has rows of 8 tokens; this config has row_tokens=12"):
        prepare(replace(options, row_tokens=12), SerialRunner())
    after = contents(tmp_path / "out")
    assert {path: sha for path, sha in after.items() if ".staging" not in path} == before


def test_two_preparations_of_one_output(tmp_path):
    source = jsonl(tmp_path / "a.jsonl", [{"text": "good text"}])
    options = options_for(tmp_path, {"a": source})

    class Intruder(SerialRunner):
        def run(self, function, jobs):
            with pytest.raises(ResumeError, match="another preparation is at work"):
                prepare(options, SerialRunner())
            return super().run(function, jobs)

    prepare(options, Intruder())
    assert Corpus.open(tmp_path / "out/train").manifest.domains["a"].documents == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"row_tokens": 6}, "row_tokens=6; it must be a positive multiple of 4"),
        ({"validation_share": 1.0}, "validation_share=1.0"),
        ({"unit_mb": 0}, "unit_mb=0"),
        ({"domains": {}}, "needed at least one domain"),
        ({"metadata": {"tokens": MetadataOptions()}}, "metadata key 'tokens'"),
        ({"targets": {"new\nline": SourceOptions()}}, r"domain name 'new\\nline' is empty, padded"),
    ],
)
def test_options_that_cannot_be_obeyed(tmp_path, change, message):
    with pytest.raises((ConfigError, DataError), match=message):
        options_for(tmp_path, **{"domains": {"a": SourceOptions()}, **change})


# --- running again ------------------------------------------------------------------------------------


class Counting(SerialRunner):
    """Counts the jobs of each function, and dies after so many of them."""

    def __init__(self, die_after=None):
        super().__init__()
        self.done = Counter()
        self.die_after = die_after

    def run(self, function, jobs):
        for number, result in super().run(function, jobs):
            self.done[getattr(function, "__name__", type(function).__name__)] += 1
            if self.done.total() == self.die_after:
                raise KeyboardInterrupt
            yield number, result


def three_domains(tmp_path, **more):
    domains = {
        name: jsonl(tmp_path / f"{name}.jsonl", [{"text": f"{name} document {n}"} for n in range(60)])
        for name in ("a", "b", "c")
    }
    return options_for(tmp_path, domains, unit_mb=0.0005, shard_mb=0.0001, validation_share=0.2, **more)


def test_stopped_after_any_job_and_run_again(tmp_path):
    """The same bytes as without the stop, and what was done is not done again."""
    options = three_domains(tmp_path)
    clean = Counting()
    prepare(options, clean)
    expected = contents(tmp_path / "out")
    total = clean.done.total()
    assert total > 60
    for stop in range(1, total, 9):
        again = replace(options, output=str(tmp_path / f"again{stop}"))
        first = Counting(die_after=stop)
        with pytest.raises(KeyboardInterrupt):
            prepare(again, first)
        assert not list((tmp_path / f"again{stop}").glob("*/manifest.json"))
        written = {path: os.stat(path).st_mtime_ns for path in (tmp_path / f"again{stop}").rglob("shards/*/*.arrow")}
        prepare(again, Counting())
        assert contents(tmp_path / f"again{stop}") == expected
        assert all(os.stat(path).st_mtime_ns == mtime for path, mtime in written.items())


def test_a_finished_preparation_does_nothing_again(tmp_path):
    options = three_domains(tmp_path)
    prepare(options, Counting())
    expected = contents(tmp_path / "out")
    again = Counting()
    summary = prepare(options, again)
    assert again.done.total() == 0
    assert summary.reused == ("train/a", "train/b", "train/c")
    assert contents(tmp_path / "out") == expected


def test_damaged_staging_and_shards_are_made_anew(tmp_path):
    options = three_domains(tmp_path)
    prepare(options, Counting())
    expected = contents(tmp_path / "out")
    again = replace(options, output=str(tmp_path / "again"))
    with pytest.raises(KeyboardInterrupt):
        prepare(again, Counting(die_after=40))
    for number, path in enumerate(sorted((tmp_path / "again").rglob("*"))):
        if path.is_file() and path.suffix in (".tokens", ".json", ".arrow"):
            content = path.read_bytes()
            damage = (content[:-3], b"", content[:-1] + bytes([content[-1] ^ 1]))[number % 3]
            path.write_bytes(damage)
    prepare(again, Counting())
    assert contents(tmp_path / "again") == expected


def test_a_changed_input_changes_its_domain_alone(tmp_path):
    options = three_domains(tmp_path)
    prepare(options, Counting())
    before = contents(tmp_path / "out")
    jsonl(tmp_path / "b.jsonl", [{"text": f"new {n}"} for n in range(10)])
    again = Counting()
    summary = prepare(options, again)
    assert summary.reused == ("train/a", "train/c")
    after = contents(tmp_path / "out")
    clean = replace(options, output=str(tmp_path / "clean"))
    prepare(clean, Counting())
    assert after == contents(tmp_path / "clean")
    changed = {path for path in before.keys() | after.keys() if before.get(path) != after.get(path)}
    assert all("/b/" in path or "/b." in path or path.endswith(".json") for path in changed)
    assert not (tmp_path / "out/train/shards/b/00005.arrow").exists()


def test_a_domain_removed_and_the_validation_given_up(tmp_path):
    options = three_domains(tmp_path)
    prepare(options, Counting())
    fewer = replace(options, domains={"a": options.domains["a"]}, validation_share=0.0)
    prepare(fewer, Counting())
    assert {path.split("/")[0] for path in contents(tmp_path / "out")} == {
        "train",
        "prepare.json",
        ".prepare.lock",
    }
    assert Corpus.open(tmp_path / "out/train").catalog.names == ("a",)
    assert sorted(path.name for path in (tmp_path / "out/train/shards").iterdir()) == ["a"]


def test_a_stop_while_replacing_a_domain_leaves_no_manifest_that_lies(tmp_path):
    options = three_domains(tmp_path)
    prepare(options, Counting())
    original = (tmp_path / "b.jsonl").read_bytes(), os.stat(tmp_path / "b.jsonl").st_mtime_ns
    before = contents(tmp_path / "out")
    jsonl(tmp_path / "b.jsonl", [{"text": f"B document {n}"} for n in range(60)])  # shards of the same size
    first = Counting()
    first.die_after = 12
    with pytest.raises(KeyboardInterrupt):
        prepare(options, first)
    assert first.done["write_shard"] > 0
    assert not (tmp_path / "out/train/manifest.json").exists()
    # Back to the old input: the domain's shards on disk are partly of the new one, and must not be believed.
    (tmp_path / "b.jsonl").write_bytes(original[0])
    os.utime(tmp_path / "b.jsonl", ns=(original[1], original[1]))
    summary = prepare(options, Counting())
    assert summary.reused == ("train/a", "train/c")
    assert contents(tmp_path / "out") == before
    assert verify(Corpus.open(tmp_path / "out/train")) == []


def test_a_preparation_on_an_object_store(tmp_path, s3):
    for n in range(3):
        with s3.filesystem.open_output_stream(f"corpora/raw/{n}.jsonl") as stream:
            stream.write("".join(json.dumps({"text": f"{n} {line}"}) + "\n" for line in range(50)).encode())
    options = PrepareOptions(
        output="s3://corpora/out",
        row_tokens=8,
        unit_mb=0.0003,
        validation_share=0.2,
        domains={"a": SourceOptions(files=("s3://corpora/raw/*.jsonl",))},
        storage=module.Storage(endpoint=s3.endpoint, region="us-east-1"),
    )
    summary = prepare(options, SerialRunner())
    corpus = Corpus.open("s3://corpora/out/train", storage=options.storage)
    held_out = Corpus.open("s3://corpora/out/validation", storage=options.storage)
    assert corpus.manifest == summary.manifests["train"]
    assert verify(corpus) == [] == verify(held_out)
    assert corpus.manifest.domains["a"].documents + held_out.manifest.domains["a"].documents == 150
    assert corpus.manifest.domains["a"].sources[0] == "s3://corpora/raw/0.jsonl"
    assert prepare(options, Counting()).reused == ("train/a",)


def test_a_folder_of_domains_and_targets(tmp_path):
    """Folders of files and single files are domains by their names, and what is named by hand goes before them."""
    raw = tmp_path / "raw"
    for name in ("train/sums/part-0", "train/sums/part-1", "train/songs/all", "train/.hidden/x", "extra"):
        jsonl(raw / f"{name}.jsonl", [{"text": name}])
    jsonl(raw / "targets/tests.v1.jsonl", [{"text": "tests"}])
    jsonl(raw / "targets/_notes.jsonl", [{"text": "notes"}])
    (raw / "train/poems.txt").write_text("poems")
    named = {"songs": SourceOptions(files=(f"{raw}/extra.jsonl",))}
    prepare(replace(options_for(tmp_path, named), folder=str(raw)), SerialRunner())
    train, targets = (Corpus.open(f"{tmp_path}/out/{corpus}") for corpus in ("train", "targets"))
    assert (train.catalog.names, targets.catalog.names) == (("poems", "songs", "sums"), ("tests",))
    found = {name: documents_in(train, name, ByteTokenizer().eos) for name in train.catalog.names}
    assert {name: sorted(bytes(one[:-1]).decode() for one in of.values()) for name, of in found.items()} == {
        "poems": ["poems"],
        "songs": ["extra"],
        "sums": ["train/sums/part-0", "train/sums/part-1"],
    }
    with pytest.raises(DataError, match=r"targets has nothing in train/; needed train/<domain>/<files>"):
        prepare(replace(options_for(tmp_path, {}, folder=f"{raw}/targets")), SerialRunner())
