"""Run a verb as a job on a Ray cluster: `mixer submit train configs/x.yaml run.path=/shared/runs/x`.

The verb and its words come as they would after `mixer`; our own options may stand anywhere before a `--`.
The job's log is followed to its end, and its success is the exit status; Ctrl-C leaves the job running.

mixer submit train configs/x.yaml run.path=/shared/runs/x --address http://127.0.0.1:8265
mixer submit --list | --follow ID | --stop ID

A cluster with token authentication wants its token in RAY_AUTH_TOKEN, in the file that RAY_AUTH_TOKEN_PATH names, or
in ~/.ray/auth_token; RAY_AUTH_MODE=token says that it is always sent. It is sent to the address and shown to nobody.
"""

import argparse
import os
import sys
from pathlib import Path

import mixer
from mixer import cli
from mixer.config import load
from mixer.control.doorway import enter, job_server
from mixer.control.parcel import LIMIT_BYTES, is_config, pack, project_of, refuse_relative
from mixer.control.submit import Jobs, Order, checked_env, checked_name, command, hints
from mixer.core.errors import ConfigError
from mixer.run import RunConfig

RUNS = ("train", "replay", "swarm")  # verbs that keep a run


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="mixer submit",
        usage="mixer submit VERB ARGS... [options]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    top.add_argument("--address", metavar="URL", help="http://HOST:8265, the cluster's job server; else RAY_ADDRESS")
    top.add_argument("--no-wait", action="store_true", help="print the job's id and leave")
    top.add_argument("--name", metavar="ID", help="of the job; else made from the verb and the time")
    top.add_argument("--env", metavar="K=V", action="append", default=[], help="a variable of the job; repeatable")
    top.add_argument("--python", default="python", metavar="PATH", help="on the cluster (%(default)s)")
    top.add_argument("--working-dir", metavar="DIR", help="the project whose code is sent; else this folder's")
    top.add_argument("--include", metavar="PATH", action="append", default=[], help="send this too; repeatable")
    top.add_argument("--limit-mb", type=float, default=LIMIT_BYTES / 1e6, help="of what is sent (%(default)g)")
    top.add_argument("--no-code", action="store_true", help="the cluster has mixer installed: send named files only")
    jobs = top.add_mutually_exclusive_group()
    jobs.add_argument("--follow", metavar="ID", help="show the log of a job to its end")
    jobs.add_argument("--stop", metavar="ID", help="ask a job to end")
    jobs.add_argument("--list", action="store_true", help="the jobs of the cluster")
    return top


def main(argv: list[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    ours, theirs = (words, []) if "--" not in words else (words[: words.index("--")], words[words.index("--") + 1 :])
    args, rest = parser().parse_known_args(ours)
    rest += theirs
    is_about_a_job = bool(args.follow or args.stop or args.list)
    if is_about_a_job == bool(rest):
        raise ConfigError(
            "needed is one of: a verb and its words, --follow ID, --stop ID, --list; "
            f"found {' '.join(rest) or 'none'}. As in `mixer submit train configs/x.yaml`."
        )
    order = None if is_about_a_job else order_of(args, rest[0], rest[1:])
    doorway = enter(job_server(args.address, os.environ), os.environ)
    jobs = Jobs(doorway, say)
    if args.list:
        return print_jobs(jobs)
    if args.stop:
        return jobs.stop(args.stop)
    if order is None:
        return jobs.follow(args.follow, write)
    job_id = jobs.submit(order)
    if args.no_wait:
        print(job_id)
        say(hints(job_id))
        return 0
    return jobs.follow(job_id, write)


def order_of(args: argparse.Namespace, verb: str, words: list[str]) -> Order:
    """Everything that can be refused without asking the cluster is refused here."""
    found = [name for name in cli.verbs() if name != "submit"]
    if verb not in found:
        raise ConfigError(
            f"{verb!r} is not a verb that can be submitted; there are {', '.join(found)}. {command(found[0])}"
        )
    here = Path.cwd()
    project = Path(args.working_dir).resolve() if args.working_dir else project_of(here, Path(mixer.__file__).parent)
    parcel = pack(
        words,
        here=here,
        project=None if args.no_code else project,
        include=args.include,
        limit_bytes=int(args.limit_mb * 1e6),
    )
    refuse_relative(places_of(verb, words))
    env, notes = checked_env(args.env)
    for note in notes:
        say(f"note: {note}")
    return Order(verb=verb, name=checked_name(args.name, verb), python=args.python, parcel=parcel, env=env)


def places_of(verb: str, words: list[str]) -> dict[str, str]:
    """Where a job's configuration says that data lie, by option; nothing for a verb without configurations."""
    files = [word for word in words if is_config(word) and Path(word).is_file()]
    if not files:
        return {}
    config = load(RunConfig, files, [word for word in words if "=" in word and not word.startswith("-")])
    places = {"prepare.output": config.prepare.output if config.prepare else "", "corpus.path": config.corpus.path}
    return places | ({"run.path": config.run.path} if verb in RUNS else {})


def print_jobs(jobs: Jobs) -> int:
    rows = [("job", "status", "begun (UTC)", "command"), *jobs.rows()]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    for row in rows:
        print("  ".join(f"{text:{width}}" for text, width in zip(row, widths, strict=False)), f" {row[3]}")
    return 0


def say(text: str) -> None:
    print(f"mixer: {text}", file=sys.stderr, flush=True)


def write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


if __name__ == "__main__":
    raise SystemExit(cli.main(["submit", *sys.argv[1:]]))
