"""Codes and scores: which rows of each table a token reads, and with what weight.

Legend: N tokens, T tables, K bits per table, F neighbours kept.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nogemm.errors import ShapeError
from nogemm.ops._library import LIBRARY, define, has_native_kernel

NATIVE_NEIGHBOURS = (1, 2, 4)


def nearest_flips(u_NTK: Tensor, neighbours: int) -> Tensor:
    """Find, exactly, the `neighbours` sets of bits whose |z| add up to least, smallest first.

    The bits are taken one by one and only the best F partial sets are kept: every part of a best set is itself among
    the best of its prefix. Ties go to the smaller mask.

    Args:
        u_NTK: |z|, non-negative.
        neighbours: F, from 1 to 2^K.
    Returns:
        masks_NTF: int64, bit K-1-j set where bit j is flipped; the first is 0 (nothing flipped).
    Cost: O(K F log F) per table.
    """
    bits = u_NTK.shape[-1]
    sums = torch.zeros_like(u_NTK[..., :1])
    masks = torch.zeros_like(sums, dtype=torch.int64)
    for j in range(bits if neighbours > 1 else 0):
        sums = torch.cat((sums, sums + u_NTK[..., j : j + 1]), dim=-1)
        masks = torch.cat((masks, masks | (1 << (bits - 1 - j))), dim=-1)
        # Two stable sorts make the order lexicographic: by sum, then by mask.
        by_mask = masks.argsort(dim=-1, stable=True)
        by_sum = sums.gather(-1, by_mask).argsort(dim=-1, stable=True)
        keep = by_mask.gather(-1, by_sum)[..., :neighbours]
        sums, masks = sums.gather(-1, keep), masks.gather(-1, keep)
    return masks


def hash_codes_reference(z_NM: Tensor, bits: int, neighbours: int, gelu: bool) -> tuple[Tensor, Tensor]:
    """Compute codes and scores by the formulas of `hash_codes`, differentiable in z."""
    z_NTK = z_NM.reshape(z_NM.shape[0], z_NM.shape[1] // bits, bits).to(torch.promote_types(z_NM.dtype, torch.float32))
    u_NTK = z_NTK.abs()
    place_K = 2 ** torch.arange(bits - 1, -1, -1, device=z_NM.device)
    best_NT1 = ((z_NTK > 0) * place_K).sum(-1, keepdim=True)
    masks_NTF = nearest_flips(u_NTK.detach(), neighbours)
    codes_NTF = best_NT1 ^ masks_NTF

    flipped_NTFK = ((masks_NTF.unsqueeze(-1) & place_K) != 0).to(u_NTK.dtype)
    flipped_sum_NTF = (flipped_NTFK * u_NTK.unsqueeze(-2)).sum(-1)
    probability = torch.sigmoid(2 * u_NTK).prod(-1, keepdim=True) * torch.exp(-2 * flipped_sum_NTF)
    scores = (u_NTK.sum(-1, keepdim=True) - 2 * flipped_sum_NTF) * probability if gelu else probability
    finite_NT1 = torch.isfinite(z_NTK).all(-1, keepdim=True)
    scores = torch.where(finite_NT1, scores, float("nan"))
    return codes_NTF.to(torch.int32), scores.to(z_NM.dtype)


def hash_codes_backward_reference(grad_NTF: Tensor, z_NM: Tensor, codes_NTF: Tensor, bits: int, gelu: bool) -> Tensor:
    """Return the gradient of z, from the closed form in `hash_codes`."""
    wide = torch.promote_types(z_NM.dtype, torch.float32)
    z_NTK = z_NM.reshape(z_NM.shape[0], z_NM.shape[1] // bits, bits).to(wide)
    place_K = 2 ** torch.arange(bits - 1, -1, -1, device=z_NM.device)
    sign_NTFK = ((codes_NTF.unsqueeze(-1) & place_K) != 0).to(wide) * 2 - 1
    agreement_NTF1 = (sign_NTFK * z_NTK.unsqueeze(-2)).sum(-1, keepdim=True)  # a_F = <z, S_F>
    # exp(a_F) / prod 2 cosh z = prod sigmoid(2 S_Fj z_j)
    p_NTF1 = torch.sigmoid(2 * sign_NTFK * z_NTK.unsqueeze(-2)).prod(-1, keepdim=True)
    slope_NTFK = sign_NTFK - torch.tanh(z_NTK).unsqueeze(-2)
    dscore = p_NTF1 * (sign_NTFK + agreement_NTF1 * slope_NTFK if gelu else slope_NTFK)
    grad_z = (grad_NTF.to(wide).unsqueeze(-1) * dscore).sum(-2)
    return grad_z.reshape(z_NM.shape).to(z_NM.dtype)


def hash_codes(z_NM: Tensor, bits: int, neighbours: int = 1, gelu: bool = True) -> tuple[Tensor, Tensor]:
    """Turn soft codes into row numbers and their scores.

        u_j = |z_j|,   A = sum_j u_j,   P = prod_j 1 / (1 + exp(-2 u_j))
        best code = sum_j [z_j > 0] 2^(K-1-j)        (most significant bit first; z = 0 gives bit 0)
        for a set F of flipped bits:  code_F = best XOR F,  a_F = A - 2 sum_{j in F} u_j,
                                      p_F = P exp(-2 sum_{j in F} u_j)
        score = a_F p_F (gelu) or p_F (sigmoid)

    The F sets are the `neighbours` with the least sum of |z|, in that order (ties: smaller mask first). A table whose z
    holds a NaN or an infinity keeps an index in range and gets score NaN.

    Source: LookupFFN (Zeng et al., 2023), equations 7 and 8 and Remark 3.1 without the constant 1.175. Differs in N:
    the exact nearest codes instead of sampled ones.

    Args:
        z_NM: [N, T K].
        bits: K, from 1 to 16.
        neighbours: rows read per table, from 1 to 2^K. Native kernels serve 1, 2 and 4; others run the reference.
        gelu: linearly scaled scores, as in the paper's experiments; False for the sigmoid form.
    Returns:
        codes: int32 [N, T, neighbours]; scores: z's dtype, same shape.
    Raises:
        ShapeError: if z is not [N, T K].
    Gradient: to z through the scores, dscore_F / dz_j = p_F (S_Fj + a_F (S_Fj - tanh z_j)) (gelu) or
        p_F (S_Fj - tanh z_j); S_Fj = +1 or -1 as bit j of code_F is set or not. The discrete code passes none.
    Cost: T K exponentials per token, no FLOP by the papers' count.
    Example:
        >>> codes, scores = hash_codes(torch.tensor([[1.0, -2.0]]), bits=2)
        >>> codes.tolist(), round(scores.item(), 4)
        ([[[2]]], 2.5949)
    """
    if z_NM.dim() != 2 or z_NM.shape[1] % bits:
        raise ShapeError(f"hash_codes: z must be [N, T K] with K = {bits} bits, got {tuple(z_NM.shape)}")
    if not has_native_kernel(z_NM):
        return hash_codes_reference(z_NM, bits, neighbours, gelu)
    if z_NM.device.type == "cpu" and neighbours not in NATIVE_NEIGHBOURS:
        return hash_codes_reference(z_NM, bits, neighbours, gelu)
    return torch.ops.nogemm.hash_codes(z_NM, bits, neighbours, gelu)


def _setup_context(ctx: Any, inputs: tuple[Tensor, int, int, bool], output: tuple[Tensor, Tensor]) -> None:
    z_NM, ctx.bits, _, ctx.gelu = inputs
    ctx.save_for_backward(z_NM, output[0])
    ctx.mark_non_differentiable(output[0])


def _backward(ctx: Any, _: Tensor | None, grad_NTF: Tensor) -> tuple[Tensor, None, None, None]:
    z_NM, codes_NTF = ctx.saved_tensors
    grad_z = torch.ops.nogemm.hash_codes_backward(grad_NTF.contiguous(), z_NM, codes_NTF, ctx.bits, ctx.gelu)
    return grad_z, None, None, None


def _fake(z: Tensor, bits: int, neighbours: int, gelu: bool) -> tuple[Tensor, Tensor]:
    shape = (z.shape[0], z.shape[1] // bits, neighbours)
    return z.new_empty(shape, dtype=torch.int32), z.new_empty(shape)


define(
    "hash_codes(Tensor z, int bits, int neighbours, bool gelu) -> (Tensor, Tensor)",
    hash_codes_reference,
    _fake,
)
define(
    "hash_codes_backward(Tensor grad, Tensor z, Tensor codes, int bits, bool gelu) -> Tensor",
    hash_codes_backward_reference,
    lambda grad, z, codes, bits, gelu: z.new_empty(z.shape),
)
torch.library.register_autograd("nogemm::hash_codes", _backward, setup_context=_setup_context, lib=LIBRARY)
