"""Token tables in a model: how they learn the ids of a call, how large they are, and their start without texts.

Reading order: `connect`, `vocabulary_of`, `check_order`, `start_alone`.

Legend: B texts, L tokens of each, V vocabulary, D width.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from nogemm.convert._running import Unproven
from nogemm.convert._site import Site
from nogemm.convert._whole import model_inputs
from nogemm.convert.sites import record_sites
from nogemm.errors import ConfigError
from nogemm.layers import FFN, PackedFFN, SumFFN, TokenTableFFN
from nogemm.layers.token_table import PackedTokenTable, given
from nogemm.layers.token_table.ids import NAME, leave, place_of_ids, running_ids, watch, watch_way

_CHUNK = 512  # items of the vocabulary that are run at a time


def connect(root: nn.Module) -> None:
    """Let a transformers model note the ids of its calls, if it has token tables; nothing otherwise.

    Every module that takes input_ids notes them, those inside a task model or an encoder-decoder too.
    """
    paths = [path for path, part in root.named_modules() if isinstance(part, (TokenTableFFN, PackedTokenTable))]
    if not paths:
        return
    callers = _callers(root)
    for caller in callers:
        watch(caller)
    around = [_around(root, path, callers) for path in paths]
    embeddings = [own for own in map(_embedding_of, callers) if own is not None]
    watch_way(embeddings, [module for modules in around for module in modules], around[-1][0])


def _around(root: nn.Module, path: str, callers: Sequence[nn.Module]) -> list[nn.Module]:
    """List the modules that are called on the way from the model, or from one inside, to a layer: outermost first."""
    names = path.split(".")
    way = [root.get_submodule(".".join(names[:end])) for end in range(1, len(names) + 1)]
    inner = 1 + max((place for place, module in enumerate(way) if module in callers), default=-1)
    called = [module for module in way[inner:] if not isinstance(module, (FFN, PackedFFN, nn.ModuleList))]
    return called or way[-1:]


def _callers(root: nn.Module) -> list[nn.Module]:
    """List the modules of a model that take input_ids and look them up: itself, and transformers models inside."""
    parts = [root, *(part for part in root.modules() if part is not root and hasattr(part, "get_input_embeddings"))]
    return [part for part in parts if place_of_ids(type(part)) is not None]


def _embedding_of(caller: Any) -> nn.Module | None:
    try:
        return caller.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return None


@contextmanager
def watched(root: nn.Module) -> Iterator[None]:
    """Within the block, a model without token tables notes the ids of its calls."""
    fresh = [caller for caller in _callers(root) if not _noting(caller)]
    for caller in fresh:
        watch(caller)
    try:
        yield
    finally:
        for caller in fresh:
            leave(caller)


def _noting(module: nn.Module) -> bool:
    return any(getattr(hook, "__module__", "") == watch.__module__ for hook in module._forward_pre_hooks.values())


def vocabulary_of(root: Any) -> int:
    """Return the number of rows of a model's token embedding.

    Raises:
        ConfigError: the model takes no token ids.
    """
    embedding = _embedding_of(root)
    size = embedding.num_embeddings if isinstance(embedding, nn.Embedding) else None
    if size is None:
        size = getattr(getattr(root, "config", None), "vocab_size", None)
    if not isinstance(size, int) or not _callers(root):
        raise ConfigError(f"convert: {type(root).__name__} takes no {NAME}, which a token table reads")
    return size


@contextmanager
def noted_ids(root: nn.Module, chosen: Sequence[Site]) -> Iterator[dict[str, Tensor | None]]:
    """Within the block, keep {site: ids of its tokens} of the last call that reached each site."""
    found: dict[str, Tensor | None] = {}
    handles = []
    for site in chosen:

        def hook(_: nn.Module, args: Any, name: str = site.name) -> None:
            found[name] = running_ids()

        handles.append(site.up.register_forward_pre_hook(hook))
    try:
        with watched(root):
            yield found
    finally:
        for handle in handles:
            handle.remove()


def check_order(root: nn.Module, chosen: Sequence[Site]) -> None:
    """See that sites see the tokens of a call in the order of its ids, by two short texts, changing places.

    Raises:
        ConfigError: a site sees other tokens than the call has ids for, or in another order.
    """
    try:
        inputs = model_inputs(root)
    except Unproven as error:
        raise ConfigError(f"convert: a token table reads {NAME}, and {error}") from error
    two = {key: torch.cat((value, value)) for key, value in inputs.items()}
    for key in (NAME, f"decoder_{NAME}"):
        if key in two:
            two[key][1] = two[key][1].flip(0)
    names = [site.name for site in chosen]
    was_training = root.training
    root.eval()
    try:
        with torch.no_grad(), noted_ids(root, chosen) as ids, record_sites(root, names) as seen:
            root(**two)
            first, known = {name: seen[name][0] for name in names if name in seen}, dict(ids)
            root(**{key: value.flip(0) for key, value in two.items()})
            second = {name: seen[name][0] for name in first}
    finally:
        root.train(was_training)
    for name in names:
        of_call = known.get(name)
        if of_call is None or name not in first or first[name].shape[:-1].numel() != of_call.numel():
            raise ConfigError(f"convert: {name} sees other tokens than the call's {NAME}: no token table there")
        one, other = (states[name].reshape(*of_call.shape, -1) for states in (first, second))
        if (one.flip(0) - other).float().norm() > 0.1 * one.float().norm():
            raise ConfigError(f"convert: {name} sees tokens in another order than {NAME}: no token table there")


def start_alone(root: nn.Module, built: Sequence[tuple[Site, FFN]], batch: int = _CHUNK) -> None:
    """Give each token table with start="alone" its rows: run every item of the vocabulary as a text of its own.

    A row is what the dense FFN answers to that token there, less what the terms before the table answer, if it is the
    term of a sum.

    Cost: V tokens through the dense model and each dense FFN again.
    """
    wanted = [(site, layer) for site, layer in built if any(True for _ in _alone(layer))]
    if not wanted:
        return
    sources = {site.name: site.dense().float() for site, _ in wanted}
    device = next(root.parameters()).device
    size = max(table.rows.shape[0] for _, layer in wanted for table, _ in _alone(layer))
    was_training = root.training
    root.eval()
    try:
        with torch.no_grad(), record_sites(root, [site.name for site, _ in wanted]) as seen:
            for start in range(0, size, batch):
                ids = torch.arange(start, min(start + batch, size), device=device)
                root(**_each_alone(root, ids))
                with given(ids):
                    for site, layer in wanted:
                        x_ND = seen[site.name][0].flatten(0, -2).float()
                        for table, before in _alone(layer):
                            y_ND = sources[site.name].tokens(x_ND)
                            table.take_rows(ids, y_ND - sum(term(x_ND) for term in before))
    finally:
        root.train(was_training)
    for _, layer in wanted:
        if layer.fitted == "random":
            layer.fitted = "closed-form"


def _each_alone(root: nn.Module, ids: Tensor) -> dict[str, Tensor]:
    """Make a call of texts of one token each."""
    taken, one_B1 = inspect.signature(root.forward).parameters, ids.unsqueeze(1)
    call = {NAME: one_B1, "attention_mask": torch.ones_like(one_B1), f"decoder_{NAME}": one_B1}
    return {name: value for name, value in call.items() if name in taken}


def _alone(layer: FFN) -> Iterator[tuple[TokenTableFFN, Iterable[FFN]]]:
    """Yield the token tables of a layer that start so, each with the terms before it."""
    terms = layer.layers if isinstance(layer, SumFFN) else [layer]
    for place, term in enumerate(terms):
        if isinstance(term, TokenTableFFN) and term.config.start == "alone":
            yield term, terms[:place]
