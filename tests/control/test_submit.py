"""What is sent to a cluster and what is refused before, and what Ray's job server may answer."""

import http.server
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from mixer.control import submit
from mixer.control.doorway import Doorway, Token, cluster_inside, enter, find_token, job_server
from mixer.control.parcel import pack, project_of, refuse_relative
from mixer.control.submit import Jobs, Order, checked_env, checked_name, only_address
from mixer.core.errors import ConfigError, MixerError

TOKEN = "5" * 64


class JobServer(http.server.BaseHTTPRequestHandler):
    """As Ray's: 401 without a token, 403 with a wrong one."""

    asks = True

    def do_GET(self):
        given = self.headers.get("Authorization")
        status = 200 if not self.asks or given == f"Bearer {TOKEN}" else 403 if given else 401
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps({"ray_version": "2.60.0"}).encode() if status == 200 else b"no")

    def log_message(self, format, *args):
        pass


class Open(JobServer):
    asks = False


class SomethingElse(JobServer):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"<html>")


@pytest.fixture
def serve() -> Iterator:
    servers = []

    def start(handler: type[http.server.BaseHTTPRequestHandler]) -> str:
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def project(tmp_path) -> Path:
    """A project with everything beside its code that must not be sent."""
    root = tmp_path / "project"
    files = {
        "jobs/__init__.py": "", "jobs/train.py": "x", "mixer/__init__.py": "", "mixer/data/shards.py": "xy",
        "configs/demo.yaml": "a: 1", "mine.yaml": "b: 2", "data/corpus/big.arrow": "z" * 1000, "runs/x/run.yaml": "",
        ".git/objects/aa": "g", ".venv/lib/x.py": "v", "mixer/__pycache__/a.cpython-311.pyc": "c", "mixer/.hidden": "h",
        "mixer/.cache/x.py": "h",
        "mixer/mlruns/0/meta.yaml": "m", "jobs/old.pyc": "o", "tokenizer.json": "{}", "extra/deep/a.txt": "deep",
    }  # fmt: skip
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


CODE = {"jobs/__init__.py", "jobs/train.py", "mixer/__init__.py", "mixer/data/shards.py", "configs/demo.yaml"}


def test_only_code_and_the_named_files_are_sent(project, tmp_path):
    parcel = pack(["mine.yaml", "run.path=/shared/x"], here=project, project=project, include=["extra"])
    assert set(parcel.files) == CODE | {"mine.yaml", "extra/deep/a.txt"}
    assert parcel.args == ("mine.yaml", "run.path=/shared/x")
    assert parcel.num_bytes == 1 + 2 + 4 + 4 + 4
    parcel.write(tmp_path / "sent")
    sent = {
        file.relative_to(tmp_path / "sent").as_posix(): file.read_text() for file in (tmp_path / "sent").rglob("*.*")
    }
    assert sent["mine.yaml"] == "b: 2"
    assert set(sent) == set(parcel.files)


def test_with_mixer_installed_on_the_cluster_only_the_named_files_are_sent(project):
    assert set(pack(["mine.yaml"], here=project, project=None).files) == {"mine.yaml"}
    assert not pack(["show", "s3://bucket/corpus"], here=project, project=None).files


def test_a_configuration_from_elsewhere_gets_a_place_and_the_command_line_names_it(project, tmp_path):
    outside = tmp_path / "other.yaml"
    outside.write_text("c: 3")
    here = project / "configs"
    parcel = pack([str(outside), "../mine.yaml", "demo.yaml"], here=here, project=project)
    first, second, third = parcel.args
    assert parcel.files[first].read_text() == "c: 3"
    assert parcel.files[second].read_text() == "b: 2"
    assert (third, parcel.files[third]) == ("demo.yaml", here / "demo.yaml")
    assert not any(arg.startswith(("/", "..")) for arg in parcel.args)
    assert first != second


