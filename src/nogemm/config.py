"""Configurations: frozen dataclasses that build what they describe, and their JSON form.

Every layer and projection has one frozen, keyword-only config next to its module. `kind` names it in JSON;
`register` fills the only registry. Reading order: `Config`, `LayerConfig`, `ProjectionConfig`, `layer_config`,
`parse_set`, `parse_layer`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import types
import typing
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

from nogemm.errors import ConfigError
from nogemm.files import parse_json
from nogemm.shape import FFNShape

if TYPE_CHECKING:
    from nogemm.layers._base import FFN
    from nogemm.projections._base import Projection

ConfigT = TypeVar("ConfigT", bound="Config")
LayerT = TypeVar("LayerT", bound="FFN")
FFNT = TypeVar("FFNT", bound="FFN")
_REGISTRY: dict[str, dict[str, type[Config]]] = {"layer": {}, "projection": {}, "head": {}}
_LAYERS: dict[type[Config], type[FFN]] = {}
SUM = "sum"  # the kind that a command line writes by its terms


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(ABC):
    """A frozen description with a JSON form; the base of layer, projection and head configs."""

    kind: ClassVar[str]
    family: ClassVar[str]

    def __post_init__(self) -> None:
        """Check what a field's annotation alone tells; a config with more to check calls this first.

        Raises:
            ConfigError: a word that is none of a Literal's, a bool that is none, or a float that is no finite number.
        """
        check_choices(self)
        owner = type(self).__name__
        for name, kinds in _plain_kinds(type(self)).items():
            value = getattr(self, name)
            if value is None and type(None) in kinds:
                continue
            if bool in kinds and not isinstance(value, bool):
                raise ConfigError(f"{owner}: {name} must be true or false, got {name}={value!r}")
            number = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < math.inf
            if float in kinds and not number:
                raise ConfigError(f"{owner}: {name} must be a finite number, got {name}={value!r}")

    def to_dict(self) -> dict[str, Any]:
        """Return {"kind": ..., field: value, ...}; nested configs likewise, JSON values only."""
        return {"kind": self.kind} | {f.name: _plain(getattr(self, f.name)) for f in dataclasses.fields(self)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerConfig(Config, Generic[LayerT]):
    """Describes one compute-lite FFN of class `LayerT`; `build` makes the module."""

    family: ClassVar[str] = "layer"

    def build(
        self,
        d_model: int,
        d_out: int | None = None,
        *,
        hidden: int | None = None,
        activation: str = "gelu",
        gated: bool = False,
    ) -> LayerT:
        """Make the layer for inputs of width `d_model` and outputs of width `d_out` (default: the same).

        `hidden`, `activation` and `gated` describe the dense FFN that is replaced; layers without neurons ignore them.
        """
        width = d_model if d_out is None else d_out
        return self.make(FFNShape(d_in=d_model, d_out=width, hidden=hidden, activation=activation, gated=gated))

    @property
    def reads_ids(self) -> bool:
        """Whether the layer needs the ids of the tokens besides their hidden states."""
        return False

    def for_vocabulary(self, size: int) -> LayerConfig:
        """Return the config for a model of so many token ids; itself, unless a table of it takes the model's number."""
        return self

    def make(self, shape: FFNShape) -> LayerT:
        """Make the layer that takes the place of a dense FFN of this shape."""
        return typing.cast("LayerT", _LAYERS[type(self)](self, shape))


