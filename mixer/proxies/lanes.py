"""Lanes on which whole runs go on side by side: processes of this machine, or tasks of Ray.

A run's outcome follows from its configuration, and what it makes lies in its folder, so it may be begun again anywhere.
What came to nothing is an outcome as well: the other runs go on. Once the file `stop` is there nothing new is begun,
and what is going on saves a checkpoint and ends.

A process takes one run after the other, because loading torch takes longer than a small run. It reads each as a line of
JSON and answers with one; `python -m mixer.proxies.lanes` is that process. It is in a session of its own, so that a
Ctrl-C reaches whoever waits and not the runs; if its parent dies, it saves and ends as for `stop`.
"""

import json
import logging
import os
import queue
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal, Protocol

import ray
from ray.exceptions import RayError

from mixer import config as configs
from mixer.alone import run_alone
from mixer.core.errors import MixerError
from mixer.data.corpus import CatalogRows
from mixer.run import RunConfig, open_rows

logger = logging.getLogger(__name__)

LOOK_EVERY_S = 0.5  # between looks for the wish to stop, and between ticks


@dataclass(frozen=True, slots=True)
class Job:
    name: str
    config: RunConfig
    stop: Path


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a run ended. `lost`: its process did."""

    ending: Literal["finished", "stopped", "failed", "lost"]
    text: str = ""


Ended = tuple[int, Outcome]  # the job's number


class Lanes(Protocol):
    def run(self, jobs: Sequence[Job], stop: Path) -> Iterator[Ended | None]:
        """Outcomes as they come; None from time to time, so that who waits may look how far runs are."""
        ...


def run_one(config: RunConfig, rows: CatalogRows, wants_stop: Callable[[], bool]) -> Outcome:
    """Begin the run or go on with it. What trying again would not change is an outcome."""
    try:
        ending = run_alone(config, rows, stop=wants_stop)
    except MixerError as error:
        return Outcome("failed", " ".join(str(error).split()))
    except Exception as error:  # one run's trouble, whatever it is; the others go on
        logger.exception("the run in %s failed", config.run.folder)
        return Outcome("failed", f"{type(error).__name__}: {' '.join(str(error).split())}")
    if ending == "bad_loss":
        return Outcome("failed", f"a step had no finite loss; {config.run.folder}/journal.jsonl names the rows")
    return Outcome("finished" if ending == "finished" else "stopped")


class Wish:
    """Whether the file is there, or the parent is not; looked for from time to time only."""

    def __init__(self, file: Path, parent: int | None = None) -> None:
        self._file, self._parent = file, parent
        self._found, self._next_s = False, 0.0

    def __call__(self) -> bool:
        now_s = time.monotonic()
        if not self._found and now_s >= self._next_s:
            orphan = self._parent is not None and os.getppid() != self._parent
            self._found, self._next_s = orphan or self._file.exists(), now_s + LOOK_EVERY_S
        return self._found


# ---- processes -----------------------------------------------------------------------------------------------


class Processes:
    """So many runs at once, each in a process of this machine; `logs` is where those write what they say."""

    def __init__(self, num: int, logs: Path, threads: int = 1) -> None:
        self._num, self._logs, self._threads = num, logs, threads

    def run(self, jobs: Sequence[Job], stop: Path) -> Iterator[Ended | None]:
        waiting = deque(enumerate(jobs))
        ended: queue.SimpleQueue[Ended | None] = queue.SimpleQueue()  # None: a lane has nothing left
        lanes = [_Process(self._logs / f"worker-{n}.log", self._threads) for n in range(min(self._num, len(jobs)))]
        threads = [threading.Thread(target=_drive, args=(lane, waiting, stop, ended), daemon=True) for lane in lanes]
        going = len(threads)
        try:
            for thread in threads:
                thread.start()
            while going:
                try:
                    found = ended.get(timeout=LOOK_EVERY_S)
                except queue.Empty:
                    yield None
                    continue
                going -= found is None
                if found is not None:
                    yield found
        finally:
            for lane in lanes:
                lane.close()


def _drive(
    lane: "_Process", waiting: deque[tuple[int, Job]], stop: Path, ended: "queue.SimpleQueue[Ended | None]"
) -> None:
    """A lane's thread: one job after the other."""
    while not stop.exists():
        try:
            number, job = waiting.popleft()
        except IndexError:
            break
        ended.put((number, lane.work(job)))
    ended.put(None)


