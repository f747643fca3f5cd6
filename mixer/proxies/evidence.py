"""What a table says about the question that is asked: one row a run, in the catalog's order of domains.

What cannot be fitted is refused here, once for all methods, with the runs or domains named:

- a table of other domains than the setting's;
- no run that was measured to the end on all sets asked for (a run that ended early, or has a NaN, is left out and
  noted; if fewer than two are left, that is an error);
- a domain whose weight is the same in every run: nothing can be known of it;
- losses that are the same in every run, for all sets (a single such set is kept as a constant, and noted).

Runs whose mixtures span fewer dimensions than there are domains are fitted nevertheless, with a note: along the
missing directions the fits prefer small coefficients.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mixer.core.errors import DataError
from mixer.proxies.proposal import FitSetting
from mixer.proxies.table import RunTable

Floats = NDArray[np.float64]

SAME = 1e-9  # progress and weights that differ by less are one
TARGETS, VALIDATION = "target/", "validation/"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Evidence:
    """`targets` are the weights of the sets that the mixture is to be good at, summing to 1.

    Without any in the setting these are all sets `target/...` in equal parts, or, if there are none, all
    `validation/...`.
    """

    names: tuple[str, ...]
    weights_rd: Floats
    losses: Mapping[str, Floats]  # of the sets in `targets`, finite
    targets: Mapping[str, float]
    notes: tuple[str, ...] = ()

    def total(self, losses: Mapping[str, Floats]) -> Floats:
        """The weighted mean over the targets."""
        return np.sum([weight * losses[name] for name, weight in self.targets.items()], axis=0)


def last_progress(table: RunTable) -> float:
    return float(table.progress_r.max(initial=0.0))


def evidence(table: RunTable, setting: FitSetting, progress: float | None = None) -> Evidence:
    """The runs as they stood at `progress` (None: at their end)."""
    columns = _columns(table, setting)
    here = last_progress(table) if progress is None else progress
    rows = np.flatnonzero(np.abs(table.progress_r - here) <= SAME)
    notes: list[str] = []
    early = sorted(set(table.run_r) - {table.run_r[row] for row in rows.tolist()})
    if early:
        notes.append(f"left out, not measured at {here:.3g} of their tokens: {_some(early)}")
    targets = target_weights(table, setting)
    measured = np.stack([np.isfinite(table.losses[name][rows]) for name in targets]).all(axis=0)
    if not measured.all():
        lost = [table.run_r[row] for row in rows[~measured].tolist()]
        notes.append(f"left out, a loss is not finite: {_some(lost)}")
    rows = rows[measured]
    if rows.size < 2:
        raise DataError(
            f"{rows.size} of {len(set(table.run_r))} runs have finite losses of {_some(sorted(targets))} at {here:.3g} "
            "of their tokens; a fit needs at least 2. Finish the runs, or name other targets."
        )
    weights_rd = table.weights_rd[rows][:, columns]
    _refuse_weights(weights_rd, [table.run_r[row] for row in rows.tolist()], setting.names)
    losses = {name: table.losses[name][rows] for name in targets}
    still = [name for name, loss_r in losses.items() if np.ptp(loss_r) == 0.0]
    if len(still) == len(losses):
        raise DataError(
            f"losses of {_some(still)} are the same in all {rows.size} runs, so no mixture is better than another. "
            "Name targets that depend on the mixture."
        )
    if still:
        notes.append(f"the same in all runs, so without a say: {_some(still)}")
    rank = int(np.linalg.matrix_rank(weights_rd, tol=1e-7 * np.sqrt(rows.size)))
    if rank < len(setting.names):
        notes.append(f"the mixtures of {rows.size} runs span {rank} of {len(setting.names)} dimensions")
    return Evidence(names=setting.names, weights_rd=weights_rd, losses=losses, targets=targets, notes=tuple(notes))


def target_weights(table: RunTable, setting: FitSetting) -> dict[str, float]:
    """By set, summing to 1; see `Evidence`."""
    asked = {name: weight for name, weight in setting.targets.items() if weight > 0}
    unknown = sorted(set(asked) - set(table.losses))
    if unknown:
        raise DataError(f"the table has no losses of {_some(unknown)}; it has {_some(sorted(table.losses))}.")
    for prefix in (TARGETS, VALIDATION):
        asked = asked or {name: 1.0 for name in sorted(table.losses) if name.startswith(prefix)}
    if not asked:
        raise DataError(
            f"the table has no losses of sets {TARGETS}... or {VALIDATION}..., only of {_some(sorted(table.losses))}. "
            "Name the targets."
        )
    total = sum(asked.values())
    return {name: weight / total for name, weight in asked.items()}


def _columns(table: RunTable, setting: FitSetting) -> list[int]:
    missing, extra = set(setting.names) - set(table.domains), set(table.domains) - set(setting.names)
    if missing or extra:
        found = [f"does not know {_some(sorted(missing))}"] * bool(missing)
        found += [f"knows {_some(sorted(extra))}, which the catalog lacks"] * bool(extra)
        raise DataError(f"the table {' and '.join(found)}. Fit the catalog that the runs were made for.")
    return [table.domains.index(name) for name in setting.names]


def _refuse_weights(weights_rd: Floats, runs: list[str], names: tuple[str, ...]) -> None:
    bad = ~np.isfinite(weights_rd).all(axis=1) | (weights_rd < 0).any(axis=1)
    bad |= np.abs(weights_rd.sum(axis=1) - 1.0) > 1e-6
    if bad.any():
        run = int(np.argmax(bad))
        raise DataError(
            f"run {runs[run]!r} has the weights {weights_rd[run].tolist()}, summing to {weights_rd[run].sum()!r}. "
            "They need to be numbers >= 0 that sum to 1. Drop the run from the table."
        )
    same = np.ptp(weights_rd, axis=0) <= SAME
    if same.any() and len(names) > 1:
        found = [f"{names[place]} at {weights_rd[0, place]:.6g}" for place in np.flatnonzero(same).tolist()]
        raise DataError(
            f"the same weight in all {len(runs)} runs: {_some(found)}. What a domain does is seen only where its "
            "weight varies. Train runs that vary it, or leave it out of the catalog."
        )


def _some(found: list[str], most: int = 6) -> str:
    return ", ".join(found[:most]) + (f" and {len(found) - most} more" if len(found) > most else "")
