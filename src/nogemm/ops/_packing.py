"""What the packed ops share: rounded rows, an aligned buffer, and the schema of a layer in one native call.

Legend: D width of a row.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import ParamSpec

import torch
from torch import Tensor

from nogemm.ops._library import LIBRARY

PACK_MODES = {"fp32": 0, "bf16": 1, "int8": 2}
ALIGNMENT = 64  # bytes; what the kernels need

ArgumentsP = ParamSpec("ArgumentsP")
Maker = Callable[[], Tensor]
_SOURCE: ContextVar[Callable[[Maker], Tensor] | None] = ContextVar("source", default=None)


@contextmanager
def buffers_from(source: Callable[[Maker], Tensor] | None) -> Iterator[None]:
    """Within the block, packed buffers come from `source`, called with what would make the next one; None: make them.

    Packing is deterministic: the same model in the same precision asks for the same buffers in the same order.
    """
    before = _SOURCE.set(source)
    try:
        yield
    finally:
        _SOURCE.reset(before)


def sourced(pack: Callable[ArgumentsP, Tensor]) -> Callable[ArgumentsP, Tensor]:
    """Let a function that lays a layer out ask `buffers_from` first (decorator)."""

    @functools.wraps(pack)
    def asked(*args: ArgumentsP.args, **kwargs: ArgumentsP.kwargs) -> Tensor:
        source = _SOURCE.get()
        return pack(*args, **kwargs) if source is None else source(lambda: pack(*args, **kwargs))

    return asked


def quantise_rows(rows: Tensor, dtype: str) -> tuple[Tensor, Tensor | None]:
    """Round rows [..., D] to bf16, or to int8 with a scale per row: row ~ scale * int8, scale = max|row| / 127."""
    return (rows.to(torch.bfloat16), None) if dtype == "bf16" else integer_rows(rows, 8)


def integer_rows(rows: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Round rows [..., D] to signed integers of 8 or 4 bits, kept as int8, with a scale each.

        row ~ scale * integer,   scale = max|row| / most,   most = 127 or 7

    Returns:
        the integers, int8 [..., D], from -most to most, and the scales, float32 [...].
    """
    wide, most = rows.float(), 2 ** (bits - 1) - 1
    scale = wide.abs().amax(-1).clamp_min(torch.finfo(torch.float32).tiny) / most
    return (wide / scale.unsqueeze(-1)).round().clamp(-most, most).to(torch.int8), scale


class _RoundedRows(torch.autograd.Function):
    """Rows as their integers give them; the gradient goes to the rows themselves, as if nothing was rounded."""

    @staticmethod
    def forward(ctx: object, rows: Tensor, bits: int) -> Tensor:
        steps, scale = integer_rows(rows, bits)
        return (steps * scale.unsqueeze(-1)).to(rows.dtype)

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad, None


def rounded_rows(rows: Tensor, bits: int) -> Tensor:
    """Round rows to what `integer_rows` can hold; gradients pass straight through."""
    return _RoundedRows.apply(rows, bits)  # type: ignore[no-any-return]


class Addresses:
    """Hand tensors to C: their addresses, as long as this object lives."""

    def __init__(self) -> None:
        self._kept: list[Tensor] = []

    def of(self, tensor: Tensor | None, dtype: torch.dtype = torch.float32) -> int | None:
        """Return the address of a contiguous copy on the CPU in `dtype`; None for no tensor."""
        if tensor is None:
            return None
        self._kept.append(tensor.detach().to("cpu", dtype).contiguous())
        return self._kept[-1].data_ptr()


def aligned_buffer(size: int) -> Tensor:
    """Return `size` bytes, uint8, not cleared, that start on a multiple of 64."""
    # torch aligns CPU memory to 64 bytes; a view makes sure rather than trusting that.
    memory = torch.empty(size + ALIGNMENT, dtype=torch.uint8)
    offset = -memory.data_ptr() % ALIGNMENT
    return memory[offset : offset + size]


def define_packed(name: str, *more: str) -> None:
    """Define a packed layer's op, native alone: (x [..., D], its buffer, d_out, more) -> y [..., d_out]."""
    LIBRARY.define(f"{name}({', '.join(('Tensor x', 'Tensor packed', 'int d_out', *more))}) -> Tensor")
    torch.library.register_fake(f"nogemm::{name}", _fake, lib=LIBRARY)


def define_rows(name: str) -> None:
    """Define what a packed layer reads, native alone: (x [..., D], its buffer, count) -> int32 [tokens, count]."""
    LIBRARY.define(f"{name}(Tensor x, Tensor packed, int count) -> Tensor")
    torch.library.register_fake(
        f"nogemm::{name}",
        lambda x, packed, count: x.new_empty((x.numel() // x.shape[-1], count), dtype=torch.int32),
        lib=LIBRARY,
    )


def _fake(x: Tensor, packed: Tensor, d_out: int, *more: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], d_out))
