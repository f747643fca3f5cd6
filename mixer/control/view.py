"""A run on a terminal: one text for one moment, made of nothing but the record, the width and the time."""

import math
import unicodedata
from collections.abc import Sequence
from typing import Any

import numpy as np

from mixer.control.record import Record, number
from mixer.control.wording import short, shorten, span

BACK_WINDOWS = 8  # what a change is said against
PACE_WINDOWS = 20  # from which the time that is left is told
SHOWN_SETS = 6
SHOWN_EVENTS = 5
SAME = 0.0005  # a share that moved less has not moved
EIGHTHS = " ▏▎▍▌▋▊▉"


def text(record: Record, width: int = 80, *, now: float, height: int | None = None) -> str:
    """The whole view, in lines of at most `width`; with `height`, domains that do not fit are summed up."""
    top = [_title(record, now), _progress(record, width), *wrap(_numbers(record), width)]
    bottom = [*_evaluation(record), *_events(record)]
    room = 24 if height is None else max(3, height - len(top) - len(bottom) - 4)
    lines = [*top, "", *_domains(record, width, room), "", *bottom]
    return "\n".join(cut(line, width) for line in lines) + "\n"


def cut(line: str, width: int) -> str:
    """The line, no wider than the terminal; letters of double width count twice."""
    used = 0
    for place, letter in enumerate(line):
        used += 2 if unicodedata.east_asian_width(letter) in "WF" else 1
        if used > width:
            return line[:place]
    return line


def wrap(parts: Sequence[str], width: int, gap: str = "   ") -> list[str]:
    """The parts in as few lines as hold them, none of them cut in two."""
    lines: list[str] = []
    for part in parts:
        if lines and len(lines[-1]) + len(gap) + len(part) <= width:
            lines[-1] += gap + part
        else:
            lines.append(part)
    return lines


def bar(share: float, cells: int) -> str:
    """A bar to the eighth of a letter."""
    eighths = round(min(max(share, 0.0), 1.0) * cells * 8)
    full, part = divmod(eighths, 8)
    return ("█" * full + (EIGHTHS[part] if part else "")).ljust(cells)


def seconds_left(record: Record) -> float | None:
    """At the pace of the last windows, by the clock; None if the end or the pace is not known."""
    planned, trained = record.planned_windows, record.trained_windows
    if planned is None or not trained:
        return None
    last = [record.windows[k] for k in sorted(record.windows)[-PACE_WINDOWS - 1 :]]
    if len(last) > 1:
        pace = (float(last[-1]["time"]) - float(last[0]["time"])) / (last[-1]["window"] - last[0]["window"])
    else:
        pace = number(last[0].get("seconds"))
    return max(planned - trained, 0) * pace if math.isfinite(pace) and pace >= 0 else None


def _title(record: Record, now: float) -> str:
    policy = record.options.get("policy.kind")
    times = record.times
    parts = [record.name, record.status, f"policy {policy}" if policy else ""]
    if times:
        parts.append(f"for {span(record.duration_s)}")
        if record.end is None:
            parts.append(f"last word {span(now - times[-1])} ago")
    return "  ·  ".join(part for part in parts if part)


def _progress(record: Record, width: int) -> str:
    trained, planned = record.trained_windows, record.planned_windows
    if planned is None:
        return f"{trained} windows trained, {len(record.schedule)} decided, no end planned"
    left = seconds_left(record)
    told = f" {trained}/{planned} windows {trained / planned:4.0%}"
    if left is not None and record.end is None:
        told += f"  {span(left)} left"
    return f"[{bar(trained / planned, max(5, min(50, width - len(told) - 2)))}]{told}"


def _numbers(record: Record) -> list[str]:
    parts = [f"tokens {short(record.tokens)}", f"step {record.steps}"]
    if record.windows:
        last = record.windows[max(record.windows)]
        seconds, wait = number(last.get("seconds")), number(last.get("data_wait_s"))
        parts += [
            f"tokens/s {short(number(last.get('tokens_per_s')))}",
            f"data wait {100 * wait / seconds:.2g}%" if seconds > 0 and math.isfinite(wait) else "",
            _moved("loss", [number(record.windows[k].get("loss")) for k in sorted(record.windows)]),
            f"rate {number(last.get('rate')):.3g}",
            f"grad {number(last.get('grad_norm')):.3g}",
            f"workers {last['world_size']}" if last.get("world_size") else "",
        ]
    if (row := record.schedule.last) is not None:
        parts.append(f"lag {row.window - 1 - row.signals_through}")
    if record.faults:
        parts.append(f"faults survived {record.faults_survived} of {len(record.faults)}")
    return [part for part in parts if part and not part.endswith(" nan")]


