"""The stream against what people use today to bring a weighted mixture to ranks, in one run.

    python -m tests.bench.stream_peers [--quick] [--systems stream,mix,...] [--mosaic-python PATH] [--record]

Every system delivers batches of 8 rows of 2,048 tokens as int64, from the same 8 domains of very different sizes, in
shares proportional to the square root of the size, to one of 2 ranks; the ranks are measured one at a time.
Repetitions are interleaved: every system once, then every system again. The table shows medians;
ratios are taken within a repetition. A system whose module is missing is left out, with a line that says so.
One that gives no answer in time has failed, which is recorded as well.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tests.bench.peers import runs
from tests.bench.peers.bed import Bed
from tests.bench.peers.streams import SYSTEMS, Order
from tests.bench.record import record

WINDOW_STEPS = (16, 64, 256)
OURS = "stream"
Key = tuple[str, int]  # system, steps a window


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    megabytes: int = 1000
    repetitions: int = 3
    ranks: tuple[int, ...] = (0, 1)
    warm_s: float = 1.0
    window_s: float = 3.0
    limit_s: float = 150.0


QUICK = Bench(megabytes=24, repetitions=1, warm_s=0.1, window_s=0.3, limit_s=90.0)


def python_of(system: str, mosaic_python: str) -> str:
    return mosaic_python if SYSTEMS[system].module == "streaming" else sys.executable


def missing(system: str, python: str) -> bool:
    lookup = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({SYSTEMS[system].module!r}) is None)"
    return subprocess.run([python, "-c", lookup], check=False).returncode != 0


def consume(order: Order, python: str, limit_s: float) -> dict[str, Any]:
    """One consumer in a process of its own, and what it answered."""
    log = Path(f"{order.answer}.log")
    with log.open("wb") as output:
        process = subprocess.Popen(
            [python, "-m", "tests.bench.peers.streams", json.dumps(asdict(order))],
            env=runs.environment(),
            cwd=runs.REPOSITORY,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    runs.wait([process], limit_s)
    if Path(order.answer).exists():
        return json.loads(Path(order.answer).read_text())
    return {"error": f"no answer within {limit_s:g} s: {log.read_text(errors='replace').strip()[-200:]}"}


def measure(bed: Bed, bench: Bench, systems: list[str], mosaic_python: str) -> dict[Key, list[dict[str, Any]]]:
    """Every system for every rank and size of window once, then all again; by system and size of window."""
    for system in systems:
        runs.build(bed, [SYSTEMS[system].layout], python_of(system, mosaic_python))
    found: dict[Key, list[dict[str, Any]]] = defaultdict(list)
    for repetition in range(bench.repetitions):
        for rank in bench.ranks:
            for system in systems:
                of = SYSTEMS[system]
                for steps in WINDOW_STEPS if of.has_windows else (0,):
                    if rank >= of.world_size:
                        continue
                    with tempfile.TemporaryDirectory(prefix="stream-peers-") as folder:
                        order = Order(
                            system=system,
                            root=str(bed.root),
                            answer=str(Path(folder, "answer")),
                            window_steps=steps,
                            rank=rank,
                            world_size=of.world_size,
                            warm_s=bench.warm_s,
                            window_s=bench.window_s,
                        )
                        answer = consume(order, python_of(system, mosaic_python), bench.limit_s)
                    found[system, steps].append({"repetition": repetition, "rank": rank, **answer})
                    shown = answer.get("error") or f"{answer['tokens_per_s'] / 1e6:.1f} M tokens/s"
                    print(f"repetition {repetition}, rank {rank}, {system} {steps or ''}: {shown}", flush=True)
    return dict(found)


def median(answers: list[dict[str, Any]], key: str) -> float | None:
    values = [answer[key] for answer in answers if key in answer]
    return statistics.median(values) if values else None


def ratio(ours: list[dict[str, Any]], peer: list[dict[str, Any]]) -> float | None:
    """Median over repetitions and ranks of our speed by the peer's."""
    speeds = {(one["repetition"], one["rank"]): one["tokens_per_s"] for one in peer if "tokens_per_s" in one}
    pairs = [(one, speeds.get((one["repetition"], one["rank"]))) for one in ours if "tokens_per_s" in one]
    found = [one["tokens_per_s"] / speed for one, speed in pairs if speed]
    return statistics.median(found) if found else None


