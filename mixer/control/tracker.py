"""Trackers: a run's journal as MLflow shows it. `mixer.control.metrics` lists what arrives under which name.

A tracker reads the journal (see `mixer.control.outbox`); whoever appends to it calls `wake`, which returns at once.
A thread of its own does the sending. A tracker that is away, slow or refuses costs one warning an hour and delays
what it shows; the journal keeps everything, and after a restart it goes on where it was.

Every number arrives exactly once. What became of a request that was not answered, or was answered with an error, or
whose process died before noting the answer, is asked before anything is sent again: per name the steps of a run only
grow, so a run's newest step of each name tells what has arrived. A request that is still under way when that is asked
and comes through later repeats what was sent, to the last bit, and a database store keeps identical rows once.
"""

import contextlib
import fcntl
import importlib
import logging
import math
import os
import random
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar

from mixer.control.description import RUN_TAG, params_of, redacted, staged, tags_of
from mixer.control.fence import Fence
from mixer.control.metrics import Metric
from mixer.control.outbox import Batch, Outbox
from mixer.core.errors import ConfigError
from mixer.core.schedule import MixtureSchedule

if TYPE_CHECKING:
    from mlflow import MlflowClient

logger = logging.getLogger(__name__)

T = TypeVar("T")
# MLflow's limits of what one request may hold.
METRICS_A_REQUEST = 1000
PARAMS_A_REQUEST = 100
WARN_EVERY_S = 3600.0
FIRST_PAUSE_S = 0.5  # after a failure; doubled with each further one
LOCK_PATIENCE_S = 60.0
DOMAINS_A_WINDOW = 256  # about whose metrics a window may add, if nobody says otherwise
SNAPSHOT_BYTES = 64 << 20  # a larger file is sent at the end only