class _Process:
    """A process that runs jobs; begun for the first one, and anew if it died."""

    def __init__(self, log: Path, threads: int) -> None:
        self._log, self._threads = log, threads
        self._process: subprocess.Popen[str] | None = None
        self._closed = False

    def work(self, job: Job) -> Outcome:
        process = self._process = self._process or self._begin()
        assert process.stdin is not None and process.stdout is not None
        line = json.dumps({"config": configs.to_plain(job.config), "stop": str(job.stop)})
        try:
            process.stdin.write(line + "\n")
            process.stdin.flush()
            return Outcome(**json.loads(process.stdout.readline()))
        except (OSError, ValueError):  # it is dead, or died over the job
            status = process.wait()
            self._process = None
            how = f"by signal {-status}" if status < 0 else f"with status {status}"
            return Outcome("lost", f"its process ended {how}; {self._log} is what it said")

    def _begin(self) -> "subprocess.Popen[str]":
        package = str(Path(__file__).parents[2])
        paths = os.pathsep.join([package, *filter(None, [os.environ.get("PYTHONPATH")])])
        with open(self._log, "ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "mixer.proxies.lanes"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": str(self._threads)},
                start_new_session=True,
            )
        if self._closed:
            process.kill()
        return process

    def close(self) -> None:
        """A process that has nothing to do ends by itself; one that still trains is killed, and loses a few steps."""
        self._closed = True
        if (process := self._process) is not None:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    pipe.close()


def main() -> int:
    """Takes runs from standard input until it ends."""
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(name)s %(message)s")
    parent, answers = os.getppid(), os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print goes to the log
    for line in sys.stdin:
        _answer(json.loads(line), parent, answers)
    return 0


def _answer(asked: dict[str, Any], parent: int, answers: IO[str]) -> None:
    config = configs.build(RunConfig, asked["config"], "")
    try:
        rows = open_rows(config)
    except MixerError as error:
        outcome = Outcome("failed", " ".join(str(error).split()))
    else:
        outcome = run_one(config, rows, Wish(Path(asked["stop"]), parent))
    answers.write(json.dumps({"ending": outcome.ending, "text": outcome.text}) + "\n")


# ---- Ray -----------------------------------------------------------------------------------------------------


class RayTasks:
    """As Ray tasks, on a file system that all nodes share. Ray tries a task again whose process died."""

    def __init__(
        self, rows: CatalogRows, *, cpus: float, gpus: float = 0.0, at_once: int | None = None, retries: int = 2
    ) -> None:
        self._rows, self._cpus, self._gpus, self._at_once, self._retries = rows, cpus, gpus, at_once, retries

    def run(self, jobs: Sequence[Job], stop: Path) -> Iterator[Ended | None]:
        task = ray.remote(num_cpus=self._cpus, num_gpus=self._gpus, max_retries=self._retries)(_task)
        rows = ray.put(self._rows)
        waiting = deque(enumerate(jobs))
        running: dict[Any, int] = {}
        most = self._at_once or len(jobs)
        try:
            while (waiting and not stop.exists()) or running:
                while waiting and len(running) < most and not stop.exists():
                    number, job = waiting.popleft()
                    running[task.remote(job, rows, self._gpus > 0)] = number
                done, _ = ray.wait(list(running), num_returns=1, timeout=LOOK_EVERY_S) if running else ([], [])
                for ref in done:
                    yield running.pop(ref), _result(ref)
                if not done:
                    yield None
        finally:
            for ref in running:
                ray.cancel(ref, force=True)


def _task(job: Job, rows: CatalogRows, gpu: bool) -> Outcome:
    """In a process of Ray's."""
    if not gpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # a run that asked for no GPU takes none
    return run_one(job.config, rows, Wish(job.stop))


def _result(ref: Any) -> Outcome:
    try:
        outcome: Any = ray.get(ref)
    except RayError as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return Outcome("lost", lines[-1] if lines else type(error).__name__)
    return outcome


if __name__ == "__main__":
    raise SystemExit(main())
