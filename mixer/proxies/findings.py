"""What a comparison found, as files and as text. `compare.json` is written last, so that who finds it finds all."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mixer.control.fence import write_whole
from mixer.control.tables import table
from mixer.control.wording import short, shorten, span
from mixer.core.errors import ConfigError
from mixer.proxies import showing
from mixer.proxies.compare import Comparison

FORMAT = 1
NOT_KNOWN = "-"
SHOWN_TARGETS, SHOWN_DOMAINS = 6, 8  # columns on a terminal; the files have all


def write_findings(folder: Path, found: Comparison, watch: Sequence[str] = ()) -> None:
    """compare.json, compare.md, the pictures and times.json, each whole or not at all."""
    assert found.race is not None and found.verdict is not None and found.times is not None
    try:
        for picture in showing.draw(found.race, found.verdict, watch):
            write_whole(folder / f"{picture.key}.png", picture.png)
        write_whole(folder / "times.json", _json(found.times))
        write_whole(folder / "compare.md", markdown(found, watch).encode())
        write_whole(folder / "compare.json", _json({"format": FORMAT, **found.verdict}))
    except OSError as error:
        raise ConfigError(f"{folder} cannot be written to: {error}. Make room, and give the same command.") from error


def _json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()


# ---- tables ------------------------------------------------------------------------------------------------


def ordered(verdict: Mapping[str, Any]) -> list[str]:
    """The contenders, the lowest final loss first."""
    return sorted(verdict["contenders"], key=lambda label: verdict["contenders"][label]["final_loss"]["mean"])


def verdict_table(found: Comparison) -> tuple[list[str], list[list[str]]]:
    assert found.verdict is not None and found.times is not None
    verdict = found.verdict
    against = f"vs {verdict['reference']}"
    heads = ["policy", "loss", f"± {verdict['level']:.0%}", against, "p (Holm)", "at equal compute",
             "tokens to its loss", "faster", "rank", "overhead", "time", "seeds"]  # fmt: skip
    lines: list[list[str]] = []
    for label in ordered(verdict):
        one = verdict["contenders"][label]
        pair, reach = one.get("against_reference", {}), one["to_reach_reference"]
        lines.append(
            [
                label,
                _say(one["final_loss"]["mean"], ".4f"),
                _say(one["final_loss"]["half"], ".4f"),
                _say(pair.get("difference"), "+.4f"),
                _say(pair.get("p_holm"), ".2g"),
                _say(one["equal_compute"]["mean"], ".4f"),
                "not reached" if reach["tokens"] is None else short(reach["tokens"]),
                _say(reach["times_faster"], ".2f", "×"),
                f"{one['rank']:.2f}",
                f"{one['overhead']['share']:.1%}",
                _say(found.times[label]["times_reference"], ".2f", "×"),
                str(len(one["seeds"])),
            ]
        )
    return heads, lines


def targets_table(verdict: Mapping[str, Any], most: int | None = None) -> tuple[list[str], list[list[str]]]:
    names = verdict["targets"][:most]
    lines: list[list[str]] = []
    for label in ordered(verdict):
        of_target = [verdict["contenders"][label]["targets"][name] for name in names]
        cells = [f"{one['mean']:.4f}" + ("" if one["half"] is None else f" ± {one['half']:.3f}") for one in of_target]
        lines.append([label, *cells])
    return ["policy", *names], lines


def weights_table(verdict: Mapping[str, Any], names: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """Final and mean weights, the floors in the last line."""
    lines: list[list[str]] = []
    for label in ordered(verdict):
        weights = verdict["contenders"][label]["weights"]
        cells = [f"{weights[n]['final']:.4f}{'*' if weights[n]['at_floor'] else ''} ({weights[n]['mean']:.4f})"
                 for n in names]  # fmt: skip
        lines.append([label, *cells])
    return ["policy", *names], [*lines, ["(floor)", *(f"{verdict['floor'][name]:.4f}" for name in names)]]


def watched(verdict: Mapping[str, Any], watch: Sequence[str]) -> list[str]:
    """The domains that were asked for, or all."""
    return list(watch) or list(verdict["floor"])


def check_watch(watch: Sequence[str], domains: Sequence[str]) -> None:
    unknown = [name for name in watch if name not in domains]
    if unknown:
        raise ConfigError(f"--watch names {', '.join(unknown)}; the domains are {', '.join(domains)}. Correct it.")


# ---- text --------------------------------------------------------------------------------------------------


def sentences(found: Comparison) -> list[str]:
    """The verdict in words."""
    assert found.verdict is not None
    verdict = found.verdict
    best, reference = verdict["best"], verdict["reference"]
    one = verdict["contenders"][best]
    lines = [f"best: {best}, mean target loss {one['final_loss']['mean']:.4f} after {short(verdict['tokens'])} tokens"]
    if best != reference:
        pair, reach = one["against_reference"], one["to_reach_reference"]
        known = "one seed, no test" if pair["p_holm"] is None else f"p {pair['p_holm']:.2g} by Holm"
        lines[0] += f", {-pair['difference']:.4f} below {reference} ({known})"
        if reach["tokens"] is not None:
            total = f", {short(reach['total_tokens'])} with its overhead"
            lines.append(f"{best} is at {reference}'s final loss after {short(reach['tokens'])} tokens{total}")
    level = verdict["level_with_best"]
    if level:
        lines.append(f"not told from it by these seeds: {', '.join(level)}")
    for word in ("better", "worse"):
        sure = ", ".join(verdict[f"{word}_than_reference"])
        lines += [f"{word} than {reference}: {sure or 'none for certain'}"]
    for label, one in verdict["contenders"].items():
        if one["held_share"]:
            lines.append(
                f"{label}: its answer was refused, and the mixture held, in {one['held_share']:.1%} of windows"
            )
    lines += [f"left out: {name}: {why}" for name, why in verdict["left_out"].items()]
    return lines


def text_lines(found: Comparison, watch: Sequence[str] = ()) -> list[str]:
    assert found.verdict is not None
    verdict = found.verdict
    heads, lines = targets_table(verdict, SHOWN_TARGETS)
    parts = [table(*verdict_table(found)), table([shorten(head, 20) for head in heads], lines)]
    names = watched(verdict, watch)[:SHOWN_DOMAINS]
    heads, lines = weights_table(verdict, names)
    title = f"final (mean) weights, * at its floor: {len(names)} of {len(verdict['floor'])} domains"
    parts.append([title, *table([shorten(head, 18) for head in heads], lines)])
    return [line for part in [*parts, sentences(found)] for line in (*part, "")][:-1]


NOTES = """Losses are in nats a token, the plain mean over the targets, at the end of runs of equal training tokens.
± and shaded bands are {level:.0%} t-intervals over seeds. Differences are paired by seed; p is the two-sided paired
t-test's after Holm's correction. Overhead: tokens of probes and of proxies trained beforehand, as a share of the
training tokens; evaluation is not counted, though a policy may learn from it, nor the forward passes of a reference
model. At equal compute: the contender's own curve at T·T/(T + overhead) tokens, a place where its learning rate is not
down yet. Tokens to its loss: when the seeds' mean curve first is as low as {reference}'s final loss. Rank: mean over
targets, 1 the lowest.
Time: of training and probes, relative to {reference}'s, with whatever else the machine did."""


