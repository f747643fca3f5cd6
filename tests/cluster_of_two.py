"""A cluster of two raylets on this machine, with token authentication and a job server, for tests.

Everything is its own: ports that were free, a token, a folder, process groups. `start` waits until both nodes
are alive; `stop` ends what was started here and nothing else. Used as a context manager:

    with ClusterOfTwo() as cluster:
        subprocess.run([...], env=cluster.environment())
"""

import contextlib
import ctypes
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import TracebackType
from typing import Any

ROOT = Path(__file__).parents[1]
START_S = 120.0
STOP_S = 10.0
PRCTL = ctypes.CDLL(None).prctl
PR_SET_PDEATHSIG = 1
# What would otherwise reach the cluster's processes, or its clients, from outside.
FOREIGN = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")


class ClusterOfTwo:
    """Head and one more node of `cpus` CPUs each, the head with the resource "head", the other with "other".

    `node_pids` are their raylets, for tests that kill one.
    """

    def __init__(self, *, cpus: int = 2, object_store_mb: int = 100):
        self.token = secrets.token_hex(32)
        self.address = ""  # of the job server, as http://127.0.0.1:8265
        self.gcs_address = ""  # of the cluster itself, for ray.init
        self._cpus = cpus
        self._store_bytes = object_store_mb * 1_000_000
        self._resources = ("head", "other")
        self._nodes: list[subprocess.Popen[bytes]] = []
        # Short: the paths of Ray's sockets in it may have 107 bytes at most.
        self.folder = Path(tempfile.mkdtemp(prefix="two-", dir="/tmp"))
        self.token_file = self.folder / "token"
        self.token_file.touch(mode=0o600)
        self.token_file.write_text(self.token)

    def start(self) -> "ClusterOfTwo":
        ports = free_ports(10)
        gcs, dashboard = ports[0], ports[1]
        self.gcs_address = f"127.0.0.1:{gcs}"
        self.address = f"http://127.0.0.1:{dashboard}"
        try:
            self._start_node(
                0,
                "--head", f"--port={gcs}", "--include-dashboard=true", "--dashboard-host=127.0.0.1",
                f"--dashboard-port={dashboard}", f"--ray-client-server-port={ports[2]}",
                f"--temp-dir={self.folder / 'ray'}", *agent_ports(ports[3:6]),
            )  # fmt: skip
            self._wait_for(1)
            self._start_node(1, f"--address={self.gcs_address}", *agent_ports(ports[6:9]))
            self._wait_for(2)
        except BaseException:
            self.stop()
            raise
        return self

    def _start_node(self, number: int, *options: str) -> None:
        command = [
            *(sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats"),
            *(f"--num-cpus={self._cpus}", f"--object-store-memory={self._store_bytes}", "--node-ip-address=127.0.0.1"),
            f"--resources={json.dumps({self._resources[number]: 1})}",
            *options,
        ]
        with open(self.folder / f"node-{number}.log", "wb") as log:
            node = subprocess.Popen(
                command,
                env=self.environment(),
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=end_with_parent,  # noqa: PLW1509 (one system call; no lock is taken)
            )
        self._nodes.append(node)

    def environment(self, **more: str) -> dict[str, str]:
        """Of a client of this cluster: the token comes from a file, and this project is found."""
        kept = {name: value for name, value in os.environ.items() if name not in FOREIGN}
        path = os.pathsep.join([str(ROOT), *filter(None, [kept.get("PYTHONPATH", "")])])
        # `python` is this one, as in an activated environment.
        kept |= {"PYTHONPATH": path, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{kept.get('PATH', '')}"}
        return kept | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(self.token_file)} | more

    @property
    def node_pids(self) -> tuple[int, ...]:
        """The raylets, head first."""
        return tuple(pid for node in self._nodes for pid, name in descendants(node.pid) if name == "raylet")

    def alive_nodes(self) -> int:
        request = urllib.request.Request(
            f"{self.address}/api/v0/nodes", headers={"Authorization": f"Bearer {self.token}"}
        )
        with urllib.request.urlopen(request, timeout=5) as answer:
            nodes: list[dict[str, Any]] = json.load(answer)["data"]["result"]["result"]
        return sum(node["state"] == "ALIVE" for node in nodes)

    def _wait_for(self, num_nodes: int) -> None:
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError, urllib.error.URLError, ValueError, KeyError, TypeError):
                if self.alive_nodes() >= num_nodes:
                    return
            for number, node in enumerate(self._nodes):
                if node.poll() is not None:
                    raise RuntimeError(f"node {number} ended with {node.returncode}:\n{self.log(number)}")
            time.sleep(0.1)
        raise RuntimeError(f"no {num_nodes} nodes after {START_S:.0f} s:\n{self.log(len(self._nodes) - 1)}")

    def log(self, number: int) -> str:
        return (self.folder / f"node-{number}.log").read_text("utf-8", "replace")[-4000:]

    def stop(self) -> None:
        """Kill what was started here, by its ids: below the nodes, or with this cluster's folder among its words."""
        deadline = time.monotonic() + STOP_S
        while time.monotonic() < deadline:
            ours = {pid for node in self._nodes for pid, _ in descendants(node.pid)}
            ours |= {node.pid for node in self._nodes if node.poll() is None}
            ours |= mentioning(str(self.folder))
            for pid in ours:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            if not ours:
                break
            time.sleep(0.05)
        for node in self._nodes:
            node.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self) -> "ClusterOfTwo":
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def end_with_parent() -> None:
    """In a child before it runs: it is asked to end, and ends its own, when the tests are killed."""
    PRCTL(PR_SET_PDEATHSIG, signal.SIGTERM)


def agent_ports(ports: list[int]) -> list[str]:
    names = ("dashboard-agent-listen-port", "dashboard-agent-grpc-port", "metrics-export-port")
    return [f"--{name}={port}" for name, port in zip(names, ports, strict=True)]


def free_ports(number: int) -> list[int]:
    """Ports that were all free at one moment."""
    with contextlib.ExitStack() as open_sockets:
        sockets = [open_sockets.enter_context(socket.socket()) for _ in range(number)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def descendants(pid: int) -> list[tuple[int, str]]:
    """Processes below one, with their names, from /proc."""
    children: dict[int, list[tuple[int, str]]] = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with contextlib.suppress(OSError, ValueError):
                text = (folder / "stat").read_text()
                name, rest = text[text.index("(") + 1 : text.rindex(")")], text[text.rindex(")") + 2 :].split()
                children.setdefault(int(rest[1]), []).append((int(folder.name), name))
    found: list[tuple[int, str]] = []
    todo = [pid]
    while todo:
        below = children.get(todo.pop(), [])
        found += below
        todo += [child for child, _ in below]
    return found


def mentioning(word: str) -> set[int]:
    """Processes other than this one with `word` in their command line."""
    found: set[int] = set()
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and int(folder.name) != os.getpid():
            with contextlib.suppress(OSError):
                if word.encode() in (folder / "cmdline").read_bytes():
                    found.add(int(folder.name))
    return found
