import hashlib
import json
import math
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

from mixer.core import plan
from mixer.core.catalog import Catalog, Domain
from mixer.core.errors import ConfigError, ResumeError, ScheduleError
from mixer.core.mixture import Mixture
from mixer.core.plan import Geometry
from mixer.core.row import ScheduleRow
from mixer.core.schedule import LineWriter, MixtureSchedule, read
from tests.core.making import (
    catalog_of,
    catalog_of_sizes,
    mixture_of,
    pairs,
    relative,
    rows_of,
    schedule_of,
    windows_of,
)

GEOMETRY = Geometry(window_steps=2, batch_rows=4, seed=5)
CATALOG = catalog_of(books=10, code=30, web=60)
KEPT = Path(__file__).parents[1] / "golden" / "schedule-1.jsonl"


def wandering(catalog: Catalog, windows: int, geometry: Geometry = GEOMETRY) -> MixtureSchedule:
    rng = np.random.default_rng(len(catalog))
    return schedule_of(catalog, geometry, [relative(rng.random(len(catalog)) ** 3) for _ in range(windows)])


def assert_same(found: MixtureSchedule, wanted: MixtureSchedule) -> None:
    """Equal to the last bit."""
    assert (found.catalog, found.geometry, found.plan_version) == (
        wanted.catalog,
        wanted.geometry,
        wanted.plan_version,
    )
    assert found.switches == wanted.switches
    assert len(found) == len(wanted)
    for a, b in zip(found, wanted, strict=True):
        assert (a.window, a.signals_through, a.reason) == (b.window, b.signals_through, b.reason)
        assert a.catalog.fingerprint == b.catalog.fingerprint
        for key in ("weights_d", "counts_d", "offsets_d", "carry_d"):
            assert getattr(a, key).dtype == getattr(b, key).dtype
            assert getattr(a, key).tobytes() == getattr(b, key).tobytes()


# ---- rows --------------------------------------------------------------------------------------------


def test_three_windows_by_hand() -> None:
    schedule = schedule_of(CATALOG, GEOMETRY, [mixture_of(0.1, 0.3, 0.6)] * 3)  # shares 0.8, 2.4, 4.8
    assert [row.counts_d.tolist() for row in schedule] == [[1, 2, 5], [1, 3, 4], [1, 2, 5]]
    # The third window owes 0.4, 2.2, 5.4. The floors 0, 2, 5 leave one row; the tie goes in catalog order.
    assert [row.offsets_d.tolist() for row in schedule] == [[0, 0, 0], [1, 2, 5], [2, 5, 9]]
    np.testing.assert_allclose(schedule.row(1).carry_d, [-0.2, 0.4, -0.2], rtol=0, atol=1e-12)
    assert schedule.row(2).next_offsets_d.tolist() == [3, 7, 14]
    assert [row.window for row in schedule] == [0, 1, 2]
    assert schedule.row(2).mixture == mixture_of(0.1, 0.3, 0.6)


def test_windows_that_are_not_there_are_refused() -> None:
    schedule = schedule_of(CATALOG, GEOMETRY, [relative([1, 1, 1])])
    for window in (-1, 1):
        with pytest.raises(ScheduleError, match=f"window {window} is not in the schedule, which has 1. It ends here"):
            schedule.row(window)


def test_proposing_writes_nothing_and_gives_arrays_nobody_can_change() -> None:
    schedule = MixtureSchedule(CATALOG, GEOMETRY)
    row = schedule.propose(relative([1, 2, 3]), signals_through=-1, reason="held")
    assert len(schedule) == 0
    assert row.reason == "held"
    for key in ("weights_d", "counts_d", "offsets_d", "carry_d"):
        with pytest.raises(ValueError, match="read-only"):
            getattr(row, key)[0] = 1
    assert schedule.append(row) is row
    assert len(schedule) == 1


