"""The demo's texts: made from what every Python installation has, so they need no network.

    code            functions and classes of the standard library's sources
    docstrings      the docstrings of other modules of it
    documentation   Python's own reference topics (pydoc_data.topics)
    arithmetic      word problems with worked answers
    tables          small CSV tables with a total line
    brackets        balanced sequences of three kinds of brackets
    shuffled        documentation with the characters of each line shuffled: the right letters, no words
    repeated        one text over and over: nothing to learn after the first time

and three targets that share no document with them: `arithmetic_new` (other numbers),
`documentation_new` (other topics), `code_new` (other modules). The last two domains are bad on
purpose: a good mixture gives them little. The texts are the same for one version of Python.
"""

import ast
import hashlib
import json
import os
import random
import sys
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from pydoc_data.topics import topics

import pyarrow.fs as pafs

from mixer.core.errors import DataError
from mixer.data.storage import put

VERSION = 1
STAMP = "demo.json"
DOMAIN_BYTES = 600_000
TARGET_BYTES = 60_000
MIN_CHARS, MAX_CHARS = 80, 6_000
HELD_OUT = 8  # one of so many modules, topics and problems is for the targets
PACKAGES = (
    "",
    "asyncio",
    "collections",
    "concurrent/futures",
    "email",
    "html",
    "http",
    "importlib",
    "json",
    "logging",
    "multiprocessing",
    "unittest",
    "urllib",
    "wsgiref",
    "xml/dom",
    "xml/etree",
    "xml/sax",
)
NAMES = ("Ada", "Ben", "Chen", "Dana", "Emil", "Fatima", "Goran", "Hana", "Ivo", "Jun", "Kofi", "Lena")
THINGS = (
    "apples",
    "books",
    "coins",
    "eggs",
    "keys",
    "lamps",
    "marbles",
    "nails",
    "pens",
    "ropes",
    "stamps",
    "tiles",
)
CITIES = (
    "Accra",
    "Bergen",
    "Cusco",
    "Dakar",
    "Essen",
    "Fukuoka",
    "Graz",
    "Hobart",
    "Izmir",
    "Jaipur",
    "Kyiv",
)


def make(folder: str) -> None:
    """Write the texts as JSON lines: <folder>/domains/<name>.jsonl and <folder>/targets/<name>.jsonl.

    Nothing is written when they are there already, so that a preparation can be continued.
    """
    root = Path(folder)
    version = {"version": VERSION, "python": sys.version.split()[0]}
    if _is_made(root, version):
        return
    files: dict[str, int] = {}
    for path, content in texts():
        target = root / path
        _write(target, content)
        files[path] = target.stat().st_size
    _write(root / STAMP, json.dumps({**version, "files": files}, indent=1) + "\n")


def texts() -> Iterator[tuple[str, str]]:
    """All files, as (path within the folder, content)."""
    makers: dict[str, Callable[[bool], Iterator[str]]] = {
        "code": _code,
        "docstrings": _docstrings,
        "documentation": _documentation,
        "arithmetic": _arithmetic,
        "tables": lambda _: _tables(),
        "brackets": lambda _: _brackets(),
        "shuffled": lambda _: _shuffled(),
        "repeated": lambda _: _repeated(),
    }
    seen: set[str] = set()
    for name, maker in makers.items():
        documents = list(_up_to(maker(False), DOMAIN_BYTES))
        seen.update(documents)
        yield f"domains/{name}.jsonl", _as_lines(documents)
    for name in ("arithmetic", "documentation", "code"):
        new = (text for text in makers[name](True) if text not in seen)
        yield f"targets/{name}_new.jsonl", _as_lines(_up_to(new, TARGET_BYTES))


def _is_made(root: Path, version: dict[str, object]) -> bool:
    try:
        stamp = json.loads((root / STAMP).read_text())
        if not version.items() <= stamp.items():
            return False
        return all((root / path).stat().st_size == size for path, size in stamp["files"].items())
    except (OSError, ValueError, KeyError, AttributeError):
        return False


def _write(path: Path, content: str) -> None:
    put(pafs.LocalFileSystem(), os.fspath(path.parent.absolute()), path.name, content.encode())


def _up_to(documents: Iterator[str], num_bytes: int) -> Iterator[str]:
    for text in documents:
        if num_bytes <= 0:
            return
        num_bytes -= len(text.encode())
        yield text


def _as_lines(documents: "Iterator[str] | list[str]") -> str:
    return "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in documents)


def _is_held_out(name: str) -> bool:
    return hashlib.sha256(name.encode()).digest()[0] % HELD_OUT == 0


