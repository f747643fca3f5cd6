"""Watch a run: progress, speed, losses and weights, drawn in place until it ends."""

import argparse
import os
import shutil
import signal
import sys
import time
from types import FrameType
from typing import TextIO

from mixer import cli
from mixer.control import view
from mixer.control.record import Follower

PIPED_WIDTH = 100
ENTER = "\x1b[?1049h\x1b[?25l"  # another screen, no cursor
LEAVE = "\x1b[?25h\x1b[?1049l"


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="mixer watch", description=__doc__)
    top.add_argument("run", help="a run's folder")
    top.add_argument("--once", action="store_true", help="draw once and end, as it does when piped")
    top.add_argument("--every", type=float, default=1.0, metavar="S", help="seconds between two looks (default 1)")
    return top


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    follower = Follower(args.run)
    if args.once or not sys.stdout.isatty():
        width = shutil.get_terminal_size((PIPED_WIDTH, 0)).columns if sys.stdout.isatty() else PIPED_WIDTH
        sys.stdout.write(view.text(follower.look(), width, now=time.time()))
        return 0
    follow(follower, sys.stdout, max(args.every, 0.05))
    return 0


def follow(follower: Follower, out: TextIO, every_s: float) -> None:
    """Draw in place until the run has ended or somebody has seen enough; what was last seen stays behind."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    follower.look()  # what is no run is refused before the screen is touched
    seen = ""
    before = signal.signal(signal.SIGTERM, stop)
    try:
        out.write(ENTER)
        while True:
            record = follower.look()
            size = os.get_terminal_size(out.fileno())
            seen = view.text(record, size.columns, now=time.time(), height=size.lines)
            lines = seen.splitlines()[: size.lines]
            out.write("\x1b[H" + "\n".join(f"{line}\x1b[K" for line in lines) + "\x1b[J")
            out.flush()
            if record.end is not None:
                break
            time.sleep(every_s)
    except KeyboardInterrupt:
        pass
    finally:
        signal.signal(signal.SIGTERM, before)
        out.write(LEAVE + seen)
        out.flush()


if __name__ == "__main__":
    raise SystemExit(cli.main(["watch", *sys.argv[1:]]))
