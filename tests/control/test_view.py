"""The view of a run on a terminal: values, widths, and a terminal that is left as it was found."""

import os
import pty
import select
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

from mixer.control import view
from mixer.control.record import Follower, read_record
from mixer.core.schedule import MixtureSchedule
from tests.control.telling import GEOMETRY, START, Teller, make_run

ROOT = Path(__file__).parents[2]


def lines_of(record, width=100, *, now=START, height=None) -> list[str]:
    return view.text(record, width, now=now, height=height).splitlines()


def test_the_view_says_what_the_files_say(tmp_path):
    folder = make_run(tmp_path / "made", 40, trained=20)
    record = read_record(folder)
    windows = [record.windows[k] for k in range(20)]
    last, first = windows[-1], windows[0]
    now = last["time"] + 7
    lines = lines_of(record, now=now)
    assert lines[0].startswith("made  ·  not finished  ·  policy odm")
    assert lines[0].endswith("last word 7 s ago")
    pace = (last["time"] - first["time"]) / 19
    assert view.seconds_left(record) == pytest.approx(20 * pace)
    assert f"20/40 windows  50%  {20 * pace:.0f} s left" in lines[1]
    assert lines[1].count("█") == 25
    numbers = " ".join(lines[2:4])
    assert f"step {20 * GEOMETRY.window_steps}" in numbers
    assert "data wait 0.4%" in numbers and "lag 1" in numbers and "workers 2" in numbers
    assert f"loss {last['loss']:.3f} ({last['loss'] - windows[11]['loss']:+.3f})" in numbers

    schedule = MixtureSchedule.from_text((folder / "schedule.jsonl").read_bytes())
    row, before = schedule.row(20), schedule.row(12)
    for place, name in enumerate(row.catalog.names):
        line = next(line for line in lines if line.startswith(name))
        weight, change = row.weights_d[place], row.weights_d[place] - before.weights_d[place]
        assert f"{weight:.2%}" in line
        assert (f"{100 * change:+.1f}" in line) == (abs(change) >= view.SAME)
        assert ("▲" in line) == (change >= view.SAME) and ("▼" in line) == (change <= -view.SAME)
        assert line.endswith(f"{last['loss_sum'][name] / last['tokens_d'][name]:.3f}")
    evaluated = record.evaluations[-1]
    assert f"evaluation after window {evaluated['window']}" in lines
    assert any("bad_rows" in line and "no finite loss" in line for line in lines)


@pytest.mark.parametrize("width", [1, 20, 47, 80, 200])
def test_no_line_is_wider_than_the_terminal(tmp_path, width):
    folder = make_run(tmp_path / "made", 12, 30, trained=8)
    Teller(folder).event("restart", "名" * 200)
    lines = lines_of(read_record(folder), width, height=30)
    wide = [sum(2 if letter == "名" else 1 for letter in line) for line in lines]
    assert max(wide) <= width
    assert len(lines) <= 30


def test_of_many_domains_those_that_fit_are_shown_and_the_rest_is_summed(tmp_path):
    record = read_record(make_run(tmp_path / "made", 12, 200, trained=9))
    row = record.schedule.row(9)
    lines = lines_of(record, height=40)
    shown = [line.split()[0] for line in lines if line.startswith("topic_")]
    assert shown == sorted(shown)
    weights = dict(zip(row.catalog.names, row.weights_d.tolist(), strict=True))
    assert min(weights[name] for name in shown) >= sorted(weights.values())[-len(shown)]
    rest = next(line for line in lines if "others" in line)
    assert rest.split() == [str(200 - len(shown)), "others", f"{1 - sum(weights[name] for name in shown):.2%}"]


def test_a_run_without_journal_or_windows_has_a_view(tmp_path):
    folder = make_run(tmp_path / "made", 6, trained=0, evaluated=False)
    assert "0/6 windows   0%" in lines_of(read_record(folder))[1]
    (folder / "journal.jsonl").unlink()
    (folder / "run.yaml").unlink()
    assert "0 windows trained, 2 decided, no end planned" in lines_of(read_record(folder))
    (folder / "schedule.jsonl").write_bytes((folder / "schedule.jsonl").read_bytes().splitlines(keepends=True)[0])
    assert "no window is decided yet" in lines_of(read_record(folder))