@dataclass(frozen=True, slots=True, kw_only=True)
class TrackerOptions:
    kind: Literal["mlflow", "none"] = "mlflow"
    uri: str | None = None  # of the MLflow tracking server or store; None: mlflow.db beside the run's folder
    experiment: str = "mixer"
    name: str | None = None  # of the run; None: its folder's
    parent: str | None = None  # id of the run that this one belongs to
    tags: dict[str, str] = field(default_factory=dict[str, str])
    timeout_s: float = 10.0  # of one request
    every_windows: int | None = None  # between metrics by domain; None: one more for each 256 domains
    artifacts_every_windows: int | None = 64  # schedule, config, catalog and report; None: at the end only
    max_pause_s: float = 60.0  # between attempts

    def __post_init__(self) -> None:
        if any(every is not None and every < 1 for every in (self.every_windows, self.artifacts_every_windows)):
            raise ConfigError(
                f"every_windows={self.every_windows}, artifacts_every_windows={self.artifacts_every_windows}; "
                "they need to be at least 1."
            )
        if not (self.timeout_s > 0 and self.max_pause_s > 0):
            raise ConfigError(
                f"timeout_s={self.timeout_s}, max_pause_s={self.max_pause_s}; they need to be above 0 seconds."
            )
        if not self.experiment:
            raise ConfigError("experiment is empty. Name the experiment that the run belongs to.")

    def every(self, num_domains: int) -> int:
        """Windows between metrics by domain; thousands of domains in each would keep a store busier than training."""
        return self.every_windows or -(-num_domains // DOMAINS_A_WINDOW)


class Tracker(Protocol):
    """No method raises, or waits for a tracker longer than it says."""

    def wake(self) -> None:
        """There is more in the journal."""
        ...

    def close(self, patience_s: float) -> None:
        """Send what is left, for at most so long; what is not sent then, a next tracker of the folder sends."""
        ...

    @property
    def behind(self) -> int:
        """Records of the journal that are not known to have arrived."""
        ...


def open_tracker(
    options: TrackerOptions, folder: Path, schedule: MixtureSchedule, fence: Fence | None = None
) -> Tracker:
    return MlflowTracker(options, folder, schedule, fence) if options.kind == "mlflow" else NoTracker()


class NoTracker:
    """Sends nothing to nobody."""

    def wake(self) -> None:
        pass

    def close(self, patience_s: float) -> None:
        pass

    @property
    def behind(self) -> int:
        return 0


@dataclass(slots=True)
class MemoryStore:
    """What has arrived at a `MemoryTracker`; outlives it."""

    metrics: list[Metric] = field(default_factory=list[Metric])
    params: dict[str, str] = field(default_factory=dict[str, str])
    tags: dict[str, str] = field(default_factory=dict[str, str])
    status: str = "RUNNING"
    files: dict[str, bytes] = field(default_factory=dict[str, bytes])


class MemoryTracker:
    """Everything in memory and at once, for tests."""

    def __init__(
        self, options: TrackerOptions, folder: Path, schedule: MixtureSchedule, store: MemoryStore | None = None
    ) -> None:
        self.store = store or MemoryStore()
        self._outbox = Outbox(folder, schedule, "memory", every_windows=options.every(len(schedule.catalog)))
        self.store.params |= params_of(folder)
        self.store.tags |= tags_of(
            folder, schedule, self._outbox.position.run, parent=options.parent, more=options.tags
        )
        self.wake()

    def wake(self) -> None:
        while batch := self._outbox.next():
            self.store.metrics += batch.metrics
            if batch.status:
                self.store.status = batch.status[0]
            self._outbox.note(batch)

    def close(self, patience_s: float) -> None:
        self.wake()
        with staged(self._outbox.folder) as copies:
            for path in copies.rglob("*.*"):
                self.store.files[path.relative_to(copies).as_posix()] = path.read_bytes()

    @property
    def behind(self) -> int:
        return self._outbox.behind


class MlflowTracker:
    """Sends a run to MLflow from a thread of its own."""

    def __init__(
        self, options: TrackerOptions, folder: Path, schedule: MixtureSchedule, fence: Fence | None = None
    ) -> None:
        """With the fence of the run, a process that was replaced stops sending."""
        folder = folder.absolute()
        self._options, self._folder, self._schedule = options, folder, schedule
        self._uri = uri_of(options, folder)
        where = f"{redacted(options.uri) if options.uri else 'beside'} {options.experiment}"
        self._outbox = Outbox(folder, schedule, where, every_windows=options.every(len(schedule.catalog)), fence=fence)
        self._in_doubt = True  # records behind the position may have arrived
        self._client: MlflowClient | None = None
        self._warned: float | None = None
        self._awake, self._closing, self._deadline = threading.Event(), threading.Event(), math.inf
        self._thread = threading.Thread(target=self._work, name="mixer-tracker", daemon=True)
        self._thread.start()

    def wake(self) -> None:
        self._awake.set()

    def close(self, patience_s: float) -> None:
        self._deadline = time.monotonic() + patience_s
        self._closing.set()
        self._awake.set()
        self._thread.join(patience_s)
        if (left := self.behind) and not self._outbox.is_lost:
            logger.warning(
                "%d records of %s did not reach %s in %g s. They are kept; resume the run, or open its tracker again, "
                "to send them.",
                *(left, self._folder / "journal.jsonl", redacted(self._uri), patience_s),
            )

    @property
    def behind(self) -> int:
        return self._outbox.behind

    @property
    def run_id(self) -> str | None:
        """MLflow's name of the run, once it is known."""
        return self._outbox.position.run_id

    # ---- the thread ----------------------------------------------------------------------------

    def _work(self) -> None:
        failures = 0
        while True:
            self._awake.clear()
            closing = self._closing.is_set()
            try:
                self._deliver(closing)
            except Exception as error:  # whatever is wrong with a tracker, the run goes on
                if self._outbox.is_lost:
                    logger.warning("nothing of %s is sent by this process any more: %s", self._folder, error)
                    return
                self._in_doubt = True
                failures += 1
                self._warn(error)
                if self._is_late:
                    return
                self._pause(failures)
                continue
            if failures:
                logger.info("%s has everything again after %d failed attempts", redacted(self._uri), failures)
                failures = 0
            if closing or self._is_late:
                return
            self._awake.wait()

    @property
    def _is_late(self) -> bool:
        return time.monotonic() >= self._deadline

    def _pause(self, failures: int) -> None:
        longest = min(self._options.max_pause_s, FIRST_PAUSE_S * 2 ** min(failures - 1, 20))
        pause = longest * random.uniform(0.5, 1)
        if self._closing.is_set():
            time.sleep(max(0.0, min(pause, self._deadline - time.monotonic())))
        else:
            self._closing.wait(pause)

    def _warn(self, error: Exception) -> None:
        text = redacted(f"{type(error).__name__}: {error}")
        logger.debug("tracker: %s", text)
        now = time.monotonic()
        if self._warned is None or now - self._warned >= WARN_EVERY_S:
            self._warned = now
            logger.warning(
                "%s does not take the run %s: %s. The run goes on; %d records wait in its journal and are sent when "
                "it does. Start it, or mend tracker.uri.",
                *(redacted(self._uri), self._folder, text, self.behind),
            )

    def _deliver(self, closing: bool) -> None:
        self._outbox.require_owner()
        client = self._client = self._client or connect(self._uri, self._options.timeout_s)
        run_id = self._find_run(client)
        self._describe(client, run_id)
        while (batch := self._outbox.next()) and not self._is_late:
            self._outbox.require_owner()  # what is under way when another process takes over, repeats what that sends
            self._send(client, run_id, batch)
            self._outbox.note(batch)
        position, every = self._outbox.position, self._options.artifacts_every_windows
        if closing or (every and position.window - position.files >= every):
            self._outbox.require_owner()
            with staged(self._folder, None if closing else SNAPSHOT_BYTES) as copies:
                client.log_artifacts(run_id, str(copies))
            position.files = position.window
            self._outbox.write()
        if closing and position.attempts > 1:
            self._drop_doubles(client, run_id)

    # ---- what MLflow is told -------------------------------------------------------------------

    def _find_run(self, client: "MlflowClient") -> str:
        """The id of this run: noted, or found by its tag, or of a run that is created now."""
        position = self._outbox.position
        if position.run_id is None:
            experiment = experiment_of(client, self._uri, self._options.experiment)
            if found := self._runs(client, experiment):
                position.run_id = found[0]
            else:
                position.attempts += 1
                self._outbox.write()  # durable before the run exists, so that it is found again
                tags = tags_of(
                    self._folder,
                    self._schedule,
                    position.run,
                    parent=self._options.parent,
                    more=self._options.tags,
                )
                name = self._options.name or self._folder.name
                position.run_id = client.create_run(experiment, tags=tags, run_name=name).info.run_id
            self._outbox.write()
        return position.run_id

    def _runs(self, client: "MlflowClient", experiment: str) -> list[str]:
        wanted = f"tags.`{RUN_TAG}` = '{self._outbox.position.run}'"
        runs = client.search_runs([experiment], filter_string=wanted, order_by=["attributes.start_time ASC"])
        return [run.info.run_id for run in runs]

    def _drop_doubles(self, client: "MlflowClient", run_id: str) -> None:
        """Delete empty runs that late answers to earlier attempts have made."""
        for double in self._runs(client, client.get_run(run_id).info.experiment_id):
            if double != run_id and not client.get_run(double).data.metrics:
                client.delete_run(double)

    def _describe(self, client: "MlflowClient", run_id: str) -> None:
        param = _mlflow().entities.Param
        position = self._outbox.position
        if position.described:
            return
        known = client.get_run(run_id).data.params  # it refuses other values, and the config may have changed
        params = [param(key, value) for key, value in params_of(self._folder).items() if key not in known]
        for some in chunks(params, PARAMS_A_REQUEST):
            try:
                client.log_batch(run_id, params=some, synchronous=True)
            except _mlflow().exceptions.MlflowException as error:
                if error.error_code != "INVALID_PARAMETER_VALUE":
                    raise
                logger.warning("MLflow refuses parameters of %s: %s", self._folder, redacted(str(error)))
        position.described = True
        self._outbox.write()

    def _send(self, client: "MlflowClient", run_id: str, batch: Batch) -> None:
        metric_of = _mlflow().entities.Metric
        metrics = self._missing(client, run_id, batch.metrics) if self._in_doubt else batch.metrics
        self._in_doubt = True
        for some in chunks(metrics, METRICS_A_REQUEST):
            values = [metric_of(metric.key, metric.value, metric.time_ms, metric.step) for metric in some]
            client.log_batch(run_id, metrics=values, synchronous=True)
        if batch.status:
            status, since_ms = batch.status
            if status == "RUNNING":
                client.update_run(run_id, status=status)
            else:
                client.set_terminated(run_id, status=status, end_time=since_ms)
        self._in_doubt = False

    def _missing(self, client: "MlflowClient", run_id: str, metrics: list[Metric]) -> list[Metric]:
        """Those that have not arrived: beyond the newest of their name."""
        newest = {found.key: found.step for found in client.get_run(run_id).data.to_proto().metrics}
        return [metric for metric in metrics if metric.step > newest.get(metric.key, metric.step - 1)]


def uri_of(options: TrackerOptions, folder: Path) -> str:
    """Where the run in a folder is tracked."""
    return options.uri or f"sqlite:///{folder.absolute().parent / 'mlflow.db'}"


def connect(uri: str, timeout_s: float) -> "MlflowClient":
    """A client. Sets MLflow's limits for requests in this process's environment: one attempt of `timeout_s`, since
    the pauses between attempts are decided here."""
    os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] = str(math.ceil(timeout_s))
    os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = "0"
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    with _alone(_database_of(uri)):  # else two that make a new database spoil it
        return _mlflow().MlflowClient(tracking_uri=uri)


