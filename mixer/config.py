"""Options from YAML files and dotted overrides into frozen dataclasses, and back into one file.

The dataclasses are the schema: their type hints say what a key may hold, their defaults what it holds if
nobody says otherwise. omegaconf reads YAML and override text, and nothing else of it is used: its own schemas
cannot express choices, tuples or unions, and its interpolations would let an environment variable change a
run. Every value remembers the file or override it came from, so that a refusal can name it.

Schemas may use: bool, int, float, str, None, `Literal`, `Enum`, `Path`, `tuple`, `list`, `dict` by name,
other dataclasses, `X | None` and other unions (the first member that fits), and `Any` for plain data.
"""

import contextlib
import difflib
import os
import re
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mixer.core.errors import ConfigError

T = TypeVar("T")
_PART = re.compile(r"(?:^|(?<=.)\.)(?P<name>[^.\[\]]+)|\[(?P<quoted>[^\[\]]+)\]")  # of an override's key


def load(schema: type[T], files: Sequence[str | Path] = (), overrides: Sequence[str] = ()) -> T:
    """Files merged left to right, then `dotted.key=value` overrides, as one `schema`."""
    root = _Node({}, "the configuration")
    for file in files:
        root = _merge(root, _read_file(Path(file)))
    for override in overrides:
        root = _merge(root, _read_override(override))
    return cast(T, _build(schema, root, ""))


def build(schema: type[T], value: Mapping[str, Any], path: str) -> T:
    """Plain data, read from `path` of a configuration, as one `schema`."""
    return cast(T, _build(schema, _node(dict(value), f"section `{path}`", path), path))


def to_text(config: Any) -> str:
    """Every option of a dataclass, defaults too, as YAML that `load` turns into an equal one."""
    return OmegaConf.to_yaml(OmegaConf.create(to_plain(config)))


def to_plain(config: Any) -> dict[str, Any]:
    """A dataclass as mappings, lists and plain values."""
    return _plain(config, "")


def save(config: Any, path: str | Path) -> None:
    """`to_text` in a file, which is there whole or not at all."""
    target = Path(path)
    text = to_text(config)
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        with open(partial, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, target)
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the new name itself
        finally:
            os.close(folder)
    except OSError as error:
        raise ConfigError(f"{target} cannot be written: {error.strerror}. Name a folder that can.") from error
    finally:
        partial.unlink(missing_ok=True)


def shipped() -> Path:
    """The folder of the configurations that come with mixer: in the wheel, or beside the package."""
    inside = Path(__file__).parent / "configs"
    return inside if inside.is_dir() else Path(__file__).parents[1] / "configs"


def policy_file(named: str) -> Path:
    """A YAML file of a policy: the one that is named, or the one that comes with mixer for a kind."""
    path, own = Path(named), shipped() / "policy" / f"{named}.yaml"
    if path.suffix in (".yaml", ".yml") or path.is_file() or not own.is_file():
        if not path.is_file():
            kinds = ", ".join(sorted(file.stem for file in own.parent.glob("*.yaml")))
            raise ConfigError(f"{named} is neither a file nor a kind of policy. Name a YAML file, or one of {kinds}.")
        return path
    return own


@dataclass(frozen=True, slots=True)
class _Node:
    """A value and where it was read; what mappings and lists hold are nodes again."""

    value: Any
    origin: str


def _merge(low: _Node, high: _Node) -> _Node:
    if not (isinstance(low.value, dict) and isinstance(high.value, dict)):
        return high
    merged = dict(low.value)
    for key, node in high.value.items():
        merged[key] = _merge(merged[key], node) if key in merged else node
    return _Node(merged, high.origin)


# --- text to nodes ------------------------------------------------------------------------------------


def _read_file(path: Path) -> _Node:
    if not path.is_file():
        raise ConfigError(f"{path} is not a file. Name one; those that come with mixer lie in {shipped()}.")
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}. Needed a text in UTF-8.") from error
    kind = _scan(text, str(path))
    if kind not in (None, "mapping"):
        raise ConfigError(f"{path} holds a {kind}; needed a mapping of options. Correct the file.")
    return _node(_parse(lambda: OmegaConf.load(path), str(path)), str(path), "")


