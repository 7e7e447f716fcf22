"""Options that several measuring commands take, and how their words are read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nogemm.errors import ConfigError

if TYPE_CHECKING:
    from nogemm.bench.layer import LayerBenchArgs

Method = Annotated[str, typer.Option(help="Kind of our layer; a sum as its terms, such as dense+lookup.")]
Set = Annotated[list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="One field of it.")]
Width = Annotated[int, typer.Option("--d", help="Width of the model.")]
Hidden = Annotated[int, typer.Option(help="Hidden width of the dense layer; 0: 4 d.")]
Activation = Annotated[str, typer.Option(help="Of the dense layer.")]
Gated = Annotated[bool, typer.Option("--gated", help="A gated dense layer: gate, up and down.")]
Dtype = Annotated[str, typer.Option(help="What ours is packed in: fp32, bf16 or int8.")]
Batch = Annotated[str, typer.Option(help="Tokens per call, with commas.")]
Against = Annotated[str | None, typer.Option(help="Dense contenders, with commas [all that are known].")]
Threads = Annotated[int, typer.Option(help="Threads of every contender; 0: every usable core.")]
Rounds = Annotated[int, typer.Option(help="Turns of each contender in each case, at least 7.")]
Seconds = Annotated[float, typer.Option(help="Time aimed at per turn.")]
Checkpoint = Annotated[str | None, typer.Option(help="Distilled model to take a trained layer from.")]
Site = Annotated[int, typer.Option(help="Which of its layers.")]
Seed = Annotated[int, typer.Option(help="Of weights and tokens.")]


def given(context: typer.Context, *names: str) -> list[str]:
    """Return the flags of those options, by the names of their parameters, that the caller has given."""
    flags = {str(parameter.name): parameter.opts[0] for parameter in context.command.params}
    sources = {name: context.get_parameter_source(name) for name in names}
    return [flags[name] for name, source in sources.items() if source is not None and source.name != "DEFAULT"]


def refuse(context: typer.Context, names: Iterable[str], why: str) -> None:
    """Refuse options that would be read and have no effect.

    Args:
        names: of parameters that do not apply.
        why: goes behind the flag, such as "needs --sample".
    Raises:
        ConfigError: one of them was given; the message names the first.
    """
    found = given(context, *names)
    if found:
        raise ConfigError(f"{found[0]} {why}")


def refuse_without_checkpoint(context: typer.Context, checkpoint: str | None, *fixed: str) -> None:
    """Hold a command that takes a layer from --checkpoint, or builds one, to the options of what it does.

    Args:
        fixed: names of parameters that a trained layer settles.
    """
    if checkpoint is None:
        refuse(context, ["site"], "needs --checkpoint: a layer that is built has no site")
    else:
        refuse(context, fixed, "does not go with --checkpoint, whose layer is trained")


def layer_args(given: Mapping[str, Any]) -> LayerBenchArgs:
    """Say which layer is measured: a command's options by name, those of them that `LayerBenchArgs` has.

    Raises:
        ConfigError: a batch that is not a number.
    """
    from nogemm.bench.layer import LayerBenchArgs

    names = [field.name for field in fields(LayerBenchArgs)]
    chosen = {name: given[name] for name in names if given.get(name) is not None}
    chosen |= {"set": tuple(given["set_"] or ()), "batch": integers("--batch", given["batch"])}
    chosen |= {name: words(chosen[name]) for name in ("against", "cache") if name in chosen}
    return LayerBenchArgs(**chosen)


def words(text: str) -> tuple[str, ...]:
    """Split a list with commas."""
    return tuple(word.strip() for word in text.split(",") if word.strip())


def integers(option: str, text: str) -> tuple[int, ...]:
    """Split a list of whole numbers with commas; `option` goes into the message."""
    try:
        return tuple(int(word) for word in words(text))
    except ValueError:
        raise ConfigError(f"{option}: expected whole numbers with commas between them, got {text!r}") from None
