"""Settings for all tests: how many examples the property tests try.

MIXER_HYPOTHESIS_PROFILE is `quick`, `ci` (the default; the same examples every time) or `thorough`. A
test that names `max_examples` itself leaves the profile.
"""

import os

from hypothesis import HealthCheck, settings

_SLOW = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]

settings.register_profile("quick", max_examples=25, deadline=None, suppress_health_check=_SLOW)
settings.register_profile(
    "ci", max_examples=300, deadline=None, suppress_health_check=_SLOW, print_blob=True, derandomize=True
)
settings.register_profile("thorough", max_examples=5_000, deadline=None, suppress_health_check=_SLOW, print_blob=True)
settings.load_profile(os.environ.get("MIXER_HYPOTHESIS_PROFILE", "ci"))
