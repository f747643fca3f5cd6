"""CPU time and memory of a process and everything below it, as Linux tells them in /proc."""

import os
import resource
import time
from pathlib import Path

PROC = Path("/proc")
TICK_S = 1 / os.sysconf("SC_CLK_TCK")


def descendants(pid: int) -> list[int]:
    children: dict[int, list[int]] = {}
    for entry in PROC.iterdir():
        if entry.name.isdigit() and (stat := _stat(int(entry.name))):
            children.setdefault(int(stat[1]), []).append(int(entry.name))
    found: list[int] = []
    waiting = list(children.get(pid, []))
    while waiting:
        child = waiting.pop()
        found.append(child)
        waiting += children.get(child, [])
    return found


def cpu_s() -> float:
    """CPU seconds of this process, of its living descendants and of those it has waited for."""
    gone = resource.getrusage(resource.RUSAGE_CHILDREN)
    total = time.process_time() + gone.ru_utime + gone.ru_stime
    for child in descendants(os.getpid()):
        if stat := _stat(child):
            total += sum(int(ticks) for ticks in stat[11:15]) * TICK_S
    return total


def cpu_by_process() -> dict[int, float]:
    """CPU seconds of this process and of those below it: what ends meanwhile must not be subtracted."""
    found: dict[int, float] = {}
    for process in (os.getpid(), *descendants(os.getpid())):
        if stat := _stat(process):
            found[process] = sum(int(ticks) for ticks in stat[11:13]) * TICK_S
    return found


def queued_s() -> float:
    """Seconds that this process's main thread was ready to run and had no core."""
    return int((PROC / "self/schedstat").read_text().split()[1]) / 1e9


def peak_rss_mb() -> float:
    """Sum of the kernel's high-water marks: file pages that are mapped count, in every process."""
    return sum(_field_kb(pid, "status", "VmHWM") for pid in (os.getpid(), *descendants(os.getpid()))) / 1024


def private_mb() -> float:
    """Anonymous and shared memory now, shared pages divided among their users: no file pages."""
    pids = (os.getpid(), *descendants(os.getpid()))
    fields = ("Pss_Anon", "Pss_Shmem")
    return sum(_field_kb(pid, "smaps_rollup", field) for pid in pids for field in fields) / 1024


def _stat(pid: int) -> list[str] | None:
    """The fields of /proc/<pid>/stat from the third on, or None if the process is gone."""
    try:
        return (PROC / str(pid) / "stat").read_text().rsplit(")", 1)[1].split()
    except (FileNotFoundError, ProcessLookupError):
        return None


def _field_kb(pid: int, file: str, field: str) -> int:
    try:
        for line in (PROC / str(pid) / file).read_text().splitlines():
            if line.startswith(f"{field}:"):
                return int(line.split()[1])
    except (FileNotFoundError, ProcessLookupError):
        pass
    return 0  # gone, or a zombie without memory
