import numpy as np
import pytest

from mixer.core.errors import ConfigError
from mixer.core.policies import load_policy
from tests.core.policies.making import make_catalog, make_setting, make_signal

CATALOG = make_catalog(10, 10)
STAGES = {"web": {"at": 0.2, "weights": {"a": 1.0, "b": 0.0}}, "books": {"at": 0.6, "weights": {"a": 0.0, "b": 1.0}}}


@pytest.mark.parametrize(
    ("between", "expected"),
    [
        ("linear", [1, 1, 0.75, 0.5, 0.25, 0, 0, 0, 0]),
        ("step", [1, 1, 1, 1, 1, 0, 0, 0, 0]),
    ],
)
@pytest.mark.parametrize("first_window", [1, 3])
def test_the_weights_are_those_of_the_window_that_is_decided(between, expected, first_window):
    policy = load_policy("scripted", {"stages": STAGES, "between": between})
    state = policy.start(make_setting(CATALOG, planned_windows=10, first_window=first_window))
    for decided in range(first_window, 10):
        _, weights = policy.update(state, make_signal(CATALOG, decided - first_window, [1.0, 1.0]))
        np.testing.assert_allclose(weights[0], expected[decided - 1], rtol=0, atol=1e-15)


def test_bad_scripts_are_refused():
    with pytest.raises(ConfigError, match="at=1.5"):
        load_policy("scripted", {"stages": {"x": {"at": 1.5}}})
    with pytest.raises(ConfigError, match="no two may begin"):
        load_policy("scripted", {"stages": {"x": {"at": 0.5}, "y": {"at": 0.5}}})
    with pytest.raises(ConfigError, match="length"):
        load_policy("scripted", {"stages": STAGES}).start(make_setting(CATALOG, planned_windows=None))
