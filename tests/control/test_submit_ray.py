"""Jobs sent to a real cluster of two nodes that asks for a token: to the end, failing, stopped, with a wrong token."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from subprocess import PIPE

import pytest

from tests.cluster_of_two import ROOT, ClusterOfTwo, mentioning
from tests.fakes import make_corpus

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


def mixer(cluster: ClusterOfTwo, *words: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*MIXER, *words],
        cwd=ROOT, env=cluster.environment(**env), capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


def submit(cluster: ClusterOfTwo, *words: str, **env: str) -> subprocess.CompletedProcess[str]:
    done = mixer(cluster, "submit", *words, "--address", cluster.address, **env)
    assert cluster.token not in done.stdout + done.stderr
    return done


def test_a_verb_runs_to_its_end_with_its_log_and_its_success(cluster, corpus):
    done = submit(cluster, "corpus", "show", corpus, "--name", "shown", RAY_ADDRESS="http://127.0.0.1:1")
    assert done.returncode == 0, done.stderr
    table = done.stdout[done.stdout.index("domain  ") :].splitlines()
    rows = {line.split()[0]: line.split()[2] for line in table[1:4]}
    assert rows == {"code": "5", "web": "9", "all": "14"}
    first, *_, last = done.stderr.splitlines()
    assert first.startswith(f"mixer: job shown at {cluster.address}: python -m jobs.corpus show {corpus} (")
    assert last == "mixer: job shown succeeded"
    again = submit(cluster, "--follow", "shown")
    assert (again.returncode, again.stdout) == (0, done.stdout)
    taken = submit(cluster, "corpus", "show", corpus, "--name", "shown")
    assert taken.returncode == 2
    assert "already had a job 'shown'" in taken.stderr


def test_a_verb_that_is_refused_gives_its_line_and_its_status(cluster, tmp_path):
    done = submit(cluster, "corpus", "show", str(tmp_path / "nothing"))
    assert done.returncode == 2
    assert done.stdout.splitlines()[-1].startswith(f"mixer: {tmp_path}/nothing/manifest.json is missing")
    assert "failed: Job entrypoint command failed with exit code 2" in done.stderr.splitlines()[-1]


def test_an_interrupted_follower_leaves_the_job_running_and_says_how_to_go_on(cluster, tmp_path):
    for package in ("jobs", "mixer"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").touch()
    text = "import time\nprint('first', flush=True)\nwhile True:\n    time.sleep(0.05)\n"
    (tmp_path / "jobs" / "corpus.py").write_text(text)
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
    assert row_of(submit(cluster, "--list").stdout, "endless")[1] == "RUNNING"
    assert submit(cluster, "--stop", "endless").stderr == "mixer: job endless: stopped\n"
    assert submit(cluster, "--follow", "endless").returncode == 1
    assert submit(cluster, "--stop", "endless").stderr == "mixer: job endless had ended already: stopped\n"


def row_of(table: str, name: str) -> Sequence[str]:
    return next(line.split() for line in table.splitlines() if line.startswith(name))


def test_no_wait_prints_the_id_alone(cluster, corpus):
    done = submit(cluster, "corpus", "show", corpus, "--no-wait", "--name", "quick", "--no-code", "--env", "MIXER_X=1")
    assert (done.returncode, done.stdout) == (0, "quick\n")
    assert "(0 files, 0.0 kB sent)" in done.stderr
    unknown = submit(cluster, "--follow", "nobody")
    assert unknown.returncode == 2
    assert "knows no job 'nobody'" in unknown.stderr


def test_the_doctor_examines_every_node_as_a_job(cluster, corpus, tmp_path):
    words = [f"corpus.path={corpus}", f"prepare.output={tmp_path}/out", "--json"]
    config = tmp_path / "config.yaml"
    config.write_text("prepare: {output: x, domains: {code: {files: [a.txt]}}}\n")
    done = mixer(cluster, "doctor", str(config), *words, "--address", cluster.address)
    findings = json.loads(done.stdout[done.stdout.index("\n[") :])
    by_name = {one["name"]: one for one in findings}
    assert len({one["node"] for one in findings if one["name"] == "CPUs"}) == 2
    for name in ("versions", "same versions", "token authentication", "token file", "dashboard", "clock", "corpus"):
        assert by_name[name]["level"] == "ok", by_name[name]
    assert by_name["token authentication"]["found"] == "the job server asks for a token"
    assert by_name["dashboard"]["found"].endswith("this machine only, with a token")
    assert by_name["storage of prepare.output"]["found"] == f"{tmp_path}: written and seen by 2 nodes"
    assert done.returncode == int(any(one["level"] == "bad" for one in findings))
    assert cluster.token not in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("env", "part"),
    [
        ({"RAY_AUTH_TOKEN": "0" * 64}, "refuses the token of the variable RAY_AUTH_TOKEN (403)"),
        ({"RAY_AUTH_TOKEN_PATH": "", "HOME": "/nowhere"}, "RAY_AUTH_MODE is token, but there is none"),
        ({"RAY_AUTH_TOKEN_PATH": "", "HOME": "/nowhere", "RAY_AUTH_MODE": ""}, "asks for a token, and there is none"),
        ({"RAY_AUTH_TOKEN_PATH": "/nowhere/token"}, "/nowhere/token cannot be read: No such file or directory"),
    ],
)
def test_a_wrong_or_missing_token_is_one_line_at_once(cluster, corpus, env, part):
    begun = time.monotonic()
    done = submit(cluster, "corpus", "show", corpus, **env)
    assert done.returncode == 2
    assert part in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert "0" * 64 not in done.stderr
    assert time.monotonic() - begun < 15


def test_without_a_mode_the_token_is_found_when_the_cluster_asks_for_it(cluster):
    assert submit(cluster, "--list", RAY_AUTH_MODE="").returncode == 0


def test_plain_ray_job_submit_runs_the_same_verb(cluster, corpus):
    done = subprocess.run(
        [*RAY, "job", "submit", "--address", cluster.address, "--", "python", "-m", "jobs.corpus", "show", corpus],
        cwd=ROOT, env=cluster.environment(), capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "fingerprint " in done.stdout
    assert cluster.token not in done.stdout + done.stderr
