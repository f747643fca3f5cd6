"""The same run as a job on a cluster of two nodes that asks for a token."""

import subprocess
import sys
from pathlib import Path

import pytest

from mixer import config as configs
from tests.cluster_of_two import ClusterOfTwo
from tests.runs.making import Outcome, config_of

pytestmark = pytest.mark.ray

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def cluster():
    with ClusterOfTwo() as started:
        yield started


def submitted(cluster: ClusterOfTwo, *command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *command],
        cwd=ROOT,
        env=cluster.environment(),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_a_submitted_run_is_the_run_that_was_not_submitted(texts, tmp_path, undisturbed, cluster):
    # Two CPUs a worker and a node: so the workers are on different nodes.
    config = config_of(texts, tmp_path / "run", "train.cpus_per_worker=2")
    configs.save(config, tmp_path / "tiny.yaml")
    done = submitted(cluster, "mixer.cli", "submit", "train", str(tmp_path / "tiny.yaml"), "--address", cluster.address)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "finished after 40 steps" in done.stdout
    assert cluster.token not in done.stdout + done.stderr
    Outcome.of(config).require_same(undisturbed)
