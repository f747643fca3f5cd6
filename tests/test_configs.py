"""Every kind of policy has a configuration of its name, which its class can obey."""

import pytest
import yaml

from mixer import config
from mixer.core.policies import kinds, policy_class
from tests.core.policies.making import needs_of


@pytest.mark.parametrize("kind", kinds())
def test_every_policy_has_a_config_of_its_name(kind):
    text = (config.shipped() / "policy" / f"{kind}.yaml").read_text(encoding="utf-8")
    options = yaml.safe_load(text)["policy"]
    assert options.pop("kind") == kind
    config.build(policy_class(kind), options, "policy")


@pytest.mark.parametrize(
    "kind", [kind for kind in kinds() if needs_of(kind) & {"influence", "gram"} and kind != "pilot"]
)
def test_options_of_probed_policies_are_read_by_their_types(kind):
    for options in ({"noise": "shrink", "noise_sigmas": 1}, {"smoothing": 0.1}):
        assert config.build(policy_class(kind), dict(options), "policy")
    if needs_of(kind) & {"influence"}:
        found = config.build(policy_class(kind), {"target_weights": {"code": 2}}, "policy")
        assert found.target_weights == {"code": 2.0}  # type: ignore[attr-defined]  # its own option