def _read_override(text: str) -> _Node:
    """`a.b[c.d]=value` as nested nodes; the value is YAML."""
    origin = f"override {text!r}"
    key, equals, value = text.partition("=")
    if not equals:
        raise ConfigError(f"{origin} has no '='; needed key=value, as in seed=7.")
    parts = list(_PART.finditer(key))
    if not parts or "".join(part[0] for part in parts) != key:
        raise ConfigError(f"{origin} has no proper key; needed names joined by dots, as in a.b[c.d]=7.")
    _scan(value, origin)
    plain = _parse(lambda: OmegaConf.from_dotlist([f"value={value}"]), origin)
    node = _node(plain["value"], origin, key)
    for part in reversed(parts):
        node = _Node({part["name"] or part["quoted"]: node}, origin)
    return node


def _scan(text: str, origin: str) -> str | None:
    """What the YAML text holds; refuses what would make it more than data."""
    kind: str | None = None
    try:
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            if isinstance(event, yaml.NodeEvent):
                kind = kind or _YAML_KINDS.get(type(event), "value")
                line = event.start_mark.line + 1
                if getattr(event, "tag", None):
                    raise ConfigError(f"{origin}, line {line}: a YAML tag; only plain values. Remove it.")
                if isinstance(event, yaml.ScalarEvent) and "${" in event.value:
                    raise ConfigError(f"{origin}, line {line}: {event.value!r} is an interpolation; a "
                                      "configuration is data. Write the value itself.")  # fmt: skip
    except yaml.YAMLError as error:
        raise ConfigError(f"{origin} is not YAML: {' '.join(str(error).split())}. Correct it.") from error
    return kind


_YAML_KINDS = {yaml.MappingStartEvent: "mapping", yaml.SequenceStartEvent: "list", yaml.ScalarEvent: "value"}


def _parse(read: Callable[[], Any], origin: str) -> Any:
    try:
        return OmegaConf.to_container(read(), resolve=False)
    except (yaml.YAMLError, OmegaConfBaseException) as error:  # a key given twice, for one
        reason = " ".join(str(error).split())
        raise ConfigError(f"{origin} is refused: {reason}. Correct it.") from error


def _node(value: Any, origin: str, path: str) -> _Node:
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, str):
                raise ConfigError(f"key {key!r} in `{path}` ({origin}) is no name. Write it in quotes.")
        return _Node({key: _node(item, origin, _join(path, key)) for key, item in value.items()}, origin)
    if isinstance(value, list):
        return _Node([_node(item, origin, f"{path}[{n}]") for n, item in enumerate(value)], origin)
    return _Node(value, origin)


# --- nodes to dataclasses -----------------------------------------------------------------------------


def _build(hint: Any, node: _Node, path: str) -> Any:
    """The value of type `hint` that the node stands for."""
    form, args, value = get_origin(hint), get_args(hint), node.value
    if is_dataclass(hint) and isinstance(hint, type):
        return _build_dataclass(hint, node, path)
    if form in (Union, types.UnionType):
        return _build_union(args, node, path)
    if form is Literal:
        if any(value == choice and type(value) is type(choice) for choice in args):
            return value
    elif isinstance(hint, type) and issubclass(hint, Enum):
        for member in hint:
            if member.value == value and type(member.value) is type(value):
                return member
    kind = form or hint
    if kind in (dict, Mapping) and isinstance(value, dict):
        of = args[1] if args else Any
        return {key: _build(of, item, _join(path, key)) for key, item in value.items()}
    if kind in (list, tuple, Sequence) and isinstance(value, list):
        hints = [args[0] if args else Any] * len(value)
        if kind is tuple and args and args[-1] is not Ellipsis:
            hints = list(args)
        if len(hints) == len(value):
            pairs = zip(hints, value, strict=True)
            items = [_build(of, item, f"{path}[{n}]") for n, (of, item) in enumerate(pairs)]
            return items if kind is list else tuple(items)
    if kind is Any or kind is object:
        return _thaw(node)
    if kind is float and type(value) is int:
        return float(value)
    if kind is Path and isinstance(value, str):
        return Path(value)
    if kind in (bool, int, float, str, type(None)) and type(value) is kind:
        return value
    raise _mismatch(hint, node, path)


