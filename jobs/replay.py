"""Train again under a saved schedule, without a controller; go on with that where the folder has begun it.

The rows are those of the schedule's run, exactly, unless another length, batch or corpus is asked for with
--stretch: then every domain has the same share at the same fraction of the run.
"""

import argparse
import sys
from pathlib import Path

from jobs.train import to_the_end
from mixer import cli
from mixer.branch import make_replay
from mixer.config import load
from mixer.run import RunConfig


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="mixer replay", description=__doc__)
    top.add_argument("schedule", type=Path, help="a run's folder, or its schedule.jsonl")
    top.add_argument("config", nargs="+", help="YAML files, then key=value overrides, as run.path=runs/again")
    top.add_argument("--stretch", action="store_true", help="allow another length, batch or corpus")
    return top


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    files = [one for one in args.config if "=" not in one]
    config = load(RunConfig, files, [one for one in args.config if "=" in one])
    made = make_replay(args.schedule, config, stretch=args.stretch)
    print(made.text, flush=True)
    return to_the_end(made.config, made.rows)


if __name__ == "__main__":
    raise SystemExit(cli.main(["replay", *sys.argv[1:]]))
