"""Which few columns explain a target best: what a narrow dense layer is cut to.

Legend: F columns, D targets.
"""

from __future__ import annotations

import torch
from torch import Tensor


def forward_selection(gram_FF: Tensor, cross_FD: Tensor, count: int) -> Tensor:
    """Choose `count` columns one by one, each the one that lowers the least-squares error most.

    Args:
        gram_FF: A^T A, positive definite.
        cross_FD: A^T Y.
    Returns:
        sorted indices [count].
    Cost: O(count F (F + D)).
    """
    gram, cross = gram_FF.clone(), cross_FD.clone()
    left = torch.ones(gram.shape[0], dtype=torch.bool)
    for _ in range(count):
        gain = cross.square().sum(1) / gram.diagonal().clamp_min(1e-30)
        best = int(gain.masked_fill(~left, -1.0).argmax())
        left[best] = False
        # Remove from all others what the chosen column already explains (one step of elimination).
        factor_F = gram[:, best] / gram[best, best]
        factor_F[best] = 0.0
        cross -= factor_F.unsqueeze(1) * cross[best]
        gram -= torch.outer(factor_F, gram[best])
    return torch.nonzero(~left).flatten()
