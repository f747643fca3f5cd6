"""cluster/: every manifest parses, fits the project's Ray, opens nothing to the world and names real commands.

slurm.sh is run with a `srun`, `scontrol` and `mixer` that only write down how they were called.
"""

import os
import re
import signal
import stat
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from mixer import cli
from mixer.control import doctor

ROOT = Path(__file__).parents[1]
CLUSTER = ROOT / "cluster"
FILES = sorted(file for file in CLUSTER.iterdir() if file.is_file())
RAY = re.search(r"^ray==(.+)$", (ROOT / "constraints.txt").read_text(), re.M)[1]  # type: ignore[index]
README = (CLUSTER / "README.md").read_text("utf-8")


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((CLUSTER / name).read_text()))


def pods() -> dict[str, dict[str, Any]]:
    """The pod templates of the RayJob by group."""
    spec = documents("rayjob.yaml")[0]["spec"]["rayClusterSpec"]
    groups = {"head": spec["headGroupSpec"]} | {group["groupName"]: group for group in spec["workerGroupSpecs"]}
    return {name: group["template"] for name, group in groups.items()}


def commands() -> list[str]:
    """Everything in cluster/ that somebody is told to run, on one line each, comments and continuations undone."""
    text = "\n".join(file.read_text("utf-8") for file in FILES)
    return text.replace("\\\n", " ").splitlines()


def test_every_kind_of_cluster_has_its_file():
    names = {file.name for file in FILES}
    assert names == {"Dockerfile", "README.md", "cluster.yaml", "rayjob.yaml", "slurm.sh"}
    assert all(name in README for name in names - {"README.md"})


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_every_ray_version_named_is_the_projects(file):
    named = re.findall(r"(?:rayVersion: |ray==|:ray-|ray )(\d+\.\d+\.\d+)", file.read_text("utf-8"))
    assert set(named) <= {RAY}
    if file.name in ("rayjob.yaml", "Dockerfile", "cluster.yaml"):
        assert named
    assert doctor.order(RAY) >= doctor.order(doctor.FLOORS["ray"])


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_no_example_opens_the_dashboard_or_holds_a_secret(file):
    text = file.read_text("utf-8")
    assert not re.search(r"dashboard-host[=: '\"]+(0\.0\.0\.0|::)", text)
    assert not re.search(r"\b(NodePort|LoadBalancer|Ingress\b(?!\]))", text)
    assert not re.search(r"RAY_AUTH_TOKEN=\S*[0-9a-f]{16}", text)
    assert "RAY_AUTH_MODE=disabled" not in text
    for line in text.splitlines():
        if re.search(r"ray start .*--head", line) and not line.startswith("#"):
            assert "--dashboard-host=127.0.0.1" in " ".join(text.split("ray start")[1:]), line


def test_the_ray_job_asks_for_a_token_and_goes_when_it_is_done():
    job, policy = documents("rayjob.yaml")
    assert (job["apiVersion"], job["kind"], policy["kind"]) == ("ray.io/v1", "RayJob", "NetworkPolicy")
    spec = job["spec"]
    assert spec["rayClusterSpec"]["authOptions"] == {"mode": "token"}
    assert spec["rayClusterSpec"]["rayVersion"] == RAY
    assert spec["shutdownAfterJobFinishes"] is True
    assert spec["ttlSecondsAfterFinished"] > 0
    assert spec["rayClusterSpec"]["headGroupSpec"]["serviceType"] == "ClusterIP"
    ports = [port["port"] for rule in policy["spec"]["ingress"] for port in rule.get("ports", [])]
    assert ports == [8265]
    assert all("from" in rule for rule in policy["spec"]["ingress"])
    (submitter,) = [peer["podSelector"] for peer in policy["spec"]["ingress"][1]["from"] if "podSelector" in peer]
    assert submitter == {"matchLabels": {"job-name": job["metadata"]["name"]}}  # as Kubernetes labels a Job's pods


def test_the_ray_job_has_gpus_cpus_for_data_and_one_shared_folder():
    assert set(pods()) == {"head", "gpu", "data"}
    for name, pod in pods().items():
        (container,) = pod["spec"]["containers"]
        limits = container["resources"]["limits"]
        assert limits == container["resources"]["requests"], name
        assert ("nvidia.com/gpu" in limits) == (name == "gpu")
        assert pod["spec"]["securityContext"]["runAsNonRoot"] is True
        assert pod["metadata"]["labels"]["app"] == "mixer"  # the policy's pods
        mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
        assert mounts == {"shared": "/shared", "shm": "/dev/shm"}
        volumes = {volume["name"]: volume for volume in pod["spec"]["volumes"]}
        assert volumes["shared"]["persistentVolumeClaim"]["claimName"] == "mixer-shared"
        assert volumes["shm"]["emptyDir"]["medium"] == "Memory"


