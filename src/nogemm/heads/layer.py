"""A vocabulary head that finds its largest logit without reading all of its weights.

The weights stay the model's own, tied to its embedding or not; there is one copy of them. What is added are codes of
the rows (`codes.py`), made from the weights when they are first needed, and again when the weights have changed.

Legend: N states, D width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nogemm.errors import NotFiniteError, ShapeError
from nogemm.heads.codes import make_codes
from nogemm.heads.config import HeadConfig
from nogemm.ops.head_scan import HeadCodes, head_argmax, head_logits


@dataclass(frozen=True)
class Choice:
    """The most likely tokens of some states.

    Attributes:
        token: int64 [N].
        logit: float32 [N], of that token, before any scaling or capping of the model's.
        rows: int64 [N], rows of the head that were computed exactly.
    """

    token: Tensor
    logit: Tensor
    rows: Tensor


class HireHead(nn.Module):
    """The head of a language model.

        logit = x W^T + b

    Called, it gives all logits, as `torch.nn.Linear` does, with gradients: whatever needs them all has them.
    `choose` names the largest logit alone.

    Args:
        config: see `HeadConfig`.
        weight: [V, D], taken over, not copied.
        bias: [V] or None.
        moment: [D, D], second moment of the states that the head will see; None: unknown.
    Cost: see `head_argmax`; codes take about D / 2 + leading / 2 + 8 bytes a row beside the weights.
    Source: HiRE (2024), section on the softmax; the proof is ours.
    """

    moment: Tensor | None

    def __init__(
        self, config: HeadConfig, weight: nn.Parameter, bias: nn.Parameter | None = None, moment: Tensor | None = None
    ) -> None:
        super().__init__()
        self.config = config
        self.weight = weight
        self.bias = bias
        self.register_buffer("moment", moment)
        self._codes: tuple[tuple[object, ...], HeadCodes] | None = None

    @property
    def in_features(self) -> int:
        """D."""
        return self.weight.shape[1]

    @property
    def out_features(self) -> int:
        """V."""
        return self.weight.shape[0]

    def forward(self, x: Tensor) -> Tensor:
        """Return all logits [..., V] in x's dtype."""
        return F.linear(x, self.weight, self.bias)

    def logits(self, x: Tensor) -> Tensor:
        """Return all logits [N, V] of states [N, D], accumulated in float32: what `choose` finds the largest of."""
        bias = None if self.bias is None else self.bias.detach().float()
        return head_logits(x.detach(), self.weight.detach(), bias)

    def choose(self, x: Tensor) -> Choice:
        """Find the largest logit of each state.

        Args:
            x: [..., D]; states are read in float32.
        Raises:
            NotFiniteError: a state is not finite; the message names its place.
        """
        if x.shape[-1] != self.in_features:
            raise ShapeError(f"HireHead: the head takes width {self.in_features}, x has shape {tuple(x.shape)}")
        with torch.no_grad():
            bias = None if self.bias is None else self.bias.detach().float()
            flat = x.detach().reshape(-1, self.in_features)
            choice = Choice(*head_argmax(flat, self.weight.detach(), bias, self.codes()))
        if len(choice.token) and int(choice.token.min()) < 0:
            place = int((choice.token < 0).int().argmax())
            raise NotFiniteError(f"the state at position {place} is not finite: it has no most likely token")
        return choice

    def codes(self) -> HeadCodes:
        """Return the codes of the weights as they are now; made anew after the weights have changed."""
        key = tuple(_identity(tensor) for tensor in (self.weight, self.bias, self.moment))
        if self._codes is None or self._codes[0] != key:
            bias = None if self.bias is None else self.bias.detach().float()
            self._codes = key, make_codes(self.weight.detach(), bias, self.moment, self.config.leading)
        return self._codes[1]

    def drop_codes(self) -> None:
        """Free the codes; the next choice makes them again."""
        self._codes = None

    def __getstate__(self) -> dict[str, object]:
        """Leave the codes out of copies and pickles: they follow from the weights."""
        return {**cast("dict[str, object]", self.__dict__), "_codes": None}

    def extra_repr(self) -> str:
        """Describe the head in print(model)."""
        return f"in_features={self.in_features}, out_features={self.out_features}, mode={self.config.mode!r}"


def head_of(model: nn.Module) -> HireHead | None:
    """Return the converted head of a transformers model, or None."""
    getter = getattr(model, "get_output_embeddings", None)
    found = getter() if callable(getter) else None
    return found if isinstance(found, HireHead) else None


def _identity(tensor: Tensor | None) -> object:
    """Tell a tensor's numbers apart from what they were: the memory they lie in, and torch's count of changes to it."""
    return None if tensor is None else (tensor.data_ptr(), tensor._version, tuple(tensor.shape), tensor.dtype)