@pytest.mark.parametrize(
    ("words", "include", "part"),
    [
        (["absent.yaml"], [], "absent.yaml is not a file in"),
        (["show", "data/corpus"], [], "data/corpus names something in"),
        (["mine.yaml", "corpus.path=data/corpus"], [], "--include data/corpus"),
        ([], ["absent"], "--include absent: there is no such file"),
        ([], ["../elsewhere"], "lies outside"),
    ],
)
def test_what_the_job_would_not_find_is_refused(project, words, include, part):
    (project.parent / "elsewhere").touch()
    with pytest.raises(ConfigError, match="needed|Give|Correct|Name|Go to") as caught:
        pack(words, here=project, project=project, include=include)
    assert part in str(caught.value)


def test_what_is_included_may_be_named(project):
    parcel = pack(["show", "extra/deep"], here=project, project=None, include=["extra"])
    assert parcel.args == ("show", "extra/deep")


def test_a_whole_path_on_the_cluster_and_a_plain_word_stay_as_they_are(project):
    words = ("/shared/runs/x/run.yaml", "data", "--by", "topic,quality")
    assert pack(words, here=project, project=None).args == words


def test_a_large_parcel_is_refused_with_the_largest_files(project):
    (project / "mixer" / "weights.bin").write_bytes(b"w" * 300_000)
    (project / "configs" / "words.txt").write_bytes(b"w" * 2_000)
    with pytest.raises(ConfigError) as caught:
        pack([], here=project, project=project, limit_bytes=100_000)
    text = str(caught.value)
    assert "7 files of 0.3 MB would be sent, more than 0.1 MB" in text
    assert text.index("mixer/weights.bin (0.3 MB)") < text.index("configs/words.txt (2.0 kB)")


def test_a_project_is_found_here_or_where_mixer_runs(project, tmp_path):
    package = tmp_path / "site-packages" / "mixer"
    assert project_of(project, package) == project
    assert project_of(tmp_path, package) == tmp_path / "site-packages"
    with pytest.raises(ConfigError, match="--working-dir"):
        pack([], here=tmp_path, project=tmp_path)


def test_data_and_runs_must_not_lie_in_the_folder_of_a_job():
    refuse_relative({"corpus.path": "", "prepare.output": "/shared/corpus", "run.path": "s3://bucket/x"})
    with pytest.raises(ConfigError, match=r"run\.path=runs/x.*run\.path=/shared/runs/x"):
        refuse_relative({"corpus.path": "/shared/corpus", "run.path": "runs/x"})


def test_the_entrypoint_keeps_every_word_whole(project):
    parcel = pack(["a b", "x=$(rm -rf /)", "'"], here=project, project=None)
    order = Order(verb="show-rows", name="n", parcel=parcel)
    assert order.entrypoint == "python -m jobs.show_rows 'a b' 'x=$(rm -rf /)' ''\"'\"''"


def test_names_and_variables_are_checked():
    assert checked_name("run-7.b_2", "train") == "run-7.b_2"
    assert checked_name(None, "train").startswith("train-2")
    assert checked_name(None, "train") != checked_name(None, "train")
    for name in ("a b", "../x", "-x", "x" * 101, ""):
        with pytest.raises(ConfigError, match="--name"):
            checked_name(name, "train")
    assert checked_env(["A=1", "B=x=y", "C="]) == ({"A": "1", "B": "x=y", "C": ""}, [])
    assert checked_env(["AWS_SECRET_ACCESS_KEY=s3cr3t", "MONKEY=1"])[1] == [
        "AWS_SECRET_ACCESS_KEY: whoever sees the cluster's dashboard can read it."
    ]
    for pair in ("A", "=1", "A B=1"):
        with pytest.raises(ConfigError, match="NAME=VALUE"):
            checked_env([pair])
    with pytest.raises(ConfigError, match="RAY_AUTH_TOKEN") as caught:
        checked_env([f"RAY_AUTH_TOKEN={TOKEN}"])
    assert TOKEN not in str(caught.value)


@pytest.mark.parametrize(
    ("given", "environ", "address"),
    [
        ("http://a:8265/", {"RAY_ADDRESS": "http://b:1"}, "http://a:8265"),
        ("a:8265", {}, "http://a:8265"),
        ("https://a/ray", {}, "https://a/ray"),
        (None, {"RAY_ADDRESS": "http://b:1"}, "http://b:1"),
        (None, {"RAY_ADDRESS": "http://b:1", "RAY_API_SERVER_ADDRESS": "http://c:1"}, "http://c:1"),
    ],
)
def test_the_address_that_was_given_goes_before_the_environment(given, environ, address):
    assert job_server(given, environ) == address


