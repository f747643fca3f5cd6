"""What control costs a training step, and what a broken MLflow server costs it.

Part "cost": two loops of the same model take turns in the same workers, some windows each: one with the stream, the
controller, its journal and MLflow over SQLite under an online policy; one on batches that lie in memory, with nobody
deciding. Before a turn of the second begins, everything of the first is done; the first window of each turn is not
counted, so that in those that are, each window that is trained has one streamed, decided and tracked beside it. Every
turn of the first is compared with the mean of the two of the second around it.

Part "mlflow": one run whose tracker is a real MLflow server; turns under a fault, each between two in good health.

    python -m tests.bench.control [--parts cost mlflow] [--workers 2 1] [--pairs N] [--rounds N] [--no-record]
"""

import argparse
import json
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import ray.train

from mixer.control.client import ControllerClient
from mixer.control.journal import read_journal
from mixer.core.mixture import Mixture
from mixer.core.schedule import MixtureSchedule
from mixer.data.corpus import Corpus
from mixer.launch import fit
from mixer.run import Job, RunConfig, make_parts, open_rows
from mixer.training import loop
from mixer.training.loop import Parts
from tests.bench.record import record
from tests.bench.training import QUIET_S, Silent, Times, Turns, config_of, corpus_of, in_memory, is_quiet, own_ray
from tests.control.test_tracker_faults import Proxy, Server, free_port
from tests.control.tracking import expected, rows_in, wait_for

COMMAND = "python -m tests.bench.control"
ROW_TOKENS = 512
BLOCK = 3  # windows of a turn
WITH, WITHOUT = "with", "without"
MEASURED = "measured.json"
FAULTS = ("absent", "hanging", "500", "killed")
HEALTHY = "healthy"
MOST_COST, MOST_FAULT = 1.02, 1.01


# ---- on the workers --------------------------------------------------------------------------------------


def settle(parts: Parts, client: ControllerClient, rank: int) -> None:
    """Until all that was reported is decided, in the journal and tracked, and the windows that may be are read."""
    parts.sink.settle()
    if rank == 0:
        deadline = time.monotonic() + 120
        while client.call("status")["behind"] and time.monotonic() < deadline:
            time.sleep(0.05)
    time.sleep(QUIET_S)


def take_turns(job: Job, pairs: int) -> None:
    """The run's loop and the one without control, in turns; rank 0 writes down what each window took."""
    client, rank = ControllerClient(job.actor), ray.train.get_context().get_world_rank()
    run = replace(make_parts(job, client), evaluator=None)
    steps, folder = run.geometry.window_steps, job.config.run.folder
    turns = Turns([*[WITHOUT, WITH] * pairs, WITHOUT, WITH, WITHOUT])
    times = {WITH: Times(steps), WITHOUT: Times(steps)}

    def between(name: str) -> Callable[[int], None]:
        def change(window: int) -> None:
            if window == 0:  # it has the turn
                return
            if name == WITH:
                settle(run, client, rank)
            turns.give()
            turns.take(name)

        return change

    schedule = MixtureSchedule(job.rows.catalog, run.geometry).extend(Mixture.natural(job.rows.catalog), 1)
    bare = replace(
        run,
        planned_windows=(pairs + 1) * BLOCK + 1,
        catalog_of=lambda window: job.rows.catalog,
        batches=times[WITHOUT].watch(
            in_memory(job.rows, schedule, run.geometry), block=BLOCK, between=between(WITHOUT)
        ),
        sink=Silent(),
        checkpoints=folder.with_name(f"{folder.name} without") / "checkpoints",
    )
    run = replace(run, batches=times[WITH].watch(run.batches, block=BLOCK, between=between(WITH)))

    def train(parts: Parts, name: str) -> None:
        try:
            turns.take(name)
            loop.train(parts)
            turns.give()
        except BaseException as error:
            turns.fail(error)
            raise

    other = threading.Thread(target=train, args=(bare, WITHOUT), name="without control", daemon=True)
    other.start()
    train(run, WITH)
    other.join()
    if rank == 0:
        (folder / MEASURED).write_text(json.dumps({name: asdict(of) for name, of in times.items()}))


