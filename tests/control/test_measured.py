"""A signal as the journal keeps it, and back."""

import json

import numpy as np
import pytest

from mixer.control.measured import from_record, to_record
from mixer.core.catalog import Catalog, Domain
from mixer.core.errors import SignalError
from mixer.core.influence import Influence
from mixer.core.signal import Evaluation, Signal, on_grid


def full_signal(domains: int, targets: tuple[str, ...] = ("code", "a/b")) -> tuple[Signal, Catalog]:
    rng = np.random.default_rng(domains)
    catalog = Catalog(16, "fake", tuple(Domain(f"d{i:03d}", 10 + i, f"content {i}") for i in range(domains)))
    counts = rng.integers(1, 100, (3, domains))
    gram = rng.normal(size=(domains, domains))
    benefit = rng.normal(size=(domains, len(targets)))
    benefit[0, 0] = np.nan
    influence = Influence(
        metric="adam",
        targets=targets,
        benefit_dt=benefit,
        benefit_error_dt=benefit**2,
        loss_d=rng.random(domains),
        target_loss_t=rng.random(len(targets)),
        rate=1e-3 / 3,
        gram_dd=gram,
        gram_error_dd=gram / 3,
        target_gram_tt=rng.random((len(targets), len(targets))),
        noise_d=rng.random(domains),
        tokens=4096,
    )
    signal = Signal(
        window=7,
        catalog=catalog.fingerprint,
        loss_sum_d=on_grid(rng.random(domains) * 100),
        tokens_d=counts[0],
        rows_d=counts[1],
        bad_rows_d=counts[2],
        excess_sum_d=on_grid(rng.random(domains)),
        evaluation=Evaluation(sets=("target/code", "validation/d000"), loss_s=np.array([1 / 3, np.nan])),
        influence=influence,
    )
    return signal, catalog


@pytest.mark.parametrize("domains", [1, 5, 80])  # beyond 64 arrays are packed
def test_every_bit_comes_back_through_json(domains):
    signal, catalog = full_signal(domains)
    text = json.dumps(to_record(signal, catalog)).replace("NaN", "null")  # as the journal writes it
    assert from_record(json.loads(text), 7, catalog) == signal


def test_what_was_not_measured_stays_away():
    signal, catalog = full_signal(4)
    plain = Signal(
        window=7,
        catalog=catalog.fingerprint,
        **{key: getattr(signal, key) for key in ("loss_sum_d", "tokens_d", "rows_d", "bad_rows_d")},
    )
    record = to_record(plain, catalog)
    assert record.keys() == {"loss_sum", "tokens_d", "rows_d", "bad_rows_d"}
    assert from_record(record, 7, catalog) == plain


def test_damage_is_told():
    signal, catalog = full_signal(4)
    record = to_record(signal, catalog)
    for harmed in (
        record | {"loss_sum": {"nobody": 1.0}},
        record | {"influence": record["influence"] | {"benefit": {}}},
        {key: value for key, value in record.items() if key != "rows_d"},
    ):
        with pytest.raises((KeyError, TypeError, ValueError, AttributeError)):
            from_record(harmed, 7, catalog)
    with pytest.raises(SignalError, match="off the grid"):
        from_record(record | {"loss_sum": dict.fromkeys(catalog.names, 0.1)}, 7, catalog)
