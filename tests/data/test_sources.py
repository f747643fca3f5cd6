import gzip
import json
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixer.core.errors import ConfigError, DataError
from mixer.data.reading import Reading
from mixer.data.sources import (
    MetadataOptions,
    Slice,
    SourceOptions,
    cast_value,
    check_parquet,
    cut_units,
    find_files,
    refuse_doubles,
)
from mixer.data.storage import Storage

LOCAL = Storage()
EXTRA = {"score": MetadataOptions(), "topic": MetadataOptions(group=True, default="none")}


def read(folder, pattern="*", *, unit_bytes=1 << 20, metadata=None, **options):
    """Everything a domain gives: [(file name, record, text, values)], skipped; records made absolute."""
    of_domain = SourceOptions(files=(f"{folder}/{pattern}",), **options)
    files = find_files(of_domain, LOCAL, "domains.d")
    footers = {
        n: check_parquet(LOCAL, [file], of_domain, metadata or {}, "domains.d")[0]
        for n, file in enumerate(files)
        if file.format == "parquet"
    }
    reading = Reading(LOCAL, of_domain, metadata or {}, "domains.d")
    found, passed = [], {}
    for unit in cut_units(files, of_domain, unit_bytes, footers):
        for part in unit:
            base = passed.get(part.file, 0)
            name = os.path.basename(files[part.file].path)
            found += [(name, base + d.record, d.text, d.values) for d in reading.documents(files[part.file], part)]
            passed[part.file] = base + reading.num_records
    return found, dict(reading.skipped)


def jsonl(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def texts(folder, *args, **options):
    return [text for _, _, text, _ in read(folder, *args, **options)[0]]


# --- documents of every format -----------------------------------------------------------------


def test_json_lines(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(
        b'\xef\xbb\xbf{"text": "one"}\n\n{"text": "t\\u00e9", "n": 1}\r\n{"text": "last"}'
    )
    found, skipped = read(tmp_path)
    assert [(record, text) for _, record, text, _ in found] == [(0, "one"), (2, "té"), (3, "last")]
    assert skipped == {}


@pytest.mark.parametrize(
    ("split", "expected"),
    [
        ("file", [(0, "a b\r\nc\n\n \n\nd")]),
        ("lines", [(0, "a b"), (1, "c"), (5, "d")]),
        ("blank", [(0, "a b\nc"), (1, "d")]),
    ],
)
def test_text(tmp_path, split, expected):
    (tmp_path / "a.txt").write_bytes(b"a b\r\nc\n\n \n\nd")
    found, skipped = read(tmp_path, split=split)
    assert [(record, text) for _, record, text, _ in found] == expected
    assert skipped == ({"empty": 2, "blank": 1} if split == "lines" else {})


def test_compressed_files_of_many_members(tmp_path):
    lines = [json.dumps({"text": f"line {n}"}).encode() + b"\n" for n in range(1000)]
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b"".join(lines[:500])) + gzip.compress(b"".join(lines[500:])))
    codec = pa.Codec("zstd")
    (tmp_path / "b.jsonl.zst").write_bytes(
        codec.compress(b"".join(lines[:500]), asbytes=True) + codec.compress(b"".join(lines[500:]), asbytes=True)
    )
    expected = [f"line {n}" for n in range(1000)]
    assert texts(tmp_path) == expected * 2


def test_parquet_reads_only_what_is_named(tmp_path):
    table = pa.table(
        {
            "text": pa.array(["a", None, "", "b"]).dictionary_encode(),
            "score": [1.0, 2.0, 3.0, float("nan")],
            "other": [[1]] * 4,
        }
    )
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=3)
    metadata = {"score": MetadataOptions(default=0.5), "topic": EXTRA["topic"]}
    found, skipped = read(tmp_path, metadata=metadata, unit_bytes=1)
    assert found == [("a.parquet", 0, "a", (1.0, "none")), ("a.parquet", 3, "b", (0.5, "none"))]
    assert skipped == {"null": 1, "empty": 1}


# --- units ---------------------------------------------------------------------------------------