def label(key: Key) -> str:
    system, steps = key
    return f"{SYSTEMS[system].title}, {steps} steps" if steps else SYSTEMS[system].title


def table(found: dict[Key, list[dict[str, Any]]]) -> str:
    lines = [
        f"{'':<52} {'runs':>5} {'M tok/s':>8} {'CPU s/Mtok':>10} {'first s':>8} {'off':>6} {'1 domain':>8}"
        f"  {'  '.join(f'x at {steps}' for steps in WINDOW_STEPS)}"
    ]
    for key, answers in found.items():
        good = [answer for answer in answers if "error" not in answer]
        cells = [median(answers, name) for name in ("tokens_per_s", "cpu_s_per_m_tokens", "first_batch_s")]
        cells += [median(answers, name) for name in ("share_off", "one_domain")]
        if not good:
            lines.append(f"{label(key):<52} {0:>2}/{len(answers)}  {answers[0]['error'][:60]}")
            continue
        speed, cpu, first, off, one = (value or 0.0 for value in cells)
        ratios = [ratio(found.get((OURS, steps), []), answers) for steps in WINDOW_STEPS]
        lines.append(
            f"{label(key):<52} {len(good):>2}/{len(answers)} {speed / 1e6:>8.1f} {cpu:>10.4f} {first:>8.2f} {off:>6.3f}"
            f" {one:>8.2f}  {'  '.join(f'{value:.2f}' if value else '-' for value in ratios)}"
        )
    return "\n".join(lines)


