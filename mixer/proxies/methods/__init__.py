"""The methods that read a mixture off many small runs: one module each, whose name is its `kind`.

The class of a kind is its name in CamelCase and its fields are the method's options. `propose(table, setting)`
answers with a `Proposal` that obeys the setting's caps; the same table, setting and options give the same bits. There
is no list to edit: `kinds` looks into this folder. What a method reads is its `READS`: the table of runs, the same
table of predicted influence, or (`mixmin`) likelihoods.
"""

import difflib
import importlib
import pkgutil
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, ClassVar, Protocol

from mixer.core.errors import ConfigError
from mixer.proxies.proposal import FitSetting, Proposal


class Method(Protocol):
    READS: ClassVar[str]  # losses, influence or likelihoods

    def propose(self, table: Any, setting: FitSetting) -> Proposal: ...


def kinds() -> tuple[str, ...]:
    """Every kind of method, without importing any."""
    return tuple(sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_")))


def method_class(kind: str) -> type[Method]:
    """The class of a kind, which is also the schema of its options."""
    if kind not in kinds():
        nearest = difflib.get_close_matches(kind, kinds(), n=1, cutoff=0.0)
        raise ConfigError(
            f"method {kind!r} is not known. The nearest known one is {nearest[0]!r}; all: {', '.join(kinds())}."
        )
    module = importlib.import_module(f"{__name__}.{kind}")
    return getattr(module, "".join(part.capitalize() for part in kind.split("_")))


def load_method(kind: str, options: Mapping[str, Any] | None = None) -> Method:
    found, options = method_class(kind), options or {}
    known = [field.name for field in fields(found)]  # type: ignore[arg-type]  # a protocol cannot say: dataclass
    for name in options:
        if name not in known:
            raise ConfigError(f"{name} is no option of method {kind!r}. It has {', '.join(known) or 'none'}.")
    return found(**options)
