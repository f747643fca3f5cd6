import math

import numpy as np
import pytest

from mixer.control import metrics
from mixer.control.metrics import Measures, Metric, written
from mixer.core.catalog import Catalog, Domain
from mixer.core.mixture import Mixture
from mixer.core.plan import Geometry
from mixer.core.schedule import MixtureSchedule, pack_d
from tests.control.tracking import CATALOG, make_schedule, many, window_record


def measures(schedule: MixtureSchedule | None = None, every_windows: int = 1, tokens: dict | None = None) -> Measures:
    return Measures(schedule or make_schedule(8), every_windows=every_windows, tokens=tokens or {})


def values(given) -> dict[str, float]:
    found = list(given)
    named = {metric.key: metric.value for metric in found}
    assert len(named) == len(found)
    return named


def test_a_window_by_hand():
    """Two windows of 32 rows: weights 1/6, 2/6, 3/6, and 2/9, 3/9, 4/9 of them."""
    record = window_record(1) | {
        "time": 12.3456,
        "tokens_d": {"a": 0, "b": 30, "c": 40},
        "loss_sum": {"a": 0.0, "b": 60.0, "c": 50.0},
        "bad_rows_d": {"a": 1, "b": 0, "c": 2},
        "mfu": None,
    }
    schedule = make_schedule(2)
    counts = [row.counts_d.tolist() for row in schedule]
    assert [sum(count) for count in counts] == [32, 32]
    found = list(measures(schedule, tokens={"b": 5, "gone": 7}).of(record))
    assert {(metric.time_ms, metric.step) for metric in found} == {(12346, 8)}
    passes = [(counts[0][i] + counts[1][i]) / rows for i, rows in enumerate((16, 64, 640))]
    assert values(found) == pytest.approx({
        "train/loss": 3.25, "train/tokens": 2000, "train/tokens_per_s": 501, "train/data_wait": 0.125,
        "train/rate": 0.001, "train/grad_norm": 1.5, "train/skipped_steps": 0, "train/world_size": 2,
        "train/bad_rows": 3, "control/held": 0,
        "weight/a": 2 / 9, "weight/b": 3 / 9, "weight/c": 4 / 9,
        "share/a": counts[1][0] / 32, "share/b": counts[1][1] / 32, "share/c": counts[1][2] / 32,
        "passes/a": passes[0], "passes/b": passes[1], "passes/c": passes[2],
        "loss/b": 2.0, "loss/c": 1.25,
        "tokens/a": 0, "tokens/b": 35, "tokens/c": 40,
    })  # fmt: skip


def test_lag_and_held_are_the_rows_own():
    found = [values(measures().of(window_record(window))) for window in range(5)]
    assert [of.get("control/lag_windows") for of in found] == [None, None, 1, 1, 1]
    assert [of["control/held"] for of in found] == [0, 0, 0, 1, 0]


def test_tokens_add_up_over_windows_also_those_that_are_not_shown():
    sums = measures(every_windows=3)
    shown = [values(sums.of(window_record(window))) for window in range(6)]
    assert [("tokens/a" in of, "weight/a" in of, "train/loss" in of) for of in shown] == [
        (window in (2, 5), window in (2, 5), True) for window in range(6)
    ]
    given = [window_record(window)["tokens_d"] for window in range(6)]
    for name in CATALOG.names:
        assert shown[5][f"tokens/{name}"] == sum(of[name] for of in given) == sums.tokens[name]


def test_sums_follow_names_through_a_change_of_catalog():
    other = Catalog(16, "fake", (*CATALOG.domains[1:], Domain("z", 99, "content z")))
    schedule = make_schedule(1)
    schedule.extend(Mixture.uniform(other), catalog=other)
    sums = measures(schedule)
    first, second = window_record(0), window_record(1, other)
    list(sums.of(first))
    found = values(sums.of(second))
    assert found["tokens/b"] == first["tokens_d"]["b"] + second["tokens_d"]["b"]
    assert found["tokens/z"] == second["tokens_d"]["z"] and "tokens/a" not in found
    assert sums.tokens["a"] == first["tokens_d"]["a"]


def test_thousands_of_domains_in_base64():
    catalog = many(100)
    schedule = make_schedule(1, catalog, rows=100)
    found = values(measures(schedule).of(window_record(0, catalog)))
    assert found["weight/domain_x2F_00099"] == pytest.approx(100 / 5050)
    assert sum(value for key, value in found.items() if key.startswith("share/")) == pytest.approx(1)


