"""The pictures of a run: what was asked and given, what was learnt, how fast, and what the policy thought."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator
from numpy.typing import NDArray

from mixer.control import drawing
from mixer.control.course import Course, evaluations_of, internals_of, shown_domains
from mixer.control.drawing import GROUND, INK, REST, SOFT, Line, Look, Picture
from mixer.control.record import Record
from mixer.control.wording import short, shorten

MOST_INTERNALS = 12
MOST_MAPS = 4
SIGMAS = 2.0  # below so many standard errors an influence is not shown as known
MOST_MARKS = 12  # more would cover the picture
INK_LOOK = Look(INK, "-", "")
REST_LOOK = Look(REST, "-", "")


@dataclass(frozen=True, slots=True, eq=False)
class Scene:
    """A course, and which of its domains are drawn by name, each with its look."""

    record: Record
    course: Course
    shown: tuple[int, ...]
    rest: tuple[int, ...]  # pooled

    @classmethod
    def of(cls, record: Record, course: Course) -> "Scene":
        shown = shown_domains(course)
        return cls(record, course, shown, tuple(sorted(set(range(len(course.names))) - set(shown))))

    @property
    def names(self) -> list[str]:
        return [self.course.names[place] for place in self.shown]

    @property
    def rest_name(self) -> str:
        return f"{len(self.rest)} others"

    @property
    def looks(self) -> list[Look]:
        return drawing.looks(len(self.shown))

    @property
    def x_label(self) -> str:
        return "tokens trained" if self.course.has_tokens else "tokens (rows times their length)"

    def over_tokens(self, axes: Axes) -> None:
        drawing.over_tokens(axes, self.x_label, float(self.course.tokens_e[-1]))

    @property
    def height_in(self) -> float:
        """Room for the names of all series."""
        return max(2.9, 0.75 + 0.125 * (len(self.shown) + bool(self.rest) + 1))

    def lines(self, value_bd: NDArray[np.float64], rest: NDArray[np.float64] | None = None) -> list[Line]:
        x = self.course.after_b
        lines = [
            Line(name, x, value_bd[:, place], look)
            for name, place, look in zip(self.names, self.shown, self.looks, strict=True)
        ]
        return [Line(self.rest_name, x, rest, REST_LOOK), *lines] if rest is not None and self.rest else lines

    def marks(self) -> dict[float, str]:
        """Where the catalog was switched, the run was forked off, or somebody gave an order."""
        schedule, course, origin = self.record.schedule, self.course, self.record.origin
        found = [(window, "catalog") for window in schedule.switches]
        if origin.get("kind") == "fork" and 0 < int(origin["window"]) < len(schedule):
            found.append((int(origin["window"]), "fork"))
        before = ""
        for row in schedule:
            if row.reason != before and row.reason.startswith(("set:", "paused:")):
                found.append((row.window, row.reason.partition(":")[0]))
            before = row.reason
        marks: dict[float, str] = {}
        for window, word in found:
            x = float(course.tokens_e[window // course.stride])
            marks[x] = f"{marks[x]}, {word}" if x in marks else word
        return marks if len(marks) <= MOST_MARKS else {}


def draw(record: Record, course: Course) -> list[Picture]:
    """All pictures for which the record has something to show."""
    scene = Scene.of(record, course)
    parts: tuple[Callable[[Scene], Iterator[Picture]], ...] = (
        weights,
        losses,
        evaluations,
        passes,
        asked_and_given,
        lag,
        internals,
        influence,
        speed,
        optimizer,
    )
    return [picture for part in parts for picture in part(scene)] if len(course) else []


def weights(scene: Scene) -> Iterator[Picture]:
    course = scene.course
    names, look = scene.names, scene.looks
    share_bs = course.weights_bd[:, scene.shown]
    if scene.rest:
        rest = np.nansum(course.weights_bd[:, scene.rest], axis=1, keepdims=True)
        share_bs, names, look = np.hstack([share_bs, rest]), [*names, scene.rest_name], [*look, REST_LOOK]
    drawn, (axes,) = drawing.figure(height_in=max(3.2, scene.height_in))
    drawing.draw_bands(axes, course.tokens_e, share_bs, names, look)
    drawing.mark_times(axes, scene.marks())
    drawing.entitle(axes, "The mixture", "share of the rows")
    axes.grid(visible=False)
    scene.over_tokens(axes)
    trained = scene.record.trained_windows
    if 0 < trained < len(scene.record.schedule) and scene.record.status != "finished":
        at = float(np.interp(trained, np.append(0, course.last_b + 1), course.tokens_e))
        drawing.mark_times(axes, {at: "trained so far"})
    caption = "What share of each window's rows every domain was given to have, window by window."
    if scene.rest:
        caption += f" The largest domains and those that moved most by name, {len(scene.rest)} others in one."
    yield drawing.finish(drawn, "weights", caption)
    if scene.rest:
        drawn, (axes,) = drawing.figure(height_in=scene.height_in)
        drawing.draw_lines(axes, scene.lines(course.weights_bd), from_zero=True)
        drawing.entitle(axes, "Shares of the domains drawn by name", "share of the rows")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.3g}%"))
        scene.over_tokens(axes)
        yield drawing.finish(drawn, "shares", "The same shares, each from zero.")


def losses(scene: Scene) -> Iterator[Picture]:
    course = scene.course
    if not np.isfinite(course.loss_bd).any():
        return
    drawn, (axes,) = drawing.figure(height_in=max(3.2, scene.height_in))
    together = Line("all domains", course.after_b, course.loss_of(), INK_LOOK)
    drawing.draw_lines(axes, [*scene.lines(course.loss_bd, course.loss_of(scene.rest)), together])
    drawing.entitle(axes, "Training loss by domain", "nats a token")
    scene.over_tokens(axes)
    yield drawing.finish(drawn, "losses", "Mean loss of each domain's tokens in the window, before the update.")


def evaluations(scene: Scene) -> Iterator[Picture]:
    sets = evaluations_of(scene.record)
    titles = {"target": "Targets", "validation": "Validation"}
    for kind in dict.fromkeys(name.partition("/")[0] for name in sets):
        mine = {name: one for name, one in sets.items() if name.partition("/")[0] == kind}
        mine = dict(sorted(mine.items(), key=lambda item: -item[1].tokens_n.size)[: drawing.FEW_POINTS])
        labels = {name: name.partition("/")[2] or name for name in mine}
        look = dict(zip(mine, _looks_of(scene, list(labels.values())), strict=True))
        both = any(np.isfinite(one.bits_per_byte_n).any() for one in mine.values())
        height = max(2.9, 0.7 + 0.125 * len(mine)) * (1.6 if both else 1.0)
        drawn, axes = drawing.figure(1 + both, height)
        drawing.draw_lines(axes[0], [Line(labels[n], one.tokens_n, one.loss_n, look[n]) for n, one in mine.items()])
        drawing.entitle(axes[0], f"{titles.get(kind, kind)}: loss", "nats a token")
        if both:
            lines = [Line(labels[n], one.tokens_n, one.bits_per_byte_n, look[n]) for n, one in mine.items()]
            drawing.draw_lines(axes[1], lines)
            drawing.entitle(axes[1], f"{titles.get(kind, kind)}: bits per byte", "bits a byte")
        scene.over_tokens(axes[-1])
        yield drawing.finish(drawn, _file_name(kind), f"Loss on the {kind} sets, on rows that are never trained.")


def _looks_of(scene: Scene, names: Sequence[str]) -> list[Look]:
    """A set named like a domain looks like it; the others take what is left, in order."""
    known = dict(zip(scene.names, scene.looks, strict=True))
    if all(name in known for name in names):
        return [known[name] for name in names]
    return drawing.looks(len(names))


def passes(scene: Scene) -> Iterator[Picture]:
    value_bd = scene.course.passes_bd
    last_d = np.array([column[np.isfinite(column)][-1] for column in value_bd.T])
    positive = last_d[last_d > 0]
    drawn, (axes,) = drawing.figure(height_in=scene.height_in)
    if len(positive) and positive.max() > 50 * np.median(positive):
        axes.set_yscale("log")
        value_bd = np.where(value_bd > 0, value_bd, np.nan)
    drawing.draw_lines(axes, scene.lines(value_bd), named=False)
    if axes.get_yscale() != "log":
        axes.set_ylim(bottom=0)
    else:
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    low, high = axes.get_ylim()
    if low < 1 < high:
        axes.axhline(1, color=SOFT, linewidth=0.8, linestyle=(0, (2, 2)))
    ends = [
        (f"{name}  {_passes(last_d[place])}", float(last_d[place]), look)
        for name, place, look in zip(scene.names, scene.shown, scene.looks, strict=True)
    ]
    drawing.name_ends(axes, ends)
    drawing.entitle(axes, "Passes over each domain", "rows given / rows there are")
    scene.over_tokens(axes)
    caption = "How often each domain's rows were given; no row comes again before its pass is over."
    if scene.rest:
        most = max(scene.rest, key=lambda place: last_d[place])
        caption += f" Among the domains not drawn the most is {_passes(last_d[most])} ({scene.course.names[most]})."
    yield drawing.finish(drawn, "passes", caption)


def _passes(value: float) -> str:
    return f"{value:.2f}" if value >= 0.1 else f"{value:.2g}"


def asked_and_given(scene: Scene) -> Iterator[Picture]:
    course = scene.course
    drawn, (axes,) = drawing.figure(height_in=2.5)
    x = course.after_b
    axes.fill_between(x, course.apart_low_b, course.apart_high_b, color=drawing.COLOURS[4], alpha=0.35, linewidth=0)
    for edge_b in (course.apart_low_b, course.apart_high_b):
        drawing.draw_lines(axes, [Line("", x, edge_b, Look(drawing.COLOURS[0], "-", ""))], named=False)
    for limit in (-1, 1):
        axes.axhline(limit, color=drawing.COLOURS[5], linewidth=1.0, linestyle=(0, (4, 2)))
    axes.set_ylim(-1.25, 1.25)
    drawing.entitle(axes, f"Asked less given: at most {course.largest_apart:.2f} rows apart", "rows")
    scene.over_tokens(axes)
    caption = (
        "The bounds within which every domain's sum of shares lies from its rows; one row (dashed) is the promise."
    )
    if scene.record.windows:
        caption += f" Of {course.trained_d.sum():,} rows trained, {course.differing_rows:,} are not as planned."
    yield drawing.finish(drawn, "asked-given", caption)


def lag(scene: Scene) -> Iterator[Picture]:
    course, record = scene.course, scene.record
    if not np.isfinite(course.lag_b).any():
        return
    drawn, (axes,) = drawing.figure(height_in=2.2)
    edge = np.append(0, course.last_b + 1) - 0.5
    axes.stairs(course.lag_b, edge, color=drawing.COLOURS[0], linewidth=1.4, baseline=None)
    held = [row.window for row in record.schedule if row.reason == "held"]
    if held:
        axes.plot(held, np.zeros(len(held)), "x", color=drawing.COLOURS[5], markersize=4, clip_on=False)
        axes.annotate(f"× held ({len(held)})", (1.0, 1.0), xycoords="axes fraction", ha="right", va="bottom",
                      fontsize=7, color=SOFT)  # fmt: skip
    axes.set_ylim(0, max(float(np.nanmax(course.lag_b)), 1.0) + 0.5)
    axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    drawing.entitle(axes, "Lag", "windows")
    drawing.over_windows(axes, len(scene.record.schedule))
    yield drawing.finish(
        drawn, "lag", "How many windows lie between the last signal that a window's mixture depends on and the window."
    )


def internals(scene: Scene) -> Iterator[Picture]:
    index = {scene.course.names[place]: i for i, place in enumerate(scene.shown)}
    found = list(internals_of(scene.record).items())
    for name, series in found[:MOST_INTERNALS]:
        lines = [
            Line(domain or name, *series[domain], scene.looks[index[domain]] if domain else INK_LOOK)
            for domain in sorted(series, key=lambda one: one or "")
            if domain is None or domain in index
        ]
        if not any(np.isfinite(line.y).any() for line in lines) or all(_is_still(line.y) for line in lines):
            continue  # nothing that ever moved
        alone = len(lines) == 1 and lines[0].name == name
        drawn, (axes,) = drawing.figure(height_in=2.3 if alone else scene.height_in)
        drawing.draw_lines(axes, lines, named=not alone)
        drawing.entitle(axes, f"Policy: {name}")
        drawing.over_windows(axes, len(scene.record.schedule))
        caption = f"{name}, in the policy's state after the signal of each window."
        yield drawing.finish(drawn, f"policy-{_file_name(name)}", caption)


def _is_still(values: NDArray[np.float64]) -> bool:
    return len(values) > 2 and bool((values == values[0]).all())


def influence(scene: Scene) -> Iterator[Picture]:
    maps = [one for one in scene.record.influence if one.get("targets") and one.get("matrix")]
    if not maps:
        return
    chosen = sorted({round(i * (len(maps) - 1) / max(1, MOST_MAPS - 1)) for i in range(MOST_MAPS)})
    for number, one in enumerate(maps[i] for i in chosen):
        names = [name for name in (scene.names if scene.rest else scene.course.names) if name in one["matrix"]]
        targets = [str(target) for target in one["targets"]]
        value_dt = _matrix(one["matrix"], names)
        if not np.isfinite(value_dt).any():
            continue
        error_dt = _matrix(one.get("error", {}), names, like=value_dt)
        with np.errstate(invalid="ignore", divide="ignore"):  # targets have units of their own
            share_dt = value_dt / np.nanmax(np.abs(value_dt), axis=0)
        drawn, (axes,) = drawing.figure(height_in=max(2.4, 1.0 + 0.17 * len(names)))
        mesh = axes.pcolormesh(share_dt, cmap="PuOr_r", vmin=-1, vmax=1, edgecolors=GROUND, linewidth=0.5)
        axes.set_xticks(np.arange(len(targets)) + 0.5, [shorten(target) for target in targets], rotation=30,
                        ha="right")  # fmt: skip
        axes.set_yticks(np.arange(len(names)) + 0.5, [shorten(name) for name in names])
        axes.invert_yaxis()
        axes.grid(visible=False)
        if value_dt.size <= 96:
            for (d, t), share in np.ndenumerate(share_dt):
                unsure = abs(value_dt[d, t]) < SIGMAS * error_dt[d, t]
                colour = SOFT if unsure else "#ffffff" if abs(share) > 0.62 else INK
                axes.text(t + 0.5, d + 0.5, f"({share:.2f})" if unsure else f"{share:.2f}", ha="center", va="center",
                          fontsize=6.5, color=colour)  # fmt: skip
        bar = drawn.colorbar(mesh, ax=axes, pad=0.02, aspect=30)
        bar.ax.tick_params(labelsize=7)
        bar.outline.set_visible(False)  # type: ignore[union-attr]  # a colour bar always has one
        drawing.entitle(axes, f"Influence after window {one.get('window')}", "share of the target's largest")
        caption = (
            "How far a little more of each domain would lower each target's loss, to first order, as a share of what "
            f"moves that target most; more is better. In brackets: within {SIGMAS:g} standard errors of nothing."
        )
        yield drawing.finish(drawn, f"influence-{number}", caption)


def _matrix(
    lines: Mapping[str, Sequence[float | None]], names: Sequence[str], like: NDArray[np.float64] | None = None
) -> NDArray[np.float64]:
    """By name, as an array; of zeros as `like`, where nothing is known."""
    if like is not None and any(name not in lines for name in names):
        return np.zeros_like(like)
    return np.array([[np.nan if v is None else float(v) for v in lines[name]] for name in names])


def speed(scene: Scene) -> Iterator[Picture]:
    course = scene.course
    if not np.isfinite(course.speed_b).any():
        return
    drawn, (above, below) = drawing.figure(2, 3.4, shares=(3, 2))
    drawing.draw_lines(
        above, [Line("", course.after_b, course.speed_b, Look(drawing.COLOURS[0], "-", ""))], named=False
    )
    above.margins(y=0.12)
    above.set_ylim(bottom=0)
    drawing.entitle(above, "Throughput", "tokens a second")
    above.yaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
    drawing.draw_lines(below, [Line("", course.after_b, course.wait_b, Look(drawing.COLOURS[5], "-", ""))], named=False)
    below.margins(y=0.12)
    below.set_ylim(bottom=0)
    drawing.entitle(below, "Share of the time spent waiting for data")
    below.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.3g}%"))
    scene.over_tokens(below)
    yield drawing.finish(
        drawn, "speed", "Targets trained a second over all ranks; and how long ranks stood without rows."
    )


def optimizer(scene: Scene) -> Iterator[Picture]:
    course = scene.course
    if not np.isfinite(course.rate_b).any():
        return
    has_norm = bool(np.isfinite(course.grad_norm_b).any())
    drawn, axes = drawing.figure(1 + has_norm, 3.4 if has_norm else 2.3)
    rate = Line("", course.after_b, course.rate_b, Look(drawing.COLOURS[2], "-", ""))
    drawing.draw_lines(axes[0], [rate], named=False)
    axes[0].set_ylim(bottom=0)
    axes[0].yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
    drawing.entitle(axes[0], "Learning rate")
    if has_norm:
        norm = Line("", course.after_b, course.grad_norm_b, Look(drawing.COLOURS[6], "-", ""))
        drawing.draw_lines(axes[1], [norm], named=False)
        finite = course.grad_norm_b[np.isfinite(course.grad_norm_b)]
        if finite.min() > 0 and finite.max() > 20 * np.median(finite):
            axes[1].set_yscale("log")
        else:
            axes[1].set_ylim(bottom=0)
        drawing.entitle(axes[1], "Gradient norm, before clipping")
    scene.over_tokens(axes[-1])
    yield drawing.finish(
        drawn, "optimizer", "The learning rate" + (" and the norm of the gradient." if has_norm else ".")
    )


def _file_name(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9_-]+", "-", name)
