"""Running many small jobs: over Ray Data on all cores of a cluster, or one after the other here.

A job is a picklable value, its result small; big things go through files. A task's result follows
from its job alone and its files appear whole or not at all, so it may run twice. Jobs come back in
any order, each with its number. A `MixerError` of a job is raised here as it was raised there, not
as a trace through Ray.
"""

import logging
import pickle
import resource
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from mixer.core import errors
from mixer.core.errors import MixerError

Job = TypeVar("Job")
Result = TypeVar("Result")

WAVE_JOBS = 4096  # jobs that Ray Data is given at once, so that a million of them do not fill the driver


class Runner(Protocol):
    """Runs `function` on every job and yields (number of the job, result) as they come."""

    peak_task_bytes: int

    def expect(self, num_bytes: int) -> None:
        """Said once, before the first job: about how many bytes all jobs together will read."""
        ...

    def run(self, function: Callable[[Job], Result], jobs: Sequence[Job]) -> Iterator[tuple[int, Result]]: ...


class SerialRunner:
    """In this process, one after the other."""

    def __init__(self) -> None:
        self.peak_task_bytes = 0

    def expect(self, num_bytes: int) -> None:
        """Nothing follows from it here."""

    def run(self, function: Callable[[Job], Result], jobs: Sequence[Job]) -> Iterator[tuple[int, Result]]:
        for number, job in enumerate(jobs):
            yield number, function(job)
        self.peak_task_bytes = _peak_bytes()


class RayRunner:
    """As Ray Data tasks, one CPU each. Ray is started at the first job, unless it already runs.

    Work that reads less than `small_bytes` is done in this process, unless Ray runs: starting Ray would
    take longer than the work.
    """

    def __init__(
        self,
        *,
        address: str | None = None,
        num_cpus: int | None = None,
        memory_mb: int | None = None,  # of the object store
        small_bytes: int = 0,
    ) -> None:
        self.peak_task_bytes = 0
        self._address = address
        self._num_cpus = num_cpus
        self._memory_mb = memory_mb
        self._small_bytes = small_bytes
        self._started = False
        self._here: SerialRunner | None = None

    def __enter__(self) -> "RayRunner":
        return self

    def __exit__(self, kind: object, value: object, trace: object) -> None:
        if self._started:
            import ray  # noqa: PLC0415 (seconds; not for whoever runs nothing on Ray)

            ray.shutdown()
            self._started = False

    def run(self, function: Callable[[Job], Result], jobs: Sequence[Job]) -> Iterator[tuple[int, Result]]:
        if not jobs:
            return
        if self._here is not None:
            yield from self._here.run(function, jobs)
            self.peak_task_bytes = self._here.peak_task_bytes
            return
        self.start()
        for first in range(0, len(jobs), WAVE_JOBS):
            yield from self._run_wave(function, jobs[first : first + WAVE_JOBS], first)

    def expect(self, num_bytes: int) -> None:
        if num_bytes < self._small_bytes and not self._address:
            import ray  # noqa: PLC0415

            self._here = None if ray.is_initialized() else SerialRunner()

    def start(self) -> None:
        import ray  # noqa: PLC0415

        if ray.is_initialized():
            return
        if self._address:
            ray.init(address=self._address, log_to_driver=False, logging_level=logging.ERROR)
        else:
            ray.init(
                address="local",
                num_cpus=self._num_cpus,
                object_store_memory=self._memory_mb * 1_000_000 if self._memory_mb else None,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
                configure_logging=True,
            )
        self._started = True

    def _run_wave(
        self, function: Callable[[Job], Result], jobs: Sequence[Job], first: int
    ) -> Iterator[tuple[int, Result]]:
        import ray.data  # noqa: PLC0415

        def task(row: dict[str, Any]) -> dict[str, Any]:
            try:
                outcome: Any = function(pickle.loads(row["job"]))  # noqa: S301 (our own, never stored)
            except MixerError as error:
                outcome = Failure.of(error)
            return {"number": row["number"], "outcome": pickle.dumps(outcome), "peak": _peak_bytes()}

        rows = [{"number": number, "job": pickle.dumps(job)} for number, job in enumerate(jobs)]
        with _quiet():
            dataset = ray.data.from_items(rows, override_num_blocks=len(rows)).map(task, num_cpus=1)
            for done in dataset.iter_rows():
                self.peak_task_bytes = max(self.peak_task_bytes, done["peak"])
                outcome = pickle.loads(done["outcome"])  # noqa: S301
                if isinstance(outcome, Failure):
                    raise outcome.to_error()
                yield first + done["number"], outcome


@dataclass(frozen=True, slots=True)
class Failure:
    """A `MixerError`, as a value that crosses processes: its class by name, and its text."""

    kind: str
    text: str

    @classmethod
    def of(cls, error: MixerError) -> "Failure":
        # What an actor raised arrives as a class of Ray's making, which is ours as well; `cause` is ours alone.
        cause = getattr(error, "cause", None)
        own = cause if isinstance(cause, MixerError) else error
        return cls(type(own).__name__, str(own))

    def to_error(self) -> MixerError:
        return getattr(errors, self.kind, MixerError)(self.text)


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@contextmanager
def _quiet() -> Iterator[None]:
    """Ray Data without its bars and its talk: progress is shown by whoever asked for the work."""
    from ray.data import DataContext  # noqa: PLC0415

    context = DataContext.get_current()
    before = context.enable_progress_bars, context.print_on_execution_start
    logger = logging.getLogger("ray.data")
    level = logger.level
    context.enable_progress_bars = context.print_on_execution_start = False
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        context.enable_progress_bars, context.print_on_execution_start = before
        logger.setLevel(level)