def test_policy_and_evaluation():
    record = {"kind": "policy", "window": 2, "time": 1.0}
    record["values"] = {"rate": 0.5, "reward/a": 1.0, "reward/b/c": 2, "reward/n": None, "text": "x", "on": True}
    assert list(measures().of(record)) == [
        Metric("policy/rate", 0.5, 1000, 12),
        Metric("policy/reward/a", 1.0, 1000, 12),
        Metric("policy/reward/b_x2F_c", 2.0, 1000, 12),
    ]
    assert [metric.key for metric in measures(every_windows=2).of(record)] == ["policy/rate"]
    sets = {"target/code new/1": {"loss": 2.0, "bits_per_byte": None}, "all": {"loss": 1.0, "bits_per_byte": 0.5}}
    record = {"kind": "evaluation", "window": 0, "time": 1.0, "steps": 0, "sets": sets}
    assert list(measures().of(record)) == [
        Metric("eval/target/code new_x2F_1/loss", 2.0, 1000, 0),
        Metric("eval/all/loss", 1.0, 1000, 0),
        Metric("eval/all/bits_per_byte", 0.5, 1000, 0),
    ]


def test_events_and_unknown_kinds_are_no_metrics():
    for kind in ("event", "weather"):
        assert not list(measures().of({"kind": kind, "time": 1.0, "window": 0, "what": "begun"}))


def test_what_is_damaged_costs_what_it_concerns_only():
    whole = values(measures().of(window_record(1)))
    for key, bad, lost in [
        ("loss", "x", {"train/loss"}),
        ("seconds", 0, {"train/data_wait"}),
        ("tokens_d", {"a": 1}, {key for key in whole if key.startswith(("loss/", "tokens/"))}),
        ("loss_sum", "no base64", {key for key in whole if key.startswith("loss/")}),
        ("rate", math.inf, {"train/rate"}),
    ]:
        found = values(measures().of(window_record(1) | {key: bad}))
        assert whole.keys() - found.keys() == lost, key
    beyond = values(measures(make_schedule(1)).of(window_record(1)))
    assert {key.split("/")[0] for key in beyond} == {"train"}


NAMES = [
    *(
        "web",
        "web/news",
        "web_x2F_news",
        "_",
        "__",
        "_x",
        "_x_",
        "x_x",
        ".",
        "..",
        "a.b",
        "a:b",
        "a b",
        "文/x",
        "A",
        "a",
    ),
    *("A", "a", "/x2F_", "_x2F/", "a//b", "#%&?=\"'`", "é", "e\u0301"),
    *("a" * 300, "a" * 299 + "b", "/" * 50, "/" * 51, "_x" + "0" * 98),
]


def test_names_are_allowed_and_never_shared():
    validation = pytest.importorskip("mlflow.utils.validation")
    seen = {}
    for name in NAMES:
        text = written(name)
        key = f"policy/{text}/{text}"
        validation._validate_metric_name(key)
        assert len(key) <= 250 and "/" not in text and "\\" not in text
        assert seen.setdefault(text, name) == name
    assert written("web/news") == "web_x2F_news" and written("plain-name.1 b") == "plain-name.1 b"


def test_short_names_can_be_read_back():
    alphabet = ["_", "x", "2", "F", "/", "a"]
    rng = np.random.default_rng(1)
    for _ in range(3000):
        name = "".join(rng.choice(alphabet, rng.integers(1, 9)))
        assert read_back(written(name)) == name


def read_back(text: str) -> str:
    out = ""
    while text:
        if text.startswith("_x"):
            code, _, text = text[2:].partition("_")
            out += chr(int(code, 16))
        else:
            out, text = out + text[0], text[1:]
    return out


def test_every_name_of_the_table_is_one_that_is_made():
    lines = (metrics.__doc__ or "").splitlines()
    table = {line.split()[0] for line in lines if line.startswith("    ") and "/" in line[:28]}
    influence = {"benefit": {"code_new": {"a": 1.5, "b": None, "c": -2.0}}}
    made = values(measures().of(window_record(2) | {"probe_s": 0.5, "probe_tokens": 64, "influence": influence}))
    assert {key: made[key] for key in made if key.startswith("influence/")} == {
        "influence/code_new/a": 1.5,
        "influence/code_new/c": -2.0,
    }
    assert made["probe/tokens"] == 64
    plain = {key for key in made if key.startswith(("train/", "control/", "probe/"))}
    assert {key for key in table if "<" not in key} == plain
    assert {key.split("/")[0] for key in table} == {key.split("/")[0] for key in made} | {"policy", "eval"}


def test_the_schedule_is_asked_for_its_row_only():
    geometry = Geometry(window_steps=2, batch_rows=32, seed=0)
    schedule = MixtureSchedule(CATALOG, geometry).extend(Mixture.uniform(CATALOG), 1)
    record = window_record(0) | {"steps": None, "tokens_d": pack_d(np.array([1, 2, 3]), CATALOG)}
    assert {metric.step for metric in measures(schedule).of(record)} == {2}
