"""The report of a run: one page that needs nothing else, and its pictures as files.

    report.html      everything in one file: pictures drawn in it, tables, what happened, the numbers as JSON
    <picture>.png    the same pictures, for papers and chats

It reads the run's files and writes only into its own folder, so it may be made of a run that goes on.
"""

import html
import json
import math
import re
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from mixer.control.course import Course, course_of, evaluations_of
from mixer.control.drawing import Picture
from mixer.control.fence import Fence, write_whole
from mixer.control.page import PAGE
from mixer.control.pictures import draw
from mixer.control.record import Record, happenings, number, read_record
from mixer.control.wording import short, span

MOST_EVENTS = 400
MOST_DOMAINS = 300  # in the table; the JSON has as many
CONFIG_KEYS = ("policy", "model", "optimizer", "step", "controller", "rails", "train", "evaluation")
SHOWN_OPTIONS = 24


def write_report(
    folder: Path, out: Path | None = None, *, corpus: str | None = None, fence: Fence | None = None
) -> list[Path]:
    """Write the report of a run folder (or of a schedule alone); returns its files, the page first.

    With the fence of the run it is written by its owner or not at all.
    """
    folder = Path(folder)
    record = read_record(folder)
    home = folder if folder.is_dir() else folder.parent
    target = Path(out) if out is not None else home / "report"
    course = course_of(record)
    pictures = draw(record, course)
    files = {f"{picture.key}.png": picture.png for picture in pictures}
    files["report.html"] = page(record, course, pictures, corpus=corpus).encode()
    for name, data in files.items():
        with fence.writing() if fence is not None else nullcontext():
            target.mkdir(parents=True, exist_ok=True)
            write_whole(target / name, data)
    return [target / name for name in sorted(files, key=lambda name: (name != "report.html", name))]


def facts(record: Record, course: Course, *, corpus: str | None = None) -> dict[str, Any]:
    """The numbers of a run, by name: what the page shows and carries along as JSON."""
    schedule, trained = record.schedule, list(record.windows.values())
    seconds = math.fsum(value for one in trained if math.isfinite(value := number(one.get("seconds"))))
    waited = math.fsum(value for one in trained if math.isfinite(value := number(one.get("data_wait_s"))))
    speeds = [value for one in trained if math.isfinite(value := number(one.get("tokens_per_s")))]
    loss_b = course.loss_of() if len(course) else np.array([])
    known = loss_b[np.isfinite(loss_b)]
    catalog = schedule.last_catalog
    return {
        "run": record.name,
        "status": record.status,
        "windows_trained": len(trained),
        "windows_decided": len(schedule),
        "windows_planned": record.planned_windows,
        "steps": record.steps,
        "tokens": record.tokens,
        "duration_s": record.duration_s,
        "training_s": seconds,
        "tokens_per_s": float(np.median(speeds)) if speeds else None,
        "data_wait_share": waited / seconds if seconds > 0 else None,
        "last_loss": float(known[-1]) if len(known) else None,
        "faults": len(record.faults),
        "faults_survived": record.faults_survived,
        "windows_held": sum(row.reason == "held" for row in schedule),
        "bad_rows": int(course.bad_d.sum()),
        "skipped_steps": sum(int(one.get("skipped_steps") or 0) for one in trained),
        "largest_distance_rows": course.largest_apart,
        "rows_trained_differ_from_plan": course.differing_rows if trained else None,
        "catalog": catalog.fingerprint,
        "corpus": corpus,
        "domains": len(catalog),
        "catalog_rows": int(catalog.num_rows_d.sum()),
        "tokenizer": catalog.tokenizer,
        "row_tokens": catalog.row_tokens,
        "window_steps": schedule.geometry.window_steps,
        "batch_rows": schedule.geometry.batch_rows,
        "seed": schedule.geometry.seed,
        "windows_a_point": course.stride,
    }


