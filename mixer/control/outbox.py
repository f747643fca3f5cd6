"""What a tracker has yet to send: read from a run's journal, in its order, from the place noted in tracker.json on.

The journal is the store of what waits, so memory holds one batch however long a tracker is away. tracker.json is
written whole after each acknowledged batch:

    {"format": 1, "where": ..., "run": ..., "run_id": ..., "attempts": ..., "described": ..., "offset": ...,
     "last": {...}, "tokens": {...}, "files": ...}

`where` names the tracker; with another one everything is sent again, there. `run` is a name unlike any other, durable
before a run is created under it, so that a run whose creation was never answered is found again by it. `offset` is a
byte of the journal, `last` the newest window of each kind sent, `tokens` the sums over all records before.
"""

import json
import logging
import uuid
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path

from mixer.control.fence import Fence, write_whole
from mixer.control.journal import ENDINGS, GOES_ON, Once, read_journal
from mixer.control.metrics import Measures, Metric
from mixer.core.errors import MixerError
from mixer.core.schedule import MixtureSchedule

logger = logging.getLogger(__name__)

FORMAT = 1
BATCH_METRICS = 1000  # a batch is complete with the record that reaches one of these
BATCH_RECORDS = 200
_BLOCK_BYTES = 1 << 20
# What an event says about the run as a whole, in MLflow's words; other events say nothing about it.
STATUS = ENDINGS | dict.fromkeys(GOES_ON, "RUNNING")


@dataclass(slots=True)
class Position:
    where: str
    run: str = field(default_factory=lambda: uuid.uuid4().hex)
    run_id: str | None = None
    attempts: int = 0  # to create the run
    described: bool = False  # parameters are sent
    offset: int = 0
    last: dict[str, int] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)
    files: int = -1  # newest window when files were sent last
    format: int = FORMAT

    @property
    def window(self) -> int:
        return self.last.get("window", -1)


@dataclass(frozen=True, slots=True)
class Batch:
    """The metrics of consecutive records, and where the journal goes on behind them."""

    metrics: list[Metric]
    status: tuple[str, int] | None  # and since when, in ms
    offset: int
    last: dict[str, int]
    tokens: dict[str, int]


class Outbox:
    """With the fence of the run, a process that was replaced neither notes nor may send anything."""

    def __init__(
        self, folder: Path, schedule: MixtureSchedule, where: str, *, every_windows: int, fence: Fence | None = None
    ) -> None:
        self.folder = folder
        self._fence = fence
        self._schedule, self._every = schedule, every_windows
        self._journal = folder / "journal.jsonl"
        self._path = folder / "tracker.json"
        self.position = self._read(where)
        self._pending: Batch | None = None
        self._counted = (self.position.offset, self.position.offset, 0)  # from and to a byte, and the lines between

    @property
    def is_lost(self) -> bool:
        """Whether the run is known to be another process's now."""
        return self._fence is not None and self._fence.is_lost

    def require_owner(self) -> None:
        if self._fence is not None:
            self._fence.check()

    def next(self) -> Batch | None:
        """The records behind the position, the same until they are noted; None if there are none."""
        if self._pending is None:
            self._pending = self._gather()
        return self._pending

    def note(self, batch: Batch) -> None:
        """The batch has arrived: go on behind it, also after a restart."""
        self.position.offset, self.position.last, self.position.tokens = batch.offset, batch.last, batch.tokens
        self._pending = None
        try:
            self.write()
        except OSError as error:  # after a restart its records are looked for, and found to have arrived
            logger.warning("%s cannot be written: %s. The run goes on; make room in its folder.", self._path, error)

    def write(self) -> None:
        data = (json.dumps(asdict(self.position), ensure_ascii=False) + "\n").encode()
        with self._fence.writing() if self._fence is not None else nullcontext():
            write_whole(self._path, data)

    @property
    def behind(self) -> int:
        """Records of the journal behind the position."""
        offset = self.position.offset
        begin, end, lines = self._counted
        if begin != offset:
            begin, end, lines = offset, offset, 0
        try:
            with self._journal.open("rb") as file:
                file.seek(end)
                while block := file.read(_BLOCK_BYTES):
                    lines, end = lines + block.count(b"\n"), end + len(block)
        except OSError:
            pass  # then nothing more can be sent from it either
        self._counted = (begin, end, lines)
        return lines

    def _gather(self) -> Batch | None:
        position = self.position
        if self._journal.exists() and self._journal.stat().st_size < position.offset:
            logger.warning("%s is shorter than it was; it is read again for what is new", self._journal)
            position.offset = 0
        once = Once(position.last)
        measures = Measures(self._schedule, every_windows=self._every, tokens=position.tokens)
        metrics: list[Metric] = []
        status: tuple[str, int] | None = None
        offset, num_records = position.offset, 0
        for offset, record in read_journal(self._journal, position.offset):
            num_records += 1
            if not once.is_known(record):
                once.note(record)
                try:
                    metrics += measures.of(record)
                except (KeyError, TypeError, ValueError, AttributeError, OverflowError, MixerError) as error:
                    logger.warning("the record of %s up to byte %d is not tracked: %r", self._journal, offset, error)
            if record["kind"] == "event" and record.get("what") in STATUS:
                status = STATUS[record["what"]], round(record["time"] * 1000)
            if len(metrics) >= BATCH_METRICS or num_records >= BATCH_RECORDS:
                break
        return Batch(metrics, status, offset, once.last, measures.tokens) if num_records else None

    def _read(self, where: str) -> Position:
        try:
            position = Position(**json.loads(self._path.read_text("utf-8")))
        except FileNotFoundError:
            return Position(where)
        except (OSError, ValueError, TypeError) as error:
            logger.warning("%s cannot be read (%s); all is tracked again, as a run of its own", self._path, error)
            return Position(where)
        if position.where != where or position.format != FORMAT:
            logger.info("%s is about %s; everything is sent to %s", self._path, position.where, where)
            return Position(where)
        return position
