"""A run at the tracker that others belong to, and that trains nothing itself: a swarm's, for one.

It is created once for a folder. Its name unlike any other is durable in the folder's tracker.json before it is
created, so one whose creation was never answered is found again by it:

    {"format": 1, "where": ..., "run": ..., "run_id": ...}

With another tracker it is created anew, there. As with any tracker nothing is lost with it but what people see: where
it cannot be reached a line in the log says so, and `run_id` is None.
"""

import json
import logging
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mixer.control.description import RUN_TAG, redacted
from mixer.control.fence import write_whole
from mixer.control.tracker import TrackerOptions, connect, experiment_of, uri_of

logger = logging.getLogger(__name__)

FORMAT = 1


class ParentRun:
    """The parent run of one folder. No method raises for the tracker's sake."""

    def __init__(self, options: TrackerOptions, folder: Path, tags: Mapping[str, str]) -> None:
        """Finds the run, or creates it under these tags; it is running from now on."""
        self.run_id: str | None = None
        self._options, self._folder = options, folder.absolute()
        self._uri = uri_of(options, folder)
        self._client: Any = None  # of MLflow
        if options.kind == "none":
            return
        try:
            self._client = connect(self._uri, options.timeout_s)
            self.run_id = self._find(self._client, tags)
            self._client.update_run(self.run_id, status="RUNNING")
        except Exception as error:  # whatever is wrong with a tracker
            self._warn(error)

    def close(self, status: str, files: tuple[Path, ...] = ()) -> None:
        """Says how it ended (FINISHED, FAILED, KILLED), with some files for people."""
        if self._client is None or self.run_id is None:
            return
        try:
            for file in files:
                self._client.log_artifact(self.run_id, str(file))
            self._client.set_terminated(self.run_id, status=status)
        except Exception as error:
            self._warn(error)

    def _find(self, client: Any, tags: Mapping[str, str]) -> str:
        options = self._options
        where = f"{redacted(self._uri)} {options.experiment}"
        known = self._read(where)
        experiment = experiment_of(client, self._uri, options.experiment)
        run = known.get("run") or uuid.uuid4().hex
        self._write(where, run, known.get("run_id"))
        wanted = f"tags.`{RUN_TAG}` = '{run}'"
        found = client.search_runs([experiment], filter_string=wanted, order_by=["attributes.start_time ASC"])
        if found:
            run_id = found[0].info.run_id
        else:
            all_tags = dict(options.tags) | dict(tags) | {RUN_TAG: run, "mixer.folder": str(self._folder)}
            all_tags |= {"mlflow.parentRunId": options.parent} if options.parent else {}
            run_id = client.create_run(
                experiment, tags=all_tags, run_name=options.name or self._folder.name
            ).info.run_id
        self._write(where, run, run_id)
        return run_id

    def _read(self, where: str) -> dict[str, Any]:
        try:
            known = json.loads((self._folder / "tracker.json").read_text("utf-8"))
        except (OSError, ValueError):
            return {}
        return known if known.get("where") == where and known.get("format") == FORMAT else {}

    def _write(self, where: str, run: str, run_id: str | None) -> None:
        value = {"format": FORMAT, "where": where, "run": run, "run_id": run_id}
        write_whole(self._folder / "tracker.json", (json.dumps(value) + "\n").encode())

    def _warn(self, error: Exception) -> None:
        logger.warning(
            "%s does not take the run %s: %s. The work goes on without it; mend tracker.uri and start again to see it.",
            *(redacted(self._uri), self._folder, redacted(f"{type(error).__name__}: {error}")),
        )