def test_a_mixture_of_another_size_is_refused() -> None:
    with pytest.raises(ScheduleError, match="a mixture of 2 weights for a catalog of 3 domains"):
        MixtureSchedule(CATALOG, GEOMETRY).propose(mixture_of(0.5, 0.5))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"window": 2}, "row of window 2 does not follow from the one before it: window 1 comes next"),
        ({"counts_d": np.array([1, 3, 5])}, "its counts sum to 9, a window has 8 slots"),
        ({"counts_d": np.array([-1, 3, 6])}, "its counts sum to 8, a window has 8 slots"),
        ({"offsets_d": np.array([1, 2, 6])}, "offset of 'web' is 6, 5 would follow"),
        ({"offsets_d": np.array([1, 2])}, "2 offsets for 3 domains"),
        ({"carry_d": np.array([0.0, 0.0, 0.0])}, "carry of 'books' is 0.0, -0.1999"),
        ({"counts_d": np.array([2, 3, 3])}, "counts and weights are a row or more apart"),
        ({"signals_through": 1}, "it depends on signals through window 1"),
        ({"signals_through": -2}, "it depends on signals through window -2"),
    ],
)
def test_a_row_that_does_not_follow_is_refused(change: dict[str, object], message: str) -> None:
    schedule = schedule_of(CATALOG, GEOMETRY, [mixture_of(0.1, 0.3, 0.6)])
    row = replace(schedule.propose(mixture_of(0.1, 0.3, 0.6)), **change)
    with pytest.raises(ScheduleError, match=message):
        schedule.append(row)
    assert len(schedule) == 1


def test_weights_that_are_no_mixture_are_refused_in_a_row() -> None:
    schedule = MixtureSchedule(CATALOG, GEOMETRY)
    row = schedule.propose(relative([1, 1, 1]))
    with pytest.raises(ConfigError, match="weights sum to"):
        schedule.append(replace(row, weights_d=row.weights_d * 1.01))
    with pytest.raises(ConfigError, match="not finite"):
        schedule.append(replace(row, weights_d=row.weights_d * math.nan))


def test_weights_that_sum_to_one_only_nearly_do_not_drift() -> None:
    """Bound as they are they would lose 1e-9 x 65,536 rows a window, and a whole row after 15,000."""
    schedule = MixtureSchedule(CATALOG, Geometry(window_steps=64, batch_rows=1024))
    schedule.extend(mixture_of(0.333333333, 0.333333333, 0.333333333), 1000)
    assert abs(schedule.row(999).next_carry_d.sum()) < 1e-6
    np.testing.assert_allclose(schedule.row(999).weights_d, 1 / 3, rtol=1e-15)


def test_weights_that_sum_to_one_are_bound_to_the_last_bit() -> None:
    for seed in range(200):
        weights_d = np.random.default_rng(seed).random(50)
        mixture = Mixture(weights_d / math.fsum(weights_d))
        assert MixtureSchedule(catalog_of_sizes([9] * 50), GEOMETRY).propose(mixture).mixture == mixture, f"seed {seed}"


def test_limits_are_handed_on_and_what_they_change_is_recorded() -> None:
    schedule = MixtureSchedule(CATALOG, GEOMETRY)
    row = schedule.append(schedule.propose(mixture_of(0.5, 0.25, 0.25), limit_d=np.array([2, 100, 100])))
    assert row.counts_d.tolist() == [2, 3, 3]
    np.testing.assert_allclose(row.weights_d, [0.25, 0.375, 0.375], rtol=0, atol=1e-12)


def test_a_domain_gives_exactly_its_rows_under_limits() -> None:
    schedule = MixtureSchedule(CATALOG, GEOMETRY)
    given_d = np.zeros(3, dtype=np.int64)
    for _ in range(12):
        row = schedule.append(schedule.propose(mixture_of(0.4, 0.3, 0.3), limit_d=CATALOG.num_rows_d - given_d))
        given_d = row.next_offsets_d
    assert given_d[0] == 10
    assert sorted(rows_of(schedule, 0)) == list(range(10))
    assert (given_d <= CATALOG.num_rows_d).all()


# ---- catalog switches ----------------------------------------------------------------------------------

AFTER = Catalog(
    2048,
    "byte",
    (
        Domain("books", 10, "of books"),  # stays
        Domain("code", 25, "a selection"),  # re-selected
        Domain("web/high", 20, "half of web"),  # web split
        Domain("web/low", 40, "the other half"),
        Domain("wiki", 5, "of wiki"),  # added
    ),
)


