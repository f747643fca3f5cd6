import math
import pickle
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mixer.core.blocks import FrozenBlock
from mixer.core.catalog import Catalog, Domain
from mixer.core.errors import ConfigError, InfeasibleError, SignalError
from mixer.core.mixture import Mixture
from mixer.core.rails import BoundRails, GuardRails, Progress
from mixer.core.simplex import Floats


def catalog_of(**rows: int) -> Catalog:
    return Catalog(2048, "byte", tuple(Domain(name, count, f"of {name}") for name, count in rows.items()))


def array(*values: float) -> Floats:
    return np.array(values, dtype=np.float64)


CATALOG = catalog_of(a=1000, b=1000, c=1000, d=1000)
PRIOR = Mixture(array(0.4, 0.3, 0.2, 0.1))
START = Progress.start(CATALOG, window_slots=100)


def apply(
    rails: GuardRails, proposal: Floats, previous: Floats | None = None, progress: Progress = START
) -> list[float]:
    rules = rails.bind(CATALOG, PRIOR)
    before = None if previous is None else Mixture(previous)
    return rules.apply(proposal, previous=before, progress=progress).weights_d.tolist()


def given_rows(*rows: int) -> Progress:
    return Progress(window_slots=100, given_d=np.array(rows, dtype=np.int64))


# Worked by hand


def test_no_rules_no_change() -> None:
    assert apply(GuardRails(), array(0.1, 0.2, 0.3, 0.4)) == [0.1, 0.2, 0.3, 0.4]


def test_proposals_of_any_scale() -> None:
    assert apply(GuardRails(), array(1, 2, 1, 0)) == [0.25, 0.5, 0.25, 0.0]
    assert apply(GuardRails(), array(1e308, 1e308, 0, 0)) == [0.5, 0.5, 0.0, 0.0]


def test_floors_hold_after_normalisation() -> None:
    # max(q, 0.1) / sum, the shortcut, is (0.7, 0.1, 0.1, 0.1) / 1.18, whose least weight is 0.0847.
    w = apply(GuardRails(floor=0.1), array(0.88, 0.06, 0.03, 0.03))
    assert w[1:] == [0.1, 0.1, 0.1]
    assert w[0] == pytest.approx(0.7, abs=1e-15)


def test_named_floors_and_caps_override() -> None:
    rails = GuardRails(floor=0.1, floors={"d": 0.0, "c": 0.3}, cap=0.4, caps={"a": 1.0})
    assert apply(rails, array(1, 0, 0, 0)) == pytest.approx([0.6, 0.1, 0.3, 0.0], abs=1e-15)
    # b has its cap, c its floor; a and d share the rest in the prior's 4 : 1.
    assert apply(rails, array(0, 1, 0, 0)) == pytest.approx([0.24, 0.4, 0.3, 0.06], abs=1e-15)


def test_min_rows_is_a_floor() -> None:
    assert apply(GuardRails(min_rows=20), array(1, 0, 0, 0)) == pytest.approx([0.4, 0.2, 0.2, 0.2], abs=1e-15)


def test_the_change_is_bounded() -> None:
    # One-hot towards d: 0.1 up, and 0.1 down where the proposal is 0, shaped back towards the prior's ratios:
    # (0.25, 0.25, 0.25) down to b * (0.4, 0.3, 0.2) where that is lower: b = 0.8 gives c = 0.16 and b 0.24.
    w = apply(GuardRails(max_shift=0.2), array(0, 0, 0, 1), previous=np.full(4, 0.25))
    assert w == pytest.approx([0.25, 0.24, 0.16, 0.35], abs=1e-15)


def test_the_repeat_cap_is_paced_to_the_end() -> None:
    # 2 epochs of 1,000 rows, 1,400 given: 600 left for 4,000 slots.
    progress = replace(given_rows(1400, 0, 0, 0), slots_left=4000)
    w = apply(GuardRails(max_epochs=2), array(1, 0.2, 0, 0), progress=progress)
    # b takes up to 2,000 of 4,000; the rest, 0.35, goes to the zeros c and d in the prior's 2 : 1.
    assert w == pytest.approx([0.15, 0.5, 0.35 * 2 / 3, 0.35 / 3], abs=1e-15)


