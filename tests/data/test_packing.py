import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixer.data.packing import (
    RowSpan,
    cut_shards,
    num_rows_of,
    order_by_group,
    pieces_between,
    place_documents,
    reduce_over_rows,
)


def ints(*values):
    return np.array(values, np.int64)


def test_rows_of_groups():
    assert num_rows_of(ints(0, 1, 8, 9), 8).tolist() == [0, 1, 1, 2]


def test_shards_run_through_groups():
    # Groups of 3, 0 and 4 rows in shards of 2: rows 0-1, then the third with the first of the last group.
    assert cut_shards(ints(3, 0, 4), 2) == [
        [RowSpan(0, 0, 2)],
        [RowSpan(0, 2, 3), RowSpan(2, 0, 1)],
        [RowSpan(2, 1, 3)],
        [RowSpan(2, 3, 4)],
    ]
    assert cut_shards(ints(), 2) == []


def test_pieces_between():
    end_p = np.cumsum([5, 3, 4])
    assert pieces_between(end_p, 0, 5) == (0, 1)
    assert pieces_between(end_p, 5, 8) == (1, 2)
    assert pieces_between(end_p, 4, 9) == (0, 3)


def test_place_documents_by_hand():
    # Documents of 3, 5 and 2 tokens; rows of 4 begin at token 2 of the first: |a b b b|b b c c|
    placed = place_documents(ints(3, 5, 2), 2, 8, 4)
    assert placed.length.tolist() == [4, 4]
    assert placed.starts.tolist() == [1, 2]
    assert placed.offset.tolist() == [0, 1, 2]
    assert placed.first_document.tolist() == [0, 1]


def test_a_document_that_starts_a_row_is_its_first():
    placed = place_documents(ints(4, 1, 2), 0, 7, 4)
    assert placed.length.tolist() == [4, 3]
    assert placed.starts.tolist() == [0, 0, 1]
    assert placed.offset.tolist() == [0, 1, 3]
    assert placed.first_document.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("mean", [(1 * 10.0 + 3 * 20.0) / 4, (2 * 20.0 + 2 * 4.0) / 4]),
        ("min", [10.0, 4.0]),
        ("max", [20.0, 20.0]),
    ],
)
def test_reduce_by_hand(how, expected):
    value = np.array([10.0, 20.0, 4.0])
    assert reduce_over_rows(value, ints(3, 5, 2), 2, 8, 4, how).tolist() == expected


def test_a_mean_of_equal_values_is_that_value():
    value = np.full(7, 0.1)
    assert set(reduce_over_rows(value, ints(3, 1, 4, 1, 5, 9, 2), 0, 25, 6, "mean").tolist()) == {0.1}


def test_order_by_group_is_stable():
    order, tokens = order_by_group(ints(1, 0, 1, 0), ints(2, 1, 1, 3))
    assert order.tolist() == [1, 3, 0, 2]
    assert tokens.tolist() == [2, 4, 5, 6, 0, 1, 3]


@given(
    length_k=st.lists(st.integers(1, 40), min_size=1, max_size=60),
    row_tokens=st.integers(1, 24),
    first_row=st.integers(0, 10),
    num_rows=st.integers(1, 10),
)
def test_any_rows_know_their_documents(length_k, row_tokens, first_row, num_rows):
    """Against the plainest way: number every token with its document."""
    length = np.array(length_k, np.int64)
    total = int(length.sum())
    start = first_row * row_tokens
    if start >= total:
        return
    stop = min(total, start + num_rows * row_tokens)
    document_of_token = np.repeat(np.arange(len(length)), length)
    starts_at = set((np.cumsum(length) - length).tolist())
    first = int(document_of_token[start])
    skip = start - int(length[:first].sum())
    placed = place_documents(length[first:], skip, stop - start, row_tokens)
    values = np.sin(np.arange(len(length)))
    means = reduce_over_rows(values[first:], length[first:], skip, stop - start, row_tokens, "mean")
    for row, at in enumerate(range(start, stop, row_tokens)):
        end = min(stop, at + row_tokens)
        assert placed.length[row] == end - at
        assert placed.first_document[row] + first == document_of_token[at]
        found = placed.starts[placed.offset[row] : placed.offset[row + 1]].tolist()
        assert found == [place - at for place in range(at, end) if place in starts_at]
        assert means[row] == pytest.approx(values[document_of_token[at:end]].mean(), abs=1e-12)
