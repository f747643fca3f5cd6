"""One measured process: drives one reader and writes what it saw as JSON.

Order of events: import; build the reader and take the first batch (timed); warm up; wait for the
other ranks; the timed window, which does nothing but take batches; read CPU time and memory; then
take more batches and compare every token of them with the source. The check comes last so that its
own use of the source file is in no figure.
"""

import importlib
import json
import os
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tests.bench.peers import processes
from tests.bench.peers.adapters import READERS
from tests.bench.peers.bed import NUM_DOMAINS, ROW_TOKENS, Bed, Seat

CHECK_S = 4.0  # a slow reader's check stops after this


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """What the bench asks a consumer to do."""

    reader: str
    root: str
    seat: dict[str, int]
    answer: str  # file the answer goes to
    meeting: str  # prefix of the files by which ranks wait for each other
    warm_s: float
    window_s: float
    check_batches: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What one process saw; rates are of this process alone."""

    tokens_per_s: float
    cpu_s_per_mtok: float
    first_batch_s: float
    peak_rss_mb: float
    private_mb: float
    queued_share: float  # of the window: how long a ready main thread waited for a core
    rows_checked: int
    rows_wrong: int
    batches_repeated: int
    rows_d: list[int]


@dataclass(slots=True)
class Checked:
    """Delivered rows compared with the source, token by token.

    A batch of the same rows in the same order as an earlier one is a buffer that was overwritten before
    it was delivered: no reader here draws the same eight rows again in so few batches.
    """

    rows: int = 0
    wrong: int = 0
    batches_repeated: int = 0
    rows_d: NDArray[np.int64] = field(default_factory=lambda: np.zeros(NUM_DOMAINS, dtype=np.int64))

    @classmethod
    def take(cls, batches: Iterator[torch.Tensor], bed: Bed, count: int) -> "Checked":
        checked = cls()
        source = bed.raw()
        num_rows_d = np.array(bed.num_rows)
        seen: set[bytes] = set()
        end = time.perf_counter() + CHECK_S
        while count and time.perf_counter() < end:
            tokens = next(batches).numpy()
            domain_n, row_n = tokens[:, 0], tokens[:, 1] + (tokens[:, 2] << 16)
            known = (domain_n >= 0) & (domain_n < NUM_DOMAINS)
            domain_n = np.where(known, domain_n, 0)
            known &= row_n < num_rows_d[domain_n]
            place_n = np.where(known, bed.first_row_d[domain_n] + row_n, 0)
            checked.wrong += int((~(known & (tokens == source[place_n]).all(axis=1))).sum())
            checked.rows += len(tokens)
            checked.rows_d += np.bincount(domain_n, minlength=NUM_DOMAINS)
            checked.batches_repeated += place_n.tobytes() in seen
            seen.add(place_n.tobytes())
            count -= 1
        return checked


def meet(batches: Iterator[torch.Tensor], meeting: str, seat: Seat) -> None:
    """Keep reading until every rank has come, so that all windows start warm and together."""
    places = [Path(f"{meeting}.{rank}") for rank in range(seat.world_size)]
    places[seat.rank].touch()
    while not all(place.exists() for place in places):
        next(batches)


def measure(order: Order) -> Measured:
    reader = READERS[order.reader]
    bed = Bed.load(Path(order.root))
    seat = Seat(**order.seat)
    if reader.stubs:
        sys.path.insert(0, str(reader.stubs))
    for module in reader.modules:
        importlib.import_module(module)

    begin = time.perf_counter()
    batches = reader.batches(bed, seat)
    first = next(batches)
    first_batch_s = time.perf_counter() - begin
    if first.shape != (seat.batch_rows, ROW_TOKENS) or first.dtype != torch.int64:
        raise ValueError(f"{order.reader} gave {first.dtype} {tuple(first.shape)}")

    private_mb = processes.private_mb()
    warm = time.perf_counter() + order.warm_s
    while time.perf_counter() < warm:
        next(batches)
    meet(batches, order.meeting, seat)

    count = 0
    queued, cpu, start = processes.queued_s(), processes.cpu_s(), time.perf_counter()
    end = start + order.window_s
    while (now := time.perf_counter()) < end:
        next(batches)
        count += 1
    took = now - start
    cpu, queued = processes.cpu_s() - cpu, processes.queued_s() - queued

    tokens = count * first.numel()
    private_mb = max(private_mb, processes.private_mb())
    peak_rss_mb = processes.peak_rss_mb()
    checked = Checked.take(batches, bed, order.check_batches if reader.yields_rows else 0)
    return Measured(
        tokens_per_s=tokens / took,
        cpu_s_per_mtok=cpu / (tokens / 1e6),
        first_batch_s=first_batch_s,
        peak_rss_mb=peak_rss_mb,
        private_mb=private_mb,
        queued_share=queued / took,
        rows_checked=checked.rows,
        rows_wrong=checked.wrong,
        batches_repeated=checked.batches_repeated,
        rows_d=checked.rows_d.tolist(),
    )


def main(text: str) -> None:
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    order = Order(**json.loads(text))
    answer: dict[str, Any]
    try:
        answer = asdict(measure(order))
    except StopIteration:
        answer = {"error": f"{order.reader} ended; a reader in this bench goes on without end"}
    except Exception as error:  # whatever a peer raises is its result, told to the bench
        answer = {"error": f"{type(error).__name__}: {error}"}
    unfinished = Path(f"{order.answer}.unfinished")
    unfinished.write_text(json.dumps(answer))
    unfinished.rename(order.answer)


if __name__ == "__main__":
    main(sys.argv[1])
    sys.stdout.flush()
    os._exit(0)  # readers leave threads and workers behind that would hold up a plain exit
