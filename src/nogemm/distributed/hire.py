"""A HireFFN whose neurons lie on several ranks: each chooses among its own, and outputs are added up.

Legend: N tokens, D width, F neurons, E output width, G groups of g neurons, P ranks, K groups that a token keeps,
W places of a list.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn

from nogemm.config import check_choice
from nogemm.distributed.agreement import agree, check_marks, check_mean_marks, direction, marks
from nogemm.distributed.deal import deal
from nogemm.distributed.exchange import Exchange, join
from nogemm.distributed.merge import best, from_words, to_words
from nogemm.distributed.report import ShardReport, Traffic, report_of
from nogemm.errors import ConfigError
from nogemm.layers import FFN, PackedFFN
from nogemm.layers._tokens import flatten_tokens
from nogemm.layers.hire import HireFFN, PackedHire
from nogemm.layers.hire.routing import Choice
from nogemm.models.inner import inner_model
from nogemm.ops import neuron_dot
from nogemm.ops.sketch_and_select import selection_keys
from nogemm.ops.topk_recall import expected_recall, kept_for_recall
from nogemm.shape import FFNShape

ShardMode = Literal["local", "global"]
MODES = ("local", "global")


class ShardedHire(nn.Module):
    """The neurons of a HireFFN that lie on this rank; made by `shard_hire`, for evaluation.

        local    y = bias + sum over ranks of (sum over the rank's own strongest ceil(slack K / P) of act(...) down_i)
        global   y = bias + sum over ranks of (sum over those of the rank's that are among the K strongest of all)

    "local" is DA-TOP-k: nothing but the outputs travels, in the sum that tensor parallelism needs anyway. "global"
    first exchanges the keys of each rank's K strongest, and keeps what one process would keep.

    Attributes:
        shard: this rank's neurons, a `HireFFN` or packed.
        neuron: int64, their numbers in the whole layer.
        mode: "local" or "global".
    """

    neuron: Tensor
    bias: Tensor
    direction: Tensor

    def __init__(self, layer: HireFFN, exchange: Exchange, mode: str, kept: int, seed: int | None) -> None:
        super().__init__()
        groups = deal(-(-layer.hidden // layer.config.group), exchange.ranks, seed, "groups of neurons")
        own_G = groups[exchange.rank]
        self.config, self.d_model, self.d_out, self.mode = layer.config, layer.d_model, layer.d_out, mode
        self.exchange, self.traffic = exchange, Traffic()
        self.kept, self.expected = layer.kept, 1.0
        self.group_sizes = tuple(map(len, groups))
        if mode == "local" and layer.config.select == "topk":
            self.expected = expected_recall(sum(self.group_sizes), layer.kept, self.group_sizes, kept)
        neurons = [_members(part, layer.config.group, layer.hidden) for part in groups]
        self.sizes = tuple(map(len, neurons))
        device = layer.up.device
        mine = neurons[exchange.rank].to(device)
        self.shard: HireFFN | PackedHire = _shard(layer, own_G.to(device), mine, kept)
        for name, buffer in (
            ("neuron", mine),
            ("group", own_G.to(device)),
            ("bias", layer.bias.detach().float()),
            ("direction", direction(layer.d_model).to(device)),
        ):
            self.register_buffer(name, buffer, persistent=False)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., D] to [..., E] in x's dtype; every rank is given the same x and gets the same y.

        A token that is not finite answers NaN, as on one process.

        Raises:
            ConfigError: the ranks got different tokens, or a gradient is wanted.
            DistributedError: see `Exchange.total`.
        Cost: `HireFFN.cost` of this rank's neurons; one exchange of 4 (E + 1) bytes a token, and in mode "global" one
            more of 8 K + 4.
        """
        if torch.is_grad_enabled() and x.requires_grad:
            raise ConfigError("a sharded FFN has no gradient; call it under torch.no_grad()")
        x_ND = flatten_tokens("ShardedHire", self.config, x, self.d_model).detach()
        marks_N = marks(x_ND, self.direction)
        sent = torch.cat((self.partial(x_ND), marks_N.unsqueeze(1)), 1)
        total = self.exchange.total(sent, self.traffic)
        check_mean_marks(total[:, -1] / self.exchange.ranks, marks_N, self.exchange.ranks)
        return (total[:, :-1] + self.bias).to(x.dtype).view(*x.shape[:-1], self.d_out)

    def partial(self, x_ND: Tensor) -> Tensor:
        """Return this rank's summand of y, float32 [N, E], without the bias: for a sum that the caller makes."""
        with torch.no_grad():
            if isinstance(self.shard, PackedHire):
                self._counts_naive(len(x_ND))
                return self.shard(x_ND.float())
            x_ND = x_ND.to(self.shard.compute_dtype())
            index_NK, known_NK = self._answering(x_ND)
            return self.shard.at(x_ND, index_NK, known_NK).float()

    def chosen(self, x: Tensor) -> Tensor:
        """Name this rank's neurons that answer, by their numbers in the whole layer: int64 [N, K], padded with -1."""
        x_ND = flatten_tokens("ShardedHire", self.config, x, self.d_model).detach()
        with torch.no_grad():
            if isinstance(self.shard, PackedHire):
                index_NK = self.shard.route(x_ND).rows
            else:
                index_NK, _ = self._answering(x_ND.to(self.shard.compute_dtype()))
        return torch.where(index_NK < 0, -1, self.neuron[index_NK.long().clamp_min(0)])

    def report(self) -> ShardReport:
        """Return what was exchanged since the layer was made, and the recall of its neurons that is expected."""
        return report_of(self.traffic, self.exchange.transport, self.sizes, self.expected)

    def _answering(self, x_ND: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return this rank's neurons that answer, local numbers [N, K], and their exact selecting products if known."""
        shard = self.shard
        assert isinstance(shard, HireFFN)
        self._counts_naive(len(x_ND))
        choice = shard.choose(x_ND)
        if self.mode == "local" or self.config.select == "active":  # which neurons are active, each rank knows alone
            return choice.kept_NK, choice.known_NK
        keys_NW, numbers_NW = self._keys(shard, x_ND, choice)
        width = min(self.kept, self.group_sizes[0])
        words_PNW = self.exchange.gather(
            to_words(marks(x_ND, self.direction), keys_NW, numbers_NW, width), self.traffic
        )
        marks_PN, keys, numbers = from_words(words_PNW)
        check_marks(marks_PN)
        limits_NK, last_NK = best(keys, numbers, self.kept)
        limit_N1, last_N1 = limits_NK[:, -1:], last_NK[:, -1:]
        wins_NW = (keys_NW > limit_N1) | ((keys_NW == limit_N1) & (numbers_NW <= last_N1))
        wins_NK = wins_NW.repeat_interleave(self.config.group, 1)
        return choice.kept_NK.masked_fill(~wins_NK, -1), choice.known_NK

    def _keys(self, shard: HireFFN, x_ND: Tensor, choice: Choice) -> tuple[Tensor, Tensor]:
        """Return the keys of the groups that this rank would keep, and their numbers in the layer, both [N, W]."""
        known_NK = choice.known_NK
        if known_NK is None:
            known_NK = neuron_dot(x_ND, choice.kept_NK, *shard.selector)
        group = self.config.group
        keys_NW = selection_keys(known_NK.float().masked_fill(choice.kept_NK < 0, 0.0), shard.key, group)
        local_NW = choice.kept_NK[:, ::group].long() // group  # a group's first neuron is always there
        always_NW = torch.isin(local_NW, shard.always)
        return keys_NW.masked_fill(always_NW, torch.inf), self.get_buffer("group")[local_NW].to(torch.int32)

    def _counts_naive(self, tokens: int) -> None:
        self.traffic.naive_bytes += 4 * tokens * self.sizes[self.exchange.rank]

    def train(self, mode: bool = True) -> ShardedHire:
        """Refuse training."""
        if mode:
            raise ConfigError("a sharded FFN is for evaluation only; train the whole layer")
        return super().train(mode)

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """Refuse to save a part of a layer as if it were the layer."""
        raise ConfigError(
            "a sharded FFN holds a part of its neurons and is not saved; save the model before shard_hire"
        )

    def extra_repr(self) -> str:
        """Describe the layer in print(model)."""
        return f"{self.d_model} -> {self.d_out}, mode={self.mode!r}, rank {self.exchange.rank} of {self.exchange.ranks}"


def _members(groups_G: Tensor, group: int, hidden: int) -> Tensor:
    """Spell groups out as neurons; the last group of a layer may be short."""
    members = (groups_G.unsqueeze(1) * group + torch.arange(group, device=groups_G.device)).flatten()
    return members[members < hidden]


def _shard(layer: HireFFN, groups_G: Tensor, neurons: Tensor, kept: int) -> HireFFN:
    """Make the layer of some neurons, which keeps `kept` of their groups; without the output bias."""
    shape = FFNShape(
        d_in=layer.d_model, d_out=layer.d_out, hidden=len(neurons), activation=layer.activation, gated=layer.gated
    )
    with torch.device("meta"):  # weights that are drawn would move each rank's generator by another number of steps
        shard = HireFFN(replace(layer.config, static=0), shape)
    shard = shard.to(layer.up.dtype).to_empty(device=layer.up.device)
    with torch.no_grad():
        for name, parameter in shard.named_parameters():
            whole = layer.get_parameter(name)
            parameter.copy_(torch.zeros_like(whole) if name == "bias" else whole[neurons])
            parameter.requires_grad_(False)
    for name in ("sketch_reduce", "sketch_lift"):
        whole = layer.get_buffer_or_none(name)
        if whole is not None:
            shard.register_buffer(name, whole.detach().clone())
    shard.always = torch.isin(groups_G, layer.always).nonzero().flatten()
    shard.kept = min(len(groups_G), max(kept, shard.always.numel()))
    shard.candidates = min(len(groups_G), math.ceil(layer.config.oversample * shard.kept - 1e-9))
    return shard.eval()


def _kept_here(layer: HireFFN, ranks: int, mode: str, slack: float, recall: float | None) -> int:
    """Count the groups that a rank keeps of its own."""
    if mode == "global":
        return layer.kept
    if recall is not None:
        return max(1, kept_for_recall(-(-layer.hidden // layer.config.group), layer.kept, ranks, recall))
    return max(1, math.ceil(slack * layer.kept / ranks - 1e-9))


@overload
def shard_hire(
    target: HireFFN,
    exchange: Exchange | None = None,
    *,
    mode: ShardMode = "local",
    slack: float = 1.0,
    recall: float | None = None,
    dtype: str | None = None,
    seed: int | None = 0,
) -> ShardedHire: ...
@overload
def shard_hire(
    target: nn.Module,
    exchange: Exchange | None = None,
    *,
    mode: ShardMode = "local",
    slack: float = 1.0,
    recall: float | None = None,
    dtype: str | None = None,
    seed: int | None = 0,
) -> dict[str, ShardedHire]: ...
def shard_hire(
    target: nn.Module,
    exchange: Exchange | None = None,
    *,
    mode: ShardMode = "local",
    slack: float = 1.0,
    recall: float | None = None,
    dtype: str | None = None,
    seed: int | None = 0,
) -> ShardedHire | dict[str, ShardedHire]:
    """Keep this rank's neurons of a HireFFN, or of all those of a model; every rank calls it, with the same weights.

    Args:
        target: a `HireFFN`, which is left as it is, or a converted model, whose HireFFNs are replaced in place.
        exchange: of `join`; None: join all ranks.
        mode: "local": each rank keeps its strongest ceil(slack K / P), of the K that a token keeps. "global": exactly
            the K strongest of all ranks' candidates.
        slack: more than 1 keeps more on each rank, and loses fewer of the K; for mode "local".
        recall: the expected share of the K that is to be found, instead of `slack`.
        dtype: pack the rank's neurons ("fp32", "bf16" or "int8", see `nogemm.pack`); for mode "local".
        seed: neurons (groups of them) are dealt to the ranks at random, the same way everywhere. None: contiguous.
    Returns:
        the sharded layer, or {path in the model: sharded layer}.
    Raises:
        ConfigError: no HireFFN, or packed or sharded ones; an argument out of range or that mode or selection cannot
            have; fewer groups than ranks; or weights or arguments of the ranks differ: then on every rank.
        DistributedError: a rank ended or did not come.
    Cost: one pass over the layers for the checksum, and a copy of the rank's share.
    """
    _check_arguments(mode, slack, recall, dtype)
    exchange = join() if exchange is None else exchange
    layers = _layers(target)
    settings = (mode, slack, recall, dtype, seed)
    for path, layer in layers.items():
        _check_layer(layer, mode)
        name = "the FFN" if layer is target else path
        parts: dict[str, object] = {f"shard_hire's settings for {name}": (layer.config, settings)}
        parts |= {f"{key} of {name}": value for key, value in layer.state_dict().items()}
        agree(exchange, layer.up.device, parts)
    made = {}
    for path, layer in layers.items():
        sharded = ShardedHire(layer, exchange, mode, _kept_here(layer, exchange.ranks, mode, slack, recall), seed)
        if dtype is not None:
            assert isinstance(sharded.shard, HireFFN)
            packed = sharded.shard.pack(dtype)
            assert isinstance(packed, PackedHire)
            sharded.shard = packed
        if layer is target:
            return sharded
        inner_model(target).set_submodule(path, sharded)
        made[path] = sharded
    return made


def _layers(target: nn.Module) -> dict[str, HireFFN]:
    """List the layers that can be sharded, by their paths in the model."""
    if isinstance(target, HireFFN):
        return {"": target}
    modules = dict(inner_model(target).named_modules())
    found = {path: module for path, module in modules.items() if isinstance(module, HireFFN)}
    if any(isinstance(module, ShardedHire) for module in modules.values()):
        raise ConfigError("shard_hire: the FFNs of this model are sharded already")
    if any(isinstance(module, PackedFFN) for module in modules.values()):
        raise ConfigError("shard_hire: the model is packed; shard it first, with dtype= for the packing")
    if not found:
        kinds = sorted({type(module).__name__ for module in modules.values() if isinstance(module, FFN)})
        other = f", only {', '.join(kinds)}" if kinds else ""
        raise ConfigError(f"shard_hire: there is no HireFFN{other}; call nogemm.convert with a HireConfig first")
    return found


def _check_arguments(mode: str, slack: float, recall: float | None, dtype: str | None) -> None:
    check_choice("shard_hire", "mode", mode, MODES)
    if isinstance(slack, bool) or not isinstance(slack, (int, float)) or not 1 <= slack < math.inf:
        raise ConfigError(f"shard_hire: slack must be a number of at least 1, got {slack!r}")
    if recall is not None and slack != 1:
        raise ConfigError(f"shard_hire: give slack or recall, not both; got slack={slack} and recall={recall}")
    if mode == "global" and (slack != 1 or recall is not None or dtype is not None):
        raise ConfigError('shard_hire: slack, recall and dtype are for mode="local"')


def _check_layer(layer: HireFFN, mode: str) -> None:
    if layer.training:
        raise ConfigError("shard_hire: the layer is in training mode; call eval() first")
    if mode == "global" and layer.config.select == "statistical":
        raise ConfigError('shard_hire: mode="global" needs select="topk" or "active", got select="statistical"')
