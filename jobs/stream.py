"""Read a corpus as a run would, under a mixture that moves, and compare asked with given."""

import argparse
import sys
import time

import numpy as np

from mixer import cli
from mixer.config import load
from mixer.run import RunConfig, Streamed, moving_schedule, open_rows, stream

SHOWN_DOMAINS = 40


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="mixer stream", description=__doc__)
    top.add_argument("config", nargs="+", help="YAML files, then key=value overrides, as stream.windows=64")
    return top


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    files = [one for one in args.config if "=" not in one]
    config = load(RunConfig, files, [one for one in args.config if "=" in one])
    rows = open_rows(config)
    schedule = moving_schedule(rows.catalog, config.geometry, config.rails, config.stream)
    windows: list[Streamed] = []
    begin = time.perf_counter()
    for window in stream(rows, schedule):
        windows.append(window)
        if sys.stderr.isatty():
            print(f"\r\x1b[Kwindow {window.window + 1} of {len(schedule)}", end="", file=sys.stderr, flush=True)
    seconds = time.perf_counter() - begin
    if sys.stderr.isatty():
        print("\r\x1b[K", end="", file=sys.stderr)
    print_table(rows.catalog.names, rows.catalog.num_rows_d, windows)
    tokens = sum(window.tokens for window in windows)
    slots = config.geometry.window_slots
    print(
        f"{len(windows)} windows of {slots} rows, {tokens / 1e6:.1f} M tokens in {seconds:.2f} s "
        f"({tokens / 1e6 / seconds:.0f} M tokens/s)"
    )
    return 0


def print_table(names: tuple[str, ...], num_rows_d: np.ndarray, windows: list[Streamed]) -> None:
    """Shares at three windows, then rows over the whole run; the last column is what was promised below 1."""
    asked_wd = np.stack([window.asked_d for window in windows])
    given_wd = np.stack([window.given_d for window in windows])
    apart_d = np.abs(np.cumsum(asked_wd - given_wd, axis=0)).max(axis=0)
    marks = sorted({0, len(windows) // 2, len(windows) - 1})
    width = max(len("domain"), *map(len, names))
    head = "".join(f"   window {mark:>4}   " for mark in marks)
    print(f"{'':<{width}}{head}     whole run, rows")
    print(f"{'domain':<{width}}{'   asked   given  ' * len(marks)}      asked    given  passes  apart")
    for d, name in list(enumerate(names))[:SHOWN_DOMAINS]:
        shares = "".join(
            f"  {asked_wd[m, d] / asked_wd[m].sum():6.2%}  {given_wd[m, d] / given_wd[m].sum():6.2%}  " for m in marks
        )
        asked, given = asked_wd[:, d].sum(), int(given_wd[:, d].sum())
        print(f"{name:<{width}}{shares}  {asked:9.1f}{given:9d}{given / num_rows_d[d]:8.2f}{apart_d[d]:7.2f}")
    if len(names) > SHOWN_DOMAINS:
        print(f"and {len(names) - SHOWN_DOMAINS} more domains")
    print(f"the farthest that any domain was from the sum of its shares: {apart_d.max():.2f} rows")


if __name__ == "__main__":
    raise SystemExit(cli.main(["stream", *sys.argv[1:]]))
