import json
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixer.core.catalog import Catalog, Domain
from mixer.core.errors import ConfigError
from mixer.core.mixture import Mixture


def catalog_of(**rows: int) -> Catalog:
    return Catalog(2048, "byte", tuple(Domain(name, count, f"of {name}") for name, count in rows.items()))


CATALOG = catalog_of(code=300, books=100, web=600)  # by name: books, code, web


def test_natural_counts_rows_in_name_order() -> None:
    assert Mixture.natural(CATALOG).to_dict(CATALOG) == {"books": 0.1, "code": 0.3, "web": 0.6}


def test_natural_of_the_largest_domains_sums_to_one() -> None:
    huge = catalog_of(**{f"d{place}": 1 << 48 for place in range(1 << 16)})  # 2^64 rows
    assert set(Mixture.natural(huge).weights_d.tolist()) == {2.0**-16}


def test_uniform_gives_every_domain_the_same() -> None:
    assert Mixture.uniform(CATALOG).weights_d.tolist() == [1 / 3, 1 / 3, 1 / 3]


def test_a_weight_may_be_zero_and_minus_zero_is_zero() -> None:
    assert Mixture(np.array([-0.0, 1.0])) == Mixture(np.array([0.0, 1.0]))


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([0.5, 0.4], r"weights sum to 0\.9, not 1: \{0: 0\.5, 1: 0\.4\}\. Correct them"),
        ([1.5, -0.5], r"negative weights: 1: -0\.5\."),
        ([float("nan"), 1.0], r"not finite: 0: nan\."),
        ([float("inf"), 1.0], r"not finite: 0: inf\."),
        ([0.0, 0.0, 0.0], r"all 3 weights are 0"),
        ([], r"weights of shape \(0,\)"),
        ([[0.5], [0.5]], r"weights of shape \(2, 1\)"),
        (["a", "b"], r"are not numbers"),
        ([1.7e308, 1.7e308], r"sum to inf"),
    ],
)
def test_refusals_of_arrays_give_the_values(weights: list[float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Mixture(np.array(weights))


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"books": 0.2, "code": 0.3, "web": 0.4}, r"to 0\.9, not 1: \{books: 0\.2, code: 0\.3, web: 0\.4\}"),
        ({"books": 0.2, "code": 0.3, "wbe": 0.5}, r"unknown domain 'wbe'\. The nearest known one is 'web'\."),
        ({"books": 0.2, "code": 0.8}, r"leave out 'web'\."),
        ({"books": -0.5, "code": 0.5, "web": 1.0}, r"negative weights: books: -0\.5\."),
        ({"books": 0.5, "code": 0.5, "web": float("nan")}, r"not finite: web: nan\."),
        ({"books": 0.5, "code": 0.5, "web": float("inf")}, r"not finite: web: inf\."),
        ({"books": 0.0, "code": 0, "web": 0.0}, r"all 3 weights are 0"),
        ({"books": "0.5", "code": 0.5, "web": 0.0}, r"weight of 'books' is '0\.5', not a number"),
        ({"books": True, "code": 0.0, "web": 0.0}, r"weight of 'books' is True, not a number"),
    ],
)
def test_refusals_of_dicts_give_names_and_values(weights: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Mixture.from_dict(CATALOG, weights)


def test_many_wrong_weights_are_counted_not_listed() -> None:
    with pytest.raises(ConfigError, match=r"7: -1\.0 and 92 more"):
        Mixture(np.full(100, -1.0))


def test_normalizes_only_when_asked() -> None:
    weights = {"books": 1, "code": 2, "web": 5.0}
    with pytest.raises(ConfigError, match="sum to 8"):
        Mixture.from_dict(CATALOG, weights)
    assert Mixture.from_dict(CATALOG, weights, normalize=True).weights_d.tolist() == [0.125, 0.25, 0.625]
    huge = Mixture.from_dict(CATALOG, {"books": 0.0, "code": 1.7e308, "web": 1.7e308}, normalize=True)
    assert huge.weights_d.tolist() == [0.0, 0.5, 0.5]
    with pytest.raises(ConfigError, match="all 3 weights are 0"):
        Mixture.from_dict(CATALOG, {"books": 0, "code": 0, "web": 0}, normalize=True)


def test_to_dict_refuses_another_catalog() -> None:
    with pytest.raises(ConfigError, match="2 weights for a catalog of 3 domains"):
        Mixture(np.array([0.5, 0.5])).to_dict(CATALOG)


def test_can_not_be_changed() -> None:
    source = np.array([0.25, 0.75])
    mixture = Mixture(source)
    source[0] = 9.0
    assert mixture.weights_d.tolist() == [0.25, 0.75]
    for one in (mixture, pickle.loads(pickle.dumps(mixture))):
        with pytest.raises(ValueError, match="read-only"):
            one.weights_d[0] = 9.0
        with pytest.raises(ValueError, match="WRITEABLE"):
            one.weights_d.flags.writeable = True
    with pytest.raises(AttributeError):
        mixture.weights_d = source  # pyright: ignore[reportAttributeAccessIssue]  # what is tested


def test_equality_is_by_bits() -> None:
    mixture = Mixture(np.array([0.25, 0.75]))
    assert mixture == pickle.loads(pickle.dumps(mixture))
    assert len({mixture, Mixture(np.array([0.25, 0.75]))}) == 1
    assert mixture != Mixture(np.array([0.25, np.nextafter(0.75, 1.0)]))
    assert mixture != Mixture(np.array([0.25, 0.75, 0.0]))
    assert mixture != "a quarter"


def test_shift_is_the_sum_of_all_changes() -> None:
    assert Mixture(np.array([0.5, 0.5, 0.0])).shift(Mixture(np.array([0.25, 0.5, 0.25]))) == 0.5


@given(st.lists(st.floats(0, 1e300, allow_subnormal=True), min_size=1, max_size=50).filter(any))
def test_json_restores_every_float(weights: list[float]) -> None:
    catalog = catalog_of(**{f"d{place:02}": 1 for place in range(len(weights))})
    mixture = Mixture.from_dict(catalog, dict(zip(catalog.names, weights, strict=True)), normalize=True)
    text = json.dumps(mixture.to_dict(catalog))
    assert Mixture.from_dict(catalog, json.loads(text)) == mixture


def test_named_weights_hold_and_the_others_share_the_rest_as_before():
    catalog = catalog_of(a=10, b=10, c=10)
    mixture = Mixture.from_dict(catalog, {"a": 0.5, "b": 0.3, "c": 0.2})
    assert mixture.holding(catalog, {"a": 0.75}).to_dict(catalog) == pytest.approx({"a": 0.75, "b": 0.15, "c": 0.1})
    alone = Mixture.from_dict(catalog, {"a": 1.0, "b": 0.0, "c": 0.0})
    assert alone.holding(catalog, {"a": 0.5}).to_dict(catalog) == pytest.approx({"a": 0.5, "b": 0.25, "c": 0.25})
    with pytest.raises(ConfigError, match="more than 1: {a: 0.8, b: 0.5}"):
        mixture.holding(catalog, {"a": 0.8, "b": 0.5})
    with pytest.raises(ConfigError, match="unknown domain 'd'"):
        mixture.holding(catalog, {"d": 0.5})
    with pytest.raises(ConfigError, match="sum to 0.9"):
        mixture.holding(catalog, {"a": 0.5, "b": 0.2, "c": 0.2})
