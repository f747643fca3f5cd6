"""Writes the bed's tokens in each peer's own format, uncompressed, as its documentation advises.

A layout is built in a folder beside its place and moved there when whole, so a killed build leaves
nothing that looks finished. Run as a program it builds the layouts named on the command line; the
bench does so in a process of its own, because some of these libraries cannot share one.
"""

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from tests.bench.peers.bed import NUM_DOMAINS, ROW_TOKENS, Bed
from tests.bench.peers.ours import write_corpus

STUBS = Path(__file__).parent / "stubs"
CHUNK = "64MB"
PARQUET_ROWS = 512  # so that a small domain has blocks for every rank


def write_raw(bed: Bed, folder: Path) -> None:
    """One file, domain after domain: for the limit and for everyone who reads memory maps."""
    with (folder / "tokens.bin").open("wb") as file:
        for domain in range(NUM_DOMAINS):
            bed.tokens_of(domain).tofile(file)


def write_mds(bed: Bed, folder: Path) -> None:
    """MosaicML Streaming."""
    sys.path.insert(0, str(STUBS))
    from streaming import MDSWriter

    for domain in range(NUM_DOMAINS):
        columns = {"tokens": f"ndarray:uint16:{ROW_TOKENS}"}
        with MDSWriter(out=str(folder / str(domain)), columns=columns) as writer:
            for row in bed.tokens_of(domain):
                writer.write({"tokens": row})


def write_litdata(bed: Bed, folder: Path) -> None:
    """LitData chunks of tokens, one row an item."""
    import torch
    from litdata.streaming.item_loader import TokensLoader
    from litdata.streaming.writer import BinaryWriter

    for domain in range(NUM_DOMAINS):
        place = folder / str(domain)
        place.mkdir()
        writer = BinaryWriter(str(place), chunk_bytes=CHUNK, item_loader=TokensLoader(block_size=ROW_TOKENS))
        for number, row in enumerate(bed.tokens_of(domain)):
            writer[number] = torch.from_numpy(row)
        writer.done()
        writer.merge()


def write_hf(bed: Bed, folder: Path) -> None:
    """Hugging Face datasets: Arrow with fixed-size lists, saved to disk."""
    import datasets
    import pyarrow as pa
    from datasets.table import InMemoryTable

    datasets.disable_progress_bars()
    features = datasets.Features({"tokens": datasets.Sequence(datasets.Value("uint16"), length=ROW_TOKENS)})
    for domain in range(NUM_DOMAINS):
        flat = pa.array(bed.tokens_of(domain).reshape(-1))
        table = pa.table({"tokens": pa.FixedSizeListArray.from_arrays(flat, ROW_TOKENS)})
        info = datasets.DatasetInfo(features=features)
        datasets.Dataset(InMemoryTable(table), info=info).save_to_disk(str(folder / str(domain)))


def write_arrayrecord(bed: Bed, folder: Path) -> None:
    """ArrayRecord, grain's own format, one record a group so that rows are found one by one."""
    from array_record.python import array_record_module  # pyright: ignore[reportAttributeAccessIssue]

    for domain in range(NUM_DOMAINS):
        place = str(folder / f"{domain}.arrayrecord")
        writer = array_record_module.ArrayRecordWriter(place, "group_size:1,uncompressed")
        for row in bed.tokens_of(domain):
            writer.write(row.tobytes())
        writer.close()


def write_parquet(bed: Bed, folder: Path) -> None:
    """Parquet for Ray Data: a row is one value of a fixed size, which its batches show without a copy."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    for domain in range(NUM_DOMAINS):
        place = folder / str(domain)
        place.mkdir()
        tokens = bed.tokens_of(domain)
        for number, first in enumerate(range(0, len(tokens), PARQUET_ROWS)):
            part = tokens[first : first + PARQUET_ROWS]
            kind = pa.binary(2 * ROW_TOKENS)
            column = pa.FixedSizeBinaryArray.from_buffers(kind, len(part), [None, pa.py_buffer(part.tobytes())])
            table = pa.table({"tokens": column})
            pq.write_table(
                table, place / f"{number:04}.parquet", compression="none", use_dictionary=False, write_statistics=False
            )


WRITERS: dict[str, Callable[[Bed, Path], None]] = {
    "raw": write_raw,
    "mds": write_mds,
    "litdata": write_litdata,
    "hf": write_hf,
    "arrayrecord": write_arrayrecord,
    "mixer": write_corpus,
    "parquet": write_parquet,
}


def build(bed: Bed, layout: str) -> None:
    """Does nothing where the layout is there already."""
    if bed.folder(layout).exists():
        return
    unfinished = bed.root / f"{layout}.unfinished"
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    WRITERS[layout](bed, unfinished)
    unfinished.rename(bed.folder(layout))


def read_once(bed: Bed, layout: str) -> int:
    """Bring a layout into the page cache, so that no peer pays for the disk. Returns its bytes."""
    total = 0
    buffer = bytearray(1 << 22)
    for place in sorted(bed.folder(layout).rglob("*")):
        if place.is_file():
            with place.open("rb", buffering=0) as file:
                while count := file.readinto(buffer):
                    total += count
    return total


def main(root: str, *layouts: str) -> None:
    bed = Bed.load(Path(root))
    for layout in layouts:
        build(bed, layout)
    sys.stdout.flush()
    os._exit(0)  # some of these libraries leave threads behind that would hold up a plain exit


if __name__ == "__main__":
    main(*sys.argv[1:])
