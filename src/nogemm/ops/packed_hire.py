"""A whole HireFFN in one native call: lay its weights out once, then run.

The op has no backward and no reference of its own: its twin is the composition of the single ops, which tests compare
it with. It exists only where the extension is loaded. The layout is described in csrc/packed/neurons/format.h.

Legend: D width, E output width, F neurons, R width of the sketch.
"""

from __future__ import annotations

import ctypes
import functools
import struct
from dataclasses import dataclass

import torch
from torch import Tensor

from nogemm.activations import NUMBERS, activation
from nogemm.ops._library import LIBRARY, native
from nogemm.ops._packing import ALIGNMENT, PACK_MODES, aligned_buffer, define_packed, quantise_rows, sourced
from nogemm.ops.sketch_and_select import KEYS

_MAGIC, _VERSION = 0x4552494847474E01, 3
_SELECT = ("topk", "statistical", "active", "gaussian", "scores")
SKETCH_ROWS = 64  # of a group; csrc/packed/neurons/format.h
_BYTE_OFFSET, _NIBBLE_OFFSET = 128, 8


@dataclass(frozen=True, kw_only=True)
class HireWeights:
    """Everything that the packed form of one HireFFN is made of.

    Attributes:
        gate: [F, D] of a gated layer, else None. down: [F, E].
        activation: by any of its names; up_relu: ReLU on the gated branch, too.
        codes, scale, reduce: of the sketch; codes None if all neurons are candidates.
        error, size: for select="active" and "gaussian", what |x| and the token's step are multiplied with to give a
            neuron's margin.
        nibbles: the codes fit four bits.
        group, kept, candidates: counted in groups; always: groups, increasing.
        keep_z, wide_z: cutoffs of select="statistical" and "gaussian" in standard deviations above the mean.
        moments: for select="gaussian", [D + 2, D + 1] from `moment_rows`.
    """

    gate: Tensor | None
    gate_bias: Tensor | None
    up: Tensor
    up_bias: Tensor
    down: Tensor
    bias: Tensor
    activation: str
    kept: int
    candidates: int
    up_relu: bool = False
    key: str = "signed"
    select: str = "topk"
    group: int = 1
    always: Tensor | None = None
    keep_z: float = 0.0
    wide_z: float = 0.0
    codes: Tensor | None = None
    scale: Tensor | None = None
    reduce: Tensor | None = None
    error: Tensor | None = None
    size: Tensor | None = None
    nibbles: bool = False
    moments: Tensor | None = None


def moment_rows(weight_FD: Tensor, bias_F: Tensor) -> Tensor:
    """Make what gives mean and deviation of all F values W x + b of a token without computing them.

    With x~ = (x, 1), w~ = (w, b) and C the covariance of the rows w~, the values' mean is <mean of w~, x~> and their
    variance x~ C x~. Row 0 is that mean, the others are R, an upper triangle with R^T R = C: the variance is |R x~|^2,
    which no rounding makes negative.

    Returns:
        float32 [D + 2, D + 1].
    Cost: F D^2 multiply-adds and a Cholesky factor, in float64.
    """
    rows = torch.cat((weight_FD.detach().double(), bias_F.detach().double().unsqueeze(1)), 1)
    mean = rows.mean(0, keepdim=True)
    rows = rows - mean
    covariance = rows.T @ rows / len(rows)
    least = 1e-13 * covariance.diagonal().sum().clamp_min(1e-300)  # a lift far below float32: C need not have full rank
    covariance.diagonal().add_(least)
    return torch.cat((mean, torch.linalg.cholesky(covariance, upper=True))).float()


class _Layout:
    """Places sections one after the other, and writes them once the buffer exists."""

    def __init__(self, start: int) -> None:
        self.end = start
        self.sections: list[tuple[int, Tensor]] = []

    def add(self, values: Tensor | None) -> int:
        """Return the offset of a new section; 0 for none."""
        if values is None:
            return 0
        offset = self.end
        self.sections.append((offset, values.contiguous().view(torch.uint8).flatten()))
        self.end = _up(offset + self.sections[-1][1].numel(), ALIGNMENT)
        return offset


