"""Codes of a vocabulary head's rows: the basis, the rounding, and how far each row may be off.

A logit is w . x = (T^-T w) . (T x) for any invertible T. T is chosen so that states and rows are both uncorrelated and
equally long in every coordinate, with the coordinates in falling order of what they add to the variance of a logit. The
product of two lengths then bounds a part of a logit as tightly as one product can, and the leading coordinates, which
carry most, are worth eight bits where four do for the others.

Legend: V rows, D width, K leading coordinates, S states.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nogemm.errors import ConfigError
from nogemm.ops.head_scan import HeadCodes
from nogemm.ops.packed_hire import SKETCH_ROWS, lay_out_sketch

LEADING = 32  # coordinates in int8
SKETCH = 128  # coordinates that a search reads, the leading ones among them
RIDGE = 0.03  # of the states' mean square, added to every direction: states that were not seen have to be bounded, too
CLIPS = (1.0, 0.85, 0.7, 0.6)  # shares of the largest coordinate that four bits may reach; each row takes its best
_CHUNK = 8192  # rows at once, a multiple of SKETCH_ROWS


def second_moment(states_SD: Tensor) -> Tensor:
    """Return E[x x^T] of states, float64 [D, D]; states that are not finite are left out."""
    wide = states_SD.double()
    wide = wide[wide.isfinite().all(1)]
    if not len(wide):
        raise ConfigError("data: no state of these texts is finite")
    return wide.T @ wide / len(wide)


def check_head(weight_VD: Tensor, bias_V: Tensor | None, caller: str) -> None:
    """Refuse a head with weights or biases that are not finite.

    Raises:
        ConfigError: the message names the first row, and how many there are.
    """
    broken = torch.cat([(~part.isfinite()).any(1).nonzero().flatten() + begin for begin, part in _parts(weight_VD)])
    if len(broken):
        raise ConfigError(f"{caller}: the head has weights that are not finite, {_first_of(broken)}")
    broken = torch.zeros(0) if bias_V is None else (~bias_V.isfinite()).nonzero().flatten()
    if len(broken):
        raise ConfigError(f"{caller}: the head has biases that are not finite, {_first_of(broken)}")


def _parts(weight_VD: Tensor) -> list[tuple[int, Tensor]]:
    detached = weight_VD.detach()
    return [(begin, detached[begin : begin + _CHUNK]) for begin in range(0, max(1, len(detached)), _CHUNK)]


def _first_of(rows: Tensor) -> str:
    return f"in row {int(rows[0])}" + (f" and in {len(rows) - 1} more" if len(rows) > 1 else "")


def widths(width: int, leading: int, sketch: int) -> tuple[int, int]:
    """Return how many coordinates of D get eight bits, and how many of the others a search reads: whole steps."""
    leading = min(-(-leading // 4) * 4, width)
    return leading, min(-(-max(sketch - leading, 0) // 8) * 8, width - leading)


def codes_bytes(rows: int, width: int, leading: int = LEADING, sketch: int = SKETCH) -> int:
    """Return `HeadCodes.bytes` of a head of `rows` rows, without making its codes."""
    leading, middle = widths(width, leading, sketch)
    steps = -(-leading // 4) + -(-middle // 8) + -(-(width - leading - middle) // 8)
    return -(-rows // SKETCH_ROWS) * SKETCH_ROWS * (4 * steps + 8) + 4 * (width * width + width + 6)


def make_codes(
    weight_VD: Tensor,
    bias_V: Tensor | None = None,
    moment_DD: Tensor | None = None,
    leading: int = LEADING,
    sketch: int = SKETCH,
) -> HeadCodes:
    """Make the codes of a head.

    Args:
        weight_VD: any floating dtype, finite, on the CPU, as all that is read; bias_V float32.
        moment_DD: the second moment of the states that the head will see (`second_moment`). None: as if states had no
            direction of their own; ten times as many rows are then left to compute.
        leading: coordinates that get eight bits, rounded up to a multiple of four.
        sketch: coordinates that `head_search` reads; those behind the leading ones are rounded up to a multiple of
            eight.
    Raises:
        ConfigError: a weight or a bias is not finite (the message names its row), a tensor is not on the CPU, whose
            kernels read the codes, or shapes do not fit.
    Cost: 4 V D^2 FLOP, half of them in float64; some seconds for a head of 260,000 rows.
    """
    rows, width = weight_VD.shape
    if moment_DD is not None and tuple(moment_DD.shape) != (width, width):
        raise ConfigError(f"make_codes: moment must be [{width}, {width}], got {tuple(moment_DD.shape)}")
    for name, tensor in (("weight", weight_VD), ("bias", bias_V), ("moment", moment_DD)):
        if tensor is not None and tensor.device.type != "cpu":
            raise ConfigError(
                f"make_codes: codes are made and read on the CPU, {name} is on {tensor.device}; move the model there, "
                "model.cpu(), or use the head's logits"
            )
    check_head(weight_VD, bias_V, "make_codes")
    leading, middle = widths(width, leading, sketch)
    mean_D = _mean(weight_VD).float()  # as the scan reads it
    project_DD, back_DD = _basis(weight_VD, mean_D.double(), moment_DD)
    eight, four, rest, numbers = [], [], [], []
    longest = torch.zeros(3, dtype=torch.float64)
    for begin in range(0, rows, _CHUNK):
        own_CD = weight_VD[begin : begin + _CHUNK].double()
        row_CD = (own_CD - mean_D.double()) @ back_DD
        row_CD = torch.cat(
            (row_CD, row_CD[-1:].expand(-len(row_CD) % SKETCH_ROWS, -1))
        )  # whole groups: the last row again
        codes8, scale8, error8 = _round(row_CD[:, :leading], 127, (1.0,))
        codes4, scale4, error4 = _round(row_CD[:, leading:], 7, CLIPS)
        eight.append(lay_out_sketch(codes8, nibbles=False))
        four.append(lay_out_sketch(codes4[:, :middle], nibbles=True))
        rest.append(lay_out_sketch(codes4[:, middle:], nibbles=True))
        numbers.append(
            torch.stack((scale8, scale4, _up(error8), _up(error4))).view(4, -1, SKETCH_ROWS).permute(1, 0, 2)
        )
        parts = (row_CD[:, :leading].norm(dim=1) + error8, row_CD[:, leading:].norm(dim=1) + error4, own_CD.norm(dim=1))
        longest = torch.maximum(longest, torch.stack([part.max() for part in parts]))
    bias = 0.0 if bias_V is None else float(bias_V.abs().max())
    limits = torch.tensor([*longest.tolist(), float(project_DD.norm()), bias, float(mean_D.norm())])
    return HeadCodes(
        project=project_DD.float(),
        mean=mean_D,
        eight=torch.cat(eight),
        four=torch.cat(four),
        rest=torch.cat(rest),
        numbers=torch.cat(numbers).to(torch.bfloat16).contiguous(),
        limits=(limits * 1.001).float(),
    )


def _mean(weight_VD: Tensor) -> Tensor:
    total = torch.zeros(weight_VD.shape[1], dtype=torch.float64)
    for part in weight_VD.split(_CHUNK):
        total += part.double().sum(0)
    return total / len(weight_VD)


def _basis(weight_VD: Tensor, mean_D: Tensor, moment_DD: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return T, rounded to float32, and its inverse, both float64: a state has coordinates T x, a row w T^-1."""
    width = weight_VD.shape[1]
    eye = torch.eye(width, dtype=torch.float64)
    moment = eye if moment_DD is None else moment_DD.double()
    spread, ways = torch.linalg.eigh((moment + moment.T) / 2)
    spread = spread.clamp_min(0) + RIDGE * moment.diagonal().mean().clamp_min(1e-30)
    root = ways * spread.sqrt()  # x = root u, with u of unit variance in every direction
    gram = torch.zeros(width, width, dtype=torch.float64)
    unit = float(weight_VD.abs().max().clamp_min(1e-30))  # products of large weights would overflow float32
    for part in weight_VD.split(_CHUNK):
        centred = part.float() / unit - (mean_D / unit).float()
        gram += (centred.T @ centred).double()
    gram *= unit**2 / len(weight_VD)
    variance, axes = torch.linalg.eigh(root.T @ gram @ root)
    variance, axes = variance.flip(0), axes.flip(1)  # of a logit, by coordinate; falling
    even = variance.clamp_min(float(variance[0]) * 1e-9 + 1e-30) ** 0.25
    project = even.unsqueeze(1) * (axes.T @ (ways / spread.sqrt()).T)
    project = project.float().double()
    return project, torch.linalg.inv(project)


def _round(row_CD: Tensor, largest: int, clips: tuple[float, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Round rows to codes with a bfloat16 scale each; return codes int8, scales and lengths of the errors, float64."""
    if not row_CD.shape[1]:
        zeros = row_CD.new_zeros(len(row_CD))
        return row_CD.to(torch.int8), zeros, zeros
    reach = row_CD.abs().amax(1).clamp_min(1e-30)
    best = torch.full_like(reach, torch.inf)
    codes, scales = torch.zeros_like(row_CD, dtype=torch.int8), torch.zeros_like(reach)
    for clip in clips:
        scale = (reach * clip / largest).to(torch.bfloat16).double()
        tried = (row_CD / scale.unsqueeze(1)).round().clamp(-largest - (largest < 127), largest)
        error = (row_CD - tried * scale.unsqueeze(1)).norm(dim=1)
        better = error < best
        best, scales = torch.where(better, error, best), torch.where(better, scale, scales)
        codes = torch.where(better.unsqueeze(1), tried.to(torch.int8), codes)
    return codes, scales, best


def _up(lengths: Tensor) -> Tensor:
    """Make lengths a little longer, so that bfloat16 does not cut any of them short."""
    return lengths * (1 + 2**-7) + 1e-30
