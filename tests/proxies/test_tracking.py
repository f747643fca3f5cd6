"""At the tracker a swarm is one run, and its proxies are runs under it."""

import pytest

from mixer.core.errors import MixerError
from mixer.proxies.proxy import Outcome, run_proxy
from mixer.proxies.swarm import run_swarm
from mixer.proxies.tasks import Here
from mixer.run import open_rows
from tests.proxies.making import config_of


@pytest.fixture
def store(tmp_path):
    mlflow = pytest.importorskip("mlflow")
    uri = f"sqlite:///{tmp_path / 'store.db'}"

    def runs():
        client = mlflow.MlflowClient(uri)
        experiments = [one.experiment_id for one in client.search_experiments()]
        return uri, client, {run.info.run_id: run for run in client.search_runs(experiments)}

    return runs


def test_proxies_are_nested_under_one_run_however_often_it_is_started(texts, tmp_path, store):
    uri, _, _ = store()
    config = config_of(texts, tmp_path / "s", "swarm.runs=2", "tracker.kind=mlflow", f"tracker.uri={uri}")
    rows = open_rows(config)

    def half(task, *, rows):
        return run_proxy(task, rows=rows) if task.run == "00000" else Outcome("failed", "not yet")

    with pytest.raises(MixerError, match="1 of 2 proxies failed"):
        run_swarm(config, rows, Here(), work=half)
    _, _, before = store()
    failed = next(run for run in before.values() if run.data.tags["mixer.kind"] == "swarm")
    assert failed.info.status == "FAILED" and len(before) == 2
    run_swarm(config, rows, Here())
    _, client, found = store()
    parents = [run for run in found.values() if run.data.tags["mixer.kind"] == "swarm"]
    assert [run.info.run_id for run in parents] == [failed.info.run_id]
    assert (parents[0].info.status, parents[0].info.run_name) == ("FINISHED", "s")
    assert parents[0].data.tags["mixer.corpus"] == rows.corpus.fingerprint
    assert [file.path for file in client.list_artifacts(failed.info.run_id)] == ["swarm.parquet"]
    children = {run.info.run_name: run for run in found.values() if run.data.tags["mixer.kind"] == "proxy"}
    assert sorted(children) == ["s/00000", "s/00001"] and len(found) == 3
    for name, run in children.items():
        assert run.data.tags["mlflow.parentRunId"] == failed.info.run_id
        assert run.data.tags["mixer.proxy"] == name.removeprefix("s/")
        assert run.info.status == "FINISHED"
        assert {"eval/target/sums/loss", "weight/greek"} <= run.data.metrics.keys()
