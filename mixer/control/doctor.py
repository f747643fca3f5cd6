"""What is wrong with a machine or a cluster before a run finds out: every check is a function of facts.

Facts of a node are what `examine` returns, and a check turns them into one `Finding`: what was found, whether it is
in order, and what to mend. `bad` is what would break a run or lay the cluster open, `warn` what would slow or
surprise one. Nothing here looks at a machine; `consult` does.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Level = Literal["ok", "warn", "bad"]
Facts = Mapping[str, Any]

# The lowest versions that will do; as in pyproject.toml, and there for the reasons given here.
PYTHON = "3.11"
FLOORS = {
    "ray": "2.54",  # below, anybody may delete jobs (CVE-2026-27482) and a browser may run code (CVE-2025-62593)
    "torch": "2.6",  # below, a checkpoint may run code (CVE-2025-32434)
    "pyarrow": "14.0.1",  # below, a Parquet file may run code (CVE-2023-47248)
    "mlflow": "3.1",
    "numpy": "1.26",
}
GB = 1_000_000_000
DISK_BAD, DISK_WARN = 2 * GB, 20 * GB
SHM_BAD, SHM_WARN = 250_000_000, 2 * GB
FILES_BAD, FILES_WARN = 4_096, 65_536
CLOCK_WARN_S = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    name: str
    level: Level
    found: str
    mend: str = ""
    node: str = ""


def versions(facts: Facts) -> Finding:
    """Python and the packages are there, and new enough."""
    wrong = [f"python {facts['python']} < {PYTHON}"] if order(facts["python"]) < order(PYTHON) else []
    for package, floor in FLOORS.items():
        version = facts["packages"].get(package)
        if version is None or order(version) < order(floor):
            wrong.append(f"{package} {version or 'missing'} < {floor}")
    if not facts["has_mixer"]:
        wrong.append("mixer is not there")
    if wrong:
        return Finding(
            name="versions", level="bad", found="; ".join(wrong), node=facts["node"],
            mend="install this project with its constraints: pip install -c constraints.txt .",
        )  # fmt: skip
    return Finding(name="versions", level="ok", found=version_line(facts), node=facts["node"])


def version_line(facts: Facts) -> str:
    packages = (f"{name} {facts['packages'].get(name)}" for name in FLOORS)
    return ", ".join([f"python {facts['python']}", *packages])


def same_versions(nodes: Sequence[Facts]) -> Finding:
    """Ray wants the same Ray and Python everywhere, and a run the same numbers."""
    by_line: dict[str, list[str]] = defaultdict(list)
    for facts in nodes:
        by_line[version_line(facts)].append(facts["node"])
    if len(by_line) <= 1:
        return Finding(name="same versions", level="ok", found=f"the same on {len(nodes)} nodes")
    found = "; ".join(f"{', '.join(names)}: {line}" for line, names in by_line.items())
    return Finding(name="same versions", level="bad", found=found, mend="use one image or one environment on all nodes")


def order(version: str) -> tuple[int, ...]:
    """The leading numbers of a version, comparable; trailing zeros do not count."""
    match = re.match(r"\d+(\.\d+)*", version)
    parts = [int(part) for part in match[0].split(".")] if match else []
    while parts and parts[-1] == 0:
        parts.pop()
    return tuple(parts)


def gpus(facts: Facts) -> Finding:
    """Every GPU that the driver lists is one that torch can use."""
    found, node = facts["gpus"], facts["node"]
    devices = found["devices"]
    if found["error"]:
        mend = "run `python -c 'import torch'` there; install the build of torch for this machine"
        return Finding(name="GPUs", level="bad", found=found["error"], mend=mend, node=node)
    kinds = ", ".join(sorted({f"{name} ({memory / GB:.0f} GB)" for name, memory in devices}))
    text = f"{len(devices)} GPUs: {kinds}; CUDA {found['cuda']}; {found['driver']}" if devices else "no GPU"
    if found["listed"] > len(devices):
        return Finding(
            name="GPUs", level="bad", node=node,
            found=f"{found['listed']} GPUs by the driver, {len(devices)} by torch (CUDA {found['cuda'] or 'none'})",
            mend="install a build of torch whose CUDA this driver knows, and give the container its GPUs",
        )  # fmt: skip
    return Finding(name="GPUs", level="ok", found=text, node=node)


def cpus(facts: Facts) -> Finding:
    text = f"{facts['cpus']} CPUs, {facts['memory_bytes'] / GB:.0f} GB of memory"
    if facts["cpus"] < 2:
        mend = "a worker and its stream need a CPU each; give this node two or more"
        return Finding(name="CPUs", level="warn", found=text, mend=mend, node=facts["node"])
    return Finding(name="CPUs", level="ok", found=text, node=facts["node"])


def object_store(facts: Facts) -> Finding:
    """Ray's object store lies in /dev/shm, and on a slow disk where that is small."""
    size, node = facts["shm_bytes"], facts["node"]
    level: Level = "bad" if size < SHM_BAD else "warn" if size < SHM_WARN else "ok"
    mend = "make /dev/shm larger: docker run --shm-size=8g, or an emptyDir of medium Memory mounted there"
    found = f"/dev/shm has {size / GB:.2f} GB"
    return Finding(name="object store", level=level, found=found, mend="" if level == "ok" else mend, node=node)


