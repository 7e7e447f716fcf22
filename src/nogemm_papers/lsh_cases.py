"""The layers and tokens that `nogemm bench lsh` searches: an FFN of a real model on real texts, and a Gaussian one.

Legend: N tokens, D width, F neurons, X strongest neurons.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from nogemm.convert.activations import collect_inputs
from nogemm.convert.sites import sites
from nogemm.errors import ConfigError
from nogemm.layers.dense.layer import DenseFFN
from nogemm.models.loading import load_encoder, load_tokenizer
from nogemm.train.sources import load_split

_TOKENS_PER_TEXT = 40  # about half of what the sample's documents have, so that enough texts are read


@dataclass(frozen=True)
class Case:
    """A dense layer, tokens to search for, and tokens to learn from.

    Attributes:
        name: shown in tables.
        dense: the layer; the neurons that are searched are those of its gate, if it has one.
        x_ND, training_ND: float32.
    """

    name: str
    dense: DenseFFN
    x_ND: Tensor
    training_ND: Tensor

    @property
    def weight_FD(self) -> Tensor:
        """Rows whose products with a token decide."""
        return (self.dense.up if self.dense.gate is None else self.dense.gate).weight.detach()

    @property
    def bias_F(self) -> Tensor:
        """Their biases."""
        return (self.dense.up if self.dense.gate is None else self.dense.gate).bias.detach()

    @property
    def d(self) -> int:
        """Width of the tokens."""
        return self.weight_FD.shape[1]

    @property
    def hidden(self) -> int:
        """Number of neurons."""
        return self.weight_FD.shape[0]

    def strongest(self, count: int) -> Tensor:
        """Return the neurons of largest pre-activation, strongest first, int64 [N, X]."""
        return F.linear(self.x_ND, self.weight_FD, self.bias_F).topk(count, dim=1).indices


def model_case(path: str, site: int, tokens: int, training_tokens: int, seed: int) -> Case:
    """Take an FFN of a model, with what it gets for the packaged sample's test and training documents.

    Raises:
        ConfigError: the model has no such FFN.
    """
    model, tokenizer = load_encoder(path), load_tokenizer(path)
    known = sites(model)
    if not 0 <= site < len(known):
        raise ConfigError(f"--site {site}: {path} has {len(known)} dense FFNs, numbered from 0")
    chosen = known[site]
    generator = torch.Generator().manual_seed(seed)

    def inputs(split: str, count: int) -> Tensor:
        texts = load_split("sample", split).documents[: -(-count // _TOKENS_PER_TEXT)]
        rows = collect_inputs(model, [chosen], texts, tokenizer)[chosen.name]
        return rows[torch.randperm(len(rows), generator=generator)[:count]].float()

    x_ND, training_ND = inputs("test", tokens), inputs("train", training_tokens)
    return Case(f"{path}, {chosen.name}", chosen.dense().float(), x_ND, training_ND)


def gaussian_case(like: Case, seed: int) -> Case:
    """Draw weights N(0, 1/D) without biases and tokens N(0, 1), in the shape of another case."""
    generator = torch.Generator().manual_seed(seed)
    up = torch.randn(like.hidden, like.d, generator=generator) / like.d**0.5
    down = torch.randn(like.dense.d_out, like.hidden, generator=generator) / like.hidden**0.5
    dense = DenseFFN.from_weights(up, None, down, None, None, None, like.dense.activation)
    x_ND, training_ND = (torch.randn(part.shape, generator=generator) for part in (like.x_ND, like.training_ND))
    return Case("Gaussian", dense, x_ND, training_ND)