def test_untouched_domains_keep_place_and_order_over_a_switch() -> None:
    even = mixture_of(0.25, 0.25, 0.5)
    schedule = schedule_of(CATALOG, GEOMETRY, [even] * 3)
    carry_d = schedule.row(2).next_carry_d
    schedule.append(schedule.propose(relative([1, 1, 1, 1, 1]), catalog=AFTER))
    assert schedule.row(3).offsets_d.tolist() == [6, 0, 0, 0, 0]
    assert schedule.row(3).carry_d.tolist() == [carry_d[0], 0, 0, 0, 0]
    assert schedule.switches == [3]
    assert schedule.last_catalog == AFTER
    schedule.extend(relative([1, 1, 1, 1, 1]), 3)  # goes on under the new catalog without saying so
    undisturbed = rows_of(schedule_of(CATALOG, GEOMETRY, [even] * 9), 0)
    given = [
        row for window in windows_of(schedule) for place, row in pairs(window) if window.catalog.names[place] == "books"
    ]
    assert len(given) > 10
    assert given == undisturbed[: len(given)]


def test_a_domain_that_returns_goes_on_where_it_was() -> None:
    schedule = schedule_of(CATALOG, GEOMETRY, [mixture_of(0.3, 0.3, 0.4)] * 3)
    left = schedule.row(2)
    schedule.extend(mixture_of(1.0), 4, catalog=catalog_of(code=30))
    row = schedule.append(schedule.propose(mixture_of(0.3, 0.3, 0.4), catalog=CATALOG))
    assert row.offsets_d.tolist() == [
        left.next_offsets_d[0],
        left.next_offsets_d[1] + 32,
        left.next_offsets_d[2],
    ]
    assert row.carry_d[[0, 2]].tolist() == left.next_carry_d[[0, 2]].tolist()
    assert schedule.switches == [3, 7]


def test_a_selection_that_is_taken_back_goes_on_where_its_rows_were() -> None:
    selected = Catalog(2048, "byte", (Domain("code", 25, "a selection"),))
    whole = catalog_of(code=30)
    schedule = schedule_of(whole, GEOMETRY, [mixture_of(1.0)] * 2)
    schedule.extend(mixture_of(1.0), 1, catalog=selected)
    schedule.extend(mixture_of(1.0), 1, catalog=whole)
    schedule.extend(mixture_of(1.0), 1, catalog=selected)
    assert [row.offsets_d.tolist() for row in schedule] == [[0], [8], [0], [16], [8]]
    assert read(schedule.to_text()).schedule.row(4).offsets_d.tolist() == [8]


def test_the_first_window_may_have_another_catalog_than_the_header() -> None:
    schedule = MixtureSchedule(CATALOG, GEOMETRY)
    schedule.append(schedule.propose(relative([1] * 5), catalog=AFTER))
    assert_same(read(schedule.to_text()).schedule, schedule)


def switching() -> MixtureSchedule:
    schedule = wandering(CATALOG, 2)
    schedule.append(schedule.propose(relative([1, 2, 3, 4, 5]), catalog=AFTER, signals_through=0, reason="policy"))
    schedule.append(schedule.propose(relative([5, 2, 3, 4, 5]), signals_through=1, reason="policy"))
    schedule.append(schedule.propose(relative([3, 2, 1]), catalog=CATALOG))
    return schedule


# ---- text ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("domains", [1, 2, 64, 65, 5_000])
def test_text_restores_every_number_exactly(domains: int) -> None:
    schedule = wandering(catalog_of_sizes(range(1, domains + 1)), 4)
    assert_same(MixtureSchedule.from_text(schedule.to_text()), schedule)


def test_text_restores_switches_and_signals() -> None:
    schedule = switching()
    found = read(schedule.to_text())
    assert_same(found.schedule, schedule)
    assert found.torn == 0
    assert found.size == len(schedule.to_text().encode())


def test_hard_floats_and_whole_numbers_survive() -> None:
    tiny = 5e-324
    schedule = schedule_of(CATALOG, GEOMETRY, [mixture_of(tiny, 1 / 3, 2 / 3), mixture_of(1e-300, 0.1 + 0.2, 0.7)])
    far = ScheduleRow(
        0,
        CATALOG,
        np.array([0.0, 0.1, 0.9]),
        np.array([0, 1, 7]),
        np.array([1 << 47, (1 << 62) + 1, 3]),
        np.zeros(3),
    )
    assert_same(read(schedule.to_text()).schedule, schedule)
    line = json.loads(LineWriter.begin(schedule).lines(far))
    assert line["offsets"] == {"books": 1 << 47, "code": (1 << 62) + 1, "web": 3}


