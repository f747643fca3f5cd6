import numpy as np
import pytest

from mixer.core.errors import ConfigError
from mixer.core.policies import load_policy
from tests.core.policies.guiding import guided
from tests.core.policies.making import influence_of

PLAIN = {"scale": "none", "noise_sigmas": 0.0, "average": 0.0}
DOMAINS = [[1.0, 0.0, 0.0], [0.6, 0.8, 0.0], [0.0, 0.0, 2.0]]
TARGET = influence_of(DOMAINS, [[1.0, 0.5, 0.0]])


def close(found, expected):
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)


def test_worked_by_hand():
    # Alignments 1, 1, 0: products of (1, 0.5, 0) with the domains' gradients.
    found = guided("dga", PLAIN | {"rate": 0.2}, [TARGET, TARGET], [0.5, 0.3, 0.2])
    up = np.exp(0.2)
    close(found[0][1], np.array([0.5 * up, 0.3 * up, 0.2]) / (0.8 * up + 0.2))
    close(found[1][1], np.array([0.5 * up**2, 0.3 * up**2, 0.2]) / (0.8 * up**2 + 0.2))


def test_it_is_doge_toward_targets_without_its_norms():
    """With DoGE's mu = 1 / rate, where no score is clipped and the probe's rate is 1 and the mean norm 1 - 1e-6."""
    probe = influence_of(np.eye(3) * (1 - 1e-6), [[1.0, 0.5, 0.0]], rate=1.0)
    ours = guided("dga", PLAIN | {"rate": 4.0}, [probe, probe], [0.5, 0.3, 0.2])
    doge = guided("doge", {"mu": 0.25, "noise_sigmas": 0.0}, [probe, probe], [0.5, 0.3, 0.2])
    for one, other in zip(ours, doge, strict=True):
        close(one[1], other[1])


def test_the_answer_is_the_running_average_of_the_steps():
    plain = guided("dga", PLAIN | {"rate": 0.2}, [TARGET], [0.5, 0.3, 0.2])[0][1]
    found = guided("dga", PLAIN | {"rate": 0.2, "average": 0.75}, [TARGET, TARGET], [0.5, 0.3, 0.2])
    close(found[0][1], 0.75 * np.array([0.5, 0.3, 0.2]) + 0.25 * plain)
    close(found[0][0]["step_d"], plain)
    close(found[1][1], 0.75 * found[0][1] + 0.25 * found[1][0]["step_d"])


@pytest.mark.parametrize("options", [{"rate": -1.0}, {"average": 1.0}, {"smoothing": -0.1}, {"memory": 1.0}])
def test_values_out_of_range_are_refused(options):
    with pytest.raises(ConfigError, match="policy." + next(iter(options))):
        load_policy("dga", options)
