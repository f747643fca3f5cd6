"""Let the policy of a live run decide again."""

import sys

from jobs.pause_policy import parser
from mixer import cli
from mixer.launch import order


def main(argv: list[str] | None = None) -> int:
    args = parser("resume-policy", __doc__).parse_args(argv)
    window = order(args.run, args.address, "resume_policy", args.why, args.window)
    print(f"the policy decides again from window {window}")
    return 0


if __name__ == "__main__":
    raise SystemExit(cli.main(["resume-policy", *sys.argv[1:]]))