def train_through_faults(job: Job, phases: list[str]) -> None:
    """Before each turn the driver is told which fault is next, and has done it when the turn begins."""
    client, rank = ControllerClient(job.actor), ray.train.get_context().get_world_rank()
    parts, folder = replace(make_parts(job, client), evaluator=None), job.config.run.folder
    times = Times(parts.geometry.window_steps)

    def between(window: int) -> None:
        if rank == 0 and (number := window // BLOCK) < len(phases):
            (folder / "phase").write_text(str(number))
            while not (folder / f"phase-{number}").exists():
                time.sleep(0.02)
            if phases[number] == HEALTHY:
                settle(parts, client, rank)

    loop.train(replace(parts, batches=times.watch(parts.batches, block=BLOCK, between=between)))
    if rank == 0:
        (folder / MEASURED).write_text(json.dumps(asdict(times)))


def read_times(plain: dict[str, Any]) -> Times:
    """From JSON, whose keys are text."""
    numbers = {key: {int(k): v for k, v in plain[key].items()} for key in ("seconds", "waited")}
    return Times(plain["steps"], **numbers)


# ---- the cost --------------------------------------------------------------------------------------------


def cost(config: RunConfig, pairs: int) -> dict[str, Any]:
    """One run and what control cost it."""
    finish = fit(config, open_rows(config), work=lambda job: take_turns(job, pairs))
    if finish.ending != "finished" or finish.behind:
        raise RuntimeError(f"the run {finish.ending}, and {finish.behind} records were not tracked")
    found = json.loads((config.run.folder / MEASURED).read_text())
    ours, bare = read_times(found[WITH]), read_times(found[WITHOUT])
    ratios, waits, steps_ms = [], [], []
    for pair in range(pairs):
        seconds, waited = ours.of_block(pair, BLOCK)
        beside = statistics.mean(bare.of_block(place, BLOCK)[0] for place in (pair, pair + 1))
        ratios.append(seconds / beside)
        waits.append(waited / seconds)
        steps_ms.append(beside / bare.steps * 1e3)
    return {
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "data_wait": statistics.median(waits),
        "step_ms": statistics.median(steps_ms),
    }


def cost_of(corpus: Corpus, folder: Path, workers: int, given: argparse.Namespace) -> dict[str, Any]:
    config = config_of(
        corpus,
        folder / f"cost-{workers}",
        given.model,
        f"train.num_workers={workers}",
        f"train.windows={given.pairs * BLOCK + 1}",
        f"geometry.batch_rows={given.rank_rows * workers}",
        f"geometry.window_steps={given.steps}",
    )
    found = cost(config, given.pairs)
    ratios = found["ratios"]
    print(
        f"{workers} workers: {found['ratio']:.4f} of the step time without control ({min(ratios):.3f} to "
        f"{max(ratios):.3f}, {len(ratios)} pairs), a step {found['step_ms']:.0f} ms, waiting for data "
        f"{found['data_wait']:.2%}",
        flush=True,
    )
    return found


# ---- MLflow ----------------------------------------------------------------------------------------------


class Service:
    """An MLflow server behind a proxy, and the faults that both can have."""

    def __init__(self, folder: Path) -> None:
        import mlflow

        folder.mkdir(parents=True)
        self._folder, self._port = folder, free_port()
        self.database = folder / "mlflow.db"
        mlflow.MlflowClient(f"sqlite:///{self.database}").search_experiments()  # makes it
        self._server = self._started()
        self._proxy: Proxy | None = Proxy(self._port, self._server.port)

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def _started(self) -> Server:
        server = Server(self._folder)
        wait_for(server.is_up, 180)
        return server

    def mend(self) -> None:
        if self._server.process.poll() is not None:
            self._server = self._started()
        if self._proxy is not None:
            self._proxy.fault = lambda path: None
            self._proxy.released.set()
            self._proxy.released = threading.Event()
            self._proxy.upstream = self._server.port
        else:
            self._proxy = Proxy(self._port, self._server.port)

    def begin(self, phase: str) -> None:
        self.mend()
        assert self._proxy is not None
        if phase == "absent":
            self._proxy.close()
            self._proxy = None
        elif phase == "killed":
            threading.Timer(0.5, self._server.kill).start()
        elif phase != HEALTHY:
            fault = {"hanging": "hang", "500": "refuse"}[phase]
            self._proxy.fault = lambda path: fault

    def close(self) -> None:
        if self._proxy is not None:
            self._proxy.close()
        self._server.kill()


def faults(config: RunConfig, service: Service, rounds: int, kinds: tuple[str, ...] = FAULTS) -> dict[str, list[float]]:
    """Ratios of the step time under each fault; raises if a step was lost, or if MLflow has not all of it once."""
    phases = [phase for _ in range(rounds) for fault in kinds for phase in (HEALTHY, fault)] + [HEALTHY]
    windows = len(phases) * BLOCK + 1
    config = replace(config, train=replace(config.train, windows=windows))
    folder, over = config.run.folder, threading.Event()

    def serve() -> None:
        for number, phase in enumerate(phases):
            while not (folder / "phase").exists() or (folder / "phase").read_text() != str(number):
                if over.wait(0.02):
                    return
            service.begin(phase)
            (folder / f"phase-{number}").touch()

    server = threading.Thread(target=serve, name="faults", daemon=True)
    server.start()
    try:
        finish = fit(config, open_rows(config), work=lambda job: train_through_faults(job, phases))
    finally:
        over.set()
    check(config, service, windows, finish.ending)
    times = read_times(json.loads((folder / MEASURED).read_text()))
    found: dict[str, list[float]] = {fault: [] for fault in kinds}
    for number, phase in enumerate(phases):
        if phase != HEALTHY:
            beside = statistics.mean(times.of_block(place, BLOCK)[0] for place in (number - 1, number + 1))
            found[phase].append(times.of_block(number, BLOCK)[0] / beside)
    return found


def check(config: RunConfig, service: Service, windows: int, ending: str) -> None:
    folder = config.run.folder
    trained = [entry["steps"] for _, entry in read_journal(folder / "journal.jsonl") if entry["kind"] == "window"]
    steps = config.geometry.window_steps
    if ending != "finished" or trained != [steps * (window + 1) for window in range(windows)]:
        raise RuntimeError(f"{ending}, with windows that end at steps {trained}")
    schedule = MixtureSchedule.from_text((folder / "schedule.jsonl").read_bytes())
    wanted = expected(folder, schedule)
    arrived = rows_in(service.database, json.loads((folder / "tracker.json").read_text())["run_id"])
    if arrived != wanted:
        raise RuntimeError(
            f"MLflow has {len(arrived)} numbers, {len(set(arrived) & set(wanted))} of the {len(wanted)} it should have"
        )
    print(f"{windows} windows trained; all {len(wanted)} numbers in MLflow, each once", flush=True)


def faults_of(corpus: Corpus, folder: Path, given: argparse.Namespace) -> dict[str, list[float]]:
    service = Service(folder / "mlflow")
    try:
        config = config_of(
            corpus,
            folder / "faults",
            given.model,
            f"geometry.batch_rows={2 * given.rank_rows}",
            f"geometry.window_steps={given.steps}",
            f"tracker.uri={service.uri}",
            "tracker.timeout_s=2",
            "tracker.max_pause_s=1",
        )
        found = faults(config, service, given.rounds)
    finally:
        service.close()
    for fault, ratios in found.items():
        print(
            f"MLflow {fault}: {statistics.median(ratios):.4f} of the step time beside one in good health "
            f"({min(ratios):.3f} to {max(ratios):.3f})",
            flush=True,
        )
    return found


# ---- the command -----------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where the corpus is kept between runs (default: a new one)")
    parser.add_argument("--parts", nargs="+", default=["cost", "mlflow"], choices=["cost", "mlflow"])
    parser.add_argument("--workers", type=int, nargs="+", default=[2, 1])
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3, help="of all faults")
    parser.add_argument("--model", default="2m")
    parser.add_argument("--rank-rows", type=int, default=1, help="rows of a rank in a step")
    parser.add_argument("--steps", type=int, default=16, help="of a window")
    parser.add_argument("--no-record", action="store_true")
    given = parser.parse_args(argv)
    quiet = is_quiet()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        corpus = corpus_of(given.folder or folder, ROW_TOKENS)
        with own_ray():
            costs: dict[int, dict[str, Any]] = {}
            if "cost" in given.parts:
                costs = {workers: cost_of(corpus, folder, workers, given) for workers in given.workers}
            slowed = faults_of(corpus, folder, given) if "mlflow" in given.parts else {}
    if quiet and not given.no_record:
        publish(costs, slowed)
    return 0


def publish(costs: dict[int, dict[str, Any]], slowed: dict[str, list[float]]) -> None:
    if costs:
        ratio = {f"{workers} workers": round(found["ratio"], 4) for workers, found in costs.items()}
        record(
            figure="cost of control: step time against the same loop on batches in memory, nobody deciding",
            value=ratio,
            unit="ratio, median of turns in the same workers",
            target=f"<= {MOST_COST}",
            met=max(ratio.values()) <= MOST_COST,
            peers={
                f"{workers} workers, {what}": round(found[key] * scale, 2)
                for workers, found in costs.items()
                for what, key, scale in (("step ms", "step_ms", 1), ("data wait % of step time", "data_wait", 100))
            },
            command=COMMAND,
        )
    if slowed:
        ratio = {fault: round(statistics.median(ratios), 4) for fault, ratios in slowed.items()}
        record(
            figure="a broken MLflow server: step time against one in good health, everything there once afterwards",
            value=ratio,
            unit="ratio, median",
            target=f"<= {MOST_FAULT}",
            met=max(ratio.values()) <= MOST_FAULT,
            peers={},
            command=COMMAND,
        )


if __name__ == "__main__":
    raise SystemExit(main())
