"""How pictures look: one form for all, so that a domain is known by its colour and line anywhere in a report.

Figures are narrow, with large letters: they stay readable on a phone, and stand side by side on a desk. Every line
is named at its right end, where nothing is covered. The ink, the grid and the ground are colours that nothing
else has: in the page they are replaced by the page's own, so that one drawing serves light and dark.

Colours are the eight of Okabe and Ito that are told apart with any colour vision: the blue lighter, yellow and
black replaced by an olive and a violet, so that all can be seen on both grounds. Domains beyond eight differ by
line and hatch as well.
"""

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator
from numpy.typing import NDArray

from mixer.control.wording import short, shorten

INK, SOFT, GRID, GROUND, REST = "#1c2127", "#5d6671", "#dfe3e8", "#fefefe", "#9aa1a9"
THEMED = {INK: "--ink", SOFT: "--soft", GRID: "--grid", GROUND: "--ground"}
COLOURS = ("#1a80c4", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#8b62b8", "#a39a00")
LINES = ("-", (0, (4, 1.4)), (0, (1.2, 1.2)))
HATCHES = ("", "////", "....")
WIDTH_IN, DPI = 5.2, 180
LABEL_PT = 7.2
FEW_POINTS = 25  # up to here every point is marked

STYLE: Any = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 8,
    "axes.labelcolor": SOFT,
    "axes.labelsize": 8,
    "axes.edgecolor": GRID,
    "axes.facecolor": GROUND,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "figure.facecolor": GROUND,
    "text.color": INK,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "xtick.labelsize": 7.5,
    "ytick.labelsize": 7.5,
    "xtick.major.size": 2.5,
    "ytick.major.size": 0,
    "lines.linewidth": 1.3,
    "lines.solid_capstyle": "round",
    "hatch.color": GROUND,
    "hatch.linewidth": 0.7,
    "svg.fonttype": "none",
    "path.simplify": True,
}


@dataclass(frozen=True, slots=True)
class Look:
    colour: str
    line: Any
    hatch: str


