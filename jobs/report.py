"""Write a run's report: one page with pictures and tables, and the pictures as files."""

import argparse
import sys
from pathlib import Path

from mixer import cli
from mixer.config import load
from mixer.control.report import write_report
from mixer.core.errors import MixerError
from mixer.run import RunConfig, open_rows


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="mixer report", description=__doc__)
    top.add_argument("run", help="a run's folder, going on or finished; or a schedule.jsonl alone")
    top.add_argument("--out", help="where to write; by default the folder `report` in the run's")
    return top


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    files = write_report(Path(args.run), Path(args.out) if args.out else None, corpus=fingerprint(Path(args.run)))
    print(f"{files[0]} and {len(files) - 1} pictures beside it")
    return 0


def fingerprint(run: Path) -> str | None:
    """Of the corpus that the run's config names, where it can be read."""
    try:
        return open_rows(load(RunConfig, [run / "run.yaml"])).corpus.fingerprint if run.is_dir() else None
    except (MixerError, OSError):
        return None  # the report says what the run's own files say


if __name__ == "__main__":
    raise SystemExit(cli.main(["report", *sys.argv[1:]]))
