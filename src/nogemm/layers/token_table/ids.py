"""Which ids the tokens of the running call have: left by a model's hooks, read by its token tables.

An FFN sees hidden states alone. So a model with token tables has hooks (`watch`): one on each module that takes
input_ids notes them when a call begins and forgets them when it ends. Calls are nested, and each thread has its own, so
the innermost call of the thread is the one that a token table answers.

Two ways lead past a model's call. sentence-transformers runs its `forward`, which no hook of the model sees: there the
ids are those that were embedded last (`embeds`), until the last of the tables has answered (`answered`). And what
gradient checkpointing computes again is given the ids of the first time (`keeps`).

The hooks are plain functions and hold nothing: a model that has them is copied and pickled like any other.

Legend: N tokens, all texts of a call one after the other.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from nogemm.errors import ConfigError, ShapeError

NAME = "input_ids"
_NONE = (
    "a token table needs the ids of its tokens, and {why}. Call the model with input_ids, or the layer within "
    "nogemm.layers.token_table.given(ids)"
)


class _Calls(threading.local):
    """The calls that a thread is in, the innermost last: what is running, and its ids if it has any.

    `embedded`: ids that were embedded outside of any call.
    """

    def __init__(self) -> None:
        self.open: list[tuple[object, Tensor | None]] = []
        self.embedded: Tensor | None = None


_calls = _Calls()
_places: dict[type[nn.Module], int | None] = {}


def running_ids() -> Tensor | None:
    """Return the ids of the innermost call of this thread; None where it was given none, and where none is running."""
    return _calls.open[-1][1] if _calls.open else _calls.embedded


def ids_of(x_ND: Tensor) -> Tensor:
    """Return the ids of the running call's tokens, [N].

    Raises:
        ConfigError: no call is running, or it was given inputs_embeds in place of input_ids.
        ShapeError: the layer sees another number of tokens than the call has ids.
    """
    ids = running_ids()
    if ids is None:
        why = "this call was given none (inputs_embeds?)" if _calls.open else "no call of its model is running"
        raise ConfigError(_NONE.format(why=why))
    if ids.numel() != len(x_ND):
        raise ShapeError(
            f"a token table needs an id for each token: the call has input_ids of shape {tuple(ids.shape)}, the layer "
            f"sees {len(x_ND)} tokens. Does the model leave padding out, or put tokens in front?"
        )
    return ids.reshape(-1)


@contextmanager
def given(ids: Tensor) -> Iterator[None]:
    """Within the block, the tokens that layers of this thread see have these ids, in this order."""
    _calls.open.append((given, ids))
    try:
        yield
    finally:
        _calls.open.pop()


def watch(module: nn.Module) -> None:
    """Note the ids of each call of a module that takes input_ids."""
    if call_starts not in module._forward_pre_hooks.values():
        module.register_forward_pre_hook(call_starts, with_kwargs=True)
        module.register_forward_hook(call_ends, always_call=True)


def watch_way(embeddings: list[nn.Module], around: list[nn.Module], last: nn.Module) -> None:
    """Let the ids reach token tables past a model's call, see above.

    Args:
        embeddings: modules that are called with ids.
        around: modules between the model and its tables, which may be checkpointed.
        last: module after whose call no table of the model has to answer any more.
    """
    for modules, hook in ((embeddings, embeds), (around, keeps)):
        for module in modules:
            if hook not in module._forward_pre_hooks.values():
                module.register_forward_pre_hook(hook)
    if answered not in last._forward_hooks.values():
        last.register_forward_hook(answered, always_call=True)


def leave(module: nn.Module) -> None:
    """Take the hooks off again."""
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for key in [key for key, hook in hooks.items() if hook in (call_starts, call_ends)]:
            del hooks[key]
            for flags in (module._forward_pre_hooks_with_kwargs, module._forward_hooks_always_called):
                flags.pop(key, None)


def place_of_ids(kind: type[nn.Module]) -> int | None:
    """Return at which place a class of models takes input_ids; None where it takes none."""
    if kind not in _places:
        names = list(inspect.signature(kind.forward).parameters)[1:]  # without self
        _places[kind] = names.index(NAME) if NAME in names else None
    return _places[kind]


def call_starts(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Note the ids of a call; one that is given embeddings has those of the call around it, if they fit."""
    place = place_of_ids(type(module))
    given_ids = args[place] if place is not None and len(args) > place else kwargs.get(NAME)
    embeds, around = kwargs.get("inputs_embeds"), running_ids()
    fits = around is not None and isinstance(embeds, Tensor) and embeds.shape[:2] == around.shape
    if given_ids is None and fits and not _has_two_texts(_calls.open[-1][0]):
        given_ids = around
    _calls.embedded = None
    _calls.open.append((module, given_ids if isinstance(given_ids, Tensor) else None))


def _has_two_texts(module: object) -> bool:
    """Tell an encoder-decoder, whose own input_ids are the encoder's alone."""
    return bool(getattr(getattr(module, "config", None), "is_encoder_decoder", False))


def call_ends(module: nn.Module, args: Any, output: Any) -> None:
    """Forget what `call_starts` noted for this call of the module."""
    if _calls.open and _calls.open[-1][0] is module:
        _calls.open.pop()


class _Recomputed:
    """transformers' checkpointing of one module: what it computes again has the ids that it had the first time."""

    def __init__(self, checkpoint: Callable[..., Any]) -> None:
        self.checkpoint = checkpoint

    def __call__(self, compute: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        ids = running_ids()
        if ids is None:
            return self.checkpoint(compute, *args, **kwargs)
        known: Tensor = ids

        def with_ids(*inputs: Any, **named: Any) -> Any:
            with given(known):
                return compute(*inputs, **named)

        return self.checkpoint(with_ids, *args, **kwargs)


def keeps(module: nn.Module, args: tuple[Any, ...]) -> None:
    """Let gradient checkpointing, where it is on, keep the ids: it computes again outside of any call."""
    own = getattr(module, "_gradient_checkpointing_func", None)
    if own is not None and not isinstance(own, _Recomputed):
        module._gradient_checkpointing_func = _Recomputed(own)  # type: ignore[assignment]


def embeds(module: nn.Module, args: tuple[Any, ...]) -> None:
    """Note what is embedded outside of any call."""
    if not _calls.open and args and isinstance(args[0], Tensor):
        _calls.embedded = args[0]


def answered(module: nn.Module, args: Any, output: Any) -> None:
    """Forget what was embedded outside of any call: the last table has answered."""
    if not _calls.open:
        _calls.embedded = None


def made_up_ids(x_ND: Tensor, vocabulary: int) -> Tensor:
    """Make ids up from the tokens themselves, for a layer that is timed or tested outside a model, [N]."""
    return x_ND[:, 0].float().nan_to_num(0.0, 0.0, 0.0).mul(1e6).long().remainder(vocabulary)
