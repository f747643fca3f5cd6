"""The bench of influence against training: its arithmetic, and that its quick form runs on a small corpus."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mixer.training.oracles import Response
from tests.bench import influence_response as bench

TARGETS = ["target/a", "target/b"]


def test_agreement_is_that_of_ranks_with_points_of_a_bootstrap_over_seeds() -> None:
    predicted = np.array([[1.0, 1.0], [2.0, 2.0], [9.0, 3.0]])
    seeds = np.stack([np.array([[0.0, 3.0], [10.0, 2.0], [20.0, 1.0]])] * 4)
    response = Response(benefit_kdt=seeds, loss_kt=np.zeros((4, 2)))
    found = bench.agreement(predicted, response, TARGETS)
    assert found["target/a"] == {"spearman": pytest.approx(1.0), "low": pytest.approx(1.0), "high": pytest.approx(1.0)}
    assert found["target/b"]["spearman"] == pytest.approx(-1.0)
    assert found["mean"]["spearman"] == pytest.approx(0.0)
    assert bench.repeated(response, TARGETS) == {name: pytest.approx(1.0) for name in [*TARGETS, "mean"]}
    # A quarter of the seeds says the opposite, more loudly: then it matters which of them are drawn.
    seeds = np.concatenate([seeds[:3], -2.0 * seeds[:1]])
    found = bench.agreement(predicted, Response(benefit_kdt=seeds, loss_kt=np.zeros((4, 2))), TARGETS)
    assert found["target/a"] == {"spearman": pytest.approx(1.0), "low": pytest.approx(-1.0), "high": pytest.approx(1.0)}


def test_without_a_corpus_nothing_is_measured_and_the_reason_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.delenv(bench.CORPUS, raising=False)
    assert bench.main(["--quick"]) == 0
    assert "skipped: MIXER_CORPUS is not set; name a folder with train/<domain>" in capsys.readouterr().err
    monkeypatch.setenv(bench.CORPUS, str(tmp_path))
    assert bench.main(["--quick"]) == 0
    assert "which has no folder train" in capsys.readouterr().err


@pytest.mark.slow
def test_the_quick_form_measures_on_a_small_corpus(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    raw = tmp_path / "raw"
    for place, letters in {"train/low": "abcd", "train/high": "wxyz", "train/both": "abyz"}.items():
        (raw / place).mkdir(parents=True)
        texts = ["".join(rng.choice(list(letters), 400)) for _ in range(60)]
        pq.write_table(pa.table({"text": texts}), raw / place / "part-0.parquet")
    (raw / "targets").mkdir()
    texts = ["".join(rng.choice(list("abcd"), 400)) for _ in range(30)]
    pq.write_table(pa.table({"text": texts}), raw / "targets/low_new.parquet")
    monkeypatch.setenv(bench.CORPUS, str(raw))
    assert bench.main(["--quick", "--folder", str(tmp_path / "made"), "--device", "cpu"]) == 0
    found = json.loads((tmp_path / "made/influence_response.json").read_text())
    assert found["domains"] == ["both", "high", "low"]
    assert found["targets"] == ["target/low_new"]
    assert [point["step"] for point in found["points"]] == [4, 12, 24]
    for point in found["points"]:
        assert np.argmax(np.array(point["measured"])[:, 0]) == 2  # its own letters help most
        for metric in bench.METRICS:
            assert np.argmax(np.array(point["predicted"][metric])[:, 0]) == 2
            assert point["agreement"][metric]["mean"]["spearman"] > 0
