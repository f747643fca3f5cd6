import json
import logging
import math
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mixer.control.fence import Fence
from mixer.control.journal import ENDINGS, Journal, Once, read_back, read_journal
from mixer.control.openrun import Heard
from mixer.core.catalog import Catalog, Domain
from mixer.core.errors import ScheduleError
from mixer.core.schedule import pack_d, unpack_d


def numbered(domains: int) -> Catalog:
    return Catalog(16, "fake", tuple(Domain(f"d{i:03}", i + 1, f"content {i}") for i in range(domains)))


def window(number: int, **more) -> dict:
    return {"kind": "window", "window": number, "time": 100.0 + number, **more}


def event(what: str, **more) -> dict:
    return {"kind": "event", "what": what, "text": "", "time": 1.0, "window": None, "steps": None, **more}


def records(path, start: int = 0) -> list[dict]:
    return [record for _, record in read_journal(path, start)]


@pytest.fixture
def path(tmp_path):
    (tmp_path / "run").mkdir()
    return tmp_path / "run" / "journal.jsonl"


def warnings(caplog) -> list[str]:
    return [entry.getMessage() for entry in caplog.records if entry.levelno >= logging.WARNING]


def test_what_is_appended_is_read_one_record_a_line(path):
    given = [window(0, loss=2.5), event("begun"), {"kind": "evaluation", "window": 0, "time": 7.25, "sets": {"a": {}}}]
    with Journal(path) as journal:
        assert [journal.append(record) for record in given] == [True, True, True]
    assert records(path) == given
    lines = path.read_bytes().split(b"\n")
    assert [json.loads(line) for line in lines[:-1]] == given and lines[-1] == b""


def test_a_record_gets_the_time_if_it_has_none(path):
    before = time.time()
    with Journal(path) as journal:
        journal.append({"kind": "event", "what": "begun"})
    assert before <= records(path)[0]["time"] <= time.time()


def test_windows_of_one_kind_only_grow_and_events_are_always_kept(path):
    script = [
        (window(0, loss=1.0), True),
        (window(2), True),
        (window(2, loss=9.0), False),
        (window(1), False),  # left out once, it is out of order now
        ({"kind": "policy", "window": 1, "time": 1.0, "values": {}}, True),
        ({"kind": "evaluation", "window": -1, "time": 1.0, "sets": {}}, True),  # before the first window
        ({"kind": "evaluation", "window": -1, "time": 1.0, "sets": {}}, False),
        ({"kind": "evaluation", "window": 0, "time": 1.0, "sets": {}}, True),
        ({"kind": "policy", "window": 1, "time": 2.0, "values": {"a": 1}}, False),
        (event("checkpoint", window=0), True),
        (event("checkpoint", window=0), True),
        (window(3), True),
    ]
    for stop in range(len(script) + 1):  # opened anew after any record: the same
        path.unlink(missing_ok=True)
        with Journal(path) as journal:
            got = [journal.append(record) for record, _ in script[:stop]]
        with Journal(path) as journal:
            got += [journal.append(record) for record, _ in script[stop:]]
        assert got == [kept for _, kept in script], stop
        assert records(path) == [record for record, kept in script if kept]


def test_numbers_that_are_not_finite_are_null_and_numpy_is_plain(path):
    with Journal(path) as journal:
        journal.append(
            window(0, loss=math.nan, mfu=np.float64("inf"), n=np.int64(3), deep={"a": [1.5, -math.inf, np.float32(2)]})
        )
    line = path.read_bytes()
    assert b"NaN" not in line and b"Infinity" not in line
    record = records(path)[0]
    assert (record["loss"], record["mfu"], record["n"], record["deep"]) == (None, None, 3, {"a": [1.5, None, 2.0]})


def test_text_of_any_kind_survives(path):
    name = os.fsdecode(b"/data/\xff.txt")  # a file name that is not UTF-8
    with Journal(path) as journal:
        assert journal.append(event("bad_rows", text=f"Zeile\nin {name} 文"))
    assert records(path)[0]["text"] == f"Zeile\nin {name} 文"


@pytest.mark.parametrize("domains", [3, 65])
def test_arrays_by_domain_come_back_exactly(path, domains):
    catalog = numbered(domains)
    sums = np.random.default_rng(0).normal(size=domains)
    counts = np.arange(domains, dtype=np.int64) + 2**53
    with Journal(path) as journal:
        journal.append(window(0, loss_sum=pack_d(sums, catalog), tokens_d=pack_d(counts, catalog)))
    record = records(path)[0]
    assert isinstance(record["loss_sum"], dict) == (domains <= 64)
    assert np.array_equal(unpack_d(record["loss_sum"], catalog, np.float64), sums)
    assert np.array_equal(unpack_d(record["tokens_d"], catalog, np.int64), counts)


