"""Train many small runs on different mixtures, and fit a mixture for the large run to what came of them.

  mixer swarm CONFIG [key=value ...]              train the proxies, or those that are missing
  mixer swarm CONFIG --fit regmix --out mix.yaml  fit the table they left; then: mixer train CONFIG mix.yaml
  mixer swarm --show runs/swarm/swarm.parquet     print a table

What a proxy is stands in the section `swarm` of the configuration. For a smaller model and 64 proxies, two at a time
on each GPU:

  mixer swarm configs/demo.yaml run.path=runs/swarm swarm.runs=64 swarm.gpus_per_run=0.5 \\
    swarm.overrides.model.dim=48 swarm.overrides.model.num_heads=2 swarm.overrides.train.windows=16

Ctrl-C saves what is being trained; the same command goes on with what is missing, whatever was killed.

DoReMi and DoGE train one proxy under a policy of their own; the mean of its mixtures is what they propose:

  mixer train CONFIG configs/policy/doremi.yaml run.path=runs/doremi
  mixer swarm runs/doremi/run.yaml --fit doremi --out mix.yaml
"""

import argparse
import shutil
import sys
import time
from pathlib import Path

from mixer import cli
from mixer.config import load, save, to_text
from mixer.control.tables import table
from mixer.core.errors import ConfigError
from mixer.launch import ray_for
from mixer.proxies.fitting import methods, policy_of, proposal_lines, propose, setting_of
from mixer.proxies.swarm import Finish, Progress, options_of, run_swarm
from mixer.proxies.table import RunTable, read_table
from mixer.proxies.tasks import RayTasks
from mixer.run import RunConfig, open_rows

LINE_S = 10.0  # between lines where no terminal shows them in place
SHOWN = 6  # domains of a table
WIDE = 120


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="mixer swarm", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    top.add_argument("config", nargs="*", help="YAML files, then key=value overrides, as swarm.runs=64")
    top.add_argument("--fit", metavar="METHOD", help="fit and print a mixture instead of training: regmix, olmix, ...")
    top.add_argument("--table", type=Path, help="what --fit reads: a table, or a run's folder (doremi, doge); "
                     "else that of run.path")  # fmt: skip
    top.add_argument("--out", type=Path, help="where --fit writes a section `policy` for mixer train")
    top.add_argument("--show", type=Path, metavar="TABLE", help="print a swarm's table")
    return top


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_intermixed_args(argv)
    if args.show is not None:
        print("\n".join(table_lines(read_table(args.show), shutil.get_terminal_size((WIDE, 0)).columns)))
        return 0
    if not args.config:
        raise ConfigError("no configuration was named. Name one, as in mixer swarm CONFIG, or a table with --show.")
    if args.fit is None and (args.out or args.table):
        raise ConfigError(f"--out and --table belong to --fit. Name a method with it: {', '.join(methods())}.")
    files = [one for one in args.config if "=" not in one]
    config = load(RunConfig, files, [one for one in args.config if "=" in one])
    return fit(config, args.fit, args.table, args.out) if args.fit else train(config)


# ---- training ------------------------------------------------------------------------------------------------


def train(config: RunConfig) -> int:
    rows, options, line = open_rows(config), options_of(config), Line()
    print(f"swarm {config.run.folder}", flush=True)
    with ray_for(config.run):
        try:
            finish = run_swarm(config, rows, RayTasks(options), on_progress=line)
        finally:
            line.close()
    print(closing(finish))
    return 0


class Line:
    """How far the swarm is, in place on a terminal, else from time to time."""

    def __init__(self) -> None:
        self._is_terminal = sys.stderr.isatty()
        self._printed_s, self._began_s, self._before = -LINE_S, time.monotonic(), 0
        self._any = False

    def __call__(self, progress: Progress) -> None:
        now_s = time.monotonic()
        if not self._any:
            self._any, self._before = True, progress.finished
        text = progress_text(progress, progress.finished - self._before, now_s - self._began_s)
        if self._is_terminal:
            print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)
        elif now_s - self._printed_s >= LINE_S or progress.finished + progress.failed == progress.runs:
            print(text, file=sys.stderr, flush=True)
            self._printed_s = now_s

    def close(self) -> None:
        if self._is_terminal and self._any:
            print(file=sys.stderr, flush=True)


