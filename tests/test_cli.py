"""`mixer`: verbs are the files of jobs/, help is light, what is refused comes as one line."""

import subprocess
import sys

import pytest

import jobs
from mixer import cli
from mixer.core.errors import ConfigError, DataError

VERB = '''"""{summary}

More of it.
"""
import heavy_thing
'''


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder of verbs in the place of jobs/."""
    monkeypatch.setattr(jobs, "__path__", [str(tmp_path)])
    for name in [name for name in sys.modules if name.startswith("jobs.")]:
        monkeypatch.delitem(sys.modules, name)
    return tmp_path


def test_help_lists_every_verb_with_its_first_line_and_imports_none(folder, capsys):
    (folder / "prepare.py").write_text(VERB.format(summary="Make shards from text."))
    (folder / "show_rows.py").write_text(VERB.format(summary="What was read."))
    (folder / "_shared.py").write_text("")
    (folder / "bare.py").write_text("")
    assert cli.main(["--help"]) == 0
    assert capsys.readouterr().out == (
        "usage: mixer <verb> ...\n       mixer <verb> --help\n       mixer --version\n\n"
        "  bare       \n  prepare    Make shards from text.\n  show-rows  What was read.\n"
    )
    assert cli.main([]) == 2


def test_a_verb_that_does_not_parse_is_still_listed(folder, capsys):
    (folder / "prepare.py").write_text("def (")
    assert cli.main(["--help"]) == 0
    assert "prepare  (broken: " in capsys.readouterr().out


def test_a_verb_gets_the_rest_of_the_line_and_its_answer_is_the_exit_status(folder):
    (folder / "show_rows.py").write_text("def main(argv):\n    return len(argv)\n")
    assert cli.main(["show-rows", "a", "--b", "c"]) == 3


def test_an_unknown_verb_is_refused_with_the_nearest_one(folder, capsys):
    (folder / "prepare.py").write_text("")
    (folder / "train.py").write_text("")
    assert cli.main(["prepar"]) == 2
    assert capsys.readouterr().err == (
        "mixer: 'prepar' is not a verb of mixer; there are prepare, train. Did you mean 'prepare'?\n"
    )
    assert cli.main(["xyz"]) == 2
    assert capsys.readouterr().err.endswith("there are prepare, train. `mixer --help` lists them.\n")


class TaskError(DataError):
    """As Ray hands on an error of a task: a child of its class, the trace for a text."""

    def __init__(self, cause: Exception) -> None:
        super().__init__("trace\nof\nmany lines")
        self.cause = cause


@pytest.mark.parametrize(
    ("error", "status", "text"),
    [
        (ConfigError("row_tokens=7 here.\nUse 8."), 2, "mixer: row_tokens=7 here. Use 8.\n"),
        (TaskError(DataError("shard 3 is cut.")), 2, "mixer: shard 3 is cut.\n"),
        (TaskError(ValueError("x")), 2, "mixer: trace of many lines\n"),
        (KeyboardInterrupt(), 130, "mixer: interrupted\n"),
    ],
)
def test_what_is_refused_is_one_line(folder, monkeypatch, capsys, error, status, text):
    (folder / "train.py").write_text("ERROR = None\n\ndef main(argv):\n    raise ERROR\n")
    monkeypatch.syspath_prepend(str(folder.parent))
    import jobs.train

    jobs.train.ERROR = error  # type: ignore[attr]  # the module just written
    assert cli.main(["train"]) == status
    assert capsys.readouterr().err == text


def test_our_own_mistakes_keep_their_trace(folder):
    (folder / "train.py").write_text("def main(argv):\n    return 1 / 0\n")
    with pytest.raises(ZeroDivisionError):
        cli.main(["train"])


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("mixer ")


def test_help_loads_nothing_heavy():
    code = (
        "import sys; from mixer import cli; cli.main(['--help']);"
        "heavy = {'numpy', 'scipy', 'ray', 'torch', 'mlflow', 'pyarrow', 'omegaconf'};"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("\n[]\n")
