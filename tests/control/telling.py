"""Run folders with made-up losses: a real controller and its files, and a journal as a run would write it."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from mixer.control.controller import Controller, ControllerOptions
from mixer.control.rundir import RunDir
from mixer.core.catalog import Catalog, Domain
from mixer.core.mixture import Mixture
from mixer.core.plan import Geometry
from mixer.core.policies import load_policy
from mixer.core.rails import GuardRails
from mixer.core.schedule import pack_d
from mixer.core.signal import Signal, on_grid

NAMES = ("arithmetic", "books", "chat", "code_python", "documentation", "shuffled", "web", "wikipedia")
START = 1_700_000_000.0
GEOMETRY = Geometry(window_steps=4, batch_rows=32, seed=7)
ROW_TOKENS = 64
CONFIG = """run: runs/made
train:
  windows: {windows}
  num_workers: 2
policy:
  kind: odm
  form: paper
"""


def make_catalog(num: int = len(NAMES)) -> Catalog:
    names = NAMES[:num] if num <= len(NAMES) else [f"topic_{i:03d}" for i in range(num)]
    rng = np.random.default_rng(num)
    rows = (600 * np.exp(rng.normal(0.0, 1.0, num))).astype(int) + 40
    return Catalog(
        ROW_TOKENS, "fake", tuple(Domain(n, int(r), f"content {n}") for n, r in zip(names, rows, strict=True))
    )


def loss_of(domain: int, window: int, num: int) -> float:
    """Falls as a power of the window, each domain at its own pace, with some noise."""
    noise = math.sin(12.9898 * domain + 78.233 * window) * 0.05
    return 1.0 + 3.0 * (domain + 1) / num + 4.0 / (1.0 + 0.15 * window * (1 + domain % 3)) ** 0.8 + noise


def make_signal(row: Any) -> Signal:
    num = len(row.catalog)
    rows_d = row.counts_d.copy()
    bad_d = np.zeros_like(rows_d)
    if row.window == 17:  # one bad row, of the domain that has most
        place = int(np.argmax(rows_d))
        bad_d[place], rows_d[place] = 1, rows_d[place] - 1
    tokens_d = rows_d * (row.catalog.row_tokens - 1)
    losses_d = np.array([loss_of(d, row.window, num) for d in range(num)])
    return Signal(
        window=row.window,
        catalog=row.catalog.fingerprint,
        loss_sum_d=on_grid(losses_d * tokens_d),
        tokens_d=tokens_d,
        rows_d=rows_d,
        bad_rows_d=bad_d,
    )


class Teller:
    """Appends records to a journal, with a clock of its own."""

    def __init__(self, folder: Path) -> None:
        self.path, self.now = folder / "journal.jsonl", START

    def tell(self, kind: str, *, after_s: float = 0.0, **values: Any) -> None:
        self.now += after_s
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"kind": kind, "time": self.now, **values}) + "\n")

    def event(self, what: str, text: str = "", *, after_s: float = 0.0, **values: Any) -> None:
        self.tell("event", after_s=after_s, what=what, text=text, **({"window": None, "steps": None} | values))


def make_run(
    folder: Path, windows: int = 60, domains: int = 8, *, trained: int | None = None, evaluated: bool = True
) -> Path:
    """A run of `windows` planned windows, of which `trained` were trained; finished if that is all of them."""
    trained = windows if trained is None else trained
    catalog, geometry = make_catalog(domains), GEOMETRY
    teller_steps, tokens = geometry.window_steps, 0
    with RunDir(folder) as rundir:
        controller = Controller(
            ControllerOptions(
                lag_windows=1, planned_windows=windows, rails=GuardRails(floor=0.1 / domains, max_shift=0.08)
            ),
            load_policy("odm", {"form": "paper"}),
            rundir,
            catalog,
            geometry,
            Mixture.natural(catalog),
            config=CONFIG.format(windows=windows),
        )
        teller = Teller(folder)
        teller.event("begun", f"{windows} windows planned, 2 workers")
        for window in range(trained):
            if window == 30:
                controller.pause_policy("looking at it", window=36)
                controller.resume_policy("done", window=42)
                teller.event("order", "paused: looking at it, from window 36", window=36, steps=window * teller_steps)
            row = controller.row(window)
            signal = make_signal(row)
            tokens += int(signal.tokens_d.sum())
            _tell_window(teller, row, signal, window, tokens)
            if window == 24:
                teller.event(
                    "restart", "rank 1 was lost (SIGKILL); going on from step 96", after_s=6.5, window=24, steps=96
                )
            if window % 16 == 15:
                steps = (window + 1) * teller_steps
                teller.event("checkpoint", f"checkpoints/{steps:09d}", window=window, steps=steps)
            if evaluated and window % 6 == 5:
                _tell_evaluation(teller, row, window, tokens)
            controller.report(signal)
            values = _internals(controller._state, row)  # the test's own look inside; a run's actor knows it
            teller.tell("policy", window=window, values=values)
        if trained == windows:
            teller.event("finished", f"{windows} windows", window=windows - 1, steps=windows * teller_steps)
    return folder


def _tell_window(teller: Teller, row: Any, signal: Signal, window: int, tokens: int) -> None:
    seconds = 2.0 + 0.2 * math.sin(window)
    num = int(signal.tokens_d.sum())
    teller.tell(
        "window",
        after_s=seconds,
        window=window,
        steps=(window + 1) * GEOMETRY.window_steps,
        tokens=tokens,
        seconds=seconds,
        data_wait_s=0.004 * seconds,
        tokens_per_s=num / seconds,
        mfu=None,
        rate=3e-4 * min(1.0, (window + 1) / 8) * (0.55 + 0.45 * math.cos(window / 20)),
        grad_norm=None if window == 5 else 1.0 + 3.0 / (1 + window),
        loss=float(signal.loss_sum_d.sum() / num),
        skipped_steps=0,
        world_size=2,
        loss_sum=pack_d(signal.loss_sum_d, row.catalog),
        tokens_d=pack_d(signal.tokens_d, row.catalog),
        rows_d=pack_d(signal.rows_d, row.catalog),
        bad_rows_d=pack_d(signal.bad_rows_d, row.catalog),
    )
    if signal.bad_rows_d.any():
        place = int(np.argmax(signal.bad_rows_d))
        teller.event("bad_rows", f"1 row of {row.catalog.names[place]} had no finite loss", window=window)


def _tell_evaluation(teller: Teller, row: Any, window: int, tokens: int) -> None:
    sets: dict[str, Any] = {}
    for place, name in enumerate(("code_new", "questions")):
        loss = 1.2 + 0.4 * place + 3.0 / (1 + 0.1 * window)
        sets[f"target/{name}"] = {"loss": loss, "bits_per_byte": loss / math.log(2) / 3.6, "tokens": 4096}
    for place, name in list(enumerate(row.catalog.names))[:8]:
        loss = loss_of(place, window, len(row.catalog)) + 0.1
        sets[f"validation/{name}"] = {"loss": loss, "bits_per_byte": None, "tokens": 4096}
    teller.tell("evaluation", window=window, steps=(window + 1) * GEOMETRY.window_steps, tokens=tokens, sets=sets)


def _internals(state: Any, row: Any) -> dict[str, float]:
    values: dict[str, float] = {}
    for key, value in state.items():
        if value.ndim == 0:
            values[key] = float(value)
        elif value.shape == (len(row.catalog),):
            values |= {
                f"{key.removesuffix('_d')}/{name}": float(v) for name, v in zip(row.catalog.names, value, strict=True)
            }
    return values