def test_the_repeat_cap_counts_what_is_owed() -> None:
    # 10 rows left of which 0.5 is owed: the weight may add 9.5, so that all in all no 11th row is due.
    progress = replace(given_rows(990, 0, 0, 0), carry_d=array(0.5, -0.5, 0, 0), slots_left=100)
    w = apply(GuardRails(epochs={"a": 1}), array(1, 0.01, 0, 0), progress=progress)
    assert w == pytest.approx([0.095, 0.905, 0.0, 0.0], abs=1e-15)


def test_without_a_horizon_a_window_takes_what_is_there() -> None:
    w = apply(GuardRails(max_epochs=1), array(1, 1, 0, 0), progress=given_rows(993, 0, 0, 0))
    assert w == pytest.approx([0.07, 0.93, 0.0, 0.0], abs=1e-15)


def test_epochs_are_taken_as_written() -> None:
    # 0.29 * 100 is 28.999999999999996 in floating point; 29 rows are meant.
    catalog = catalog_of(a=100, b=100)
    rules = GuardRails(epochs={"a": 0.29}).bind(catalog, Mixture.uniform(catalog))
    progress = Progress.start(catalog, window_slots=100, planned_slots=100)
    assert rules.apply(array(1, 0), previous=None, progress=progress).weights_d.tolist() == [0.29, 0.71]
    assert rules.bounds(progress)[1].tolist() == [0.29, 1.0]


def test_the_last_row_and_then_none() -> None:
    rails = GuardRails(epochs={"a": 1})
    assert apply(rails, array(1, 1, 0, 0), progress=given_rows(999, 0, 0, 0))[0] == 0.01
    assert apply(rails, array(1, 1, 0, 0), progress=given_rows(1000, 0, 0, 0))[0] == 0.0


def test_running_out_outranks_floors_and_the_bound_on_change() -> None:
    rails = GuardRails(floor=0.1, max_shift=0.01, max_epochs=1)
    w = apply(rails, np.full(4, 0.25), previous=np.full(4, 0.25), progress=given_rows(1000, 0, 0, 0))
    assert w == pytest.approx([0.0, 1 / 3, 1 / 3, 1 / 3], abs=1e-15)
    least_d, most_d = rails.bind(CATALOG, PRIOR).bounds(given_rows(1000, 950, 0, 0))
    assert (least_d.tolist(), most_d.tolist()) == ([0.0, 0.1, 0.1, 0.1], [0.0, 0.5, 1.0, 1.0])


def test_an_exhausted_domain_gives_its_share_in_the_ratios_of_the_proposal() -> None:
    w = apply(GuardRails(max_epochs=1), array(0.4, 0.3, 0.2, 0.1), progress=given_rows(1000, 0, 0, 0))
    assert w == pytest.approx([0.0, 0.5, 1 / 3, 1 / 6], abs=1e-15)


def test_a_frozen_block_moves_as_one() -> None:
    rails = GuardRails(frozen={"web": FrozenBlock(domains=("a", "c"))})  # by the prior, 2 : 1
    assert apply(rails, array(0, 0.3, 0.6, 0.1)) == pytest.approx([0.4, 0.3, 0.2, 0.1], abs=1e-15)
    rails = GuardRails(frozen={"web": FrozenBlock(domains=("c", "a"), ratios={"a": 1, "c": 3})}, cap=0.3)
    # The block may have 0.3 / 0.75 = 0.4, of which a gets a quarter.
    assert apply(rails, array(1, 1, 1, 1)) == pytest.approx([0.1, 0.3, 0.3, 0.3], abs=1e-15)


def test_a_pinned_block() -> None:
    rails = GuardRails(frozen={"web": FrozenBlock(domains=("a", "b"), ratios={"a": 1, "b": 1}, share=0.5)})
    assert apply(rails, array(0, 0, 3, 1)) == [0.25, 0.25, 0.375, 0.125]
    # and with a ratio of 0
    rails = GuardRails(frozen={"web": FrozenBlock(domains=("a", "b"), ratios={"a": 1, "b": 0}, share=0.5)})
    assert apply(rails, array(0, 0, 3, 1)) == [0.5, 0.0, 0.375, 0.125]


def test_a_block_stops_with_the_first_member_that_runs_out() -> None:
    rails = GuardRails(max_epochs=1, frozen={"web": FrozenBlock(domains=("a", "c"), share=0.6)})
    w = apply(rails, array(1, 1, 1, 1), progress=given_rows(0, 0, 990, 0))
    assert w == pytest.approx([0.2, 0.35, 0.1, 0.35], abs=1e-15)  # c has 10 rows left for 100 slots
    w = apply(rails, array(1, 1, 1, 1), progress=given_rows(0, 0, 1000, 0))
    assert w == [0.0, 0.5, 0.0, 0.5]


