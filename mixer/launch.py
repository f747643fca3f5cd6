"""The driver of a run: joins or starts Ray, starts the run's actor, runs the workers, follows them to the end.

The workers' part is in `mixer.run` and `mixer.training.loop`; nothing here knows of rows or weights. Ray Train runs
in a thread of its own, so that Ctrl-C and SIGTERM come here: the first asks the workers to save and to end, a
second one gives up at once. Whatever way it ends, the run folder goes on with the same command.
"""

import json
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray

from mixer.control.actor import NAMESPACE, find_actor, start_actor
from mixer.control.client import ControllerClient
from mixer.control.doorway import cluster_inside
from mixer.control.fence import epoch_to_replace, require_free
from mixer.control.replay import REPLAY
from mixer.control.rundir import load_origin, load_schedule
from mixer.core import errors
from mixer.core.errors import MixerError, ResumeError, ScheduleError
from mixer.core.schedule import MixtureSchedule
from mixer.data.corpus import CatalogRows
from mixer.run import Job, RunConfig, RunOptions, make_charge, make_trainer, older_rows, plan_length, require_same, work

PATIENCE_S = 30.0  # for the tracker at the end
LAST_WORDS_S = 20.0  # for a controller that is being restarted, when the run fails
Status = dict[str, Any]


