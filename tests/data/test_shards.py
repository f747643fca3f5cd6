"""The shard format: what is written comes back, and what is not what was written is refused."""

import dataclasses
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pytest

from mixer.core.errors import ConfigError, DataError
from mixer.data import shards
from mixer.data.shards import Layout, Rows, ShardInfo, check_rows, dtype_for
from mixer.data.storage import TEMPORARY_SUFFIX

LOCAL = pafs.LocalFileSystem()
PATH = "shards/web/00000.arrow"


def make_rows(n: int = 7, row_tokens: int = 16, dtype: str = "uint16", seed: int = 0) -> Rows:
    rng = np.random.default_rng(seed)
    starts = [sorted(rng.choice(8, size=rng.integers(0, 4), replace=False).tolist()) for _ in range(n)]
    return Rows(
        tokens=rng.integers(0, 60_000, (n, row_tokens)).astype(dtype),
        length=rng.integers(8, row_tokens + 1, n).astype(np.int32),
        starts=pa.array(starts, pa.list_(pa.int32())),
        first_document=np.arange(n, dtype=np.int64) * 3,
        metadata={"topic": pa.array([f"t{i % 3}" for i in range(n)]), "score": pa.array(rng.random(n))},
    )


def written(root: Path, rows: Rows | None = None) -> tuple[ShardInfo, Rows]:
    rows = rows or make_rows()
    return shards.write(LOCAL, str(root), PATH, rows), rows


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
@pytest.mark.parametrize("n", [1, 7, 64])
def test_what_is_written_comes_back(tmp_path: Path, dtype: str, n: int) -> None:
    info, rows = written(tmp_path, make_rows(n, dtype=dtype))
    shard = shards.open(LOCAL, str(tmp_path), info, rows.layout)
    np.testing.assert_array_equal(shard.tokens, rows.tokens)
    assert shard.tokens.dtype == np.dtype(dtype)
    np.testing.assert_array_equal(shard.length, rows.length)
    np.testing.assert_array_equal(shard.first_document, rows.first_document)
    np.testing.assert_array_equal(shard.check, check_rows(rows.tokens))
    assert shard.starts.to_pylist() == rows.starts.to_pylist()
    assert shard.metadata("topic").to_pylist() == rows.metadata["topic"].to_pylist()
    np.testing.assert_array_equal(shard.take(np.array([n - 1, 0, 0])), rows.tokens[[n - 1, 0, 0]])
    shard.confirm(np.arange(n), shard.read(0, n))


def test_tokens_are_a_view_of_the_map_and_cannot_be_written(tmp_path: Path) -> None:
    info, rows = written(tmp_path)
    shard = shards.open(LOCAL, str(tmp_path), info, rows.layout)
    assert not shard.tokens.flags.writeable
    assert np.shares_memory(shard.tokens, shard.read(2, 4))
    raw = (tmp_path / PATH).read_bytes()
    start = info.tokens_offset + 2 * rows.layout.row_bytes
    assert raw[start : start + rows.layout.row_bytes] == rows.tokens[2].tobytes()


def test_open_shards_hold_no_file_descriptors(tmp_path: Path) -> None:
    info, rows = written(tmp_path)
    before = len(os.listdir("/proc/self/fd"))
    held = [shards.open(LOCAL, str(tmp_path), info, rows.layout) for _ in range(50)]
    assert all(shard.tokens[0, 0] == rows.tokens[0, 0] for shard in held)
    assert len(os.listdir("/proc/self/fd")) - before < 5


def test_the_same_rows_give_the_same_bytes(tmp_path: Path) -> None:
    one, _ = written(tmp_path / "a")
    other, _ = written(tmp_path / "b")
    assert one == other
    assert (tmp_path / "a" / PATH).read_bytes() == (tmp_path / "b" / PATH).read_bytes()


def test_metadata_columns_lie_in_the_order_of_their_names(tmp_path: Path) -> None:
    rows = make_rows()
    turned = dataclasses.replace(rows, metadata=dict(reversed(list(rows.metadata.items()))))
    assert written(tmp_path, rows)[0] == written(tmp_path, turned)[0]


