"""A vocabulary head that finds its largest logit without reading all of its weights.

The weights stay the model's own, tied to its embedding or not; there is one copy of them. What is added are codes of
the rows (`codes.py`), made from the weights when they are first needed, and again when the weights have changed.

Legend: N states, D width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nogemm.errors import DtypeError, NotFiniteError, ShapeError
from nogemm.heads.codes import codes_bytes, make_codes
from nogemm.heads.config import HeadConfig
from nogemm.heads.report import HeadReport, size
from nogemm.ops.head_scan import HeadCodes, head_argmax, head_logits, head_search

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# One row in so many is exact where all logits are wanted. With 512 of 49,152 rows perplexity is off by 0.25 %, as an
# estimate's error raises the sum of exponentials, and a text's own token is often not among the best.
EXACT_ONE_IN = 10
DENSE_ABOVE = 32  # states: estimates of all logits are no faster than a matrix product of more


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


def searched_bytes(codes: HeadCodes, weight_VD: Tensor, config: HeadConfig) -> int:
    """Return the bytes of a head that a search reads: the codes' leading parts, and `rows` rows of the weights."""
    rows = config.rows_of(weight_VD.shape[0]) * weight_VD.shape[1] * weight_VD.element_size()
    return codes.search_bytes + rows


def deferred_bytes(codes: HeadCodes, weight_VD: Tensor, config: HeadConfig) -> int:
    """Return the bytes of a head that a token reads in mode "deferred".

        search + codes / verify_every

    What a proof computes exactly, some dozens of rows, is not counted.
    """
    return searched_bytes(codes, weight_VD, config) + codes.bytes // config.verify_every


