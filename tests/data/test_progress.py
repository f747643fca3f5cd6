from mixer.data.prepare import Progress
from mixer.data.progress import ProgressText, duration, quantity


def test_a_line_shows_stage_jobs_tokens_rate_and_time_left():
    text = ProgressText()
    assert text.line(Progress("tokenize", 1, 5, 1_000), 100.0) == f"{'tokenize':<12} [####{'.' * 20}] 1/5  1.0 k tokens"
    line = text.line(Progress("tokenize", 3, 5, 60_000), 120.0)
    assert line == f"{'tokenize':<12} [{'#' * 14}{'.' * 10}] 3/5  60.0 k tokens  3.0 k/s  20 s left"
    assert text.line(Progress("tokenize", 5, 5, 100_000), 140.0).endswith("5/5  100.0 k tokens  2.5 k/s")
    assert text.line(Progress("write shards", 0, 2, 0), 141.0) == f"write shards [{'.' * 24}] 0/2"


def test_numbers():
    assert [quantity(n) for n in (7, 1_500, 2_300_000, 4e9, 1e13)] == [
        "7",
        "1.5 k",
        "2.3 M",
        "4.0 G",
        "10.0 T",
    ]
    assert [duration(s) for s in (3.4, 61, 3_700)] == ["3 s", "1:01 min", "1:01 h"]