@given(
    lines=st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\n\r\ufeff"), max_size=30), max_size=30),
    unit_bytes=st.integers(1, 60),
    ends=st.booleans(),
)
def test_byte_ranges_give_every_line_once(tmp_path_factory, lines, unit_bytes, ends):
    folder = tmp_path_factory.mktemp("lines")
    (folder / "a.txt").write_text("\n".join(lines) + ("\n" if ends else ""), newline="")
    found, _ = read(folder, unit_bytes=unit_bytes, split="lines")
    usable = [(n, line) for n, line in enumerate(lines) if line and not line.isspace()]
    assert [(record, text) for _, record, text, _ in found] == usable


def test_units_depend_on_sizes_alone(tmp_path):
    for name, size in (("a", 10), ("b", 10), ("c", 25), ("d", 5)):
        (tmp_path / f"{name}.txt").write_text("x" * size)
    options = SourceOptions(files=(f"{tmp_path}/*",))
    files = find_files(options, LOCAL, "d")
    assert cut_units(files, options, 20, {}) == [(Slice(0), Slice(1)), (Slice(2),), (Slice(3),)]
    by_line = SourceOptions(files=(f"{tmp_path}/*",), split="lines")
    assert cut_units(files, by_line, 20, {}) == [
        (Slice(0), Slice(1)),
        (Slice(2, 0, 20),),
        (Slice(2, 20, 25), Slice(3)),
    ]


def test_row_groups_are_units(tmp_path):
    pq.write_table(pa.table({"text": [f"{n} " * 100 for n in range(40)]}), tmp_path / "a.parquet", row_group_size=10)
    options = SourceOptions(files=(f"{tmp_path}/*",))
    files = find_files(options, LOCAL, "d")
    footer = check_parquet(LOCAL, files, options, {}, "d")[0]
    assert cut_units(files, options, 1, {0: footer}) == [(Slice(0, n, n + 1),) for n in range(4)]
    assert [text.split()[0] for text in texts(tmp_path, unit_bytes=1)] == [str(n) for n in range(40)]


# --- bad documents: a fixed rule each --------------------------------------------------------------


