"""An MLflow server that is not there, dies, hangs, refuses or does what it was told and says nothing: a real one,
behind a proxy that fails on purpose."""

import http.client
import json
import os
import random
import signal
import socket
import sqlite3
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from mixer.control.tracker import MlflowTracker, TrackerOptions
from tests.control.tracking import add, event, expected, make_run, make_schedule, rows_in, settle, wait_for

SCHEDULE = make_schedule()
FAULTS = ("refuse", "do and refuse", "do and drop", "do and tear", "drop")


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


class Server:
    """`mlflow server` as a process of its own, over one database."""

    def __init__(self, folder: Path) -> None:
        self.port = free_port()
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--backend-store-uri", f"sqlite:///{folder / 'mlflow.db'}", "--workers", "1"]
        command += ["--artifacts-destination", str(folder / "artifacts")]
        environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
        self._log = (folder / f"{self.port}.log").open("wb")
        self.process = subprocess.Popen(
            command, env=environment, stdout=self._log, stderr=self._log, start_new_session=True
        )

    def is_up(self) -> bool:
        assert self.process.poll() is None, "the server ended by itself"
        try:
            connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
            connection.request("GET", "/health")
            return connection.getresponse().status == 200
        except OSError:
            return False

    def kill(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)  # with the worker that it started
            self.process.wait()
        self._log.close()


class Proxy(ThreadingHTTPServer):
    """Passes requests on; `fault` says for each what is done instead, None being nothing."""

    daemon_threads = True

    def __init__(self, port: int, upstream: int) -> None:
        self.upstream = upstream
        self.fault: Callable[[str], str | None] = lambda path: None
        self.released = threading.Event()  # ends what hangs
        self.failed = 0
        self.passed: list[str] = []
        super().__init__(("127.0.0.1", port), Handler)
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        self.released.set()
        self.shutdown()
        self.server_close()

    def handle_error(self, *_: object) -> None:
        pass  # clients leave, and upstream dies: that is what it is for


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Proxy  # pyright: ignore[reportIncompatibleVariableOverride]  # the base does not know whose handler it is

    def handle_any(self) -> None:
        data = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        fault = self.server.fault(self.path)
        self.server.failed += fault is not None
        if fault == "hang":
            self.server.released.wait()  # and is done after all, when nobody waits for it any more
        status, body = (500, b"{}") if fault in ("refuse", "drop") else self._forward(data)
        if fault == "do and refuse":
            status, body = 500, b"{}"
        self.close_connection = True
        if fault in ("do and drop", "drop"):
            return
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if fault == "do and tear" else body)

    def _forward(self, data: bytes) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.server.upstream, timeout=60)
        headers = {key: value for key, value in self.headers.items() if key.lower() not in ("host", "connection")}
        connection.request(self.command, self.path, data, headers)
        answer = connection.getresponse()
        self.server.passed.append(self.path)
        return answer.status, answer.read()

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = handle_any  # noqa: N815  # as the base class calls them

    def log_message(self, format: str, *args: object) -> None:
        pass


class Home:
    def __init__(self, folder: Path) -> None:
        self.folder, self.database = folder, folder / "mlflow.db"

    def check(self, folder: Path) -> None:
        """All of the run at `folder` is there, once, in one run."""
        position = json.loads((folder / "tracker.json").read_text())
        assert rows_in(self.database, position["run_id"]) == expected(folder, SCHEDULE)
        connection = sqlite3.connect(self.database)
        runs = connection.execute(
            "select r.run_uuid from runs r join tags t on t.run_uuid = r.run_uuid "
            "where t.key = 'mixer.run' and t.value = ? and r.lifecycle_stage = 'active'",
            (position["run"],),
        ).fetchall()
        params = connection.execute("select count(*) from params where run_uuid = ?", (position["run_id"],)).fetchone()
        connection.close()
        assert runs == [(position["run_id"],)] and params == (9,)


@pytest.fixture(scope="module")
def servers(tmp_path_factory) -> Iterator[list[Server]]:
    """Two servers over one database, started at once: the second takes over where the first is killed."""
    mlflow = pytest.importorskip("mlflow")
    folder = tmp_path_factory.mktemp("server")
    mlflow.MlflowClient(f"sqlite:///{folder / 'mlflow.db'}").search_experiments()
    started = [Server(folder), Server(folder)]
    try:
        for server in started:
            wait_for(server.is_up, 180)
        yield started
    finally:
        for server in started:
            server.kill()


@pytest.fixture
def home(servers) -> Home:
    return Home(Path(servers[0]._log.name).parent)


@pytest.fixture
def proxy(servers) -> Iterator[Proxy]:
    alive = next(server for server in servers if server.process.poll() is None)
    made = Proxy(0, alive.port)
    yield made
    made.close()


@pytest.fixture
def folder(tmp_path) -> Path:
    return tmp_path / "a"


@pytest.fixture(autouse=True)
def hasty(monkeypatch):
    monkeypatch.setattr("mixer.control.tracker.FIRST_PAUSE_S", 0.01)


