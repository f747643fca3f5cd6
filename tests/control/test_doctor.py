"""Every check of the doctor turns red when its fact is wrong, and only then; a machine's facts are found out."""

import copy
import fcntl
import os
import re
import socket
import tomllib
from pathlib import Path
from typing import Any

import pytest

from mixer.control import consult, doctor, examine
from mixer.control.consult import Concern, Place
from mixer.control.doctor import Finding
from mixer.data.storage import Storage
from tests.fakes import make_corpus

ROOT = Path(__file__).parents[2]
GOOD: dict[str, Any] = {
    "node": "a", "host": "a", "python": "3.11.7", "has_mixer": True, "cpus": 64, "memory_bytes": 512_000_000_000,
    "packages": {"ray": "2.60.0", "torch": "2.13.0+cu128", "pyarrow": "25.0.1", "mlflow": "3.17.2", "numpy": "2.4.6"},
    "shm_bytes": 200_000_000_000, "files_soft": 65_536, "files_hard": 1_048_576, "auth_mode": "token",
    "token_file": {"path": "/run/token", "mode": 0o600}, "listening": [(False, 8265)], "time": 100.0,
    "gpus": {"listed": 8, "driver": "550.54", "cuda": "12.8", "devices": [["H200", 141_000_000_000]] * 8, "error": ""},
    "folders": {"/shared": {"free_bytes": 9_000_000_000_000, "seen": True, "locked": True, "error": ""}},
}  # fmt: skip


def facts(**changes: Any) -> dict[str, Any]:
    """A node in order, but for what is named; `a__b` is key b of a."""
    made = copy.deepcopy(GOOD)
    for key, value in changes.items():
        at = made
        *path, last = key.split("__")
        for name in path:
            at = at[name]
        at[last] = value
    return made


def test_a_node_in_order_has_nothing_to_mend():
    findings = doctor.of_node(facts())
    assert [(one.name, one.level, one.mend) for one in findings if one.level != "ok" or one.mend] == []
    assert {one.name for one in findings} == {"versions", "GPUs", "CPUs", "object store", "open files", "token file"}
    gpus = next(one for one in findings if one.name == "GPUs")
    assert gpus.found == "8 GPUs: H200 (141 GB); CUDA 12.8; 550.54"


@pytest.mark.parametrize(
    ("changes", "name", "level", "part"),
    [
        ({"python": "3.10.14"}, "versions", "bad", "python 3.10.14 < 3.11"),
        ({"packages__ray": "2.53.1"}, "versions", "bad", "ray 2.53.1 < 2.54"),
        ({"packages__torch": "2.5.1+cu121"}, "versions", "bad", "torch 2.5.1+cu121 < 2.6"),
        ({"packages__pyarrow": "14.0.0"}, "versions", "bad", "pyarrow 14.0.0 < 14.0.1"),
        ({"packages__mlflow": None}, "versions", "bad", "mlflow missing < 3.1"),
        ({"has_mixer": False}, "versions", "bad", "mixer is not there"),
        ({"gpus__devices": []}, "GPUs", "bad", "8 GPUs by the driver, 0 by torch"),
        ({"gpus__devices": [["H200", 1]] * 7}, "GPUs", "bad", "7 by torch"),
        ({"gpus__error": "ImportError: libcudart"}, "GPUs", "bad", "libcudart"),
        ({"cpus": 1}, "CPUs", "warn", "1 CPUs"),
        ({"shm_bytes": 64_000_000}, "object store", "bad", "0.06 GB"),
        ({"shm_bytes": 1_000_000_000}, "object store", "warn", "1.00 GB"),
        ({"files_hard": 1_024}, "open files", "bad", "1,024 hard"),
        ({"files_hard": 20_000}, "open files", "warn", "20,000 hard"),
        ({"token_file__mode": 0o644}, "token file", "bad", "/run/token has mode 0644"),
        ({"token_file__mode": 0o640}, "token file", "bad", "0640"),
    ],
)
def test_each_check_of_a_node_turns_red(changes, name, level, part):
    wrong = [one for one in doctor.of_node(facts(**changes)) if one.level != "ok"]
    assert [(one.name, one.level, one.node) for one in wrong] == [(name, level, "a")]
    assert part in wrong[0].found
    assert wrong[0].mend


def test_what_is_no_fault_of_a_node():
    assert doctor.gpus(facts(gpus__listed=0, gpus__devices=[])).level == "ok"
    assert doctor.open_files(facts(files_hard=-1)).level == "ok"
    assert doctor.token_file(facts(token_file=None)).level == "ok"