def progress_text(progress: Progress, new: int, seconds: float) -> str:
    text = f"{progress.finished} of {progress.runs} proxies"
    if progress.failed:
        text += f", {progress.failed} failed"
    if progress.last:
        text += f"  {progress.last}"
    left = progress.runs - progress.finished - progress.failed
    return text + (f"  {left * seconds / new:.0f} s left" if new and left else "")


def closing(finish: Finish) -> str:
    progress = finish.progress
    lines = [f"{finish.ending}: {progress.finished} of {progress.runs} proxies"]
    if finish.table is not None:
        lines.append(f"their table is {finish.path}; look at it with mixer swarm --show {finish.path}")
    if finish.ending == "stopped":
        lines.append("the same command goes on from here")
    else:
        lines.append("a mixture for the run: the same command with --fit METHOD --out mixture.yaml")
    return "\n".join(lines)


# ---- what came of it -----------------------------------------------------------------------------------------


def fit(config: RunConfig, method: str, source: Path | None, out: Path | None) -> int:
    catalog = open_rows(config).catalog
    proposal = propose(method, config, catalog, source)
    prior = setting_of(config, catalog).prior.to_dict(catalog)
    print("\n".join(table(["domain", "prior", "weight", "change"], proposal_lines(proposal, prior))))
    for name, loss in proposal.predicted.items():
        rank = proposal.rank_correlation.get(name)
        print(
            f"{name}: predicted {loss:.4f}" + ("" if rank is None else f", rank correlation of unseen runs {rank:.3f}")
        )
    for note in proposal.notes:
        print(note)
    if out is None:
        print(to_text(policy_of(proposal)).rstrip())
        return 0
    save(policy_of(proposal), out)
    print(f"{out} has it as a policy: mixer train CONFIG {out}")
    return 0


def table_lines(found: RunTable, width: int) -> list[str]:
    """Every run at its end, in as many columns as there is room for: targets, domains that vary most, other sets."""
    last = found.at(max(found.points, default=1.0))
    spread_d = last.weights_rd.std(axis=0) if len(last) else last.weights_rd.sum(axis=0)
    varied = [last.domains[place] for place in sorted(range(len(last.domains)), key=lambda place: -spread_d[place])]
    targets = [name for name in last.sets if name.startswith("target/")]
    wanted = [*targets, *varied[:SHOWN], *(name for name in last.sets if name not in targets), *varied[SHOWN:]]
    runs = ["run", *last.run_r]
    columns = [runs, ["tokens", *(f"{tokens:,}" for tokens in last.tokens_r.tolist())]]
    left = width - sum(max(map(len, column)) + 2 for column in columns)
    for name in wanted:
        if name in last.losses:
            column = [name, *(f"{loss:.4f}" for loss in last.losses[name].tolist())]
        else:
            column = [name, *(f"{weight:.3f}" for weight in last.weights_rd[:, last.domains.index(name)].tolist())]
        left -= max(map(len, column)) + 2
        if left < 0 and len(columns) > 2:
            break
        columns.append(column)
    points = ", ".join(f"{point:.3g}" for point in found.points)
    more = f"; {len(columns) - 2} of {len(wanted)} columns fit" if len(columns) - 2 < len(wanted) else ""
    heads, *lines = zip(*columns, strict=True)
    return [f"{len(found.runs)} runs, {found.quantity} at {points} of their tokens{more}", *table(heads, lines)]


if __name__ == "__main__":
    raise SystemExit(cli.main(["swarm", *sys.argv[1:]]))
