"""The pictures of a comparison: losses over tokens, final losses against compute, and final weights."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter
from numpy.typing import NDArray

from mixer.control import drawing
from mixer.control.drawing import COLOURS, GROUND, INK, LINES, SOFT, Line, Look, Picture
from mixer.control.wording import short, shorten
from mixer.proxies.verdict import Race, bands

Floats = NDArray[np.float64]
Course = tuple[Floats, Floats]  # means, and half the widths of their bands
REFERENCE = Look(INK, "-", "")
LATE = 0.15  # of the tokens: from here on curves are shown whole, as they fall steeply before
NUMBERS = 500  # cells up to which a map has them written in


def draw(race: Race, verdict: Mapping[str, Any], watch: Sequence[str] = ()) -> list[Picture]:
    look = _looks(race)
    return [_curves(race, verdict, look), _compute(race, verdict, look), _weights(race, verdict, watch)]


def _looks(race: Race) -> dict[str, Look]:
    """The reference in ink; the others in the colours of domains, in their order."""
    others = [label for label in race.runs if label != race.reference]
    wheel = [Look(COLOURS[i % len(COLOURS)], LINES[(i // len(COLOURS)) % len(LINES)], "") for i in range(len(others))]
    return {race.reference: REFERENCE} | dict(zip(others, wheel, strict=True))


def _curves(race: Race, verdict: Mapping[str, Any], look: Mapping[str, Look]) -> Picture:
    """Losses above; below how far they lie from the reference's, where contenders differ by little."""
    names = 0.5 + 0.125 * len(race.runs)
    drawn, (losses, apart) = drawing.figure(2, 2 * max(2.6, names))
    courses = {label: (_filled(one["curve"]["loss"]), _filled(one["curve"]["half"]))
               for label, one in verdict["contenders"].items()}  # fmt: skip
    _draw(losses, race, courses, look)
    late = race.tokens_e >= LATE * race.tokens
    shown = np.concatenate([curve[late] for curve, _ in courses.values()])
    room = 0.06 * max(float(np.nanmax(shown) - np.nanmin(shown)), 1e-3)
    losses.set_ylim(float(np.nanmin(shown)) - room, float(np.nanmax(shown)) + room)
    _name(losses, courses, look)
    drawing.entitle(losses, "Mean loss on the targets", "nats a token")
    differences = {label: _apart(race, label, verdict["level"]) for label in race.runs}
    _draw(apart, race, differences, look)
    shown = np.concatenate([curve[race.tokens_e > 0] for curve, _ in differences.values()])
    room = max(0.15 * float(np.nanmax(shown) - np.nanmin(shown)), 1e-3)
    apart.set_ylim(float(np.nanmin(shown)) - room, float(np.nanmax(shown)) + room)
    _name(apart, differences, look)
    drawing.entitle(apart, f"Less that of {race.reference}, seed by seed", "nats a token, lower is better")
    drawing.over_tokens(apart, "tokens trained", race.tokens)
    return drawing.finish(drawn, "compare", "Means over seeds, with their intervals.")


def _draw(axes: Axes, race: Race, courses: Mapping[str, Course], look: Mapping[str, Look]) -> None:
    """Lines with bands; what lies beyond the panel is cut off, as intervals of few seeds do."""
    for label, (curve, half) in courses.items():
        axes.fill_between(race.tokens_e, curve - half, curve + half, color=look[label].colour, alpha=0.12, linewidth=0)
    lines = [Line(label, race.tokens_e, curve, look[label]) for label, (curve, _) in courses.items()]
    drawing.draw_lines(axes, lines, named=False)
    for artist in axes.lines:
        artist.set_clip_on(True)


def _name(axes: Axes, courses: Mapping[str, Course], look: Mapping[str, Look]) -> None:
    drawing.name_ends(axes, [(label, float(curve[-1]), look[label]) for label, (curve, _) in courses.items()])


def _apart(race: Race, label: str, level: float) -> Course:
    """The difference from the reference over the seeds that both have."""
    mine, other = race.runs[label], race.runs[race.reference]
    both = [seed for seed in mine.seeds if seed in other.seeds]
    if not both:
        nothing = np.full(len(race.tokens_e), np.nan)
        return nothing, nothing
    loss_se, other_se = (
        np.array([runs.loss_set[runs.seeds.index(seed)].mean(axis=1) for seed in both]) for runs in (mine, other)
    )
    return bands(loss_se - other_se, level)


