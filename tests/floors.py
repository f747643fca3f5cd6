"""The rules of the floors, checked on the imports of a module's syntax tree, those inside functions too.

A module may import from its own floor and from the floors below it. What a floor may use of other packages is
listed here; a rule that names single files comes on top. `ray` splits into its libraries: `ray.data` and
`ray.train` are asked for by name, anything else of ray is its core (tasks, actors).
"""

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

FLOORS = {
    "mixer.core": 0,
    "mixer.data": 1,
    "mixer.training": 2,
    "mixer.control": 3,
    "mixer.proxies": 4,
    "mixer.cli": 4,
    "mixer.run": 4,
    "mixer.config": 4,
    "jobs": 4,
}
ANYTHING = frozenset({"*"})
NUMBERS = frozenset({"numpy", "scipy"})
ALLOWED = {
    0: NUMBERS,
    1: NUMBERS | {"pyarrow", "ray.data", "ray core", "tokenizers"},
    2: NUMBERS | {"pyarrow", "torch", "ray.train", "ray core"},
    3: NUMBERS | {"pyarrow", "ray core"},
    4: ANYTHING,
}
ONLY_IN = {
    "omegaconf": ("mixer/config.py",),
    "mlflow": ("mixer/control/tracker.py",),
    "torch.distributed": ("mixer/training/loop.py",),
}
CORE_REFUSES = frozenset({
    "asyncio", "concurrent", "ctypes", "fcntl", "glob", "io", "logging", "mmap", "multiprocessing", "os",
    "pathlib", "pickle", "random", "secrets", "shutil", "signal", "socket", "sqlite3", "subprocess", "tempfile",
    "threading", "time", "datetime",
})  # fmt: skip  # files, clocks, processes, global random state
NO_ACTORS = (1, 2)