@pytest.mark.parametrize("domains", [3, 65])
def test_a_domain_without_a_number_comes_back_as_nan(path, domains):
    catalog = numbered(domains)
    values = np.arange(float(domains))
    values[1] = math.nan
    with Journal(path) as journal:
        journal.append(window(0, loss_sum=pack_d(values, catalog)))
    assert np.array_equal(unpack_d(records(path)[0]["loss_sum"], catalog, np.float64), values, equal_nan=True)


def test_offsets_go_on_where_they_say(path):
    with Journal(path) as journal:
        for number in range(5):
            journal.append(window(number))
        found = list(read_journal(path))
        assert found[-1][0] == path.stat().st_size
        for place, (offset, _) in enumerate(found):
            assert list(read_journal(path, offset)) == found[place + 1 :]
        journal.append(window(5))
        assert [record["window"] for _, record in read_journal(path, found[-1][0])] == [5]


def test_a_journal_that_is_not_there_holds_nothing(tmp_path):
    assert list(read_journal(tmp_path / "none" / "journal.jsonl")) == []


def test_cut_at_any_byte_it_loses_its_unfinished_line_only(path, caplog):
    with Journal(path) as journal:
        for number in range(3):
            journal.append(window(number))
    whole = path.read_bytes()
    ends = [offset for offset, _ in read_journal(path)]
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        left = sum(end <= size for end in ends)
        assert [record["window"] for record in records(path)] == list(range(left))
        caplog.clear()
        with Journal(path) as journal:
            assert len(warnings(caplog)) == (size not in (0, *ends)), size
            assert path.stat().st_size == max((0, *(end for end in ends if end <= size)))
            assert journal.append(window(2)) and not journal.append(window(2))
        assert records(path)[-1]["window"] == 2


@pytest.mark.parametrize(
    "bad",
    [
        b"\0" * 40,
        b'{"kind":"window","wind',
        b"[1]",
        b'{"window":1}',
        b'{"kind":"window","window":"1","time":1}',
        b'{"kind":"event"}',
        b'{"kind":"event","time":1,"text":"\xff"}',
    ],
)
def test_a_damaged_line_in_the_middle_is_left_out_and_named(path, caplog, bad):
    with Journal(path) as journal:
        for number in range(4):
            journal.append(window(number))
    lines = path.read_bytes().split(b"\n")
    lines[2] = bad
    path.write_bytes(b"\n".join(lines))
    assert [record["window"] for record in records(path)] == [0, 1, 3]
    assert len(warnings(caplog)) == 1 and f"line 3 of {path}" in warnings(caplog)[0]
    caplog.clear()
    first = next(read_journal(path))[0]
    assert [record["window"] for record in records(path, first)] == [1, 3]
    assert f"line 3 of {path}" in warnings(caplog)[0]
    with Journal(path) as journal:
        assert not journal.append(window(3)) and journal.append(window(4))


def test_two_writers_records_are_read_once(path):
    """A process that was replaced and woke up again may add what is known; nobody sees it twice."""
    with Journal(path) as old, Journal(path) as new:
        assert old.append(window(0)) and new.append(window(0)) and new.append(window(1)) and old.append(window(1))
        assert [record["window"] for record in records(path)] == [0, 1]


def test_a_removed_folder_costs_one_warning_and_no_exception(path, caplog):
    with Journal(path) as journal:
        assert journal.append(window(0))
        moved = path.parent.rename(path.parent.with_name("moved"))
        for number in range(1, 4):
            assert not journal.append(window(number))
        assert len(warnings(caplog)) == 1 and str(path) in warnings(caplog)[0]
        moved.rename(path.parent)
        assert journal.append(window(3))  # what was not written is not known
        assert journal.append(window(4)) and not journal.append(window(4))
        assert journal.lost == 3
        assert len(warnings(caplog)) == 2 and "3 records are missing" in warnings(caplog)[1]
    assert [record["window"] for record in records(path)] == [0, 3, 4]


def test_a_removed_file_begins_anew_behind_what_is_known(path):
    with Journal(path) as journal:
        journal.append(window(7))
        path.unlink()
        assert not journal.append(window(7)) and journal.append(window(8))
    assert [record["window"] for record in records(path)] == [8]


