"""A run in a process and on a Ray of its own: `python -m tests.runs.drive TEXTS FOLDER FAULTS [key=value ...]`.

FAULTS are STEP:RANK:KIND, joined by commas.
With a fault of kind node there are three nodes, two of which are enough.
"""

import logging
import os
import sys
from pathlib import Path
from typing import Any

import ray

from mixer.launch import fit
from mixer.run import open_rows
from tests.runs.making import Fault, config_of, work_with

STORE_BYTES = 100_000_000


def main(texts: str, folder: str, faults: str, *overrides: str) -> int:
    parts = [one.split(":") for one in faults.split(",") if one]
    script = [Fault(int(step), int(rank), kind) for step, rank, kind in parts]
    config = config_of(Path(texts), Path(folder), *overrides)
    if any(fault.kind == "node" for fault in script):
        three_nodes()
    else:
        ray.init(address="local", num_cpus=2, include_dashboard=False, object_store_memory=STORE_BYTES,
                 namespace="mixer", log_to_driver=False, logging_level=logging.ERROR)  # fmt: skip
    finish = fit(config, open_rows(config), work=work_with(script, driver=os.getpid()))
    print(finish.ending)
    return 0


def three_nodes() -> None:
    """One for the driver, and one more than the two workers need then."""
    from ray.cluster_utils import Cluster

    node: dict[str, Any] = {"num_cpus": 1, "object_store_memory": STORE_BYTES}
    cluster = Cluster(initialize_head=True, head_node_args=node | {"include_dashboard": False})
    cluster.add_node(**node)
    cluster.add_node(**node)
    ray.init(address=cluster.address, namespace="mixer", log_to_driver=False, logging_level=logging.ERROR)


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:]))