def test_a_follower_reads_what_was_added_and_leaves_a_torn_line_for_later(tmp_path):
    folder = make_run(tmp_path / "made", 12, trained=4)
    journal = folder / "journal.jsonl"
    whole, fresh = journal.read_bytes(), read_record(folder)
    follower = Follower(folder)
    for size in range(100, len(whole), 997):  # most of them in the middle of a line
        journal.write_bytes(whole[:size])
        assert follower.look().trained_windows <= 4
    journal.write_bytes(whole)
    record = follower.look()
    assert (record.windows, record.policy) == (fresh.windows, fresh.policy)
    assert (record.evaluations, record.events) == (fresh.evaluations, fresh.events)
    Teller(folder).event("finished")
    assert follower.look().status == "finished"
    assert len(follower.look().events) == len(fresh.events) + 1
    journal.write_bytes(whole)  # another journal, shorter than what was read
    assert follower.look().events == fresh.events


def test_bars_and_arrows():
    assert view.bar(0.5, 4) == "██  " and view.bar(1 / 32, 4) == "▏   " and view.bar(9.0, 4) == "████"
    assert [view.arrow(change) for change in (0.012, -0.0306, 0.0004)] == ["▲ +1.2", "▼ -3.1", "·"]
    assert view.wrap(["aa", "bb", "cc"], 7) == ["aa   bb", "cc"]


def start(folder: Path, *options: str) -> tuple[subprocess.Popen, int]:
    """`mixer watch` on a terminal of its own."""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (40, 90))
    command = [sys.executable, "-m", "mixer.cli", "watch", str(folder), "--every", "0.05", *options]
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, cwd=ROOT, start_new_session=True)
    os.close(theirs)
    return process, ours


def read_until(number: int, mark: bytes | None, limit_s: float = 60.0) -> bytes:
    """What is written to a terminal up to a mark, or to its end."""
    found, end = b"", time.monotonic() + limit_s
    while (mark is None or mark not in found) and time.monotonic() < end:
        if select.select([number], [], [], 0.2)[0]:
            try:
                found += os.read(number, 1 << 16)
            except OSError:  # the other end is closed
                break
    return found


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_watching_is_left_with_a_clean_terminal(tmp_path, number):
    process, terminal = start(make_run(tmp_path / "made", 12, trained=6))
    try:
        assert b"\x1b[?1049h\x1b[?25l" in read_until(terminal, b"6/12 windows")
        process.send_signal(number)
        rest = read_until(terminal, None)
        assert process.wait(30) == 0
        _, mark, after = rest.partition(b"\x1b[?25h\x1b[?1049l")
        assert mark and b"6/12 windows" in after and b"\x1b" not in after and b"Traceback" not in rest
    finally:
        process.kill()
        os.close(terminal)


@pytest.mark.parametrize("what", ["finished", "failed"])
def test_watching_ends_with_the_run(tmp_path, what):
    folder = make_run(tmp_path / "made", 12, trained=6)
    process, terminal = start(folder)
    try:
        read_until(terminal, b"6/12 windows")
        Teller(folder).event(what, "that was it", after_s=1e6)
        rest = read_until(terminal, None)
        assert process.wait(30) == 0
        assert b"that was it" in rest.partition(b"\x1b[?1049l")[2]
    finally:
        process.kill()
        os.close(terminal)


def test_piped_it_is_drawn_once_without_escapes(tmp_path):
    folder = make_run(tmp_path / "made", 12, trained=6)
    command = [sys.executable, "-m", "mixer.cli", "watch", str(folder)]
    done = subprocess.run(command, capture_output=True, cwd=ROOT, check=True, timeout=60)
    assert b"\x1b" not in done.stdout and "6/12 windows" in done.stdout.decode()
    done = subprocess.run([*command[:-1], str(tmp_path)], capture_output=True, cwd=ROOT, check=False, timeout=60)
    assert done.returncode == 2 and b"holds no run" in done.stderr
