"""Jobs sent to a real cluster of two nodes that asks for a token: to the end, failing, stopped, with a wrong token."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from subprocess import PIPE

import pytest

from mixer import cli
from tests.cluster_of_two import FOREIGN, ROOT, ClusterOfTwo, mentioning
from tests.fakes import make_corpus

# Asked to end, it takes longer than Ray would wait.
ENDLESS = """
import signal, sys, time
def save(*_):
    time.sleep(4)
    open({saved!r}, "w").close()
    sys.exit(0)
signal.signal(signal.SIGTERM, save)
print("first", flush=True)
while True:
    time.sleep(0.05)
"""
MIXER = [sys.executable, "-m", "mixer.cli"]
RAY = [sys.executable, "-m", "ray.scripts.scripts"]
pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def cluster() -> Iterator[ClusterOfTwo]:
    with ClusterOfTwo() as started:
        raylets = started.node_pids
        assert len(raylets) == 2
        assert started.alive_nodes() == 2
        yield started
    assert not mentioning(str(started.folder))
    assert not started.folder.exists()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> str:
    return make_corpus(tmp_path_factory.mktemp("corpus"), {"code": 5, "web": 9}).root


@pytest.fixture
def mixer(cluster, monkeypatch, capsys):
    """`mixer ...` in this process, as a client of the cluster; the token is in nothing that it says."""

    def run(*words: str, **env: str) -> tuple[int, str, str]:
        for name in FOREIGN:
            monkeypatch.delenv(name, raising=False)
        wanted = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(cluster.token_file)} | env
        for name, value in wanted.items():
            monkeypatch.setenv(name, value)
        monkeypatch.chdir(ROOT)
        status = cli.main([*words, "--address", cluster.address])
        out, err = capsys.readouterr()
        assert cluster.token not in out + err
        return status, out, err

    return run


def test_a_verb_runs_to_its_end_with_its_log_and_its_success(cluster, mixer, corpus):
    status, out, err = mixer("submit", "corpus", "show", corpus, "--name", "shown", RAY_ADDRESS="http://127.0.0.1:1")
    assert status == 0, err
    table = out[out.index("domain  ") :].splitlines()
    rows = {line.split()[0]: line.split()[2] for line in table[1:4]}
    assert rows == {"code": "5", "web": "9", "all": "14"}
    first, *_, last = err.splitlines()
    assert first.startswith(f"mixer: job shown at {cluster.address}: python -m jobs.corpus show {corpus} (")
    assert last == "mixer: job shown succeeded"
    again = mixer("submit", "--follow", "shown")
    assert again == (0, out, "mixer: job shown succeeded\n")
    status, _, err = mixer("submit", "corpus", "show", corpus, "--name", "shown")
    assert status == 2
    assert "already had a job 'shown'" in err


def test_a_verb_that_is_refused_gives_its_line_and_its_status(mixer, tmp_path):
    status, out, err = mixer("submit", "corpus", "show", str(tmp_path / "nothing"))
    assert status == 2
    assert out.splitlines()[-1].startswith(f"mixer: {tmp_path}/nothing/manifest.json is missing")
    assert "failed: Job entrypoint command failed with exit code 2" in err.splitlines()[-1]


def test_an_interrupted_follower_leaves_the_job_running_and_says_how_to_go_on(cluster, mixer, tmp_path):
    for package in ("jobs", "mixer"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").touch()
    (tmp_path / "jobs" / "corpus.py").write_text(ENDLESS.format(saved=str(tmp_path / "saved")))
    words = f"submit corpus show --address {cluster.address} --name endless --working-dir {tmp_path}".split()
    follower = subprocess.Popen(
        [*MIXER, *words], cwd=ROOT, env=cluster.environment(), stdout=PIPE, stderr=PIPE, text=True
    )
    try:
        assert follower.stdout is not None
        assert "first\n" in follower.stdout
        follower.send_signal(signal.SIGINT)
        told = follower.communicate(timeout=20)[1]
    finally:
        follower.kill()
    assert follower.returncode == 130
    assert "job endless goes on" in told
    assert "`mixer submit --follow endless`" in told
    assert "`mixer submit --stop endless`" in told
    listed = mixer("submit", "--list")[1]
    assert next(line.split()[1] for line in listed.splitlines() if line.startswith("endless")) == "RUNNING"
    assert mixer("submit", "--stop", "endless") == (0, "", "mixer: job endless: stopped\n")
    assert (tmp_path / "saved").exists()
    assert mixer("submit", "--follow", "endless")[0] == 1
    assert mixer("submit", "--stop", "endless")[2] == "mixer: job endless had ended already: stopped\n"


def test_no_wait_prints_the_id_alone(mixer, corpus):
    status, out, err = mixer(
        "submit", "corpus", "show", corpus, "--no-wait", "--name", "quick", "--no-code", "--env", "MIXER_X=1"
    )
    assert (status, out) == (0, "quick\n")
    assert "(0 files, 0.0 kB sent)" in err
    status, _, err = mixer("submit", "--follow", "nobody")
    assert status == 2
    assert "knows no job 'nobody'" in err


def test_the_doctor_examines_every_node_as_a_job(cluster, mixer, corpus, tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text("prepare: {output: x, domains: {code: {files: [a.txt]}}}\n")
    status, out, _ = mixer(
        "doctor", str(config), f"corpus.path={corpus}", f"prepare.output={tmp_path}/out", f"run.path={tmp_path}/run",
        "--json",
    )  # fmt: skip
    findings = json.loads(out[out.index("\n[") :])
    by_name = {one["name"]: one for one in findings}
    assert len({one["node"] for one in findings if one["name"] == "CPUs"}) == 2
    for name in ("versions", "same versions", "token authentication", "token file", "dashboard", "clock", "corpus"):
        assert by_name[name]["level"] == "ok", by_name[name]
    assert by_name["token authentication"]["found"] == "the job server asks for a token"
    assert by_name["dashboard"]["found"].endswith("this machine only, with a token")
    assert by_name["storage of prepare.output"]["found"] == f"{tmp_path}: written and seen by 2 nodes"
    assert by_name["storage of run.path"]["found"] == f"{tmp_path}: written and seen by 2 nodes, locks hold"
    assert status == int(any(one["level"] == "bad" for one in findings))


@pytest.mark.parametrize(
    ("env", "part"),
    [
        ({"RAY_AUTH_TOKEN": "0" * 64}, "refuses the token of the variable RAY_AUTH_TOKEN (403)"),
        ({"RAY_AUTH_TOKEN_PATH": "", "HOME": "/nowhere"}, "RAY_AUTH_MODE is token, but there is none"),
        ({"RAY_AUTH_TOKEN_PATH": "", "HOME": "/nowhere", "RAY_AUTH_MODE": ""}, "asks for a token, and there is none"),
        ({"RAY_AUTH_TOKEN_PATH": "/nowhere/token"}, "/nowhere/token cannot be read: No such file or directory"),
    ],
)
def test_a_wrong_or_missing_token_is_one_line_at_once(mixer, corpus, env, part):
    begun = time.monotonic()
    status, out, err = mixer("submit", "corpus", "show", corpus, **env)
    assert (status, out, len(err.splitlines())) == (2, "", 1)
    assert part in err
    assert "0" * 64 not in err
    assert time.monotonic() - begun < 5


def test_without_a_mode_the_token_is_found_when_the_cluster_asks_for_it(mixer):
    assert mixer("submit", "--list", RAY_AUTH_MODE="")[0] == 0


def test_plain_ray_job_submit_runs_the_same_verb(cluster, corpus):
    done = subprocess.run(
        [*RAY, "job", "submit", "--address", cluster.address, "--", "python", "-m", "jobs.corpus", "show", corpus],
        cwd=ROOT, env=cluster.environment(), capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "fingerprint " in done.stdout
    assert cluster.token not in done.stdout + done.stderr
