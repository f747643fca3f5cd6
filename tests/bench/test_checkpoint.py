"""The bench of checkpoints runs, and its shares are of the save that is waited for."""

from pathlib import Path

import pytest

from tests.bench import checkpoint


def test_both_ways_are_saved_and_timed(tmp_path: Path) -> None:
    found = checkpoint.measure(tmp_path, "0.5m", 1, say=lambda text: None)
    assert {name: len(values) for name, values in found.items()} == dict.fromkeys(found, 1)
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.isdigit()) == ["000000003", "000000004"]
    assert found["until written"][0] >= found["call"][0] + found["slower"][0] > 0
    parameters = 32_000 * 96
    assert found["bytes"][0] > 3 * 4 * parameters  # weights and two moments, of the embeddings alone


def test_shares_are_taken_pair_by_pair() -> None:
    found = {"waiting": [1.0, 2.0, 4.0], "call": [0.5, 0.5, 0.5], "slower": [0.5, 0.0, 1.5]}
    assert checkpoint.stall(found, "call") == pytest.approx(0.25)
    assert checkpoint.stall(found, "call", "slower") == pytest.approx(0.5)
