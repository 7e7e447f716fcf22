"""SLIDE and MONGOOSE packed for evaluation: hash, unite, compute the retrieved neurons.

Legend: N tokens, D width, F neurons, T tables.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from nogemm.hardware.speeds import speeds
from nogemm.layers._base import PackedFFN, Route, packed_of
from nogemm.layers.hashed.layer import HashedNeurons, hash_extended, union_of_chunks, with_best
from nogemm.layers.hire.sketch import lists_of
from nogemm.layers.neurons.store import NeuronStore
from nogemm.ops import bucket_union


@packed_of(HashedNeurons)
class PackedHashedNeurons(PackedFFN):
    """The evaluation twin of a SLIDE or MONGOOSE layer; neurons keep the buckets that they have when it is packed.

    Rows are stored as fp32, bf16, or int8 with a scale per row, see `NeuronStore`.
    """

    def __init__(self, layer: HashedNeurons, dtype: str) -> None:
        super().__init__(layer, dtype)
        self.bits, self.chunk, self.fallback = layer.bits, layer.chunk, layer.falls_back
        self.norm = None
        if layer.norm is not None:
            self.norm = nn.LayerNorm(layer.d_model, eps=layer.norm.eps)
            self.norm.load_state_dict(layer.norm.state_dict())
            self.norm.requires_grad_(False)
        self.projection = None
        if layer.projection is None:
            self.register_buffer("planes", layer.planes.detach().float().clone(), persistent=False)
        else:
            self.projection = copy.deepcopy(layer.projection).float().requires_grad_(False)
        self.register_buffer(
            "codes", layer.neuron_codes().T.clone(memory_format=torch.contiguous_format), persistent=False
        )
        self.register_buffer("bias", layer.neurons.down.bias.detach().float().clone(), persistent=False)
        self.neurons = NeuronStore([layer.neurons], dtype)
        self.native = self.neurons.native

    def fix_path(self, path: str) -> None:
        super().fix_path(path)
        if path == "auto":
            speeds()  # measured now, if it never was, and not within somebody's first call

    def routes(self, x_ND: Tensor) -> Route:
        x = x_ND.float()
        return Route(lists_of(self._retrieved(x if self.norm is None else self.norm(x))), None)

    def tokens(self, x_ND: Tensor) -> Tensor:
        x = x_ND.float()
        v_ND = x if self.norm is None else self.norm(x)
        y_ND = self.neurons(v_ND, self._retrieved(v_ND), self.path) + self.get_buffer("bias")
        return y_ND.to(x_ND.dtype)

    def _retrieved(self, v_ND: Tensor) -> Tensor:
        hashing = self.get_buffer("planes") if self.projection is None else self.projection
        codes_NT = hash_extended(v_ND, None, hashing, self.bits)
        mask_NF = union_of_chunks(bucket_union(codes_NT, self.get_buffer("codes")), v_ND, self.chunk)
        if self.fallback:
            mask_NF = with_best(mask_NF, v_ND, self.chunk, self.neurons.selector)
        return mask_NF