def _moved(name: str, values: Sequence[float]) -> str:
    known = [value for value in values if math.isfinite(value)]
    if not known:
        return ""
    change = f" ({known[-1] - known[-1 - BACK_WINDOWS]:+.3f})" if len(known) > BACK_WINDOWS else ""
    return f"{name} {known[-1]:.3f}{change}"


# ---- domains -------------------------------------------------------------------------------------


def _domains(record: Record, width: int, room: int) -> list[str]:
    schedule = record.schedule
    if not len(schedule):
        return ["no window is decided yet"]
    window = min(record.trained_windows, len(schedule) - 1)
    row = schedule.row(window)
    names, weights_d = row.catalog.names, row.weights_d
    before = schedule.row(max(0, window - BACK_WINDOWS))
    old = dict(zip(before.catalog.names, before.weights_d.tolist(), strict=True))
    shown = np.arange(len(names))
    if len(names) > room:
        shown = np.sort(np.argsort(-weights_d, kind="stable")[: room - 1])  # in the order of names, so they stand still
    losses = _losses(record)
    label = max(6, min(28, max(len(names[place]) for place in shown)))
    most = min(1.0, max(float(weights_d.max()), 2.0 / len(names)))  # a full bar
    cells = max(4, min(40, width - label - 30))
    head = f"{'domain':<{label}}  {f'window {window}':<{cells}}  {'weight':>7}  {'change':>8}  {'loss':>7}"
    lines = [head]
    for place in shown.tolist():
        name, weight = names[place], float(weights_d[place])
        loss = losses.get(name, math.nan)
        told = f"{loss:7.3f}" if math.isfinite(loss) else f"{'–':>7}"
        change = arrow(weight - old[name]) if name in old else "new"
        lines.append(
            f"{shorten(name, label):<{label}}  {bar(weight / most, cells)}  {weight:7.2%}  {change:>8}  {told}"
        )
    if (left := len(names) - len(shown)) > 0:
        rest = 1.0 - math.fsum(weights_d[shown].tolist())
        lines.append(f"{f'{left} others':<{label}}  {'':<{cells}}  {rest:7.2%}")
    if row.reason not in ("policy", "prior"):
        lines.append(f"window {window} is {row.reason}")
    return lines


def arrow(change: float) -> str:
    """A change of a share, in points of a hundred."""
    if abs(change) < SAME:
        return "·"
    return f"{'▲' if change > 0 else '▼'} {100 * change:+.1f}"


def _losses(record: Record) -> dict[str, float]:
    """The newest mean loss of each domain that had a token in the last windows."""
    found: dict[str, float] = {}
    for window in sorted(record.windows)[-PACE_WINDOWS:]:
        loss_d, tokens_d = record.measured(window, "loss_sum"), record.measured(window, "tokens_d")
        if loss_d is not None and tokens_d is not None:
            names = record.schedule.row(window).catalog.names
            found |= {names[place]: float(loss_d[place] / tokens_d[place]) for place in np.flatnonzero(tokens_d)}
    return found


# ---- evaluation and events -----------------------------------------------------------------------


def _evaluation(record: Record) -> list[str]:
    if not record.evaluations:
        return []
    last = record.evaluations[-1]
    before: dict[str, Any] = record.evaluations[-2]["sets"] if len(record.evaluations) > 1 else {}
    names = sorted(last["sets"], key=lambda name: (not name.startswith("target"), name))
    parts: list[str] = []
    for name in names[:SHOWN_SETS]:
        loss = number(last["sets"][name].get("loss"))
        change = loss - number(before.get(name, {}).get("loss"))
        parts.append(f"{name} {loss:.3f}" + (f" ({change:+.3f})" if math.isfinite(change) else ""))
    more = f"   and {len(names) - SHOWN_SETS} more" if len(names) > SHOWN_SETS else ""
    return [f"evaluation after window {last['window']}", *(f"  {part}" for part in parts), *([more] if more else [])]


def _events(record: Record) -> list[str]:
    if not record.events:
        return []
    begin = record.times[0]
    last = record.events[-SHOWN_EVENTS:]
    wide = max(len(str(event.get("what"))) for event in last)
    return ["", "what happened last"] + [
        f"  +{span(float(event['time']) - begin):<13}{event.get('what') or '':<{wide}}  {event.get('text') or ''}"
        for event in last
    ]
