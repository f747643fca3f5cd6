import pickle
from dataclasses import FrozenInstanceError, replace

import numpy as np
import pytest

from mixer.core.catalog import MAX_ROWS, Catalog, Domain
from mixer.core.errors import DataError
from mixer.core.permute import key_of
from tests.core.making import catalog_of, catalog_of_sizes


def test_domains_are_sorted_by_name_however_they_are_given() -> None:
    domains = (Domain("web", 600, "w"), Domain("books", 100, "b"), Domain("code", 300, "c"))
    catalog = Catalog(2048, "byte", domains)
    assert catalog.names == ("books", "code", "web")
    assert catalog.num_rows_d.tolist() == [100, 300, 600]
    assert catalog.index == {"books": 0, "code": 1, "web": 2}
    assert len(catalog) == 3
    assert catalog == Catalog(2048, "byte", domains[::-1])
    assert catalog.fingerprint == Catalog(2048, "byte", domains[::-1]).fingerprint


def test_names_sort_by_code_point_whatever_the_language() -> None:
    assert catalog_of(**{"ä": 1, "z": 1, "A": 1, "a": 1, "中": 1}).names == ("A", "a", "z", "ä", "中")


@pytest.mark.parametrize("name", ["", " web", "web ", "we\nb", "web\t", "we\x00b", "\x1f", "\ud800"])
def test_a_name_that_cannot_be_shown_on_a_line_is_refused(name: str) -> None:
    with pytest.raises(DataError, match=r"is empty, padded with spaces or not printable. Rename"):
        Domain(name, 1, "x")


@pytest.mark.parametrize("rows", [0, -1, MAX_ROWS + 1])
def test_a_number_of_rows_out_of_range_is_refused(rows: int) -> None:
    with pytest.raises(DataError, match=rf"domain 'web' has {rows} rows; it needs 1 to {MAX_ROWS}"):
        Domain("web", rows, "x")


def test_the_least_and_the_most_rows() -> None:
    assert catalog_of(a=1, b=MAX_ROWS).num_rows_d.tolist() == [1, 1 << 48]


def test_no_domain_and_no_token_are_refused() -> None:
    with pytest.raises(DataError, match="a catalog without domains"):
        Catalog(2048, "byte", ())
    with pytest.raises(DataError, match="rows of 0 tokens; they need at least 1"):
        Catalog(0, "byte", (Domain("a", 1, "x"),))


def test_domains_of_one_name_are_refused_and_named() -> None:
    with pytest.raises(DataError, match=r"domains named twice: b, c. Names must differ"):
        Catalog(8, "byte", tuple(Domain(name, 1, "x") for name in "abcbc"))


@pytest.mark.parametrize("content", ["x\ny", "x\0"])
def test_text_that_could_imitate_another_catalog_is_refused(content: str) -> None:
    with pytest.raises(DataError, match=r"content .* of domain 'a' is not printable"):
        Domain("a", 1, content)
    with pytest.raises(DataError, match=r"tokenizer identity .* is not printable"):
        Catalog(8, content, (Domain("a", 1, "x"),))


CATALOG = catalog_of(books=100, code=300)


@pytest.mark.parametrize(
    "other",
    [
        replace(CATALOG, row_tokens=2047),
        replace(CATALOG, tokenizer="gpt2"),
        replace(CATALOG, domains=(Domain("books", 100, "of books"), Domain("codex", 300, "of code"))),
        replace(CATALOG, domains=(Domain("books", 100, "of books"), Domain("code", 301, "of code"))),
        replace(CATALOG, domains=(Domain("books", 100, "of books"), Domain("code", 300, "of cod"))),
        replace(CATALOG, domains=CATALOG.domains[:1]),
        replace(CATALOG, domains=(*CATALOG.domains, Domain("web", 1, "w"))),
        replace(CATALOG, domains=(Domain("books", 100, "of code"), Domain("code", 300, "of books"))),
    ],
)
def test_the_fingerprint_changes_with_anything_that_names_rows(other: Catalog) -> None:
    assert other.fingerprint != CATALOG.fingerprint
    assert CATALOG.differences(other)


def test_the_fingerprint_stays_what_it_was_in_saved_runs() -> None:
    assert CATALOG.fingerprint == "e5fe4bbb384ab85633c0143a7fc271fcc9b21ff5fc3e81983c6e31d08174d62c"


def test_a_catalog_of_five_thousand_domains_survives_its_dict_and_pickle() -> None:
    catalog = catalog_of_sizes([(i * 7919) % MAX_ROWS + 1 for i in range(5_000)])
    again = Catalog.from_dict(catalog.to_dict())
    assert again == catalog
    assert again.fingerprint == catalog.fingerprint
    assert pickle.loads(pickle.dumps(catalog)).fingerprint == catalog.fingerprint


def test_arrays_of_a_catalog_cannot_be_written() -> None:
    with pytest.raises(ValueError, match="read-only"):
        CATALOG.num_rows_d[0] = 1
    with pytest.raises(ValueError, match="read-only"):
        CATALOG.key_d[0] = 1
    with pytest.raises(FrozenInstanceError):
        CATALOG.row_tokens = 1  # pyright: ignore[reportAttributeAccessIssue]  # that is what is tested


def test_the_key_of_a_domain_comes_from_its_name_alone() -> None:
    one = Catalog(8, "byte", (Domain("code", 5, "x"),))
    assert one.key_d.tolist() == [key_of("domain", "code")]
    assert catalog_of(code=300, a=1, web=3).key_d[1] == one.key_d[0]
    assert len(np.unique(catalog_of_sizes([1] * 5_000).key_d)) == 5_000


@pytest.mark.parametrize(
    "value",
    [
        {},
        {"row_tokens": 8, "tokenizer": "byte"},
        {"row_tokens": 8, "tokenizer": "byte", "domains": ["a"]},
        {"row_tokens": "many", "tokenizer": "byte", "domains": {}},
        {"row_tokens": 8, "tokenizer": "byte", "domains": {"a": {"num_rows": 1}}},
        {"row_tokens": 8, "tokenizer": "byte", "domains": {"a": None}},
        {"row_tokens": None, "tokenizer": "byte", "domains": {"a": {"num_rows": 1, "content": "x"}}},
    ],
)
def test_a_dict_that_is_no_catalog_is_refused(value: dict[str, object]) -> None:
    with pytest.raises(DataError, match="not a catalog: "):
        Catalog.from_dict(value)


def test_differences_name_every_difference_once() -> None:
    after = Catalog(
        1024,
        "gpt2",
        (Domain("books", 101, "of books"), Domain("code", 300, "other content"), Domain("web", 5, "w")),
    )
    before = catalog_of(books=100, code=300, wiki=7)
    assert before.differences(after) == [
        "domain 'books' had 100 rows and has 101",
        "domain 'code' has other rows (content of code became other conten)",
        "domain 'web' was added",
        "domain 'wiki' was removed",
        "rows of 2048 tokens became rows of 1024",
        "tokenizer byte became gpt2",
    ]
    assert before.differences(before) == []
