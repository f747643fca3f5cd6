import pytest

from tests.simulator.cases import CASES
from tests.simulator.table import committed, line

LINES = committed().splitlines(keepends=True)[2:]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "written"), list(zip(CASES, LINES, strict=True)))
def test_the_committed_table_is_what_the_command_writes(name, written):
    assert line(name) == written


def test_the_table_has_a_line_for_every_case_in_their_order():
    assert [written.split(" | ")[0].removeprefix("| ") for written in LINES] == list(CASES)