def _up(value: int, to: int) -> int:
    return -(-value // to) * to


def lay_out_sketch(codes_FR: Tensor, nibbles: bool) -> Tensor:
    """Reorder codes to [row group, step, 64 rows, 4 bytes], unsigned."""
    hidden, width = codes_FR.shape
    columns = 8 if nibbles else 4
    padded = torch.zeros(_up(hidden, SKETCH_ROWS), _up(width, columns), dtype=torch.int16)
    padded[:hidden, :width] = codes_FR
    groups, steps = padded.shape[0] // SKETCH_ROWS, padded.shape[1] // columns
    parts = (padded + (_NIBBLE_OFFSET if nibbles else _BYTE_OFFSET)).view(groups, SKETCH_ROWS, steps, columns)
    parts = parts.permute(0, 2, 1, 3)
    if nibbles:
        parts = parts[..., :4] | (parts[..., 4:] << 4)
    return parts.to(torch.uint8).contiguous()


def read_sketch(laid_out: Tensor, nibbles: bool) -> Tensor:
    """Undo `lay_out_sketch`: float64 [rows of whole groups, columns of whole steps]."""
    parts = laid_out.to(torch.int16)
    if nibbles:
        parts = torch.cat((parts & 15, parts >> 4), dim=-1)
    parts = parts.permute(0, 2, 1, 3).flatten(2).flatten(0, 1)
    return parts.double() - (_NIBBLE_OFFSET if nibbles else _BYTE_OFFSET)


def _rows(weight: Tensor, dtype: str) -> tuple[Tensor, Tensor | None]:
    """Return rows as bytes [F, padded to 64], and the scale of int8 rows."""
    wide = weight.detach().float()
    rows, scale = (wide, None) if dtype == "fp32" else quantise_rows(wide, dtype)
    as_bytes = rows.contiguous().view(torch.uint8)
    return torch.nn.functional.pad(as_bytes, (0, -as_bytes.shape[1] % ALIGNMENT)), scale


def _padded(values: Tensor, count: int) -> Tensor:
    return torch.nn.functional.pad(values.detach().float(), (0, count - values.numel()))


@sourced
def pack_hire(w: HireWeights, dtype: str) -> Tensor:
    """Lay one layer's weights out for `packed_hire`.

    Args:
        dtype: of the rows: "fp32", "bf16", or "int8" with a scale per row. The sketch is the layer's.
    Returns:
        one uint8 buffer with a header; for this process, not a file format.
    Raises:
        NativeError: no extension. ConfigError: an activation that nogemm does not know.
    """
    hidden, width = w.up.shape
    padded = _up(hidden, SKETCH_ROWS)
    kinds = [m for m in (w.gate, w.up, w.down) if m is not None]
    rows, scales = zip(*(_rows(m, dtype) for m in kinds), strict=True)
    layout = _Layout(_up(8 * len(_fields()), ALIGNMENT))
    static = 0 if w.always is None else w.always.numel()
    stacked = [s for s in (scales[0], scales[-2], scales[-1]) if s is not None]
    codes_width = width if w.codes is None else w.codes.shape[1]
    widths = [r.shape[1] for r in rows]
    marginal = w.select in ("active", "gaussian")
    moments = None if w.moments is None else torch.nn.functional.pad(w.moments, (0, -w.moments.shape[1] % 16))
    values: dict[str, float] = {
        "magic": _MAGIC,
        "version": _VERSION,
        "mode": PACK_MODES[dtype],
        "d": width,
        "d_out": w.down.shape[1],
        "hidden": hidden,
        "gated": w.gate is not None,
        "act": NUMBERS[activation(w.activation).name],
        "up_relu": w.up_relu,
        "key": KEYS[w.key],
        "select": _SELECT.index(w.select),
        "nibbles": w.nibbles,
        "width": codes_width,
        "steps": -(-codes_width // (8 if w.nibbles else 4)),
        "group": w.group,
        "groups": -(-hidden // w.group),
        "kept": w.kept,
        "candidates": w.candidates,
        "always_count": static,
        "bundle_bytes": sum(widths),
        "up_at": widths[0] if w.gate is not None else 0,
        "down_at": sum(widths[:-1]),
        "sketch": layout.add(None if w.codes is None else lay_out_sketch(w.codes, w.nibbles)),
        "sketch_scale": layout.add(None if w.scale is None else _padded(w.scale, padded)),
        "reduce": layout.add(None if w.reduce is None or w.codes is None else w.reduce.float()),
        "always": layout.add(w.always.to(torch.int32) if w.always is not None and static else None),
        "margin_error": layout.add(w.error) if marginal else 0,
        "margin_size": layout.add(w.size) if marginal else 0,
        "moments": layout.add(moments),
        "moments_stride": 0 if moments is None else 4 * moments.shape[1],
        "gate_bias": layout.add(_padded(w.up_bias if w.gate_bias is None else w.gate_bias, padded)),
        "up_bias": layout.add(w.up_bias.detach().float()),
        "out_bias": layout.add(w.bias.detach().float()),
        "scales": layout.add(torch.stack(stacked) if stacked else None),
        "keep_z": w.keep_z,
        "wide_z": w.wide_z,
    }
    return _written(values, layout, torch.cat(rows, dim=1))


@sourced
def pack_linear(codes_FD: Tensor, scale_F: Tensor, bias_F: Tensor | None) -> Tensor:
    """Lay a dense linear layer out so that `packed_hire` answers it by `sketch_scores`: y = x W^T + b, W ~ scale codes.

    Args:
        codes_FD: int8, from -127 to 127. scale_F, bias_F: float32.
    Returns:
        one uint8 buffer, as from `pack_hire`; d_out is F.
    Raises:
        NativeError: no extension.
    """
    hidden, width = codes_FD.shape
    padded = _up(hidden, SKETCH_ROWS)
    bias_F = torch.zeros(hidden) if bias_F is None else bias_F
    layout = _Layout(_up(8 * len(_fields()), ALIGNMENT))
    values: dict[str, float] = {}
    values |= dict.fromkeys(_fields(), 0)
    values |= {
        "magic": _MAGIC,
        "version": _VERSION,
        "d": width,
        "d_out": hidden,
        "hidden": hidden,
        "select": _SELECT.index("scores"),
        "width": width,
        "steps": -(-width // 4),
        "group": hidden,
        "groups": 1,
        "sketch": layout.add(lay_out_sketch(codes_FD, nibbles=False)),
        "sketch_scale": layout.add(_padded(scale_F, padded)),
        "gate_bias": layout.add(_padded(bias_F, padded)),
    }
    return _written(values, layout, codes_FD.new_empty(hidden, 0).view(torch.uint8))


@functools.cache
def _fields() -> dict[str, str]:
    """Return {name: "q" or "d"} of the header's fields, integers and doubles, in the kernel's order."""
    library = native()
    library.nogemm_hire_fields.restype = ctypes.c_char_p
    return {word[1:]: word[0] for word in library.nogemm_hire_fields().decode().split()}


def _written(values: dict[str, float], layout: _Layout, bundle_rows: Tensor) -> Tensor:
    """Allocate a buffer, and write it."""
    library = native()
    total = layout.end + bundle_rows.numel()
    values |= {"bundles": layout.end, "bytes": total}
    buffer = aligned_buffer(total)
    library.nogemm_hire_prepare.argtypes = [ctypes.c_void_p, ctypes.c_int64]
    library.nogemm_hire_prepare(buffer.data_ptr(), total)
    _write(values, layout, bundle_rows, buffer)
    return buffer


def _write(values: dict[str, float], layout: _Layout, bundle_rows: Tensor, buffer: Tensor) -> None:
    buffer.zero_()
    header = b"".join(struct.pack(f"<{kind}", values[name]) for name, kind in _fields().items())
    buffer[: len(header)] = torch.frombuffer(bytearray(header), dtype=torch.uint8)
    for start, section in layout.sections:
        buffer[start : start + section.numel()] = section
    buffer[layout.end : layout.end + bundle_rows.numel()] = bundle_rows.flatten()


def packed_hire(x: Tensor, packed: Tensor, d_out: int) -> Tensor:
    """Run a packed HireFFN: sketch, select, exact, accumulate.

    Args:
        x: [..., D], float32, bfloat16 or float16.
        packed: from `pack_hire`, in the same process.
        d_out: width of y; must be the packed layer's.
    Returns:
        y [..., d_out] in x's dtype, accumulated in float32; the same bits for any number of threads and any batch.
    Raises:
        ValueError: a buffer that `pack_hire` did not make, or a width that is not the layer's.
    Cost: see `HireFFN.cost`.
    """
    return torch.ops.nogemm.packed_hire(x, packed, d_out)


def packed_rows(packed: Tensor) -> dict[str, tuple[Tensor, Tensor | None]]:
    """View the rows in a buffer of `pack_hire`: "gate" (if gated), "up", "down", each [F, width], and their scales."""
    h = dict(zip(_fields(), packed[: 8 * len(_fields())].view(torch.int64).tolist(), strict=True))
    width, d_out, hidden, stride = h["d"], h["d_out"], h["hidden"], h["bundle_bytes"]
    mode, bundles, scales = h["mode"], h["bundles"], h["scales"]
    dtype = (torch.float32, torch.bfloat16, torch.int8)[mode]
    rows = packed[bundles : bundles + hidden * stride].view(hidden, stride)
    kinds = (("gate", 0, width), ("up", h["up_at"], width), ("down", h["down_at"], d_out))
    found: dict[str, tuple[Tensor, Tensor | None]] = {}
    for place, (name, at, columns) in enumerate(kinds):
        if name == "gate" and not h["gated"]:
            continue
        scale = packed[scales + place * hidden * 4 :][: hidden * 4].view(torch.float32) if mode == 2 else None
        found[name] = rows[:, at : at + columns * dtype.itemsize].view(dtype), scale
    return found


def packed_neurons(x: Tensor, packed: Tensor, d_out: int, mask: Tensor) -> Tensor:
    """Run a packed layer on the neurons that somebody else has chosen.

    Args:
        x, packed, d_out: as in `packed_hire`; packed without a sketch.
        mask: bool [tokens, F], the neurons of each token.
    Returns, raises and cost as for `packed_hire`, which chooses for itself.
    """
    return torch.ops.nogemm.packed_neurons(x, packed, d_out, mask)


def packed_hire_chosen(x: Tensor, packed: Tensor, hidden: int, kept: bool) -> Tensor:
    """Name the neurons that `packed_hire` would choose, without answering.

    Args:
        x, packed: as in `packed_hire`.
        hidden: F; must be the packed layer's.
        kept: the neurons that would answer; else the candidates, of which those are the strongest.
    Returns:
        bool [tokens, F]; of a token that is not finite, what a token of zeros would choose.
    Raises:
        ValueError: as for `packed_hire`.
    Cost: the sketch, and for `kept` the exact selecting products, see `HireFFN.cost`.
    """
    return torch.ops.nogemm.packed_hire_chosen(x, packed, hidden, kept)


def _chosen_fake(x: Tensor, packed: Tensor, hidden: int, kept: bool) -> Tensor:
    return x.new_empty((x.numel() // x.shape[-1], hidden), dtype=torch.bool)


LIBRARY.define("packed_hire_chosen(Tensor x, Tensor packed, int hidden, bool kept) -> Tensor")
torch.library.register_fake("nogemm::packed_hire_chosen", _chosen_fake, lib=LIBRARY)
define_packed("packed_hire")
define_packed("packed_neurons", "Tensor mask")
