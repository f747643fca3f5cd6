"""Bind weights to a window of a live run; domains that are not named share the rest as before."""

import argparse
import getpass
import sys
from pathlib import Path

from mixer import cli
from mixer.core.errors import ConfigError
from mixer.launch import order


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="mixer set", description=__doc__)
    top.add_argument("run", type=Path, help="the run's folder")
    top.add_argument("weights", nargs="+", metavar="domain=weight", help="shares of the rows, as code=0.4")
    top.add_argument("--why", default=f"by {getpass.getuser()}", help="kept in the schedule")
    top.add_argument("--window", type=int, help="one that nobody has decided; by default the next")
    top.add_argument("--hold", action="store_true", help="keep them: pause the policy behind that window")
    top.add_argument("--address", help="of the run's Ray; by default what the run folder says")
    return top


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    weights = dict(map(_weight, args.weights))
    window = order(args.run, args.address, "set_weights", weights, args.why, args.window, args.hold)
    print(f"ordered for window {window}" + ("; the policy is paused behind it" if args.hold else ""))
    print(f"guard rails may move it; once decided: mixer show schedule {args.run} --windows {window}")
    return 0


def _weight(text: str) -> tuple[str, float]:
    name, _, value = text.rpartition("=")
    try:
        return name, float(value)
    except ValueError as error:
        raise ConfigError(f"{text!r} is no weight; needed domain=number, as code=0.4.") from error


if __name__ == "__main__":
    raise SystemExit(cli.main(["set", *sys.argv[1:]]))
