"""A run through everything that can befall it, against one that nothing befell.

The machine drives schedule, plan and cursor the way a controller and its workers do: rows are
decided, written as text, trained step by step by some number of ranks; there are checkpoints,
crashes that tear the text at any byte, restarts from an older cursor with other rank counts, new
catalogs, domains that run dry. Beside it a naive model keeps plain lists: every pass of every domain
written out, dealt into slots one at a time. The rows trained must be the model's, in order, always.
"""

import json
import math
from collections import Counter, defaultdict

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from mixer.core.catalog import Catalog, Domain
from mixer.core.errors import InfeasibleError
from mixer.core.mixture import Mixture
from mixer.core.permute import key_of, mix, shuffle
from mixer.core.plan import GOLDEN, Cursor, Geometry, Plan
from mixer.core.schedule import LineWriter, MixtureSchedule, read
from tests.core import moves

Identity = tuple[str, str]  # a domain's name and content
Place = tuple[str, str, int]  # and a row of it
AHEAD = 3  # windows decided before they are trained
MOST_WINDOWS = 60


class NaiveRun:
    """The undisturbed run, one row at a time, from names, counts and whole passes."""

    def __init__(self, geometry: Geometry) -> None:
        self.geometry = geometry
        self.slots: list[Place] = []
        self.given: Counter[Identity] = Counter()
        self.shares: defaultdict[Identity, list[float]] = defaultdict(list)
        self.passes: dict[tuple[Identity, int], list[int]] = {}

    def take(self, domain: Domain) -> Place:
        """The next row of a domain."""
        identity = (domain.name, domain.content)
        number, place = divmod(self.given[identity], domain.num_rows)
        if (identity, number) not in self.passes:
            key = mix(mix(np.array([key_of("domain", domain.name)], dtype=np.uint64), self.geometry.seed), number)
            size = domain.num_rows
            self.passes[identity, number] = shuffle(
                np.arange(size),
                np.zeros(size, dtype=np.int64),
                np.array([size]),
                key,
                self.geometry.block_rows,
                self.geometry.group_blocks,
            ).tolist()
        self.given[identity] += 1
        return (*identity, self.passes[identity, number][place])

    def window(self, window: int, catalog: Catalog, weights: dict[str, float], counts: dict[str, int]) -> None:
        live = [domain for domain in catalog.domains if counts[domain.name]]
        keys = {}
        for domain in live:
            key = mix(np.array([key_of("domain", domain.name)], dtype=np.uint64), self.geometry.seed)
            keys[domain.name] = int(mix(key, -window - 1)[0])
        ranked = sorted(live, key=lambda domain: (counts[domain.name], keys[domain.name]))
        begin = float(min(keys.values())) / 2**64
        due = []
        for rank, domain in enumerate(ranked):
            phase = (rank * GOLDEN + begin) % 1.0
            due += [((k + phase) / counts[domain.name], domain.name) for k in range(counts[domain.name])]
        by_name = {domain.name: domain for domain in catalog.domains}
        for _, name in sorted(due):  # names are in catalog order
            self.slots.append(self.take(by_name[name]))
        for domain in catalog.domains:
            self.shares[domain.name, domain.content].append(weights[domain.name] * self.geometry.window_slots)


