"""What a preparation says while it runs and when it is done, as text; whoever runs it prints."""

from mixer.data.prepare import Progress, Summary

BAR_CHARS = 24
COLUMNS = ("corpus", "domain", "documents", "tokens", "rows", "padding", "skipped")


class ProgressText:
    """One line a moment: stage, bar, jobs done, tokens, tokens a second and the time that is left."""

    def __init__(self) -> None:
        self._stage = ""
        self._since_s = 0.0
        self._before = 0  # jobs that were done when the stage was first seen

    def line(self, progress: Progress, now_s: float) -> str:
        if progress.stage != self._stage:
            self._stage, self._since_s, self._before = progress.stage, now_s, progress.done
        seconds = now_s - self._since_s
        filled = BAR_CHARS * progress.done // max(1, progress.total)
        bar = "#" * filled + "." * (BAR_CHARS - filled)
        text = f"{progress.stage:<12} [{bar}] {progress.done}/{progress.total}"
        if progress.tokens:
            text += f"  {quantity(progress.tokens)} tokens"
            if seconds > 0:
                text += f"  {quantity(progress.tokens / seconds)}/s"
        done = progress.done - self._before
        if done and progress.done < progress.total:
            text += f"  {duration(seconds / done * (progress.total - progress.done))} left"
        return text


def table(summary: Summary) -> str:
    """One line a domain, and what it took."""
    rows: list[list[str]] = [list(COLUMNS)]
    for corpus, manifest in summary.manifests.items():
        for name, entry in manifest.domains.items():
            skipped = ", ".join(f"{count} {reason}" for reason, count in sorted(entry.skipped.items()))
            padding = f"{100 * entry.padding / (entry.tokens + entry.padding):.2f} %"
            counts = [f"{count:,}" for count in (entry.documents, entry.tokens, entry.rows)]
            rows.append([corpus, name, *counts, padding, skipped])
    widths = [max(len(row[place]) for row in rows) for place in range(len(COLUMNS))]
    lines = [
        "  ".join(
            cell.ljust(width) if place in (0, 1, 6) else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    total_s = sum(summary.seconds.values())
    took = ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in summary.seconds.items() if seconds >= 0.05)
    lines.append("")
    lines.append(f"{total_s:.1f} s ({took}); at most {summary.peak_task_bytes / 1e6:,.0f} MB in a task's process")
    if summary.reused:
        lines.append(f"kept from an earlier run: {', '.join(summary.reused)}")
    return "\n".join(lines)


def quantity(number: float) -> str:
    for limit, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= limit:
            return f"{number / limit:.1f} {unit}"
    return f"{number:.0f}"


def duration(seconds: float) -> str:
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60}:{whole % 60:02d} min"
    return f"{whole // 3600}:{whole // 60 % 60:02d} h"
