"""The bench of readers works: every peer that is installed delivers exactly the rows of the source."""

import json
from pathlib import Path

import pytest

from tests.bench import reader_peers
from tests.bench.peers.adapters import READERS


@pytest.mark.slow
def test_quick_run_delivers_the_source_from_every_reader(tmp_path: Path) -> None:
    missing = {reader: module for reader in READERS if (module := reader_peers.missing(reader))}
    if missing:
        lacking = ", ".join(sorted(set(missing.values())))
        pytest.skip(f"not installed: {lacking}. See tests/bench/constraints.txt for how to get the peers.")

    out = tmp_path / "out.json"
    status = reader_peers.main(["--quick", "--data", str(tmp_path), "--out", str(out)])

    result = json.loads(out.read_text())
    assert {line["reader"]: line["error"] for line in result["lines"]} == dict.fromkeys(READERS, "")
    assert {line["reader"]: line["rows_wrong"] for line in result["lines"]} == dict.fromkeys(READERS, 0)
    assert all(line["rows_checked"] for line in result["lines"] if READERS[line["reader"]].yields_rows)
    assert [figure["figure"] for figure in result["figures"] if figure["target"]]
    assert status == 0
