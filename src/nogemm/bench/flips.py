"""`nogemm bench flips`: how often rounding sends a token another way, code bits and paths against float64.

A layer's function jumps where a routed value crosses zero, so a kernel in fewer bits, or one that adds in another
order, now and then reads other rows. Nothing is timed. Weights and tokens are random (uniform codes).

A packed layer's kernel says which rows it reads (`PackedFFN.route`), and those say how every decision fell.

Legend: N tokens, D width, T tables or trees, K bits per table or decisions per path, R = 2^K rows per table.
Reading order: `CASES`, `run_flips_bench`, `flip_rate`, `read_bits`, `compare_bits`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nogemm import ops
from nogemm.bench.engine.check import token_errors
from nogemm.bench.engine.result import DTYPES, origin
from nogemm.config import LayerConfig
from nogemm.layers import LookupConfig, TreeConfig
from nogemm.layers._base import FFN, PackedFFN
from nogemm.projections import BHConfig
from nogemm.running.partial import Keep

BATCHES = (1, 4096)
TOKENS = 4096


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
        values_NTK = exact_decisions(layer, x_ND)
        assert values_NTK is not None
        reference_ND = torch.cat([exact(part) for part in x_ND.double().split(1024)])
        del exact
        for isa in ops.supported_isas() or ("reference",):
            with ops.use_isa(isa):
                for dtype in DTYPES:
                    note(f"{case.layer} {isa} {dtype}")
                    packed = layer.pack(dtype)
                    first: Tensor | None = None
                    for batch in batches:
                        found_NTK = read_bits(layer, packed, x_ND, batch)
                        first = found_NTK if first is None else first
                        errors = token_errors(_calls(packed, x_ND, batch), reference_ND)
                        rows.append(
                            {"layer": case.layer, "method": layer.config.kind, "d": case.d}
                            | {"isa": isa, "dtype": dtype, "batch": batch}
                            | compare_bits(found_NTK, values_NTK > 0, values_NTK, path=layer.in_turn)
                            | {"other_batch": float((found_NTK != first).double().mean())}
                            | {"max_error": float(errors.max()), "rms_error": float(errors.square().mean().sqrt())}
                        )
                        keep(head | {"rows": list(rows)})
    return head | {"rows": rows}


def flip_rate(layer: FFN, packed: PackedFFN, x_ND: Tensor, batch: int) -> float | None:
    """Return the share of code bits, or of turns, that the packed layer decides otherwise than the layer in float64.

    Tokens go in calls of `batch`. None for a layer whose route does not hang on signs, and for a tree of one level.
    """
    values_NTK = exact_decisions(layer, x_ND)
    if values_NTK is None or values_NTK.numel() == 0:
        return None
    found_NTK = read_bits(layer, packed, x_ND, batch)
    return compare_bits(found_NTK, values_NTK > 0, values_NTK, path=layer.in_turn)["bits_differ"]


@torch.inference_mode()
def exact_decisions(layer: FFN, x_ND: Tensor) -> Tensor | None:
    """Return what an unpacked layer decides on, in float64."""
    return copy.deepcopy(layer).double().decisions(x_ND.double())


@torch.inference_mode()
def read_bits(layer: FFN, packed: PackedFFN, x_ND: Tensor, batch: int) -> Tensor:
    """Return the bits that the packed layer decides on, bool [N, T, K], with the tokens in calls of `batch`."""
    return layer.decided(torch.cat([packed.route(part).rows for part in x_ND.split(batch)]))


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
