"""The policies: one module each, whose name is the policy's `kind` and whose class is that name in CamelCase.

There is no list to edit: `kinds` looks into this folder.
"""

import difflib
import importlib
import pkgutil
from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any

from mixer.core.errors import ConfigError
from mixer.core.ports import Policy


def kinds() -> tuple[str, ...]:
    """Every kind of policy, without importing any."""
    return tuple(sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_")))


def policy_class(kind: str) -> type[Policy]:
    """The class of a kind, which is also the schema of its options."""
    if kind not in kinds():
        raise ConfigError(f"policy.kind={kind!r} is not known. {_known(kind, kinds())}")
    module = importlib.import_module(f"{__name__}.{kind}")
    return getattr(module, "".join(part.capitalize() for part in kind.split("_")))


def load_policy(kind: str, options: Mapping[str, Any] | None = None) -> Policy:
    """The policy of that kind; its options are the fields of its class."""
    found, options = policy_class(kind), options or {}
    known = [field.name for field in fields(found)]  # type: ignore[arg-type]  # a protocol cannot say: dataclass
    for name in options:
        if name not in known:
            raise ConfigError(f"policy.{name} is no option of policy {kind!r}. {_known(name, known)}")
    try:
        return found(**options)
    except TypeError as error:
        raise ConfigError(f"the options of policy {kind!r} are of a wrong type: {error}.") from error


def _known(name: str, names: Iterable[str]) -> str:
    names = list(names)
    nearest = difflib.get_close_matches(name, names, n=1, cutoff=0.0)
    return f"The nearest known one is {nearest[0]!r}; all: {', '.join(names)}." if nearest else "It has none."