def markdown(found: Comparison, watch: Sequence[str] = ()) -> str:
    assert found.verdict is not None and found.times is not None
    verdict = found.verdict
    times = (
        ["policy", "training a run", "probes a run"],
        [
            [label, span(found.times[label]["train_s"]), span(found.times[label]["probe_s"])]
            for label in ordered(verdict)
        ],
    )
    parts = [
        f"# {len(verdict['contenders'])} policies, {short(verdict['tokens'])} tokens a run",
        "\n".join(f"- {line}" for line in sentences(found)),
        _markdown(*verdict_table(found)),
        NOTES.format(level=verdict["level"], reference=verdict["reference"]),
        "![mean target loss over tokens](compare.png)\n![final loss against compute](compare-compute.png)",
        "## Targets",
        _markdown(*targets_table(verdict)),
        "## Weights: final (mean of the run), * at the floor",
        _markdown(*weights_table(verdict, watched(verdict, watch))),
        "![final weights](compare-weights.png)",
        "## Time",
        _markdown(*times),
    ]
    return "\n\n".join(parts) + "\n"


def _markdown(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rule = ["---", *["---:"] * (len(heads) - 1)]
    return "\n".join(f"| {' | '.join(line)} |" for line in [heads, rule, *lines])


def _say(value: float | None, form: str, unit: str = "") -> str:
    return NOT_KNOWN if value is None else f"{value:{form}}{unit}"