def test_the_ray_job_runs_a_verb_on_shared_paths():
    words = documents("rayjob.yaml")[0]["spec"]["entrypoint"].split()
    assert words.pop(3) == "--prepare"  # a claim is empty at first
    assert words[:2] == ["python", "-m"]
    assert words[2].startswith("jobs.")
    assert (ROOT / words[3].removeprefix("/opt/mixer/")).is_file()
    assert all(word.partition("=")[2].startswith("/shared/") for word in words[4:])


def test_the_dockerfile_is_made_of_known_instructions_and_ends_as_a_user():
    text = (CLUSTER / "Dockerfile").read_text().replace("\\\n", " ")
    lines = [line.split(maxsplit=1) for line in text.splitlines() if line.strip() and not line.startswith("#")]
    instructions = [line[0] for line in lines]
    assert instructions[0] == "FROM"
    assert set(instructions) <= {"FROM", "ARG", "RUN", "WORKDIR", "COPY", "ENV", "USER", "CMD"}
    assert ["USER", "mixer"] in lines
    assert instructions.index("USER") > max(n for n, name in enumerate(instructions) if name == "RUN")
    for name, rest in lines:
        if name == "COPY":
            assert all((ROOT / source).exists() for source in rest.split()[:-1]), rest
    assert any(name == "ENV" and "RAY_AUTH_MODE=token" in rest for name, rest in lines)
    assert "-c constraints.txt" in text


