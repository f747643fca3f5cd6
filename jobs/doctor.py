"""Check this machine or a cluster, and say what to mend: `mixer doctor [CONFIG ...] [--address ...]`.

With --address http://HOST:8265 the check runs as a job there; without, inside a job and wherever RAY_ADDRESS names a
cluster, every node of it is examined, else this machine. Configurations say which folders, corpus and tracker count.
The exit status is 1 if anything is bad.
"""

import argparse
import json
import os
import sys
from dataclasses import asdict

from jobs import submit
from mixer import cli
from mixer.config import load
from mixer.control.consult import Concern, Place, consult
from mixer.control.doctor import Finding, table
from mixer.data.storage import Storage
from mixer.run import RunConfig


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="mixer doctor", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    top.add_argument("config", nargs="*", help="YAML files, then key=value overrides")
    top.add_argument(
        "--address", help="of a cluster: http://HOST:8265, or HOST:PORT as nodes join by; else RAY_ADDRESS"
    )
    top.add_argument("--json", action="store_true", help="print the findings as JSON")
    return top


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    address = args.address or os.environ.get("RAY_ADDRESS")
    if address and address.startswith(("http://", "https://")):
        words = [*args.config, *(["--json"] if args.json else [])]
        return submit.main(["--address", address, "doctor", "--", *words])
    findings = consult(concern_of(args.config), address=address)
    print_findings(findings, as_json=args.json)
    return 1 if any(finding.level == "bad" for finding in findings) else 0


def concern_of(words: list[str]) -> Concern:
    if not words:
        return Concern()
    files = [word for word in words if "=" not in word]
    config = load(RunConfig, files, [word for word in words if "=" in word])
    made, read = config.prepare, config.corpus
    places = (Place(key="prepare.output", path=made.output, storage=made.storage),) if made else ()
    places += (Place(key="run.path", path=config.run.path, storage=Storage(), locks=True),)
    uri = config.tracker.uri if config.tracker.kind == "mlflow" else None
    return Concern(places=places, corpus=read.path, corpus_storage=read.storage, tracker_uri=uri or "")


def print_findings(findings: list[Finding], *, as_json: bool) -> None:
    if as_json:
        print(json.dumps([asdict(finding) for finding in findings], indent=1))
    else:
        print(table(findings))


if __name__ == "__main__":
    raise SystemExit(cli.main(["doctor", *sys.argv[1:]]))