def open_files(facts: Facts) -> Finding:
    """Ray raises its processes' limit up to the hard one."""
    hard, node = facts["files_hard"], facts["node"]
    if hard < 0:
        return Finding(name="open files", level="ok", found="no limit", node=node)
    level: Level = "bad" if hard < FILES_BAD else "warn" if hard < FILES_WARN else "ok"
    mend = f"ulimit -n {FILES_WARN} before Ray starts, or LimitNOFILE in its unit"
    found = f"{facts['files_soft']:,} soft, {hard:,} hard"
    return Finding(name="open files", level=level, found=found, mend="" if level == "ok" else mend, node=node)


def token_mode(nodes: Sequence[Facts], asks_for_token: bool | None) -> Finding:
    """`asks_for_token`: whether the job server refused a request without one; None where none runs."""
    without = [facts["node"] for facts in nodes if facts["auth_mode"].lower() != "token"]
    mend = "set RAY_AUTH_MODE=token on every node before `ray start`, with one token for all (cluster/README.md)"
    if asks_for_token is False:
        found = "the job server takes requests without a token"
        return Finding(name="token authentication", level="bad", found=found, mend=mend)
    if without and asks_for_token is None:
        found = "RAY_AUTH_MODE is not token; a Ray started here may take jobs from anybody on this machine"
        return Finding(name="token authentication", level="warn", found=found, mend=mend)
    found = "the job server asks for a token" if asks_for_token else "RAY_AUTH_MODE=token"
    return Finding(name="token authentication", level="ok", found=found)


def token_file(facts: Facts) -> Finding:
    file, node = facts["token_file"], facts["node"]
    if file is None:
        return Finding(name="token file", level="ok", found="no file is used", node=node)
    found = f"{file['path']} has mode {file['mode']:04o}"
    if file["mode"] & 0o077:
        mend = f"chmod 600 {file['path']}; whoever can read it can run code on the cluster"
        return Finding(name="token file", level="bad", found=found, mend=mend, node=node)
    return Finding(name="token file", level="ok", found=found, node=node)


def dashboard(head: Facts, port: int, asks_for_token: bool | None) -> Finding:
    """The dashboard's port is also the job server's: who reaches it without a token runs code."""
    is_open = [reachable for reachable, one in head["listening"] if one == port]
    if not is_open:
        return Finding(name="dashboard", level="ok", found=f"nothing listens on port {port}", node=head["node"])
    place = "other machines reach it" if any(is_open) else "this machine only"
    found = f"port {port}, {place}, {'with' if asks_for_token else 'without'} a token"
    if any(is_open) and not asks_for_token:
        mend = "start Ray with --dashboard-host=127.0.0.1 and RAY_AUTH_MODE=token; until then anybody can run code here"
        return Finding(name="dashboard", level="bad", found=found, mend=mend, node=head["node"])
    return Finding(name="dashboard", level="ok", found=found, node=head["node"])


def disk(facts: Facts, keys: str, folder: str) -> Finding:
    answer = facts["folders"][folder]
    free, node = answer["free_bytes"], facts["node"]
    level: Level = "bad" if free < DISK_BAD else "warn" if free < DISK_WARN else "ok"
    mend = f"free some space, or set {keys} to a larger disk"
    found = f"{free / GB:,.1f} GB free in {folder}"
    return Finding(name=f"disk of {keys}", level=level, found=found, mend="" if level == "ok" else mend, node=node)