def domains(record: Record, course: Course) -> list[dict[str, Any]]:
    """What became of each domain."""
    rows_of: dict[str, int] = {}
    for switch in (0, *record.schedule.switches):
        catalog = record.schedule.row(switch).catalog if len(record.schedule) else record.schedule.catalog
        rows_of |= {domain.name: domain.num_rows for domain in catalog.domains}
    given = max(1, int(course.given_d.sum()))
    loss_bd = course.loss_bd
    return [
        {
            "domain": name,
            "rows": rows_of[name],
            "first_weight": _end(course.weights_bd[:, place], 0),
            "last_weight": _end(course.weights_bd[:, place], -1),
            "rows_given": int(course.given_d[place]),
            "share_given": int(course.given_d[place]) / given,
            "passes": _end(course.passes_bd[:, place], -1),
            "distance_rows": _end(np.abs(course.apart_bd[:, place]), -1),
            "rows_trained": int(course.trained_d[place]),
            "bad_rows": int(course.bad_d[place]),
            "first_loss": _end(loss_bd[:, place], 0),
            "last_loss": _end(loss_bd[:, place], -1),
        }
        for place, name in enumerate(course.names)
    ]


def sets(record: Record) -> list[dict[str, Any]]:
    """What became of each evaluation set."""
    return [
        {
            "set": name,
            "first_loss": _end(one.loss_n, 0),
            "best_loss": float(np.nanmin(one.loss_n)) if np.isfinite(one.loss_n).any() else None,
            "last_loss": _end(one.loss_n, -1),
            "last_bits_per_byte": _end(one.bits_per_byte_n, -1),
            "measured": len(one.loss_n),
        }
        for name, one in evaluations_of(record).items()
    ]


def _end(values: np.ndarray, place: int) -> float | None:
    known = values[np.isfinite(values)]
    return float(known[place]) if len(known) else None


# ---- the page ------------------------------------------------------------------------------------


def page(record: Record, course: Course, pictures: Sequence[Picture], *, corpus: str | None = None) -> str:
    found = facts(record, course, corpus=corpus)
    domain_list, set_list = domains(record, course), sets(record)
    left = len(domain_list) - MOST_DOMAINS
    if left > 0:
        kept = sorted(domain_list, key=lambda one: -one["rows_given"])[:MOST_DOMAINS]
        domain_list = sorted(kept, key=lambda one: one["domain"])
    data = {"facts": found, "domains": domain_list, "sets": set_list}
    sections = [
        "".join(_tile(name, value) for name, value in _tiles(found)),
        "".join(_picture(picture) for picture in pictures)
        or "<p class='none'>No window was decided yet, so there is nothing to draw.</p>",
        _domain_table(domain_list, left),
        _set_table(set_list),
        _events(record),
        _config(record, found),
    ]
    note = "" if course.stride == 1 else f"Pictures show one point for every {course.stride} windows. "
    values = {
        "title": html.escape(record.name),
        "status": html.escape(record.status),
        "state": record.status.replace(" ", "-"),
        "lead": html.escape(_lead(record, found)),
        "note": note,
        "data": json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("</", "<\\/"),
    }
    values |= dict(zip(("tiles", "pictures", "domains", "sets", "events", "config"), sections, strict=True))
    return re.sub("@([a-z]+)@", lambda place: values[place[1]], PAGE)  # once: what is filled in is never a place


def _lead(record: Record, found: dict[str, Any]) -> str:
    options = record.options
    policy = options.get("policy.kind")
    times = record.times
    parts = [
        f"{found['domains']} domains, {found['catalog_rows']:,} rows of {found['row_tokens']} tokens",
        f"policy {policy}" if policy else "",
        record.made_from,
        f"begun {_moment(times[0])} UTC" if times else "",
    ]
    return " · ".join(part for part in parts if part)


def _tiles(found: dict[str, Any]) -> Iterable[tuple[str, str]]:
    planned = found["windows_planned"]
    if found["windows_trained"]:
        yield "tokens trained", short(found["tokens"])
    if found["windows_trained"]:
        yield "windows trained", f"{found['windows_trained']:,}" + (f" of {planned:,}" if planned else "")
    yield "windows decided", f"{found['windows_decided']:,}"
    if found["duration_s"]:
        yield "duration", span(found["duration_s"])
    if found["tokens_per_s"] is not None:
        yield "tokens a second", short(found["tokens_per_s"])
    if found["data_wait_share"] is not None:
        yield "waiting for data", f"{found['data_wait_share']:.2%}"
    if found["last_loss"] is not None:
        yield "last training loss", f"{found['last_loss']:.3f}"
    yield "farthest from asked", f"{found['largest_distance_rows']:.2f} rows"
    yield "faults survived", f"{found['faults_survived']} of {found['faults']}" if found["faults"] else "no fault"
    if found["windows_held"]:
        yield "windows held", f"{found['windows_held']:,}"
    if found["bad_rows"]:
        yield "bad rows", f"{found['bad_rows']:,}"


