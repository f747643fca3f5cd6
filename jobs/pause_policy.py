"""Keep the mixture of a live run as it is; its policy goes on learning."""

import argparse
import getpass
import sys
from pathlib import Path

from mixer import cli
from mixer.launch import order


def parser(verb: str = "pause-policy", doc: str | None = __doc__) -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog=f"mixer {verb}", description=doc)
    top.add_argument("run", type=Path, help="the run's folder")
    top.add_argument("--why", default=f"by {getpass.getuser()}", help="kept in the schedule")
    top.add_argument("--window", type=int, help="one that nobody has decided; by default the next")
    top.add_argument("--address", help="of the run's Ray; by default what the run folder says")
    return top


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    window = order(args.run, args.address, "pause_policy", args.why, args.window)
    print(f"the policy is paused from window {window}")
    return 0


if __name__ == "__main__":
    raise SystemExit(cli.main(["pause-policy", *sys.argv[1:]]))