class HireHead(nn.Module):
    """The head of a language model.

        logit = x W^T + b

    Called, it gives all logits. They are those of `torch.nn.Linear`, with gradients. In the modes "high_recall" and
    "fast" they are cheaper for up to 32 states, without gradients and out of training: the most likely tenth of the
    rows is exact, all others are the estimates of the codes, so that probabilities, perplexity and entropy stay defined
    (`nogemm.head_error` tells how far they are off). `choose` names the largest logit alone, `search` what is most
    likely the largest.

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
        self._print: Tensor | None = None  # of the weights that the codes are of

    @property
    def in_features(self) -> int:
        """D."""
        return self.weight.shape[1]

    @property
    def out_features(self) -> int:
        """V."""
        return self.weight.shape[0]

    @out_features.setter
    def out_features(self, rows: int) -> None:
        """Take note of nothing: transformers says so when it has resized the tied weights, which say it themselves."""

    @property
    def searched_rows(self) -> int:
        """Rows that a search computes exactly."""
        return self.config.rows_of(self.out_features)

    def forward(self, x: Tensor) -> Tensor:
        """Return all logits [..., V] in x's dtype."""
        if self.config.approximate and self._may_estimate(x):
            flat = x.reshape(-1, self.in_features)
            return self.estimate(flat).to(x.dtype).view(*x.shape[:-1], self.out_features)
        return F.linear(x, self.weight, self.bias)

    def _may_estimate(self, x: Tensor) -> bool:
        learning = torch.is_grad_enabled() and (x.requires_grad or self.weight.requires_grad)
        few = x.numel() <= DENSE_ABOVE * self.in_features
        return few and not learning and not self.training and x.device.type == "cpu"

    def logits(self, x: Tensor) -> Tensor:
        """Return all logits [N, V] of states [N, D], accumulated in float32: what `choose` finds the largest of."""
        bias = None if self.bias is None else self.bias.detach().float()
        return head_logits(x.detach(), self.weight.detach(), bias)

    def choose(self, x: Tensor, noise: Tensor | None = None) -> Choice:
        """Find the largest logit of each state, and prove it.

        Args:
            x: [..., D]; states are read in float32.
            noise: float32 [N, V], added to the logits.
        Raises:
            NotFiniteError: a state is not finite; the message names its place.
        """
        return self._choice(*self._run(head_argmax, x, noise))

    def search(self, x: Tensor, noise: Tensor | None = None) -> Choice:
        """Find what is most likely the largest logit of each state: the largest of `config.rows` rows; as `choose`."""
        index, value, _ = self._run(head_search, x, noise, self.searched_rows)
        return self._choice(index, value, torch.full_like(index, self.searched_rows))

    def estimate(self, x: Tensor, rows: int | None = None) -> Tensor:
        """Return all logits [N, V] of states [N, D], float32: exact for the most likely rows, estimates of the others.

        A state that is not finite has logits that are NaN.

        Args:
            rows: exact ones; None: a tenth of V, at least `config.rows`.
        """
        rows = max(self.searched_rows, self.out_features // EXACT_ONE_IN) if rows is None else rows
        return self._run(head_search, x, None, rows, logits=True)[2]

    def _run(self, op: Any, x: Tensor, noise: Tensor | None, *args: Any, **kwargs: Any) -> Any:
        if x.shape[-1] != self.in_features:
            raise ShapeError(f"HireHead: the head takes width {self.in_features}, x has shape {tuple(x.shape)}")
        with torch.no_grad():
            bias = None if self.bias is None else self.bias.detach().float()
            flat = x.detach().reshape(-1, self.in_features)
            return op(flat, self.weight.detach(), bias, self.codes(), *args, noise_NV=noise, **kwargs)

    def _choice(self, token: Tensor, logit: Tensor, rows: Tensor) -> Choice:
        if len(token) and int(token.min()) < 0:  # rare: worth no more than one look
            place = int((token < 0).int().argmax())
            raise NotFiniteError(f"the state at position {place} is not finite: it has no most likely token")
        return Choice(token, logit, rows)

    def codes(self) -> HeadCodes:
        """Return the codes of the weights; made anew after a change that torch counts.

        Raises:
            DtypeError: the weights are of another dtype than float32, bfloat16 or float16.
        """
        if self.weight.dtype not in _DTYPES:
            raise DtypeError(f"HireHead: weights must be float32, bfloat16 or float16, got {self.weight.dtype}")
        if self._codes is None or self._codes[0] != self._key():
            bias = None if self.bias is None else self.bias.detach().float()
            self.take_codes(
                make_codes(self.weight.detach(), bias, self.moment, self.config.leading, self.config.sketch)
            )
        assert self._codes is not None
        return self._codes[1]

    def take_codes(self, codes: HeadCodes) -> None:
        """Use codes that `make_codes` has made of weights equal to these."""
        self._codes = self._key(), codes
        self._print = self._fingerprint()

    def _key(self) -> tuple[object, ...]:
        return tuple(_identity(tensor) for tensor in (self.weight, self.bias, self.moment))

    def same_call(self, **parts: object) -> None:
        """Compare the parts of a call with those of the other ranks, where there are some: here there are none."""

    def refresh(self) -> None:
        """Make the codes anew if the weights are not those that they were made of.

        Changes that torch does not count, through `weight.data` or a NumPy view, show here alone. Cost: one pass over
        the weights.
        """
        self.codes()
        if self._print is not None and not torch.equal(self._print, self._fingerprint()):
            self._codes = None
            self.codes()

    def _fingerprint(self) -> Tensor:
        """Return a number for each row, by a direction that no weight was made for, and the biases."""
        source = torch.Generator().manual_seed(0)
        own = HireHead.logits(self, torch.randn(1, self.in_features, generator=source))[0]  # of the rows that lie here
        return own if self.bias is None else torch.cat((own, self.bias.detach().float()))

    def __getstate__(self) -> dict[str, object]:
        """Leave the codes out of copies and pickles: they follow from the weights."""
        return {**cast("dict[str, object]", self.__dict__), "_codes": None, "_print": None}

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *rest: Any) -> None:
        """Take a dense head's weights, too: then the moment stays as it is."""
        if self.moment is not None and f"{prefix}weight" in state_dict:
            state_dict.setdefault(f"{prefix}moment", self.moment)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def report(self, tied: bool | None = None) -> HeadReport:
        """Say what the head takes, see `HeadReport`; `nogemm.head_report` knows whether the weights are shared."""
        rows, width = self.weight.shape  # of the rows that lie here
        parts = (self.weight, self.bias)
        return HeadReport(
            mode=self.config.mode,
            rows=rows,
            width=width,
            weight_bytes=sum(_bytes(part) for part in parts),
            tied=tied,
            codes_bytes=codes_bytes(rows, width, self.config.leading, self.config.sketch),
            moment_bytes=_bytes(self.moment),
            search_rows=0 if self.config.mode == "exact" else self.config.rows_of(rows),
        )

    def extra_repr(self) -> str:
        """Describe the head in print(model)."""
        found = HireHead.report(self)  # of the rows that lie here, in a shard, too
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, mode={self.config.mode!r}, "
            f"codes={size(found.codes_bytes)}, fitted={self.moment is not None}"
        )


def output_embeddings(model: nn.Module) -> Any:
    """Return a transformers model's head, of whatever class, or None."""
    getter = getattr(model, "get_output_embeddings", None)
    return getter() if callable(getter) else None


def head_of(model: nn.Module) -> HireHead | None:
    """Return the converted head of a transformers model, or None."""
    found = output_embeddings(model)
    return found if isinstance(found, HireHead) else None


def _bytes(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.numel() * tensor.element_size()


def _identity(tensor: Tensor | None) -> object:
    """Tell a tensor's numbers apart from what they were: the memory they lie in, and torch's count of changes to it."""
    if tensor is None:
        return None
    count = None if tensor.is_inference() else tensor._version
    return tensor.data_ptr(), count, tuple(tensor.shape), tensor.dtype