def test_versions_are_compared_by_number():
    assert doctor.order("2.6") == doctor.order("2.6.0") < doctor.order("2.10.0+cpu") < doctor.order("2.54")
    assert doctor.order("14.0.1") > doctor.order("14") == doctor.order("14.0.0.dev1")


def test_the_floors_are_those_of_the_project():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    floors = {
        match[1]: match[2] for one in project["dependencies"] if (match := re.match(r"([a-z]+).*?>=([\d.]+)", one))
    }
    assert {name: floors[name] for name in doctor.FLOORS} == doctor.FLOORS
    assert project["requires-python"] == f">={doctor.PYTHON}"


def test_versions_that_differ_between_nodes_are_named_with_the_nodes():
    other = facts(node="b", packages__ray="2.59.0")
    finding = doctor.same_versions([facts(), other, facts(node="c")])
    assert finding.level == "bad"
    assert "a, c: python 3.11.7, ray 2.60.0" in finding.found
    assert "b: python 3.11.7, ray 2.59.0" in finding.found
    assert doctor.same_versions([facts(), facts(node="b")]).level == "ok"


@pytest.mark.parametrize(
    ("mode", "asks", "level"),
    [("token", True, "ok"), ("token", None, "ok"), ("token", False, "bad"), ("", True, "ok"), ("", None, "warn"),
     ("", False, "bad")],
)  # fmt: skip
def test_token_authentication_is_what_the_job_server_does(mode, asks, level):
    finding = doctor.token_mode([facts(), facts(auth_mode=mode)], asks)
    assert finding.level == level
    assert bool(finding.mend) == (level != "ok")


@pytest.mark.parametrize(
    ("listening", "asks", "level"),
    [
        ([(False, 8265)], False, "ok"),
        ([(True, 8265)], True, "ok"),
        ([(True, 8265)], False, "bad"),
        ([(True, 8265)], None, "bad"),
        ([(False, 8265), (True, 8265)], False, "bad"),
        ([(True, 22)], False, "ok"),
    ],
)
def test_a_dashboard_open_to_the_world_without_a_token_is_bad(listening, asks, level):
    assert doctor.dashboard(facts(listening=listening), 8265, asks).level == level


@pytest.mark.parametrize(("free", "level"), [(1_900_000_000, "bad"), (19_000_000_000, "warn"), (21_000_000_000, "ok")])
def test_little_space_is_said(free, level):
    assert doctor.disk(facts(folders__x={"free_bytes": free}), "run.path", "x").level == level


@pytest.mark.parametrize(
    ("change", "arrived", "part"),
    [
        ({"folders__/shared__seen": False}, {"a"}, "not the same folder as here"),
        ({}, {"a"}, "not the same folder as here"),
        ({"folders__/shared__error": "Read-only file system: /shared"}, {"a", "b"}, "Read-only file system"),
        ({"folders__/shared__locked": False}, {"a", "b"}, "does not hold"),
        ({"folders__/shared__locked": None}, {"a", "b"}, "has no flock"),
    ],
)
def test_a_folder_that_is_not_shared_is_found_at_its_node(change, arrived, part):
    findings = doctor.storage("run.path", "/shared", "", [facts(), facts(node="b", **change)], arrived)
    assert [(one.level, one.node) for one in findings] == [("bad", "b")]
    assert part in findings[0].found
    assert "run.path" in findings[0].name


def test_a_shared_folder_is_in_order_and_locks_count_where_they_are_needed():
    nodes = [facts(), facts(node="b", **{"folders__/shared__locked": None})]
    assert doctor.storage("corpus", "/shared", "", nodes, {"a", "b"}, locks=False)[0].level == "ok"
    whole = doctor.storage("run.path", "/shared", "", [facts(), facts(node="b")], {"a", "b"})
    assert [(one.level, one.found) for one in whole] == [("ok", "/shared: written and seen by 2 nodes, locks hold")]
    assert doctor.storage("run.path", "/shared", "Permission denied: /shared", [], set())[0].level == "bad"


def test_clocks_are_a_note_only():
    assert doctor.clock(facts(time=100.0), 99.0, 101.0).level == "ok"
    late = doctor.clock(facts(time=86_500.0), 99.0, 101.0)
    assert (late.level, late.found) == ("warn", "86399.0 s apart")
    assert doctor.clock(facts(time=90.0), 99.0, 101.0).found == "9.0 s apart"


