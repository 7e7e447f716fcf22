"""The memory of an exported decoder: keys and values that a request keeps, and the tokens that they are of.

Legend: B sequences, L new tokens, T tokens so far, the new ones included.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from nogemm.export.cached import INPUTS


class Memory:
    """What a request remembers; it can go back to any number of its first tokens.

    The numbers that are kept stay as they are, bit for bit: the host has to hold them in floating point, as
    `decoder_graph.compile_graph` asks it to. A memory in eight bits would be rounded anew.

    Args:
        request: of a compiled decoder.
    Attributes:
        ids: int64 [B, T], the tokens whose keys and values are held; None: there are none.
        mask: of these, 0 for padding; None: there is none.
    """

    def __init__(self, request: Any) -> None:
        self.request = request
        self.ids: Tensor | None = None
        self.mask: Tensor | None = None
        self._certain = True  # False: an interruption came while the request changed

    @property
    def length(self) -> int:
        """T, of the tokens that are held."""
        return 0 if self.ids is None else self.ids.shape[1]

    def begin(self, ids_BT: Tensor, mask_BT: Tensor | None) -> None:
        """Keep what is held if these prompts begin with it and go on; else forget it."""
        goes_on = self._certain and self.ids is not None and self.length < ids_BT.shape[1] and _begins(ids_BT, self.ids)
        if goes_on and (self.mask is not None or mask_BT is not None):
            goes_on = self.mask is not None and mask_BT is not None and _begins(mask_BT, self.mask)
        if not goes_on:
            self.forget()

    def run(self, fresh_BL: Tensor, mask_BT: Tensor | None, more: dict[str, np.ndarray]) -> dict[str, Any]:
        """Run new tokens behind those that are held; see `step`."""
        self._certain = False
        found = step(self.request, fresh_BL, self.length + fresh_BL.shape[1], mask_BT, more)
        self.ids = fresh_BL if self.ids is None else torch.cat((self.ids, fresh_BL), 1)
        self.mask = mask_BT
        self._certain = True
        return found

    def cut(self, length: int) -> None:
        """Go back to the first `length` tokens; where there are no more, nothing changes.

        Cost: two copies of all keys and values.
        """
        if self._certain and self.length <= length:
            return
        self._certain = False
        variables = [] if length == 0 or self.ids is None else self.request.query_state()
        kept = [_first(variable.state, length) for variable in variables]
        if not kept or any(state is None for state in kept):
            self.forget()
            return
        for variable, state in zip(variables, kept, strict=True):
            variable.state = state
        assert self.ids is not None
        self.ids = self.ids[:, :length]
        self.mask = None if self.mask is None else self.mask[:, :length]
        self._certain = True

    def forget(self) -> None:
        """Hold nothing."""
        self._certain = False
        self.request.reset_state()
        self.ids = self.mask = None
        self._certain = True

    def mark(self) -> Mark:
        """Remember how many tokens are held, to go back to."""
        return Mark(self)


class Mark:
    """A memory as it was, see `nogemm.decoding.windows.Marked`."""

    def __init__(self, memory: Memory) -> None:
        self.memory, self.length = memory, memory.length

    def rewind(self, tokens: int = 0) -> None:
        self.memory.cut(self.length + tokens)


def step(
    request: Any,
    fresh_BL: Tensor,
    total: int,
    mask_BT: Tensor | None = None,
    more: dict[str, np.ndarray] | None = None,
) -> dict[str, Any]:
    """Run new tokens behind those that a request remembers; return the outputs by name, views of the request's own.

    Args:
        total: T.
        more: what the graph takes beside tokens, mask and positions.
    """
    batch, new = fresh_BL.shape
    if mask_BT is None:
        places = np.arange(total - new, total, dtype=np.int64)
        positions, mask = np.broadcast_to(places, (batch, new)), np.ones((batch, total), np.int64)
    else:
        mask = mask_BT.numpy()
        positions = np.maximum(mask.cumsum(1) - 1, 0)[:, -new:]
    inputs: list[Any] = [np.ascontiguousarray(each) for each in (fresh_BL.numpy(), mask, positions)]
    inputs.append(np.arange(batch, dtype=np.int32))
    given = dict(zip(INPUTS, inputs, strict=True)) | (more or {})
    found = request.infer(given, share_inputs=True, share_outputs=True)
    return {name: value for output, value in found.items() for name in output.get_names()}


def _begins(whole_BT: Tensor, start_BT: Tensor) -> bool:
    """Say whether each row begins with a row of `start_BT`."""
    return whole_BT.shape[0] == start_BT.shape[0] and torch.equal(whole_BT[:, : start_BT.shape[1]], start_BT)


def _first(state: Any, length: int) -> Any:
    """Return the first tokens of a variable [B, heads, T, width]; None if it holds fewer."""
    import openvino

    if state.shape[2] < length:
        return None
    batch, heads, _, width = state.shape
    kept = openvino.Tensor(state.element_type, [batch, heads, length, width])
    kept.data[:] = state.data[:, :, :length]
    return kept
