"""Every refusal says what was found, where, what was needed; what is saved reads back equal."""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixer import config
from mixer.core.errors import ConfigError, InfeasibleError


class Order(Enum):
    SORTED = "sorted"
    SHUFFLED = "shuffled"


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    paths: tuple[str, ...]
    prior: float = 1.0
    kind: Literal["parquet", "jsonl", "text"] = "text"


@dataclass(frozen=True, slots=True, kw_only=True)
class Rails:
    floor: float = 0.0
    cap: float = 1.0
    caps: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.floor > self.cap:
            raise InfeasibleError(f"floor={self.floor} is above cap={self.cap}.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    output: str
    seed: int = 0
    rate: float = 0.5
    keep: bool = False
    order: Order = Order.SHUFFLED
    limit: int | None = None
    window: int | str = 16
    span: tuple[int, int] = (0, 1)
    sizes: list[int] = field(default_factory=list)
    folder: Path = Path("runs")
    extra: dict[str, Any] = field(default_factory=dict)
    rails: Rails = field(default_factory=Rails)
    guard: Rails | None = None
    domains: dict[str, Source] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    data: Options
    note: str | None = None


@pytest.fixture
def load(tmp_path):
    """load(*texts, overrides, schema): every text as a file a.yaml, b.yaml, ..."""

    def load_texts(*texts: str, overrides=(), schema: type = Options):
        files = []
        for name, text in zip("abcdef", texts, strict=False):
            (tmp_path / f"{name}.yaml").write_text(text)
            files.append(tmp_path / f"{name}.yaml")
        return config.load(schema, files, overrides)

    return load_texts


def refusal(load, *texts, overrides=(), schema: type = Options) -> str:
    with pytest.raises(ConfigError) as caught:
        load(*texts, overrides=overrides, schema=schema)
    return str(caught.value)


def test_every_kind_of_value_arrives_with_its_type(load):
    options = load(
        """
        output: out
        rate: 1
        keep: true
        order: sorted
        limit: 7
        window: all
        span: [3, 4]
        sizes: [1, 2]
        folder: a/b
        extra: {deep: [1, {x: null}]}
        guard: {floor: 1e-3}
        domains:
          code: {paths: [a, b]}
          web.2024: {paths: [c], kind: jsonl, prior: 2}
        """
    )
    assert options == Options(
        output="out",
        rate=1.0,
        keep=True,
        order=Order.SORTED,
        limit=7,
        window="all",
        span=(3, 4),
        sizes=[1, 2],
        folder=Path("a/b"),
        extra={"deep": [1, {"x": None}]},
        guard=Rails(floor=0.001),
        domains={
            "code": Source(paths=("a", "b")),
            "web.2024": Source(paths=("c",), kind="jsonl", prior=2.0),
        },
    )
    assert type(options.rate) is float
    assert type(options.domains["code"].paths) is tuple


def test_files_merge_left_to_right_and_overrides_come_last(load):
    options = load(
        "output: a\nseed: 1\nrails: {floor: 0.1, cap: 0.5}\nsizes: [1, 2, 3]\nlimit: 3\nguard: {cap: 0.9}",
        "seed: 2\nrails: {cap: 0.6}\nsizes: [4]\nlimit: null\nguard: null",
        overrides=["seed=3", "rails.floor=0.2", "rails.floor=0.3", "output=x=y"],
    )
    assert options == Options(output="x=y", seed=3, rails=Rails(floor=0.3, cap=0.6), sizes=[4], limit=None, guard=None)


def test_an_empty_file_says_nothing(load):
    assert load("# nothing\n", overrides=["output=o"]) == Options(output="o")


@pytest.mark.parametrize(
    ("override", "domain", "prior"),
    [
        ("domains.code.prior=2", "code", 2.0),
        ("domains[web.2024].prior=3", "web.2024", 3.0),
        ("domains[a=b].prior=3", None, None),
        ("domains.2024.prior=4", "2024", 4.0),
        ("domains.two words.prior=5", "two words", 5.0),
    ],
)
def test_an_override_reaches_into_a_mapping_by_name(load, override, domain, prior):
    names = ["code", "web.2024", "'2024'", "two words"]
    text = f"output: o\ndomains: {{{', '.join(f'{name}: {{paths: []}}' for name in names)}}}"
    if domain is None:
        assert "has no proper key; needed names joined by dots" in refusal(load, text, overrides=[override])
    else:
        assert load(text, overrides=[override]).domains[domain].prior == prior


def test_an_override_may_hold_any_yaml_value(load):
    overrides = [
        "output='7'",
        "sizes=[1,2]",
        "rails={cap: 0.4}",
        "limit=null",
        "rate=2.5e-1",
        "domains.a.paths=[x]",
    ]
    assert load(overrides=overrides) == Options(
        output="7", sizes=[1, 2], rails=Rails(cap=0.4), rate=0.25, domains={"a": Source(paths=("x",))}
    )


UNKNOWN = [
    ("output: o\nsede: 1", "unknown option `sede` (", "a.yaml). Did you mean `seed`?"),
    ("output: o\nrails: {flor: 1}", "unknown option `rails.flor` (", "Did you mean `rails.floor`?"),
    ("output: o\nguard: {capp: 1}", "unknown option `guard.capp` (", "Did you mean `guard.cap`?"),
    (
        "output: o\ndomains: {code: {pats: [x]}}",
        "unknown option `domains.code.pats`",
        "`domains.code.paths`?",
    ),
    (
        "output: o\ndomains: {v1.5: {pats: [x]}}",
        "unknown option `domains[v1.5].pats`",
        "`domains[v1.5].paths`?",
    ),
    ("output: o\nzzz: 1", "unknown option `zzz` (", "Known are output, seed, rate, keep"),
]


@pytest.mark.parametrize(("text", "found", "advice"), UNKNOWN)
def test_an_unknown_key_is_refused_with_path_file_and_nearest_key(load, text, found, advice):
    message = refusal(load, text)
    assert found in message
    assert advice in message
    assert "a.yaml" in message


def test_the_file_named_is_the_one_that_holds_the_key(load):
    assert "b.yaml)" in refusal(load, "output: o\nrails: {cap: 1}", "rails: {kap: 1}")
    assert "(override 'rails.kap=1')" in refusal(load, "output: o", overrides=["rails.kap=1"])


WRONG = [
    ("seed: 1.5", "option `seed` is 1.5 (", "needed int."),
    ("seed: abc", "option `seed` is 'abc' (", "needed int."),
    ("seed: '7'", "option `seed` is '7' (", "needed int."),
    ("seed: true", "option `seed` is True (", "needed int."),
    ("seed: null", "option `seed` is None (", "needed int."),
    ("rate: true", "option `rate` is True (", "needed float."),
    ("keep: 1", "option `keep` is 1 (", "needed bool."),
    ("output: 3", "option `output` is 3 (", "needed str."),
    ("limit: x", "option `limit` is 'x' (", "needed int."),
    ("window: 1.5", "option `window` is 1.5 (", "needed int or str."),
    ("span: [1]", "option `span` is [1] (", "needed tuple[int, int]."),
    ("span: 3", "option `span` is 3 (", "needed tuple[int, int]."),
    ("sizes: [1, x]", "option `sizes[1]` is 'x' (", "needed int."),
    ("sizes: 1", "option `sizes` is 1 (", "needed list[int]."),
    ("rails: 3", "option `rails` is 3 (", "needed a mapping of floor, cap, caps."),
    ("domains: [a]", "option `domains` is ['a'] (", "needed dict[str, "),
    ("domains: {code: {paths: a}}", "option `domains.code.paths` is 'a' (", "needed tuple[str, ...]."),
    (
        "domains: {code: {paths: [], kind: json}}",
        "`domains.code.kind` is 'json' (",
        "one of parquet, jsonl, text.",
    ),
    ("order: upward", "option `order` is 'upward' (", "needed one of sorted, shuffled."),
]


@pytest.mark.parametrize(("text", "found", "needed"), WRONG)
def test_a_wrong_value_is_refused_with_path_value_and_what_was_needed(load, text, found, needed):
    message = refusal(load, "output: o", text)
    assert found in message
    assert needed in message
    assert "b.yaml)" in message


def test_a_missing_value_is_refused_with_its_whole_path(load):
    assert refusal(load) == ("option `output` is missing; needed str. Set it in a file, or by output=...")
    assert "option `data.output` is missing" in refusal(load, schema=Run)
    assert "option `domains[v1.5].paths` is missing; needed tuple[str, ...]" in refusal(
        load, "output: o\ndomains: {v1.5: {prior: 1}}"
    )


def test_a_rule_of_a_dataclass_is_refused_with_the_path_of_that_dataclass(load):
    with pytest.raises(InfeasibleError) as caught:
        load("data: {output: o, guard: {floor: 2}}", schema=Run)
    assert str(caught.value) == "data.guard: floor=2.0 is above cap=1.0."
    with pytest.raises(InfeasibleError, match=r"^floor=3"):
        load("floor: 3", schema=Rails)


FILES = [
    ("a: [1", "is not YAML: while parsing a flow sequence"),
    ("seed: 1\nseed: 2", "found duplicate key seed"),
    ("rails: {cap: 1, cap: 1}", "found duplicate key cap"),
    ("just words", "holds a value; needed a mapping of options"),
    ("- a\n- b", "holds a list; needed a mapping of options"),
    ("3", "holds a value; needed a mapping"),
    ("seed: !!python/object/apply:os.getpid []", "line 1: a YAML tag; only plain values"),
    ("seed: 1\nfolder: !!python/object/apply:pathlib.Path [x]", "line 2: a YAML tag"),
    ("seed: !!int 3", "line 1: a YAML tag"),
    ("1: 2", "key 1 in `` ("),
    ("domains: {2024: {paths: []}}", "key 2024 in `domains` ("),
    ("output: ${oc.env:HOME}", "line 1: '${oc.env:HOME}' is an interpolation"),
    ("seed: 1\nsizes: ['${seed}']", "line 2: '${seed}' is an interpolation"),
    ("${a}: 1", "is an interpolation"),
    ("output: 'broken ${'", "is an interpolation"),
    ("seed: 1\n---\nseed: 2", "is refused: expected a single document"),
]


@pytest.mark.parametrize(("text", "part"), FILES)
def test_a_file_that_is_more_or_less_than_options_is_refused(load, text, part):
    message = refusal(load, text)
    assert part in message
    assert "a.yaml" in message


def test_a_comment_may_speak_of_interpolation(load):
    assert load("output: o # not ${this}").output == "o"


def test_a_file_that_cannot_be_read_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere\.yaml is not a file. Name one; those that come with mixer lie in"):
        config.load(Options, [tmp_path / "nowhere.yaml"])
    with pytest.raises(ConfigError, match="is not a file"):
        config.load(Options, [tmp_path])
    (tmp_path / "latin.yaml").write_bytes("output: é".encode("latin-1"))
    with pytest.raises(ConfigError, match=r"latin\.yaml cannot be read: .* Needed a text in UTF-8"):
        config.load(Options, [tmp_path / "latin.yaml"])


OVERRIDES = [
    ("seed", "override 'seed' has no '='; needed key=value, as in seed=7."),
    ("=3", "override '=3' has no proper key"),
    ("rails..cap=1", "has no proper key"),
    (".rails=1", "has no proper key"),
    ("rails.=1", "has no proper key"),
    ("domains[x=1", "has no proper key"),
    ("domains[x]y=1", "has no proper key"),
    ("sizes=[1", "override 'sizes=[1' is not YAML"),
    ("rails={cap: 1, cap: 2}", "found duplicate key cap"),
    ("output=${oc.env:HOME}", "is an interpolation"),
    ("seed=!!int 3", "a YAML tag"),
    (
        "sizes.0=3",
        "is {'0': 3} (override 'sizes.0=3'); needed list[int]. A list is overridden as a whole: sizes=[...].",
    ),
    ("span[0]=3", "A list is overridden as a whole: span=[...]."),
    ("seed.x=3", "option `seed` is {'x': 3} (override 'seed.x=3'); needed int."),
]


@pytest.mark.parametrize(("override", "part"), OVERRIDES)
def test_an_override_that_cannot_be_obeyed_is_refused(load, override, part):
    assert part in refusal(load, "output: o\nsizes: [1, 2]", overrides=[override])


def test_no_environment_variable_changes_what_is_loaded(load, monkeypatch):
    monkeypatch.setenv("SEED", "9")
    assert load("output: $SEED", overrides=["folder=~/x"]) == Options(output="$SEED", folder=Path("~/x"))


names = st.text(min_size=1, max_size=12).filter(lambda name: name.isprintable() and "${" not in name)
texts = st.text(max_size=20).filter(lambda text: "${" not in text) | st.sampled_from(
    [
        "",
        "null",
        "~",
        "true",
        "on",
        "1e3",
        "1_0",
        "0x1",
        "-",
        "???",
        ".inf",
        "2020-01-01",
        "12:30",
        "a: b",
        "# x",
        "=",
        "<<",
    ]
)
floats = st.floats(allow_nan=False)
plain = st.recursive(
    st.none() | st.booleans() | st.integers() | floats | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3),
    max_leaves=8,
)
rails = st.builds(
    Rails,
    floor=st.floats(0, 0.5),
    cap=st.floats(0.5, 1),
    caps=st.dictionaries(names, floats, max_size=4),
)
options = st.builds(
    Options,
    output=texts,
    seed=st.integers(),
    rate=floats,
    keep=st.booleans(),
    order=st.sampled_from(Order),
    limit=st.none() | st.integers(),
    window=st.integers() | texts,
    span=st.tuples(st.integers(), st.integers()),
    sizes=st.lists(st.integers(), max_size=3),
    folder=st.sampled_from([Path("a"), Path("a/b c")]),
    extra=st.dictionaries(names, plain, max_size=3),
    rails=rails,
    guard=st.none() | rails,
    domains=st.dictionaries(
        names, st.builds(Source, paths=st.lists(texts, max_size=3).map(tuple), prior=floats), max_size=3
    ),
)


