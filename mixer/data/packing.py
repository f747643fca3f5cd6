"""The arithmetic of packing: documents end to end, cut into rows of one length. Pure numpy.

The documents of one group of a domain (all of them, when nothing is grouped) form one stream of
tokens; row r of the group is the tokens [r * row_tokens, (r + 1) * row_tokens) of it. So nothing is
lost, only a group's last row is padded, and any row follows from the lengths alone: whoever knows
how many tokens come before a document knows its place. Every length counts the EOS, so it is >= 1.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class RowSpan:
    """Rows start..stop-1 of group number `group`."""

    group: int
    start: int
    stop: int


def num_rows_of(tokens_g: Ints, row_tokens: int) -> Ints:
    """Rows that each group's tokens fill; a group without tokens has none."""
    return -(-np.asarray(tokens_g, dtype=np.int64) // row_tokens)


def cut_shards(rows_g: Ints, shard_rows: int) -> list[list[RowSpan]]:
    """All groups' rows in order, cut into shards of `shard_rows`; only the last one is shorter."""
    last_g = np.cumsum(rows_g)
    total = int(last_g[-1]) if len(last_g) else 0
    shards: list[list[RowSpan]] = []
    for start in range(0, total, shard_rows):
        stop = min(start + shard_rows, total)
        spans: list[RowSpan] = []
        group = int(np.searchsorted(last_g, start, side="right"))
        while start < stop:
            first = int(last_g[group] - rows_g[group])
            end = min(stop, int(last_g[group]))
            if end > start:
                spans.append(RowSpan(group, start - first, end - first))
                start = end
            group += 1
        shards.append(spans)
    return shards


def pieces_between(end_p: Ints, start: int, stop: int) -> tuple[int, int]:
    """Which of the pieces laid end to end hold tokens start..stop-1: first, and one past the last.

    `end_p` is the running sum of the pieces' tokens; a piece has at least one.
    """
    return int(np.searchsorted(end_p, start, side="right")), int(np.searchsorted(end_p, stop, side="left")) + 1


@dataclass(frozen=True, slots=True)
class RowDocuments:
    """For n neighbouring rows: which document starts where, and which holds position 0.

    Row i's starts are `starts[offset[i]:offset[i + 1]]`; documents count from the first one given.
    """

    length: NDArray[np.int32]
    starts: NDArray[np.int32]
    offset: NDArray[np.int32]
    first_document: Ints


def place_documents(length_k: Ints, skip_tokens: int, num_tokens: int, row_tokens: int) -> RowDocuments:
    """Where documents lie in rows that begin `skip_tokens` into the first of them.

    `length_k` are the lengths of all documents that touch the rows (>= 1 each); the rows hold
    `num_tokens` tokens, so only the last one may be short.
    """
    start_k = np.cumsum(length_k) - length_k - skip_tokens  # may be negative: it began before these rows
    num_rows = -(-num_tokens // row_tokens)
    row_start = np.arange(num_rows, dtype=np.int64) * row_tokens
    first_document = np.searchsorted(start_k, row_start, side="right") - 1
    inside = start_k[(start_k >= 0) & (start_k < num_tokens)]
    offset = np.searchsorted(inside, np.append(row_start, num_tokens))
    return RowDocuments(
        length=np.minimum(num_tokens - row_start, row_tokens).astype(np.int32),
        starts=(inside % row_tokens).astype(np.int32),
        offset=offset.astype(np.int32),
        first_document=first_document.astype(np.int64),
    )


def reduce_over_rows(
    value_k: NDArray[np.float64], length_k: Ints, skip_tokens: int, num_tokens: int, row_tokens: int, how: str
) -> NDArray[np.float64]:
    """One value a row from one value a document: `min`, `max`, or `mean` weighted by tokens in the row."""
    start_k = np.cumsum(length_k) - length_k - skip_tokens
    num_rows = -(-num_tokens // row_tokens)
    row_start = np.arange(num_rows, dtype=np.int64) * row_tokens
    inside = start_k[(start_k > 0) & (start_k < num_tokens)]
    cut = np.union1d(row_start, inside)  # every stretch from cut to cut is one document in one row
    value = value_k[np.searchsorted(start_k, cut, side="right") - 1]
    first_cut = np.searchsorted(cut, row_start)
    if how == "min":
        return np.minimum.reduceat(value, first_cut)
    if how == "max":
        return np.maximum.reduceat(value, first_cut)
    assert how == "mean", how
    weight = np.diff(np.append(cut, num_tokens)).astype(np.float64)
    mean = np.add.reduceat(value * weight, first_cut) / np.add.reduceat(weight, first_cut)
    # Rounding may leave the range of the values by one digit; a mean never does.
    return np.clip(mean, np.minimum.reduceat(value, first_cut), np.maximum.reduceat(value, first_cut))


def order_by_group(code_k: NDArray[np.integer], length_k: Ints) -> tuple[NDArray[np.intp], Ints]:
    """Documents in stable order of their group's code, and the tokens in that order, as places."""
    order = np.argsort(code_k, kind="stable")
    start_k = np.cumsum(length_k) - length_k
    length = length_k[order]
    new_start = np.cumsum(length) - length
    return order, np.repeat(start_k[order] - new_start, length) + np.arange(int(length.sum()), dtype=np.int64)
