"""The reference's LookupFFN, transcribed naively in float64, against the imported layer."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import nogemm
from nogemm.layers import LookupFFN


def naive(state: dict[str, Tensor], x: Tensor, eps: float, mix: float) -> Tensor:
    """Compute one token after the other, straight from the formulas, with the unnormalised Hadamard matrix."""
    rows = []
    for token in x:
        centred = token - token.mean()
        a = centred / torch.sqrt(centred.square().mean() + eps)
        a = a * state["LayerNorm.weight"] + state["LayerNorm.bias"]
        weight, bias = state["hash.projection.weight"], state["hash.projection.bias"]
        z = (weight @ a if weight.dim() == 2 else naive_bh4(weight, a, mix)[: len(bias)]) + bias
        tables = state["tables"]
        bits = int(math.log2(tables.shape[1]))
        y = state["bias"].clone()
        for k, table in enumerate(tables):
            part = z[k * bits : (k + 1) * bits].tolist()
            code = int("".join("1" if value > 0 else "0" for value in part), 2)
            amount = sum(abs(value) for value in part)
            for value in part:
                amount *= 1.0 / (1.0 + math.exp(-2.0 * abs(value)))
            y = y + amount * table[code]
        rows.append(y)
    return torch.stack(rows)


def naive_bh4(weight: Tensor, a: Tensor, mix: float) -> Tensor:
    repeats, rounds, blocks, block, _ = weight.shape
    width = blocks * block
    padded = torch.cat([a, torch.zeros(width - len(a), dtype=a.dtype)])
    signs = [[(-1.0) ** bin(i & j).count("1") for j in range(width)] for i in range(width)]
    hadamard = torch.tensor(signs, dtype=a.dtype)
    parts = []
    for r in range(repeats):
        v = padded
        for j in range(rounds):
            v = torch.cat([weight[r, j, k] @ v[k * block : (k + 1) * block] for k in range(blocks)])
            v = v @ hadamard
        parts.append(mix * v + (1.0 - mix) * padded)
    return torch.cat(parts)


def reference_state(d: int, tables: int, bits: int, block: int | None, d_out: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(d + tables)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    width = 1 << (d - 1).bit_length()
    if block is None:
        weight = draw(tables * bits, d) / math.sqrt(d)
    else:
        repeats = max(1, math.ceil(tables * bits / width))
        weight = draw(repeats, 4, width // block, block, block) / math.sqrt(block * width)
    return {
        "LayerNorm.weight": 1.0 + 0.1 * draw(d),
        "LayerNorm.bias": 0.1 * draw(d),
        "hash.projection.weight": weight,
        "hash.projection.bias": 0.1 * draw(tables * bits),
        "tables": draw(tables, 2**bits, d_out),
        "bias": draw(d_out),
    }


SHAPES = [
    (16, 4, 3, 4, 16),  # one repeat, cut
    (16, 10, 4, 16, 16),  # three repeats, whole blocks
    (12, 5, 2, 2, 7),  # padded input, other output width
    (16, 3, 5, 1, 16),  # blocks of one
    (12, 4, 3, None, 12),  # dense projection
]


@pytest.mark.parametrize(("d", "tables", "bits", "block", "d_out"), SHAPES)
@pytest.mark.parametrize(("eps", "mix"), [(1e-5, 0.7), (1e-2, 0.4)])
def test_equal_to_the_naive_reference(
    d: int, tables: int, bits: int, block: int | None, d_out: int, eps: float, mix: float
) -> None:
    state = reference_state(d, tables, bits, block, d_out)
    x = torch.randn(20, d, dtype=torch.float64)
    layer = nogemm.importers.lookupffn(state, eps=eps, mix=mix)
    assert isinstance(layer, LookupFFN)
    assert layer.fitted == "exact"
    torch.testing.assert_close(layer(x), naive(state, x, eps, mix), rtol=1e-9, atol=1e-9)
    # Negative control: the comparison sees blocks that are transposed, as in the reference's CPU code.
    if block != 1:
        wrong = {**state, "hash.projection.weight": state["hash.projection.weight"].flip(-1)}
        assert not torch.allclose(layer(x), naive(wrong, x, eps, mix), rtol=1e-3, atol=1e-3)


def test_float32_checkpoints_give_float32_layers() -> None:
    state = {key: value.float() for key, value in reference_state(16, 4, 3, 4, 16).items()}
    layer = nogemm.importers.lookupffn(state)
    assert {p.dtype for p in layer.parameters()} == {torch.float32}
    assert layer(torch.randn(2, 3, 16)).shape == (2, 3, 16)


def test_an_imported_layer_owns_its_weights() -> None:
    state = reference_state(16, 4, 3, 4, 16)
    layer = nogemm.importers.lookupffn(state)
    state["tables"].zero_()
    assert layer.get_parameter("tables").abs().sum() > 0


@pytest.mark.parametrize("key", list(reference_state(16, 4, 3, 4, 16)))
def test_a_missing_key_is_named(key: str) -> None:
    state = reference_state(16, 4, 3, 4, 16)
    del state[key]
    with pytest.raises(nogemm.CheckpointError, match=rf"missing: {key}\."):
        nogemm.importers.lookupffn(state)


def test_an_unknown_key_is_named() -> None:
    state = {**reference_state(16, 4, 3, 4, 16), "FFN.extra": torch.zeros(1)}
    with pytest.raises(nogemm.CheckpointError, match=r"unknown: FFN\.extra"):
        nogemm.importers.lookupffn(state)


@pytest.mark.parametrize("block", [4, None])
@pytest.mark.parametrize("key", list(reference_state(16, 4, 3, 4, 16)))
@pytest.mark.parametrize("change", [lambda t: t[..., :-1], lambda t: t.unsqueeze(0), lambda t: t[:0]])
def test_a_wrong_shape_is_named(key: str, block: int | None, change: Callable[[Tensor], Tensor]) -> None:
    state = reference_state(16, 4, 3, block, 16)
    state[key] = change(state[key])
    # A width is read from one key and checked in the others, so the message may name the partner that disagrees.
    with pytest.raises(nogemm.CheckpointError, match=r"(LayerNorm|hash\.projection)\.(weight|bias)|tables|bias"):
        nogemm.importers.lookupffn(state)


def test_rows_must_be_a_power_of_two() -> None:
    state = reference_state(16, 4, 3, 4, 16)
    state["tables"] = state["tables"][:, :7]
    with pytest.raises(nogemm.CheckpointError, match=r"tables: the second dimension must be 2\^bits.*got 7"):
        nogemm.importers.lookupffn(state)


def test_blocks_that_do_not_divide_are_named() -> None:
    state = reference_state(16, 4, 3, 4, 16)
    state["hash.projection.weight"] = torch.zeros(1, 4, 5, 3, 3, dtype=torch.float64)
    with pytest.raises(nogemm.CheckpointError, match=r"hash\.projection\.weight has blocks of 3, which do not"):
        nogemm.importers.lookupffn(state)
