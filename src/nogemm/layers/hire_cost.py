"""What a HireFFN costs: FLOP, bytes and parameters.

Legend: F neurons.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from nogemm.cost import Cost, distinct_rows

if TYPE_CHECKING:
    from nogemm.layers.hire import HireFFN


def cost(layer: HireFFN, n_tokens: int) -> Cost:
    """Count the sketch, the candidates' exact products and the kept neurons; see `HireFFN.cost`."""
    reduce, lift = layer.get_buffer_or_none("sketch_reduce"), layer.get_buffer_or_none("sketch_lift")
    stored = sum(p.numel() for p in (*layer.parameters(), reduce, lift) if p is not None)
    exact, kept = _exact_and_kept(layer)
    if exact == layer.hidden:
        flops = 0.0
    elif reduce is not None:
        flops = 2.0 * len(reduce) * (layer.d_model + layer.hidden)
    else:
        flops = 2.0 * layer.d_model * layer.hidden
    flops += 2.0 * (exact * layer.d_model + kept * (layer.d_model * layer.gated + layer.d_out))
    sketch, rows = traffic(layer, n_tokens)
    return Cost(n_tokens * flops, sketch + rows * layer.up.element_size(), stored)


def traffic(layer: HireFFN, n_tokens: int) -> tuple[float, float]:
    """Return the bytes of the sketch, and how many numbers of rows `n_tokens` tokens touch."""
    if n_tokens == 0:
        return 0.0, 0.0
    exact, kept = _exact_and_kept(layer)
    reduce = layer.get_buffer_or_none("sketch_reduce")
    sketch = layer.d_model * layer.hidden * (0.5 if layer.config.sketch == "int4" else 1.0)
    if reduce is not None:
        sketch = len(reduce) * (4.0 * layer.d_model + layer.hidden)
    rows = _touched(layer, n_tokens, exact) * layer.d_model
    rows += _touched(layer, n_tokens, kept) * (layer.d_model * layer.gated + layer.d_out)
    return (0.0 if exact == layer.hidden else sketch), rows


def _exact_and_kept(layer: HireFFN) -> tuple[int, int]:
    """Count the neurons of a token that are computed exactly, and that are kept."""
    exact = min(layer.hidden, layer.candidates * layer.config.group)
    return exact, min(exact, layer.kept * layer.config.group)


def _touched(layer: HireFFN, n_tokens: int, per_token: int) -> float:
    """Expect the number of distinct neurons, if tokens chose theirs independently and uniformly."""
    return float(layer.hidden) if per_token >= layer.hidden else distinct_rows(n_tokens * per_token, layer.hidden)