def test_check_rows_is_the_wrapping_sum_of_words() -> None:
    tokens = np.array([[1, 2, 3, 4, 0xFFFF, 0xFFFF, 0xFFFF, 0xFFFF]], np.uint16)
    first = 1 + (2 << 16) + (3 << 32) + (4 << 48)
    assert check_rows(tokens).tolist() == [(first + (1 << 64) - 1) % (1 << 64)]
    assert check_rows(tokens[:, ::-1]).shape == (1,)


def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(DataError, match="No space left"):
        written(tmp_path)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    assert not list(tmp_path.rglob(f"*{TEMPORARY_SUFFIX}"))


@pytest.mark.parametrize("keep", ["0", "5", "8", "half", "-1", "-6", "-11"])
def test_a_truncated_shard_is_refused_with_domain_and_path(tmp_path: Path, keep: str) -> None:
    info, rows = written(tmp_path)
    content = (tmp_path / PATH).read_bytes()
    stop = len(content) // 2 if keep == "half" else int(keep) % len(content)
    (tmp_path / PATH).write_bytes(content[:stop])
    with pytest.raises(DataError, match=rf"00000.arrow of domain 'web' has {stop} bytes.*says {info.bytes}"):
        shards.open(LOCAL, str(tmp_path), info, rows.layout, domain="web")
    # Also where the manifest was made for the cut file: it is no Arrow file then.
    with pytest.raises(DataError, match="'web'"):
        cut = dataclasses.replace(info, bytes=stop)
        shards.open(LOCAL, str(tmp_path), cut, rows.layout, domain="web")


def test_a_missing_shard_is_refused(tmp_path: Path) -> None:
    info, rows = written(tmp_path)
    (tmp_path / PATH).unlink()
    with pytest.raises(DataError, match=r"00000.arrow of domain 'web' is missing"):
        shards.open(LOCAL, str(tmp_path), info, rows.layout, domain="web")


def test_a_foreign_schema_is_refused_with_both_schemas(tmp_path: Path) -> None:
    info, _ = written(tmp_path)
    other = Layout(row_tokens=16, dtype="uint16", metadata={"topic": "string", "score": "int64"})
    with pytest.raises(DataError, match=r"found \[.*score: double.*needed \[.*score: int64"):
        shards.open(LOCAL, str(tmp_path), info, other)


def test_a_shard_of_a_newer_format_is_refused(tmp_path: Path) -> None:
    info, rows = written(tmp_path)
    schema = rows.layout.schema.with_metadata({"mixer.shard": "2"})
    info = foreign(tmp_path, schema, pa.ipc.open_file(pa.memory_map(str(tmp_path / PATH))).get_batch(0))
    with pytest.raises(DataError, match=r"has format 2; this version reads up to 1.*newer"):
        shards.open(LOCAL, str(tmp_path), info, rows.layout)


def test_an_extension_type_is_refused_and_not_loaded(tmp_path: Path) -> None:
    info, rows = written(tmp_path)
    marker = tmp_path / "marker"
    batch = pa.ipc.open_file(pa.memory_map(str(tmp_path / PATH))).get_batch(0)
    evil = {
        b"ARROW:extension:name": b"arrow.py_extension_type",
        b"ARROW:extension:metadata": b"cposix\nsystem\n(S'touch " + str(marker).encode() + b"'\ntR.",
    }
    schema = rows.layout.schema
    schema = schema.set(0, schema.field(0).with_metadata(evil))
    info = foreign(tmp_path, schema, batch)
    with pytest.raises(DataError, match=r"another schema.*py_extension_type"):
        shards.open(LOCAL, str(tmp_path), info, rows.layout)
    assert not marker.exists()


