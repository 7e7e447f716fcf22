"""Orthonormal discrete cosine transform along the last dimension, by a fast Fourier transform.

Legend: D width.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from nogemm.errors import ShapeError
from nogemm.ops._library import LIBRARY, define


def dct_reference(x: Tensor, inverse: bool) -> Tensor:
    """Transform by one real FFT of the same length (Makhoul's reordering); see `dct`."""
    width = x.shape[-1]
    y = x.to(torch.promote_types(x.dtype, torch.float32))
    if width > 1 and y.numel() > 0:
        y = _backward_transform(y) if inverse else _forward_transform(y)
    return y.to(x.dtype)


def _twiddle(width: int, sign: float, like: Tensor) -> Tensor:
    """Return exp(sign i pi k / 2D) for k = 0 .. D/2, complex, times what makes the transform orthonormal."""
    angle = torch.arange(width // 2 + 1, device=like.device, dtype=like.dtype) * (sign * math.pi / (2 * width))
    scale = torch.full_like(angle, 2.0**0.5 if sign < 0 else 0.5**0.5)
    scale[0] = 1.0
    return torch.polar(scale, angle)


def _forward_transform(x: Tensor) -> Tensor:
    width = x.shape[-1]
    even = (width + 1) // 2
    # Even places forward, then odd places backward: the cosine sum becomes the real part of a Fourier sum.
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    y[..., :even] = x[..., 0::2]
    y[..., even:] = x[..., 1::2].flip(-1)
    spectrum = torch.view_as_real(torch.fft.rfft(y, norm="ortho") * _twiddle(width, -1.0, y))
    lower = width // 2 + 1
    y[..., :lower] = spectrum[..., 0]
    y[..., lower:] = spectrum[..., 1 : width - lower + 1, 1].flip(-1).neg()  # y_{D-k} is minus the imaginary part
    return y


def _backward_transform(y: Tensor) -> Tensor:
    width = y.shape[-1]
    even = (width + 1) // 2
    half = torch.zeros((*y.shape[:-1], width // 2 + 1, 2), dtype=y.dtype, device=y.device)
    half[..., 0] = y[..., : width // 2 + 1]
    half[..., 1:, 1] = y[..., even:].flip(-1).neg()
    spectrum = torch.view_as_complex(half) * _twiddle(width, 1.0, y)
    folded = torch.fft.irfft(spectrum, n=width, norm="ortho")
    x = torch.empty_like(folded)
    x[..., 0::2] = folded[..., :even]
    x[..., 1::2] = folded[..., even:].flip(-1)
    return x


def dct(x: Tensor, inverse: bool = False) -> Tensor:
    """Apply the orthonormal DCT-II to the last dimension, or its inverse, the DCT-III.

        y_k = s_k sum_n x_n cos(pi (2n + 1) k / 2D),   s_0 = sqrt(1/D),  s_k = sqrt(2/D)

    The matrix is orthogonal, so each direction is the other's backward.

    Args:
        x: [..., D], D at least 1.
    Returns:
        y of x's shape and dtype, computed in at least float32.
    Raises:
        ShapeError: if x has no last dimension.
    Cost: counted as 2.5 D log2 D FLOP per row, that of a real Fourier transform.
    Example:
        >>> dct(torch.tensor([1.0, 1.0, 1.0, 1.0]))
        tensor([2., 0., 0., 0.])
    """
    if x.dim() == 0 or x.shape[-1] < 1:
        raise ShapeError(f"dct: x must have a last dimension, got x of shape {tuple(x.shape)}")
    return torch.ops.nogemm.dct(x, inverse)


def _setup_context(ctx: Any, inputs: tuple[Tensor, bool], output: Tensor) -> None:
    ctx.inverse = inputs[1]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    return dct(grad, not ctx.inverse), None


define(
    "dct(Tensor x, bool inverse) -> Tensor",
    dct_reference,
    lambda x, inverse: torch.empty(x.shape, dtype=x.dtype, device=x.device),
)
torch.library.register_autograd("nogemm::dct", _backward, setup_context=_setup_context, lib=LIBRARY)
