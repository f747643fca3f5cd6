"""Jobs on a cluster through Ray's job server: send one, follow its log, stop it, list them.

A job's life does not depend on who follows it: a follower that is interrupted or loses the connection leaves it
running. The log comes from its beginning each time, so a follower that had to connect again skips what it has
shown. What is said to the user goes through `say`, the job's own log through `write`.
"""

import asyncio
import contextlib
import logging
import os
import re
import secrets
import shlex
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mixer.control.doorway import TOKEN, Doorway
from mixer.control.parcel import Parcel, megabytes
from mixer.core.errors import ConfigError, MixerError

Say = Callable[[str], None]

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
SECRET = re.compile(r"TOKEN|SECRET|PASSWORD|CREDENTIAL|(^|_)KEY(_|$)", re.I)
PATIENCE_S = 60.0  # how long a lost connection is tried again
RETRY_S = 1.0
# A job that is asked to end may write its checkpoint; Ray would kill it after three seconds.
GRACE_S = 110
GRACE = "RAY_JOB_STOP_WAIT_TIME_S"
STOP_S = GRACE_S + 10.0
CHATTY = (
    "ray.dashboard.modules.dashboard_sdk",
    "ray.dashboard.modules.job.sdk",
    "ray._private.runtime_env.packaging",
)
ENDED = ("SUCCEEDED", "FAILED", "STOPPED")


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """One job to be run."""

    verb: str
    name: str
    python: str = "python"  # as the cluster's shell finds it
    parcel: Parcel
    env: Mapping[str, str] = field(default_factory=dict[str, str])

    @property
    def entrypoint(self) -> str:
        return shlex.join([self.python, "-m", f"jobs.{self.verb.replace('-', '_')}", *self.parcel.args])


def checked_name(name: str | None, verb: str) -> str:
    """An id that is a word in addresses and shells; made up, with the time in it, if none is given."""
    if name is None:
        return f"{verb}-{datetime.now(UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"
    if not NAME.fullmatch(name):
        raise ConfigError(f"--name {name!r}: needed are letters, digits, '.', '_' and '-', 100 at most. Choose such.")
    return name


