"""Examine this machine, or every node of a cluster, and judge what is found.

On a cluster each node is examined by a task pinned to it. A folder is shared if a file that is put there here, and
held locked, is seen and found locked by each node, and the files that they put there are seen here.
"""

import contextlib
import fcntl
import json
import logging
import os
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ray.exceptions import RayError

from mixer.control import doctor, examine
from mixer.control.doctor import Finding
from mixer.control.doorway import knock
from mixer.core.errors import MixerError
from mixer.data.corpus import Corpus
from mixer.data.storage import READ_ERRORS, Storage, put

NODE_S = 150.0  # importing torch on a cold node included
TRACKER_S = 3.0
DASHBOARD_PORT = 8265
ARRIVED_S = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """An option that says where something is written."""

    key: str
    path: str
    storage: Storage
    locks: bool = False  # whether locks must hold there: the folder of a run


@dataclass(frozen=True, slots=True, kw_only=True)
class Concern:
    """What a run would touch, beside the machines."""

    places: tuple[Place, ...] = ()
    corpus: str = ""
    corpus_storage: Storage | None = None
    tracker_uri: str = ""


@dataclass(frozen=True, slots=True)
class Answers:
    """Facts by node, when they were asked for and came, and which nodes did not answer."""

    nodes: list[dict[str, Any]]
    times: list[tuple[float, float]]
    silent: list[Finding]
    dashboard_port: int


def consult(concern: Concern, *, address: str | None = None) -> list[Finding]:
    """All findings: of the cluster at `address` (as ray.init takes it), or of this machine."""
    local, remote = split(concern.places)
    with contextlib.ExitStack() as stack:
        marks: dict[str, str] = {}
        here: dict[str, str] = {}
        for folder in {existing(place.path) for place in local}:
            marks[folder], here[folder] = stack.enter_context(marked(folder))
        request = {"packages": list(doctor.FLOORS), "folders": {f: m for f, m in marks.items() if not here[f]}}
        answers = ask_cluster(address, request) if address else ask_here(request)
        findings = [finding for facts in answers.nodes for finding in doctor.of_node(facts)] + answers.silent
        findings += of_network(answers)
        if address:
            findings.append(doctor.same_versions(answers.nodes))
            pairs = zip(answers.nodes, answers.times, strict=True)
            findings += [doctor.clock(facts, asked, answered) for facts, (asked, answered) in pairs]
        for place in local:
            folder = existing(place.path)
            arrived = arrivals(folder, marks[folder], answers.nodes)
            findings += doctor.storage(place.key, folder, here[folder], answers.nodes, arrived, locks=place.locks)
            if not here[folder]:
                findings += [doctor.disk(facts, place.key, folder) for facts in answers.nodes]
    findings += [try_store(place) for place in remote]
    if concern.corpus:
        findings.append(try_corpus(concern.corpus, concern.corpus_storage))
    if concern.tracker_uri:
        findings.append(doctor.tracker(concern.tracker_uri, try_tracker(concern.tracker_uri)))
    return findings


def of_network(answers: Answers) -> list[Finding]:
    """The job server: who reaches it, and whether it asks for a token."""
    head = next((facts for facts in answers.nodes if facts.get("is_head")), None)
    asks: bool | None = None
    if head and any(port == answers.dashboard_port for _, port in head["listening"]):
        with contextlib.suppress(MixerError):
            asks = knock(f"http://{head['dashboard']}", None).status in (401, 403)
    found = [doctor.token_mode(answers.nodes, asks)]
    return [*found, doctor.dashboard(head, answers.dashboard_port, asks)] if head else found


def ask_here(request: Mapping[str, Any]) -> Answers:
    asked = time.time()
    done = subprocess.run(
        [sys.executable, "-m", "mixer.control.examine"],
        input=json.dumps({**request, "node": socket.gethostname()}),
        capture_output=True, text=True, timeout=NODE_S, check=False,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )  # fmt: skip
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
        return Answers([], [], [doctor.unreachable(socket.gethostname(), reason)], DASHBOARD_PORT)
    facts = json.loads(done.stdout) | {"is_head": True, "dashboard": f"127.0.0.1:{DASHBOARD_PORT}"}
    return Answers([facts], [(asked, time.time())], [], DASHBOARD_PORT)


