"""Running proxies: as Ray tasks that share the cluster's CPUs and fractions of its GPUs, or one by one here.

A task's outcome follows from its job alone and what it makes lies in its folder, so it may run twice. One that did not
come back, however often it was tried, is an outcome as well: the others go on.
"""

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import ray
from ray import ObjectRef
from ray.exceptions import RayError

from mixer.proxies.options import SwarmOptions
from mixer.proxies.proxy import Outcome, Task

logger = logging.getLogger(__name__)

LOOK_EVERY_S = 0.5  # between looks for the wish to stop, while nothing finishes
Work = Callable[[Task], Outcome]


class Tasks(Protocol):
    """Runs `work` on every job and yields (number of the job, outcome) as they come.

    Once the file `stop` is there nothing new is begun; what has begun sees the file too, and ends soon.
    """

    def run(self, work: Work, jobs: Sequence[Task], stop: Path) -> Iterator[tuple[int, Outcome]]: ...


class Here:
    """In this process, one after the other; what fails is not tried again."""

    def run(self, work: Work, jobs: Sequence[Task], stop: Path) -> Iterator[tuple[int, Outcome]]:
        for number, job in enumerate(jobs):
            if stop.exists():
                return
            try:
                outcome = work(job)
            except Exception as error:  # one proxy's trouble, whatever it is; the others go on
                logger.warning("proxy %s failed", job.run, exc_info=True)
                outcome = Outcome("lost", f"{type(error).__name__}: {error}")
            yield number, outcome


class RayTasks:
    """As Ray tasks. Ray tries a task again whose process died or whose code failed, `max_retries` times."""

    def __init__(self, options: SwarmOptions) -> None:
        self._options = options

    def run(self, work: Work, jobs: Sequence[Task], stop: Path) -> Iterator[tuple[int, Outcome]]:
        options = self._options
        task = ray.remote(
            num_cpus=options.cpus_per_run,
            num_gpus=options.gpus_per_run,
            max_retries=options.max_retries,
            retry_exceptions=options.max_retries > 0,
        )(_run)
        shared = ray.put(work)  # the catalog in it is sent once a node
        waiting = list(enumerate(jobs))[::-1]
        running: dict[ObjectRef, int] = {}
        most = options.at_once or len(jobs)
        try:
            while (waiting and not stop.exists()) or running:
                while waiting and len(running) < most and not stop.exists():
                    number, job = waiting.pop()
                    running[task.remote(shared, job, options.gpus_per_run > 0)] = number
                done = ray.wait(list(running), num_returns=1, timeout=LOOK_EVERY_S)[0] if running else []
                for ref in done:
                    yield running.pop(ref), _outcome(ref)
        finally:
            for ref in running:
                ray.cancel(ref, force=True)


def _run(work: Work, job: Task, gpu: bool) -> Outcome:
    """In a process of Ray's."""
    if not gpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # a proxy that asked for no GPU takes none
    return work(job)


def _outcome(ref: ObjectRef) -> Outcome:
    try:
        outcome: Any = ray.get(ref)
    except RayError as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return Outcome("lost", lines[-1] if lines else type(error).__name__)
    return outcome