def options(proxy: Proxy, **more) -> TrackerOptions:
    return TrackerOptions(
        **{"uri": f"http://127.0.0.1:{proxy.server_port}", "max_pause_s": 0.05, "timeout_s": 10, **more}
    )


def test_a_server_in_good_health(home, proxy, folder):
    make_run(folder, 20).append(event("finished"))
    tracker = MlflowTracker(options(proxy), folder, SCHEDULE)
    tracker.close(60)
    home.check(folder)
    place = home.folder / "artifacts"
    assert next(place.rglob("schedule.jsonl")).read_bytes() == b"{}\n"
    assert b"hidden" not in next(place.rglob("run.yaml")).read_bytes()
    assert sum("log-batch" in path for path in proxy.passed) <= 4  # not one request a number


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_for_a_while(home, proxy, folder, fault):
    journal = make_run(folder, 3)
    proxy.fault = lambda path: fault
    tracker = MlflowTracker(options(proxy), folder, SCHEDULE)
    wait_for(lambda: proxy.failed > 2)
    proxy.fault = lambda path: None
    settle(tracker)
    proxy.fault = lambda path: fault
    already = proxy.failed
    for window in range(3, 6):
        add(journal, window, window + 1)
        tracker.wake()
    wait_for(lambda: proxy.failed > already + 2)
    assert tracker.behind > 0
    proxy.fault = lambda path: None
    tracker.close(60)
    assert tracker.behind == 0
    home.check(folder)


@pytest.mark.parametrize("seed", range(2))
def test_faults_at_random(home, proxy, folder, seed, monkeypatch):
    monkeypatch.setattr("mixer.control.outbox.BATCH_METRICS", 100)
    monkeypatch.setattr("mixer.control.tracker.METRICS_A_REQUEST", 40)
    rng = random.Random(seed)
    proxy.fault = lambda path: rng.choice([*FAULTS, None, None, None, None])
    journal = make_run(folder, 5)
    tracker = MlflowTracker(options(proxy), folder, SCHEDULE)
    for window in range(5, 15):
        add(journal, window, window + 1)
        tracker.wake()
    settle(tracker, 120)
    proxy.fault = lambda path: None
    tracker.close(60)
    assert proxy.failed > 5
    home.check(folder)


def test_a_server_that_is_absent_at_the_start(home, servers, folder):
    port = free_port()
    journal = make_run(folder, 2)
    address = TrackerOptions(uri=f"http://127.0.0.1:{port}", max_pause_s=0.05)
    tracker = MlflowTracker(address, folder, SCHEDULE)
    add(journal, 2, 4)
    tracker.wake()
    assert tracker.behind == 9 and tracker.run_id is None
    alive = next(server for server in servers if server.process.poll() is None)
    late = Proxy(port, alive.port)
    try:
        settle(tracker)
        tracker.close(60)
    finally:
        late.close()
    home.check(folder)


@pytest.mark.parametrize("where", ["runs/create", "log-batch"])
def test_a_server_that_hangs_holds_nobody_and_may_do_it_later(home, proxy, folder, where):
    journal = make_run(folder, 1)
    proxy.fault = lambda path: "hang" if where in path else None
    tracker = MlflowTracker(options(proxy, timeout_s=1), folder, SCHEDULE)
    wait_for(lambda: proxy.failed)
    took = []
    for window in range(1, 101):
        begin = time.perf_counter()
        add(journal, window, window + 1)
        tracker.wake()
        took.append(time.perf_counter() - begin)
    assert statistics.median(took) < 0.01, took
    assert tracker.behind == 2 * 101 + 26  # windows and policies, and evaluations
    begin = time.perf_counter()
    tracker.close(0.2)
    assert time.perf_counter() - begin < 2
    tracker = MlflowTracker(options(proxy, timeout_s=1), folder, SCHEDULE)
    already = proxy.failed
    wait_for(lambda: proxy.failed > already)  # the next one hangs too, and gives up
    proxy.fault = lambda path: None
    tracker.close(60)
    assert tracker.behind == 0
    passed = len(proxy.passed)
    proxy.released.set()  # now all that hung is carried out after all
    wait_for(lambda: len(proxy.passed) >= passed + proxy.failed)
    MlflowTracker(options(proxy), folder, SCHEDULE).close(60)
    home.check(folder)


def test_a_server_that_is_killed_and_comes_back(home, servers, folder, monkeypatch):
    """Last in this file: the first server does not come back, the second takes its place."""
    monkeypatch.setattr("mixer.control.outbox.BATCH_METRICS", 100)
    proxy = Proxy(0, servers[0].port)
    journal = make_run(folder, 4)
    tracker = MlflowTracker(options(proxy), folder, SCHEDULE)
    settle(tracker)
    add(journal, 4, 60)
    tracker.wake()
    wait_for(lambda: sum("log-batch" in path for path in proxy.passed) > 5)
    servers[0].kill()
    add(journal, 60, 64)
    tracker.wake()
    time.sleep(0.1)  # some attempts at a server that is gone; none of them may count
    assert tracker.behind > 0
    proxy.upstream = servers[1].port
    tracker.close(60)
    proxy.close()
    assert tracker.behind == 0
    home.check(folder)
