"""The pictures of a comparison: losses over tokens, final losses against compute, and final weights."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter

from mixer.control import drawing
from mixer.control.drawing import COLOURS, GROUND, INK, LINES, SOFT, Line, Look, Picture
from mixer.control.wording import short, shorten
from mixer.proxies.verdict import Race

REFERENCE = Look(INK, "-", "")
ZOOM = 3.0  # times the spread of the final losses: how far above them the curves begin to be shown
NUMBERS = 200  # cells up to which a map has them written in


def draw(race: Race, verdict: Mapping[str, Any], watch: Sequence[str] = ()) -> list[Picture]:
    look = _looks(race)
    return [_curves(race, verdict, look), _compute(race, verdict, look), _weights(race, verdict, watch)]


def _looks(race: Race) -> dict[str, Look]:
    """The reference in ink; the others in the colours of domains, in their order."""
    others = [label for label in race.runs if label != race.reference]
    wheel = [Look(COLOURS[i % len(COLOURS)], LINES[(i // len(COLOURS)) % len(LINES)], "") for i in range(len(others))]
    return {race.reference: REFERENCE} | dict(zip(others, wheel, strict=True))


def _curves(race: Race, verdict: Mapping[str, Any], look: Mapping[str, Look]) -> Picture:
    """The whole course above; below the last part, where curves differ by little."""
    height = max(4.8, 1.6 + 0.25 * len(race.runs))
    drawn, (whole, close) = drawing.figure(2, height)
    curves = {label: _filled(one["curve"]["loss"]) for label, one in verdict["contenders"].items()}
    lines = [Line(label, race.tokens_e, curve, look[label]) for label, curve in curves.items()]
    drawing.draw_lines(whole, lines, named=False)
    _bands(whole, race, verdict, look)
    drawing.entitle(whole, "Mean loss on the targets", "nats a token")
    drawing.draw_lines(close, lines, named=False)
    _bands(close, race, verdict, look)
    final = np.array([curve[-1] for curve in curves.values()])
    half = np.array([one["final_loss"]["half"] or 0.0 for one in verdict["contenders"].values()])
    spread = max(float(np.ptp(final)), 1e-3)
    most = float(final.max()) + max(spread * ZOOM, 0.01)
    reach = np.clip(half, 0, spread)  # a wide band of few seeds is cut off rather than the curves made flat
    close.set_ylim(float((final - reach).min()) - 0.15 * spread, most)
    for axes in (whole, close):
        for artist in axes.lines:
            artist.set_clip_on(True)
    drawing.name_ends(close, [(label, float(curve[-1]), look[label]) for label, curve in curves.items()])
    drawing.entitle(close, "The same, closer", "nats a token")
    drawing.over_tokens(close, "tokens trained", race.tokens)
    return drawing.finish(drawn, "compare", "Mean over seeds, with its interval.")


def _bands(axes: Axes, race: Race, verdict: Mapping[str, Any], look: Mapping[str, Look]) -> None:
    low, high = axes.get_ylim()
    for label, one in verdict["contenders"].items():
        curve, half = _filled(one["curve"]["loss"]), _filled(one["curve"]["half"])
        axes.fill_between(race.tokens_e, curve - half, curve + half, color=look[label].colour, alpha=0.13, linewidth=0)
    axes.set_ylim(low, high)


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
        size = 6.3 if len(order) <= 10 else 5.0
        for (d, p), value in np.ndenumerate(value_dp):
            floor = found[order[p]]["weights"][names[d]]["at_floor"]
            axes.text(p + 0.5, d + 0.5, f"{100 * value:.1f}{'*' if floor else ''}", ha="center", va="center",
                      fontsize=size, color="#ffffff" if np.sqrt(value) > 0.6 * top else "#22262b")  # fmt: skip
    bar = drawn.colorbar(mesh, ax=axes, pad=0.02, aspect=30)
    bar.outline.set_visible(False)  # type: ignore[union-attr]  # a colour bar always has one
    bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value * value:.0%}"))
    drawing.entitle(axes, "Final weights in percent, the best policy first (* at its floor)")
    return drawing.finish(drawn, "compare-weights", "Mean over seeds of each domain's weight in the last window.")


def _filled(values: Sequence[float | None]) -> np.ndarray[Any, np.dtype[np.float64]]:
    return np.array([np.nan if value is None else value for value in values], dtype=np.float64)