def test_small_catalogs_are_written_by_name_and_large_ones_packed() -> None:
    small = wandering(catalog_of_sizes([5] * 64), 1).to_text().splitlines()[1]
    large = wandering(catalog_of_sizes([5] * 65), 1).to_text().splitlines()[1]
    assert json.loads(small)["counts"]["d00000"] >= 0
    assert isinstance(json.loads(large)["counts"], str)


def test_names_in_any_language_and_with_any_sign() -> None:
    catalog = catalog_of(**{'"check":"': 3, "日本語": 5, 'a","check":"0123456789abcdef"}': 4, "back\\slash": 2, "é": 1})
    schedule = MixtureSchedule(catalog, GEOMETRY).extend(relative([1] * 5), 2, reason='line\nbreak \u2028 "quoted"')
    assert_same(read(schedule.to_text()).schedule, schedule)


def test_an_empty_schedule_is_its_header() -> None:
    schedule = MixtureSchedule(CATALOG, GEOMETRY)
    assert_same(read(schedule.to_text()).schedule, schedule)
    assert schedule.to_text().count("\n") == 1


def test_a_row_is_written_the_same_at_once_or_later() -> None:
    schedule = switching()
    writer = LineWriter.begin(schedule)
    text = writer.header
    for row in schedule:
        text += writer.lines(row)
    assert text == schedule.to_text()


def test_cut_at_every_byte_the_whole_lines_stay_and_the_run_goes_on() -> None:
    schedule = switching()
    data = schedule.to_text().encode()
    header = data.index(b"\n") + 1
    ends, writer, end = [header], LineWriter.begin(schedule), header
    for row in schedule:
        end += len(writer.lines(row).encode())
        ends.append(end)
    assert end == len(data)
    for cut in range(len(data) + 1):
        if cut < header:
            with pytest.raises(ScheduleError, match=f"no schedule: {cut} bytes without one whole line"):
                read(data[:cut])
            continue
        found = read(data[:cut])
        whole = sum(end <= cut for end in ends) - 1
        assert len(found.schedule) == whole, f"cut at {cut}"
        assert (found.size, found.size + found.torn) == (ends[whole], cut), f"cut at {cut}"
        if cut in (ends[whole], ends[whole] + 5):
            assert_same(found.schedule, first_windows(schedule, whole))
        tail = "".join(found.writer.lines(row) for row in schedule.rows[whole:])
        assert data[: found.size] + tail.encode() == data, f"cut at {cut}"


def first_windows(schedule: MixtureSchedule, windows: int) -> MixtureSchedule:
    """Its first windows."""
    first = MixtureSchedule(schedule.catalog, schedule.geometry)
    for row in schedule.rows[:windows]:
        first.append(row)
    return first


def test_every_flipped_bit_is_found() -> None:
    schedule = MixtureSchedule(catalog_of(a=2, b=3), GEOMETRY)
    schedule.append(schedule.propose(mixture_of(0.5, 0.5)))
    schedule.append(schedule.propose(mixture_of(1.0), catalog=catalog_of(a=2)))
    data = schedule.to_text().encode()
    for place in range(len(data)):
        for bit in range(8):
            flipped = bytearray(data)
            flipped[place] ^= 1 << bit
            with pytest.raises(ScheduleError, match="damaged"):
                read(bytes(flipped))


def test_zeros_that_a_crash_leaves_are_a_torn_tail() -> None:
    data = MixtureSchedule(catalog_of(a=2, b=3), GEOMETRY).extend(mixture_of(0.5, 0.5), 2).to_text().encode()
    assert len(read(data[:-1] + b"\0").schedule) == 1
    assert len(read(data + b"\0" * 4096).schedule) == 2


def test_every_flipped_byte_of_a_torn_tail_is_dropped_with_it_or_found() -> None:
    data = MixtureSchedule(catalog_of(a=2, b=3), GEOMETRY).extend(mixture_of(0.5, 0.5), 2).to_text().encode()
    begin = data[:-1].rindex(b"\n") + 1
    torn = data[: begin + 40]
    for place in range(begin, len(torn)):
        for value in (0, 10, 34, 255):
            changed = torn[:place] + bytes([value]) + torn[place + 1 :]
            if value == 10:  # now a whole line, and a damaged one
                with pytest.raises(ScheduleError, match="line 3 of the schedule is damaged"):
                    read(changed)
            else:
                assert len(read(changed).schedule) == 1


