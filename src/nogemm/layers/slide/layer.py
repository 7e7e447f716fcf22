"""SLIDE: random hash tables over the neurons; a token computes the neurons that it collides with.

Legend: N tokens, D width, F neurons, T tables, K bits per table.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nogemm.config import layer_of
from nogemm.layers._auxiliary import PUBLISHED_DROPOUT
from nogemm.layers.dense.layer import DenseFFN
from nogemm.layers.hashed.layer import HashedNeurons
from nogemm.layers.slide.config import SlideConfig
from nogemm.shape import FFNShape

# Of the published code: every layer draws the same signs from this seed.
PUBLISHED_SEED = 8191


@layer_of(SlideConfig)
class SlideFFN(HashedNeurons):
    """A dense layer of which each token computes the neurons in its buckets of T random hash tables.

    Angular hashing: signs of [v; 1] P with P of random signs, the neurons hashed as [w_i; b_i] (gates, in a gated
    layer); or, with `projection`, signs of a projection as it was drawn. Neurons are hashed anew in every call, so the
    tables always fit the weights; P is part of the state. Packed, tables are fixed and only retrieved rows are read.

    Wins where a few neurons carry the output and hashes find them: rarely. Loses because angular hashing finds large
    products slowly, buckets are skewed, and a chunk of tokens soon retrieves most neurons: look at `active`.

    Source: SLIDE (Chen et al., 2020) as the baseline of LookupFFN (Zeng et al., 2023). Differs, unless `faithful`, in
    signs of its own for each layer, and no second dropout. Neither stops at an empty set: its answer is the bias.
    """

    def __init__(self, config: SlideConfig, shape: FFNShape) -> None:
        super().__init__(config, shape)
        self.config: SlideConfig = config
        if self.projection is None:
            self.register_buffer("planes", draw_planes(self.d_model, config.bits * config.tables, config.faithful))
        else:
            self.projection.freeze()

    def neuron_codes(self) -> Tensor:
        return self.hash_neurons()

    def tokens(self, x_ND: Tensor) -> Tensor:
        v_ND = x_ND if self.norm is None else self.norm(x_ND)
        y_ND = self.masked(v_ND, self.retrieved(v_ND))
        return F.dropout(y_ND, PUBLISHED_DROPOUT, self.training) if self.config.faithful else y_ND

    def fit_dense(self, dense: DenseFFN) -> str:
        """Take the dense layer's neurons: exact up to those that the hashes miss."""
        if self.neurons.fit_dense(dense) == "exact" and self.norm is None:
            self.fitted = "closed-form"
        return self.fitted

    def fit_activations(self, dense: DenseFFN, x_ND: Tensor) -> str:
        """Take the dense layer's neurons; there is nothing to fit to data."""
        return self.fit_dense(dense)


def draw_planes(d_model: int, count: int, published: bool) -> Tensor:
    """Draw a [D + 1, count] matrix of random signs."""
    if published:
        signs = np.random.RandomState(PUBLISHED_SEED).randint(0, 2, (d_model + 1, count))
        return torch.from_numpy(signs).float() * 2 - 1
    return torch.randint(0, 2, (d_model + 1, count)).float() * 2 - 1
