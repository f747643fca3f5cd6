"""The one assembly point: from a config to catalog, schedule, reader.

Nothing is decided here; every part is made by its own module and handed to the next.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from mixer.core.catalog import Catalog
from mixer.core.errors import ConfigError
from mixer.core.mixture import Mixture
from mixer.core.plan import Geometry
from mixer.core.rails import GuardRails, Progress
from mixer.core.schedule import MixtureSchedule
from mixer.data.catalogs import open_catalog
from mixer.data.corpus import CatalogRows, Corpus
from mixer.data.prepare import PrepareOptions
from mixer.data.reader import WindowReader
from mixer.data.storage import Storage


@dataclass(frozen=True, slots=True, kw_only=True)
class CorpusOptions:
    """Which corpus, and which catalog over it."""

    path: str = ""  # folder or URI; empty: the train corpus that this config prepares
    catalog: str | None = None  # a catalog file over it; None: one domain a source
    storage: Storage = field(default_factory=Storage)


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamOptions:
    """A mixture that moves from `start` to `end` in equal steps, for looking at a corpus as a run would."""

    windows: int = 32
    start: dict[str, float] = field(default_factory=dict[str, float])  # by name, any scale; empty: by rows
    end: dict[str, float] = field(default_factory=dict[str, float])  # by name, any scale; empty: all alike

    def __post_init__(self) -> None:
        if self.windows < 1:
            raise ConfigError(f"windows={self.windows}; it must be at least 1.")


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig:
    """Every option of a run. Each section's options stand beside the code they configure."""

    prepare: PrepareOptions | None = None
    corpus: CorpusOptions = field(default_factory=CorpusOptions)
    geometry: Geometry = field(default_factory=Geometry)
    rails: GuardRails = field(default_factory=GuardRails)
    stream: StreamOptions = field(default_factory=StreamOptions)


def open_rows(config: RunConfig) -> CatalogRows:
    """The catalog of a config, and where its rows lie."""
    options, made = config.corpus, config.prepare
    path = options.path or (f"{made.output.rstrip('/')}/train" if made else "")
    if not path:
        raise ConfigError("corpus.path is empty, and nothing is prepared. Set corpus.path to a corpus.")
    corpus = Corpus.open(path, storage=options.storage if options.path or not made else made.storage)
    return open_catalog(corpus, options.catalog) if options.catalog else corpus.by_source


def moving_schedule(catalog: Catalog, geometry: Geometry, rails: GuardRails, options: StreamOptions) -> MixtureSchedule:
    """A whole schedule between two mixtures, within the guard rails."""
    natural = Mixture.natural(catalog)
    start = Mixture.from_dict(catalog, options.start, normalize=True) if options.start else natural
    end = Mixture.from_dict(catalog, options.end, normalize=True) if options.end else Mixture.uniform(catalog)
    rules = rails.bind(catalog, natural)
    slots = geometry.window_slots
    rules.check(Progress.start(catalog, slots, options.windows * slots))
    schedule = MixtureSchedule(catalog, geometry)
    previous = None
    for window in range(options.windows):
        way = window / max(1, options.windows - 1)
        progress = Progress.before(schedule, slots_left=(options.windows - window) * slots)
        proposal = (1 - way) * start.weights_d + way * end.weights_d
        previous = rules.apply(proposal, previous=previous, progress=progress)
        schedule.append(schedule.propose(previous, limit_d=rules.rows_left(progress), reason="moving"))
    return schedule


@dataclass(frozen=True, slots=True)
class Streamed:
    """What one window asked for and what was handed out, in rows."""

    window: int
    asked_d: NDArray[np.float64]
    given_d: NDArray[np.int64]
    tokens: int


def stream(rows: CatalogRows, schedule: MixtureSchedule) -> Iterator[Streamed]:
    """Read a whole schedule, and count what really arrives."""
    geometry = schedule.geometry
    given_d = np.zeros(len(rows.catalog), dtype=np.int64)
    tokens = 0
    for batch in WindowReader(rows, schedule, geometry):
        given_d += np.bincount(batch.domain_index, minlength=len(given_d))
        tokens += int(batch.length.sum())
        if batch.step == geometry.window_steps - 1:
            asked_d = schedule.row(batch.window).weights_d * geometry.window_slots
            yield Streamed(batch.window, asked_d, given_d, tokens)
            given_d, tokens = np.zeros_like(given_d), 0