def foreign(root: Path, schema: pa.Schema, batch: pa.RecordBatch) -> ShardInfo:
    """Put a batch under another schema into the shard's place, with a manifest entry that fits the file."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, schema) as writer:
        writer.write_batch(pa.RecordBatch.from_arrays(batch.columns, schema=schema))
    content = sink.getvalue()
    (root / PATH).unlink()
    (root / PATH).write_bytes(content)
    tokens = pa.ipc.open_file(pa.BufferReader(content)).get_batch(0).column("tokens")
    offset = tokens.values.buffers()[1].address - content.address
    return ShardInfo(
        path=PATH,
        rows=batch.num_rows,
        bytes=content.size,
        sha256="0" * 64,
        head_sha256="0" * 64,
        tokens_offset=offset,
    )


@pytest.mark.parametrize("change", [{"rows": 6}, {"tokens_offset": 64}, {"rows": 70_000}])
def test_counts_that_do_not_fit_the_file_are_refused(tmp_path: Path, change: dict[str, int]) -> None:
    info, rows = written(tmp_path)
    with pytest.raises(DataError, match="'web'"):
        shards.open(LOCAL, str(tmp_path), dataclasses.replace(info, **change), rows.layout, domain="web")


def test_a_flipped_token_is_found_when_its_row_is_read(tmp_path: Path) -> None:
    info, rows = written(tmp_path)
    with (tmp_path / PATH).open("r+b") as file:
        file.seek(info.tokens_offset + 4 * rows.layout.row_bytes + 9)
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 0x10]))
    shard = shards.open(LOCAL, str(tmp_path), info, rows.layout, domain="web")
    good = np.array([0, 1, 2, 3, 5, 6])
    shard.confirm(good, shard.take(good))
    with pytest.raises(DataError, match=r"00000.arrow of domain 'web' row 4: the tokens do not add up"):
        shard.confirm(np.array([6, 4]), shard.take(np.array([6, 4])))


def test_every_flipped_byte_of_the_head_is_found_before_a_row_is_used(tmp_path: Path) -> None:
    info, rows = written(tmp_path)
    content = (tmp_path / PATH).read_bytes()
    for place in range(0, info.tokens_offset, 7):
        (tmp_path / PATH).unlink()
        (tmp_path / PATH).write_bytes(flipped(content, place))
        with pytest.raises(DataError, match="'web'"):
            shard = shards.open(LOCAL, str(tmp_path), info, rows.layout, domain="web")
            shard.confirm(np.arange(len(shard)), shard.tokens)


def test_a_shard_replaced_by_another_of_the_same_size_is_refused_at_first_use(tmp_path: Path) -> None:
    info, rows = written(tmp_path, make_rows(seed=1))
    other = make_rows(seed=1)
    other.tokens[3] ^= 1
    replaced, _ = written(tmp_path, other)
    assert replaced.bytes == info.bytes
    shard = shards.open(LOCAL, str(tmp_path), info, rows.layout, domain="web")
    with pytest.raises(DataError, match="other columns beside its tokens than the manifest promised"):
        shard.confirm(np.array([0]), shard.read(0, 1))


def flipped(content: bytes, place: int) -> bytes:
    return content[:place] + bytes([content[place] ^ 0x40]) + content[place + 1 :]


@pytest.mark.parametrize("row_tokens", [0, 2, 6, 2049])
def test_rows_must_be_whole_words(row_tokens: int) -> None:
    with pytest.raises(ConfigError, match="multiple of 4"):
        Layout(row_tokens=row_tokens, dtype="uint16")


@pytest.mark.parametrize("key", ["tokens", "check", "", "a\nb"])
def test_reserved_and_unprintable_metadata_keys_are_refused(key: str) -> None:
    with pytest.raises(ConfigError, match="Rename it"):
        Layout(row_tokens=16, dtype="uint16", metadata={key: "string"})


def test_the_token_type_follows_the_vocabulary() -> None:
    assert [dtype_for(257), dtype_for(65_536), dtype_for(65_537)] == ["uint16", "uint16", "uint32"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"length": np.full(7, 17, np.int32)}, "row 0 cannot be written: its length"),
        ({"length": np.array([8] * 6 + [0], np.int32)}, "row 6 cannot be written: its length"),
        ({"first_document": np.array([0, -1, 0, 0, 0, 0, 0])}, "row 1 cannot be written: its first document"),
        ({"starts": pa.array([[0]] * 5 + [[3, 3], []], pa.list_(pa.int32()))}, "row 5.*do not ascend"),
        ({"starts": pa.array([[0]] * 6 + [[16]], pa.list_(pa.int32()))}, "row 6.*outside of its text"),
        ({"length": np.full(6, 16, np.int32)}, "All need one size"),
        ({"starts": pa.array([[0]] * 7)}, "needs list<int32>"),
    ],
)
def test_rows_that_cannot_be_are_not_written(tmp_path: Path, change: dict, message: str) -> None:
    rows = dataclasses.replace(make_rows(), **change)
    with pytest.raises(DataError, match=message):
        shards.write(LOCAL, str(tmp_path), PATH, rows)


def test_remote_rows_are_fetched_by_exact_ranges(s3) -> None:
    rows = make_rows(n=64, row_tokens=256)
    info = shards.write(s3.filesystem, "corpora/ranges", PATH, rows)
    s3.log.clear()
    shard = shards.open(s3.filesystem, "corpora/ranges", info, rows.layout, domain="web")
    assert sum(size for *_, size in s3.gets()) < info.bytes - info.rows * rows.layout.row_bytes

    s3.log.clear()
    np.testing.assert_array_equal(shard.read(10, 13), rows.tokens[10:13])
    first = info.tokens_offset + 10 * rows.layout.row_bytes
    last = first + 3 * rows.layout.row_bytes - 1
    assert [(asked, size) for _, asked, size in s3.gets()] == [(f"bytes={first}-{last}", last + 1 - first)]

    s3.log.clear()
    np.testing.assert_array_equal(shard.take(np.array([41, 3, 40, 3])), rows.tokens[[41, 3, 40, 3]])
    assert sorted(size for *_, size in s3.gets()) == [rows.layout.row_bytes, 2 * rows.layout.row_bytes]


def test_remote_columns_fetch_no_tokens(s3) -> None:
    rows = make_rows(n=64, row_tokens=256)
    info = shards.write(s3.filesystem, "corpora/columns", PATH, rows)
    shard = shards.open(s3.filesystem, "corpora/columns", info, rows.layout)
    s3.log.clear()
    assert shard.columns(["topic"]).column("topic").to_pylist() == rows.metadata["topic"].to_pylist()
    one_column = sum(size for *_, size in s3.gets())
    assert 0 < one_column < 2_500
    s3.log.clear()
    np.testing.assert_array_equal(shard.length, rows.length)
    shard.confirm(np.arange(64), rows.tokens)
    assert [size for *_, size in s3.gets()] == [info.tokens_offset]


def test_remote_shards_are_refused_like_local_ones(s3) -> None:
    rows = make_rows(n=8)
    info = shards.write(s3.filesystem, "corpora/bad", PATH, rows)
    for change, message in [
        ({"bytes": info.bytes + 1}, "the manifest says"),
        ({"rows": 7}, "rows in 1 batches"),
        ({"path": "shards/none.arrow"}, "is missing"),
        ({"tokens_offset": info.tokens_offset - 8}, "rows in 1 batches"),
    ]:
        with pytest.raises(DataError, match=message):
            shards.open(s3.filesystem, "corpora/bad", dataclasses.replace(info, **change), rows.layout)
    with s3.filesystem.open_output_stream(f"corpora/bad/{PATH}") as stream:
        stream.write(bytes(info.bytes))
    with pytest.raises(DataError, match="not an Arrow file"):
        shards.open(s3.filesystem, "corpora/bad", info, rows.layout)


@pytest.mark.parametrize("rows", [[7], [-1], [0, 8]])
def test_rows_that_a_shard_has_not_are_refused(tmp_path: Path, rows: list[int]) -> None:
    info, written_rows = written(tmp_path)
    shard = shards.open(LOCAL, str(tmp_path), info, written_rows.layout, domain="web")
    with pytest.raises(DataError, match=r"of domain 'web' has 7 rows; asked for"):
        shard.take(np.array(rows))
    with pytest.raises(DataError, match=r"of domain 'web' has 7 rows; asked for"):
        shard.read(min(rows), max(rows) + 1)
