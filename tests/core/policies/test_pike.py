import numpy as np
import pytest

from mixer.core.errors import ConfigError
from mixer.core.policies import load_policy
from tests.core.policies.guiding import guided
from tests.core.policies.making import make_influence

PLAIN = {"scale": "none", "batch_rows": 16}
EQUAL = [1 / 3] * 3


def close(found, expected, atol=1e-12):
    np.testing.assert_allclose(found, expected, rtol=0, atol=atol)


def norms(*square, **more):
    return make_influence(np.zeros((len(square), 0)), gram_dd=np.diag(square), **more)


def test_worked_by_hand():
    found = guided("pike", PLAIN, [norms(4.0, 1.0, 0.25, noise_d=8.0)], EQUAL)[0][1]
    close(found, [0.411843, 0.305101, 0.283056], 1e-6)


def test_noise_counts_against_a_domain_by_the_rows_of_a_step():
    probe = norms(1.0, 1.0, 1.0, noise_d=[320.0, 32.0, 0.0])
    found = guided("pike", PLAIN, [probe], EQUAL)[0][1]
    close(found, np.exp([-1.0, -0.1, 0.0]) / np.exp([-1.0, -0.1, 0.0]).sum())
    found = guided("pike", PLAIN | {"batch_rows": 160}, [probe], EQUAL)[0][1]
    close(found, np.exp([-0.1, -0.01, 0.0]) / np.exp([-0.1, -0.01, 0.0]).sum())
    unknown = norms(1.0, 1.0, 1.0, noise_d=[320.0, np.nan, 0.0])
    found = guided("pike", PLAIN, [unknown], EQUAL)[0][1]
    close(found, np.exp([-1.0, -0.5, 0.0]) / np.exp([-1.0, -0.5, 0.0]).sum())


def test_by_the_mean_norm_the_model_does_not_matter():
    plain = guided("pike", PLAIN, [norms(2.0, 1.0, 0.0, noise_d=8.0)], EQUAL)[0][1]
    for size in (1.0, 1e8, 1e-8):
        probe = norms(2.0 * size, 1.0 * size, 0.0, noise_d=8.0 * size)
        close(guided("pike", {"batch_rows": 16}, [probe], EQUAL)[0][1], plain, 1e-9)


def test_a_norm_below_its_noise_is_the_mean_and_negative_squares_are_none():
    probe = norms(4.0, 1.0, 0.25, gram_error_dd=np.diag([3.0, 0.0, 0.0]))
    state, _ = guided("pike", PLAIN, [probe], EQUAL)[0]
    close(state["norm_d"], [1.75, 1.0, 0.25])
    state, _ = guided("pike", PLAIN, [norms(4.0, -1.0, 0.25)], EQUAL)[0]
    close(state["norm_d"], [4.0, 0.0, 0.25])


def test_the_fair_variant_favours_domains_that_lag_behind():
    probe = norms(1.0, 1.0, 1.0, loss_d=[1.0, 2.0, 3.0])
    state, _ = guided("pike", PLAIN | {"fairness": 2.0}, [probe], EQUAL)[0]
    close(state["score_d"], 0.1 * np.array([0.25, 1.0, 2.25]))


@pytest.mark.parametrize(
    "options", [{"norm_rate": -1.0}, {"batch_rows": 0}, {"scale": "rows"}, {"fairness": -1.0}, {"smoothing": 1.0}]
)
def test_values_out_of_range_are_refused(options):
    with pytest.raises(ConfigError, match="policy." + next(iter(options))):
        load_policy("pike", options)
