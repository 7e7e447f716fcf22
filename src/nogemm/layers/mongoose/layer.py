"""MONGOOSE: SLIDE with hashes that are learned, and tables that are rebuilt only when the hashes have moved.

Legend: N tokens, D width, F neurons, T tables, K bits per table, M = T K.
Reading order: `MongooseConfig`, `MongooseFFN.tokens`, `triplet_loss`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nogemm.config import layer_of
from nogemm.errors import ConfigError
from nogemm.layers._auxiliary import PUBLISHED_DROPOUT, attach_loss
from nogemm.layers.dense.layer import DenseFFN, weights_of
from nogemm.layers.hashed.layer import HashedNeurons, extended_product
from nogemm.layers.mongoose.config import MongooseConfig
from nogemm.layers.slide.layer import draw_planes
from nogemm.ops import bucket_union
from nogemm.shape import FFNShape

TOP, MIDDLE = 0.999, 0.5  # neurons above the first share of all should be found, those below the second should not


@layer_of(MongooseConfig)
class MongooseFFN(HashedNeurons):
    """A dense layer of which each token computes the neurons in its buckets of T learned hash tables.

    The planes P are trained by a triplet loss: for each token, neurons that the tables missed although their product
    exceeds the int(0.999 F)-th smallest should come closer in the hashed space [v; 1] P, those that were retrieved
    although it is below the int(0.5 F)-th should move away; margin 1 in cosine. Both bars are means over the tokens
    of a call (`faithful`: of a chunk). Weights and tokens get no gradient from it. It joins every gradient with
    `triplet_weight`, so that no trainer has to know of it. A chunk that retrieves nothing computes its tokens' best
    neurons.

    The tables are part of the state (`codes` [F, T]). While training they are compared with the neurons' present hashes
    and rebuilt when `rebuild` of the bits differ; `rebuilds` counts. After weights were changed by hand, call
    `build_tables`.

    Source: MONGOOSE (Chen et al., 2021) as the baseline of LookupFFN (Zeng et al., 2023). Differs, unless `faithful`,
    in pairs that share their token, where the published code pairs positions of two lists, in the scheduler, which
    the published code has and never reaches, and in no second dropout.
    """

    falls_back = True

    def __init__(self, config: MongooseConfig, shape: FFNShape) -> None:
        super().__init__(config, shape)
        self.config: MongooseConfig = config
        if self.projection is None:
            self.planes = nn.Parameter(draw_planes(self.d_model, config.bits * config.tables, config.faithful))
        elif not list(self.projection.parameters()):
            raise ConfigError(
                f"MongooseConfig: projection={config.projection} has nothing to train; choose learnable=True, or SLIDE"
            )
        self.register_buffer("codes", torch.zeros(self.hidden, config.tables, dtype=torch.int32))
        self.rebuilds = 0
        self.build_tables()

    def before_packing(self) -> None:
        if self.config.faithful:  # what the next forward pass would do first
            self.build_tables()

    def build_tables(self) -> None:
        """Put every neuron into the buckets of its present hashes."""
        self.get_buffer("codes").copy_(self.hash_neurons())
        self.rebuilds += 1

    def neuron_codes(self) -> Tensor:
        return self.get_buffer("codes")

    def rebuild_if_moved(self) -> None:
        """Rebuild the tables if more than `rebuild` of the hash bits have changed; every time, where it is 0."""
        if self.config.faithful or self.config.rebuild == 0 or self.changed() > self.config.rebuild:
            self.build_tables()

    def changed(self) -> float:
        """Return the share of hash bits in which the neurons differ from the tables."""
        different_FT = self.hash_neurons() ^ self.neuron_codes()
        bits = sum(int(((different_FT >> k) & 1).sum()) for k in range(self.bits))
        return bits / (self.hidden * self.tables * self.bits)

    def tokens(self, x_ND: Tensor) -> Tensor:
        v_ND = x_ND if self.norm is None else self.norm(x_ND)
        learning = torch.is_grad_enabled() and any(p.requires_grad for p in self._hash_parameters())
        if learning or self.config.faithful:
            self.rebuild_if_moved()
        y_ND = self.masked(v_ND, self.retrieved(v_ND))
        if learning and self.config.triplet_weight > 0 and v_ND.shape[0]:
            y_ND = attach_loss(y_ND, self.config.triplet_weight * self.triplet_loss(v_ND))
        return F.dropout(y_ND, PUBLISHED_DROPOUT, self.training) if self.config.faithful else y_ND

    def triplet_loss(self, v_ND: Tensor) -> Tensor:
        """Return mean max(0, cos(token, negative) - cos(token, positive) + 1) over pairs, 0 without pairs.

        `faithful`: the mean over chunks of that, bars and pairs of each chunk by itself.
        """
        if self.config.faithful:
            losses = [_paired_at_random(*self._near_and_far(part_mD)) for part_mD in v_ND.split(self.chunk)]
            return torch.stack(losses).mean()
        cosine_NF, positive_NF, negative_NF = self._pairs(v_ND)
        wanted_N, unwanted_N = positive_NF.sum(1), negative_NF.sum(1)
        both_N = (wanted_N > 0) & (unwanted_N > 0)
        near_N = (cosine_NF * positive_NF).sum(1) / wanted_N.clamp_min(1)
        far_N = (cosine_NF * negative_NF).sum(1) / unwanted_N.clamp_min(1)
        loss_N = (far_N - near_N + 1.0).clamp_min(0.0) * both_N
        return loss_N.sum() / both_N.sum().clamp_min(1)

    def _pairs(self, v_ND: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return cosines in the hashed space, and which neurons each token should have found or not, all [N, F]."""
        linear = self.neurons.up if self.neurons.gate is None else self.neurons.gate
        v_ND, (weight_FD, bias_F) = v_ND.detach(), (part.detach() for part in weights_of(linear))
        product_NF = v_ND @ weight_FD.T
        found_NF = bucket_union(self.hashed(v_ND), self.neuron_codes().T)  # of each token's own hashes
        ordered_NF = product_NF.sort(1).values
        high, low = (ordered_NF[:, max(int(share * self.hidden), 1) - 1].mean() for share in (TOP, MIDDLE))
        tokens_NM = extended_product(v_ND, None, self.hashing)
        neurons_FM = extended_product(weight_FD, bias_F, self.hashing)
        cosine_NF = F.normalize(tokens_NM, dim=1) @ F.normalize(neurons_FM, dim=1).T
        return cosine_NF, (product_NF > high.clamp_min(0.0)) & ~found_NF, (product_NF < low) & found_NF

    def _near_and_far(self, v_ND: Tensor) -> tuple[Tensor, Tensor]:
        """List the cosines that should be larger, and those that should be smaller."""
        cosine_NF, positive_NF, negative_NF = self._pairs(v_ND)
        return cosine_NF[positive_NF], cosine_NF[negative_NF]

    def projection_parameters(self) -> list[nn.Parameter]:
        """Return the planes, or the projection's weights, an optimiser group of their own."""
        return [self.get_parameter("planes")] if self.projection is None else self.projection.weights()

    def _hash_parameters(self) -> list[nn.Parameter]:
        return [self.get_parameter("planes")] if self.projection is None else list(self.projection.parameters())

    def fit_dense(self, dense: DenseFFN) -> str:
        """Take the dense layer's neurons and rebuild the tables: exact up to those that the hashes miss."""
        if self.neurons.fit_dense(dense) == "exact" and self.norm is None:
            self.fitted = "closed-form"
        self.build_tables()
        return self.fitted

    def fit_activations(self, dense: DenseFFN, x_ND: Tensor) -> str:
        """Take the dense layer's neurons; the hashes are learned in training."""
        return self.fit_dense(dense)


def _paired_at_random(near: Tensor, far: Tensor) -> Tensor:
    """Pair two lists by position after dropping the longer one's surplus at random, whatever tokens they belong to."""
    count = min(len(near), len(far))
    if count == 0:
        return near.sum() * 0.0
    near = near[torch.randperm(len(near))[:count]] if len(near) > count else near
    far = far[torch.randperm(len(far))[:count]] if len(far) > count else far
    return (far - near + 1.0).clamp_min(0.0).mean()