class RunMachine(RuleBasedStateMachine):
    @initialize(
        seed=st.integers(0, 1 << 32),
        num=st.integers(1, 6),
        most=st.sampled_from([1, 3, 20, 200]),
        geometry=st.builds(
            Geometry,
            window_steps=st.integers(1, 3),
            batch_rows=st.integers(8, 12),
            seed=st.integers(0, 3),
            block_rows=st.sampled_from([1, 4, 7]),
            group_blocks=st.sampled_from([1, 2, 64]),
        ),
        epochs=st.sampled_from([None, None, 1, 3]),
    )
    def begin(self, seed: int, num: int, most: int, geometry: Geometry, epochs: int | None) -> None:
        self.rng = np.random.default_rng(seed)
        self.geometry, self.epochs = geometry, epochs
        self.fresh = 0
        catalog = Catalog(2048, "byte", tuple(self.new_domain(f"d{i}", most) for i in range(num)))
        self.catalogs = [catalog]
        self.schedule = MixtureSchedule(catalog, geometry)
        self.writer = LineWriter.begin(self.schedule)
        self.disk = self.writer.header.encode()
        self.decisions: list[tuple[Catalog, Mixture, np.ndarray | None]] = []
        self.model = NaiveRun(geometry)
        self.cursor = self.saved = Cursor().to_dict()
        self.world_size = 1
        self.trained: list[list[Place]] = []  # the batch of each step, as first trained
        self.switch_to: Catalog | None = None
        self.up = True

    def new_domain(self, name: str, most: int) -> Domain:
        self.fresh += 1
        return Domain(name, int(self.rng.integers(1, most + 1)), f"content {self.fresh}")

    @property
    def steps(self) -> int:
        return Cursor.from_dict(self.cursor).steps(self.geometry)

    # ---- the controller ------------------------------------------------------------------------------

    @precondition(lambda self: self.up and len(self.schedule) < min(MOST_WINDOWS, self.cursor["window"] + AHEAD))
    @rule(move=st.sampled_from(moves.ALL))
    def decide_ahead(self, move: moves.Move) -> None:
        self.decide(move)

    def decide(self, move: moves.Move) -> bool:
        catalog, self.switch_to = self.switch_to, None
        looked_at = self.schedule
        if catalog is not None:  # a move looks at the mixture before, which has another shape now
            looked_at = MixtureSchedule(catalog, self.geometry)
        mixture, limit_d = move(looked_at, self.rng), self.limits(catalog or self.schedule.last_catalog)
        try:
            row = self.schedule.propose(mixture, catalog=catalog, limit_d=limit_d)
        except InfeasibleError:
            assert limit_d is not None
            assert np.maximum(limit_d, 0)[mixture.weights_d > 0].sum() < self.geometry.window_slots
            self.switch_to = catalog
            return False
        if limit_d is not None:
            assert (row.counts_d <= limit_d).all()
        self.schedule.append(row)
        self.disk += self.writer.lines(row).encode()  # written first, then shown
        self.decisions.append((row.catalog, mixture, limit_d))
        names = row.catalog.names
        weights, counts = row.weights_d.tolist(), row.counts_d.tolist()
        self.model.window(
            row.window,
            row.catalog,
            dict(zip(names, weights, strict=True)),
            dict(zip(names, counts, strict=True)),
        )
        return True

    def limits(self, catalog: Catalog) -> np.ndarray | None:
        if self.epochs is None:
            return None
        return np.array([self.epochs * d.num_rows - self.model.given[d.name, d.content] for d in catalog.domains])

    # ---- catalogs ------------------------------------------------------------------------------------

    def change(self, *, out: set[str], new: list[Domain]) -> None:
        now = self.switch_to or self.schedule.last_catalog
        domains = [domain for domain in now.domains if domain.name not in out]
        names = {domain.name for domain in domains}
        domains += [domain for domain in new if domain.name not in names]
        if domains:
            self.switch_to = Catalog(2048, "byte", tuple(domains))
            self.catalogs.append(self.switch_to)

    def some_name(self) -> str:
        names = (self.switch_to or self.schedule.last_catalog).names
        return names[int(self.rng.integers(len(names)))]

    @precondition(lambda self: self.up)
    @rule(what=st.sampled_from(["add", "remove", "split", "select again"]), most=st.sampled_from([1, 5, 100]))
    def change_the_catalog(self, what: str, most: int) -> None:
        name = self.some_name()
        if what == "add":
            self.change(out=set(), new=[self.new_domain(f"d{self.rng.integers(12)}", most)])
        elif what == "remove":
            self.change(out={name}, new=[])
        elif what == "split":
            self.change(out={name}, new=[self.new_domain(f"{name}/{part}", most) for part in ("high", "low")])
        else:
            self.change(out={name}, new=[self.new_domain(name, most)])

    @precondition(lambda self: self.up)
    @rule(back=st.integers(0, 100))
    def return_to_an_older_catalog(self, back: int) -> None:
        self.switch_to = self.catalogs[back % len(self.catalogs)]

    # ---- the workers ---------------------------------------------------------------------------------

    @precondition(lambda self: self.up)
    @rule(steps=st.integers(1, 12), move=st.sampled_from(moves.ALL))
    def train(self, steps: int, move: moves.Move) -> None:
        feed = read(self.disk).schedule  # workers read what is written
        for _ in range(steps):
            cursor = Cursor.from_dict(self.cursor)
            if cursor.window >= len(feed):
                if cursor.window >= len(self.schedule) and not self.decide(move):
                    return
                feed = read(self.disk).schedule
            window = Plan(feed, self.geometry).window(cursor.window)
            batch: list[Place] = []
            for rank in range(self.world_size):
                part = window.slots(cursor.step, rank, self.world_size)
                for place, row in zip(window.domain_n[part].tolist(), window.row_n[part].tolist(), strict=True):
                    domain = window.catalog.domains[place]
                    batch.append((domain.name, domain.content, row))
            begin = self.steps * self.geometry.batch_rows
            assert batch == self.model.slots[begin : begin + self.geometry.batch_rows]
            if self.steps < len(self.trained):
                assert batch == self.trained[self.steps]  # trained again after a crash, exactly
            else:
                self.trained.append(batch)
            self.cursor = cursor.after(1, self.geometry).to_dict()

    @precondition(lambda self: self.up)
    @rule()
    def checkpoint(self) -> None:
        self.saved = json.loads(json.dumps(self.cursor))

    # ---- what befalls them ---------------------------------------------------------------------------

    @precondition(lambda self: self.up)
    @rule(torn=st.floats(0, 1), zeros=st.sampled_from([0, 0, 0, 7]))
    def crash(self, torn: float, zeros: int) -> None:
        """In the middle of writing a row that nobody has seen."""
        mixture = Mixture.uniform(self.switch_to or self.schedule.last_catalog)
        unseen = self.writer.lines(self.schedule.propose(mixture, catalog=self.switch_to)).encode()
        self.disk += unseen[: int(torn * (len(unseen) - 1))] + b"\0" * zeros
        self.up = False
        del self.schedule, self.writer
        self.switch_to = None

    @precondition(lambda self: not self.up)
    @rule(world_size=st.sampled_from([1, 2, 3, 4, 6, 8]))
    def restore(self, world_size: int) -> None:
        found = read(self.disk)
        self.disk = self.disk[: found.size]
        self.schedule, self.writer = found.schedule, found.writer
        self.schedule.check_resume(self.schedule.last_catalog, self.geometry)
        assert len(self.schedule) == len(self.decisions)  # nothing that was shown is lost
        self.cursor, self.world_size, self.up = dict(self.saved), world_size, True

    @precondition(lambda self: self.up)
    @rule(world_size=st.sampled_from([1, 2, 3, 4, 6, 8]))
    def resize(self, world_size: int) -> None:
        self.world_size = world_size

    # ---- what holds at all times -----------------------------------------------------------------------

    @invariant()
    def counts_follow_shares(self) -> None:
        for identity, shares in self.model.shares.items():
            assert abs(math.fsum(shares) - self.model.given[identity]) < 1.0, identity

    @invariant()
    def rows_come_equally_often(self) -> None:
        """Every row of a domain was trained in all whole passes, and some once more: exactly once a pass."""
        times: defaultdict[Identity, Counter[int]] = defaultdict(Counter)
        for batch in self.trained:
            for name, content, row in batch:
                times[name, content][row] += 1
        sizes = {(d.name, d.content): d.num_rows for catalog in self.catalogs for d in catalog.domains}
        for identity, counter in times.items():
            whole, more = divmod(counter.total(), sizes[identity])
            assert set(counter.values()) <= {whole, whole + 1}
            assert sum(count == whole + 1 for count in counter.values()) == more
            if self.epochs is not None:
                assert whole + (more > 0) <= self.epochs

    def teardown(self) -> None:
        """Decided without any crash, the same decisions make the same text, byte for byte."""
        if not hasattr(self, "model"):
            return
        if not self.up:
            self.restore(1)
        undisturbed = MixtureSchedule(self.schedule.catalog, self.geometry)
        for catalog, mixture, limit_d in self.decisions:
            undisturbed.append(undisturbed.propose(mixture, catalog=catalog, limit_d=limit_d))
        assert undisturbed.to_text().encode() == self.disk
        self.cursor = Cursor().to_dict()
        self.train(len(self.schedule) * self.geometry.window_steps, moves.constant)  # and all of it can be replayed
        assert [place for batch in self.trained for place in batch] == self.model.slots


def test_a_run_survives_everything() -> None:
    run_state_machine_as_test(RunMachine, settings=settings(stateful_step_count=50))
