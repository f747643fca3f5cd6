"""Make corpora of raw text: tokenize, pack into rows, write shards.

Run again after a kill, it completes what is missing; run again after a change, it redoes what that touches.
"""

import argparse
import os
import sys
import time

from mixer import cli
from mixer.config import load
from mixer.control.doorway import cluster_inside
from mixer.core.errors import ConfigError
from mixer.data.prepare import Progress, prepare
from mixer.data.progress import ProgressText, table
from mixer.data.tasks import RayRunner
from mixer.run import RunConfig

SMALL_BYTES = 32_000_000
PLAIN_SECONDS = 10.0  # between two lines where there is no terminal


class Printer:
    """On a terminal one line that changes; else a line now and then, and one at each stage's end."""

    def __init__(self) -> None:
        self._text = ProgressText()
        self._is_terminal = sys.stderr.isatty()
        self._stage = ""
        self._printed_s = 0.0

    def __call__(self, progress: Progress) -> None:
        now_s = time.monotonic()
        line = self._text.line(progress, now_s)
        if self._is_terminal:
            new_line = "\n" if self._stage and progress.stage != self._stage else ""
            print(f"{new_line}\r\x1b[K{line}", end="", file=sys.stderr, flush=True)
        elif progress.done == progress.total or now_s - self._printed_s >= PLAIN_SECONDS:
            print(line, file=sys.stderr, flush=True)
            self._printed_s = now_s
        self._stage = progress.stage

    def close(self) -> None:
        if self._is_terminal and self._stage:
            print(file=sys.stderr, flush=True)


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="mixer prepare", description=__doc__)
    top.add_argument("config", nargs="+", help="YAML files, then key=value overrides")
    top.add_argument(
        "--address", help="of a running Ray cluster; else a job's own, or one that is started on this machine"
    )
    top.add_argument("--cpus", type=int, help="of the Ray started here; all if not given")
    top.add_argument("--object-store-mb", type=int, help="of the Ray started here")
    top.add_argument("--ray", action="store_true", help="use Ray for small inputs, too")
    return top


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    files = [one for one in args.config if "=" not in one]
    options = load(RunConfig, files, [one for one in args.config if "=" in one]).prepare
    if options is None:
        raise ConfigError(f"{', '.join(files)}: no section `prepare`. It says which files become which domains.")
    printer = Printer()
    small_bytes = 0 if args.ray or args.cpus or args.address else SMALL_BYTES
    address = args.address or cluster_inside(os.environ)
    with RayRunner(
        address=address, num_cpus=args.cpus, memory_mb=args.object_store_mb, small_bytes=small_bytes
    ) as runner:
        try:
            summary = prepare(options, runner, printer)
        except KeyboardInterrupt:
            printer.close()
            print("stopped; run the same command again, and what is done will be kept", file=sys.stderr)
            raise
        printer.close()
    print(table(summary))
    return 0


if __name__ == "__main__":
    raise SystemExit(cli.main(["prepare", *sys.argv[1:]]))