def test_a_folder_that_is_not_there_at_opening(path, caplog):
    path.parent.rmdir()
    with Journal(path) as journal:
        assert not journal.append(window(0)) and not journal.append(window(0))
        assert len(warnings(caplog)) == 1
        path.parent.mkdir()
        assert journal.append(window(0))
    assert [record["window"] for record in records(path)] == [0]


FULL = """
import json, logging, resource, sys
from pathlib import Path
from mixer.control.journal import Journal
logging.basicConfig(stream=sys.stdout, format="%(message)s")
journal = Journal(Path(sys.argv[1]))
soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
def add(numbers):
    print([journal.append({"kind": "window", "window": n, "time": 1.0, "text": "x" * 100}) for n in numbers])
add(range(3))
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), hard))
add(range(3, 8))
print("bytes", Path(sys.argv[1]).stat().st_size)
resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
add(range(3, 8))
journal.close()
"""


@pytest.mark.parametrize("room", [0, 1, 100, 146])
def test_a_full_disk_leaves_no_half_line_and_it_goes_on_when_there_is_room(path, room):
    line = len('{"kind":"window","window":0,"time":1.0,"text":""}\n') + 100
    assert line == 150
    limit = 3 * line + room
    done = subprocess.run(
        [sys.executable, "-c", FULL, path, str(limit)], capture_output=True, text=True, check=True, cwd=os.getcwd()
    )
    said = done.stdout.splitlines()
    assert said[0] == "[True, True, True]"
    assert [line for line in said if line.startswith("[")][1:] == [str([False] * 5), str([True] * 5)], done.stdout
    assert f"bytes {3 * line}" in said  # the half is taken back at once
    assert sum("cannot be written" in line for line in said) == 1
    assert [record["window"] for record in records(path)] == list(range(8))
    assert path.stat().st_size == 8 * line


