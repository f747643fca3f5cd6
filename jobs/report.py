"""Write a run's report: one page with pictures and tables, and the pictures as files."""

import argparse
import sys
from pathlib import Path

from mixer import cli
from mixer.control.report import write_report


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="mixer report", description=__doc__)
    top.add_argument("run", help="a run's folder, going on or finished; or a schedule.jsonl alone")
    top.add_argument("--out", help="where to write; by default the folder `report` in the run's")
    return top


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    files = write_report(Path(args.run), Path(args.out) if args.out else None)
    print(f"{files[0]} and {len(files) - 1} pictures beside it")
    return 0


if __name__ == "__main__":
    raise SystemExit(cli.main(["report", *sys.argv[1:]]))