def experiment_of(client: "MlflowClient", uri: str, name: str) -> str:
    """The id of the experiment, which is made if need be."""
    if found := client.get_experiment_by_name(name):
        return found.experiment_id
    database = _database_of(uri)
    try:
        return client.create_experiment(name, (database.parent / "mlartifacts").as_uri() if database else None)
    except _mlflow().exceptions.MlflowException:
        if found := client.get_experiment_by_name(name):
            return found.experiment_id  # another process was faster
        raise


def chunks(values: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    return (values[start : start + size] for start in range(0, len(values), size))


def _mlflow() -> Any:
    """The package. Importing it takes seconds, so the thread that needs it does that."""
    return importlib.import_module("mlflow")


def _database_of(uri: str) -> Path | None:
    """The file of an SQLite store."""
    return Path(uri.removeprefix("sqlite:///")).absolute() if uri.startswith("sqlite:///") else None


@contextlib.contextmanager
def _alone(database: Path | None) -> Iterator[None]:
    """No other tracker opens this database meanwhile."""
    if database is None:
        yield
        return
    database.parent.mkdir(parents=True, exist_ok=True)
    number = os.open(f"{database}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    deadline = time.monotonic() + LOCK_PATIENCE_S
    try:
        while True:
            try:
                fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.05)
        yield
    finally:
        os.close(number)
