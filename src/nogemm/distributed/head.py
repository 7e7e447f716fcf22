"""A vocabulary head whose rows lie on several ranks.

Every rank runs the rest of the model on the same tokens and holds a part of the head's rows. It proves the largest
logit of its part, or searches for it; one pair (logit, row) of each rank then names the largest of all. It is proven
where every rank has proven its own.

Legend: N states, D width, V vocabulary, P ranks, K tokens, W places of a list.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nogemm.config import check_int
from nogemm.distributed.agreement import NOT_FINITE, agree, check_marks, check_noise, direction, marks
from nogemm.distributed.deal import deal
from nogemm.distributed.exchange import Exchange, join
from nogemm.distributed.merge import best, from_words, to_words
from nogemm.distributed.report import ShardReport, Traffic, report_of
from nogemm.errors import ConfigError, NotFiniteError, ShapeError
from nogemm.heads import Choice, HireHead, head_of
from nogemm.heads.layer import EXACT_ONE_IN
from nogemm.models.inner import inner_model
from nogemm.ops import head_argmax, head_logits, head_search
from nogemm.ops.sketch_and_select import top_indices
from nogemm.ops.topk_recall import expected_recall, kept_for_recall


@dataclass(frozen=True)
class TopTokens:
    """The most likely tokens of some states, in falling order, ties to the lowest token.

    Attributes:
        token: int64 [N, K].
        logit: float32 [N, K].
    """

    token: Tensor
    logit: Tensor


class ShardedHead(HireHead):
    """The rows of a vocabulary head that lie on this rank; made by `shard_head`.

        choose   max over ranks of (max over the rank's rows of x . w + b)
        search   the same over the rows that each rank's codes rank first, its share of `config.rows`
        top_k    the K largest of P lists of `kept` logits, one list of each rank

    Every method is called by all ranks, with the same states and noise: a difference is an error. Whatever asks for all
    logits (`logits`, or calling the head) gets them by a gather of them all, which is what `choose` and `top_k` spare.

    Source: HiRE (2024), DA-TOP-k; the exact merge and the checks are ours.
    """

    token: Tensor
    direction: Tensor

    def __init__(self, head: HireHead, exchange: Exchange, seed: int | None) -> None:
        rows = deal(head.out_features, exchange.ranks, seed, "rows of the head")
        own = rows[exchange.rank].to(head.weight.device)

        def mine(whole: Tensor) -> nn.Parameter:
            flat = whole.detach()
            part = flat[int(own[0]) : int(own[-1]) + 1] if seed is None else flat[own]  # contiguous: a view
            return nn.Parameter(part, requires_grad=False)

        super().__init__(head.config, mine(head.weight), None if head.bias is None else mine(head.bias), head.moment)
        self.exchange, self.traffic = exchange, Traffic()
        self.sizes = tuple(map(len, rows))
        self._recall = 1.0
        self.register_buffer("token", own, persistent=False)
        self.register_buffer("order", torch.cat(rows).to(own.device), persistent=False)
        self.register_buffer("direction", direction(self.in_features).to(own.device), persistent=False)
        self.train(head.training)

    @property
    def out_features(self) -> int:
        """V, of all ranks together."""
        return sum(self.sizes)

    def forward(self, x: Tensor) -> Tensor:
        """Return all logits [..., V] in x's dtype, gathered from all ranks; without gradients."""
        if torch.is_grad_enabled() and x.requires_grad:
            raise ConfigError("a sharded head has no gradient; call it under torch.no_grad()")
        flat = self._flat(x)
        return self._gathered(flat, F.linear(flat, self.weight, self.bias)).view(*x.shape[:-1], -1)

    def logits(self, x: Tensor) -> Tensor:
        """Return all logits [N, V] of states [N, D], accumulated in float32, gathered from all ranks."""
        return self._gathered(self._flat(x), super().logits(x))

    def estimate(self, x: Tensor, rows: int | None = None) -> Tensor:
        """Return all logits [N, V] as `HireHead.estimate` does, gathered; each rank computes its share of `rows`."""
        if self.weight.device.type != "cpu":  # codes are read by CPU kernels
            return self.logits(x)
        rows = max(self.searched_rows, self.out_features // EXACT_ONE_IN) if rows is None else rows
        return self._gathered(self._flat(x), super().estimate(self._flat(x), self._share(rows)))

    def choose(self, x: Tensor, noise: Tensor | None = None) -> Choice:
        """Find the largest logit of each state, on all ranks; ties to the lowest token.

        Args:
            x: [..., D], the same on all ranks.
            noise: float32 [N, V], added to the logits; the same on all ranks.
        Returns:
            the same on all ranks; `rows` counts those that all ranks computed exactly.
        Raises:
            NotFiniteError: on all ranks, if a state is not finite; the message names its place.
            ConfigError: the ranks got different states or noise. DistributedError: see `Exchange.total`.
        Cost: `head_argmax` of V / P rows, and one exchange of 16 bytes a state, 20 with noise.
        """
        x_ND = self._flat(x)
        return self._first_of_all(x_ND, noise, *shard_argmax(x_ND, self, self._own(noise)))

    def search(self, x: Tensor, noise: Tensor | None = None) -> Choice:
        """Find what is most likely the largest logit of each state: as `choose`, by a search on every rank.

        Cost: `head_search` of V / P rows, and one exchange of 16 bytes a state, 20 with noise.
        """
        x_ND = self._flat(x)
        found = shard_argmax(x_ND, self, self._own(noise), self._share(self.searched_rows))
        return self._first_of_all(x_ND, noise, *found)

    def same_call(self, **parts: object) -> None:
        """Raise ConfigError on every rank where a part of a call, such as its prompt or its seed, is not rank 0's."""
        agree(self.exchange, self.weight.device, parts)

    def _share(self, rows: int) -> int:
        """Return how many of so many rows of the whole head a search computes here, the same on all ranks."""
        return -(-rows // self.exchange.ranks)

    def _own(self, noise_NV: Tensor | None) -> Tensor | None:
        return None if noise_NV is None else noise_NV[:, self.token]

    def _first_of_all(
        self, x_ND: Tensor, noise_NV: Tensor | None, index_N: Tensor, logit_N: Tensor, rows_N: Tensor
    ) -> Choice:
        """Exchange what each rank found among its rows, and name the largest; ties to the lowest token.

        In NumPy: this runs behind a scan that has emptied the caches, where each of torch's small operations costs some
        15 us, and forty of them cost as much as the half of a small head that two ranks save each other.
        """
        words_NW = np.empty((len(x_ND), 4 if noise_NV is None else 5), np.int32)
        words_NW[:, 0] = _bits(marks(x_ND, self.direction))
        words_NW[:, 1] = _bits(logit_N)
        words_NW[:, 2] = np.where(index_N.cpu().numpy() < 0, -1, self.token[index_N].cpu().numpy())
        words_NW[:, 3] = rows_N.cpu().numpy()
        if noise_NV is not None:
            words_NW[:, 4] = _bits(noise_NV[:, -1].float())
        words_PNW = self._exchanged(torch.from_numpy(words_NW).to(x_ND.device)).cpu().numpy()
        marks_PN, logits_PN = words_PNW[..., 0].view(np.float32), words_PNW[..., 1].view(np.float32)
        numbers_PN = words_PNW[..., 2]
        self._check(torch.from_numpy(marks_PN), np.any(numbers_PN < 0, axis=0))
        if noise_NV is not None:
            check_noise(torch.from_numpy(words_PNW[..., 4]))
        top_N = logits_PN.max(0)
        token_N = np.where(logits_PN < top_N, np.iinfo(np.int32).max, numbers_PN).min(0).astype(np.int64)
        found = (torch.from_numpy(each).to(x_ND.device) for each in (token_N, top_N, words_PNW[..., 3].sum(0)))
        return Choice(*found)

    def top_k(self, x: Tensor, k: int, *, kept: int | None = None, recall: float | None = None) -> TopTokens:
        """Find the k largest logits of each state from a short list of each rank.

        Args:
            x: [..., D], the same on all ranks.
            k: from 1 to V.
            kept: length of a rank's list; None: k, with which the answer is exact. ceil(k / P) is the share of
                DA-TOP-k: winners are lost where more than that lie on one rank, see `report().expected_recall`.
            recall: the expected share of the true k that is to be found, instead of `kept`.
        Returns:
            the same on all ranks.
        Raises:
            ConfigError: k, kept or recall out of range, lists too short for k tokens, or states that differ.
            NotFiniteError: on all ranks, if a state is not finite; the message names its place.
            DistributedError: see `Exchange.total`.
        Cost: all V / P rows of this rank, and one exchange of 8 min(kept, ceil(V / P)) + 4 bytes a state.
        """
        kept = self._list_length(k, kept, recall)
        x_ND = self._flat(x)
        logits_NV = super().logits(x_ND)
        index_NW = top_indices(logits_NV, kept).long()
        words = to_words(
            marks(x_ND, self.direction), logits_NV.gather(1, index_NW), self.token[index_NW], min(kept, self.sizes[0])
        )
        marks_PN, values_NW, numbers_NW = from_words(self._exchanged(words))
        self._check(marks_PN, values_NW.isnan().any(1).cpu().numpy())
        logit_NK, token_NK = best(values_NW, numbers_NW, k)
        return TopTokens(token_NK.long(), logit_NK)

    def report(self) -> ShardReport:
        """Return what was exchanged since the head was made, and the recall that is expected of the last `top_k`."""
        return report_of(self.traffic, self.exchange.transport, self.sizes, self._recall)

    def _list_length(self, k: int, kept: int | None, recall: float | None) -> int:
        check_int("top_k", "k", k, 1)
        if k > self.out_features:
            raise ConfigError(f"top_k: k={k} is more than the {self.out_features} rows of the head")
        if kept is not None and recall is not None:
            raise ConfigError(f"top_k: give kept or recall, not both; got kept={kept} and recall={recall}")
        if recall is not None:
            kept = max(1, kept_for_recall(self.out_features, k, self.sizes, recall))
        kept = k if kept is None else kept
        check_int("top_k", "kept", kept, 1)
        found = sum(min(kept, size) for size in self.sizes)
        if found < k:
            raise ConfigError(
                f"top_k: {kept} tokens of each of {len(self.sizes)} ranks are {found}, fewer than k={k}; "
                f"keep at least {-(-k // len(self.sizes))}"
            )
        self._recall = expected_recall(self.out_features, k, self.sizes, kept)
        return kept

    def _flat(self, x: Tensor) -> Tensor:
        if x.shape[-1] != self.in_features:
            raise ShapeError(f"ShardedHead: the head takes width {self.in_features}, x has shape {tuple(x.shape)}")
        return x.detach().reshape(-1, self.in_features)

    def _exchanged(self, words: Tensor) -> Tensor:
        self.traffic.naive_bytes += 4 * len(words) * self.sizes[self.exchange.rank]
        return self.exchange.gather(words, self.traffic)

    def _check(self, marks_PN: Tensor, nan_N: np.ndarray) -> None:
        check_marks(marks_PN)
        broken_N = nan_N | (marks_PN[0].cpu().numpy() == NOT_FINITE)
        if broken_N.any():
            place = int(broken_N.argmax())
            raise NotFiniteError(f"the state at position {place} is not finite: it has no most likely token")

    def _gathered(self, x_ND: Tensor, logits_NV: Tensor) -> Tensor:
        """Return the logits of all ranks in the order of tokens; a number made from each state travels with them."""
        padded = F.pad(logits_NV.detach(), (0, self.sizes[0] - logits_NV.shape[1]))
        marks_N1 = marks(x_ND, self.direction).to(padded.dtype).unsqueeze(1)
        parts_PNV = self.exchange.gather(torch.cat((padded, marks_N1), 1), self.traffic)
        self.traffic.naive_bytes += padded.numel() * padded.element_size()
        check_marks(parts_PNV[..., -1].float())
        side_by_side = torch.cat([part[:, :size] for part, size in zip(parts_PNV, self.sizes, strict=True)], 1)
        order = self.get_buffer("order")
        return torch.empty_like(side_by_side).index_copy_(1, order, side_by_side)

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """Refuse to save a part of a head as if it were the head."""
        raise ConfigError("a sharded head holds a part of its rows and is not saved; save the model before shard_head")

    def extra_repr(self) -> str:
        """Describe the head in print(model)."""
        return f"{super().extra_repr()}, rank {self.exchange.rank} of {self.exchange.ranks}"


def _bits(x_N: Tensor) -> np.ndarray:
    """Return the bits of float32 numbers, int32 [N]."""
    return x_N.cpu().numpy().view(np.int32)


def shard_argmax(
    x_ND: Tensor, head: HireHead, noise_NV: Tensor | None = None, rows: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Find the largest logit among the rows that lie here: index, logit and rows computed, as `head_argmax` does.

    On a CPU by proof, or by a search that computes `rows`; codes are read by CPU kernels, so elsewhere by all logits.
    """
    with torch.no_grad():
        weight_VD = head.weight.detach()
        bias_V = None if head.bias is None else head.bias.detach().float()
        if weight_VD.device.type != "cpu":
            return argmax_of_all(x_ND, weight_VD, bias_V, noise_NV)
        if rows is None:
            return head_argmax(x_ND, weight_VD, bias_V, head.codes(), noise_NV=noise_NV)
        index_N, logit_N, _ = head_search(x_ND, weight_VD, bias_V, head.codes(), rows, noise_NV=noise_NV)
        return index_N, logit_N, torch.full_like(index_N, min(rows, len(weight_VD)))


def argmax_of_all(
    x_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, noise_NV: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Answer as `head_argmax` does, from all logits."""
    logits_NV = head_logits(x_ND, weight_VD, bias_V)
    logits_NV = logits_NV if noise_NV is None else logits_NV + noise_NV
    value_N = logits_NV.amax(1)
    index_N = (logits_NV == value_N.unsqueeze(1)).int().argmax(1)  # the lowest
    good_N = x_ND.isfinite().all(1) & ~value_N.isnan()
    rows_N = torch.full_like(index_N, len(weight_VD))
    return (
        torch.where(good_N, index_N, -1),
        torch.where(good_N, value_N, torch.nan),
        torch.where(good_N, rows_N, 0),
    )


def shard_head(target: nn.Module, exchange: Exchange | None = None, *, seed: int | None = 0) -> ShardedHead:
    """Keep this rank's rows of a converted head; every rank calls it, with the same head.

    Args:
        target: a `HireHead`, which is left as it is, or a language model whose head `nogemm.convert_head` has
            converted: its head is replaced in place, and `nogemm.generate` then runs on all ranks.
        exchange: of `join`; None: join all ranks.
        seed: rows are dealt to the ranks at random, the same way everywhere, and copied; the model's own rows can then
            be let go of where the embedding does not need them. None: contiguous shards, views of the head's own
            memory; `top_k` with short lists then finds less than the formula says, because frequent tokens stand
            together in most vocabularies.
    Returns:
        the sharded head.
    Raises:
        ConfigError: no converted head, a head that is sharded already or of a mode that cannot be, fewer rows than
            ranks; or the ranks' weights, biases, codes' settings or arguments differ: then on every rank.
        DistributedError: a rank ended or did not come.
    Cost: one pass over the head for the checksum, and the copy of V / P rows. Codes are made at the first use, of the
        rank's own rows.
    """
    head = target if isinstance(target, HireHead) else head_of(inner_model(target))
    if head is None:
        raise ConfigError("shard_head: there is no converted head; call nogemm.convert_head(model) first")
    if isinstance(head, ShardedHead):
        raise ConfigError("shard_head: the head is sharded already")
    if head.config.approximate:
        raise ConfigError(
            f'shard_head: only heads of mode "exact" or "deferred" are sharded, got mode={head.config.mode!r}'
        )
    exchange = join() if exchange is None else exchange
    parts = {
        "shard_head's settings": (head.config, seed, tuple(head.weight.shape), head.weight.dtype, head.bias is None),
        "the head's weights": head.weight,
        "the head's biases": head.bias,
        "the second moment of the states": head.moment,
    }
    agree(exchange, head.weight.device, parts)
    sharded = ShardedHead(head, exchange, seed)
    if target is not head:
        inner = inner_model(target)
        inner.set_output_embeddings(sharded)  # type: ignore[operator]
    return sharded
