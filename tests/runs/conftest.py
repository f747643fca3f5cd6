import pytest

from mixer.launch import fit
from mixer.run import open_rows
from tests.runs.making import Outcome, config_of, make_texts, work_with


@pytest.fixture(scope="session")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    make_texts(folder)
    return folder


@pytest.fixture(scope="session")
def undisturbed(texts, tmp_path_factory, ray_session):
    """The run that nothing happened to."""
    config = config_of(texts, tmp_path_factory.mktemp("runs") / "undisturbed")
    assert fit(config, open_rows(config), work=work_with()).ending == "finished"
    return Outcome.of(config)
