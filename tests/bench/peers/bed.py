"""The test bed every reader stands on: which rows exist, where they lie, in what shares.

A `Bed` is a folder with the same tokens in every peer's own format. Row i of domain d starts with
the tokens (d, i mod 65536, i div 65536), so that whatever a reader delivers can be traced back and
compared with the source, token by token.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

ROW_TOKENS = 2048
NUM_DOMAINS = 8
SPREAD = 30.0  # the largest domain has this many times the rows of the smallest


@dataclass(frozen=True, slots=True)
class Bed:
    """One corpus, in as many formats as there are folders beside `raw`."""

    root: Path
    num_rows: tuple[int, ...]

    @classmethod
    def of_size(cls, root: Path, megabytes: int) -> "Bed":
        """Domains in geometric progression that fill about `megabytes` of uint16 tokens."""
        shape_d = SPREAD ** (np.arange(NUM_DOMAINS) / (NUM_DOMAINS - 1))
        total = megabytes * 1_000_000 / (2 * ROW_TOKENS)
        rows_d = np.maximum(1, total * shape_d / shape_d.sum()).astype(np.int64)
        return cls(root, tuple(int(rows) for rows in rows_d))

    @classmethod
    def load(cls, root: Path) -> "Bed":
        return cls(root, tuple(json.loads((root / "bed.json").read_text())["num_rows"]))

    def save(self) -> None:
        self.root.mkdir(parents=True, exist_ok=True)
        (self.root / "bed.json").write_text(json.dumps({"num_rows": self.num_rows}))

    @property
    def weights_d(self) -> NDArray[np.float64]:
        """Proportional to the square root of the size, so that small domains repeat before large ones."""
        root_d = np.sqrt(np.array(self.num_rows, dtype=np.float64))
        return root_d / root_d.sum()

    @property
    def first_row_d(self) -> NDArray[np.int64]:
        """Where each domain starts in the one raw file, and at last where that file ends."""
        return np.concatenate([[0], np.cumsum(self.num_rows)]).astype(np.int64)

    def tokens_of(self, domain: int) -> NDArray[np.uint16]:
        """The rows of a domain: noise, identity in front. A pure function of its arguments."""
        rows = self.num_rows[domain]
        noise = np.random.default_rng(1000 + domain)
        tokens = noise.integers(0, 50_000, size=(rows, ROW_TOKENS), dtype=np.uint16)
        number = np.arange(rows)
        tokens[:, 0] = domain
        tokens[:, 1] = number & 0xFFFF
        tokens[:, 2] = number >> 16
        return tokens

    def folder(self, layout: str) -> Path:
        return self.root / layout

    def raw(self) -> NDArray[np.uint16]:
        """All rows of all domains behind each other, memory-mapped."""
        flat = np.memmap(self.folder("raw") / "tokens.bin", dtype=np.uint16, mode="r")
        return flat.reshape(-1, ROW_TOKENS)

    def raw_domain(self, domain: int) -> NDArray[np.uint16]:
        """A plain array over the map: numpy's memmap class itself costs microseconds a row."""
        start, stop = self.first_row_d[domain : domain + 2]
        return np.asarray(self.raw())[start:stop]


@dataclass(frozen=True, slots=True, kw_only=True)
class Seat:
    """What one consumer process is asked to read. `workers` is 0 or 1 helper (process or thread) of
    the peer's own kind; a batch has `batch_rows` rows on every rank."""

    rank: int = 0
    world_size: int = 1
    workers: int = 0
    batch_rows: int = 8
    seed: int = 7

    def to_dict(self) -> dict[str, int]:
        return asdict(self)
