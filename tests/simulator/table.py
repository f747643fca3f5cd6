"""The regret table in the policies' README: `python -m tests.simulator.table` writes it anew."""

from pathlib import Path

from tests.simulator.cases import CASES, WINDOWS, played, regrets

README = Path(__file__).parents[2] / "mixer" / "core" / "policies" / "README.md"
BEGIN, END = "<!-- regret: begin -->\n", "<!-- regret: end -->\n"
NOISE = 0.02


def line(name: str) -> str:
    case = CASES[name]
    exact, noisy = (regrets(case, played(case, noise=noise)) for noise in (0.0, NOISE))
    limit = "shown only" if case.most is None else f"{case.judged}, {100 * case.most:.0f} %"
    figures = " | ".join(f"{100 * found[key]:.0f} %" for found in (exact, noisy) for key in ("run", "last"))
    return f"| {name} | {case.goal.words} | {figures} | {limit} |\n"


def table() -> str:
    head = (
        "| policy | objective | run | last | run, noise | last, noise | judged by, at most |\n"
        "|---|---|---|---|---|---|---|\n"
    )
    return head + "".join(line(name) for name in CASES)


def committed() -> str:
    return README.read_text().split(BEGIN)[1].split(END)[0]


def main() -> None:
    text = README.read_text()
    before, rest = text.split(BEGIN)
    README.write_text(before + BEGIN + table() + END + rest.split(END)[1])
    print(f"{len(CASES)} policies over {WINDOWS} windows each, twice: {README}")


if __name__ == "__main__":
    main()