def ask_cluster(address: str, request: Mapping[str, Any]) -> Answers:
    import ray  # noqa: PLC0415 (seconds; not for a check of this machine)
    from ray import cloudpickle  # noqa: PLC0415
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy  # noqa: PLC0415

    cloudpickle.register_pickle_by_value(examine)  # a node need not have mixer
    try:
        context = ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, namespace="mixer-doctor")
    except (ConnectionError, RuntimeError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise MixerError(
            f"no cluster at {address}: {reason} Needed is one that runs. Start it, or leave --address out."
        ) from error
    try:
        dashboard = str(context.dashboard_url or f"127.0.0.1:{DASHBOARD_PORT}")
        task = ray.remote(num_cpus=0, max_retries=0)(examine.examine)
        pending: dict[Any, tuple[dict[str, Any], str, float]] = {}
        for number, node in enumerate(one for one in ray.nodes() if one["Alive"]):
            name = f"{node['NodeManagerHostname']}-{number}"
            strategy = NodeAffinitySchedulingStrategy(node_id=node["NodeID"], soft=False)
            asked = task.options(scheduling_strategy=strategy).remote({**request, "node": name})
            pending[asked] = (node, name, time.time())
        answers = Answers([], [], [], int(dashboard.rsplit(":", 1)[1]))
        deadline = time.monotonic() + NODE_S
        while pending:
            ready, _ = ray.wait(list(pending), timeout=max(0.0, deadline - time.monotonic()))
            for one in ready or list(pending):
                node, name, asked_s = pending.pop(one)
                try:
                    facts = ray.get(one, timeout=0 if ready else 0.1)
                except (RayError, TimeoutError) as error:
                    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
                    answers.silent.append(doctor.unreachable(name, reason))
                    continue
                is_head = "node:__internal_head__" in node["Resources"]
                answers.nodes.append(facts | {"is_head": is_head, "dashboard": dashboard})
                answers.times.append((asked_s, time.time()))
        return answers
    finally:
        ray.shutdown()


def split(places: Sequence[Place]) -> tuple[list[Place], list[Place]]:
    """Folders, and places in object stores."""
    remote = [place for place in places if "://" in place.path and not place.path.startswith("file://")]
    return [place for place in places if place not in remote], remote


def existing(path: str) -> str:
    """The folder itself, or the nearest above it that is there."""
    folder = Path(path.removeprefix("file://")).absolute()
    while not folder.is_dir():
        folder = folder.parent
    return str(folder)


@contextlib.contextmanager
def marked(folder: str) -> Iterator[tuple[str, str]]:
    """A mark in the folder, held locked; with it what went wrong, or nothing."""
    mark = f".mixer-doctor-{secrets.token_hex(6)}"
    path = Path(folder, mark)
    number = -1
    try:
        try:
            number = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
            os.write(number, mark.encode())
            os.fsync(number)
        except OSError as error:
            yield mark, f"{error.strerror}: {folder}"
            return
        with contextlib.suppress(OSError):  # a file system without locks: `examine` will find that out
            fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield mark, ""
    finally:
        if number >= 0:
            os.close(number)
        for left in Path(folder).glob(f"{mark}*"):
            with contextlib.suppress(OSError):
                left.unlink()


def arrivals(folder: str, mark: str, nodes: Sequence[Mapping[str, Any]]) -> set[str]:
    """The nodes whose files are seen here."""
    wanted = {facts["node"] for facts in nodes if facts["folders"].get(folder, {}).get("seen")}
    found: set[str] = set()
    deadline = time.monotonic() + ARRIVED_S
    while True:
        names = set(os.listdir(folder))
        found = {node for node in wanted if f"{mark}-{node}" in names}
        if found == wanted or time.monotonic() > deadline:
            return found
        time.sleep(0.2)


def try_store(place: Place) -> Finding:
    """Write an object, read it, delete it."""
    name = f"storage of {place.key}"
    try:
        filesystem, root = place.storage.locate(place.path)
        mark = f".mixer-doctor-{secrets.token_hex(6)}"
        put(filesystem, root, mark, mark.encode())
        with filesystem.open_input_file(f"{root}/{mark}") as file:
            is_same = file.read() == mark.encode()
        filesystem.delete_file(f"{root}/{mark}")
    except (MixerError, *READ_ERRORS) as error:
        mend = f"correct {place.key} or the store's endpoint, and see that credentials are set on every node"
        return Finding(name=name, level="bad", found=" ".join(str(error).split()), mend=mend)
    if place.locks:
        mend = f"set {place.key} to a shared folder: a run's directory needs locks, and an object store has none"
        return Finding(name=name, level="bad", found=f"{place.path} is an object store", mend=mend)
    level = "ok" if is_same else "bad"
    return Finding(
        name=name, level=level, found=f"{place.path}: {'written and read' if is_same else 'reads otherwise'}"
    )


def try_corpus(path: str, storage: Storage | None) -> Finding:
    try:
        corpus = Corpus.open(path, storage=storage)
    except MixerError as error:
        return doctor.corpus(path, " ".join(str(error).split()))
    num_rows = sum(shard.rows for shard in corpus.shards)
    return doctor.corpus(path, "", f"{len(corpus.shards)} shards, {num_rows:,} rows")


def try_tracker(uri: str) -> str:
    """What is wrong with a tracker's address; nothing if a server or a folder is there."""
    parts = urlsplit(uri)
    if parts.scheme in ("http", "https"):
        try:
            port = parts.port or (443 if parts.scheme == "https" else 80)
            socket.create_connection((parts.hostname or "", port), timeout=TRACKER_S).close()
        except (OSError, ValueError) as error:
            return str(error) or "no answer"
        return ""
    if parts.scheme in ("", "file", "sqlite"):
        path = uri.removeprefix("sqlite:///").removeprefix("file://")
        folder = existing(path)
        return "" if os.access(folder, os.W_OK) else f"{folder} cannot be written"
    return ""
