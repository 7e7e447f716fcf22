"""Which neurons of a dense FFN matter to a token, how many tokens share them, and how a ranking finds them.

With the activation act, the output of a plain and of a gated FFN is a sum over neurons,

    y = bias + sum_i h_i down_i        h_i = act(<x, up_i>)   or   act(<x, gate_i>) <x, up_i>

and neuron i's *strength* is |act| of the branch that HireFFN ranks: of the gate, or of the only one.

Legend: N tokens, D width, F neurons, E output width, K candidates, B tokens of one call, W windows of B tokens,
R draws.
Reading order: `Activity`, `strongest`, `energy`, `carriers`, the unions, `recall_curve`, `fewest`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from nogemm.activations import ACTIVATIONS
from nogemm.layers import DenseFFN
from nogemm.ops.sketch_and_select import top_indices

# Draws of B texts, a token of each, over which the union of unrelated tokens is averaged.
DRAWS = 64


@dataclass(frozen=True)
class Activity:
    """What the neurons of one FFN do for N tokens.

    Attributes:
        h_NF: what each neuron multiplies its row of the last matrix with.
        strength_NF: what HireFFN ranks neurons by, never negative.
        down_FE: the rows of the last matrix.
    """

    h_NF: Tensor
    strength_NF: Tensor
    down_FE: Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, dense: DenseFFN, x_ND: Tensor) -> Activity:
        """Compute it from a dense layer's weights."""
        act = ACTIVATIONS[dense.activation]
        down_FE = dense.down.weight.T
        if dense.gate is None:
            h_NF = act(dense.up(x_ND))
            return cls(h_NF, h_NF.abs(), down_FE)
        acted_NF = act(dense.gate(x_ND))
        return cls(acted_NF * dense.up(x_ND), acted_NF.abs(), down_FE)

    @cached_property
    def added_NF(self) -> Tensor:
        """The length of what each neuron adds to the output, |h_i| |down_i|."""
        return self.h_NF.abs() * self.down_FE.norm(dim=1)

    @cached_property
    def output_energy(self) -> float:
        """The sum of |y|^2 over all tokens, biases left out."""
        return float((self.h_NF @ self.down_FE).double().square().sum())

    def zeros(self) -> float:
        """Return the share of h that is exactly 0."""
        return float((self.h_NF == 0).double().mean())


def strongest(keys_NF: Tensor, count: int) -> Tensor:
    """Mark each token's `count` largest keys that are above 0, ties to the lowest index, bool [N, F]."""
    best_NK = top_indices(keys_NF.float(), count).long()
    return torch.zeros(keys_NF.shape, dtype=torch.bool).scatter_(1, best_NK, True) & (keys_NF > 0)


def energy(activity: Activity, mask_NF: Tensor) -> float:
    """Return the share of the output's energy that the marked neurons give, biases left out.

        1 - sum_n |y_n - y'_n|^2 / sum_n |y_n|^2,    y' = the sum over the marked neurons

    It falls below 0 where the marked neurons alone are further from y than nothing at all. 1 for an output of 0.
    """
    lost = (activity.h_NF.masked_fill(mask_NF, 0.0) @ activity.down_FE).double().square().sum()
    return 1.0 - float(lost) / activity.output_energy if activity.output_energy > 0 else 1.0


def carriers(added_NF: Tensor, shares: Sequence[float]) -> Tensor:
    """Count the fewest neurons of each token whose squared lengths make up a share of the sum of all.

        least c with sum over the c largest of |h_i down_i|^2 >= share sum over all of |h_i down_i|^2

    The squared length of the output would be that sum, if no two neurons' rows pointed in similar directions.

    Returns:
        int64 [shares, N]; 0 for a token whose neurons add nothing.
    """
    running_NF = added_NF.double().square().sort(dim=1, descending=True).values.cumsum_(1)
    total_N1 = running_NF[:, -1:]
    adds_N = total_N1.squeeze(1) > 0
    return torch.stack([((running_NF < total_N1 * share).sum(1) + 1) * adds_N for share in shares])


def union_of_neighbours(mask_NF: Tensor, lengths: Sequence[int], batch: int) -> float | None:
    """Count the distinct neurons of `batch` consecutive tokens of one text: the mean over windows that do not overlap.

    Args:
        mask_NF: each token's neurons; tokens in the order of the texts.
        lengths: tokens of each text.
    Returns:
        None where no text is so long.
    """
    total, windows = 0, 0
    for part_LF in mask_NF.split(list(lengths)):
        count = len(part_LF) // batch
        touched_WF = part_LF[: count * batch].view(count, batch, mask_NF.shape[1]).any(1)
        total, windows = total + int(touched_WF.sum()), windows + count
    return total / windows if windows else None


def strangers(lengths: Sequence[int], batch: int, seed: int) -> Tensor | None:
    """Draw `batch` different texts and a token of each, 64 times: places in the row of all texts, int64 [64, B].

    Returns:
        None where there are fewer texts.
    """
    sizes = torch.tensor([length for length in lengths if length > 0])
    if len(sizes) < batch:
        return None
    starts = sizes.cumsum(0) - sizes
    generator = torch.Generator().manual_seed(seed)
    texts_RB = torch.rand(DRAWS, len(sizes), generator=generator).argsort(1)[:, :batch]
    within_RB = (torch.rand(DRAWS, batch, generator=generator) * sizes[texts_RB]).long()
    return starts[texts_RB] + within_RB.clamp_max(sizes[texts_RB] - 1)


def union_of_strangers(mask_NF: Tensor, drawn_RB: Tensor | None) -> float | None:
    """Count the distinct neurons of tokens of different texts, the mean over what `strangers` drew."""
    if drawn_RB is None:
        return None
    touched = sum(int(mask_NF[part_RB].any(1).sum()) for part_RB in drawn_RB.split(16))
    return touched / len(drawn_RB)


def independent_union(per_token: float, neurons: int, batch: int) -> float:
    """Expect the distinct neurons of `batch` tokens that choose theirs independently and uniformly.

    F (1 - (1 - k / F)^B)
    """
    return neurons * (1.0 - (1.0 - per_token / neurons) ** batch)


def ranked(keys_NF: Tensor) -> Tensor:
    """Order each token's neurons by falling keys, ties to the lowest index: int64 [N, F]."""
    return keys_NF.sort(dim=1, descending=True, stable=True).indices


def recall_curve(order_NF: Tensor, needed_NF: Tensor) -> Tensor:
    """Return the mean recall of the first 1, 2, ..., F neurons of a ranking, float64 [F].

    Recall of a token: the share of its needed neurons among them; 1 for a token that needs none.
    """
    hits_NF = needed_NF.gather(1, order_NF)
    count_N1 = hits_NF.sum(1, keepdim=True)
    none = float((count_N1 == 0).double().mean())
    # A mean of running sums is the running sum of means.
    return (hits_NF / count_N1.clamp_min(1).double()).mean(0).cumsum(0) + none


def fewest(curve_F: Tensor, target: float) -> int:
    """Return how many candidates a recall curve needs for a target; all of them reach 1."""
    reached = curve_F >= target - 1e-9  # a mean of equal shares may round below them
    return int(reached.int().argmax()) + 1