def looks(num: int) -> list[Look]:
    """What tells so many series apart, in their order."""
    return [
        Look(COLOURS[i % 8], LINES[min(i // 8, len(LINES) - 1)], HATCHES[min(i // 8, len(HATCHES) - 1)])
        for i in range(num)
    ]


@dataclass(frozen=True, slots=True)
class Picture:
    key: str  # file name without its ending
    caption: str
    png: bytes
    svg: str


@dataclass(frozen=True, slots=True)
class Line:
    """One named series of a panel."""

    name: str
    x: NDArray[np.float64]
    y: NDArray[np.float64]
    look: Look


def figure(panels: int = 1, height_in: float = 2.9, shares: Sequence[float] | None = None) -> tuple[Figure, list[Axes]]:
    with mpl.rc_context(STYLE):
        drawn = Figure(figsize=(WIDTH_IN, height_in), dpi=DPI, layout="constrained")
        FigureCanvasAgg(drawn)
        axes = drawn.subplots(panels, 1, sharex=True, squeeze=False, height_ratios=shares)
    return drawn, list(axes[:, 0])


def finish(drawn: Figure, key: str, caption: str) -> Picture:
    """The drawing as PNG and as SVG; the same input gives the same bytes."""
    with mpl.rc_context(STYLE | {"svg.hashsalt": key}):
        png, svg = io.BytesIO(), io.StringIO()
        drawn.draw_without_rendering()
        drawn.set_layout_engine("none")  # laid out once for both
        drawn.savefig(png, format="png", metadata={"Software": None})
        drawn.savefig(svg, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return Picture(key, caption, png.getvalue(), _inline(svg.getvalue(), key))


def _inline(svg: str, key: str) -> str:
    """An SVG for the inside of a page: names of its own, the page's colours, as wide as there is room."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<style type=\"text/css\">.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="', f'id="{key}-', svg)
    svg = re.sub(r'(href="|url\()#', rf"\1#{key}-", svg)
    svg = re.sub(r'<svg [^>]*?viewBox="([^"]+)"[^>]*>', r'<svg viewBox="\1" role="img">', svg, count=1, flags=re.DOTALL)
    svg = re.sub(r"font: ([^;\"]*?)(?:'[^']*'|DejaVu Sans)[^;\"]*", r"font: \1var(--sans)", svg)
    for colour, name in THEMED.items():
        svg = svg.replace(colour, f"var({name})")
    return svg


def entitle(axes: Axes, title: str, unit: str = "") -> None:
    """The title of a panel, with the unit of its heights beside it."""
    axes.set_title(title, loc="left", fontsize=9.5, fontweight="bold", color=INK)
    if unit:
        axes.set_ylabel(unit)


# ---- panels ----------------------------------------------------------------------------------------


def draw_lines(axes: Axes, lines: Sequence[Line], *, named: bool = True, from_zero: bool = False) -> None:
    """Lines, each named at its end; those without any number are left out."""
    lines = [line for line in lines if np.isfinite(line.y).any()]
    for line in lines:
        known = np.isfinite(line.y)  # a domain without a row in a window has no loss there, and goes on
        marked = known.sum() <= FEW_POINTS
        axes.plot(
            line.x[known],
            line.y[known],
            color=line.look.colour,
            linestyle=line.look.line,
            marker="o" if marked else None,
            markersize=2.4,
        )
    if from_zero:
        axes.set_ylim(bottom=0)
    if named:
        name_ends(axes, [(line.name, float(line.y[np.isfinite(line.y)][-1]), line.look) for line in lines])


def draw_bands(
    axes: Axes, edge_e: NDArray[Any], share_bs: NDArray[Any], names: Sequence[str], look: list[Look]
) -> None:
    """Shares as stacked bands that are constant between two edges, each named at its end."""
    x = np.repeat(edge_e, 2)[1:-1]
    top = np.repeat(np.cumsum(np.nan_to_num(share_bs), axis=1), 2, axis=0)
    base = np.hstack([np.zeros((len(top), 1)), top[:, :-1]])
    ends: list[tuple[str, float, Look]] = []
    for i, name in enumerate(names):
        axes.fill_between(
            x,
            base[:, i],
            top[:, i],
            facecolor=look[i].colour,
            hatch=look[i].hatch or None,
            edgecolor=GROUND,
            linewidth=0.35,
        )
        if top[-1, i] > base[-1, i]:
            ends.append((name, float(base[-1, i] + top[-1, i]) / 2, look[i]))
    axes.set_ylim(0, 1)
    axes.set_xlim(edge_e[0], edge_e[-1])
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0%}"))
    name_ends(axes, ends)


def name_ends(axes: Axes, ends: Sequence[tuple[str, float, Look]]) -> None:
    """Names to the right of the panel, near where their lines end and never on one another."""
    if not ends:
        return
    low, high = axes.get_ylim()
    is_log = axes.get_yscale() == "log"

    def height(value: float) -> float:
        if is_log:
            value, bottom, top = np.log(max(value, low)), np.log(low), np.log(high)
            return float((value - bottom) / (top - bottom))
        return (value - low) / (high - low)

    drawn = axes.get_figure()
    assert isinstance(drawn, Figure)
    panels = max(1, len(drawn.axes))
    room_pt = (drawn.get_size_inches()[1] * 72 - 40) / panels - 14
    gap = min((LABEL_PT + 1.6) / max(room_pt, 1.0), 1.0 / len(ends))
    size = min(LABEL_PT, max(4.5, gap * room_pt - 1.0))
    order = sorted(range(len(ends)), key=lambda i: height(ends[i][1]))
    wanted = np.clip([height(ends[i][1]) for i in order], 0.0, 1.0)
    for place, y in zip(order, spread(wanted, gap), strict=True):
        name, value, look = ends[place]
        from_y = float(np.clip(height(value), 0, 1))
        free: dict[str, Any] = {"transform": axes.transAxes, "clip_on": False, "scalex": False, "scaley": False}
        axes.plot([1.005, 1.03], [from_y, y], color=look.colour, linewidth=0.5, **free)
        axes.plot([1.03, 1.08], [y, y], color=look.colour, linestyle=look.line, linewidth=1.6, **free)
        axes.text(1.09, y, shorten(name), transform=axes.transAxes, fontsize=size, va="center", ha="left", color=INK)


def spread(wanted: NDArray[np.float64], gap: float) -> NDArray[np.float64]:
    """The sorted places moved as little as needs be to lie at least `gap` apart, and within 0 and 1 if they fit."""
    num = len(wanted)
    if not num:
        return wanted
    # Places less what lies between them need only be non-decreasing: pool those that are not.
    pools: list[list[float]] = []
    for i, value in enumerate(wanted):
        pools.append([float(value) - i * gap, 1.0])
        while len(pools) > 1 and pools[-2][0] >= pools[-1][0]:
            (a, n), (b, m) = pools[-2:]
            pools[-2:] = [[(a * n + b * m) / (n + m), n + m]]
    level = np.array([mean for mean, n in pools for _ in range(int(n))], dtype=np.float64)
    most = max(1.0 - (num - 1) * gap, 0.0)
    return np.clip(level, 0.0, most) + np.arange(num) * gap


def mark_times(axes: Axes, marks: Mapping[float, str]) -> None:
    """Thin lines where something happened, with a word at the top."""
    for x, word in marks.items():
        axes.axvline(x, color=INK, linewidth=0.8, linestyle=(0, (2, 2)))
        axes.annotate(
            word,
            (x, 1.0),
            xycoords=("data", "axes fraction"),
            xytext=(2, -2),
            textcoords="offset points",
            fontsize=6.5,
            va="top",
            color=INK,
            bbox={"boxstyle": "round,pad=0.15", "facecolor": GROUND, "edgecolor": "none", "alpha": 0.85},
        )


def over_tokens(axes: Axes, label: str, end: float) -> None:
    axes.set_xlim(0, end)
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
    axes.set_xlabel(label)


def over_windows(axes: Axes, end: int) -> None:
    axes.set_xlim(-0.5, max(end, 1) - 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.set_xlabel("window")
