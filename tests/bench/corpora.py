"""Large corpora of random tokens, made once a folder, for benchmarks."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs

from mixer.data import documents, shards
from mixer.data.corpus import Corpus
from mixer.data.manifest import DomainInfo, Manifest, TokenizerInfo, documents_path, shard_path, write_manifest
from mixer.data.shards import Layout, Rows

VOCABULARY = 30_000


def random_corpus(
    root: Path,
    num_rows: Mapping[str, int],
    row_tokens: int,
    shard_rows: int = 16_384,
    vocabulary: int = VOCABULARY,
) -> Corpus:
    """A corpus with two documents a row, found again where it was made before."""
    if (root / "manifest.json").exists():
        return Corpus.open(root)
    store = pafs.LocalFileSystem()
    rng = np.random.default_rng(0)
    domains: dict[str, DomainInfo] = {}
    for name, count in sorted(num_rows.items()):
        infos = []
        for first in range(0, count, shard_rows):
            size = min(shard_rows, count - first)
            rows = Rows(
                tokens=rng.integers(0, vocabulary, (size, row_tokens), dtype=np.uint16),
                length=np.full(size, row_tokens, np.int32),
                starts=pa.array([[0, row_tokens // 2]] * size, pa.list_(pa.int32())),
                first_document=2 * np.arange(first, first + size),
            )
            infos.append(shards.write(store, str(root), shard_path(name, len(infos)), rows))
        listed = documents.write(
            store,
            str(root),
            documents_path(name),
            file=np.zeros(2 * count, np.int64),
            record=np.arange(2 * count),
            tokens=np.full(2 * count, row_tokens // 2),
        )
        domains[name] = DomainInfo(
            rows=count,
            documents=2 * count,
            tokens=count * row_tokens,
            padding=0,
            sources=("random",),
            shards=tuple(infos),
            documents_file=listed,
        )
    layout = Layout(row_tokens=row_tokens, dtype="uint16")
    tokenizer = TokenizerInfo(kind="byte", identity="0" * 16, vocab_size=vocabulary, eos=0)
    write_manifest(store, str(root), Manifest(layout=layout, tokenizer=tokenizer, domains=domains))
    return Corpus.open(root)
