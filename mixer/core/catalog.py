"""Domains and the catalog they form: which rows exist, under which names.

A catalog says how many rows each domain has and which rows they are (by content identity), not
where they lie: files belong to `mixer.data.corpus`. So a catalog of 10^12 rows is as small as one
of ten, and everything in the core is O(domains).
"""

import hashlib
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mixer.core.errors import DataError
from mixer.core.permute import key_of

MAX_ROWS = 1 << 48  # so that row arithmetic stays within int64 and row numbers within a float64


@dataclass(frozen=True, slots=True)
class Domain:
    """A named source of rows. Equal `content` means: the same rows in the same order."""

    name: str
    num_rows: int
    content: str

    def __post_init__(self) -> None:
        if not self.name or self.name != self.name.strip() or not self.name.isprintable():
            raise DataError(
                f"domain name {self.name!r} is empty, padded with spaces or not printable. Rename the domain."
            )
        if not self.content.isprintable():
            raise DataError(f"content {self.content!r} of domain {self.name!r} is not printable. Use a digest in hex.")
        if not 0 < self.num_rows <= MAX_ROWS:
            raise DataError(
                f"domain {self.name!r} has {self.num_rows} rows; it needs 1 to {MAX_ROWS}. "
                "Give it rows, or leave it out."
            )


@dataclass(frozen=True)
class Catalog:
    """The domains of a run, sorted by name. Immutable.

    The fingerprint changes if the row length, the tokenizer, or any domain's name, row count or
    content does, and with nothing else: where the files lie is not part of it.
    """

    row_tokens: int
    tokenizer: str
    domains: tuple[Domain, ...]

    def __post_init__(self) -> None:
        if not self.domains:
            raise DataError("a catalog without domains. Give it at least one.")
        if self.row_tokens < 1:
            raise DataError(f"rows of {self.row_tokens} tokens; they need at least 1.")
        if not self.tokenizer.isprintable():
            raise DataError(f"tokenizer identity {self.tokenizer!r} is not printable. Use a digest in hex.")
        names = Counter(domain.name for domain in self.domains)
        if len(names) < len(self.domains):
            double = sorted(name for name, times in names.items() if times > 1)
            raise DataError(f"domains named twice: {', '.join(double)}. Names must differ.")
        object.__setattr__(self, "domains", tuple(sorted(self.domains, key=lambda domain: domain.name)))

    def __len__(self) -> int:
        return len(self.domains)

    @cached_property
    def names(self) -> tuple[str, ...]:
        return tuple(domain.name for domain in self.domains)

    @cached_property
    def num_rows_d(self) -> NDArray[np.int64]:
        rows = np.array([domain.num_rows for domain in self.domains], dtype=np.int64)
        rows.flags.writeable = False
        return rows

    @cached_property
    def key_d(self) -> NDArray[np.uint64]:
        """One key a domain for its shuffles, from its name alone."""
        keys = np.array([key_of("domain", name) for name in self.names], dtype=np.uint64)
        keys.flags.writeable = False
        return keys

    @cached_property
    def index(self) -> dict[str, int]:
        """Name to place in catalog order."""
        return {name: place for place, name in enumerate(self.names)}

    @cached_property
    def fingerprint(self) -> str:
        digest = hashlib.sha256(f"catalog 1\n{self.row_tokens}\n{self.tokenizer}\n".encode())
        for domain in self.domains:
            digest.update(f"{domain.name}\n{domain.num_rows}\n{domain.content}\n".encode())
        return digest.hexdigest()

    def to_dict(self) -> dict[str, Any]:
        return {
            "row_tokens": self.row_tokens,
            "tokenizer": self.tokenizer,
            "domains": {d.name: {"num_rows": d.num_rows, "content": d.content} for d in self.domains},
        }

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> "Catalog":
        try:
            domains = tuple(
                Domain(name, int(entry["num_rows"]), str(entry["content"])) for name, entry in value["domains"].items()
            )
            return cls(int(value["row_tokens"]), str(value["tokenizer"]), domains)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DataError(f"not a catalog: {error!r} while reading it.") from error

    def differences(self, other: "Catalog") -> list[str]:
        """What tells `other` from this catalog, one line a difference, for messages."""
        lines: list[str] = []
        if self.row_tokens != other.row_tokens:
            lines.append(f"rows of {self.row_tokens} tokens became rows of {other.row_tokens}")
        if self.tokenizer != other.tokenizer:
            lines.append(f"tokenizer {self.tokenizer} became {other.tokenizer}")
        before = {domain.name: domain for domain in self.domains}
        after = {domain.name: domain for domain in other.domains}
        lines += [f"domain {name!r} was removed" for name in before if name not in after]
        lines += [f"domain {name!r} was added" for name in after if name not in before]
        for name in before.keys() & after.keys():
            if before[name].num_rows != after[name].num_rows:
                lines.append(f"domain {name!r} had {before[name].num_rows} rows and has {after[name].num_rows}")
            elif before[name].content != after[name].content:
                lines.append(
                    f"domain {name!r} has other rows (content {before[name].content[:12]} "
                    f"became {after[name].content[:12]})"
                )
        return sorted(lines)
