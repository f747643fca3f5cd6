"""What one machine is like, as plain data: versions, devices, limits, disks, who listens.

Only the standard library, so that it can be sent to a node that has nothing of ours, and as a program
(`python -m mixer.control.examine`, request and answer as JSON) so that what it tries cannot harm who asks. It judges
nothing: that is `doctor`'s work.

Request: {"packages": [names], "folders": {folder: mark}, "node": name}. A mark is a file that the asker has put into
the folder and holds locked; a node that shares the folder reads its own name from it, finds the lock taken, and
leaves a file `<mark>-<node>` there, which the asker looks for and removes.
"""

import contextlib
import fcntl
import json
import os
import resource
import shutil
import socket
import subprocess
import sys
import time
from importlib import metadata, util
from pathlib import Path
from typing import Any

TORCH_S = 90.0
SEEN_S = 5.0  # what a network file system may take to show a new file
ASK_TORCH = """
import json, torch
cuda = torch.cuda
devices = [cuda.get_device_properties(n) for n in range(cuda.device_count())] if cuda.is_available() else []
print(json.dumps({"cuda": torch.version.cuda or "",
                  "devices": [[device.name, device.total_memory] for device in devices]}))
"""


def examine(request: dict[str, Any]) -> dict[str, Any]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    answer: dict[str, Any] = {
        "node": request.get("node", ""),
        "host": socket.gethostname(),
        "python": ".".join(map(str, sys.version_info[:3])),
        "packages": {name: version_of(name) for name in request.get("packages", [])},
        "has_mixer": util.find_spec("mixer") is not None,
        "cpus": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "shm_bytes": shutil.disk_usage("/dev/shm").total if os.path.isdir("/dev/shm") else 0,
        "files_soft": soft,
        "files_hard": hard,
        "auth_mode": os.environ.get("RAY_AUTH_MODE", ""),
        "token_file": token_file(),
        "listening": listening(),
        "gpus": gpus(),
        "folders": {folder: try_folder(folder, mark, request.get("node", "")) for folder, mark in
                    request.get("folders", {}).items()},
    }  # fmt: skip
    return answer | {"time": time.time()}


def version_of(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def token_file() -> dict[str, Any] | None:
    """The file that a token would come from, with its permissions; the token itself is not read."""
    if os.environ.get("RAY_AUTH_TOKEN"):
        return None
    named = os.environ.get("RAY_AUTH_TOKEN_PATH")
    path = Path(named) if named else Path.home() / ".ray" / "auth_token"
    try:
        return {"path": str(path), "mode": path.stat().st_mode & 0o777}
    except OSError:
        return None


def listening() -> list[tuple[bool, int]]:
    """(reachable from other machines, port) of each listening TCP socket, as Linux tells."""
    found: set[tuple[bool, int]] = set()
    for name in ("tcp", "tcp6"):
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]:
                words = line.split()
                if words[3] == "0A":
                    address, port = words[1].split(":")
                    found.add((not is_loopback(address), int(port, 16)))
    return sorted(found)


def is_loopback(address: str) -> bool:
    """Of /proc/net's notation: each word of four bytes in the machine's order."""
    words = [bytes.fromhex(address[n : n + 8]) for n in range(0, len(address), 8)]
    plain = b"".join(word[::-1] if sys.byteorder == "little" else word for word in words)
    if len(plain) == 4:
        return plain[0] == 127
    return plain == bytes(15) + b"\x01" or (plain[:12] == bytes(10) + b"\xff\xff" and plain[12] == 127)


def gpus() -> dict[str, Any]:
    """GPUs as the driver lists them and as torch sees them, asked in a process of its own that may see all."""
    listed = Path("/proc/driver/nvidia/gpus")
    driver = Path("/proc/driver/nvidia/version")
    answer: dict[str, Any] = {
        "listed": len(list(listed.iterdir())) if listed.is_dir() else 0,
        "driver": driver.read_text().splitlines()[0].strip() if driver.is_file() else "",
        "cuda": "",
        "devices": [],
        "error": "",
    }
    # Ray hides the GPUs from a task that asked for none.
    environment = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    if util.find_spec("torch") is None:
        return answer | {"error": "torch is not installed"}
    try:
        done = subprocess.run(
            [sys.executable, "-c", ASK_TORCH],
            env=environment, capture_output=True, text=True, timeout=TORCH_S, check=False,
        )  # fmt: skip
        return answer | json.loads(done.stdout.strip().splitlines()[-1])
    except subprocess.TimeoutExpired:
        return answer | {"error": f"torch does not answer within {TORCH_S:.0f} s"}
    except (IndexError, ValueError):
        return answer | {"error": (done.stderr.strip().splitlines() or [f"ended with {done.returncode}"])[-1]}


def try_folder(folder: str, mark: str, node: str) -> dict[str, Any]:
    """Free space, and whether this is the asker's folder, can be written, and keeps the asker's lock."""
    answer: dict[str, Any] = {"free_bytes": 0, "seen": False, "locked": None, "error": ""}
    path = Path(folder, mark)
    try:
        answer["free_bytes"] = shutil.disk_usage(folder).free
        deadline = time.monotonic() + SEEN_S
        while not answer["seen"] and time.monotonic() < deadline:
            with contextlib.suppress(FileNotFoundError):
                answer["seen"] = path.read_text() == mark
            if not answer["seen"]:
                os.listdir(folder)  # makes some network file systems look again
                time.sleep(0.2)
        if answer["seen"]:
            answer["locked"] = is_locked(path)
            Path(folder, f"{mark}-{node}").write_text(node)
    except OSError as error:
        answer["error"] = f"{error.strerror}: {error.filename or folder}"
    return answer


def is_locked(path: Path) -> bool | None:
    """Whether somebody else holds the lock; None if this file system has no locks."""
    number = os.open(path, os.O_RDWR)
    try:
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return False
    except BlockingIOError:
        return True
    except OSError:
        return None
    finally:
        os.close(number)


if __name__ == "__main__":
    sys.stdout.write(json.dumps(examine(json.load(sys.stdin))))