def _build_dataclass(schema: type, node: _Node, path: str) -> Any:
    if not isinstance(node.value, dict):
        raise _mismatch(schema, node, path)
    hints = get_type_hints(schema)
    options = {field.name: field for field in fields(schema) if field.init}
    for key, item in node.value.items():
        if key not in options:
            near = difflib.get_close_matches(key, options, n=1)
            hint = f"Did you mean `{_join(path, near[0])}`?" if near else f"Known are {', '.join(options)}."
            raise ConfigError(f"unknown option `{_join(path, key)}` ({item.origin}). {hint}")
    values: dict[str, Any] = {}
    for name, field in options.items():
        if name in node.value:
            values[name] = _build(hints[name], node.value[name], _join(path, name))
        elif field.default is MISSING and field.default_factory is MISSING:
            if not is_dataclass(hints[name]):
                raise ConfigError(
                    f"option `{_join(path, name)}` is missing; needed {_name(hints[name])}. "
                    f"Set it in a file, or by {_join(path, name)}=..."
                )
            values[name] = _build(hints[name], _Node({}, node.origin), _join(path, name))
    try:
        return schema(**values)
    except ConfigError as error:  # a rule of the dataclass itself: say where it was broken
        raise type(error)(f"{path}: {error}" if path else str(error)) from error


def _build_union(members: Sequence[Any], node: _Node, path: str) -> Any:
    """The first member that fits; a refusal speaks of the only member that could have."""
    if node.value is None and type(None) in members:
        return None
    shaped = [member for member in members if member is not type(None)]
    if len(shaped) > 1 and isinstance(node.value, dict):
        shaped = [m for m in shaped if is_dataclass(m) or get_origin(m) in (dict, Mapping)] or shaped
    if len(shaped) == 1:
        return _build(shaped[0], node, path)
    for member in shaped:
        with contextlib.suppress(ConfigError):
            return _build(member, node, path)
    raise _mismatch(Union[tuple(members)], node, path)  # noqa: UP007


def _mismatch(hint: Any, node: _Node, path: str) -> ConfigError:
    found = repr(_thaw(node))
    found = found if len(found) <= 80 else found[:77] + "..."
    what = f"option `{path}`" if path else "the configuration"
    text = f"{what} is {found} ({node.origin}); needed {_name(hint)}."
    if isinstance(node.value, dict) and get_origin(hint) in (list, tuple, Sequence):
        return ConfigError(f"{text} A list is overridden as a whole: {path}=[...].")
    return ConfigError(f"{text} Correct it.")


def _name(hint: Any) -> str:
    """A type as a user reads it."""
    form, args = get_origin(hint), get_args(hint)
    if form in (Union, types.UnionType):
        return " or ".join(_name(member) for member in args)
    if form is Literal:
        return f"one of {', '.join(map(str, args))}"
    if isinstance(hint, type) and issubclass(hint, Enum):
        return f"one of {', '.join(str(member.value) for member in hint)}"
    if hint is type(None):
        return "null"
    if is_dataclass(hint) and isinstance(hint, type):
        return f"a mapping of {', '.join(field.name for field in fields(hint))}"
    if form is not None:
        return str(hint)
    return getattr(hint, "__name__", str(hint))


def _join(path: str, key: str) -> str:
    if re.search(r"[.\[\]]", key):
        return f"{path}[{key}]"
    return f"{path}.{key}" if path else key


def _thaw(node: _Node) -> Any:
    if isinstance(node.value, dict):
        return {key: _thaw(item) for key, item in node.value.items()}
    if isinstance(node.value, list):
        return [_thaw(item) for item in node.value]
    return node.value


def _plain(value: Any, path: str) -> Any:
    """Dataclasses as the plain data they are read from."""
    if is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in fields(value) if field.init}
    if isinstance(value, Enum):
        value = value.value
    if isinstance(value, Mapping):
        return {_plain(key, path): _plain(item, _join(path, str(key))) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, f"{path}[{n}]") for n, item in enumerate(value)]
    if isinstance(value, Path):
        value = str(value)
    if isinstance(value, str) and "${" in value:
        raise ConfigError(f"option `{path}` is {value!r}: an interpolation; write the value itself.")
    if value is None or type(value) in (bool, int, float, str):
        return value
    raise ConfigError(f"option `{path}` is a {type(value).__name__}; needed a plain value to save it.")
