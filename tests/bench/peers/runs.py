"""Starts a reader's consumer processes, waits for them and sums up what they wrote."""

import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tests.bench.peers import corpora
from tests.bench.peers.bed import Bed, Seat
from tests.bench.peers.consumer import Order

REPOSITORY = Path(__file__).parents[3]
GRACE_S = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """How long and how often everything is measured."""

    megabytes: int = 1000
    repetitions: int = 5
    settings: tuple[tuple[int, int], ...] = ((1, 0), (2, 0), (1, 1), (2, 1))  # (processes, helpers of each)
    warm_s: float = 0.7
    window_s: float = 2.0
    check_batches: int = 400
    limit_s: float = 120.0  # a reader that takes longer has failed


QUICK = Bench(megabytes=24, repetitions=1, settings=((1, 0),), warm_s=0.05, window_s=0.2, check_batches=60, limit_s=40)


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One reader, once: its processes taken together. `error` is empty where it worked."""

    reader: str
    processes: int
    workers: int
    repetition: int
    error: str = ""
    mtok_per_s: float = 0.0
    cpu_s_per_mtok: float = 0.0
    first_batch_s: float = 0.0
    peak_rss_mb: float = 0.0
    private_mb: float = 0.0
    queued_share: float = 0.0
    rows_checked: int = 0
    rows_wrong: int = 0
    batches_repeated: int = 0
    share_off: float = 0.0  # largest |share - weight| of a domain among the rows checked
    share_off_sigma: float = 0.0  # the same, in standard deviations of independent drawing


def environment() -> dict[str, str]:
    """What every process of the bench gets: one thread, no network, this repository's code."""
    return os.environ | {
        "PYTHONPATH": str(REPOSITORY),
        "OMP_NUM_THREADS": "1",
        "HF_DATASETS_OFFLINE": "1",
        "DO_NOT_TRACK": "1",
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "GLOO_SOCKET_IFNAME": "lo",
    }


def build(bed: Bed, layouts: Iterable[str], python: str = sys.executable) -> None:
    """Make what is not there yet, two at a time, and bring all of it into the page cache."""
    bed.save()
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda layout: _build(bed, layout, python), layouts))


def _build(bed: Bed, layout: str, python: str) -> None:
    if not bed.folder(layout).exists():
        command = [python, "-m", corpora.__name__, str(bed.root), layout]
        done = subprocess.run(command, check=False, env=environment(), cwd=REPOSITORY, capture_output=True, text=True)
        if not bed.folder(layout).exists():
            raise RuntimeError(f"building {layout} failed:\n{done.stderr[-2000:]}")
    corpora.read_once(bed, layout)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run(reader: str, bed: Bed, bench: Bench, *, processes: int, workers: int, repetition: int) -> Run:
    """Start a reader's consumers, wait, and sum up what they wrote."""
    where = {"reader": reader, "processes": processes, "workers": workers, "repetition": repetition}
    port = str(free_port())
    with tempfile.TemporaryDirectory(prefix="reader-peers-") as folder:
        started: list[tuple[subprocess.Popen[bytes], Path, Path]] = []
        for rank in range(processes):
            answer, log = Path(folder, f"{rank}.json"), Path(folder, f"{rank}.log")
            order = Order(
                reader=reader,
                root=str(bed.root),
                seat=Seat(rank=rank, world_size=processes, workers=workers).to_dict(),
                answer=str(answer),
                meeting=str(Path(folder, "meeting")),
                warm_s=bench.warm_s,
                window_s=bench.window_s,
                check_batches=bench.check_batches,
            )
            ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
            extra = {name: str(value) for name, value in ranks.items()}
            extra |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            with log.open("wb") as output:
                process = subprocess.Popen(
                    [sys.executable, "-m", "tests.bench.peers.consumer", json.dumps(asdict(order))],
                    env=environment() | extra,
                    cwd=REPOSITORY,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            started.append((process, answer, log))
        wait([process for process, _, _ in started], bench.limit_s)
        answers = [_answer(answer, log, bench.limit_s) for _, answer, log in started]
    errors = [answer["error"] for answer in answers if "error" in answer]
    if errors:
        return Run(**where, error=errors[0])
    return Run(**where, **_together(answers, bed))


def wait(processes: list[subprocess.Popen[bytes]], limit_s: float) -> None:
    """Until all have ended, or one has died, or the time is over; then end what is left of them."""
    end = time.monotonic() + limit_s
    while time.monotonic() < end and any(process.poll() is None for process in processes):
        if any(process.poll() for process in processes):
            break
        time.sleep(0.05)
    for process in processes:
        _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a consumer and all that is left of its session: its workers, and the process by which Python
    removes shared memory, which needs a moment for that and ignores SIGTERM."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
        end = time.monotonic() + GRACE_S
        while time.monotonic() < end:
            process.poll()
            os.killpg(process.pid, 0)
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _answer(answer: Path, log: Path, limit_s: float) -> dict[str, Any]:
    if answer.exists():
        return json.loads(answer.read_text())
    tail = log.read_text(errors="replace").strip()[-400:]
    return {"error": f"{tail}\nno answer: it died, or its time of {limit_s:g} s was over"}


def _together(answers: list[dict[str, Any]], bed: Bed) -> dict[str, Any]:
    """Ranks as one: rates and memory add up, costs per token and waiting are means."""
    rates = [answer["tokens_per_s"] for answer in answers]
    checked = sum(answer["rows_checked"] for answer in answers)
    off = sigma = 0.0
    if checked:
        rows_d = np.sum([answer["rows_d"] for answer in answers], axis=0)
        off_d = np.abs(rows_d / checked - bed.weights_d)
        off = float(off_d.max())
        sigma = float((off_d / np.sqrt(bed.weights_d * (1 - bed.weights_d) / checked)).max())
    return {
        "mtok_per_s": sum(rates) / 1e6,
        "cpu_s_per_mtok": float(np.average([a["cpu_s_per_mtok"] for a in answers], weights=rates)),
        "first_batch_s": max(answer["first_batch_s"] for answer in answers),
        "peak_rss_mb": sum(answer["peak_rss_mb"] for answer in answers),
        "private_mb": sum(answer["private_mb"] for answer in answers),
        "queued_share": statistics.mean(answer["queued_share"] for answer in answers),
        "rows_checked": checked,
        "rows_wrong": sum(answer["rows_wrong"] for answer in answers),
        "batches_repeated": sum(answer["batches_repeated"] for answer in answers),
        "share_off": off,
        "share_off_sigma": sigma,
    }
