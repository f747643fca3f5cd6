"""Every command of README.md runs, and every file it names is there.

A line of a ```sh block is a command; a trailing backslash continues it. A ```python block is a program. They
run in a copy of the project's files, one after another, so that later ones find what earlier ones made. `make`
targets are checked to exist: each is a command of its own that is run by hand and by CI. A block that cannot
run here says so before it opens: `<!-- not run: reason -->`; one that needs minutes or Ray,
`<!-- run: slow -->` or `<!-- run: ray -->`.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FENCE = re.compile(r"(?:<!-- *(?P<note>[^>]*?) *-->\n+)?^```(?P<language>\w*)\n(?P<body>.*?)^```$", re.M | re.S)
TARGET = re.compile(r"^(?P<name>[a-z][a-z-]*):", re.M)
LIMIT_S = 600


@dataclass(frozen=True)
class Block:
    line: int
    commands: tuple[str, ...]
    note: str


def blocks_of(text: str) -> list[Block]:
    found: list[Block] = []
    for match in FENCE.finditer(text):
        lines = match["body"].replace("\\\n", " ").splitlines()
        commands = tuple(line.strip() for line in lines if line.strip() and not line.startswith("#"))
        if match["language"] == "python":
            commands = (f"python - <<'END'\n{match['body']}END",)
        if match["language"] in ("sh", "python"):
            found.append(Block(text[: match.start("body")].count("\n") + 1, commands, match["note"] or ""))
    return found


def make_targets() -> set[str]:
    return {match["name"] for match in TARGET.finditer((ROOT / "Makefile").read_text())}


def unknown_targets(command: str, targets: set[str]) -> list[str]:
    words = [word for word in shlex.split(command, comments=True)[1:] if "=" not in word and word[0] != "-"]
    return [word for word in words if word not in targets]


README = (ROOT / "README.md").read_text("utf-8")
BLOCKS = [
    pytest.param(
        block,
        id=f"line{block.line}",
        marks=[getattr(pytest.mark, block.note.removeprefix("run: "))] if block.note.startswith("run: ") else [],
    )
    for block in blocks_of(README)
]


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """A copy of what a clone holds, without what was made in this one."""
    folder = tmp_path_factory.mktemp("readme") / "mixer"
    for name in ("mixer", "jobs", "configs", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "constraints.txt", "Makefile", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, folder / file)
    return folder


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> dict[str, str]:
    """Where `mixer` and `python` are this project and this interpreter."""
    folder = tmp_path_factory.mktemp("bin")
    for name, words in {"mixer": "-m mixer.cli", "python": ""}.items():
        (folder / name).write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {words} "$@"\n')
        (folder / name).chmod(0o755)
    home = str(tmp_path_factory.mktemp("home"))  # where Ray keeps its token
    return os.environ | {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": ".", "HOME": home}


@pytest.mark.parametrize("block", BLOCKS)
def test_every_command_of_the_readme_runs(block: Block, project, environment):
    if block.note.startswith("not run: "):
        pytest.skip(block.note)
    assert not block.note or block.note.startswith("run: "), f"README.md:{block.line}: {block.note!r} is no note"
    for command in block.commands:
        if command.split()[0] == "make":
            missing = unknown_targets(command, make_targets())
            assert not missing, f"README.md:{block.line}: {command!r} names no target of the Makefile: {missing}"
            continue
        done = subprocess.run(
            ["sh", "-ec", command],
            cwd=project, env=environment, capture_output=True, text=True, timeout=LIMIT_S, check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"README.md:{block.line}: {command!r}\n{done.stdout}{done.stderr}"


def test_every_file_that_the_readme_names_is_there():
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", README)
    named = re.findall(r"`((?:mixer|jobs|configs|tests|cluster)/[\w./-]*)`", README)
    missing = [path for path in [*links, *named] if not (ROOT / path).exists()]
    assert not missing


def test_the_commands_of_a_block_are_found_with_its_note():
    first = "```sh\n# why\nmake test\nmixer x \\\n  y=1\n```\n"
    text = f"a\n\n{first}```\nno\n```\n<!-- not run: a cluster -->\n```sh\nray\n```\n```python\nx\n```\n"
    assert blocks_of(text) == [
        Block(4, ("make test", "mixer x    y=1"), ""),
        Block(14, ("ray",), "not run: a cluster"),
        Block(17, ("python - <<'END'\nx\nEND",), ""),
    ]


def test_a_target_that_is_not_in_the_makefile_is_found():
    assert {
        "demo",
        "test",
        "lint",
        "types",
        "bench",
        "properties",
        "slow",
        "figures",
        "lock",
        "clean",
    } <= make_targets()
    assert unknown_targets("make lint tests PYTHON=python3 -j2", make_targets()) == ["tests"]
