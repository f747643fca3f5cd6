"""Go on from a checkpoint of another run, under another policy, catalog or option; or just the same.

The new run has the rows of the old one up to the checkpoint. Where nothing that decides is changed it is a plain
branch and decides as the old run did; else its policy starts anew from the mixture in force there.
"""

import argparse
import sys
from pathlib import Path

from jobs.train import to_the_end
from mixer import cli
from mixer.branch import make_fork
from mixer.config import policy_file


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="mixer fork", description=__doc__)
    top.add_argument("run", type=Path, help="the folder of the run")
    top.add_argument("overrides", nargs="*", metavar="key=value", help="options that the new run has otherwise")
    top.add_argument("--at-step", type=int, required=True, help="its newest checkpoint at or before this step is taken")
    top.add_argument("--to", type=Path, help="the folder of the new run; else RUN-at-N beside the run's")
    top.add_argument("--policy", help="the kind of another policy, or a YAML file with a section `policy`")
    top.add_argument("--catalog", type=Path, help="a catalog file; for another corpus set corpus.path")
    top.add_argument("--no-train", action="store_true", help="only make the folder; `mixer train` takes its run.yaml")
    return top


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_intermixed_args(argv)
    run = args.run.absolute()
    to = args.to or run.parent / f"{run.name}-at-{args.at_step}"
    policy = policy_file(args.policy) if args.policy else None
    made = make_fork(args.run, to, args.at_step, policy=policy, catalog=args.catalog, overrides=args.overrides)
    print(made.text, flush=True)
    if args.no_train:
        print(f"the run is in {made.config.run.folder}; `mixer train {to / 'run.yaml'}` goes on with it")
        return 0
    return to_the_end(made.config, made.rows)


if __name__ == "__main__":
    raise SystemExit(cli.main(["fork", *sys.argv[1:]]))
