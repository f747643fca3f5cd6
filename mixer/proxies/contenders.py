"""What is compared: policies by kind or by file, what they cost beforehand, and the run that each of them is given.

A contender's file holds a section `policy` and may hold others of `PolicyFile`, which go before the comparison's own
configuration. All that makes runs comparable (model, optimizer, length, rows, evaluation) stays out of it. The policy
of the comparison's configuration is not used.

A mixture that was found by proxies is a file as well, with the tokens they took beside it: in `mix.json` for
`mix.yaml`, as `{"cost_tokens": 1.2e8}`, or told with the command.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from mixer import config as configs
from mixer.core.errors import ConfigError
from mixer.run import RunConfig

COST = "cost_tokens"
_LABEL = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_+-]*")


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyFile:
    """The sections that contenders may differ in."""

    policy: dict[str, Any]
    prior: Any = None
    rails: dict[str, Any] | None = None
    controller: dict[str, Any] | None = None
    influence: dict[str, Any] | None = None
    step: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Contender:
    label: str
    file: Path
    cost_tokens: float = 0.0  # of what was computed before all of its runs


def contenders_of(named: Sequence[str], extra: Sequence[str] = ()) -> list[Contender]:
    """`named`: kinds, YAML files, or LABEL=FILE, each maybe several joined by commas; `extra`: LABEL=TOKENS."""
    found: dict[str, Contender] = {}
    for one in (part for text in named for part in text.split(",") if part):
        label, mark, file = one.partition("=")
        path = configs.policy_file(file if mark else one)
        label = label if mark else path.stem
        if not _LABEL.fullmatch(label):
            raise ConfigError(
                f"{label!r} is no label of a policy, as it names a folder: letters, digits, _, + and - only. Give "
                f"another one, as in mine={path}."
            )
        if label in found:
            raise ConfigError(f"two policies are called {label!r}. Give one of them another label, as in mine={path}.")
        found[label] = Contender(label, path, _cost_beside(path))
    if len(found) < 2:
        raise ConfigError(f"policies: {', '.join(found) or 'none'}; a comparison needs at least two. Name more.")
    for label, tokens in map(_extra, extra):
        if label not in found:
            raise ConfigError(f"extra tokens for {label!r}, which is not compared; there are {', '.join(found)}.")
        found[label] = replace(found[label], cost_tokens=tokens)
    return list(found.values())


def _extra(text: str) -> tuple[str, float]:
    label, mark, value = text.partition("=")
    return label, _tokens(value if mark else None, f"--extra {text}")


def _cost_beside(path: Path) -> float:
    beside = path.with_suffix(".json")
    if not beside.is_file():
        return 0.0
    try:
        value: Any = json.loads(beside.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{beside} cannot be read: {error}. It says what {path.name} cost; correct it.") from error
    return _tokens(value[COST], f"{COST} of {beside}") if isinstance(value, Mapping) and COST in value else 0.0


def _tokens(value: Any, where: str) -> float:
    try:
        tokens = float(value)
    except (TypeError, ValueError):
        tokens = math.nan
    if not 0 <= tokens < math.inf:
        raise ConfigError(f"{where} is {value!r}; needed a number of tokens, 0 or more, as in --extra regmix=2e8.")
    return tokens


def config_of(base: RunConfig, contender: Contender, folder: Path, seed: int) -> RunConfig:
    """The run of one contender and seed: the comparison's in all but the sections of the contender's file."""
    held = configs.load(PolicyFile, [contender.file])
    plain = configs.to_plain(base) | {"policy": held.policy}
    for name in (field.name for field in fields(PolicyFile)):
        value = getattr(held, name)
        if name != "policy" and value is not None:
            plain[name] = _merged(plain[name], value)
    try:
        config = configs.build(RunConfig, plain, "")
    except ConfigError as error:
        raise type(error)(f"{contender.file}: {error}") from error
    return replace(
        config,
        run=replace(config.run, path=str(folder / contender.label / str(seed))),
        train=replace(config.train, seed=seed, num_workers=1, strategy="ddp"),
        geometry=replace(config.geometry, seed=seed),
        evaluation=replace(config.evaluation, at_start=True),
        tracker=replace(config.tracker, kind="none"),
    )


def _merged(low: Any, high: Any) -> Any:
    if not (isinstance(low, Mapping) and isinstance(high, Mapping)):
        return high
    return {**low, **{key: _merged(low.get(key), value) for key, value in high.items()}}