def test_a_plan_that_uses_every_row_ends_with_the_last() -> None:
    rules = GuardRails(max_epochs=1).bind(CATALOG, PRIOR)
    progress = Progress.start(CATALOG, window_slots=100, planned_slots=4000)
    rules.check(progress)
    assert rules.apply(array(1, 0, 0, 0), previous=None, progress=progress).weights_d.tolist() == [0.25] * 4


def test_paces_yield_before_a_window_stays_unfilled() -> None:
    # 100 rows of each are left for 1,000 slots: too few for the run, enough for the window.
    rules = GuardRails(max_epochs=1).bind(CATALOG, PRIOR)
    progress = replace(given_rows(900, 900, 900, 900), slots_left=1000)
    with pytest.raises(InfeasibleError, match=r"max_epochs=1 for 4 domains allows 0\.4 < 1 \(1 is 1000 rows\)"):
        rules.check(progress)
    w = rules.apply(array(1, 0, 0, 0), previous=None, progress=progress).weights_d.tolist()
    assert w == pytest.approx([0.7, 0.1, 0.1, 0.1], abs=1e-15)


# Refusals


def web(share: float | None = None) -> dict[str, FrozenBlock]:
    return {"web": FrozenBlock(domains=("a", "b"), ratios={"a": 1, "b": 3}, share=share)}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (lambda: GuardRails(floor=-0.1), r"floor=-0\.1; it needs to be a number from 0 to 1"),
        (lambda: GuardRails(floor=math.nan), r"floor=nan; it needs to be a number from 0 to 1"),
        (lambda: GuardRails(cap=1.5), r"cap=1\.5; it needs to be a number from 0 to 1"),
        (lambda: GuardRails(floors={"x": 2}), r"floors\.x=2; "),
        (lambda: GuardRails(caps={"x": -1}), r"caps\.x=-1; "),
        (lambda: GuardRails(max_shift=2.5), r"max_shift=2\.5; it needs to be a number from 0 to 2"),
        (lambda: GuardRails(max_epochs=0), r"max_epochs=0; it needs to be above 0"),
        (lambda: GuardRails(max_epochs=math.nan), r"max_epochs=nan; it needs to be above 0"),
        (lambda: GuardRails(epochs={"x": -2}), r"epochs\.x=-2; it needs to be above 0"),
        (lambda: GuardRails(min_rows=-1), r"min_rows=-1; it needs to be 0 or more"),
        (lambda: FrozenBlock(domains=()), r"a block without domains"),
        (lambda: FrozenBlock(domains=("a", "a")), r"names a domain twice"),
        (lambda: FrozenBlock(domains=("a",), share=1.5), r"share=1\.5; it needs to be a number from 0 to 1"),
        (
            lambda: FrozenBlock(domains=("a", "b"), ratios={"a": 1}),
            r"ratios for \['a'\], domains \['a', 'b'\]",
        ),
        (lambda: FrozenBlock(domains=("a",), ratios={"a": -1}), r"ratios\.a=-1; "),
        (lambda: FrozenBlock(domains=("a",), ratios={"a": math.inf}), r"ratios\.a=inf; "),
        (lambda: FrozenBlock(domains=("a",), ratios={"a": 0}), r"all ratios of a block are 0"),
        (
            lambda: GuardRails(frozen={"x": FrozenBlock(domains=("a",)), "y": FrozenBlock(domains=("b", "a"))}),
            r"domain 'a' is in two frozen blocks, 'x' and 'y'",
        ),
        (lambda: Progress(window_slots=0, given_d=np.zeros(4, dtype=np.int64)), r"window_slots=0"),
    ],
)
def test_options_out_of_range(options: Callable[[], object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        options()


@pytest.mark.parametrize(
    ("rails", "message"),
    [
        (
            GuardRails(floors={"bb": 0.1}),
            r"floors names the unknown domain 'bb'\. The nearest known one is 'b'\.",
        ),
        (GuardRails(caps={"x": 0.1}), r"caps names the unknown domain 'x'\."),
        (GuardRails(epochs={"x": 1}), r"epochs names the unknown domain 'x'\."),
        (
            GuardRails(frozen={"w": FrozenBlock(domains=("aa",))}),
            r"frozen\.w names .* nearest known one is 'a'",
        ),
    ],
)
def test_unknown_domains(rails: GuardRails, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        rails.bind(CATALOG, PRIOR)


def test_a_prior_without_ratios_for_a_block() -> None:
    with pytest.raises(ConfigError, match=r"frozen\.w: the prior gives its domains nothing"):
        GuardRails(frozen={"w": FrozenBlock(domains=("d",))}).bind(CATALOG, Mixture(array(0.5, 0.5, 0, 0)))
    with pytest.raises(ConfigError, match="a prior of 2 weights for a catalog of 4"):
        GuardRails().bind(CATALOG, Mixture(array(0.5, 0.5)))


@pytest.mark.parametrize(
    ("rails", "message", "rules"),
    [
        (GuardRails(floor=0.3), r"floor=0\.3 for 4 domains asks for 1\.2 > 1", ("floor",)),
        (
            GuardRails(floor=0.2, floors={"a": 0.5}),
            r"floor=0\.2 for 3 domains asks for 0\.6, floors\.a=0\.5 for 1 domain asks for 0\.5; "
            r"together 1\.1 > 1",
            ("floor", "floors.a"),
        ),
        (GuardRails(cap=0.2), r"cap=0\.2 for 4 domains allows 0\.8 < 1", ("cap",)),
        (
            GuardRails(cap=0.2, caps={"b": 0.3}),
            r"cap=0\.2 for 3 domains allows 0\.6, caps\.b=0\.3 for 1 domain allows 0\.3; together 0\.9 < 1",
            ("cap", "caps.b"),
        ),
        (
            GuardRails(floors={"b": 0.6}, cap=0.5),
            r"domain 'b': floors\.b=0\.6 asks for a weight of 0\.6, cap=0\.5 allows 0\.5",
            ("floors.b", "cap"),
        ),
        (
            GuardRails(frozen=web(share=0.1), floors={"a": 0.1}),
            r"block 'web': frozen\.web with floors\.a=0\.1 asks for a weight of 0\.4, "
            r"frozen\.web\.share=0\.1 allows 0\.1\.",
            ("frozen.web", "floors.a", "frozen.web.share"),
        ),
        (
            GuardRails(frozen=web(share=0.8), cap=0.45),
            r"frozen\.web\.share=0\.8 asks for a weight of 0\.8, frozen\.web with cap=0\.45 allows 0\.6\.",
            ("frozen.web.share", "frozen.web", "cap"),
        ),
        (
            GuardRails(frozen=web(), floors={"a": 0.2}, caps={"b": 0.3}),
            r"frozen\.web with floors\.a=0\.2 asks for a weight of 0\.8, "
            r"frozen\.web with caps\.b=0\.3 allows 0\.4\.",
            ("frozen.web", "floors.a", "caps.b"),
        ),
        (
            GuardRails(frozen={"w": FrozenBlock(domains=("a", "b"), ratios={"a": 1, "b": 0})}, floors={"b": 0.1}),
            r"frozen\.w with floors\.b=0\.1 asks for a weight of inf",
            ("frozen.w", "floors.b", "cap"),
        ),
        (
            GuardRails(frozen=web(share=0.8), floor=0.15),
            r"frozen\.web\.share=0\.8 for 1 domain asks for 0\.8, floor=0\.15 for 2 domains asks for 0\.3; "
            r"together 1\.1 > 1",
            ("frozen.web.share", "floor"),
        ),
        (
            GuardRails(frozen=web(share=0.3), cap=0.3),
            r"cap=0\.3 for 2 domains allows 0\.6, frozen\.web\.share=0\.3 for 1 domain allows 0\.3; "
            r"together 0\.9 < 1",
            ("cap", "frozen.web.share"),
        ),
    ],
)
def test_options_that_contradict(rails: GuardRails, message: str, rules: tuple[str, ...]) -> None:
    with pytest.raises(InfeasibleError, match=message) as caught:
        rails.bind(CATALOG, PRIOR)
    assert set(caught.value.rules) == set(rules)
    again = pickle.loads(pickle.dumps(caught.value))
    assert (str(again), again.rules) == (str(caught.value), caught.value.rules)


@pytest.mark.parametrize(
    ("rails", "planned_slots", "message", "rules"),
    [
        (GuardRails(min_rows=30), None, r"min_rows=30 for 4 domains asks for 1\.2 > 1", ("min_rows",)),
        (
            GuardRails(min_rows=30, cap=0.28),
            None,
            r"domain 'a': min_rows=30 asks for a weight of 0\.3, cap=0\.28 allows 0\.28",
            ("min_rows", "cap"),
        ),
        (
            GuardRails(floor=0.1, epochs={"c": 0.5}),
            6000,
            r"floor=0\.1 asks 'c' for 600 of the 6000 rows to come, but epochs\.c=0\.5 leaves it 500\. Lower",
            ("floor", "epochs.c"),
        ),
        (
            GuardRails(frozen=web(share=0.8), max_epochs=1),
            2000,
            r"share=0\.8 asks 'b' for 1200 of the 2000 rows to come, but max_epochs=1 leaves it 1000",
            ("frozen.web.share", "max_epochs"),
        ),
        (
            GuardRails(max_epochs=2),
            8001,
            r"max_epochs=2 for 4 domains allows 0\.999875 < 1 \(1 is 8001 rows\)",
            ("max_epochs",),
        ),
        (
            GuardRails(max_epochs=2, epochs={"a": 1, "b": 1, "c": 1}, cap=0.3),
            5000,
            r"cap=0\.3 for 1 domain allows 0\.3, epochs\.a=1 for 1 domain allows 0\.2, .*together 0\.9 < 1",
            ("epochs.a", "epochs.b", "epochs.c", "cap"),
        ),
    ],
)
def test_plans_that_contradict(
    rails: GuardRails, planned_slots: int | None, message: str, rules: tuple[str, ...]
) -> None:
    bound = rails.bind(CATALOG, PRIOR)
    with pytest.raises(InfeasibleError, match=message) as caught:
        bound.check(Progress.start(CATALOG, window_slots=100, planned_slots=planned_slots))
    assert set(caught.value.rules) == set(rules)


def test_plans_that_just_fit() -> None:
    for rails, planned_slots in (
        (GuardRails(max_epochs=2), 8000),
        (GuardRails(floor=0.1, epochs={"c": 0.6}), 6000),
        (GuardRails(floor=0.25, cap=0.25), None),
        (GuardRails(min_rows=25), 100),
        (GuardRails(max_epochs=math.inf), 10**12),
    ):
        bound = rails.bind(CATALOG, PRIOR)
        bound.check(Progress.start(CATALOG, window_slots=100, planned_slots=planned_slots))


def test_when_every_domain_is_exhausted() -> None:
    rules = GuardRails(max_epochs=1).bind(CATALOG, PRIOR)
    with pytest.raises(InfeasibleError, match="every domain is exhausted: max_epochs=1 for 4 domains allows 0"):
        rules.apply(PRIOR, previous=PRIOR, progress=given_rows(1000, 1000, 1000, 1000))
    with pytest.raises(InfeasibleError, match=r"max_epochs=1 for 4 domains allows 0\.99 < 1 \(1 is 100 rows\)"):
        rules.apply(PRIOR, previous=PRIOR, progress=given_rows(901, 1000, 1000, 1000))


def test_a_cap_that_leaves_no_room_once_others_ran_out() -> None:
    rules = GuardRails(cap=0.3, max_epochs=1).bind(CATALOG, PRIOR)
    with pytest.raises(InfeasibleError, match=r"cap=0\.3 for 3 domains allows 0\.9, max_epochs=1 .* allows 0;"):
        rules.apply(PRIOR, previous=PRIOR, progress=given_rows(1000, 0, 0, 0))


@pytest.mark.parametrize(
    ("proposal", "message"),
    [
        ([math.nan, 1, 1, 1], r"a proposal with nan for 'a'"),
        ([1, math.inf, 1, 1], r"a proposal with inf for 'b'"),
        ([1, 1, -1, 1], r"a proposal with -1\.0 for 'c'"),
        ([0, 0, 0, 0], r"a proposal with zeros only"),
        ([0.5, 0.5], r"a proposal of shape \(2,\) for 4 domains"),
    ],
)
def test_a_proposal_that_is_none_can_be_told_from_rules_that_cannot_be_obeyed(
    proposal: list[float], message: str
) -> None:
    with pytest.raises(SignalError, match=message) as caught:
        apply(GuardRails(), array(*proposal))
    assert not isinstance(caught.value, ConfigError)


def test_arguments_of_another_catalog() -> None:
    rules = GuardRails(max_shift=0.1).bind(CATALOG, PRIOR)
    with pytest.raises(ConfigError, match="a previous mixture of 2 weights for a catalog of 4 domains"):
        rules.apply(PRIOR, previous=Mixture(array(0.5, 0.5)), progress=START)
    with pytest.raises(ConfigError, match="progress of 2 domains for a catalog of 4 domains"):
        rules.apply(PRIOR, previous=None, progress=Progress(window_slots=1, given_d=np.zeros(2, dtype=np.int64)))


# Properties


class Case:
    """Random rules that a known mixture, `inside`, obeys; a proposal; a previous mixture that may not."""

    def __init__(self, seed: int, num_domains: int) -> None:
        random = np.random.default_rng(seed)
        names = [f"d{place:03}" for place in range(num_domains)]
        rows_d = random.integers(1, 10**6, num_domains)
        self.catalog = Catalog(8, "byte", tuple(Domain(n, int(r), "") for n, r in zip(names, rows_d, strict=True)))
        self.prior = Mixture.natural(self.catalog)
        inside_d = random.dirichlet(np.full(num_domains, 0.8)) + 1e-9
        inside_d /= inside_d.sum()
        frozen: dict[str, FrozenBlock] = {}
        cuts = np.sort(random.choice(num_domains + 1, size=min(num_domains + 1, 4), replace=False))
        shuffled: list[int] = random.permutation(num_domains).tolist()
        if random.integers(2):
            for start, stop in pairwise(cuts):
                members = shuffled[start:stop]
                frozen[f"block-{start}"] = FrozenBlock(
                    domains=tuple(names[member] for member in members),
                    ratios={names[member]: float(inside_d[member]) for member in members},
                    share=float(inside_d[members].sum()) if random.integers(4) == 0 else None,
                )
        in_block = {name for block in frozen.values() for name in block.domains}
        tight = 1 - 1e-9  # so that rounding in the making of the case does not make it impossible
        self.window_slots = int(random.integers(1, 5000))
        self.options = GuardRails(
            floor=float(inside_d.min() * tight * random.uniform()) if random.integers(2) else 0.0,
            cap=float(min(1.0, inside_d.max() * (1 + 1e-9) * random.uniform(1, 1.5))) if random.integers(2) else 1.0,
            floors={
                n: float(inside_d[i] * tight * random.uniform()) for i, n in enumerate(names) if random.integers(2)
            },
            caps={
                n: float(min(1.0, inside_d[i] / tight + random.uniform()))
                for i, n in enumerate(names)
                if random.integers(2)
            },
            max_shift=float(random.uniform(0, 2)) if random.integers(2) else None,
            max_epochs=float(random.uniform(1, 8)) if random.integers(2) else None,
            min_rows=int(inside_d.min() * self.window_slots * tight),
            frozen=frozen,
        )
        given_d = random.integers(0, rows_d + 1)
        slots_left = None
        if self.options.max_epochs is not None:
            left_d = np.floor(self.options.max_epochs * rows_d) - given_d
            slots_left = max(1, int(((left_d - 2) / inside_d).min()))
            self.window_slots = min(self.window_slots, slots_left)
            if (left_d < 3).any():
                given_d, slots_left = np.zeros_like(rows_d), 1
                self.window_slots = 1
        self.options = replace(self.options, min_rows=int(inside_d.min() * self.window_slots * tight))
        self.progress = Progress(
            window_slots=self.window_slots,
            given_d=given_d.astype(np.int64),
            carry_d=random.uniform(-0.9, 0.9, num_domains),
            slots_left=slots_left,
        )
        self.inside, self.in_block = Mixture(inside_d), in_block
        proposal_d = random.dirichlet(np.full(num_domains, 0.3)) * random.integers(0, 2, num_domains)
        self.proposal_d = proposal_d if proposal_d.any() else inside_d
        self.previous = Mixture(random.dirichlet(np.full(num_domains, 0.3)))

    def bind(self) -> BoundRails:
        return self.options.bind(self.catalog, self.prior)

    def expected_bounds(self) -> tuple[Floats, Floats]:
        """Bounds of the domains outside of blocks, by the formulae, one domain at a time."""
        options, progress, lo, hi = self.options, self.progress, list[float](), list[float]()
        assert progress.carry_d is not None
        for place, domain in enumerate(self.catalog.domains):
            least = max(options.floors.get(domain.name, options.floor), options.min_rows / progress.window_slots)
            most = options.caps.get(domain.name, options.cap)
            if options.max_epochs is not None:
                left = int(options.max_epochs * domain.num_rows) - int(progress.given_d[place])
                slots = progress.slots_left or progress.window_slots
                most = min(most, max(left - float(progress.carry_d[place]), 0) / slots)
            lo.append(min(least, most))
            hi.append(most)
        return array(*lo), array(*hi)


SIZES = st.one_of(st.integers(1, 12), st.integers(1, 300))
SEEDS = st.integers(0, 2**32)


@settings(deadline=None)
@given(SEEDS, SIZES)
def test_every_rule_holds(seed: int, num_domains: int) -> None:
    case = Case(seed, num_domains)
    rules, options = case.bind(), case.options
    result = rules.apply(case.proposal_d, previous=case.previous, progress=case.progress)
    w = result.weights_d
    assert abs(math.fsum(w) - 1) <= 1e-12
    lo, hi = case.expected_bounds()
    assert (w >= lo).all(), "a floor does not hold to the last bit"
    assert (w <= hi).all(), "a cap does not hold to the last bit"
    if options.max_shift is not None:
        start = rules.apply(case.previous, previous=None, progress=case.progress)
        assert result.shift(start) <= options.max_shift + 1e-12
    for block in options.frozen.values():
        assert block.ratios is not None
        members = [case.catalog.index[name] for name in block.domains]
        ratios = np.array([block.ratios[name] for name in block.domains])
        np.testing.assert_allclose(w[members] * ratios.sum(), w[members].sum() * ratios, rtol=1e-12, atol=1e-300)
        if block.share is not None:
            assert w[members].sum() == pytest.approx(block.share, abs=1e-12)


@settings(deadline=None)
@given(SEEDS, SIZES)
def test_what_obeys_every_rule_comes_back_bit_for_bit(seed: int, num_domains: int) -> None:
    case = Case(seed, num_domains)
    rules = case.bind()
    once = rules.apply(case.proposal_d, previous=case.previous, progress=case.progress)
    assert rules.apply(once, previous=case.previous, progress=case.progress) == once
    if not case.in_block:
        assert rules.apply(case.inside, previous=None, progress=case.progress) == case.inside
        assert rules.apply(case.inside, previous=case.inside, progress=case.progress) == case.inside


@settings(deadline=None)
@given(SEEDS, SIZES)
def test_names_and_order_do_not_matter(seed: int, num_domains: int) -> None:
    case = Case(seed, num_domains)
    order = np.random.default_rng(seed).permutation(num_domains)
    places: list[int] = order.tolist()
    new_names = {case.catalog.names[old]: f"n{new:03}" for new, old in enumerate(places)}
    old, options = case.catalog, case.options
    catalog = Catalog(8, "byte", tuple(Domain(new_names[d.name], d.num_rows, "") for d in old.domains))

    def renamed(values: dict[str, float]) -> dict[str, float]:
        return {new_names[name]: value for name, value in values.items()}

    rails = replace(
        options,
        floors=renamed(options.floors),
        caps=renamed(options.caps),
        frozen={
            name: replace(
                block,
                domains=tuple(new_names[member] for member in block.domains),
                ratios=renamed(block.ratios or {}),
            )
            for name, block in options.frozen.items()
        },
    )
    assert case.progress.carry_d is not None
    progress = replace(case.progress, given_d=case.progress.given_d[order], carry_d=case.progress.carry_d[order])
    here = case.bind().apply(case.proposal_d, previous=case.previous, progress=case.progress)
    there = rails.bind(catalog, Mixture(case.prior.weights_d[order])).apply(
        case.proposal_d[order], previous=Mixture(case.previous.weights_d[order]), progress=progress
    )
    np.testing.assert_allclose(there.weights_d, here.weights_d[order], rtol=1e-11, atol=1e-14)


@settings(deadline=None)
@given(SEEDS, SIZES)
def test_frozen_ratios_are_the_same_bits_in_every_window(seed: int, num_domains: int) -> None:
    case = Case(seed, num_domains)
    rules, random = case.bind(), np.random.default_rng(seed)
    previous = None
    for _ in range(3):
        previous = rules.apply(random.dirichlet(np.ones(num_domains)), previous=previous, progress=case.progress)
        for block in case.options.frozen.values():
            assert block.ratios is not None
            members = [case.catalog.index[name] for name in sorted(block.domains)]
            ratios = np.array([block.ratios[name] for name in sorted(block.domains)])
            ratios = ratios / ratios.max()
            rho = ratios / math.fsum(ratios)
            w = previous.weights_d[members]
            widest = int(np.argmax(rho))
            near = float(w[widest] / rho[widest])
            shares = near + np.arange(-3, 4) * np.spacing(near)
            assert (shares[:, None] * rho == w).all(axis=1).any(), "no W gives these weights as W * rho"


def test_blocks_at_their_bounds_obey_them_and_stay_there_bit_for_bit() -> None:
    """W * rho_i is rounded: the largest W is not always min hi_i / rho_i, and w_i / rho_i is not always W."""
    for seed in range(300):
        random = np.random.default_rng(seed)
        ratios = dict(zip("abc", random.uniform(0.3, 1, 3).tolist(), strict=True))
        bound = float(random.uniform(0.05, 0.3))
        frozen = {"web": FrozenBlock(domains=("a", "b", "c"), ratios=ratios)}
        pinned = {"web": FrozenBlock(domains=("a", "b", "c"), ratios=ratios, share=bound)}
        for rails, proposal_d in (
            (GuardRails(caps=dict.fromkeys("abc", bound), frozen=frozen), array(1, 1, 1, 1e-3)),
            (GuardRails(floors={"b": bound / 3}, frozen=frozen), array(1e-3, 1e-3, 1e-3, 1)),
            (GuardRails(frozen=pinned), array(1, 1, 1, 1)),
        ):
            rules = rails.bind(CATALOG, PRIOR)
            once = rules.apply(proposal_d, previous=None, progress=START)
            w = once.weights_d
            least = np.array([rails.floors.get(name, 0.0) for name in CATALOG.names])
            most = np.array([rails.caps.get(name, 1.0) for name in CATALOG.names])
            assert (w >= least).all() and (w <= most).all(), f"seed {seed}, {rails}: {w}"
            assert rules.apply(once, previous=None, progress=START) == once, f"seed {seed}, {rails}"


def test_a_run_never_passes_its_repeat_caps_and_never_gets_stuck() -> None:
    """Greedy proposals, largest remainders with carries, to the end of a plan that just fits."""
    for seed in range(60):
        random = np.random.default_rng(seed)
        num_domains, window_slots = int(random.integers(2, 9)), int(random.integers(1, 60))
        rows = {f"d{place}": int(random.integers(1, 400)) for place in range(num_domains)}
        catalog = catalog_of(**rows)
        epochs = float(random.choice([0.7, 1.0, 1.5, 2.0]))
        allowed_d = np.array([math.floor(epochs * count + 1e-9) for count in rows.values()])
        num_windows = int(allowed_d.sum()) // window_slots
        if num_windows == 0:
            continue
        slots = num_windows * window_slots
        rules = GuardRails(max_epochs=epochs, max_shift=0.5).bind(catalog, Mixture.natural(catalog))
        horizon = slots if seed % 3 else None
        rules.check(Progress.start(catalog, window_slots, horizon))
        given_d, carry_d = np.zeros(num_domains, dtype=np.int64), np.zeros(num_domains)
        previous = None
        for window in range(num_windows):
            progress = Progress(
                window_slots=window_slots,
                given_d=given_d,
                carry_d=carry_d,
                slots_left=None if horizon is None else slots - window * window_slots,
            )
            proposal_d = random.dirichlet(np.full(num_domains, 0.2)) + 1e-6
            previous = rules.apply(proposal_d, previous=previous, progress=progress)
            owed_d = previous.weights_d * window_slots + carry_d
            counts_d = np.maximum(np.floor(owed_d + 1e-9), 0).astype(np.int64)
            missing = window_slots - int(counts_d.sum())
            counts_d[np.argsort(counts_d - owed_d, kind="stable")[:missing]] += 1
            given_d, carry_d = given_d + counts_d, owed_d - counts_d
            assert (given_d <= allowed_d).all(), f"seed {seed}, window {window}: {given_d} of {allowed_d}"
        assert given_d.sum() == slots
