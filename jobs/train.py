"""Train a model under a mixture that a policy moves; go on exactly where a run stands when its folder exists."""

import argparse
import sys
import time
from typing import Any

from jobs import prepare
from mixer import cli
from mixer.config import load
from mixer.control.description import redacted
from mixer.data.corpus import CatalogRows
from mixer.launch import Finish, Status, fit
from mixer.run import RunConfig, open_rows

LINE_S = 10.0  # between lines where no terminal shows them in place
SHOWN = 4  # domains


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="mixer train", description=__doc__)
    top.add_argument("config", nargs="+", help="YAML files, then key=value overrides, as train.windows=64")
    top.add_argument(
        "--prepare", action="store_true", help="first make the corpora of section `prepare`, or complete them"
    )
    top.add_argument(
        "--takeover",
        action="store_true",
        help="go on with a run whose owner is on a machine that nobody can reach any more, and still holds the "
        "run's lock on a shared file system; if it wakes up, it writes nothing more. An owner on this machine is never "
        "replaced: stop it",
    )
    return top


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_intermixed_args(argv)
    if args.prepare:
        prepare.main(args.config)
    files = [one for one in args.config if "=" not in one]
    config = load(RunConfig, files, [one for one in args.config if "=" in one])
    return to_the_end(config, open_rows(config), takeover=args.takeover)


def to_the_end(config: RunConfig, rows: CatalogRows, *, takeover: bool = False) -> int:
    """Train, and tell of it; the exit status."""
    lines = Lines()
    print(f"run {config.run.folder}", flush=True)
    try:
        finish = fit(config, rows, on_status=lines, say=lines.say, takeover=takeover)
    finally:
        lines.close()
    print(closing(config, finish))
    return 3 if finish.ending == "bad_loss" else 0


class Lines:
    """One line of progress, in place on a terminal, else from time to time."""

    def __init__(self) -> None:
        self._is_terminal = sys.stderr.isatty()
        self._printed_s, self._window, self._begin_s = 0.0, -1, time.monotonic()
        self._weights: dict[str, float] = {}

    def __call__(self, status: Status) -> None:
        last = status["last"].get("window")
        if last is None or last["window"] == self._window:
            return
        now_s = time.monotonic()
        done, planned = last["window"] + 1, status["planned_windows"]
        line = text(last, done, planned, status["weights"], self._weights)
        self._weights = self._weights or status["weights"]
        if self._is_terminal:
            print(f"\r\x1b[K{line}", end="", file=sys.stderr, flush=True)
        elif now_s - self._printed_s >= LINE_S or done == planned:
            print(line, file=sys.stderr, flush=True)
            self._printed_s = now_s
        self._window = last["window"]

    def say(self, text: str) -> None:
        print(f"\n{text}" if self._is_terminal and self._window >= 0 else text, file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._is_terminal and self._window >= 0:
            print(file=sys.stderr, flush=True)


def text(last: dict[str, Any], done: int, planned: int, weights: dict[str, float], first: dict[str, float]) -> str:
    """How far the run is, and the weights that are farthest from those it began with."""
    loss = "no loss" if last["loss"] is None else f"loss {last['loss']:.3f}"
    moved = sorted(weights, key=lambda name: -abs(weights[name] - first.get(name, weights[name])))[:SHOWN]
    shown = ", ".join(f"{name} {weights[name]:.3f}" for name in sorted(moved))
    left_s = (planned - done) * last["seconds"]
    return (
        f"window {done} of {planned}  {loss}  {last['tokens_per_s'] / 1e3:.1f} k tokens/s  {shown}  {left_s:.0f} s left"
    )


def closing(config: RunConfig, finish: Finish) -> str:
    last = finish.status["last"].get("window") or {}
    lines = [f"{finish.ending} after {last.get('steps', 0)} steps, {last.get('tokens', 0) / 1e6:.2f} M tokens"]
    evaluation = finish.status["last"].get("evaluation")
    if evaluation:
        for name, one in evaluation["sets"].items():
            loss = "-" if one.get("loss") is None else f"{one['loss']:.4f}"
            bits = one.get("bits_per_byte")
            lines.append(f"  {name:<32} loss {loss}" + ("" if bits is None else f"  {bits:.4f} bits per byte"))
    if (config.run.folder / "report" / "report.html").exists():
        lines.append(f"look at it: {config.run.folder / 'report' / 'report.html'}")
    if config.tracker.kind == "mlflow":
        store = config.tracker.uri or f"sqlite:///{config.run.folder.parent / 'mlflow.db'}"
        shown = f"--backend-store-uri {redacted(store)}" if "://" in store and not store.startswith("http") else ""
        lines.append(f"in MLflow: mlflow ui {shown}" if shown else f"in MLflow: {redacted(store)}")
    if finish.behind:
        lines.append(f"the tracker is {finish.behind} records behind; the next start of this run sends them")
    if finish.ending == "stopped":
        lines.append("the same command goes on from here")
    elif finish.ending == "bad_loss":
        lines.append("a step had no finite loss, and step.bad_loss is stop; journal.jsonl of the run names the rows")
    lines.append(f"the run is in {config.run.folder}")
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(cli.main(["train", *sys.argv[1:]]))