@given(options)
def test_what_is_saved_is_loaded_equal_to_the_last_bit(tmp_path_factory, value):
    path = tmp_path_factory.getbasetemp() / "saved.yaml"
    config.save(value, path)
    again = config.load(Options, [path])
    assert again == value
    assert repr(again) == repr(value)  # -0.0 too, and the order of names


def test_not_a_number_is_saved_too(tmp_path):
    config.save(Rails(caps={"a": math.nan}), tmp_path / "run.yaml")
    assert math.isnan(config.load(Rails, [tmp_path / "run.yaml"]).caps["a"])


def test_saving_writes_defaults_too_and_leaves_nothing_else(tmp_path):
    config.save(Rails(cap=0.5), tmp_path / "run.yaml")
    config.save(Rails(cap=0.25), tmp_path / "run.yaml")
    assert (tmp_path / "run.yaml").read_text() == "floor: 0.0\ncap: 0.25\ncaps: {}\n"
    assert os.listdir(tmp_path) == ["run.yaml"]


def test_a_failed_save_leaves_the_old_file_whole(tmp_path, monkeypatch):
    config.save(Rails(cap=0.5), tmp_path / "run.yaml")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ConfigError, match=r"run\.yaml cannot be written: No space left on device"):
        config.save(Rails(cap=0.25), tmp_path / "run.yaml")
    assert config.load(Rails, [tmp_path / "run.yaml"]) == Rails(cap=0.5)
    assert os.listdir(tmp_path) == ["run.yaml"]
    with pytest.raises(ConfigError, match=r"cannot be written: No such file or directory"):
        config.save(Rails(), tmp_path / "nowhere" / "run.yaml")


def test_what_could_not_be_loaded_is_not_saved(tmp_path):
    for extra, part in [
        ({"a": "${x}"}, r"option `extra\.a` is '\$\{x\}': an interpolation"),
        ({"${x}": 1}, "an interpolation"),
        ({"a": [object()]}, r"option `extra\.a\[0\]` is a object; needed a plain value"),
    ]:
        with pytest.raises(ConfigError, match=part):
            config.save(Options(output="o", extra=extra), tmp_path / "run.yaml")
    assert os.listdir(tmp_path) == []


def test_a_read_only_mapping_is_a_type_of_option_too(load):
    @dataclass(frozen=True, slots=True, kw_only=True)
    class Weights:
        of: Mapping[str, float]

    assert load("of: {a: 1}", schema=Weights).of == {"a": 1.0}


def test_the_shipped_configurations_are_found():
    assert (config.shipped() / "README.md").is_file()
