"""Let the policy of a live run decide again."""

import argparse
import getpass
import sys
from pathlib import Path

from mixer import cli
from mixer.launch import live


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="mixer resume-policy", description=__doc__)
    top.add_argument("run", type=Path, help="the run's folder")
    top.add_argument("--why", default=f"by {getpass.getuser()}", help="kept in the schedule")
    top.add_argument("--window", type=int, help="one that nobody has decided; by default the next")
    top.add_argument("--address", help="of the run's Ray; by default what the run folder says")
    return top


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    with live(args.run.absolute(), args.address) as run:
        window = run.call("resume_policy", args.why, args.window)
    print(f"the policy decides again from window {window}")
    return 0


if __name__ == "__main__":
    raise SystemExit(cli.main(["resume-policy", *sys.argv[1:]]))
