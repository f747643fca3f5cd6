"""Numbers, lengths of time and names as people read them."""

import math


def short(value: float, digits: int = 3) -> str:
    """A number with as few signs as tell it: 12.3M."""
    if not math.isfinite(value):
        return "–"
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size * 0.9995:
            return f"{value / size:.{digits}g}{letter}"
    return f"{value:.{digits}g}"


def shorten(name: str, most: int = 22) -> str:
    """A name of at most so many letters, cut where names differ least: in the middle, or of few letters at the end."""
    if len(name) <= most:
        return name
    kept = min(8, (most - 1) // 2)
    return f"{name[: most - 1 - kept]}…{name[len(name) - kept :]}"


def span(seconds: float) -> str:
    """A length of time for people: 3 h 07 min."""
    seconds = max(0.0, seconds)
    if seconds < 60:
        return f"{seconds:.3g} s" if seconds < 9.95 else f"{seconds:.0f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    if whole < 86400:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 86400} d {whole % 86400 // 3600:02d} h"