def _compute(race: Race, verdict: Mapping[str, Any], look: Mapping[str, Look]) -> Picture:
    """A line a contender: its final loss, and to the right of the names what it took in all."""
    found = verdict["contenders"]
    order = sorted(found, key=lambda label: -found[label]["final_loss"]["mean"])
    drawn, (axes,) = drawing.figure(height_in=max(2.6, 1.1 + 0.2 * len(order)))
    ends: list[tuple[str, float, Look]] = []
    for label in order:
        one = found[label]
        x, y, half = one["overhead"]["total_tokens"], one["final_loss"]["mean"], one["final_loss"]["half"]
        equal = one["equal_compute"]["mean"]
        if equal is not None and x > race.tokens:
            axes.plot([x, race.tokens], [y, equal], color=look[label].colour, linewidth=0.7, linestyle=(0, (1, 1.5)))
            axes.plot([race.tokens], [equal], "o", markersize=4, markerfacecolor=GROUND, color=look[label].colour)
        axes.errorbar([x], [y], yerr=None if half is None else [half], fmt="o", markersize=4.5, elinewidth=0.8,
                      alpha=0.9, color=look[label].colour)  # fmt: skip
        ends.append((label, y, look[label]))
    _frame(axes, race, verdict)
    drawing.name_ends(axes, ends)
    drawing.entitle(axes, "Final loss against all that was computed", "nats a token")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
    axes.set_xlabel("tokens in all: training, probes, proxies (hollow: read off at equal compute)")
    return drawing.finish(drawn, "compare-compute", "Final mean loss, with its interval, against total compute.")


def _frame(axes: Axes, race: Race, verdict: Mapping[str, Any]) -> None:
    """Room for all points; intervals of few seeds may reach beyond."""
    found = verdict["contenders"].values()
    points = [one["final_loss"]["mean"] for one in found]
    points += [one["equal_compute"]["mean"] for one in found if one["equal_compute"]["mean"] is not None]
    room = max(0.25 * float(np.ptp(points)), 0.005)
    axes.set_ylim(min(points) - room, max(points) + room)
    most = max(one["overhead"]["total_tokens"] for one in found)
    span = max(most - race.tokens, 0.02 * race.tokens)
    axes.set_xlim(race.tokens - 0.08 * span, race.tokens + 1.08 * span)
    axes.axvline(race.tokens, color=SOFT, linewidth=0.8, linestyle=(0, (2, 2)), zorder=0.5)


def _weights(race: Race, verdict: Mapping[str, Any], watch: Sequence[str]) -> Picture:
    """Policies by domains, the watched domains first; colours by share, so that small weights can be told apart."""
    names = [*watch, *(name for name in race.domains if name not in watch)]
    found = verdict["contenders"]
    order = sorted(found, key=lambda label: found[label]["final_loss"]["mean"])
    value_dp = np.array([[found[label]["weights"][name]["final"] for label in order] for name in names])
    drawn, (axes,) = drawing.figure(height_in=max(2.6, 1.25 + 0.19 * len(names)))
    top = float(np.sqrt(value_dp.max())) or 1.0
    mesh = axes.pcolormesh(np.sqrt(value_dp), cmap="YlGnBu", vmin=0, vmax=top, edgecolors=GROUND, linewidth=0.6)
    axes.set_xticks(np.arange(len(order)) + 0.5, [shorten(label, 14) for label in order], rotation=40, ha="right",
                    rotation_mode="anchor")  # fmt: skip
    axes.set_yticks(np.arange(len(names)) + 0.5, [shorten(name) for name in names])
    axes.invert_yaxis()
    axes.grid(visible=False)
    if value_dp.size <= NUMBERS:
        size = 6.3 if len(order) <= 10 else 4.7
        for (d, p), value in np.ndenumerate(value_dp):
            floor = found[order[p]]["weights"][names[d]]["at_floor"]
            axes.text(p + 0.5, d + 0.5, f"{_percent(value)}{'*' if floor else ''}", ha="center", va="center",
                      fontsize=size, color="#ffffff" if np.sqrt(value) > 0.6 * top else "#22262b")  # fmt: skip
    bar = drawn.colorbar(mesh, ax=axes, pad=0.02, aspect=30)
    bar.outline.set_visible(False)  # type: ignore[union-attr]  # a colour bar always has one
    bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value * value:.0%}"))
    bar.ax.tick_params(labelsize=7.5, colors=SOFT)
    drawing.entitle(axes, "Final weights in percent")
    axes.set_xlabel("policies, the lowest final loss first; * at the floor")
    return drawing.finish(drawn, "compare-weights", "Mean over seeds of each domain's weight in the last window.")


def _percent(share: float) -> str:
    return f"{100 * share:.1f}" if share < 0.0995 else f"{100 * share:.0f}"


def _filled(values: Sequence[float | None]) -> Floats:
    return np.array([np.nan if value is None else value for value in values], dtype=np.float64)