def checked_env(pairs: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Variables for the job, and what the user should know of them."""
    env: dict[str, str] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", key):
            raise ConfigError(f"--env {key}: needed NAME=VALUE, as in --env MIXER_LOG=debug.")
        if key == TOKEN:
            raise ConfigError(
                f"--env {key}: who sees the job sees its variables. Leave it out; a job has its cluster's."
            )
        env[key] = value
    secret = [key for key in env if SECRET.search(key)]
    notes = [f"{', '.join(secret)}: whoever sees the cluster's dashboard can read it."] if secret else []
    return env, notes


class Jobs:
    """The jobs of one cluster."""

    def __init__(self, doorway: Doorway, say: Say, *, client: Any = None) -> None:
        """`client` stands for Ray's own where there is no cluster."""
        self._doorway = doorway
        self._say = say
        for note in doorway.notes:
            say(f"note: {note}")
        self._client = client or self._connect()

    def _connect(self) -> Any:
        from ray.job_submission import JobSubmissionClient  # noqa: PLC0415 (seconds; not for who is refused before)

        for name in CHATTY:  # each sets its own level when it is imported
            logging.getLogger(name).setLevel(logging.WARNING)
        with self._errors("connect"), only_address(self._doorway.address):
            return JobSubmissionClient(self._doorway.address, headers=self._doorway.headers)

    def submit(self, order: Order) -> str:
        """Send the parcel and start the job; its id."""
        runtime_env: dict[str, Any] = {"env_vars": {GRACE: str(GRACE_S)} | dict(order.env)}
        with tempfile.TemporaryDirectory(prefix="mixer-submit-") as folder:
            if order.parcel.files:
                order.parcel.write(Path(folder))
                runtime_env["working_dir"] = folder
            with self._errors("submit"):
                try:
                    job_id = self._client.submit_job(
                        entrypoint=order.entrypoint, submission_id=order.name, runtime_env=runtime_env
                    )
                except RuntimeError as error:
                    if "already exists" not in str(error):
                        raise
                    raise ConfigError(
                        f"{self._doorway.address} already had a job {order.name!r}. Choose another --name, or follow "
                        f"that one: {command('--follow', order.name)}"
                    ) from None
        size = f"{len(order.parcel.files)} files, {megabytes(order.parcel.num_bytes)}"
        self._say(f"job {job_id} at {self._doorway.address}: {order.entrypoint} ({size} sent)")
        return job_id

    def follow(self, job_id: str, write: Callable[[str], object]) -> int:
        """Show a job's log until the job has ended; 0 if it succeeded, else its own status or 1."""
        self._info(job_id)
        try:
            asyncio.run(self._show(job_id, write))
        except KeyboardInterrupt:
            self._say(f"job {job_id} goes on. {hints(job_id)}")
            raise
        return self._outcome(job_id)

    async def _show(self, job_id: str, write: Callable[[str], object]) -> None:
        shown = 0
        patience_until = time.monotonic() + PATIENCE_S
        while True:
            reason = ""
            seen = 0
            try:
                async for text in self._client.tail_job_logs(job_id):
                    seen += len(text)
                    if seen > shown:
                        write(text[len(text) - (seen - shown) :])
                        shown = seen
                    patience_until = time.monotonic() + PATIENCE_S
                if str(await asyncio.to_thread(self._client.get_job_status, job_id)) in ENDED:
                    return
            except BrokenPipeError:  # ours: nobody reads what we write
                raise
            except Exception as error:  # the connection's: their classes belong to packages that may change
                reason = self._doorway.clean(" ".join(str(error).split())) or type(error).__name__
            if time.monotonic() > patience_until:
                raise MixerError(
                    f"lost the connection to {self._doorway.address} for {PATIENCE_S:.0f} s ({reason}). The job may "
                    f"still run; follow it again: {command('--follow', job_id)}"
                )
            await asyncio.sleep(RETRY_S)

    def _outcome(self, job_id: str) -> int:
        info = self._info(job_id)
        status = str(info.status)
        if status == "SUCCEEDED":
            self._say(f"job {job_id} succeeded")
            return 0
        code = info.driver_exit_code
        reason = (info.message or "").strip().splitlines()
        self._say(self._doorway.clean(f"job {job_id} {status.lower()}: {reason[0] if reason else 'no reason given'}"))
        return code if code and 0 < code < 256 else 1

    def stop(self, job_id: str) -> int:
        """Ask a job to end, and wait for it: it gets the time to write its checkpoint."""
        self._info(job_id)
        with self._errors("stop"):
            if not self._client.stop_job(job_id):
                self._say(f"job {job_id} had ended already: {str(self._info(job_id).status).lower()}")
                return 0
        deadline = time.monotonic() + STOP_S
        while time.monotonic() < deadline:
            if (status := str(self._info(job_id).status)) in ENDED:
                self._say(f"job {job_id}: {status.lower()}")
                return 0
            time.sleep(0.2)
        self._say(f"job {job_id} was asked to stop and is not done after {STOP_S:.0f} s; {hints(job_id)}")
        return 1

    def rows(self) -> Iterator[tuple[str, str, str, str]]:
        """Of every job sent to this server, oldest first: id, status, begin, command."""
        with self._errors("list"):
            jobs = [job for job in self._client.list_jobs() if job.submission_id]
        for job in sorted(jobs, key=lambda one: one.start_time or 0):
            begun = datetime.fromtimestamp((job.start_time or 0) / 1000, UTC)
            yield str(job.submission_id), str(job.status), f"{begun:%Y-%m-%d %H:%M:%S}", job.entrypoint

    def _info(self, job_id: str) -> Any:
        with self._errors("look up"):
            try:
                return self._client.get_job_info(job_id)
            except RuntimeError as error:
                if "404" not in str(error) and "does not exist" not in str(error):
                    raise
                raise ConfigError(
                    f"{self._doorway.address} knows no job {job_id!r}. {command('--list')} shows those it knows."
                ) from None

    @contextlib.contextmanager
    def _errors(self, what: str) -> Iterator[None]:
        """What Ray's client and its HTTP library raise, as one line of ours."""
        try:
            yield
        except (RuntimeError, ValueError, OSError) as error:  # requests' errors are OSErrors, Ray's are RuntimeErrors
            lines = [line.strip() for line in str(error).splitlines() if line.strip().strip(".")]
            reason = self._doorway.clean(lines[-1] if lines else repr(error))
            raise MixerError(
                f"could not {what} at {self._doorway.address}: {reason} See that the cluster runs, and try again."
            ) from error


@contextlib.contextmanager
def only_address(address: str) -> Iterator[None]:
    """Ray's client prefers these variables to the address it is given."""
    names = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
    before = {name: os.environ.pop(name) for name in names if name in os.environ}
    os.environ[names[0]] = address
    try:
        yield
    finally:
        del os.environ[names[0]]
        os.environ.update(before)


def command(*words: str) -> str:
    return f"`{shlex.join(['mixer', 'submit', *words])}`"


def hints(job_id: str) -> str:
    return f"Follow it: {command('--follow', job_id)}; stop it: {command('--stop', job_id)}"
