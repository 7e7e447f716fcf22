"""`nogemm bench flips`: how often rounding sends a token another way, code bits and paths against float64.

A layer's function jumps where a routed value crosses zero, so a kernel in fewer bits, or one that adds in another
order, now and then reads other rows. Nothing is timed. Weights and tokens are random (uniform codes).

What a packed layer chose is not among its outputs. So it is packed once more with the same router and other rows, ones
that say where they stand (`marked_tables`, `marked_leaves`), and the choice is read off its output, bit by bit.

Legend: N tokens, D width, T tables or trees, K bits per table or decisions per path, R = 2^K rows per table.
Reading order: `CASES`, `run_flips_bench`, `flip_rate`, `read_bits`, `compare_bits`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from nogemm import ops
from nogemm.bench.engine.check import token_errors
from nogemm.bench.engine.result import DTYPES, origin
from nogemm.config import LayerConfig
from nogemm.layers import LookupConfig, LookupFFN, TreeConfig, TreeFFN
from nogemm.projections import BHConfig
from nogemm.running.partial import Keep

BATCHES = (1, 4096)
TOKENS = 4096
_PROBE_NUMBERS = 1 << 26  # of the tables of one probe: 256 MB in float32


@dataclass(frozen=True, kw_only=True)
class FlipCase:
    """Name a shape whose packed forms are measured."""

    layer: str
    d: int
    config: LayerConfig[Any]


CASES = (
    FlipCase(layer="minilm", d=384, config=LookupConfig(tables=64, bits=8, projection=BHConfig(block=64))),
    FlipCase(layer="small", d=512, config=LookupConfig(tables=128, bits=8, projection=BHConfig(block=64))),
    FlipCase(layer="base", d=768, config=LookupConfig(tables=170, bits=9, projection=BHConfig(block=64))),
    FlipCase(layer="tree 1x11", d=768, config=TreeConfig(trees=1, depth=11)),
)


def run_flips_bench(
    cases: Sequence[FlipCase] = CASES,
    *,
    batches: Sequence[int] = BATCHES,
    tokens: int = TOKENS,
    seed: int = 0,
    note: Callable[[str], None] = lambda line: None,
    keep: Keep = lambda result: None,
) -> dict[str, Any]:
    """Measure every case in every packed dtype, on every instruction set of this machine and build, at every batch.

    Args:
        batches: tokens per call; the same tokens are cut into calls of each size.
        note: called with a line of progress.
        keep: called with the result so far.
    Returns:
        `origin` and {"rows"}: "layer", "method", "d", "isa", "dtype", "batch", the shares of
        `compare_bits`, "other_batch" (share of bits that differ from those of the first batch size, same kernel), and
        "max_error", "rms_error" of the output as `nogemm.bench.engine.check.compare` defines them.
    """
    settings = {"tokens": tokens, "batch": list(batches), "seed": seed}
    layers = {case.layer: {"d": case.d, "config": case.config.to_dict()} for case in cases}
    head = origin(settings | {"layers": layers})
    rows: list[dict[str, Any]] = []
    for case in cases:
        torch.manual_seed(seed)
        layer = case.config.build(case.d).eval().requires_grad_(False)
        x_ND = torch.randn(tokens, case.d, generator=torch.Generator().manual_seed(seed + 1))
        exact = copy.deepcopy(layer).double()
        values_NTK, bits_NTK = exact_bits(exact, x_ND.double())
        reference_ND = torch.cat([exact(part) for part in x_ND.double().split(1024)])
        del exact
        for isa in ops.supported_isas() or ("reference",):
            with ops.use_isa(isa):
                for dtype in DTYPES:
                    note(f"{case.layer} {isa} {dtype}")
                    packed = layer.pack(dtype)
                    first: Tensor | None = None
                    for batch in batches:
                        found_NTK = read_bits(layer, dtype, x_ND, batch)
                        first = found_NTK if first is None else first
                        errors = token_errors(_calls(packed, x_ND, batch), reference_ND)
                        rows.append(
                            {"layer": case.layer, "method": layer.config.kind, "d": case.d}
                            | {"isa": isa, "dtype": dtype, "batch": batch}
                            | compare_bits(found_NTK, bits_NTK, values_NTK, path=isinstance(layer, TreeFFN))
                            | {"other_batch": float((found_NTK != first).double().mean())}
                            | {"max_error": float(errors.max()), "rms_error": float(errors.square().mean().sqrt())}
                        )
                        keep(head | {"rows": list(rows)})
    return head | {"rows": rows}


def flip_rate(layer: LookupFFN | TreeFFN, dtype: str, x_ND: Tensor, batch: int) -> float | None:
    """Return the share of code bits, or of turns, that the packed layer decides otherwise than the layer in float64.

    Tokens go in calls of `batch`. None for a tree of a single level, which decides nothing.
    """
    values_NTK, bits_NTK = exact_bits(copy.deepcopy(layer).double(), x_ND.double())
    if bits_NTK.numel() == 0:
        return None
    found_NTK = read_bits(layer, dtype, x_ND, batch)
    return compare_bits(found_NTK, bits_NTK, values_NTK, path=isinstance(layer, TreeFFN))["bits_differ"]


def exact_bits(layer: LookupFFN | TreeFFN, x_ND: Tensor) -> tuple[Tensor, Tensor]:
    """Return what an unpacked layer decides on, [N, T, K], and its bits: value > 0, or > threshold in a tree."""
    with torch.inference_mode():
        if isinstance(layer, LookupFFN):
            z_NM = layer.projection(x_ND if layer.norm is None else layer.norm(x_ND))
            values_NTK = z_NM.unflatten(-1, (layer.config.tables, layer.config.bits))
        else:
            z_NTL, nodes_NTL = layer.paths(x_ND)
            bar = 0.0 if layer.threshold is None else layer.threshold.flatten()[nodes_NTL.long()]
            values_NTK = (z_NTL - bar)[..., :-1]  # a leaf decides nothing
        return values_NTK, values_NTK > 0


def read_bits(layer: LookupFFN | TreeFFN, dtype: str, x_ND: Tensor, batch: int) -> Tensor:
    """Return the bits that the packed layer decides on, bool [N, T, K], with the tokens in calls of `batch`."""
    if isinstance(layer, TreeFFN):
        y_ND = _calls(marked_leaves(layer).pack(dtype), x_ND, batch)
        fire_NT1, marks_NTK = y_ND.unflatten(-1, (layer.config.trees, layer.levels)).split((1, layer.levels - 1), -1)
        return _signs(marks_NTK * fire_NT1)
    tables, bits = layer.config.tables, layer.config.bits
    group = max(1, min(tables, _PROBE_NUMBERS // (layer.tables.shape[:2].numel() * bits)))
    parts = []
    for first in range(0, tables, group):
        last = min(first + group, tables)
        y_ND = _calls(marked_tables(layer, first, last).pack(dtype), x_ND, batch)
        parts.append(y_ND.unflatten(-1, (last - first, bits)))
    return _signs(torch.cat(parts, dim=1))


def marked_tables(layer: LookupFFN, first: int, last: int) -> LookupFFN:
    """Return the layer with rows that say their code, for the tables from `first` to before `last`.

        y[n, (t, j)] = score[n, t] * (+1 if bit j of the code of token n in table t is set, else -1)

    Scores are positive, and rows of 0, 1 and -1 are exact in every dtype. Further neighbours are left out: which they
    are follows from the same values, and their rows would hide the first one's.
    """
    config = layer.config
    plain = replace(config, neighbours=1, bias=False, storage="fp32")
    probe = plain.build(layer.d_model, (last - first) * config.bits)
    probe.projection.load_state_dict(layer.projection.state_dict())
    if probe.norm is not None and layer.norm is not None:
        probe.norm.load_state_dict(layer.norm.state_dict())
    marks_RK = code_marks(config.bits)
    with torch.no_grad():
        probe.tables.zero_()
        for t in range(first, last):
            start = (t - first) * config.bits
            probe.tables[t, :, start : start + config.bits] = marks_RK
    return probe.eval().requires_grad_(False)


def marked_leaves(layer: TreeFFN) -> TreeFFN:
    """Return the tree with out-rows of 0, 1 and -1: a leaf answers act(z) (1, then +1 or -1 for each turn to it).

    Turns do not depend on the activation, so it is SiLU whatever the layer's is: relu answers half of all leaves, and
    gelu those of very negative z, with a zero that tells nothing.
    """
    config, depth = layer.config, layer.levels - 1
    probe = copy.deepcopy(layer)
    marks = torch.zeros(config.trees, 2**layer.levels - 1, config.trees, layer.levels)
    for t in range(config.trees):
        marks[t, -(2**depth) :, t, :1] = 1.0
        marks[t, -(2**depth) :, t, 1:] = code_marks(depth)
    probe.activation = "silu"
    probe.d_out = config.trees * layer.levels
    probe.weight_out = torch.nn.Parameter(marks.flatten(2), requires_grad=False)
    probe.core_in = probe.core_in_bias = probe.core_out = probe.bias = None
    return probe


def code_marks(bits: int) -> Tensor:
    """Return +1 for a set bit of every code, else -1, most significant first, [2^K, K]."""
    codes_R1 = torch.arange(2**bits).unsqueeze(-1)
    return 2.0 * ((codes_R1 >> torch.arange(bits - 1, -1, -1)) & 1) - 1.0


def compare_bits(found_NTK: Tensor, exact_NTK: Tensor, values_NTK: Tensor, *, path: bool) -> dict[str, float]:
    """Count what differs from float64.

    Args:
        values_NTK: what float64 decided on.
        path: bits are turns of a path: after the first that differs the others are other neurons', and do not count.
    Returns:
        shares of the bits, codes (or paths) and tokens with a difference; "bits" compared; "widest": the largest
        size of a value whose bit differs, as a share of all values' root mean square (0: none differs).
    """
    wrong_NTK = found_NTK != exact_NTK
    compared = torch.tensor(wrong_NTK.numel())
    if path:
        before_NTK = wrong_NTK.cumsum(-1) - wrong_NTK.long()
        wrong_NTK = wrong_NTK & (before_NTK == 0)
        compared = (before_NTK == 0).sum()
    wrong_NT = wrong_NTK.any(-1)
    size = values_NTK.square().mean().sqrt()
    widest = values_NTK.abs()[wrong_NTK].amax() / size if bool(wrong_NTK.any()) else torch.zeros(())
    return {
        "bits": int(compared),
        "bits_differ": float(wrong_NTK.sum() / compared),
        "codes_differ": float(wrong_NT.double().mean()),
        "tokens_differ": float(wrong_NT.any(-1).double().mean()),
        "widest": float(widest),
    }


def _calls(packed: torch.nn.Module, x_ND: Tensor, batch: int) -> Tensor:
    with torch.inference_mode():
        return torch.cat([packed(part) for part in x_ND.split(batch)])


def _signs(marks_NTK: Tensor) -> Tensor:
    """Turn marks into bits; every one must have been answered."""
    if not bool((marks_NTK != 0).all()):
        raise ArithmeticError("a score or an activation is zero, so the row that was read cannot be told")
    return marks_NTK > 0