def test_lines_removed_swapped_or_doubled_are_found() -> None:
    lines = switching().to_text().splitlines(keepends=True)
    assert len(lines) == 8  # the header, two catalogs and five rows
    for i in range(1, len(lines) - 1):
        removed, doubled, swapped = [list(lines) for _ in range(3)]
        del removed[i]
        doubled.insert(i, lines[i])
        swapped[i], swapped[i + 1] = lines[i + 1], lines[i]
        for changed, where in [(removed, i + 1), (doubled, i + 2), (swapped, i + 1)]:
            with pytest.raises(ScheduleError, match=f"line {where} of the schedule is damaged, or lines before it"):
                read("".join(changed))
    with pytest.raises(ScheduleError, match="line 1 of the schedule is damaged"):
        read("".join(lines[1:]))
    with pytest.raises(ScheduleError, match="line 9 of the schedule is damaged"):
        read("".join([*lines, lines[-1]]))


def test_a_line_of_another_schedule_is_found() -> None:
    lines = switching().to_text().splitlines(keepends=True)
    other = wandering(CATALOG, 3, replace(GEOMETRY, seed=6)).to_text().splitlines(keepends=True)
    with pytest.raises(ScheduleError, match="line 3 of the schedule is damaged"):
        read("".join([*lines[:2], other[2]]))


def test_nothing_and_foreign_text_are_no_schedule() -> None:
    with pytest.raises(ScheduleError, match="no schedule: 0 bytes"):
        read("")
    for text in ("\n", "{}\n", "not a schedule\n", '{"format":1}\n', "\x00" * 100 + "\n"):
        with pytest.raises(ScheduleError, match="line 1 of the schedule is damaged"):
            read(text)


# Lines whose check value fits, as only a program makes them: `signed` makes them.


def signed(bodies: list[str]) -> str:
    text, check = "", ""
    for body in bodies:
        check = hashlib.blake2b(body[:-1].encode(), key=check.encode(), digest_size=8).hexdigest()
        text += f'{body[:-1]},"check":"{check}"}}\n'
    return text


def unsigned(text: str) -> list[dict[str, object]]:
    values = [json.loads(line) for line in text.splitlines()]
    for value in values:
        del value["check"]
    return values


def test_the_check_is_the_chained_blake2b_of_the_lines() -> None:
    text = switching().to_text()
    assert signed([json.dumps(value, separators=(",", ":"), ensure_ascii=False) for value in unsigned(text)]) == text


@pytest.mark.parametrize(
    ("line", "key", "value", "message"),
    [
        (0, "format", 2, "the schedule has format 2, this release reads 1"),
        (0, "format", None, "the schedule has format None"),
        (0, "format", True, "the schedule has format True"),
        (0, "plan", "x", "the header of the schedule cannot be understood"),
        (0, "geometry", {"seed": 1, "unknown": 2}, "the header of the schedule cannot be understood"),
        (0, "geometry", {"seed": -1}, "the header of the schedule cannot be understood: .*seed is -1"),
        (0, "catalog", {}, "the header of the schedule cannot be understood: .*not a catalog"),
        (1, "window", 1, "line 2 of the schedule: row of window 1 does not follow.*window 0 comes next"),
        (
            1,
            "offsets",
            {"books": 1, "code": 0, "web": 0},
            "line 2 of the schedule: .*offset of 'books' is 1, 0 would",
        ),
        (
            1,
            "counts",
            {"books": 8, "code": 0},
            r"line 2 of the schedule is not a row: .*\['web'\] do not fit the cat",
        ),
        (1, "counts", {"books": 1 << 70, "code": 0, "web": 0}, "line 2 of the schedule is not a row"),
        (1, "counts", "AAAA", "line 2 of the schedule is not a row"),
        (1, "counts", "AAAAAAAAAAA=", "line 2 of the schedule is not a row: .*1 values for 3 domains"),
        (1, "weights", None, "line 2 of the schedule is not a row"),
        (1, "weights", {"books": 2.0, "code": 0, "web": 0}, "line 2 of the schedule: "),
        (1, "reason", ..., "line 2 of the schedule is not a row: KeyError"),
        (3, "catalog", {"row_tokens": 5}, "line 4 of the schedule: not a catalog"),
    ],
)
def test_a_whole_line_that_makes_no_sense_is_refused(line: int, key: str, value: object, message: str) -> None:
    values = unsigned(switching().to_text())
    if value is ...:
        del values[line][key]
    else:
        values[line][key] = value
    with pytest.raises(ScheduleError, match=message):
        read(signed([json.dumps(value) for value in values]))