def _tile(name: str, value: str) -> str:
    return f"<div class='tile'><b>{html.escape(value)}</b><span>{html.escape(name)}</span></div>"


def _picture(picture: Picture) -> str:
    caption = html.escape(picture.caption)
    return f"<figure id='{picture.key}'><div>{picture.svg}</div><figcaption>{caption}</figcaption></figure>\n"


def _table(heads: Sequence[str], lines: Iterable[Sequence[str]], *, text: int = 1) -> str:
    """A table whose first `text` columns are words and whose others are numbers."""
    kinds = ["" if place < text else " class='n'" for place in range(len(heads))]
    top = "".join(f"<th{kind}>{html.escape(head)}</th>" for head, kind in zip(heads, kinds, strict=True))
    body = "".join(
        "<tr>"
        + "".join(f"<td{kind}>{html.escape(cell)}</td>" for cell, kind in zip(line, kinds, strict=True))
        + "</tr>\n"
        for line in lines
    )
    return f"<div class='wide'><table><thead><tr>{top}</tr></thead><tbody>\n{body}</tbody></table></div>"


def _domain_table(found: list[dict[str, Any]], left: int) -> str:
    heads = ["domain", "rows", "first weight", "last weight", "rows given", "share", "passes", "apart", "bad rows",
             "first loss", "last loss"]  # fmt: skip
    lines = [
        [
            one["domain"],
            f"{one['rows']:,}",
            _say(one["first_weight"], ".2%"),
            _say(one["last_weight"], ".2%"),
            f"{one['rows_given']:,}",
            f"{one['share_given']:.2%}",
            _say(one["passes"], ".2f"),
            _say(one["distance_rows"], ".2f"),
            f"{one['bad_rows']:,}",
            _say(one["first_loss"], ".3f"),
            _say(one["last_loss"], ".3f"),
        ]
        for one in found
    ]
    note = (
        f"<p class='none'>The {len(found)} that gave most rows; {left:,} others are left out.</p>" if left > 0 else ""
    )
    return note + _table(heads, lines)


def _set_table(found: list[dict[str, Any]]) -> str:
    if not found:
        return "<p class='none'>Nothing was evaluated.</p>"
    heads = ["set", "first loss", "best loss", "last loss", "last bits per byte", "measured"]
    keys = ("first_loss", "best_loss", "last_loss", "last_bits_per_byte")
    lines = [[one["set"], *(_say(one[key], ".4f") for key in keys), f"{one['measured']:,}"] for one in found]
    return _table(heads, lines)


def _events(record: Record) -> str:
    found = happenings(record)
    if not found:
        return "<p class='none'>Nothing is written down.</p>"
    begin = record.times[0] if record.times else 0.0
    lines: list[list[str]] = []
    for one in found:
        time = one.get("time")
        after = "" if time is None else f"+{span(float(time) - begin)}"
        moment = "" if time is None else _moment(float(time))
        where = [_count(one.get("window")), _count(one.get("steps"))]
        lines.append([moment, after, str(one.get("what") or ""), str(one.get("text") or ""), *where])
    left = len(lines) - MOST_EVENTS
    note = f"<p class='none'>{left} in the middle are left out here; journal.jsonl has them.</p>" if left > 0 else ""
    if left > 0:
        lines = lines[: MOST_EVENTS // 2] + lines[-(MOST_EVENTS // 2) :]
    return note + _table(["time (UTC)", "after", "what", "", "window", "step"], lines, text=4)


def _config(record: Record, found: dict[str, Any]) -> str:
    keys = ("catalog", "corpus", "tokenizer", "row_tokens", "window_steps", "batch_rows", "seed",
            "rows_trained_differ_from_plan", "skipped_steps")  # fmt: skip
    lines = [[key.replace("_", " "), str(found[key])] for key in keys if found[key] is not None]
    options = [item for item in record.options.items() if item[0].partition(".")[0] in CONFIG_KEYS]
    lines += [[key, value] for key, value in options[:SHOWN_OPTIONS]]
    text = _table(["option", "value"], lines, text=2)
    if record.config:
        text += f"<details><summary>run.yaml</summary><pre>{html.escape(record.config)}</pre></details>"
    return text


def _say(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def _count(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else ""


def _moment(time: float) -> str:
    return datetime.fromtimestamp(time, UTC).strftime("%Y-%m-%d %H:%M:%S")
