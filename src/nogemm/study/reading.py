"""Read a study file: YAML as its version 1.2 says, mappings whose keys are all known, lists that multiply into rows.

YAML 1.1, which PyYAML reads, takes `no` for false and `1e-3` for a word. In a study `no` is a layer and 1e-3 is a rate.
"""

from __future__ import annotations

import difflib
import functools
import importlib.util
import itertools
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from nogemm.config import SUM, LayerConfig, layer_class, layer_kinds, parse_layer
from nogemm.errors import ConfigError

_BOOL = re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$")
_INT = re.compile(r"^[-+]?(?:0|[1-9][0-9_]*)$")
_FLOAT = re.compile(r"^(?:[-+]?(?:[0-9][0-9_]*\.?[0-9_]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[-+]?\.inf|\.nan)$")
_HOLE = re.compile(r"\{([^{}]+)\}")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+=-]{0,199}")
MOST_NODES = 100_000
"""Values in a study file, those behind an alias counted as often as it stands: nine lines of aliases make a billion."""
MOST_ROWS = 10_000
"""Rows of a grid entry."""


def read_yaml(path: Path) -> dict[str, Any]:
    """Return the mapping in a YAML file.

    Raises:
        ConfigError: no such file, PyYAML is not installed, no YAML, a key that stands twice, or no mapping.
    """
    if importlib.util.find_spec("yaml") is None:
        raise ConfigError("a study file is YAML: pip install 'nogemm[study]'")
    import yaml

    try:
        data = yaml.load(path.read_text(encoding="utf-8"), Loader=_loader())  # a SafeLoader: plain values only
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such study file") from None
    except Exception as error:  # a tag raises what its reader does: ValueError, KeyError, ...
        raise ConfigError(f"{path}: not YAML ({' '.join(str(error).split())})") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: a study file is a mapping with rows, got {type(data).__name__}")
    return data


@functools.cache
def _loader() -> Any:
    import yaml

    def refusal(words: str, node: Any) -> Exception:
        return yaml.constructor.ConstructorError(None, None, words, node.start_mark)

    def values(node: Any, known: dict[int, int]) -> int:
        if id(node) not in known:
            known[id(node)] = (
                MOST_NODES + 1
            )  # what it is while it is counted: an anchor inside of itself is refused, too
            parts = itertools.chain(*node.value) if isinstance(node, yaml.MappingNode) else node.value
            inside = () if isinstance(node, yaml.ScalarNode) else parts
            known[id(node)] = 1 + sum(values(part, known) for part in inside)
        return known[id(node)]

    class Loader(yaml.SafeLoader):
        def get_single_node(self) -> Any:
            node = super().get_single_node()
            if node is not None and values(node, {}) > MOST_NODES:
                raise refusal(f"with its aliases written out it has more than {MOST_NODES:,} values", node)
            return node

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            seen: set[Any] = set()
            for key_node, _ in node.value:
                key = self.construct_object(key_node, deep=True)
                if not isinstance(key, str):
                    raise refusal(f"the key {key!r} is no word", key_node)
                if key in seen:
                    raise refusal(f"the key {key!r} stands twice", key_node)
                seen.add(key)
            return super().construct_mapping(node, deep)

    own = ("bool", "int", "float", "timestamp")
    tags = {f"tag:yaml.org,2002:{name}" for name in own}
    Loader.yaml_implicit_resolvers = {
        first: [entry for entry in entries if entry[0] not in tags]
        for first, entries in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    Loader.add_implicit_resolver("tag:yaml.org,2002:bool", _BOOL, list("tTfF"))
    Loader.add_implicit_resolver("tag:yaml.org,2002:int", _INT, list("-+0123456789"))
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))
    return Loader


def check_keys(given: Any, known: Iterable[str], where: str) -> dict[str, Any]:
    """Return a mapping (None: an empty one) whose keys are all known.

    Raises:
        ConfigError: it is no mapping, or a key is unknown; the message names the nearest known one.
    """
    known = list(known)
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        raise ConfigError(f"{where}: expected a mapping with {', '.join(known)}, got {given!r}")
    for name in given:
        if name not in known:
            raise ConfigError(f"{where}: unknown key {name!r}; {nearest(name, known)}")
    return dict(given)


def nearest(name: str, known: Sequence[str]) -> str:
    """Say which known word was probably meant, or list them all."""
    found = difflib.get_close_matches(str(name), known, 1)
    return f"did you mean {found[0]!r}?" if found else f"known: {', '.join(known)}"