def test_lines_that_are_no_mappings_are_refused() -> None:
    header = signed(["{}"])
    assert header.endswith('"}\n')
    with pytest.raises(ScheduleError, match="line 1 of the schedule: not JSON"):
        read(signed(["{]}"]))


# ---- the kept file of format 1 ---------------------------------------------------------------------------


def test_a_file_of_format_one_is_read_for_ever() -> None:
    found = read(KEPT.read_bytes())
    schedule = found.schedule
    assert found.torn == 0
    assert schedule.geometry == Geometry(window_steps=2, batch_rows=4, seed=5, block_rows=64, group_blocks=64)
    assert schedule.plan_version == 1
    assert schedule.catalog == CATALOG
    assert [row.catalog.names for row in schedule] == [CATALOG.names] * 2 + [AFTER.names] * 2 + [CATALOG.names]
    assert [row.counts_d.tolist() for row in schedule] == [
        [0, 0, 8],
        [6, 0, 2],
        [0, 1, 2, 2, 3],
        [2, 1, 1, 2, 2],
        [4, 3, 1],
    ]
    assert [row.offsets_d.tolist() for row in schedule] == [
        [0, 0, 0],
        [0, 0, 8],
        [6, 0, 0, 0, 0],
        [6, 1, 2, 2, 3],
        [8, 0, 10],
    ]
    assert schedule.row(3).weights_d.tolist() == [5 / 19, 2 / 19, 3 / 19, 4 / 19, 5 / 19]
    assert schedule.row(3).carry_d.tolist() == [
        0.1923518950518509,
        0.06666666666666665,
        -0.3999999999999999,
        0.1333333333333333,
        -0.3333333333333335,
    ]
    assert [row.signals_through for row in schedule] == [-1, -1, 0, 1, -1]
    assert [row.reason for row in schedule] == ["prior", "prior", "policy", "policy", "prior"]
    assert schedule.to_text().encode() == KEPT.read_bytes()


def test_the_header_speaks_of_rows_brought_together_only_where_they_are() -> None:
    """So a file of a release that knew nothing of it reads as one where none are, and such a release reads ours."""
    schedule = wandering(CATALOG, 3)
    assert b"together" not in KEPT.read_bytes()
    assert read(KEPT.read_bytes()).schedule.geometry.together_rows == 1
    assert "together" not in schedule.to_text()
    pairwise = wandering(CATALOG, 3, replace(GEOMETRY, together_rows=2))
    assert '"group_blocks":64,"together_rows":2}' in pairwise.to_text().split("\n")[0]
    assert_same(read(pairwise.to_text()).schedule, pairwise)
    with pytest.raises(ResumeError, match="the run has together_rows=2, this config has 1"):
        pairwise.check_resume(CATALOG, GEOMETRY)


# ---- stretch ---------------------------------------------------------------------------------------------


def course(schedule: MixtureSchedule, fraction: float) -> np.ndarray:
    """The sum of the weights over the first part of a run, as a fraction of the run."""
    place = fraction * len(schedule)
    whole = min(int(place), len(schedule) - 1)
    sum_d = np.sum([np.zeros(len(schedule.catalog)), *(row.weights_d for row in schedule.rows[:whole])], axis=0)
    return (sum_d + (place - whole) * schedule.row(whole).weights_d) / len(schedule)


def test_stretched_to_the_same_length_nothing_changes() -> None:
    schedule = wandering(CATALOG, 40)
    same = schedule.stretch(40)
    for a, b in zip(same, schedule, strict=True):
        assert a.weights_d.tobytes() == b.weights_d.tobytes()
        assert a.counts_d.tolist() == b.counts_d.tolist()
    assert {row.reason for row in same} == {"stretched"}
    assert [pairs(a) for a in windows_of(same)] == [pairs(b) for b in windows_of(schedule)]


