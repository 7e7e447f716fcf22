"""The codes of a vocabulary head in one buffer, for hosts without torch; and rows that such a host keeps as bytes.

The layout of the codes is described in csrc/packed/head/format.h; the head's rows are no part of it.

Legend: V rows (vocabulary), D width.
"""

from __future__ import annotations

import ctypes
import functools
import struct

import torch
from torch import Tensor

from nogemm.ops._library import define, native
from nogemm.ops._packing import ALIGNMENT, aligned_buffer
from nogemm.ops.head_scan import HeadCodes

_MAGIC, _VERSION = 0x4441454847474E01, 1
ROW_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # numbers of csrc/packed/host/host.h
_NUMBERED = {number: dtype for dtype, number in ROW_DTYPES.items()}


def pack_head(weight_VD: Tensor, bias_V: Tensor | None, codes: HeadCodes) -> Tensor:
    """Lay out the codes of a head, and its bias, in one buffer that is the same for every instruction set.

    Args:
        weight_VD: the rows that the codes are of; only their shape and dtype are taken.
        bias_V: float32, or None.
        codes: by `nogemm.heads.make_codes`.
    Returns:
        uint8, 64-byte aligned.
    Raises:
        NativeError: no extension.
    """
    rows, width = weight_VD.shape
    leading = min(codes.eight.shape[1] * 4, width)
    values: dict[str, int] = {
        "magic": _MAGIC,
        "version": _VERSION,
        "rows": rows,
        "d": width,
        "dtype": ROW_DTYPES[weight_VD.dtype],
        "width8": leading,
        "width4": min(codes.four.shape[1] * 8, width - leading),
    }
    sections = {
        "eight": codes.eight,
        "four": codes.four,
        "rest": codes.rest,
        "numbers": codes.numbers,
        "project": codes.project,
        "mean": codes.mean,
        "limits": codes.limits,
        "bias": None if bias_V is None else bias_V.float(),
    }
    end = _up(8 * len(_fields()))
    for name, section in sections.items():
        values[name] = 0 if section is None else end
        end += 0 if section is None else _up(section.numel() * section.element_size())
    values["bytes"] = end
    buffer = aligned_buffer(end).zero_()
    header = struct.pack(f"<{len(_fields())}q", *(values[name] for name in _fields()))
    buffer[: len(header)] = torch.frombuffer(bytearray(header), dtype=torch.uint8)
    for name, section in sections.items():
        if section is not None:
            flat = section.contiguous().flatten().view(torch.uint8)
            buffer[values[name] : values[name] + len(flat)] = flat
    return buffer


def _up(value: int) -> int:
    return -(-value // ALIGNMENT) * ALIGNMENT


@functools.cache
def _fields() -> tuple[str, ...]:
    library = native()
    library.nogemm_head_fields.restype = ctypes.c_char_p
    return tuple(word[1:] for word in library.nogemm_head_fields().decode().split())


def embed_rows(ids: Tensor, rows: Tensor, dtype: int) -> Tensor:
    """Look up rows that are kept as bytes; what a host's operator of the same name computes.

    Args:
        ids: whole numbers of any shape, below V.
        rows: uint8 [V, bytes of a row].
        dtype: a number of `ROW_DTYPES`.
    Returns:
        float32 [..., D].
    Cost: D numbers read and written for each id.
    """
    return rows.view(_NUMBERED[dtype])[ids].float()


define(
    "embed_rows(Tensor ids, Tensor rows, int dtype) -> Tensor",
    embed_rows,
    lambda ids, rows, dtype: ids.new_empty(
        (*ids.shape, rows.shape[1] // _NUMBERED[dtype].itemsize), dtype=torch.float32
    ),
)
