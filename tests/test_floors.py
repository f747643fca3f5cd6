"""The floors: a module imports from its own floor and from those below it, never upward, never in a circle.

Read from the syntax tree of every module, imports inside functions and of names for types only included. The
tables below are the rules; `broken_rules` is the judge, and is itself judged on planted sources.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

FLOORS = {
    "mixer.core": 0,
    "mixer.data": 1,
    "mixer.training": 2,
    "mixer.control": 3,
    "mixer.proxies": 4,
    "mixer.cli": 4,
    "mixer.config": 4,
    "mixer.run": 4,
    "mixer.alone": 4,
    "mixer.launch": 4,
    "mixer.branch": 4,
    "jobs": 4,
}
# What a floor may use beside the standard library; "ray" is its core alone, its libraries are named.
MAY_USE = {
    0: {"numpy", "scipy"},
    1: {"numpy", "scipy", "pyarrow", "tokenizers", "ray", "ray.data"},
    2: {"numpy", "scipy", "pyarrow", "tokenizers", "ray", "ray.data", "ray.train", "torch", "transformers", "lm_eval"},
    3: {"numpy", "scipy", "pyarrow.fs", "yaml", "ray", "matplotlib", "mlflow"},
}
ONLY_IN = {
    "omegaconf": "mixer/config.py",
    "mlflow": "mixer/control/tracker.py",
    "torch.distributed.checkpoint": "mixer/training/checkpoint.py",
    "torch.distributed": "mixer/training/loop.py",
    "transformers": "mixer/training/pretrained.py",
    "lm_eval": "mixer/training/harness.py",
    "lightgbm": "mixer/proxies/trees.py",
}
NO_ACTORS = {1, 2}
RAY_LIBRARIES = {"ray.data", "ray.train", "ray.tune", "ray.serve", "ray.rllib", "ray.air"}
# Files, clocks, processes, global random state and logging.
NOT_IN_CORE = {
    *("os", "pathlib", "shutil", "tempfile", "glob", "fileinput", "mmap", "sqlite3", "pickle", "shelve"),
    *("time", "datetime", "sched", "signal", "random", "secrets", "uuid", "logging"),
    *("subprocess", "multiprocessing", "threading", "concurrent", "asyncio", "socket", "ctypes", "fcntl"),
}


@dataclass(frozen=True)
class Use:
    """A module named somewhere: by import, by attribute (`torch.distributed`), by `import_module`."""

    name: str
    line: int
    is_import: bool = True
    types_only: bool = False


def broken_rules(sources: Mapping[str, str]) -> list[str]:
    """`file:line: rule` for every breach in `sources`, a mapping of file to text."""
    trees = {file: ast.parse(text, file) for file, text in sources.items()}
    modules = {module_of(file): file for file in trees}
    found: list[str] = []
    edges: dict[str, dict[str, int]] = {}
    for file, tree in trees.items():
        module = module_of(file)
        floor = 0 if module == "mixer" else floor_of(module)
        if floor is None:
            found.append(f"{file}:1: {module} lies on no floor; name its floor in tests/test_floors.py")
            continue
        uses = list(uses_of(tree, package=module if file.endswith("__init__.py") else module.rpartition(".")[0]))
        for use in uses:
            found += [f"{file}:{use.line}: {rule}" for rule in broken_by(use, file, floor)]
            target = use.name if use.name in modules else use.name.rpartition(".")[0]
            if target in modules and use.is_import and not use.types_only and target != module:
                edges.setdefault(module, {}).setdefault(target, use.line)
        if floor == 0:
            found += [f"{file}:{line}: the core opens no files" for line in calls_of(tree, "open")]
        if floor in NO_ACTORS:
            found += [f"{file}:{line}: floor {floor} has no actors" for line in actors_of(tree)]
    for module, targets in edges.items():
        for target, line in targets.items():
            if module in reachable(edges, target):
                found.append(f"{modules[module]}:{line}: {module} and {target} import each other in a circle")
    return sorted(set(found))


def broken_by(use: Use, file: str, floor: int) -> Iterator[str]:
    top = use.name.partition(".")[0]
    owned = next((name for name in ONLY_IN if within(use.name, name)), None)  # the narrower name stands first
    if owned is not None and file != ONLY_IN[owned]:
        yield f"{owned} belongs to {ONLY_IN[owned]} alone"
        return
    if top == "tests":
        yield "nothing outside tests/ imports tests"
    elif top in ("mixer", "jobs"):
        other = floor_of(use.name)
        if other is not None and other > floor:
            yield f"floor {floor} may not import {use.name} of floor {other}"
    elif floor == 0 and top in NOT_IN_CORE:
        yield f"the core may not use {top}: no files, clocks, processes, global random state or logging"
    elif floor < 4 and top not in sys.stdlib_module_names and not may_use(use.name, floor):
        yield f"floor {floor} may not use {use.name}; it may use {', '.join(sorted(MAY_USE[floor]))}"


def may_use(name: str, floor: int) -> bool:
    library = next((library for library in RAY_LIBRARIES if within(name, library)), None)
    if library:
        return library in MAY_USE[floor]
    return any(within(name, allowed) for allowed in MAY_USE[floor])


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def module_of(file: str) -> str:
    return file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def floor_of(module: str) -> int | None:
    return next((floor for prefix, floor in FLOORS.items() if within(module, prefix)), None)


def uses_of(tree: ast.Module, package: str) -> Iterator[Use]:
    types_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
        for statement in node.body
        for inner in ast.walk(statement)
    }
    aliases: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Use(alias.name, node.lineno, types_only=id(node) in types_only)
                aliases[alias.asname or alias.name.partition(".")[0]] = (
                    alias.name if alias.asname else alias.name.partition(".")[0]
                )
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                name = base if alias.name == "*" else f"{base}.{alias.name}"
                yield Use(name, node.lineno, types_only=id(node) in types_only)
                aliases[alias.asname or alias.name] = name
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            named = [str(arg.value) for arg in node.args[:1] if isinstance(arg, ast.Constant)]
            yield from (Use(name, node.lineno) for name in named)
    watched = RAY_LIBRARIES | set(ONLY_IN)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            name = f"{aliases.get(node.value.id, '')}.{node.attr}"
            if name in watched:
                yield Use(name, node.lineno, is_import=False)


def calls_of(tree: ast.Module, function: str) -> Iterator[int]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == function:
            yield node.lineno


def actors_of(tree: ast.Module) -> Iterator[int]:
    """Classes made remote, by decorator or by call, and actors looked up."""
    classes = {node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            for decorator in node.decorator_list:
                name = ast.unparse(decorator.func if isinstance(decorator, ast.Call) else decorator)
                if name.split(".")[-1] == "remote":
                    yield node.lineno
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func).split(".")[-1]
            given = {argument.id for argument in node.args if isinstance(argument, ast.Name)}
            if name == "get_actor" or (name == "remote" and given & classes):
                yield node.lineno


def reachable(edges: Mapping[str, Mapping[str, int]], start: str) -> set[str]:
    seen: set[str] = set()
    todo = [start]
    while todo:
        module = todo.pop()
        if module not in seen:
            seen.add(module)
            todo += edges.get(module, {})
    return seen


def sources() -> dict[str, str]:
    files = sorted([*ROOT.glob("mixer/**/*.py"), *ROOT.glob("jobs/**/*.py")])
    return {file.relative_to(ROOT).as_posix(): file.read_text("utf-8") for file in files}


def test_every_module_keeps_the_rules_of_its_floor():
    found = broken_rules(sources())
    assert not found, "\n" + "\n".join(found)


PLANTED = [
    ("mixer/core/plan.py", "import torch", 1, "floor 0 may not use torch; it may use numpy, scipy"),
    ("mixer/core/plan.py", "def f():\n    from pyarrow import fs", 2, "floor 0 may not use pyarrow.fs"),
    ("mixer/core/plan.py", "import importlib\nimportlib.import_module('ray')", 2, "floor 0 may not use ray"),
    ("mixer/core/plan.py", "import os.path", 1, "the core may not use os"),
    ("mixer/core/plan.py", "from time import time", 1, "the core may not use time"),
    ("mixer/core/plan.py", "import random as r", 1, "the core may not use random"),
    ("mixer/core/plan.py", "def f(p):\n    return open(p)", 2, "the core opens no files"),
    ("mixer/core/plan.py", "from mixer.data import shards", 1, "may not import mixer.data.shards of floor 1"),
    ("mixer/core/plan.py", "from ..data import shards", 1, "may not import mixer.data.shards of floor 1"),
    ("mixer/core/plan.py", "from mixer import config", 1, "may not import mixer.config of floor 4"),
    (
        "mixer/core/plan.py",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from mixer.control.rundir import RunDir",
        3,
        "may not import mixer.control.rundir.RunDir of floor 3",
    ),
    (
        "mixer/core/policies/x.py",
        "import mixer.training.loop",
        1,
        "may not import mixer.training.loop of floor 2",
    ),
    ("mixer/data/reader.py", "from torch.utils.data import IterableDataset", 1, "floor 1 may not use torch"),
    ("mixer/data/reader.py", "import ray\nray.train.report({})", 2, "floor 1 may not use ray.train"),
    ("mixer/data/reader.py", "import ray\n\n@ray.remote\nclass A: ...", 4, "floor 1 has no actors"),
    (
        "mixer/data/reader.py",
        "import ray\n\n@ray.remote(num_cpus=1)\nclass A: ...",
        4,
        "floor 1 has no actors",
    ),
    ("mixer/data/reader.py", "import ray\nclass A: ...\nray.remote(A)", 3, "floor 1 has no actors"),
    ("mixer/training/step.py", "import ray\nray.get_actor('x')", 2, "floor 2 has no actors"),
    ("mixer/training/step.py", "import torch.distributed as dist", 1, "torch.distributed belongs to"),
    (
        "mixer/training/step.py",
        "import torch\ntorch.distributed.barrier()",
        2,
        "torch.distributed belongs to",
    ),
    ("mixer/training/step.py", "from torch import distributed", 1, "torch.distributed belongs to"),
    ("mixer/training/checkpoint.py", "import torch.distributed", 1, "torch.distributed belongs to"),
    (
        "mixer/training/loop.py",
        "import torch.distributed.checkpoint as dcp",
        1,
        "torch.distributed.checkpoint belongs to mixer/training/checkpoint.py alone",
    ),
    ("mixer/training/step.py", "import transformers", 1, "transformers belongs to mixer/training/pretrained.py alone"),
    ("mixer/training/step.py", "import mlflow", 1, "mlflow belongs to mixer/control/tracker.py alone"),
    ("mixer/control/actor.py", "import mlflow", 1, "mlflow belongs to mixer/control/tracker.py alone"),
    ("mixer/control/actor.py", "import torch", 1, "floor 3 may not use torch"),
    ("mixer/control/actor.py", "import ray.data", 1, "floor 3 may not use ray.data"),
    ("mixer/control/actor.py", "import ray as r\nr.data.range(3)", 2, "floor 3 may not use ray.data"),
    ("mixer/control/actor.py", "import pyarrow as pa", 1, "floor 3 may not use pyarrow"),
    ("mixer/run.py", "import omegaconf", 1, "omegaconf belongs to mixer/config.py alone"),
    ("jobs/train.py", "from omegaconf import OmegaConf", 1, "omegaconf belongs to mixer/config.py alone"),
    ("jobs/train.py", "from tests.fakes import Feed", 1, "nothing outside tests/ imports tests"),
    ("mixer/utils.py", "", 1, "mixer.utils lies on no floor"),
]


@pytest.mark.parametrize(("file", "text", "line", "rule"), PLANTED)
def test_a_planted_breach_is_found_with_file_line_and_rule(file, text, line, rule):
    found = broken_rules({file: text})
    assert len(found) == 1
    assert found[0].startswith(f"{file}:{line}: ")
    assert rule in found[0]


def test_a_circle_is_found_also_through_functions_and_three_modules():
    found = broken_rules({
        "mixer/core/a.py": "from mixer.core import b",
        "mixer/core/b.py": "import math\ndef f():\n    from mixer.core.c import x",
        "mixer/core/c.py": "import mixer.core.a",
        "mixer/core/d.py": "from mixer.core.a import y",
    })  # fmt: skip
    assert found == [
        "mixer/core/a.py:1: mixer.core.a and mixer.core.b import each other in a circle",
        "mixer/core/b.py:3: mixer.core.b and mixer.core.c import each other in a circle",
        "mixer/core/c.py:1: mixer.core.c and mixer.core.a import each other in a circle",
    ]


def test_what_is_allowed_is_not_found():
    assert not broken_rules({
        "mixer/__init__.py": '"""What it is."""',
        "mixer/core/a.py": "import math\nimport numpy as np\nfrom mixer.core.b import B",
        "mixer/core/b.py": (
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from mixer.core.a import A\nB = 1"
        ),
        "mixer/data/a.py": "import os\nimport ray\nimport ray.data\nimport pyarrow.fs as pafs\n"
        "from mixer.core import a\n@ray.remote\ndef task(): ...\n",
        "mixer/training/loop.py": "import torch\nimport torch.distributed as dist\nfrom ray import train\n"
        "from mixer.data import a",
        "mixer/training/step.py": "import torch\ntorch.nn.Linear(1, 1)",
        "mixer/training/checkpoint.py": "from torch.distributed.checkpoint.state_dict import get_state_dict",
        "mixer/control/tracker.py": "import mlflow\nimport pyarrow.fs\nimport time",
        "mixer/control/actor.py": "import ray\n@ray.remote\nclass A: ...\nfrom mixer.training import step",
        "mixer/config.py": "import yaml\nfrom omegaconf import OmegaConf",
        "jobs/train.py": "import torch\nimport ray.data\nfrom mixer import config",
    })  # fmt: skip


def test_the_core_starts_at_once():
    """A fresh interpreter that imports every module of the core loads none of the heavy packages."""
    core = [module_of(file) for file in sources() if file.startswith("mixer/core/")]
    assert "mixer.core.catalog" in core
    code = (
        f"import importlib, sys\nfor name in {core!r}: importlib.import_module(name)\n"
        "print(*sorted({'ray', 'torch', 'mlflow', 'pyarrow', 'omegaconf', 'tokenizers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    assert not done.stdout.split(), f"importing mixer.core loads {done.stdout}"