def test_the_launchers_config_is_one_that_ray_takes():
    from ray.autoscaler._private.util import prepare_config, validate_config

    (config,) = documents("cluster.yaml")
    validate_config(prepare_config(config))
    assert config["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    assert any("chmod 600 ~/.ray/auth_token" in command for command in config["setup_commands"])
    for command in [*config["head_start_ray_commands"], *config["worker_start_ray_commands"]]:
        if "ray start" in command:
            assert "RAY_AUTH_MODE=token" in command
    assert set(config["rsync_exclude"]) >= {".git", ".venv", "data", "runs"}


def test_every_option_of_ray_start_exists():
    from ray.scripts.scripts import start

    known = {option for parameter in start.params for option in parameter.opts}
    lines = [line.partition("ray start")[2] or line.strip() for line in commands()]
    lines = [line for line in lines if line.startswith((" -", "--"))]
    named = {option for line in lines for option in re.findall(r"(?<!\S)(--[a-z][a-z-]*)", line)}
    slurm = {"--nodes", "--ntasks", "--ntasks-per-node", "--nodelist", "--overlap", "--exclude"}
    ours = {"--head", "--block", "--port", "--dashboard-host", "--min-worker-port"}
    assert ours <= named
    assert named - known - slurm == set()


def test_every_verb_named_exists():
    verbs = set(cli.verbs())
    text = "\n".join(commands())
    words = set(re.findall(r"(?:`|^|&& |\d\. )mixer ([a-z]+)", text, re.M))
    sent = set(re.findall(r"(?:mixer submit|slurm\.sh)(?: --no-code)? ([a-z]+)", text))
    modules = set(re.findall(r"-m jobs\.([a-z_]+)", text))
    assert words >= {"submit", "doctor"}
    assert sent >= {"train", "doctor"}
    assert modules == {"train"}
    assert words | sent | modules <= verbs


STUBS = {
    "scontrol": 'echo "scontrol $*" >> $LOG; printf "node1\\nnode2\\nnode3\\n"\n',
    "srun": """
echo "srun $*" >> $LOG
case "$*" in
    *hostname*) echo "fe80::1 10.0.0.5 172.17.0.1" ;;
    *"ray start"*)
        trap 'echo "ended $*" >> $LOG; exit 0' TERM
        stat -c "token %a" "$RAY_AUTH_TOKEN_PATH" >> $LOG
        while :; do sleep 0.05; done ;;
esac
""",
    "mixer": """
echo "mixer $*" >> $LOG
case "$*" in
    *--list*) [ $(grep -c -- --list $LOG) -ge 3 ] ;;
    *--stop*) touch $LOG.stop ;;
    *) until [ $(grep -c ^token $LOG) = 2 ]; do sleep 0.05; done
       [ -z "$STUB_WAITS" ] || while [ ! -e $LOG.stop ]; do sleep 0.05; done
       exit ${STUB_STATUS:-0} ;;
esac
""",
}


@pytest.fixture
def slurm(tmp_path):
    """slurm.sh as a job of three nodes, in the midst of stubs."""
    (tmp_path / "bin").mkdir()
    for name, text in STUBS.items():
        (tmp_path / "bin" / name).write_text(f"#!/usr/bin/env bash\n{text}")
        (tmp_path / "bin" / name).chmod(0o755)
    # The script's own pauses take no time here.
    (tmp_path / "bin" / "sleep").write_text('#!/bin/sh\n[ "$1" = 2 ] || exec /bin/sleep "$1"\n')
    (tmp_path / "bin" / "sleep").chmod(0o755)
    started: list[subprocess.Popen[str]] = []

    def start(*words: str, **env: str) -> subprocess.Popen[str]:
        environment = {
            "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "HOME": str(tmp_path), "LOG": str(tmp_path / "log"),
            "SLURM_JOB_ID": "4711", "SLURM_JOB_NODELIST": "node[1-3]", "SLURM_JOB_NAME": "mix",
            "RAY_AUTH_TOKEN": "of another cluster", "MIXER_VENV": str(tmp_path / "none"), "STUB_WAITS": "",
        } | env  # fmt: skip
        process = subprocess.Popen(
            ["bash", str(CLUSTER / "slurm.sh"), *words],
            env=environment, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()


def test_the_slurm_script_starts_a_cluster_of_its_own_runs_the_verb_and_cleans_up(slurm, tmp_path):
    process = slurm("train", "a b.yaml", "run.path=/shared/x", STUB_STATUS="7")
    text = process.communicate(timeout=60)[0]
    assert process.returncode == 7, text
    log = (tmp_path / "log").read_text().splitlines()
    port = 20000 + 4711 % 1270 * 10
    head, rest = [line for line in log if line.startswith("srun") and "ray start" in line]
    assert "--nodelist=node1" in head
    assert "--head" in head
    assert f"--node-ip-address=10.0.0.5 --port={port}" in head
    assert "--dashboard-host=127.0.0.1" in head
    assert rest.startswith("srun --nodes=2 --ntasks=2 --ntasks-per-node=1 --exclude=node1")
    assert f"--address=10.0.0.5:{port}" in rest
    assert log.count("token 600") == 2
    assert len([line for line in log if line.startswith("ended")]) == 2
    assert (
        f"mixer submit --address http://127.0.0.1:{port + 1} --name mix-4711-0 train a b.yaml run.path=/shared/x" in log
    )
    assert not list((tmp_path / ".mixer").iterdir())


def test_the_slurm_script_asks_the_run_to_stop_before_it_goes(slurm, tmp_path):
    process = slurm("train", "x.yaml", STUB_WAITS="yes")
    deadline = time.monotonic() + 60
    while "train" not in (tmp_path / "log").read_text() if (tmp_path / "log").exists() else True:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    text = process.communicate(timeout=60)[0]
    assert process.returncode == 143, text
    log = (tmp_path / "log").read_text().splitlines()
    port = 20000 + 4711 % 1270 * 10
    stop = log.index(f"mixer submit --stop mix-4711-0 --address http://127.0.0.1:{port + 1}")
    assert [line for line in log[:stop] if line.startswith("ended")] == []
    assert len([line for line in log[stop:] if line.startswith("ended")]) == 2
    assert not list((tmp_path / ".mixer").iterdir())


def test_the_slurm_script_says_what_it_needs(slurm, tmp_path):
    process = slurm()
    assert "usage: sbatch" in process.communicate(timeout=60)[0]
    assert process.returncode == 2
    process = slurm("train", "x", SLURM_JOB_ID="")
    assert "start it with sbatch" in process.communicate(timeout=60)[0]
    assert process.returncode == 1
    process = slurm("train", "x", MIXER_START_TRIES="2")
    assert "no head" in process.communicate(timeout=60)[0]
    assert process.returncode == 1


def test_the_slurm_script_parses_and_can_be_run():
    done = subprocess.run(["bash", "-n", str(CLUSTER / "slurm.sh")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (CLUSTER / "slurm.sh").stat().st_mode & stat.S_IXUSR


def test_what_the_readme_sends_would_not_be_refused(monkeypatch):
    """Its configurations load, and nothing of theirs lies in a job's own folder."""
    from jobs.submit import places_of
    from mixer.control.parcel import pack, refuse_relative

    monkeypatch.chdir(ROOT)
    lines = [line for line in commands() if "configs/demo.yaml" in line and "/opt/" not in line and "-x" not in line]
    found = [
        [word for word in line.split() if "=/shared/corpora" in word or word == "configs/demo.yaml"] for line in lines
    ]
    assert len(found) == 4
    for words in found:
        refuse_relative(places_of("prepare", words))
        assert "configs/demo.yaml" in pack(words, here=ROOT, project=ROOT).files
