"""Which neurons share a bucket with a token in at least one hash table.

Legend: N tokens, T tables, F neurons.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nogemm.errors import ShapeError
from nogemm.ops._library import define


def bucket_union_reference(codes_NT: Tensor, neurons_TF: Tensor) -> Tensor:
    """Compare table by table; see `bucket_union`."""
    mask_NF = torch.zeros(codes_NT.shape[0], neurons_TF.shape[1], dtype=torch.bool, device=codes_NT.device)
    for mine_N, theirs_F in zip(codes_NT.T, neurons_TF, strict=True):
        mask_NF |= mine_N.unsqueeze(1) == theirs_F
    return mask_NF


def bucket_union(codes_NT: Tensor, neurons_TF: Tensor) -> Tensor:
    """Mark the neurons that a token's hashes retrieve.

        mask[n, f] = codes[n, t] = neurons[t, f] for at least one t

    Source: the retrieval of SLIDE (Chen et al., 2020).

    Args:
        codes_NT, neurons_TF: int32, buckets of tokens and of neurons; a negative code of a token retrieves nothing if
            no neuron has it.
    Returns:
        bool [N, F].
    Raises:
        ShapeError: the numbers of tables disagree.
    Cost: N T F comparisons of integers. No gradient: a bucket is discrete.
    Example:
        >>> codes = torch.tensor([[0, 2]], dtype=torch.int32)
        >>> bucket_union(codes, torch.tensor([[0, 1, 1], [1, 2, 3]], dtype=torch.int32))
        tensor([[ True,  True, False]])
    """
    if codes_NT.dim() != 2 or neurons_TF.dim() != 2 or codes_NT.shape[1] != neurons_TF.shape[0]:
        raise ShapeError(
            f"bucket_union: expected codes [N, T] and neurons [T, F], got codes {tuple(codes_NT.shape)} and neurons "
            f"{tuple(neurons_TF.shape)}"
        )
    return torch.ops.nogemm.bucket_union(codes_NT, neurons_TF)


define(
    "bucket_union(Tensor codes, Tensor neurons) -> Tensor",
    bucket_union_reference,
    lambda codes, neurons: codes.new_empty((codes.shape[0], neurons.shape[1]), dtype=torch.bool),
)
