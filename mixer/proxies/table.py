"""The table of a swarm: what each small run was trained on, and what it had learned by then. One Parquet file.

    run               str      its name
    progress          float    share of its tokens that were trained
    tokens            int      places for tokens that were trained
    weight/<domain>   float    its mean mixture so far, as it was trained
    loss/<set>        float    of that evaluation set, nats a token; null where it was no number

Rows are sorted by run and tokens, and there is one of each pair. The file is written whole or not at all; what is
appended to it twice is in it once, and the order of appending leaves no trace: equal rows, equal bytes.

The file's metadata hold the `identity` of the swarm: what its runs have in common, as plain values by dotted key, and
under `mixtures` a digest of each run's weights by run. Rows of another swarm are refused with both values. Runs that
the file does not know are added to it: a swarm may grow.

`quantity` says what the loss columns hold. "loss" is what was measured. "influence" is for mixtures that were not
trained but whose influence was predicted at a checkpoint (`loss/<set>` is then minus the benefit for that set): less
is better in both, so whatever is fitted to one can be fitted to the other.
"""

import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from mixer.control.fence import write_whole
from mixer.core.errors import DataError, ResumeError

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Quantity = Literal["loss", "influence"]

TABLE = "swarm.parquet"  # in a swarm's folder
FORMAT = 1
WEIGHT, LOSS = "weight/", "loss/"
MIXTURES = "mixtures"  # the key of an identity whose value may grow
_KEY = b"mixer.swarm"
_HEAD = pa.schema([("run", pa.string()), ("progress", pa.float64()), ("tokens", pa.int64())])


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class RunTable:
    """Rows of runs at some of their moments, each once; arrays with an axis R of rows."""

    domains: tuple[str, ...]
    run_r: tuple[str, ...]
    progress_r: Floats
    tokens_r: Ints
    weights_rd: Floats
    losses: Mapping[str, Floats]  # by set
    quantity: Quantity = "loss"
    identity: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def __post_init__(self) -> None:
        rows = len(self.run_r)
        shapes = {"progress": self.progress_r.shape, "tokens": self.tokens_r.shape}
        shapes |= {f"{LOSS}{name}": loss_r.shape for name, loss_r in self.losses.items()}
        wrong = [f"{name} {shape}" for name, shape in shapes.items() if shape != (rows,)]
        if wrong or self.weights_rd.shape != (rows, len(self.domains)):
            raise DataError(
                f"a table of {rows} rows and {len(self.domains)} domains with weights {self.weights_rd.shape}"
                f"{''.join(f', {one}' for one in wrong)}. Give every row one value a column."
            )
        if len(set(self.keys)) < rows:
            double = next(key for key in self.keys if self.keys.count(key) > 1)
            raise DataError(
                f"run {double[0]} after {double[1]} tokens stands in the table twice. Keep one of the rows."
            )

    def __len__(self) -> int:
        return len(self.run_r)

    @property
    def keys(self) -> list[tuple[str, int]]:
        """Run and tokens of each row."""
        return list(zip(self.run_r, self.tokens_r.tolist(), strict=True))

    @property
    def sets(self) -> tuple[str, ...]:
        return tuple(self.losses)

    @property
    def runs(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(self.run_r))

    @property
    def points(self) -> tuple[float, ...]:
        """The shares of progress at which there are rows."""
        return tuple(sorted(set(self.progress_r.tolist())))

    def take(self, which: NDArray[np.bool_] | NDArray[np.integer] | Sequence[int]) -> "RunTable":
        """Some of the rows, by mask or by number."""
        place = np.arange(len(self))[which]
        return replace(
            self,
            run_r=tuple(self.run_r[row] for row in place),
            progress_r=self.progress_r[place],
            tokens_r=self.tokens_r[place],
            weights_rd=self.weights_rd[place],
            losses={name: loss_r[place] for name, loss_r in self.losses.items()},
        )

    def at(self, progress: float = 1.0) -> "RunTable":
        """One row a run: of those that were recorded at that share of their tokens."""
        found = np.isclose(self.progress_r, progress, rtol=0, atol=1e-9)
        if not found.any():
            known = ", ".join(f"{point:g}" for point in self.points)
            raise DataError(f"the table has no rows at progress {progress:g}. It has them at {known or 'none'}.")
        return self.take(found)

    def loss_rs(self, sets: Sequence[str] | None = None) -> Floats:
        """The losses of some sets side by side; of all without a choice."""
        names = self.sets if sets is None else tuple(sets)
        unknown = [name for name in names if name not in self.losses]
        if unknown:
            raise DataError(f"the table has no set {', '.join(unknown)}. It has {', '.join(self.sets) or 'none'}.")
        return np.stack([self.losses[name] for name in names], axis=1) if names else np.zeros((len(self), 0))