def test_half_a_line_that_cannot_be_taken_back_at_once_is_gone_before_the_next(path, monkeypatch):
    with Journal(path) as journal:
        journal.append(window(0))
        write, cut = os.write, os.ftruncate

        def half(number: int, data: bytes) -> int:
            return write(number, data[: len(data) // 2])

        def refuse(*_: int) -> None:
            raise OSError(5, "Input/output error")

        monkeypatch.setattr(os, "write", half)
        monkeypatch.setattr(os, "ftruncate", refuse)
        assert not journal.append(window(1))
        monkeypatch.setattr(os, "write", write)
        assert not journal.append(window(1))  # the half is still there: nothing may follow it
        monkeypatch.setattr(os, "ftruncate", cut)
        assert journal.append(window(1))
    assert [json.loads(line)["window"] for line in path.read_text().splitlines()] == [0, 1]


def test_threads_append_whole_lines(path):
    with Journal(path) as journal:
        barrier = threading.Barrier(4)

        def add(name: str) -> None:
            barrier.wait()
            for number in range(200):
                journal.append(event(name, steps=number))

        threads = [threading.Thread(target=add, args=(str(i),)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    found = records(path)
    for i in range(4):
        assert [record["steps"] for record in found if record["what"] == str(i)] == list(range(200))


def test_a_hundred_thousand_records_are_read_in_seconds(path):
    names = {f"domain_{i}": 1234.5 + i for i in range(8)}
    tail = json.dumps({"time": 1.0, "loss_sum": names, "tokens_d": names, "rows_d": names})[1:]
    with path.open("w") as file:
        file.writelines(f'{{"kind":"window","window":{i},{tail}\n' for i in range(100_000))
    with Journal(path) as journal:
        assert not journal.append(window(99_999)) and journal.append(window(100_000))
    begin = time.thread_time()
    assert sum(1 for _ in read_journal(path)) == 100_001
    read = time.thread_time() - begin
    assert read < 4, read


def bytes_read() -> int:
    """By this process, in all."""
    return int(re.findall(r"rchar: (\d+)", Path("/proc/self/io").read_text())[0])


@pytest.mark.parametrize("every", [16, None])
def test_a_long_journal_is_opened_from_its_end(path, every):
    """20,000 windows, evaluated every so often, or before the first window only."""
    names = {f"domain_{i:02}": 1234.5 + i for i in range(8)}
    tail = json.dumps({"time": 1.0, "loss_sum": names, "tokens_d": names, "rows_d": names, "bad_rows_d": names})[1:]
    values = json.dumps({"time": 1.0, "values": names})[1:]
    with path.open("w") as file:
        file.write('{"kind":"evaluation","window":-1,"time":0.5,"sets":{}}\n')
        for i in range(20_000):
            file.write(f'{{"kind":"window","window":{i},{tail}\n{{"kind":"policy","window":{i},{values}\n')
            if every and i % every == 0:
                file.write(f'{{"kind":"evaluation","window":{i},{values}\n')
    before = bytes_read()
    with Journal(path) as journal:
        heard = Heard.of(read_back(path))
        took = bytes_read() - before
        assert not journal.append(window(19_999)) and journal.append(window(20_000))
    assert took < path.stat().st_size * (0.01 if every else 0.03), (took, path.stat().st_size)
    assert heard.last["policy"]["window"] == 19_999 and heard.working and heard.ending == ""
    assert heard.last.get("evaluation", {}).get("window") == (19_984 if every else None)


LINES = st.one_of(
    st.sampled_from(["window", "policy", "evaluation"]),
    st.sampled_from(["begun", "workers", "restart", "resumed", "checkpoint", "bad_rows", *ENDINGS]),
    st.sampled_from([b"", b"[1]", b"\0" * 40, b'{"kind":"window","wind', b'{"kind":"odd","time":1}']),
)


@settings(max_examples=100)
@given(
    script=st.lists(LINES, max_size=40),
    torn=st.sampled_from([b"", b"{", b'{"kind":"window","window":99,"time":1', b"\0" * 9, b"x" * 300]),
    back=st.integers(1, 400),
    length=st.integers(0, 300),
)
def test_the_end_of_a_journal_tells_what_the_whole_one_tells(tmp_path_factory, script, torn, back, length):
    """Whatever it ends in, and however far apart its newlines lie in what is read at once."""
    path = tmp_path_factory.mktemp("run") / "journal.jsonl"
    lines = []
    for place, what in enumerate(script):
        if isinstance(what, bytes):
            lines.append(what)
        elif what in ("window", "policy", "evaluation"):
            lines.append(json.dumps({"kind": what, "window": place, "time": 1.0, "x": "y" * length}).encode())
        else:
            lines.append(json.dumps(event(what, text="z" * (length * place % 97))).encode())
    path.write_bytes(b"".join(line + b"\n" for line in lines) + torn)
    whole, once = Heard(), Once()
    for _, record in read_journal(path):
        whole = whole.after(record)
        once.note(record)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mixer.control.journal._BACK_BYTES", back)
        assert [*read_back(path)] == [record for _, record in read_journal(path)][::-1]
        assert Heard.of(read_back(path)) == whole
        with Journal(path) as journal:
            assert path.stat().st_size == sum(len(line) + 1 for line in lines)
            for kind in ("window", "policy", "evaluation"):
                last = once.last.get(kind, -1)
                assert not journal.append({"kind": kind, "window": last, "time": 1.0}) or last == -1
                assert journal.append({"kind": kind, "window": last + 1, "time": 1.0})


def test_a_process_that_was_replaced_adds_nothing_says_so_once_and_cuts_nothing(path, caplog):
    old = Fence(path.parent)
    with Journal(path, old) as journal:
        assert journal.append(window(0))
        new = Fence(path.parent, takeover=old.owner.epoch)
        with Journal(path, new) as other:
            assert other.append(window(1))
        whole = path.read_bytes()
        path.write_bytes(whole + b'{"kind":"win')  # which the new owner may be writing
        assert not journal.append(window(2)) and not journal.append(event("late"))
        assert path.read_bytes() == whole + b'{"kind":"win'
        assert len(warnings(caplog)) == 1 and "taken over by pid" in warnings(caplog)[0]
        assert journal.lost == 2
    Journal(path, old).close()  # nor by opening it, where a torn line is dropped
    assert path.read_bytes() == whole + b'{"kind":"win'
    old.close()
    new.close()


def test_threads_that_write_under_one_fence_do_not_let_each_other_out_of_it(tmp_path):
    fence = Fence(tmp_path)
    inside: list[int] = []
    most: list[int] = []

    def write() -> None:
        for _ in range(50):
            with fence.writing():
                inside.append(1)
                most.append(len(inside))
                time.sleep(0)
                inside.pop()

    threads = [threading.Thread(target=write) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max(most) == 1
    fence.close()
    assert fence.is_lost
    with pytest.raises(ScheduleError, match="let go"):
        fence.check()
