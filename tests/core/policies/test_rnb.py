import numpy as np
import pytest

from mixer.core.errors import ConfigError
from mixer.core.policies import load_policy
from tests.core.policies.guiding import guided
from tests.core.policies.making import make_catalog, make_influence, make_setting

PLAIN = {"scale": "none", "spread": 1.0}
PRIOR = [0.5, 0.3, 0.2]


def close(found, expected, atol=1e-12):
    np.testing.assert_allclose(found, expected, rtol=0, atol=atol)


def gram(matrix, **more):
    return make_influence(np.zeros((len(matrix), 0)), gram_dd=matrix, **more)


def test_worked_by_hand():
    close(guided("rnb", PLAIN, [gram(np.eye(3))], PRIOR)[0][1], [1 / 3] * 3)
    found = guided("rnb", PLAIN, [gram(np.diag([2.0, 1, 1]))], PRIOR)[0][1]
    close(found, [0.411, 0.2945, 0.2945], 1e-4)
    close(found, np.exp([2 / 3, 1 / 3, 1 / 3]) / np.exp([2 / 3, 1 / 3, 1 / 3]).sum())


def test_it_is_judged_by_the_shares_given_and_starts_from_the_prior_if_told_to():
    matrix = np.array([[2.0, 0.5, 0.0], [0.5, 1.0, -0.2], [0.0, -0.2, 3.0]])
    options = PLAIN | {"judged_by": {"b": 3.0, "c": 1.0}, "spread": 0.5, "base": "prior"}
    state, found = guided("rnb", options, [gram(matrix)], PRIOR)[0]
    power = np.array(PRIOR) * np.exp(2 * (0.75 * matrix[:, 1] + 0.25 * matrix[:, 2]))
    close(found, power / power.sum())
    close(state["judged_d"], [0.0, 0.75, 0.25])


def test_scales():
    matrix = np.array([[4.0, 1.0], [1.0, 2.0]])
    for scale, score in (("mean", np.array([5.0, 3.0]) / 6), ("cosine", np.full(2, 0.5 + 0.25 / np.sqrt(0.5)))):
        found = guided("rnb", {"scale": scale, "spread": 1.0}, [gram(matrix)], [0.9, 0.1])[0][1]
        close(found, np.exp(score) / np.exp(score).sum())
    uncertain = gram([[4.0, 1.0, 1.0], [1.0, -0.1, 0.3], [1.0, 0.3, 2.0]])  # no certain length: unknown
    found = guided("rnb", {"scale": "cosine", "spread": 1.0}, [uncertain], [0.2, 0.6, 0.2])[0][1]
    assert found[1] == pytest.approx(1 / 3)
    assert found[0] == pytest.approx(found[2])


def test_entries_below_their_noise_are_as_the_mixture_in_force():
    matrix = np.diag([2.0, 1.0, 1.0])
    error = np.zeros((3, 3))
    error[0, 0] = 2.0
    found = guided("rnb", PLAIN, [gram(matrix, gram_error_dd=error)], [1 / 3] * 3)[0][1]
    score = np.array([2 / 3, 1.0, 1.0]) / 3  # the mean of its column is 2/3
    close(found, np.exp(score) / np.exp(score).sum())


def test_memory_averages_the_scores():
    one, two = gram(np.diag([2.0, 1, 1])), gram(np.diag([1.0, 1, 4]))
    found = guided("rnb", PLAIN | {"memory": 0.75, "noise_sigmas": 0.0}, [one, two], [1 / 3] * 3)[1][1]
    score = 0.75 * np.array([2.0, 1, 1]) / 3 + 0.25 * np.array([1.0, 1, 4]) / 3
    close(found, np.exp(score) / np.exp(score).sum())


def test_options_that_cannot_be_obeyed_are_refused():
    for options in ({"spread": 0.0}, {"scale": "rows"}, {"base": "last"}, {"judged_by": {"a": -1.0}}, {"memory": 1.0}):
        with pytest.raises(ConfigError, match="policy." + next(iter(options))):
            load_policy("rnb", options)
    with pytest.raises(ConfigError, match="judged_by is 0 for every domain"):
        load_policy("rnb", {"judged_by": {"a": 0.0}})
    with pytest.raises(ConfigError, match="judged_by names the unknown domain 'x'"):
        load_policy("rnb", {"judged_by": {"x": 1.0}}).start(make_setting(make_catalog(1, 1)))
