"""A swarm of a few tiny proxies, and what may happen to them."""

import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from mixer.config import load
from mixer.proxies.proxy import Outcome, Task, run_proxy
from mixer.proxies.swarm import run_swarm
from mixer.proxies.tasks import Here, Work
from mixer.run import RunConfig, open_rows

RUNS, WINDOWS, POINTS = 4, 6, 3


def config_of(texts: Path, folder: Path, *overrides: str) -> RunConfig:
    """Proxies of a second each; the run that they are for is larger, and steered by something else."""
    return load(
        RunConfig,
        (),
        [
            f"run.path={folder}",
            f"corpus.path={texts}/train",
            "train.windows=1000",
            "train.threads=1",
            "geometry.window_steps=2",
            "geometry.batch_rows=8",
            "model.dim=64",
            "model.num_layers=4",
            "policy={kind: odm}",
            "rails={floor: 0.1}",
            "evaluation.rows=4",
            "tracker.kind=none",
            f"swarm.runs={RUNS}",
            f"swarm.points={POINTS}",
            "swarm.regmix.minimum=0.01",
            f"swarm.overrides={{model: {{dim: 16, num_layers: 1, num_heads: 2}}, train: {{tokens: {tokens()}}}}}",
            *overrides,
        ],
    )


def tokens() -> int:
    return WINDOWS * 2 * 8 * 32


class Disturbed(Here):
    """One by one, with something happening: `happens(run, kind of record, its window)` sees every record."""

    def __init__(self, happens: Callable[[str, str, int | None], None]) -> None:
        self._happens = happens

    def run(self, work: Work, jobs: Sequence[Task], stop: Path) -> Iterator[tuple[int, Outcome]]:
        def watched(task: Task) -> Outcome:
            def on_record(record):
                self._happens(task.run, record["kind"], record.get("window"))

            return work(task, on_record=on_record)  # type: ignore[call-arg]  # a partial of run_proxy

        yield from super().run(watched, jobs, stop)


def killed_at(run: str, window: int) -> Disturbed:
    """The process is killed, as by nobody's leave, when that run has trained that window."""

    def happens(now: str, kind: str, at: int | None) -> None:
        if (now, kind, at) == (run, "window", window):
            os.kill(os.getpid(), signal.SIGKILL)

    return Disturbed(happens)


def main() -> None:
    """A process to be killed: texts, folder, run, window, overrides."""
    texts, folder, run, window, *overrides = sys.argv[1:]
    config = config_of(Path(texts), Path(folder), *overrides)
    run_swarm(config, open_rows(config), killed_at(run, int(window)), work=run_proxy)


if __name__ == "__main__":
    main()
