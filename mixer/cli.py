"""`mixer <verb> ...`: one thin front for the files of `jobs/`.

Listing the verbs reads the first docstring line of each file from its syntax tree, so that help comes at
once; only the verb that was asked for is imported.
"""

import ast
import difflib
import importlib
import os
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import jobs
from mixer.core.errors import MixerError

HELP = ("-h", "--help", "help")


def verbs() -> dict[str, Path]:
    """The verbs and the files they stand for, by name."""
    files = sorted(file for folder in jobs.__path__ for file in Path(folder).glob("*.py"))
    return {file.stem.replace("_", "-"): file for file in files if not file.stem.startswith("_")}


def summary(file: Path) -> str:
    """The first line of a file's docstring; empty if it has none."""
    try:
        text = ast.get_docstring(ast.parse(file.read_bytes()))
    except SyntaxError as error:
        return f"(broken: {error})"
    return text.splitlines()[0] if text else ""


def usage() -> str:
    found = verbs()
    width = max((len(verb) for verb in found), default=0)
    lines = ["usage: mixer <verb> ...", "       mixer <verb> --help", "       mixer --version", ""]
    lines += [f"  {verb:<{width}}  {summary(file)}" for verb, file in found.items()]
    return "\n".join(lines)


def version() -> str:
    try:
        return metadata.version("mixer")
    except metadata.PackageNotFoundError:
        return "unknown (this copy is not installed)"


def main(argv: list[str] | None = None) -> int:
    """Run one verb. 0: done; 2: refused, with one line on stderr; 130: interrupted."""
    args = sys.argv[1:] if argv is None else argv
    if not args or args[0] in HELP:
        sys.stdout.write(usage() + "\n")
        return 0 if args else 2
    if args[0] == "--version":
        sys.stdout.write(f"mixer {version()}\n")
        return 0
    try:
        return _job(args[0])(args[1:])
    except MixerError as error:
        # Ray hands on an error of a task as a child of its class whose text is the whole trace.
        origin = getattr(error, "cause", error)
        text = str(origin if isinstance(origin, MixerError) else error)
        sys.stderr.write(f"mixer: {' '.join(text.split())}\n")
        return 2
    except BrokenPipeError:  # who read the output has enough of it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        sys.stderr.write("mixer: interrupted\n")
        return 130


def _job(verb: str) -> Callable[[list[str]], int]:
    found = verbs()
    if verb not in found:
        near = difflib.get_close_matches(verb, found, n=1)
        hint = f"Did you mean {near[0]!r}?" if near else "`mixer --help` lists them."
        raise MixerError(f"{verb!r} is not a verb of mixer; there are {', '.join(found) or 'none'}. {hint}")
    return importlib.import_module(f"jobs.{found[verb].stem}").main


if __name__ == "__main__":
    raise SystemExit(main())
