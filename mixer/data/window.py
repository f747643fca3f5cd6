"""One rank's rows of some windows: where they lie, what is known of them, and their tokens, checked.

Shared by the reader in this process and the stream through Ray Data. Rows stand in the order of the
rank's slots, step after step, window after window. Whatever is small (lengths, document starts, check
values) is collected when they are located; tokens are copied row by row from the memory maps when they
are asked for, or fetched by ranges at once where shards lie in an object store.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from mixer.core.plan import Geometry, WindowPlan
from mixer.data.corpus import CatalogRows
from mixer.data.shards import Shard, check_rows


class WindowRows(Protocol):
    """What is known of a rank's rows of whole steps, in the order of its slots, beside their tokens.

    `starts[starts_offsets[i] : starts_offsets[i + 1]]` are the positions in row i where a document starts.
    """

    @property
    def geometry(self) -> Geometry: ...
    @property
    def first_step(self) -> int: ...  # counted from the start of the run
    @property
    def step_rows(self) -> int: ...  # of this rank
    @property
    def domain_n(self) -> NDArray[np.int32]: ...  # catalog order
    @property
    def row_n(self) -> NDArray[np.int64]: ...  # number inside the domain
    @property
    def length_n(self) -> NDArray[np.int32]: ...
    @property
    def starts(self) -> NDArray[np.int32]: ...
    @property
    def starts_offsets(self) -> NDArray[np.int64]: ...


@dataclass(frozen=True, slots=True, eq=False)
class RankRows:
    """Row i lies in `shards[shard_n[i]]` as its row `shard_row_n[i]`, and has `length_n[i]` tokens of text.

    `starts[starts_offsets[i] : starts_offsets[i + 1]]` are the positions in it where a document starts.
    """

    first_window: int
    step_rows: int  # of this rank
    geometry: Geometry
    row_tokens: int
    domain_n: NDArray[np.int32]  # catalog order
    row_n: NDArray[np.int64]  # number inside the domain
    shards: list[Shard]
    shard_n: NDArray[np.int64]
    shard_row_n: NDArray[np.int64]
    length_n: NDArray[np.int32]
    check_n: NDArray[np.uint64]
    starts: NDArray[np.int32]
    starts_offsets: NDArray[np.int64]
    maps: list[memoryview]  # the bytes of each shard's tokens, where they are mapped
    fetched: NDArray[Any] | None  # all tokens, where they are not

    def __len__(self) -> int:
        return len(self.row_n)

    @property
    def first_step(self) -> int:
        return self.first_window * self.geometry.window_steps

    @property
    def token_type(self) -> np.dtype[Any]:
        return self.shards[0].layout.token_type

    def copy_tokens(self, places: NDArray[np.int64]) -> NDArray[Any]:
        """The tokens of the rows at `places`, checked, in memory of their own."""
        if self.fetched is not None:
            tokens = self.fetched[places]
        else:
            size = self.row_tokens * self.token_type.itemsize
            maps = self.maps
            shards, firsts = self.shard_n[places].tolist(), (self.shard_row_n[places] * size).tolist()
            # Joining slices copies each row once, at half the cost of an assignment a row.
            joined = bytearray().join(
                [maps[shard][first : first + size] for shard, first in zip(shards, firsts, strict=True)]
            )
            tokens = np.frombuffer(joined, self.token_type).reshape(len(places), self.row_tokens)
        if not np.array_equal(check_rows(tokens), self.check_n[places]):
            self._refuse(places, tokens)
        return tokens

    def _refuse(self, places: NDArray[np.int64], tokens: NDArray[Any]) -> None:
        for number, shard in enumerate(self.shards):
            here = self.shard_n[places] == number
            shard.confirm(self.shard_row_n[places][here], tokens[here])


def locate(plans: Sequence[WindowPlan], rows: CatalogRows, rank: int, world_size: int) -> RankRows:
    """Find one rank's rows of consecutive windows, planned over one catalog, in the shards."""
    slots = plans[0].rank_slots(rank, world_size)
    domain_n = np.concatenate([plan.domain_n[slots] for plan in plans])
    row_n = np.concatenate([plan.row_n[slots] for plan in plans])
    global_shard_n, shard_row_n = rows.locate(domain_n, row_n)
    used, shard_n = np.unique(global_shard_n, return_inverse=True)
    shards = [rows.shard(int(place)) for place in used]
    order_n = np.argsort(shard_n, kind="stable")
    groups = np.split(order_n, np.searchsorted(shard_n[order_n], np.arange(1, len(shards))))

    length_n = np.empty(len(row_n), dtype=np.int32)
    check_n = np.empty(len(row_n), dtype=np.uint64)
    begin_n = np.empty(len(row_n), dtype=np.int64)
    num_starts_n = np.empty(len(row_n), dtype=np.int64)
    for shard, group in zip(shards, groups, strict=True):
        wanted = shard_row_n[group]
        length_n[group], check_n[group] = shard.length[wanted], shard.check[wanted]
        begin_n[group] = shard.starts_offsets[wanted]
        num_starts_n[group] = shard.starts_offsets[wanted + 1] - begin_n[group]
    starts_offsets = np.concatenate([[0], np.cumsum(num_starts_n)])
    starts = np.empty(starts_offsets[-1], dtype=np.int32)
    for shard, group in zip(shards, groups, strict=True):
        num = num_starts_n[group]
        nth = np.arange(num.sum()) - np.repeat(np.cumsum(num) - num, num)
        starts[np.repeat(starts_offsets[group], num) + nth] = shard.starts_flat[np.repeat(begin_n[group], num) + nth]

    row_tokens = plans[0].catalog.row_tokens
    maps, fetched = [], None
    if all(shard.is_mapped for shard in shards):
        maps = [shard.tokens.data.cast("B") for shard in shards]
    else:
        fetched = np.empty((len(row_n), row_tokens), shards[0].layout.token_type)
        for shard, group in zip(shards, groups, strict=True):
            fetched[group] = shard.take(shard_row_n[group])
    return RankRows(
        first_window=plans[0].window,
        step_rows=len(slots) // plans[0].geometry.window_steps,
        geometry=plans[0].geometry,
        row_tokens=row_tokens,
        domain_n=domain_n,
        row_n=row_n,
        shards=shards,
        shard_n=shard_n,
        shard_row_n=shard_row_n,
        length_n=length_n,
        check_n=check_n,
        starts=starts,
        starts_offsets=starts_offsets,
        maps=maps,
        fetched=fetched,
    )
