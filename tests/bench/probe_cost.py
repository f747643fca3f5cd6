"""What probes of influence cost beside training: `python -m tests.bench.probe_cost [--quick]`.

A small decoder on random rows, one process. For 8, 26 and 64 domains with 4 targets the budget sets the cadence;
then a probe, and the training that pays for it, are timed in turns, so that a slow moment of the machine meets both.
The share of the time is larger than that of the computed rows: parts are smaller than micro-batches, and gradients
are sketched or projected.

Harvested probes compute the targets only, and every step pays for the sketches of its micro-batches, which hold one
domain each.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from mixer.core.plan import Geometry
from mixer.data.reader import Batch
from mixer.training.harvest import Harvest
from mixer.training.influence import InfluenceOptions, Probe, ProbeFacts
from mixer.training.model import Decoder, DecoderOptions
from mixer.training.optimizer import OptimizerOptions, make_optimizer
from mixer.training.step import StepRows
from tests.bench.corpora import random_corpus
from tests.bench.record import record
from tests.bench.training import is_quiet

COMMAND = "python -m tests.bench.probe_cost"
DOMAINS = (8, 26, 64)
TARGETS, VOCABULARY, ROW_TOKENS, MICRO_ROWS = 4, 257, 256, 8
GEOMETRY = Geometry(window_steps=16, batch_rows=64)
BUDGET = InfluenceOptions().budget
TARGET = 2 * BUDGET  # of the time
WAYS: dict[str, dict[str, Any]] = {
    "targets": {"method": "targets"},
    "sketch": {"method": "sketch"},
    "harvest": {"harvest": True},
}


def decoder(quick: bool) -> Decoder:
    return Decoder(DecoderOptions(dim=32 if quick else 128, num_layers=1 if quick else 4, num_heads=4), VOCABULARY)


def micro_batch(domain: int) -> StepRows:
    rng = np.random.default_rng(domain)
    return StepRows.of(
        Batch(
            window=0,
            step=0,
            tokens=rng.integers(0, VOCABULARY, (MICRO_ROWS, ROW_TOKENS)),
            domain_index=np.full(MICRO_ROWS, domain),
            row=np.arange(MICRO_ROWS),
            length=np.full(MICRO_ROWS, ROW_TOKENS),
            starts=np.zeros(MICRO_ROWS, np.int32),
            starts_offsets=np.arange(MICRO_ROWS + 1),
        )
    )


def timed(function: Callable[[], object]) -> float:
    begin = time.perf_counter()
    function()
    return time.perf_counter() - begin


def measure(folder: Path, num_domains: int, way: str, repetitions: int, quick: bool) -> dict[str, float]:
    """Shares of the rows and of the time of the training that pays for a probe."""
    names = {f"domain-{d:02}": 64 for d in range(num_domains)}
    train = random_corpus(folder / f"train-{num_domains}", names, ROW_TOKENS, vocabulary=VOCABULARY)
    targets = random_corpus(
        folder / "targets", {f"target-{t}": 64 for t in range(TARGETS)}, ROW_TOKENS, vocabulary=VOCABULARY
    )
    model = decoder(quick)
    optimizer = make_optimizer(model, OptimizerOptions())
    facts = ProbeFacts(num_parameters=model.num_parameters)
    options = InfluenceOptions(**WAYS[way])
    probe = Probe(train.by_source, targets, options, GEOMETRY, facts)
    harvest = Harvest(model, optimizer, options, num_domains) if options.harvest else None
    rows = micro_batch(0)

    def step(harvested: bool) -> None:
        around = harvest.around(1.0) if harvest is not None and harvested else None
        optimizer.zero_grad()
        for _ in range(2):
            if around is None:
                backward()
            else:
                with around(rows):
                    backward()
        optimizer.step()

    def backward() -> None:
        out: Any = model(rows.tokens_bs, rows.documents, rows.target_bs)
        (out.loss_bs.sum() / rows.num_targets).backward()

    def measured() -> None:
        harvested = None if harvest is None else harvest.close()
        probe.close(probe.measure(model, optimizer, 0, harvested=harvested), 1e-3)

    step(True)
    measured()
    plain_s, step_s, probe_s = [], [], []
    for _ in range(repetitions):
        plain_s.append(timed(lambda: step(False)))
        step_s.append(timed(lambda: step(True)))
        probe_s.append(timed(measured))
    windows = probe.cadence.every_windows
    training_s = median(plain_s) * windows * GEOMETRY.window_slots / (2 * MICRO_ROWS)
    in_steps = (median(step_s) - median(plain_s)) / median(plain_s) if options.harvest else 0.0
    return {
        "every_windows": windows,
        "rows": probe.cost_rows / (windows * GEOMETRY.window_slots),
        "time": median(probe_s) / training_s + in_steps,
        "in_steps": in_steps,
        "probe_s": median(probe_s),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="8 domains, a tiny model, one repetition; records nothing")
    quick = parser.parse_args().quick
    keep = is_quiet() and not quick
    torch.set_num_threads(1)
    met = True
    with tempfile.TemporaryDirectory() as folder:
        for way in WAYS:
            found = {
                str(num): measure(Path(folder), num, way, 1 if quick else 5, quick)
                for num in (DOMAINS[:1] if quick else DOMAINS)
            }
            print(way, json.dumps({num: {k: round(v, 4) for k, v in one.items()} for num, one in found.items()}))
            shares = {num: round(one["time"], 4) for num, one in found.items()}
            here = max(shares.values()) <= TARGET
            met = met and here
            if keep:
                record(
                    figure=f"time of training that probes of influence add, by domains, {way}",
                    value=shares,
                    unit=f"share, at a budget of {BUDGET} of the rows",
                    target=f"<= {TARGET}",
                    met=here,
                    peers={},
                    command=COMMAND,
                )
    return 0 if met else 1


if __name__ == "__main__":
    raise SystemExit(main())
