"""The section `swarm` of a configuration: how many proxies, on which mixtures, and what a proxy is."""

from dataclasses import dataclass, field
from typing import Any, Literal

from mixer.core.errors import ConfigError
from mixer.proxies.mixtures import OlmixOptions, RegmixOptions

# Sections of a proxy that may differ from the run's; the others follow from what a proxy is.
OVERRIDES = (
    *("geometry", "train", "model", "pretrained", "optimizer", "step"),
    *("rails", "controller", "checkpoint", "evaluation"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class SwarmOptions:
    """A proxy is a run of this configuration with a fixed mixture, without guard rails, otherwise as `overrides`."""

    runs: int = 64  # made by the generator, beside those given; climb has swarm.fit.climb.rounds instead
    generator: Literal["regmix", "olmix", "dirichlet", "climb", "given"] = "regmix"  # given: none but those
    seed: int = 0  # of the generator
    given: dict[str, dict[str, float]] = field(default_factory=dict[str, dict[str, float]])  # name: weights; run first
    regmix: RegmixOptions = field(default_factory=RegmixOptions)
    olmix: OlmixOptions = field(default_factory=OlmixOptions)
    earlier: tuple[str, ...] = ()  # tables of other swarms, to whose mixtures olmix keeps its distance
    points: int = 4  # moments, evenly spaced over a proxy, at which its losses are measured; the last is its end
    cpus_per_run: float = 1.0
    gpus_per_run: float = 0.0  # a fraction too
    at_once: int | None = None  # proxies; null: as many as the cluster has room for
    max_retries: int = 3  # of a proxy whose process died or failed; it goes on from its newest checkpoint
    keep_checkpoints: bool = False  # of proxies that are finished
    overrides: dict[str, Any] = field(default_factory=dict[str, Any])  # sections of the configuration, for proxies
    targets: dict[str, float] = field(default_factory=dict[str, float])  # of fits: weights by set
    fit: dict[str, dict[str, Any]] = field(default_factory=dict[str, dict[str, Any]])  # their options, by method

    def __post_init__(self) -> None:
        for key in ("points", "at_once"):
            if (value := getattr(self, key)) is not None and value < 1:
                raise ConfigError(f"{key}={value}; it must be at least 1.")
        for key in ("runs", "cpus_per_run", "gpus_per_run", "max_retries"):
            if getattr(self, key) < 0:
                raise ConfigError(f"{key}={getattr(self, key)}; it must be at least 0.")
        if not self.cpus_per_run and not self.gpus_per_run:
            raise ConfigError("cpus_per_run=0 and gpus_per_run=0; a proxy needs some of either. Set one above 0.")
        if not 0 <= self.seed < 1 << 63:
            raise ConfigError(f"seed={self.seed}; it must be 0 to 2**63 - 1.")
        if not self.given and (self.generator == "given" or not (self.runs or self.generator == "climb")):
            raise ConfigError(
                f"generator={self.generator}, runs={self.runs} and nothing given: no proxy would run. Set runs and a "
                "generator, or swarm.given.NAME.DOMAIN=WEIGHT."
            )
        unknown = [key for key in self.overrides if key not in OVERRIDES]
        if unknown:
            raise ConfigError(f"overrides has {', '.join(unknown)}; a proxy may differ in {', '.join(OVERRIDES)}.")
