"""From a config to rows: a schedule that moves between two mixtures, and what arrives of it."""

from pathlib import Path

import numpy as np
import pytest

from jobs.stream import main
from mixer.config import load, save
from mixer.core.errors import ConfigError, InfeasibleError
from mixer.core.plan import Geometry
from mixer.core.rails import GuardRails
from mixer.data.corpus import Corpus
from mixer.run import CorpusOptions, RunConfig, StreamOptions, moving_schedule, open_rows, stream
from tests.fakes import make_corpus

GEOMETRY = Geometry(window_steps=4, batch_rows=8)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return make_corpus(tmp_path_factory.mktemp("run") / "corpus", {"a": 500, "b": 100, "c": 30})


def test_the_mixture_moves_in_equal_steps_from_rows_to_equal_shares(corpus: Corpus) -> None:
    schedule = moving_schedule(corpus.catalog, GEOMETRY, GuardRails(), StreamOptions(windows=3))
    natural, uniform = np.array([500, 100, 30]) / 630, np.ones(3) / 3
    for row, expected in zip(schedule, [natural, (natural + uniform) / 2, uniform], strict=True):
        assert np.allclose(row.weights_d, expected, atol=1e-12)


def test_named_mixtures_and_rails_are_obeyed(corpus: Corpus) -> None:
    options = StreamOptions(windows=5, start={"a": 3, "b": 1, "c": 0}, end={"a": 0, "b": 1, "c": 1})
    schedule = moving_schedule(corpus.catalog, GEOMETRY, GuardRails(floor=0.05, cap=0.6), options)
    weights_wd = np.stack([row.weights_d for row in schedule])
    assert weights_wd[0].tolist() == pytest.approx([0.6, 0.35, 0.05])  # a at its cap, c at its floor
    assert weights_wd[-1].tolist() == pytest.approx([0.05, 0.475, 0.475])
    assert weights_wd.min() >= 0.05
    assert weights_wd.max() <= 0.6


def test_with_one_pass_allowed_no_row_comes_twice_and_none_is_left(corpus: Corpus) -> None:
    windows = 630 // GEOMETRY.window_slots
    schedule = moving_schedule(corpus.catalog, GEOMETRY, GuardRails(max_epochs=1), StreamOptions(windows=windows))
    assert schedule.rows[-1].next_offsets_d.tolist() <= [500, 100, 30]
    streamed = list(stream(corpus.by_source, schedule))
    given_d = np.sum([window.given_d for window in streamed], axis=0)
    assert given_d.tolist() == schedule.rows[-1].next_offsets_d.tolist()


def test_rails_that_the_run_must_break_are_refused_before_it_starts(corpus: Corpus) -> None:
    with pytest.raises(InfeasibleError, match="max_epochs=1"):
        moving_schedule(corpus.catalog, GEOMETRY, GuardRails(max_epochs=1), StreamOptions(windows=20))


def test_what_arrives_is_what_was_asked_for_within_a_row(corpus: Corpus) -> None:
    schedule = moving_schedule(corpus.catalog, GEOMETRY, GuardRails(), StreamOptions(windows=12))
    streamed = list(stream(corpus.by_source, schedule))
    assert [window.window for window in streamed] == list(range(12))
    apart_wd = np.cumsum([window.asked_d - window.given_d for window in streamed], axis=0)
    assert np.abs(apart_wd).max() < 1
    assert all(window.given_d.sum() == 32 for window in streamed)


def test_a_config_names_its_corpus_or_prepares_one(corpus: Corpus, tmp_path: Path) -> None:
    config = RunConfig(corpus=CorpusOptions(path=corpus.root), geometry=GEOMETRY)
    assert open_rows(config).catalog.fingerprint == corpus.catalog.fingerprint
    save(config, tmp_path / "run.yaml")
    assert load(RunConfig, [tmp_path / "run.yaml"]) == config
    with pytest.raises(ConfigError, match=r"corpus\.path is empty, and nothing is prepared"):
        open_rows(RunConfig())


def test_the_verb_prints_asked_and_given(corpus: Corpus, capsys: pytest.CaptureFixture[str]) -> None:
    config = Path(corpus.root).parent / "run.yaml"
    save(RunConfig(corpus=CorpusOptions(path=corpus.root), geometry=GEOMETRY), config)
    assert main([str(config), "stream.windows=2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[2:5]] == ["a", "b", "c"]
    assert lines[2].split()[1:3] == ["79.37%", "78.12%"]  # 25.4 of 32 rows: 25
    assert lines[-2].startswith("the farthest that any domain was from the sum of its shares: 0.")
    assert lines[-1].startswith("2 windows of 32 rows, 0.0 M tokens")
