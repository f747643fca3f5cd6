"""Settings for all tests: how many examples the property tests try, and the Ray that they share.

MIXER_HYPOTHESIS_PROFILE is `quick`, `ci` (the default; the same examples every time) or `thorough`. A
test that names `max_examples` itself leaves the profile.
"""

import logging
import os
from collections.abc import Iterator
from types import ModuleType

import pytest
from hypothesis import HealthCheck, settings

_SLOW = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]

settings.register_profile("quick", max_examples=25, deadline=None, suppress_health_check=_SLOW)
settings.register_profile(
    "ci", max_examples=300, deadline=None, suppress_health_check=_SLOW, print_blob=True, derandomize=True
)
settings.register_profile("thorough", max_examples=5_000, deadline=None, suppress_health_check=_SLOW, print_blob=True)
settings.load_profile(os.environ.get("MIXER_HYPOTHESIS_PROFILE", "ci"))


@pytest.fixture(scope="session")
def ray_session() -> Iterator[ModuleType]:
    """A Ray of the tests' own: two CPUs, 100 MB of object store."""
    import ray

    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        object_store_memory=100_000_000,
        namespace="mixer-tests",
        log_to_driver=False,
        logging_level=logging.ERROR,
    )
    yield ray
    ray.shutdown()
