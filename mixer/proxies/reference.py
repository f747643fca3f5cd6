"""Proposals of a single proxy that a policy steered: the mean of its mixtures over the run.

DoReMi (arXiv 2305.10429) and DoGE (arXiv 2310.15393) train one small model while they move the weights, and propose
the arithmetic mean of the weights over the proxy's updates; those at the end are too noisy. Here such a proxy is a run
like any other, under the policy of that name, and its schedule has its weights:

    mixer train CONFIG configs/policy/doremi.yaml run.path=runs/doremi
    mixer swarm runs/doremi/run.yaml --fit doremi --out mixture.yaml

Both papers' code averages over steps, here over windows, which all have the same number of steps. The windows that
carry the prior because no signal could have reached them yet are none of the policy's updates, and are left out. What
the guard rails made of a policy's answer is what was trained, and is averaged.
"""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mixer import config as configs
from mixer.control.rundir import load_schedule
from mixer.core.errors import ConfigError
from mixer.core.row import ScheduleRow
from mixer.core.schedule import MixtureSchedule
from mixer.run import RunConfig

METHODS = ("doremi", "doge")  # kinds of policies whose mean is what they propose


def mean_weights(rows: Iterable[ScheduleRow]) -> NDArray[np.float64]:
    """Of rows of one catalog; where a weight never changed, that weight to the last bit."""
    weights_wd = np.stack([row.weights_d for row in rows])
    lowest_d, highest_d = weights_wd.min(axis=0), weights_wd.max(axis=0)
    return np.where(lowest_d == highest_d, lowest_d, weights_wd.mean(axis=0))


def trajectory_mean(schedule: MixtureSchedule) -> dict[str, float]:
    """The mean over the windows that were decided by more than the prior, by name; sums to 1."""
    rows = list(schedule)
    decided = [row for row in rows if row.reason != "prior"]
    if not decided:
        raise ConfigError(
            f"a schedule of {len(rows)} windows that all carry the prior has no trajectory. "
            "Train more windows than controller.lag_windows + 1 under a policy that moves the weights."
        )
    last = decided[-1].catalog
    others = next((row for row in decided if row.catalog.fingerprint != last.fingerprint), None)
    if others is not None:
        raise ConfigError(
            f"window {others.window} has another catalog than window {decided[-1].window}: "
            f"{'; '.join(others.catalog.differences(last)[:5])}. A mean needs one; use a proxy that does not switch."
        )
    mean_d = mean_weights(decided)
    return dict(zip(last.names, (mean_d / mean_d.sum()).tolist(), strict=True))


def propose_of(method: str, folder: Path) -> tuple[dict[str, float], str]:
    """What the proxy in a run folder proposes, and a line about it."""
    if not (folder / "schedule.jsonl").exists():
        raise ConfigError(
            f"{folder} is not the folder of a run: there is no schedule.jsonl. Train a proxy under "
            f"policy.kind={method} there, and name its folder."
        )
    config = configs.load(RunConfig, [folder / "run.yaml"])
    if config.policy.get("kind") != method:
        raise ConfigError(
            f"{folder} was run under policy.kind={config.policy.get('kind')}; needed {method}. Name the folder of a "
            f"run under that policy, or --fit {config.policy.get('kind')} if it is one of {', '.join(METHODS)}."
        )
    schedule = load_schedule(folder)
    prior = sum(row.reason == "prior" for row in schedule)
    moved = f"the mean of {len(schedule) - prior} of {len(schedule)} windows of {folder}; {prior} carried the prior"
    return trajectory_mean(schedule), moved