def read_table(path: str | Path) -> RunTable:
    path = Path(path)
    try:
        table = pq.read_table(pa.BufferReader(path.read_bytes()))
    except FileNotFoundError as error:
        raise DataError(f"{path} is not there. Name a table that `mixer swarm` has written.") from error
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path} is no table of a swarm: {error}. Restore it, or run the swarm again.") from error
    held = (table.schema.metadata or {}).get(_KEY)
    if held is None:
        raise DataError(f"{path} is a Parquet file of somebody else: it has no {_KEY.decode()}. Name a swarm's table.")
    try:
        about: dict[str, Any] = json.loads(held)
        if about["format"] != FORMAT:
            raise DataError(f"{path} has format {about['format']}; this mixer reads {FORMAT}. Use the one it is of.")
        names = table.column_names
        domains = tuple(name.removeprefix(WEIGHT) for name in names if name.startswith(WEIGHT))
        sets = tuple(name.removeprefix(LOSS) for name in names if name.startswith(LOSS))
        weights = [_floats(table, f"{WEIGHT}{name}") for name in domains]
        return RunTable(
            domains=domains,
            run_r=tuple(table.column("run").to_pylist()),
            progress_r=_floats(table, "progress"),
            tokens_r=table.column("tokens").to_numpy().astype(np.int64),
            weights_rd=np.stack(weights, axis=1) if weights else np.zeros((table.num_rows, 0)),
            losses={name: _floats(table, f"{LOSS}{name}") for name in sets},
            quantity=about["quantity"],
            identity=about["identity"],
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{path} is no table of a swarm: {error!r}. Restore it, or run the swarm again.") from error


def _floats(table: pa.Table, name: str) -> Floats:
    return table.column(name).to_numpy().astype(np.float64)  # a null is NaN


def write_table(path: str | Path, table: RunTable) -> None:
    """The file is there with the whole table, sorted, or as it was before."""
    table = table.take(_order(table.run_r, table.tokens_r))
    losses = [(name, table.losses[name]) for name in sorted(table.losses)]
    columns: list[pa.Array] = [
        pa.array(table.run_r, pa.string()),
        pa.array(table.progress_r, pa.float64()),
        pa.array(table.tokens_r, pa.int64()),
        *(pa.array(weights_r, pa.float64()) for weights_r in table.weights_rd.T),
        *(pa.array(loss_r, pa.float64(), mask=~np.isfinite(loss_r)) for _, loss_r in losses),
    ]
    schema = pa.schema([
        *_HEAD,
        *(pa.field(f"{WEIGHT}{name}", pa.float64()) for name in table.domains),
        *(pa.field(f"{LOSS}{name}", pa.float64()) for name, _ in losses),
    ])  # fmt: skip
    about = {"format": FORMAT, "quantity": table.quantity, "identity": dict(table.identity)}
    schema = schema.with_metadata({_KEY: json.dumps(about, sort_keys=True, ensure_ascii=False).encode()})
    stream = io.BytesIO()
    pq.write_table(pa.Table.from_arrays(columns, schema=schema), stream, compression="zstd")
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        write_whole(Path(path), stream.getvalue())
    except OSError as error:
        raise DataError(f"{path} cannot be written: {error.strerror}. It is as it was; make room for it.") from error


def append(path: str | Path, rows: RunTable) -> RunTable:
    """Add rows to the file, which is made if need be; what is in it already is not added again."""
    merged = merge(read_table(path), rows, str(path)) if Path(path).exists() else rows
    write_table(path, merged)
    return merged


def merge(table: RunTable, rows: RunTable, where: str = "the table") -> RunTable:
    """Both tables' rows as one table; refused if they are of different swarms, or tell one row in two ways."""
    if (table.domains, table.quantity) != (rows.domains, rows.quantity):
        raise ResumeError(
            f"{where} has {table.quantity} of domains {', '.join(table.domains)}; these rows are {rows.quantity} of "
            f"{', '.join(rows.domains)}. Keep a table for each."
        )
    identity = joined(table.identity, rows.identity, where)
    known = {key: place for place, key in enumerate(table.keys)}
    new: list[int] = []
    for place, key in enumerate(rows.keys):
        if key not in known:
            new.append(place)
        elif (before := _line(table, known[key])) != (now := _line(rows, place)):
            column = next(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
            raise DataError(
                f"{where} has {column}={before.get(column)} for run {key[0]} after {key[1]} tokens, these rows have "
                f"{now.get(column)}. One of them is not of this swarm: remove the run's folder or the table."
            )
    added = rows.take(new)
    sets = sorted(table.losses.keys() | rows.losses.keys())
    run_r = (*table.run_r, *added.run_r)
    tokens_r = np.concatenate([table.tokens_r, added.tokens_r])
    order = _order(run_r, tokens_r)

    def both(one: Floats, other: Floats) -> Floats:
        return np.concatenate([one, other])[order]

    return RunTable(
        domains=table.domains,
        run_r=tuple(run_r[row] for row in order),
        progress_r=both(table.progress_r, added.progress_r),
        tokens_r=tokens_r[order],
        weights_rd=both(table.weights_rd, added.weights_rd),
        losses={name: both(_loss(table, name), _loss(added, name)) for name in sets},
        quantity=table.quantity,
        identity=identity,
    )


def _order(run_r: Sequence[str], tokens_r: Ints) -> Ints:
    """By run and tokens."""
    return np.lexsort((tokens_r, np.array(run_r, dtype=np.str_))) if len(run_r) else np.zeros(0, dtype=np.int64)


def _loss(table: RunTable, name: str) -> Floats:
    return table.losses.get(name, np.full(len(table), np.nan))


def _line(table: RunTable, row: int) -> dict[str, float | None]:
    """A row's numbers by column; None for what is no number, so that two of them are equal."""
    values = {"progress": table.progress_r[row]}
    values |= {f"{WEIGHT}{name}": table.weights_rd[row, place] for place, name in enumerate(table.domains)}
    values |= {f"{LOSS}{name}": loss_r[row] for name, loss_r in table.losses.items()}
    return {name: float(value) if math.isfinite(value) else None for name, value in values.items()}


def joined(old: Mapping[str, Any], new: Mapping[str, Any], where: str) -> dict[str, Any]:
    """One identity of two that agree; its mixtures are those of both."""
    for key in sorted((old.keys() | new.keys()) - {MIXTURES}):
        if old.get(key) != new.get(key):
            raise ResumeError(
                f"{where} is of a swarm with {key}={old.get(key)}; this one has {new.get(key)}. Their runs cannot be "
                "compared: use the old value, or another folder with run.path=..."
            )
    before: Mapping[str, str] = old.get(MIXTURES) or {}
    now: Mapping[str, str] = new.get(MIXTURES) or {}
    for run in sorted(before.keys() & now.keys()):
        if before[run] != now[run]:
            raise ResumeError(
                f"{where} has run {run} with mixture {before[run]}; this swarm gives it {now[run]}. Use the same "
                "generator, its options, number of runs and seed, or another folder with run.path=..."
            )
    merged = {key: value for key, value in (dict(old) | dict(new)).items() if key != MIXTURES}
    return merged | {MIXTURES: dict(sorted((dict(before) | dict(now)).items()))}