@pytest.mark.parametrize(
    ("given", "environ", "part"),
    [
        (None, {}, "no address of a cluster"),
        ("ray://a:10001", {}, "--address is 'ray://a:10001'"),
        (None, {"RAY_ADDRESS": "auto"}, "RAY_ADDRESS is 'auto'"),
        ("http://me:secret@a:8265", {}, "user or password"),
    ],
)
def test_an_address_of_no_job_server_is_refused(given, environ, part):
    with pytest.raises(ConfigError) as caught:
        job_server(given, environ)
    assert part in str(caught.value)
    assert "secret" not in str(caught.value)


def test_the_token_is_found_in_rays_order_and_never_shown(tmp_path):
    home, named = tmp_path / ".ray" / "auth_token", tmp_path / "named"
    home.parent.mkdir()
    home.write_text("of-home\n")
    named.write_text("of-path")
    environ = {"HOME": str(tmp_path), "RAY_AUTH_TOKEN_PATH": str(named), "RAY_AUTH_TOKEN": "of-variable"}
    seen = []
    for drop in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "HOME"):
        token = find_token(environ)
        assert token is not None
        seen.append(token.value)
        assert token.value not in f"{token} {token!r} {Doorway('http://a', token, '2.60')!r}"
        del environ[drop]
    assert seen == ["of-variable", "of-path", "of-home"]
    assert find_token({"HOME": str(tmp_path / "nobody")}) is None
    named.write_text("")
    for path in (named, tmp_path / "absent", tmp_path):
        with pytest.raises(ConfigError, match=str(path)):
            find_token({"HOME": str(tmp_path), "RAY_AUTH_TOKEN_PATH": str(path)})


def test_a_token_is_sent_when_it_is_asked_for_and_only_then(serve, tmp_path):
    nobody = {"HOME": str(tmp_path)}
    owner = nobody | {"RAY_AUTH_TOKEN": TOKEN}
    closed, everybody = serve(JobServer), serve(Open)
    doorway = enter(closed, owner)
    assert doorway.headers == {"Authorization": f"Bearer {TOKEN}"}
    assert (doorway.ray_version, doorway.notes) == ("2.60.0", ())
    assert doorway.clean(f"x {TOKEN} y") == "x <token> y"
    assert enter(closed, owner | {"RAY_AUTH_MODE": "token"}).token == Token(TOKEN, "the variable RAY_AUTH_TOKEN")
    unasked = enter(everybody, owner)
    assert unasked.token is None
    assert "takes jobs from everybody" in unasked.notes[0]
    with pytest.raises(ConfigError, match="asks for a token, and there is none here"):
        enter(closed, nobody)
    with pytest.raises(ConfigError, match=r"RAY_AUTH_MODE is token, but there is none"):
        enter(closed, nobody | {"RAY_AUTH_MODE": "token"})
    with pytest.raises(ConfigError, match=r"refuses the token of the variable RAY_AUTH_TOKEN \(403\)"):
        enter(closed, owner | {"RAY_AUTH_TOKEN": "wrong"})


def test_what_is_no_job_server_or_does_not_answer_is_refused_in_time(serve):
    with pytest.raises(ConfigError, match="answers 200 and is no job server"):
        enter(serve(SomethingElse), {"HOME": "/nowhere"})
    begun = time.monotonic()
    silent = http.server.HTTPServer(("127.0.0.1", 0), JobServer)  # listens, and is never served
    try:
        with pytest.raises(ConfigError, match=r"cannot be reached: no answer within 0\.2 s"):
            enter(f"http://127.0.0.1:{silent.server_port}", {"HOME": "/nowhere"}, timeout_s=0.2)
    finally:
        silent.server_close()
    assert time.monotonic() - begun < 5
    with pytest.raises(ConfigError, match="cannot be reached: Connection refused"):
        enter(f"http://127.0.0.1:{silent.server_port}", {"HOME": "/nowhere"})