def check_list(given: Any, where: str) -> list[Any]:
    """Return a list (None: an empty one), or raise ConfigError."""
    if given is None:
        return []
    if not isinstance(given, list):
        raise ConfigError(f"{where}: expected a list, got {given!r}")
    return given


def check_name(name: Any, where: str) -> str:
    """Return a row's name, or raise ConfigError: names are names of folders, too."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ConfigError(
            f"{where}: a row's name must be letters, digits and . _ + = - with a letter or a digit in front, 200 at "
            f"most, got {name!r}"
        )
    return name


def read_layer(method: Any, choices: Any, where: str) -> LayerConfig:
    """Make a layer's config from a row's `method` and `set`.

    Args:
        choices: fields of the config by name, nested or with dots: {"tables": 64, "projection.block": 32}.
    Raises:
        ConfigError: no such method or field, or a value out of range.
    """
    if not isinstance(method, str):
        raise ConfigError(f"{where}: method must be the kind of a layer, such as lookup, got {method!r}")
    kinds = method.split("+") if method != SUM else []
    for kind in kinds:
        if kind not in layer_kinds():
            raise ConfigError(f"{where}: unknown method {kind!r}; {nearest(kind, layer_kinds())}")
    if choices is not None and not isinstance(choices, Mapping):
        raise ConfigError(f"{where}: set must be a mapping of the layer's fields, got {choices!r}")
    flat = dict(flattened(choices or {}))
    if len(kinds) == 1:
        fields = list(layer_class(method).__dataclass_fields__)
        for name in flat:
            if name.partition(".")[0] not in fields:
                raise ConfigError(f"{where}: set: {method} has no field {name!r}; {nearest(name, fields)}")
    try:
        return parse_layer(method, [f"{name}={json.dumps(value)}" for name, value in flat.items()])
    except ConfigError as error:
        raise ConfigError(f"{where}: set: {error}") from error


def flattened(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield nested mappings as names with dots."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from flattened(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def multiplied(entry: Mapping[str, Any], where: str) -> Iterator[dict[str, Any]]:
    """Yield the rows of a grid entry: one for each combination of the lists in it.

    `method` and the values of `set` and `options` may be lists; `name` and `title` name them in braces, as in
    "lookup-{tables}x{bits}". Without a name it is the method and the values. A value that is itself a list stands in a
    list of its own.
    """
    for part in ("set", "options"):
        if not isinstance(entry.get(part) or {}, Mapping):
            raise ConfigError(f"{where}: {part} must be a mapping of names to values, got {entry[part]!r}")
    parts = {"set": dict(flattened(entry.get("set") or {})), "options": dict(entry.get("options") or {})}
    axes: dict[tuple[str, str], list[Any]] = {}
    if isinstance(entry.get("method"), list):
        axes["", "method"] = entry["method"]
    for part, values in parts.items():
        axes |= {(part, name): value for name, value in values.items() if isinstance(value, list)}
    empty = [name for (_, name), values in axes.items() if not values]
    if empty:
        raise ConfigError(f"{where}: the list of {empty[0]} is empty")
    count = math.prod(map(len, axes.values()))
    if count > MOST_ROWS:
        raise ConfigError(f"{where}: its lists make {count:,} rows, more than {MOST_ROWS:,}")
    for chosen in itertools.product(*axes.values()):
        values = dict(zip(axes, chosen, strict=True))
        row = {name: value for name, value in entry.items() if name not in ("set", "options")}
        row |= {part: {**fixed} for part, fixed in parts.items() if fixed}
        for (part, name), value in values.items():
            (row[part] if part else row)[name] = value
        shown = {name: value for (_, name), value in values.items()}
        method = row.get("method", "dense")
        default = "-".join([str(method), *(_word(v) for n, v in shown.items() if n != "method")])
        row["name"] = _filled(str(entry.get("name", default)), shown, where)
        if "title" in entry:
            row["title"] = _filled(str(entry["title"]), shown, where)
        yield row


def _filled(pattern: str, values: Mapping[str, Any], where: str) -> str:
    def word(found: re.Match[str]) -> str:
        name = found.group(1)
        if name not in values:
            raise ConfigError(f"{where}: {{{name}}} names no list of this grid; {nearest(name, list(values))}")
        return _word(values[name])

    return _HOLE.sub(word, pattern)


def _word(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