def test_documents_that_are_skipped_and_counted(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(
        b'{"text": null}\n{"text": ""}\n{"text": " \\n\\t"}\n{"other": 1}\n{"text": "\xff"}\n'
        b'{"text": "\\ud800"}\n'
        b'{"text": "good"}\n'
    )
    found, skipped = read(tmp_path)
    assert [(record, text) for _, record, text, _ in found] == [(6, "good")]
    assert skipped == {"null": 1, "empty": 1, "blank": 1, "missing": 1, "invalid_utf8": 2}


def test_text_files_that_are_not_utf8_are_skipped(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    (tmp_path / "b.txt").write_bytes("café".encode())
    found, skipped = read(tmp_path)
    assert [(name, text) for name, _, text, _ in found] == [("b.txt", "café")]
    assert skipped == {"invalid_utf8": 1}


def test_parquet_strings_that_are_not_utf8_are_skipped(tmp_path):
    raw = pa.array([b"good", b"\xff\xfe", None, b"fine"], pa.binary())
    pq.write_table(pa.table({"text": raw.view(pa.string())}), tmp_path / "a.parquet")
    found, skipped = read(tmp_path)
    assert [text for _, _, text, _ in found] == ["good", "fine"]
    assert skipped == {"invalid_utf8": 1, "null": 1}


@pytest.mark.parametrize(
    ("line", "message", "reason"),
    [
        ('{"text": "cut', r"a\.jsonl, line 2 is not JSON", "invalid_json"),
        ("[" * 100_000, r"a\.jsonl, line 2 is not JSON", "invalid_json"),
        ('["text"]', r"a\.jsonl, line 2 is list, not an object", "wrong_type"),
        ('{"text": 7}', r"a\.jsonl, line 2: 'text' is int, not a string", "wrong_type"),
    ],
)
def test_records_that_are_refused_unless_skipped(tmp_path, line, message, reason):
    (tmp_path / "a.jsonl").write_text('{"text": "good"}\n' + line + "\n")
    with pytest.raises(DataError, match=rf"domains\.d: .*{message}"):
        read(tmp_path)
    found, skipped = read(tmp_path, bad_records="skip")
    assert ([text for _, _, text, _ in found], skipped) == (["good"], {reason: 1})


def test_a_line_of_a_later_range_is_named_by_its_bytes(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "good"}\n' * 3 + "{bad\n")
    with pytest.raises(DataError, match="line 1 after byte 40 is not JSON"):
        read(tmp_path, unit_bytes=40)


def test_metadata_missing_or_of_another_type(tmp_path):
    jsonl(tmp_path / "a.jsonl", {"text": "a", "score": 1, "topic": "x"}, {"text": "b", "score": 0.5})
    found, _ = read(tmp_path, metadata=EXTRA)
    assert [values for _, _, _, values in found] == [(1.0, "x"), (0.5, "none")]
    jsonl(tmp_path / "a.jsonl", {"text": "a", "score": 1}, {"text": "b"})
    with pytest.raises(DataError, match=r"a\.jsonl, line 2 has no metadata 'score'"):
        read(tmp_path, metadata=EXTRA)
    jsonl(tmp_path / "a.jsonl", {"text": "a", "score": "high"})
    with pytest.raises(DataError, match=r"line 1 has metadata score='high'; needed a value of type float64"):
        read(tmp_path, metadata=EXTRA)


@pytest.mark.parametrize(
    ("value", "kind", "expected"),
    [
        ("a", "string", "a"),
        (1, "string", None),
        ("\ud800", "string", None),
        (3, "int64", 3),
        (3.0, "int64", 3),
        (3.5, "int64", None),
        (True, "int64", None),
        (1 << 63, "int64", None),
        (2, "float64", 2.0),
        (float("inf"), "float64", None),
        ("2", "float64", None),
        (10**400, "float64", None),
    ],
)
def test_values_are_not_guessed(value, kind, expected):
    found = cast_value(value, kind)
    assert found == expected
    assert type(found) is type(expected)


# --- damaged files -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst"])
@pytest.mark.parametrize("how", ["cut", "flipped", "no such format"])
def test_damaged_compression_names_the_file(tmp_path, name, how):
    content = "".join(json.dumps({"text": f"line {n} {n * n}"}) + "\n" for n in range(2000)).encode()
    packed = gzip.compress(content) if name.endswith("gz") else pa.Codec("zstd").compress(content, asbytes=True)
    if how == "cut":
        packed = packed[: len(packed) // 2]
    elif how == "flipped":
        packed = packed[:-200] + bytes(byte ^ 0xFF for byte in packed[-200:-100]) + packed[-100:]
    else:
        packed = content
    (tmp_path / name).write_bytes(packed)
    with pytest.raises(DataError, match=rf"domains\.d: .*{name} cannot be read to its end"):
        read(tmp_path)


def test_truncated_parquet_is_refused_at_start(tmp_path):
    pq.write_table(pa.table({"text": ["a"] * 100}), tmp_path / "a.parquet")
    content = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "a.parquet").write_bytes(content[:-20])
    with pytest.raises(DataError, match=r"domains\.d: .*a\.parquet is not a whole Parquet file"):
        read(tmp_path)


def test_a_bad_row_group_is_named(tmp_path):
    table = pa.table({"text": [os.urandom(40).hex() for _ in range(2000)]})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=1000, compression="zstd", use_dictionary=False)
    place = pq.read_metadata(tmp_path / "a.parquet").row_group(1).column(0).data_page_offset
    content = bytearray((tmp_path / "a.parquet").read_bytes())
    content[place + 100 : place + 300] = bytes(200)
    (tmp_path / "a.parquet").write_bytes(content)
    with pytest.raises(DataError, match=r"row group 1 of .*a\.parquet cannot be read"):
        read(tmp_path)


@pytest.mark.parametrize("column", [{"body": ["a"]}, {"text": [1]}, {"text": [b"a"]}])
def test_schema_mismatch_shows_both(tmp_path, column):
    pq.write_table(pa.table(column), tmp_path / "a.parquet")
    name, values = next(iter(column.items()))
    with pytest.raises(DataError) as caught:
        read(tmp_path)
    assert f"Found the columns [{name}: {pa.array(values).type}]; needed [text: string]" in str(caught.value)
    assert "a.parquet" in str(caught.value)


def test_a_file_changed_or_gone_since_planning(tmp_path):
    options = SourceOptions(files=(f"{tmp_path}/*",))
    (tmp_path / "a.txt").write_text("one")
    files = find_files(options, LOCAL, "d")
    (tmp_path / "a.txt").write_text("other")
    with pytest.raises(DataError, match="was changed since the work began"):
        list(Reading(LOCAL, options, {}, "d").documents(files[0], Slice(0)))
    (tmp_path / "a.txt").unlink()
    with pytest.raises(DataError, match="is gone since the work began"):
        list(Reading(LOCAL, options, {}, "d").documents(files[0], Slice(0)))


# --- patterns ------------------------------------------------------------------------------------------


def names(root, pattern):
    options = SourceOptions(files=(f"{root}/{pattern}",))
    return [os.path.relpath(file.path, root) for file in find_files(options, LOCAL, "d")]


def test_patterns(tmp_path):
    for path in ("a.txt", "b.jsonl", "sub/c.txt", "sub/deep/d.txt", ".hidden.txt"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text("x")
    assert names(tmp_path, "*") == ["a.txt", "b.jsonl"]
    assert names(tmp_path, "*/*.txt") == ["sub/c.txt"]
    assert names(tmp_path, "**/*.txt") == ["a.txt", "sub/c.txt", "sub/deep/d.txt"]
    assert names(tmp_path, "**") == ["a.txt", "b.jsonl", "sub/c.txt", "sub/deep/d.txt"]
    assert names(tmp_path, "[ab].*") == ["a.txt", "b.jsonl"]
    assert names(tmp_path, "sub/c.txt") == ["sub/c.txt"]


def test_no_match_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"d: no file matches .*/\*\.txt"):
        names(tmp_path, "*.txt")
    with pytest.raises(DataError, match=r"d: no file matches .*/nothing"):
        names(tmp_path, "nothing")
    with pytest.raises(ConfigError, match="d names no files"):
        find_files(SourceOptions(), LOCAL, "d")


def test_relative_patterns_show_relative_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw/a.txt").write_text("x")
    (file,) = find_files(SourceOptions(files=("raw/*",)), LOCAL, "d")
    assert (file.shown, file.path) == ("raw/a.txt", f"{tmp_path}/raw/a.txt")


def test_doubles_are_refused(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "link.txt").symlink_to(tmp_path / "a.txt")
    first = find_files(SourceOptions(files=(f"{tmp_path}/a.txt",)), LOCAL, "d")
    linked = find_files(SourceOptions(files=(f"{tmp_path}/link.txt",)), LOCAL, "d")
    with pytest.raises(DataError, match=r"link\.txt is in domains\.x and in targets\.y"):
        refuse_doubles({"domains.x": first, "targets.y": linked})
    twice = find_files(
        SourceOptions(
            files=(
                f"{tmp_path}/a.txt",
                f"{tmp_path}/a.*",
            )
        ),
        LOCAL,
        "d",
    )
    with pytest.raises(DataError, match=r"a\.txt is twice in domains\.x"):
        refuse_doubles({"domains.x": twice})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SourceOptions(format="csv"), "format='csv'; needed one of auto, parquet, jsonl, text"),
        (lambda: SourceOptions(split="words"), "split='words'"),
        (lambda: MetadataOptions(reduce="sum"), "reduce='sum'"),
        (lambda: MetadataOptions(group=True, type="float64"), "Only strings and whole numbers can group"),
        (lambda: MetadataOptions(default="high"), "default='high'; needed a value of type float64"),
    ],
)
def test_options_that_cannot_be_obeyed(make, message):
    with pytest.raises(ConfigError, match=message):
        make()