def test_rays_client_sees_only_the_address_that_was_asked_for(monkeypatch):
    import os

    monkeypatch.setenv("RAY_ADDRESS", "http://other:1")
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
    with only_address("http://this:1"):
        assert "RAY_ADDRESS" not in os.environ
        assert os.environ["RAY_API_SERVER_ADDRESS"] == "http://this:1"
    assert os.environ["RAY_ADDRESS"] == "http://other:1"
    assert "RAY_API_SERVER_ADDRESS" not in os.environ


def test_a_job_finds_its_own_cluster_and_a_client_none():
    assert cluster_inside({"RAY_ADDRESS": "10.0.0.5:6379"}) == "10.0.0.5:6379"
    assert cluster_inside({"RAY_ADDRESS": "http://10.0.0.5:8265"}) is None
    assert cluster_inside({}) is None


class Client:
    """Ray's client with a script: what each connection yields of the log, an error for one that breaks."""

    def __init__(self, *connections: list[str | Exception], status: str = "SUCCEEDED", code: int | None = 0) -> None:
        self.connections = list(connections)
        self.status = status
        self.code = code

    async def tail_job_logs(self, job_id: str):
        for text in self.connections.pop(0):
            if isinstance(text, Exception):
                raise text
            yield text

    def get_job_status(self, job_id: str) -> str:
        return "RUNNING" if self.connections else self.status

    def get_job_info(self, job_id: str):
        if job_id == "nobody":
            raise RuntimeError("Request failed with status code 404: Job nobody does not exist.")
        reason = f"why {TOKEN}\nx"
        return SimpleNamespace(status=self.get_job_status(job_id), driver_exit_code=self.code, message=reason)

    def submit_job(self, **options):
        raise RuntimeError(f"Request failed with status code 500: Traceback\n  no room for {TOKEN}\n.")


@pytest.fixture
def follow(monkeypatch):
    monkeypatch.setattr(submit, "RETRY_S", 0.0)

    def run(client: Client) -> tuple[int, str, list[str]]:
        said: list[str] = []
        shown: list[str] = []
        jobs = Jobs(Doorway("http://a", Token(TOKEN, "x"), "2.60"), said.append, client=client)
        return jobs.follow("j", shown.append), "".join(shown), said

    return run


def test_a_follower_that_lost_its_connection_shows_each_letter_of_the_log_once(follow):
    client = Client(
        ["ab", "cd\n", OSError("gone")], [ConnectionError("still")], ["a", "bcd\ne"], ["abcd\nefg", "h"]
    )  # fmt: skip
    assert follow(client) == (0, "abcd\nefgh", ["job j succeeded"])


@pytest.mark.parametrize(
    ("status", "code", "answer"), [("FAILED", 7, 7), ("FAILED", None, 1), ("FAILED", -9, 1), ("STOPPED", 0, 1)]
)
def test_a_job_that_did_not_succeed_gives_its_status(follow, status, code, answer):
    client = Client(["log"], status=status, code=code)
    assert follow(client) == (answer, "log", [f"job j {status.lower()}: why <token>"])


def test_a_connection_that_stays_away_ends_with_how_to_go_on(follow, monkeypatch):
    monkeypatch.setattr(submit, "PATIENCE_S", 0.0)
    with pytest.raises(MixerError, match=r"lost the connection.*gone <token>.*`mixer submit --follow j`"):
        follow(Client([OSError(f"gone {TOKEN}")], []))


def test_what_the_job_server_refuses_is_one_line_without_the_token(project):
    jobs = Jobs(Doorway("http://a", Token(TOKEN, "x"), "2.60"), [].append, client=Client())
    order = Order(verb="train", name="n", parcel=pack([], here=project, project=project))
    with pytest.raises(MixerError) as caught:
        jobs.submit(order)
    assert "could not submit at http://a: no room for <token>" in str(caught.value)
    with pytest.raises(ConfigError, match="http://a knows no job 'nobody'"):
        jobs.follow("nobody", print)
