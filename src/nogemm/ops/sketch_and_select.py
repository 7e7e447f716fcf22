"""Cheap scores for all neurons from a quantised copy of their weights, and the neurons with the largest.

Legend: N tokens, D width, F neurons, G groups of g consecutive neurons, A groups that are always chosen.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nogemm.activations import NUMBERS, activation
from nogemm.errors import ConfigError, ShapeError
from nogemm.ops._library import define, has_native_kernel
from nogemm.ops.topk import group_scores

# How a score becomes the key that is ranked: by the size of an activation, or "signed", by the score itself. That ranks
# activations that are 0 below 0 as their size does, and tells apart the neurons that do not fire.
SIGNED = "signed"
KEYS = {SIGNED: -1, **NUMBERS}
_NAMES = {number: name for name, number in KEYS.items()}


def selection_keys(scores_NF: Tensor, key: str, group: int = 1, always_A: Tensor | None = None) -> Tensor:
    """Turn scores into what is ranked: |activation|, summed over each group; infinite where always chosen.

    Returns:
        keys [N, G], G = ceil(F / group); the last group may be shorter.
    """
    keys = scores_NF if key == SIGNED else activation(key).function(scores_NF).abs()
    if group > 1:
        keys = group_scores(keys, group)
    if always_A is not None and always_A.numel():
        keys = keys.index_fill(1, always_A.long(), float("inf"))
    return keys


def top_indices_reference(keys_NG: Tensor, count: int) -> Tensor:
    """Sort stably and cut; see `top_indices`."""
    ranked = keys_NG.nan_to_num(nan=float("inf"), posinf=float("inf"), neginf=-float("inf"))
    best = ranked.sort(dim=1, descending=True, stable=True).indices[:, :count]
    return best.sort(dim=1).values.to(torch.int32)


def top_indices(keys_NG: Tensor, count: int) -> Tensor:
    """Find the `count` largest keys of each row.

    Ties go to the lowest index; NaN counts as the largest number. `count` may be G or more: then all are chosen.

    Args:
        keys_NG: float32 on the native path, any floating dtype on the reference.
    Returns:
        int32 [N, min(count, G)], increasing in each row.
    Raises:
        ConfigError: a negative count.
    Cost: O(N G); no sort of the rows.
    Example:
        >>> top_indices(torch.tensor([[1.0, 3.0, 3.0, 2.0]]), 2)
        tensor([[1, 2]], dtype=torch.int32)
    """
    if keys_NG.dim() != 2:
        raise ShapeError(f"top_indices: expected keys [N, G], got {tuple(keys_NG.shape)}")
    if count < 0:
        raise ConfigError(f"top_indices: count must be at least 0, got count={count}")
    count = min(count, keys_NG.shape[1])
    if keys_NG.dtype != torch.float32:
        return top_indices_reference(keys_NG, count)
    return torch.ops.nogemm.top_indices(keys_NG, count)


def quantise_tokens(x_ND: Tensor) -> tuple[Tensor, Tensor]:
    """Round tokens to int8 with a scale each, x ~ scale * code, scale = max|x| / 127; not finite tokens become 0."""
    wide = x_ND.float()
    wide = torch.where(wide.isfinite().all(-1, keepdim=True), wide, 0.0)
    largest_N1 = wide.abs().amax(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    codes_ND = (wide * (127.0 / largest_N1)).round().clamp(-127, 127).to(torch.int8)
    return codes_ND, (largest_N1 / 127.0).squeeze(-1)


def sketch_scores(x_ND: Tensor, codes_FD: Tensor, scale_F: Tensor, bias_F: Tensor | None = None) -> Tensor:
    """Estimate x W^T + bias from int8 codes of W, W ~ scale * codes; tokens are rounded to int8, too.

        s[n, f] = (sum_d q[n, d] codes[f, d]) * (scale_x[n] * scale[f]) + bias[f]

    Returns:
        float32 [N, F]; the integer sums are exact.
    """
    tokens_ND, scale_N = quantise_tokens(x_ND)
    sums_NF = tokens_ND.double() @ codes_FD.double().T
    scores_NF = sums_NF.float() * (scale_N.unsqueeze(-1) * scale_F.float())
    return scores_NF if bias_F is None else scores_NF + bias_F.float()


def sketch_and_select_reference(
    x_ND: Tensor,
    codes_FD: Tensor,
    scale_F: Tensor,
    bias_F: Tensor | None,
    always_A: Tensor | None,
    key: int,
    group: int,
    count: int,
) -> Tensor:
    """Score everything, then rank; see `sketch_and_select`."""
    keys_NG = selection_keys(sketch_scores(x_ND, codes_FD, scale_F, bias_F), _NAMES[key], group, always_A)
    return top_indices_reference(keys_NG, count)


def sketch_and_select(
    x_ND: Tensor,
    codes_FD: Tensor,
    scale_F: Tensor,
    bias_F: Tensor | None,
    *,
    count: int,
    key: str = "signed",
    group: int = 1,
    always_A: Tensor | None = None,
) -> Tensor:
    """Name the groups of neurons that a sketch of their weights ranks highest for each token.

    The candidates of HiRE: `sketch_scores`, `selection_keys`, `top_indices` in one call, without the [N, F] scores.
    It has no gradient: a choice is discrete.

    Args:
        x_ND: any floating dtype; of a low-rank sketch, the reduced tokens.
        codes_FD: int8 (of an int4 sketch, from -8 to 7), with float32 `scale_F`.
        count: groups to name; G or more names all.
        key: one of KEYS.
        always_A: groups that are always named.
    Returns:
        int32 [N, min(count, G)], increasing in each row.
    Cost: 2 N F D integer operations.
    Source: HiRE (2024), section 3, quantised form; the design for CPUs is ours.
    """
    if x_ND.dim() != 2 or codes_FD.dim() != 2 or x_ND.shape[1] != codes_FD.shape[1]:
        raise ShapeError(
            f"sketch_and_select: expected x [N, D] and codes [F, D], got x {tuple(x_ND.shape)} and codes "
            f"{tuple(codes_FD.shape)}"
        )
    count = min(count, -(-codes_FD.shape[0] // group))
    always_A = None if always_A is None else always_A.to(torch.int32)
    args = (codes_FD, scale_F, bias_F, always_A, KEYS[key], group, count)
    if not has_native_kernel(x_ND):
        return sketch_and_select_reference(x_ND, *args)
    return torch.ops.nogemm.sketch_and_select(x_ND.float(), *args)


define(
    "top_indices(Tensor keys, int count) -> Tensor",
    top_indices_reference,
    lambda keys, count: keys.new_empty((keys.shape[0], count), dtype=torch.int32),
)
define(
    "sketch_and_select(Tensor x, Tensor codes, Tensor scale, Tensor? bias, Tensor? always, int key, int group, "
    "int count) -> Tensor",
    sketch_and_select_reference,
    lambda x, codes, scale, bias, always, key, group, count: x.new_empty((x.shape[0], count), dtype=torch.int32),
)