@contextmanager
def live(folder: Path, address: str | None = None) -> Iterator[ControllerClient]:
    """The controller of a run that is going on, wherever it runs."""
    try:
        where = json.loads((folder / "live.json").read_text("utf-8"))
        actor, address = where["actor"], address or where["address"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ScheduleError(f"{folder} is not being run: there is no live.json to be read. Start the run.") from error
    with ray_for(RunOptions(path=str(folder), address=address)):
        yield ControllerClient(find_actor(actor), patience_s=10.0)


def order(folder: Path, address: str | None, method: str, *args: Any) -> int:
    """Give an order to a run that is going on; the window it is bound to."""
    with live(folder, address) as run:
        return run.call(method, *args)


@dataclass(frozen=True, slots=True)
class Finish:
    ending: str  # finished, stopped, bad_loss
    status: Status
    behind: int  # records that the tracker could not send


@contextmanager
def ray_for(options: RunOptions) -> Iterator[None]:
    """The Ray of the options; one that was started here is ended here. One that runs in this process is used."""
    if ray.is_initialized():
        yield
        return
    address = options.address or cluster_inside(os.environ) or "local"
    own: dict[str, Any] = {}
    if address == "local":
        memory = options.object_store_mb
        own = {
            "num_cpus": options.num_cpus,
            "object_store_memory": memory * 1_000_000 if memory else None,
            "include_dashboard": False,
        }
    token = Path.home() / ".ray" / "auth_token"
    is_new = not token.exists()
    try:
        ray.init(address=address, namespace=NAMESPACE, log_to_driver=False, logging_level=logging.ERROR, **own)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise MixerError(f"no Ray at {address}: {error}. Correct run.address, or start one here without it.") from error
    if is_new and token.exists():
        token.chmod(0o600)  # Ray writes it so that everybody can read it
    try:
        yield
    finally:
        ray.shutdown()


def fit(
    config: RunConfig,
    rows: CatalogRows,
    *,
    work: Callable[[Job], None] = work,
    on_status: Callable[[Status], None] = lambda status: None,
    say: Callable[[str], None] = lambda text: None,
    every_s: float = 0.5,
    takeover: bool = False,
) -> Finish:
    """Begin the run, or go on with it, until it ends; `work` is what every worker does. A folder that was made to
    repeat a schedule repeats it. `on_status` is told the run's status again and again, `say` what a signal brings. With
    `takeover` a run is gone on with whose owner cannot be reached."""
    folder = config.run.folder
    replaced: int | None = None
    if takeover:
        replaced = epoch_to_replace(folder)
    elif folder.exists():
        require_free(folder)
    followed: MixtureSchedule | None = None
    if (folder / "schedule.jsonl").exists():
        require_same(config, folder)
        if (load_origin(folder) or {}).get("kind") == REPLAY:
            followed = load_schedule(folder)
            followed.check_resume(rows.catalog, config.geometry)
    planned = plan_length(config, rows.catalog)
    charge = replace(make_charge(config, rows, follows=followed is not None), takeover=replaced)
    older = older_rows(followed, rows) if followed else ()
    folder.mkdir(parents=True, exist_ok=True)
    with ray_for(config.run):
        actor = start_actor(charge)
        client = ControllerClient(actor)
        try:
            client.call("note", [{"kind": "event", "what": "begun", "text": f"attempt of process {os.getpid()}"}])
            # Workers run in folders of their own.
            absolute = replace(config, run=replace(config.run, path=str(folder)))
            trainer = make_trainer(Job(absolute, rows, followed or client, actor, planned, older), work)
            error = _run(trainer.fit, client, on_status, every_s, say)
            status = client.call("status")
            _raise(error, status, config)
            ending = status["ending"]
            behind = client.call("close", PATIENCE_S)
            return Finish(ending, status, behind)
        except BaseException as error:
            _tell_end(client, error)
            raise
        finally:
            with suppress(Exception):
                client.call("close", 0.0, deadline=time.monotonic() + LAST_WORDS_S)
                ray.kill(actor)


def _tell_end(client: ControllerClient, error: BaseException) -> None:
    """What a run failed of, or that somebody gave it up, is in its journal and told to the tracker, if they can be
    reached."""
    given_up = not isinstance(error, Exception)  # a second Ctrl-C: nothing is waited for
    what, text = ("stopped", "given up at once") if given_up else ("failed", str(error) or repr(error))
    with suppress(Exception):
        record = {"kind": "event", "what": what, "text": text}
        client.call("note", [record], deadline=time.monotonic() + LAST_WORDS_S)
        client.call("close", 0.0 if given_up else PATIENCE_S, deadline=time.monotonic() + LAST_WORDS_S)


def _run(
    call: Callable[[], Any],
    client: ControllerClient,
    on_status: Callable[[Status], None],
    every_s: float,
    say: Callable[[str], None] = lambda text: None,
) -> Exception | None:
    """Runs `call` in a thread; here signals are taken and the status is told."""
    failed: list[Exception] = []

    def run() -> None:
        try:
            call()
        except Exception as error:  # handed on to the thread that waits
            failed.append(error)

    thread = threading.Thread(target=run, name="ray-train", daemon=True)
    with _Asked(say) as asked:
        thread.start()
        while thread.is_alive():
            thread.join(every_s)
            status = client.call("status")
            if asked.times and not status["stop"]:  # told again to an actor that was restarted
                client.call("stop", asked.why)
            on_status(status)
    return failed[0] if failed else None


class _Asked:
    """SIGINT and SIGTERM: counted the first time, a KeyboardInterrupt the second."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self.times = 0
        self.why = ""
        self._say = say
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "_Asked":
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._take) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _take(self, number: int, _: object) -> None:
        self.times += 1
        self.why = signal.Signals(number).name
        if self.times > 1:
            raise KeyboardInterrupt
        self._say(f"{self.why}: saving a checkpoint, then the run ends; once more gives up at once")


def _raise(error: Exception | None, status: Status, config: RunConfig) -> None:
    if status["failure"]:
        kind, text = status["failure"]
        raise getattr(errors, kind, MixerError)(text)
    if error is not None:
        lines = [line for line in str(error).splitlines() if line.strip()]
        raise ResumeError(
            f"the workers failed more than train.max_failures={config.train.max_failures} times, the last time with: "
            f"{lines[-1] if lines else type(error).__name__}. Ray's logs say more; the same command goes on from the "
            "newest checkpoint."
        ) from error
