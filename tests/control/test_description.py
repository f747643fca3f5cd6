import pytest

from mixer.control.description import flat, params_of, redacted, staged


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("postgresql://me:pw@db/x", "postgresql://***@db/x"),
        ("at http://me:p@w@host:5000/a and s3://key@bucket/b.", "at http://***@host:5000/a and s3://***@bucket/b."),
        ("http://host/a?x=1&api_key=abc&token=d e", "http://host/a?x=1&api_key=***&token=*** e"),
        ("s3://bucket/a@b.parquet", "s3://bucket/a@b.parquet"),
        ("  password: a, b # c\nnext: 1", "  password: '***'\nnext: 1"),
        ("a: {db_password: 'x, y', b: 1}", "a: {db_password: '***', b: 1}"),
        ("a: {b: 1, token: xyz}", "a: {b: 1, token: '***'}"),
        ("token: null\nrow_tokens: 5\ntokenizer: x", "token: null\nrow_tokens: 5\ntokenizer: x"),
    ],
)
def test_secrets_are_not_shown_and_nothing_else_is_hidden(text, shown):
    assert redacted(text) == shown


def test_a_configuration_by_dotted_key():
    value = {"a": {"b": [1, {"c": 2}], "d": {}, "e": None, "f": True}, "g/h": 1.5, "token": "x", "secret_key": None}
    assert flat(value) == {
        "a.b": '[1, {"c": 2}]',
        "a.d": "{}",
        "a.e": "null",
        "a.f": "true",
        "g_x2F_h": "1.5",
        "token": "***",
        "secret_key": "null",
    }
    assert flat({}) == flat("text") == flat(None) == {}


def test_a_config_that_is_no_yaml_or_not_there_has_no_parameters(tmp_path, caplog):
    assert params_of(tmp_path) == {}
    (tmp_path / "run.yaml").write_text("a: !!python/object/apply:os.getcwd []\n")
    assert params_of(tmp_path) == {}
    assert caplog.text.count("no parameters") == 2


def test_copies_leave_out_what_is_too_large_for_now(tmp_path):
    (tmp_path / "schedule.jsonl").write_bytes(b"x" * 100)
    (tmp_path / "catalog.json").write_bytes(b"x" * 10)
    with staged(tmp_path, 50) as copies:
        assert [path.name for path in copies.iterdir()] == ["catalog.json"]
    with staged(tmp_path) as copies:
        assert sorted(path.name for path in copies.iterdir()) == ["catalog.json", "schedule.jsonl"]
    assert not copies.exists()