def test_stretched_to_twice_the_length_every_window_comes_twice() -> None:
    schedule = wandering(CATALOG, 10)
    twice = schedule.stretch(20)
    assert [twice.row(i).mixture == schedule.row(i // 2).mixture for i in range(20)] == [True] * 20


def test_stretched_to_half_the_length_windows_are_averaged() -> None:
    schedule = wandering(CATALOG, 10)
    half = schedule.stretch(5)
    for i in range(5):
        mean_d = (schedule.row(2 * i).weights_d + schedule.row(2 * i + 1).weights_d) / 2
        np.testing.assert_allclose(half.row(i).weights_d, mean_d, rtol=0, atol=1e-15)


@pytest.mark.parametrize("windows", [1, 3, 7, 10, 11, 24, 200])
@pytest.mark.parametrize("geometry", [None, Geometry(window_steps=5, batch_rows=100, seed=5)])
def test_shares_follow_the_fraction_of_the_run(windows: int, geometry: Geometry | None) -> None:
    schedule = wandering(CATALOG, 10)
    stretched = schedule.stretch(windows, geometry)
    assert stretched.geometry == (geometry or GEOMETRY)
    assert len(stretched) == windows
    for j in range(windows + 1):
        np.testing.assert_allclose(course(stretched, j / windows), course(schedule, j / windows), rtol=0, atol=1e-12)
    slots = stretched.geometry.window_slots
    asked_d = course(schedule, 1.0) * windows * slots
    assert np.abs(stretched.row(windows - 1).next_offsets_d - asked_d).max() < 1.0 + 1e-6


def test_what_cannot_be_stretched_is_refused() -> None:
    with pytest.raises(ScheduleError, match=r"cannot stretch 0 windows to 5. Both must be at least 1"):
        MixtureSchedule(CATALOG, GEOMETRY).stretch(5)
    with pytest.raises(ScheduleError, match="cannot stretch 3 windows to 0"):
        wandering(CATALOG, 3).stretch(0)
    with pytest.raises(
        ScheduleError, match=r"before window 2, which would fall inside window 2\. .* multiple of 5 win"
    ):
        switching().stretch(6)
    with pytest.raises(ScheduleError, match="the schedule has 2 changes of catalog"):
        switching().stretch(5, catalog=CATALOG)
    with pytest.raises(ScheduleError, match="the same names"):
        wandering(CATALOG, 3).stretch(3, catalog=catalog_of(books=10, coda=30, web=60))


def test_a_stretch_keeps_the_place_of_a_change_of_catalog() -> None:
    schedule = switching()
    wide = Geometry(window_steps=3, batch_rows=7, seed=5)
    stretched = schedule.stretch(10, wide)
    assert stretched.switches == [4, 8]
    assert [row.catalog.fingerprint for row in stretched] == [
        schedule.row(i // 2).catalog.fingerprint for i in range(10)
    ]
    for i in range(10):
        np.testing.assert_allclose(stretched.row(i).weights_d, schedule.row(i // 2).weights_d, rtol=0, atol=1e-15)
    # Within one row of the asked share, for the domains that are there throughout.
    for name in {domain.name for domain in CATALOG.domains} & {domain.name for domain in AFTER.domains}:
        asked = sum(2 * 21 * row.weights_d[row.catalog.index[name]] for row in schedule)
        given = sum(int(row.counts_d[row.catalog.index[name]]) for row in stretched)
        assert abs(given - asked) < 1.0 + 1e-9
    assert_same(MixtureSchedule.from_text(stretched.to_text()), stretched)


def test_stretched_to_another_catalog_of_the_same_names_the_weights_stay() -> None:
    schedule, other = wandering(CATALOG, 4), catalog_of(books=11, code=300, web=6)
    moved = schedule.stretch(4, catalog=other)
    assert moved.catalog == moved.last_catalog == other
    assert [row.weights_d.tolist() for row in moved] == [row.weights_d.tolist() for row in schedule]


@pytest.mark.parametrize("windows", range(6))
def test_the_head_of_a_schedule_is_the_beginning_of_its_text(windows: int) -> None:
    schedule = switching()
    text = schedule.head(windows).to_text()
    assert schedule.to_text().startswith(text)
    read_again = MixtureSchedule.from_text(text)
    assert_same(schedule.head(windows), read_again)
    assert len(read_again) == windows
    with pytest.raises(ScheduleError, match="first 6 windows of a schedule that has 5"):
        schedule.head(6)


# ---- resume ----------------------------------------------------------------------------------------------


def test_the_same_run_may_go_on() -> None:
    schedule = switching()
    schedule.check_resume(catalog_of(books=10, code=30, web=60), Geometry(**asdict(GEOMETRY)))
    MixtureSchedule(CATALOG, GEOMETRY).check_resume(CATALOG, GEOMETRY)


@pytest.mark.parametrize(
    ("key", "given"),
    [
        ("window_steps", 3),
        ("batch_rows", 5),
        ("seed", 6),
        ("block_rows", 32),
        ("group_blocks", 1),
        ("together_rows", 2),
    ],
)
def test_another_geometry_is_refused(key: str, given: int) -> None:
    saved = getattr(GEOMETRY, key)
    message = (
        f"resume refused: the run has {key}={saved}, this config has {given}. Row order depends on it. "
        f"Use {saved}, or start a new run."
    )
    with pytest.raises(ResumeError) as refusal:
        switching().check_resume(CATALOG, replace(GEOMETRY, **{key: given}))
    assert str(refusal.value) == message


@pytest.mark.parametrize(
    ("catalog", "message"),
    [
        (replace(CATALOG, row_tokens=1024), "the run has row_tokens=2048, this corpus has 1024"),
        (replace(CATALOG, tokenizer="gpt2"), "the run was tokenized by byte, this corpus by gpt2"),
        (
            catalog_of(books=10, code=31, web=60),
            "the catalog is not the run's: domain 'code' had 30 rows and has 31. Use",
        ),
        (catalog_of(books=10, web=60), "the catalog is not the run's: domain 'code' was removed. Use"),
        (
            catalog_of(books=10, code=30, web=60, zoo=1),
            "the catalog is not the run's: domain 'zoo' was added. Use",
        ),
        (AFTER, "the catalog is not the run's: domain 'code' had 30 rows and has 25; domain 'web'"),
    ],
)
def test_another_corpus_is_refused(catalog: Catalog, message: str) -> None:
    with pytest.raises(ResumeError, match=f"^resume refused: {message}"):
        switching().check_resume(catalog, GEOMETRY)


def test_after_a_switch_the_new_catalog_is_the_one_to_resume_with() -> None:
    schedule = wandering(CATALOG, 1)
    schedule.append(schedule.propose(relative([1] * 5), catalog=AFTER))
    schedule.check_resume(AFTER, GEOMETRY)
    with pytest.raises(ResumeError, match="the catalog is not the run's"):
        schedule.check_resume(CATALOG, GEOMETRY)


def test_another_plan_is_refused() -> None:
    schedule = replace(switching(), plan_version=plan.VERSION + 1)
    text = schedule.to_text()
    with pytest.raises(ResumeError, match=f"planned by version {plan.VERSION + 1} of the plan, this is {plan.VERSION}"):
        read(text).schedule.check_resume(CATALOG, GEOMETRY)


def test_a_saved_schedule_opened_in_haste_is_the_same_one() -> None:
    schedule = switching()
    hasty = read(schedule.to_text(), thorough=False)
    assert hasty.schedule.switches == schedule.switches
    assert len(hasty.schedule) == len(schedule)
    assert hasty.schedule.to_text() == schedule.to_text()
    row = schedule.propose(schedule.rows[-1].mixture)
    assert hasty.schedule.propose(schedule.rows[-1].mixture).next_offsets_d.tolist() == row.next_offsets_d.tolist()


def test_a_row_in_another_window_s_place_is_found_when_it_is_asked_for() -> None:
    values = unsigned(switching().to_text())
    values[1]["window"] = 5
    hasty = read(signed([json.dumps(value) for value in values]), thorough=False).schedule
    with pytest.raises(ScheduleError, match="line 2 of the schedule: it says window 5, and stands in the place of 0"):
        hasty.row(0)


def test_a_damaged_line_is_found_in_haste_too() -> None:
    text = switching().to_text()
    middle = text.index('"window":1')
    with pytest.raises(ScheduleError, match="line 3 of the schedule is damaged"):
        read(text[:middle] + '"window":2' + text[middle + 10 :], thorough=False)
