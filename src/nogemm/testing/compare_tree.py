"""Hold another form of a TreeFFN (packed, another instruction set) against float64.

Legend: N tokens, D width, K trees, L levels, M nodes per tree.
"""

from __future__ import annotations

import copy
import itertools

import torch
from torch import Tensor

from nogemm.layers import ACTIVATIONS, TreeFFN
from nogemm.ops import tree_descend_reference
from nogemm.testing.compare import Mismatch, undecided_bits, unit_roundoff

_COMBINATIONS = 64


def check_tree(name: str, layer: TreeFFN, y_ND: Tensor, x_ND: Tensor, *, slack: float = 4.0) -> float:
    """Compare a float32 form's answers with the float64 layer, token by token.

    A token's error may be `slack` times the worst error of the unpacked layer itself. A token beyond that is accepted
    only if z lies within rounding of the threshold somewhere on its way, and then only against the better of the ways.

    Args:
        layer: the unpacked layer, float32, in evaluation mode.
        y_ND: what the other form answered for x_ND.
    Returns:
        The share of tokens that needed another way.
    Raises:
        Mismatch: a token is explained by no way.
    """
    if x_ND.shape[0] == 0:
        return 0.0
    with torch.no_grad():
        exact = copy.deepcopy(layer).double()
        x = x_ND.double()
        expected = exact.tokens(x)
        plain = (layer.tokens(x_ND).double() - expected).abs().amax(-1)
        near_N = _near(exact, x)
        sure = plain[~near_N]
        bound = slack * float(sure.max() if len(sure) else 0.0)
        bound += 16 * unit_roundoff(torch.float32) * float(expected.abs().amax().clamp_min(1e-30))
        errors = (y_ND.double() - expected).abs().amax(-1)
        beyond = torch.nonzero(~(errors <= bound)).flatten().tolist()
        for n in beyond:
            best = min(float((y_ND[n].double() - y).abs().max()) for y in _ways(exact, x[n]))
            if not best <= bound:
                raise Mismatch(f"{name}: token {n} is off by {float(errors[n]):.3g}, allowed {bound:.3g}")
        return len(beyond) / x_ND.shape[0]


def _near(exact: TreeFFN, x_ND: Tensor) -> Tensor:
    """Mark tokens that come near a threshold on their way, [N]."""
    z_NKL, nodes_NKL = tree_descend_reference(x_ND, exact.weight_in, exact.bias_in, exact.threshold)
    index = nodes_NKL.flatten().long()
    rows = exact.weight_in.flatten(0, 1)
    size = torch.stack([rows[i].abs() @ x for i, x in zip(index, _repeat(x_ND.abs(), z_NKL), strict=True)])
    margin, size = z_NKL.flatten(), size + _flat(exact.bias_in, index).abs()
    bar = _flat(exact.threshold, index)
    return undecided_bits(margin - bar, size + bar.abs(), torch.float32).view(z_NKL.shape).any(-1).any(-1)


def _repeat(x_ND: Tensor, z_NKL: Tensor) -> Tensor:
    return x_ND.repeat_interleave(z_NKL.shape[1] * z_NKL.shape[2], dim=0)


def _flat(values_KM: Tensor | None, index: Tensor) -> Tensor:
    return torch.zeros(index.shape, dtype=torch.float64) if values_KM is None else values_KM.flatten()[index]


def _ways(exact: TreeFFN, x_D: Tensor) -> list[Tensor]:
    """Return the answers of a token for every choice at the nodes where its sign is within rounding."""
    rest = exact.tokens(x_D.unsqueeze(0))[0]
    trees = [_tree_ways(exact, x_D, k, 0) for k in range(exact.config.trees)]
    rest = rest - sum(ways[0] for ways in trees)  # what is not the trees': bias and core; the first way is the sure one
    return [rest + sum(way) for way in itertools.islice(itertools.product(*trees), _COMBINATIONS)]


def _tree_ways(exact: TreeFFN, x_D: Tensor, k: int, node: int) -> list[Tensor]:
    if node >= exact.weight_in.shape[1]:
        return [torch.zeros(exact.d_out, dtype=torch.float64)]
    row = exact.weight_in[k, node]
    bias = torch.zeros(()) if exact.bias_in is None else exact.bias_in[k, node]
    bar = torch.zeros(()) if exact.threshold is None else exact.threshold[k, node]
    z = row @ x_D + bias
    size = row.abs() @ x_D.abs() + bias.abs() + bar.abs()
    fired = ACTIVATIONS[exact.activation](z) * exact.weight_out[k, node]
    right = bool(z > bar)
    sides = [right, not right] if bool(undecided_bits(z - bar, size, torch.float32)) else [right]
    return [fired + below for side in sides for below in _tree_ways(exact, x_D, k, 2 * node + 1 + int(side))]
