"""Train the same model under several policies, a few seeds each, and tell which is best for the targets.

  mixer compare CONFIG [key=value ...] --policies natural,grape,tikmix_d regmix=mix.yaml --seeds 3

Policies are kinds, YAML files or LABEL=FILE. All runs have equal training tokens; what probes, and proxies trained
before (--extra regmix=2e8, or `{"cost_tokens": 2e8}` in mix.json beside mix.yaml), took beside them is reckoned.
The verdict goes to the terminal and, with tables, numbers and pictures, to run.path: compare.md, compare.json, *.png.

Runs go in processes of this machine, --local at a time, or as tasks of a Ray that is there (run.address, RAY_ADDRESS)
or asked for (--ray). Ctrl-C saves what is being trained; the same command goes on with what is missing, and takes more
seeds or policies too. The exit status is 1 if runs failed and were left out, 130 if it was stopped.
"""

import argparse
import logging
import os
import sys
import time
from contextlib import ExitStack

from mixer import cli
from mixer.config import load
from mixer.control.doorway import cluster_inside
from mixer.control.wording import span
from mixer.core.errors import ConfigError
from mixer.launch import ray_for
from mixer.proxies.compare import Asked, Comparison, Progress, compare
from mixer.proxies.contenders import contenders_of
from mixer.proxies.findings import check_watch, text_lines, write_findings
from mixer.proxies.lanes import Lanes, Processes, RayTasks
from mixer.run import RunConfig, open_rows

LINE_S = 10.0  # between lines where no terminal shows them in place
SHOWN = 3  # runs that are going on


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="mixer compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    top.add_argument("config", nargs="+", help="YAML files, then key=value overrides")
    top.add_argument("--policies", nargs="+", required=True, metavar="POLICY", help="kinds, YAML files, LABEL=FILE")
    top.add_argument("--seeds", type=int, default=3, metavar="N", help="0 to N - 1; default: 3")
    top.add_argument("--reference", default="natural", metavar="LABEL", help="whom the others are compared with")
    top.add_argument("--extra", nargs="+", default=[], metavar="LABEL=TOKENS", help="computed before, as by proxies")
    top.add_argument("--watch", nargs="+", default=[], metavar="DOMAIN", help="show the weights of these; else of all")
    top.add_argument("--tell", action="store_true", help="train nothing: compare the runs that are finished")
    where = top.add_mutually_exclusive_group()
    where.add_argument("--local", type=int, metavar="N", help="processes of this machine; default: as CPUs allow")
    where.add_argument("--ray", action="store_true", help="as Ray tasks, on a Ray that is started if there is none")
    top.add_argument("--at-once", type=int, metavar="N", help="with Ray: runs at a time; default: as there is room")
    top.add_argument("--cpus", type=float, metavar="N", help="with Ray: of a run; default: train.cpus_per_worker")
    top.add_argument("--gpus", type=float, default=0.0, metavar="N", help="with Ray: of a run, a fraction too")
    return top


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_intermixed_args(argv)
    for name in ("local", "at_once"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise ConfigError(f"--{name.replace('_', '-')} {value}; it must be at least 1.")
    files = [one for one in args.config if "=" not in one]
    overrides = [one for one in args.config if "=" in one]
    if any(one.startswith("policy") for one in overrides):
        raise ConfigError(f"{' '.join(overrides)}: policies come by --policies; for other options, name a YAML file.")
    base = load(RunConfig, files, overrides)
    logging.getLogger("mixer.proxies").setLevel(logging.ERROR)  # failures are told below
    asked = Asked(
        base=base,
        rows=open_rows(base),
        contenders=contenders_of(args.policies, args.extra),
        seeds=args.seeds,
        reference=args.reference,
    )
    check_watch(args.watch, asked.rows.catalog.names)
    print(f"comparison {asked.folder}: {len(asked.contenders)} policies, {asked.seeds} seeds", flush=True)
    with ExitStack() as stack:
        lanes = None if args.tell else lanes_of(args, asked, stack)
        line = stack.enter_context(Line())
        found = compare(asked, lanes, line)
    return tell(asked, found, args.watch)


def lanes_of(args: argparse.Namespace, asked: Asked, stack: ExitStack) -> Lanes:
    train = asked.base.train
    if args.ray or (args.local is None and (asked.base.run.address or cluster_inside(os.environ))):
        stack.enter_context(ray_for(asked.base.run))
        return RayTasks(asked.rows, cpus=args.cpus or train.cpus_per_worker, gpus=args.gpus, at_once=args.at_once)
    threads = train.threads or max(1, int(train.cpus_per_worker))
    return Processes(args.local or max(1, len(os.sched_getaffinity(0)) // threads), asked.folder, threads)


def tell(asked: Asked, found: Comparison, watch: list[str]) -> int:
    if found.ending == "stopped":
        print(f"stopped; the same command goes on from here, and with --tell compares what is finished in "
              f"{asked.folder}")  # fmt: skip
        return 130
    write_findings(asked.folder, found, watch)
    print("\n".join(["", *text_lines(found, watch), "", f"look at it: {asked.folder / 'compare.md'}"]))
    return 1 if found.left_out and not all(why == "not finished" for why in found.left_out.values()) else 0


class Line:
    """How far the comparison is, in place on a terminal, else from time to time."""

    def __init__(self) -> None:
        self._is_terminal = sys.stderr.isatty()
        self._printed_s, self._began_s, self._before, self._last = -LINE_S, time.monotonic(), -1, ""

    def __enter__(self) -> "Line":
        return self

    def __call__(self, progress: Progress) -> None:
        now_s = time.monotonic()
        if self._before < 0:
            self._before, self._began_s = progress.windows, now_s
        text = progress_text(progress, progress.windows - self._before, now_s - self._began_s)
        if self._is_terminal:
            print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)
        elif now_s - self._printed_s >= LINE_S or progress.last != self._last:
            print(text, file=sys.stderr, flush=True)
            self._printed_s = now_s
        self._last = progress.last

    def __exit__(self, *_: object) -> None:
        if self._is_terminal and self._before >= 0:
            print(file=sys.stderr, flush=True)


def progress_text(progress: Progress, new: int, seconds: float) -> str:
    parts = [f"{progress.finished} of {progress.runs} runs"]
    if progress.failed:
        parts[0] += f", {progress.failed} failed"
    going = [f"{name} window {window}" for name, window in list(progress.going.items())[:SHOWN]]
    more = len(progress.going) - len(going)
    parts += [", ".join([*going, *([f"{more} more"] if more else [])])] if going else []
    parts += [progress.last] if progress.last else []
    left = progress.planned - progress.windows
    if new and left > 0:
        parts.append(f"about {span(left * seconds / new)} left")
    return "  ".join(parts)


if __name__ == "__main__":
    raise SystemExit(cli.main(["compare", *sys.argv[1:]]))