def _modules() -> Iterator[tuple[str, str, ast.Module]]:
    """(name, source, syntax tree) of the standard library's modules, in a fixed mixed order."""
    library = Path(sysconfig.get_paths()["stdlib"])
    paths = [path for package in PACKAGES for path in library.joinpath(package).glob("*.py")]
    if not paths:
        raise DataError(f"no standard library sources in {library}. The demo needs a Python that has them.")
    names = {path.relative_to(library).as_posix(): path for path in paths}
    for name in sorted(names, key=lambda one: hashlib.sha256(one.encode()).digest()):
        if name.startswith("_sysconfigdata"):  # differs from machine to machine
            continue
        try:
            source = names[name].read_text(encoding="utf-8")
            yield name, source, ast.parse(source)
        except (UnicodeDecodeError, SyntaxError):
            continue


def _gives_docstrings(name: str) -> bool:
    """Each module gives its code or its docstrings, so that no text is in both domains."""
    return hashlib.sha256(name.encode()).digest()[1] % 2 == 0


def _code(held_out: bool) -> Iterator[str]:
    for name, source, tree in _modules():
        if _gives_docstrings(name) or _is_held_out(name) != held_out:
            continue
        lines = source.splitlines()
        for node in tree.body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                text = "\n".join(lines[node.lineno - 1 : node.end_lineno])
                if MIN_CHARS <= len(text) <= MAX_CHARS:
                    yield text


def _docstrings(_: bool) -> Iterator[str]:
    for name, _source, tree in _modules():
        if not _gives_docstrings(name):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                text = ast.get_docstring(node) or ""
                if MIN_CHARS <= len(text) <= MAX_CHARS:
                    yield text


def _documentation(held_out: bool) -> Iterator[str]:
    for name in sorted(topics, key=lambda one: hashlib.sha256(one.encode()).digest()):
        if _is_held_out(name) != held_out:
            continue
        block = ""
        for paragraph in topics[name].strip().split("\n\n"):
            if block and len(block) + len(paragraph) > MAX_CHARS // 3:
                yield block
                block = ""
            block = f"{block}\n\n{paragraph}" if block else paragraph
        if len(block) >= MIN_CHARS:
            yield block


def _arithmetic(held_out: bool) -> Iterator[str]:
    draw = random.Random(f"arithmetic {held_out}")
    while True:
        a, b, c = draw.randint(2, 99), draw.randint(2, 99), draw.randint(2, 12)
        if (a * 7 + b * 3 + c) % HELD_OUT == 0:
            if not held_out:
                continue
        elif held_out:
            continue
        who, other = draw.sample(NAMES, 2)
        thing = draw.choice(THINGS)
        kind = draw.randrange(4)
        if kind == 0:
            yield (
                f"Question: {who} has {a} {thing}. {other} gives {who} {b} more. "
                f"How many {thing} does {who} have?\n"
                f"Answer: {a} + {b} = {a + b}. {who} has {a + b} {thing}."
            )
        elif kind == 1:
            big, small = max(a, b), min(a, b)
            yield (
                f"Question: {who} has {big} {thing} and sells {small} of them. "
                f"How many {thing} are left?\n"
                f"Answer: {big} - {small} = {big - small}. There are {big - small} {thing} left."
            )
        elif kind == 2:
            yield (
                f"Question: {other} packs {c} boxes with {a} {thing} each. "
                f"How many {thing} are in the boxes?\n"
                f"Answer: {c} * {a} = {c * a}. There are {c * a} {thing} in the boxes."
            )
        else:
            yield (
                f"Question: {who} buys {c} bags of {a} {thing} and loses {b % a} of them. "
                f"How many {thing} remain?\n"
                f"Answer: {c} * {a} = {c * a}, and {c * a} - {b % a} = {c * a - b % a}. "
                f"{c * a - b % a} {thing} remain."
            )


def _tables() -> Iterator[str]:
    draw = random.Random("tables")
    while True:
        columns = draw.sample(THINGS, 3)
        rows = [[draw.randint(0, 500) for _ in columns] for _ in range(draw.randint(4, 12))]
        lines = [",".join(["city", *columns])]
        lines += [",".join([draw.choice(CITIES), *map(str, row)]) for row in rows]
        lines.append(",".join(["total", *(str(sum(column)) for column in zip(*rows, strict=True))]))
        yield "\n".join(lines)


def _brackets() -> Iterator[str]:
    draw = random.Random("brackets")
    pairs = ("()", "[]", "{}")
    while True:
        text, waiting = "", ""
        length = draw.randint(40, 200)
        while len(text) + len(waiting) < length or waiting:
            may_open = len(text) + len(waiting) < length
            if may_open and (not waiting or draw.random() < 0.55):
                opening, closing = draw.choice(pairs)
                text, waiting = text + opening, waiting + closing
            else:
                text, waiting = text + waiting[-1], waiting[:-1]
        yield text


def _shuffled() -> Iterator[str]:
    draw = random.Random("shuffled")
    for text in _documentation(False):
        lines = [list(line) for line in text.splitlines()]
        for line in lines:
            draw.shuffle(line)
        yield "\n".join("".join(line) for line in lines)


def _repeated() -> Iterator[str]:
    text = "This page uses cookies. By reading on you agree to our terms. Subscribe now and save! " * 6
    while True:
        yield text.strip()