# Metadata of a field `terms: tuple[LayerConfig, ...]`: each of them is read as the config of a layer.
LAYERS = {"each": "layer"}
# Metadata of a field `projection: ProjectionConfig | None = None`: `--set projection.block=64` means this kind.
OPTIONAL_PROJECTION = {"kind": "bh"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProjectionConfig(Config):
    """Describes a linear map; `build` makes the module."""

    family: ClassVar[str] = "projection"

    @abstractmethod
    def build(self, d_in: int, d_out: int) -> Projection:
        """Make the projection from width `d_in` to width `d_out`."""


def register(cls: type[ConfigT]) -> type[ConfigT]:
    """Add a config class to the registry under its `kind` (class decorator)."""
    known = _REGISTRY[cls.family]
    if cls.kind in known and known[cls.kind].__qualname__ != cls.__qualname__:
        raise ConfigError(f"{cls.family} kind {cls.kind!r} is already taken by {known[cls.kind].__qualname__}")
    known[cls.kind] = cls
    return cls


def layer_of(config: type[LayerConfig]) -> Callable[[type[FFNT]], type[FFNT]]:
    """Name a layer's class as what a config builds (class decorator): `FFN` is then made from (config, shape)."""

    def note(cls: type[FFNT]) -> type[FFNT]:
        _LAYERS[config] = cls
        return cls

    return note


def layer_config(data: dict[str, Any]) -> LayerConfig:
    """Read a layer config back from `to_dict`'s form.

    Raises:
        ConfigError: unknown kind, unknown field, or a value out of range; the message names it.
    """
    config = _from_dict("layer", data)
    assert isinstance(config, LayerConfig)
    return config


def head_config(data: dict[str, Any]) -> Config:
    """Read the config of a vocabulary head back, as `layer_config` does that of a layer."""
    return _from_dict("head", data)


def layer_class(kind: str) -> type[LayerConfig]:
    """Return the layer config class registered as `kind`, or raise ConfigError with the known names."""
    return typing.cast("type[LayerConfig]", _lookup_kind("layer", kind))


def layer_kinds() -> tuple[str, ...]:
    """List the kinds of all registered layers, by name."""
    return tuple(sorted(_REGISTRY["layer"]))


def parse_set(cls: type[LayerConfig], assignments: Sequence[str]) -> LayerConfig:
    """Make a config from command-line words such as `tables=64` or `projection.block=32`.

    Values are read as JSON where that works (numbers, true, null), as plain words otherwise. A nested field starts from
    its default; `projection=dense` or `projection.kind=dense` chooses another kind.
    """
    tree: dict[str, Any] = {"kind": cls.kind}
    for word in assignments:
        key, equals, text = word.partition("=")
        if not equals or not key:
            raise ConfigError(f"--set {word!r}: expected NAME=VALUE, for example tables=64")
        *parents, leaf = key.split(".")
        node = tree
        for name in parents:
            child = node.setdefault(name, {})
            if not isinstance(child, dict):
                child = node[name] = {"kind": child}
            node = child
        if isinstance(node.get(leaf), dict):
            node[leaf]["kind"] = _read_value(text)
        else:
            node[leaf] = _read_value(text)
    return layer_config(tree)


def parse_layer(method: str, assignments: Sequence[str] = ()) -> LayerConfig:
    """Make a config from a command line's kind of layer and its `parse_set` words.

    A sum is written by its terms, and a word names the term that it is for: `dense+lookup` with `dense.hidden=384` and
    `lookup.tables=32`. Two terms of a kind are `lookup1` and `lookup2`. `sum` with `terms=dense+lookup` is the same.

    Raises:
        ConfigError: an unknown kind, or a word that fits no term or no field.
    """
    words = list(assignments)
    if method == SUM:
        kinds = [word.removeprefix("terms=") for word in words if word.startswith("terms=")]
        if len(kinds) != 1 or "+" not in kinds[0]:
            raise ConfigError("method 'sum': name its terms, such as dense+lookup, in the place of 'sum'")
        method, words = kinds[0], [word for word in words if not word.startswith("terms=")]
    kinds = method.split("+")
    if len(kinds) == 1:
        return parse_set(layer_class(method), words)
    names = [kind + str(kinds[: i + 1].count(kind)) * (kinds.count(kind) > 1) for i, kind in enumerate(kinds)]
    own: dict[str, list[str]] = {name: [] for name in names}
    for word in words:
        name, dot, rest = word.partition(".")
        if not dot or name not in own:
            raise ConfigError(
                f"--set {word!r}: {method} is a sum; say which of {', '.join(names)} is meant, as in "
                f"{names[0]}.NAME=VALUE"
            )
        own[name].append(rest)
    terms = [parse_set(layer_class(kind), own[name]) for kind, name in zip(kinds, names, strict=True)]
    return layer_config({"kind": SUM, "terms": [term.to_dict() for term in terms]})


def _plain(value: Any) -> Any:
    if isinstance(value, Config):
        return value.to_dict()
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


def _read_value(text: str) -> Any:
    try:
        return parse_json(text)
    except ValueError:  # no JSON, or a number of more digits than Python reads
        return text


def _lookup_kind(family: str, kind: Any) -> type[Config]:
    known = _REGISTRY[family]
    if not isinstance(kind, str) or kind not in known:
        raise ConfigError(f"unknown {family} kind {kind!r}; known kinds: {', '.join(sorted(known))}")
    return known[kind]


def _from_dict(family: str, data: Any, default_kind: str | None = None) -> Config:
    if isinstance(data, str):  # `projection=dense` on a command line
        data = {"kind": data}
    if not isinstance(data, dict):
        raise ConfigError(f"expected a {family} config as a mapping with a 'kind', got {data!r}")
    cls = _lookup_kind(family, data.get("kind", default_kind))
    fields = {field.name: field for field in dataclasses.fields(cls)}
    values: dict[str, Any] = {}
    for name, value in data.items():
        if name == "kind":
            continue
        if name not in fields:
            raise ConfigError(f"{cls.__name__} has no field {name!r}; it has: {', '.join(fields)}")
        nested, each = _nested_kind(fields[name]), fields[name].metadata.get("each")
        if nested is not None and value is not None:
            value = _from_dict("projection", value, nested)
        elif each is not None and isinstance(value, (list, tuple)):
            value = tuple(_from_dict(each, item) for item in value)
        values[name] = value
    return cls(**values)


def _nested_kind(field: dataclasses.Field[Any]) -> str | None:
    """Return the kind of projection that a field starts from where only its fields are given; None: a plain field."""
    default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    return default.kind if isinstance(default, ProjectionConfig) else field.metadata.get("kind")


def check_projection(owner: str, value: object, *, faithful: bool, trained: bool) -> None:
    """Raise ConfigError unless `value` is None, or a projection that the layer `owner` describes can use."""
    if value is None:
        return
    if not isinstance(value, ProjectionConfig):
        raise ConfigError(f"{owner}: projection must be a projection config or None, got projection={value!r}")
    if faithful:
        raise ConfigError(
            f"{owner}: projection={value.kind!r} with faithful=True: the published layer has a map of its own"
        )
    if not trained and getattr(value, "learnable", False):
        raise ConfigError(f"{owner}: projection.learnable=True: this layer's hashes are random and never trained")


def check_int(owner: str, name: str, value: object, low: int, high: int | None = None) -> None:
    """Raise ConfigError unless `value` is an int in [low, high]; `owner` and `name` go into the message."""
    bounds = f"at least {low}" if high is None else f"from {low} to {high}"
    if isinstance(value, bool) or not isinstance(value, int) or value < low or (high is not None and value > high):
        raise ConfigError(f"{owner}: {name} must be an integer {bounds}, got {name}={value!r}")


def check_choices(config: Config) -> None:
    """Raise ConfigError unless every field annotated as a Literal holds one of its words, or None where it may."""
    for name, choices in _choices(type(config)).items():
        value = getattr(config, name)
        if value is not None or None not in choices:
            check_choice(type(config).__name__, name, value, [word for word in choices if word is not None])


@functools.cache
def _choices(cls: type[Config]) -> dict[str, tuple[str | None, ...]]:
    hints = typing.get_type_hints(cls)
    found = {field.name: _words(hints[field.name]) for field in dataclasses.fields(cls)}
    return {name: words for name, words in found.items() if any(word is not None for word in words)}


@functools.cache
def _plain_kinds(cls: type[Config]) -> dict[str, tuple[Any, ...]]:
    """Return {field: what its value may be} of the fields that are a bool or a float, or None instead."""
    hints = typing.get_type_hints(cls)
    kinds = {
        field.name: typing.get_args(hints[field.name]) or (hints[field.name],) for field in dataclasses.fields(cls)
    }
    return {name: own for name, own in kinds.items() if own[0] in (bool, float) and set(own[1:]) <= {type(None)}}


def _words(hint: Any) -> tuple[str | None, ...]:
    """Spell out a Literal, or a union of some; None stands for None."""
    if typing.get_origin(hint) is typing.Literal:
        return typing.get_args(hint)
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return tuple(word for part in typing.get_args(hint) for word in _words(part))
    return (None,) if hint is type(None) else ()


def check_choice(owner: str, name: str, value: object, choices: Sequence[str]) -> None:
    """Raise ConfigError unless `value` is one of `choices`."""
    if value not in choices:
        raise ConfigError(f"{owner}: {name} must be one of {', '.join(choices)}, got {name}={value!r}")
