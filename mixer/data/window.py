"""One rank's rows of one window: where they lie, what is known of them, and their tokens, checked.

Shared by the reader in this process and the stream through Ray Data. Rows stand in the order of the
rank's slots, step after step. Whatever is small (lengths, document starts, check values) is collected
when a window is located; tokens are copied row by row from the memory maps when they are asked for,
or fetched by ranges at once where shards lie in an object store.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mixer.core.plan import WindowPlan
from mixer.data.corpus import CatalogRows
from mixer.data.shards import Shard, check_rows


@dataclass(frozen=True, slots=True, eq=False)
class WindowRows:
    """Row i of the rank lies in `shards[shard_n[i]]` as its row `shard_row_n[i]`.

    `starts[starts_offsets[i] : starts_offsets[i + 1]]` are the positions in it where a document starts.
    """

    plan: WindowPlan
    domain_n: NDArray[np.int32]  # catalog order
    row_n: NDArray[np.int64]  # number inside the domain
    shards: list[Shard]
    shard_n: NDArray[np.int64]
    shard_row_n: NDArray[np.int64]
    length_n: NDArray[np.int32]
    check_n: NDArray[np.uint64]
    starts: NDArray[np.int32]
    starts_offsets: NDArray[np.int64]
    fetched: NDArray[Any] | None  # all tokens, where a shard is not mapped

    def __len__(self) -> int:
        return len(self.row_n)

    @property
    def token_type(self) -> np.dtype[Any]:
        return self.shards[0].layout.token_type

    def copy_tokens(self, places: NDArray[np.int64], out: NDArray[Any]) -> None:
        """The tokens of the rows at `places` into `out`, checked."""
        if self.fetched is not None:
            np.take(self.fetched, places, axis=0, out=out)
        else:
            maps = [shard.tokens for shard in self.shards]
            # Row by row: as fast as one gather, and needs no second copy into slot order.
            for i, (shard, row) in enumerate(
                zip(self.shard_n[places].tolist(), self.shard_row_n[places].tolist(), strict=True)
            ):
                out[i] = maps[shard][row]
        if not np.array_equal(check_rows(out), self.check_n[places]):
            self._refuse(places, out)

    def _refuse(self, places: NDArray[np.int64], tokens: NDArray[Any]) -> None:
        for number, shard in enumerate(self.shards):
            here = self.shard_n[places] == number
            shard.confirm(self.shard_row_n[places][here], tokens[here])


def locate_window(plan: WindowPlan, rows: CatalogRows, rank: int, world_size: int) -> WindowRows:
    """Find one rank's rows of a planned window in the shards."""
    slots = plan.rank_slots(rank, world_size)
    domain_n, row_n = plan.domain_n[slots], plan.row_n[slots]
    global_shard_n, shard_row_n = rows.locate(domain_n, row_n)
    used, shard_n = np.unique(global_shard_n, return_inverse=True)
    shards = [rows.shard(int(place)) for place in used]
    order_n = np.argsort(shard_n, kind="stable")
    groups = np.split(order_n, np.searchsorted(shard_n[order_n], np.arange(1, len(shards))))

    length_n = np.empty(len(slots), dtype=np.int32)
    check_n = np.empty(len(slots), dtype=np.uint64)
    begin_n = np.empty(len(slots), dtype=np.int64)
    num_starts_n = np.empty(len(slots), dtype=np.int64)
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

    fetched = None
    if not all(shard.is_mapped for shard in shards):
        fetched = np.empty((len(slots), plan.catalog.row_tokens), shards[0].layout.token_type)
        for shard, group in zip(shards, groups, strict=True):
            fetched[group] = shard.take(shard_row_n[group])
    return WindowRows(
        plan, domain_n, row_n, shards, shard_n, shard_row_n, length_n, check_n, starts, starts_offsets, fetched
    )