def figures(found: dict[Key, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """As `record` takes them."""
    ours = {steps: answers for (system, steps), answers in found.items() if system == OURS}
    peers = {SYSTEMS[system].title: answers for (system, _), answers in found.items() if system != OURS}

    def values(key: str, scale: float = 1, digits: int = 3) -> tuple[dict[str, float], dict[str, Any]]:
        mine = {str(steps): round((median(answers, key) or 0) * scale, digits) for steps, answers in ours.items()}
        theirs: dict[str, Any] = {}
        for title, answers in peers.items():
            value = median(answers, key)
            theirs[title] = round(value * scale, digits) if value is not None else answers[0].get("error", "")[:60]
        return mine, theirs

    def best(theirs: dict[str, Any], choose: Any) -> float | None:
        numbers = [value for value in theirs.values() if isinstance(value, float)]
        return choose(numbers) if numbers else None

    speed, others_speed = values("tokens_per_s", 1e-6, 1)
    first, others_first = values("first_batch_s", 1, 2)
    off, others_off = values("share_off", 1, 4)
    cpu, others_cpu = values("cpu_s_per_m_tokens", 1, 4)
    fastest, soonest, nearest = best(others_speed, max), best(others_first, min), best(others_off, min)
    least = best(others_cpu, min)
    return [
        {
            "figure": "stream beside other systems: tokens of one rank of two, by steps of 16 rows a window",
            "value": speed,
            "unit": "M tokens/s",
            "target": "ahead of all",
            "met": fastest is not None and min(speed.values()) > fastest,
            "peers": others_speed,
        },
        {
            "figure": "stream beside other systems: how many times as fast, by steps of 16 rows a window",
            "value": {
                str(steps): {
                    title: round(times, 2) for title, answers in peers.items() if (times := ratio(mine, answers))
                }
                for steps, mine in ours.items()
            },
            "unit": "times the tokens/s of a peer in the same repetition, median",
            "target": "> 1 for all",
            "met": all(
                times > 1
                for mine in ours.values()
                for answers in peers.values()
                if (times := ratio(mine, answers)) is not None
            ),
            "peers": {},
        },
        {
            "figure": "stream beside other systems: first batch",
            "value": first,
            "unit": "s after the start, Ray running and modules imported by ours and Ray's",
            "target": "sooner than other ways over Ray Data",
            "met": all(
                max(first.values()) < value
                for title, value in others_first.items()
                if isinstance(value, float) and title != SYSTEMS["mosaic"].title
            ),
            "peers": others_first | ({} if soonest is None else {"soonest": soonest}),
        },
        {
            "figure": "stream beside other systems: shares of the first 100 batches of a rank",
            "value": off,
            "unit": "largest difference of a domain's share from its weight",
            "target": "nearest of all",
            "met": nearest is not None and max(off.values()) < nearest,
            "peers": others_off,
        },
        {
            "figure": "stream beside other systems: CPU seconds over all processes, by steps of 16 rows a window",
            "value": cpu,
            "unit": "s per M tokens",
            "target": "least of all",
            "met": least is not None and max(cpu.values()) < least,
            "peers": others_cpu,
        },
    ]


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m tests.bench.stream_peers",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--quick", action="store_true", help="a few MB, once, short: does everything work?")
    made.add_argument("--systems", default=",".join(SYSTEMS), help="some of %(default)s")
    made.add_argument("--megabytes", type=int, help="size of the token corpus")
    made.add_argument("--repetitions", type=int)
    made.add_argument("--ranks", type=int, nargs="+", choices=(0, 1), default=[0, 1], help="which of the 2 consume")
    made.add_argument("--seconds", type=float, help="length of the timed window")
    made.add_argument("--limit", type=float, help="seconds after which a consumer has failed")
    made.add_argument("--data", type=Path, default=runs.REPOSITORY / "data/reader-peers", help="corpora are kept here")
    made.add_argument("--mosaic-python", default=sys.executable, help="an interpreter that has mosaicml-streaming")
    made.add_argument("--out", type=Path, help="write all answers as JSON")
    made.add_argument("--record", action="store_true", help="write the figures to tests/bench/results")
    return made


def main(argv: list[str] | None = None) -> int:
    made = parser()
    given = made.parse_args(argv)
    base = QUICK if given.quick else Bench()
    bench = Bench(
        megabytes=given.megabytes or base.megabytes,
        repetitions=given.repetitions or base.repetitions,
        ranks=tuple(given.ranks),
        warm_s=base.warm_s,
        window_s=given.seconds or base.window_s,
        limit_s=given.limit or base.limit_s,
    )
    systems = given.systems.split(",")
    if unknown := [system for system in systems if system not in SYSTEMS]:
        made.error(f"no system {', '.join(unknown)}. There are {', '.join(SYSTEMS)}.")
    for system in systems:
        if missing(system, python_of(system, given.mosaic_python)):
            print(f"{system} is left out: {SYSTEMS[system].module} is not installed", flush=True)
    systems = [one for one in systems if not missing(one, python_of(one, given.mosaic_python))]
    bed = Bed.of_size(given.data / f"{bench.megabytes}MB", bench.megabytes)
    runs.build(bed, ["raw"])
    found = measure(bed, bench, systems, given.mosaic_python)
    print(table(found))
    if given.out:
        given.out.write_text(json.dumps([{"label": label(key), "answers": value} for key, value in found.items()]))
    if given.record:
        for figure in figures(found):
            record(command="python -m tests.bench.stream_peers --record", **figure)
    answers = [answer for of in found.values() for answer in of]
    ours = [answer for (system, _), of in found.items() if system == OURS for answer in of]
    return int(any(answer.get("rows_wrong") for answer in answers) or any("error" in answer for answer in ours))


if __name__ == "__main__":
    sys.exit(main())
