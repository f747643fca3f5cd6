"""Every recorded figure as one table, unmet targets first: `make figures`.

Exits with 1 if a file is not a record of figures; an unmet target is shown, not punished.
"""

import json
import sys
from pathlib import Path
from typing import Any

from tests.bench.record import RESULTS

KEYS = {
    "figure": str,
    "value": (int, float, str, dict, list),
    "unit": str,
    "target": (str, int, float),
    "met": bool,
    "peers": dict,
    "command": str,
    "date": str,
    "machine": str,
}
COLUMNS = ("met", "figure", "value", "unit", "target", "peers", "date")


class FigureError(Exception):
    """A file of results that does not hold what a figure needs; the text names file and key."""


def read_figures(results: Path = RESULTS) -> list[dict[str, Any]]:
    """All figures, unmet ones first, each checked to be complete."""
    found: dict[str, str] = {}
    figures: list[dict[str, Any]] = []
    for file in sorted(results.glob("*.json")):
        try:
            content = json.loads(file.read_text("utf-8"))
        except ValueError as error:
            raise FigureError(f"{file.name} is not JSON: {error}.") from error
        for entry in content if isinstance(content, list) else [content]:
            check(entry, file.name)
            if entry["figure"] in found:
                other = found[entry["figure"]]
                raise FigureError(f"{file.name} records {entry['figure']!r}, which {other} records too.")
            found[entry["figure"]] = file.name
            figures.append(entry)
    return sorted(figures, key=lambda entry: (entry["met"], entry["figure"]))


def check(entry: Any, file: str) -> None:
    if not isinstance(entry, dict):
        raise FigureError(f"{file} holds a {type(entry).__name__}; needed an object or a list of objects.")
    name = entry.get("figure", "a figure without a name")
    if missing := sorted(KEYS.keys() - entry.keys()):
        raise FigureError(f"{file}: {name!r} lacks {', '.join(missing)}.")
    if unknown := sorted(entry.keys() - KEYS.keys()):
        raise FigureError(f"{file}: {name!r} has {', '.join(unknown)} beyond {', '.join(KEYS)}.")
    for key, kind in KEYS.items():
        if not isinstance(entry[key], kind) or (isinstance(entry[key], bool) and kind is not bool):
            raise FigureError(f"{file}: {name!r} has {key}={entry[key]!r}, of the wrong type.")


def table(figures: list[dict[str, Any]]) -> str:
    rows = [COLUMNS, *(tuple(_cell(entry[column]) for column in COLUMNS) for entry in figures)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines.insert(1, "  ".join("-" * width for width in widths))
    unmet = sum(not entry["met"] for entry in figures)
    return "\n".join([*lines, "", f"{len(figures)} figures, {unmet} of them short of their target"])


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "NO"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return ", ".join(f"{key} {_cell(item)}" for key, item in value.items()) or "-"
    if isinstance(value, list):
        return ", ".join(map(_cell, value))
    return str(value)


def main(results: Path = RESULTS) -> int:
    try:
        print(table(read_figures(results)))
    except FigureError as error:
        print(f"figures: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
