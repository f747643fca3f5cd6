import json

import pytest

from mixer.core import plan
from tests.golden.make import PATH, plans

RULE = (
    "Rows have moved: runs that were begun before could not be continued. If that is meant, raise "
    "Plan.VERSION (VERSION in mixer/core/plan.py) and regenerate with `python -m tests.golden.make`, "
    "all in one commit."
)
KEPT = json.loads(PATH.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def found() -> dict[str, dict[str, object]]:
    return plans()


def test_golden_plans_are_of_this_version() -> None:
    assert KEPT["version"] == plan.VERSION, "Plan.VERSION was raised: run `python -m tests.golden.make`."


def test_every_golden_run_is_kept(found: dict[str, dict[str, object]]) -> None:
    assert found.keys() | {"version"} == KEPT.keys()


@pytest.mark.parametrize("run", [run for run in KEPT if run != "version"])
def test_no_row_has_moved(run: str, found: dict[str, dict[str, object]]) -> None:
    assert found[run].keys() == KEPT[run].keys()
    for window, kept in KEPT[run].items():
        assert found[run][window] == kept, f"window {window} of {run!r}. {RULE}"