def storage(
    keys: str, folder: str, here: str, nodes: Sequence[Facts], arrived: Iterable[str], *, locks: bool = True
) -> list[Finding]:
    """A folder is one and the same on every node, each can write there, and a lock of one holds for all.

    `here` is what went wrong when the asker wrote there, `arrived` the nodes whose files the asker then saw.
    """
    name = f"storage of {keys}"
    if here:
        return [Finding(name=name, level="bad", found=here, mend=f"set {keys} to a place that can be written")]
    findings: list[Finding] = []
    arrived_nodes = set(arrived)
    for facts in nodes:
        answer = facts["folders"][folder]
        if answer["error"]:
            mend = f"give the user of Ray the right to write there, on every node, or set {keys} to another place"
            findings.append(Finding(name=name, level="bad", found=answer["error"], mend=mend, node=facts["node"]))
        elif not answer["seen"] or facts["node"] not in arrived_nodes:
            found = f"{folder} is not the same folder as here: files do not appear"
            mend = f"set {keys} to a file system that is mounted at the same path on every node"
            findings.append(Finding(name=name, level="bad", found=found, mend=mend, node=facts["node"]))
        elif locks and answer["locked"] is not True:
            found = f"flock in {folder} does not hold" if answer["locked"] is False else f"{folder} has no flock"
            mend = "mount it with locks (NFS 4; Lustre with -o flock): they keep two controllers from owning one run"
            findings.append(Finding(name=name, level="bad", found=found, mend=mend, node=facts["node"]))
    whole = f"{folder}: written and seen by {len(nodes)} node{'s' * (len(nodes) != 1)}"
    return findings or [Finding(name=name, level="ok", found=f"{whole}{', locks hold' if locks else ''}")]


def corpus(path: str, error: str, found: str = "") -> Finding:
    if error:
        mend = "see what it names; `mixer corpus verify` reads every byte"
        return Finding(name="corpus", level="bad", found=error, mend=mend)
    return Finding(name="corpus", level="ok", found=f"{path}: {found}")


def tracker(uri: str, error: str) -> Finding:
    if error:
        mend = "start it, or correct tracker.uri; a run goes on without it and sends what is missing later"
        return Finding(name="tracker", level="warn", found=f"{uri}: {error}", mend=mend)
    return Finding(name="tracker", level="ok", found=uri)


def clock(facts: Facts, asked_s: float, answered_s: float) -> Finding:
    """The node's time lies between asking and answering, or differs by what is outside; nothing depends on it."""
    apart = max(asked_s - facts["time"], facts["time"] - answered_s, 0.0)
    found = f"{apart:.1f} s apart" if apart else "agrees"
    if apart > CLOCK_WARN_S:
        mend = "run chrony or ntpd; times in logs and reports will not fit together, rows and weights are not touched"
        return Finding(name="clock", level="warn", found=found, mend=mend, node=facts["node"])
    return Finding(name="clock", level="ok", found=found, node=facts["node"])


def of_node(facts: Facts) -> list[Finding]:
    """The checks that need one node and nothing else."""
    return [check(facts) for check in (versions, gpus, cpus, object_store, open_files, token_file)]


def unreachable(node: str, error: str) -> Finding:
    mend = "see `ray status` and the node's logs; a run would wait for it"
    return Finding(name="node", level="bad", found=f"no answer: {error}", mend=mend, node=node)


def table(findings: Sequence[Finding]) -> str:
    """What is alike on all nodes stands once."""
    nodes = {finding.node for finding in findings if finding.node}
    grouped: dict[tuple[str, str, str, str], list[str]] = defaultdict(list)
    for one in findings:
        grouped[one.name, one.level, one.found, one.mend].append(one.node)
    rows: list[str] = []
    width = max((len(name) for name, *_ in grouped), default=0)
    for (name, level, found, mend), at in grouped.items():
        where = "" if at == [""] or len(nodes) <= 1 else f" [{'all nodes' if set(at) == nodes else ', '.join(at)}]"
        rows.append(f"{level:<5}{name:<{width}}  {found}{where}")
        rows += [f"{'':<5}{'':<{width}}  -> {mend}"] if mend else []
    counts = {level: sum(one.level == level for one in findings) for level in ("ok", "warn", "bad")}
    return "\n".join([*rows, ", ".join(f"{number} {level}" for level, number in counts.items())])