def test_the_table_says_once_what_is_alike_and_what_to_mend():
    findings = [
        Finding(name="x", level="ok", found="fine", node="a"),
        Finding(name="x", level="ok", found="fine", node="b"),
        Finding(name="longer", level="bad", found="broken", mend="mend it", node="b"),
    ]
    assert doctor.table(findings) == (
        "ok   x       fine [all nodes]\nbad  longer  broken [b]\n             -> mend it\n2 ok, 0 warn, 1 bad"
    )


def test_loopback_is_told_from_all_interfaces():
    assert examine.is_loopback("0100007F")
    assert not examine.is_loopback("00000000")
    assert not examine.is_loopback("0500000A")
    assert examine.is_loopback("00000000000000000000000001000000")
    assert not examine.is_loopback("0" * 32)
    assert examine.is_loopback("0000000000000000FFFF00000100007F")
    with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("0.0.0.0", 0)) as all_of_them:
        found = examine.listening()
        assert (False, one.getsockname()[1]) in found
        assert (True, all_of_them.getsockname()[1]) in found


def test_a_folder_shows_whether_it_is_the_askers(tmp_path):
    (tmp_path / "mark").write_text("mark")
    held = os.open(tmp_path / "mark", os.O_RDWR)
    try:
        assert examine.try_folder(str(tmp_path), "mark", "b")["locked"] is False
        fcntl.flock(held, fcntl.LOCK_EX)
        answer = examine.try_folder(str(tmp_path), "mark", "b")
    finally:
        os.close(held)
    assert (answer["seen"], answer["locked"], answer["error"]) == (True, True, "")
    assert answer["free_bytes"] > 0
    assert (tmp_path / "mark-b").read_text() == "b"


def test_another_machines_folder_is_not_the_askers(tmp_path, monkeypatch):
    monkeypatch.setattr(examine, "SEEN_S", 0.0)
    assert examine.try_folder(str(tmp_path), "mark", "b")["seen"] is False
    (tmp_path / "mark").write_text("another")
    assert examine.try_folder(str(tmp_path), "mark", "b")["seen"] is False
    absent = examine.try_folder(str(tmp_path / "absent"), "mark", "b")
    assert absent["error"].startswith("No such file or directory")


def levels(findings: list[Finding]) -> dict[str, str]:
    return {one.name: one.level for one in findings}


def test_this_machine_is_examined_and_left_as_it_was(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "DISK_BAD", 0)
    monkeypatch.setattr(doctor, "DISK_WARN", 0)
    corpus = make_corpus(tmp_path / "corpus", {"code": 3}).root
    before = sorted(tmp_path.rglob("*"))
    place = Place(key="run.path", path=str(tmp_path / "runs" / "x"), storage=Storage(), locks=True)
    findings = consult.consult(Concern(places=(place,), corpus=corpus, tracker_uri=f"sqlite:///{tmp_path}/mlflow.db"))
    found = levels(findings)
    wanted = ("versions", "GPUs", "storage of run.path", "disk of run.path", "corpus", "tracker")
    assert {name: found[name] for name in wanted} == dict.fromkeys(wanted, "ok")
    assert next(one for one in findings if one.name == "corpus").found.endswith("1 shards, 3 rows")
    assert next(one for one in findings if one.name == "storage of run.path").found.endswith("1 node, locks hold")
    assert sorted(tmp_path.rglob("*")) == before


def test_what_is_wrong_outside_the_machine_is_found(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert consult.try_tracker(f"http://127.0.0.1:{port}") == ""
    assert "refused" in consult.try_tracker(f"http://127.0.0.1:{port}")
    assert doctor.tracker("http://x", "refused").level == "warn"
    assert consult.try_corpus(str(tmp_path), None).level == "bad"
    bucket = Place(key="run.path", path="s3://bucket/run", storage=Storage(), locks=True)
    assert consult.split([bucket]) == ([], [bucket])
    (tmp_path / "object").mkdir()
    local = Place(key="run.path", path=f"file://{tmp_path}/object", storage=Storage(), locks=True)
    assert consult.split([local]) == ([local], [])
    assert consult.try_store(local).found.endswith("is an object store")
    assert not list((tmp_path / "object").iterdir())


def test_a_folder_that_cannot_be_written_is_bad(monkeypatch):
    place = Place(key="run.path", path="/proc/runs/x", storage=Storage(), locks=True)
    monkeypatch.setattr(consult, "ask_here", lambda request: consult.Answers([facts()], [(0.0, 0.0)], [], 1))
    finding = next(one for one in consult.consult(Concern(places=(place,))) if one.name == "storage of run.path")
    assert finding.level == "bad"
    assert "/proc" in finding.found
