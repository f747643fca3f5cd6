"""A signal as a record of the journal, from which it can be made again to the last bit.

Losses, tokens and rows are in every window's record. What only some policies ask for stands beside them where it
was measured: `excess_sum`, `evaluation` (losses by set), and `influence` (matrices as columns by name: `benefit` and
`error` by target, `gram` by domain).
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mixer.core.catalog import Catalog
from mixer.core.influence import Influence
from mixer.core.schedule import pack_d, unpack_d
from mixer.core.signal import Evaluation, Signal

Floats = NDArray[np.float64]


def to_record(signal: Signal, catalog: Catalog) -> dict[str, Any]:
    record: dict[str, Any] = {
        "loss_sum": pack_d(signal.loss_sum_d, catalog),
        "tokens_d": pack_d(signal.tokens_d, catalog),
        "rows_d": pack_d(signal.rows_d, catalog),
        "bad_rows_d": pack_d(signal.bad_rows_d, catalog),
    }
    if signal.excess_sum_d is not None:
        record["excess_sum"] = pack_d(signal.excess_sum_d, catalog)
    if signal.evaluation is not None:
        losses = signal.evaluation.loss_s.tolist()
        record["evaluation"] = dict(zip(signal.evaluation.sets, losses, strict=True))
    if signal.influence is not None:
        record["influence"] = _of_influence(signal.influence, catalog)
    return record


def from_record(record: Mapping[str, Any], window: int, catalog: Catalog) -> Signal:
    """Raises KeyError, TypeError, ValueError or AttributeError where the record holds no signal."""
    evaluation, influence = record.get("evaluation"), record.get("influence")
    return Signal(
        window=window,
        catalog=catalog.fingerprint,
        loss_sum_d=unpack_d(record["loss_sum"], catalog, np.float64),
        tokens_d=unpack_d(record["tokens_d"], catalog, np.int64),
        rows_d=unpack_d(record["rows_d"], catalog, np.int64),
        bad_rows_d=unpack_d(record["bad_rows_d"], catalog, np.int64),
        excess_sum_d=unpack_d(record["excess_sum"], catalog, np.float64) if "excess_sum" in record else None,
        evaluation=None
        if evaluation is None
        else Evaluation(sets=tuple(evaluation), loss_s=np.array(list(evaluation.values()), dtype=np.float64)),
        influence=None if influence is None else _to_influence(influence, catalog),
    )


def _of_influence(one: Influence, catalog: Catalog) -> dict[str, Any]:
    def columns(names: tuple[str, ...], value_dx: Floats) -> dict[str, Any]:
        return {name: pack_d(value_dx[:, place], catalog) for place, name in enumerate(names)}

    record: dict[str, Any] = {
        "metric": one.metric,
        "targets": list(one.targets),
        "rate": one.rate,
        "tokens": one.tokens,
        "loss": pack_d(one.loss_d, catalog),
        "target_loss": one.target_loss_t.tolist(),
        "benefit": columns(one.targets, one.benefit_dt),
        "error": columns(one.targets, one.benefit_error_dt),
    }
    if one.gram_dd is not None:
        record["gram"] = columns(catalog.names, one.gram_dd)
    if one.gram_error_dd is not None:
        record["gram_error"] = columns(catalog.names, one.gram_error_dd)
    if one.target_gram_tt is not None:
        record["target_gram"] = one.target_gram_tt.tolist()
    if one.noise_d is not None:
        record["noise"] = pack_d(one.noise_d, catalog)
    return record


def _to_influence(value: Mapping[str, Any], catalog: Catalog) -> Influence:
    targets = tuple(value["targets"])

    def columns(key: str, names: tuple[str, ...]) -> Floats | None:
        if key not in value:
            return None
        parts = [unpack_d(value[key][name], catalog, np.float64) for name in names]
        return np.stack(parts, axis=1) if parts else np.zeros((len(catalog), 0))

    benefit_dt, error_dt = columns("benefit", targets), columns("error", targets)
    if benefit_dt is None or error_dt is None:
        raise ValueError("an influence without a benefit and its error")
    return Influence(
        metric=str(value["metric"]),
        targets=targets,
        benefit_dt=benefit_dt,
        benefit_error_dt=error_dt,
        loss_d=unpack_d(value["loss"], catalog, np.float64),
        target_loss_t=np.array(value["target_loss"], dtype=np.float64),
        rate=float(value["rate"]),
        gram_dd=columns("gram", catalog.names),
        gram_error_dd=columns("gram_error", catalog.names),
        target_gram_tt=np.array(value["target_gram"], dtype=np.float64) if "target_gram" in value else None,
        noise_d=unpack_d(value["noise"], catalog, np.float64) if "noise" in value else None,
        tokens=int(value["tokens"]),
    )
