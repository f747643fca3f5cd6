"""Every figure of the project, one after another: `make bench`.

Each part is a command of its own and may be run alone; this one runs them all and records what they find.
"""

import argparse
import subprocess
import sys

PARTS = {
    "plan": "what planning a window costs",
    "resume": "first batch after a resume against a fresh one",
    "reader_peers": "the reader beside other systems'",
    "prepare": "preparation beside datasets.map",
    "stream": "the stream through Ray Data",
    "stream_peers": "the stream beside other systems",
    "control": "what control, and a broken MLflow server, cost a training step",
    "first_step": "first step of a resumed run against a fresh one's",
    "checkpoint": "what a checkpoint costs training",
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help=", ".join(PARTS))
    chosen = parser.parse_args().parts or list(PARTS)
    failed = []
    for part in chosen:
        print(f"== {part}: {PARTS[part]}", flush=True)
        words = ["--record"] if part in ("reader_peers", "stream_peers") else []
        if subprocess.run([sys.executable, "-m", f"tests.bench.{part}", *words], check=False).returncode:
            failed.append(part)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
