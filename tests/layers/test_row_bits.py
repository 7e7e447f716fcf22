"""LookupFFNs whose rows are trained through their rounding: what is packed is what was trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import nogemm
from nogemm.layers import LookupFFN
from nogemm.ops._packing import integer_rows, rounded_rows
from nogemm.projections import BHConfig
from nogemm.testing.compare import check_equal


def build(bits: int | None, **more: Any) -> LookupFFN:
    torch.manual_seed(0)
    config = nogemm.LookupConfig(tables=6, bits=4, projection=BHConfig(block=8), row_bits=bits, **more)
    return config.build(24, 70)


@pytest.mark.parametrize(("bits", "most"), [(4, 7), (8, 127)])
def test_rows_become_integers_and_gradients_pass(bits: int, most: int) -> None:
    rows = torch.randn(5, 9).double().requires_grad_()
    steps, scale = integer_rows(rows.detach(), bits)
    assert steps.abs().amax(-1).tolist() == [most] * 5
    assert float((steps * scale.unsqueeze(-1) - rows).abs().max() / scale.max()) <= 0.5 + 1e-5
    found = rounded_rows(rows, bits)
    check_equal("values", found.detach(), (steps * scale.unsqueeze(-1)).double())
    weight = torch.randn(5, 9).double()
    (found * weight).sum().backward()
    assert rows.grad is not None
    check_equal("gradient", rows.grad, weight)


@pytest.mark.parametrize("bits", [4, 8])
def test_training_reads_what_is_packed(isa: str, bits: int) -> None:
    layer, plain = build(bits), build(None)
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(33, 24)
    with torch.no_grad():
        plain.tables.copy_(rounded_rows(layer.tables, bits))
    check_equal("forward", layer(x), plain(x))
    for twin in (layer, plain):
        twin(x).square().sum().backward()
    for name, parameter in layer.named_parameters():
        found, wanted = parameter.grad, plain.get_parameter(name).grad
        assert found is not None
        assert wanted is not None
        check_equal(name, found, wanted)
    layer.eval()
    # Packed, only the hash is rounded.
    exact, packed = layer(x), layer.pack("int8")(x)
    assert float((packed - exact).square().mean().sqrt() / exact.square().mean().sqrt()) < 0.01


@pytest.mark.parametrize("bits", [4, 8])
def test_compressed_tables_hold_the_same_rows(bits: int, tmp_path: Path) -> None:
    layer = build(bits).eval()
    x = torch.randn(7, 24)
    packed = layer.pack("int8").get_buffer("packed").clone()
    before = layer(x)
    layer.compress("int8")
    torch.testing.assert_close(layer(x), before)
    assert int(layer.tables.abs().max()) <= 2 ** (bits - 1) - 1
    check_equal("packed", layer.pack("int8").get_buffer("packed"), packed)
    layer.decompress()
    torch.testing.assert_close(layer(x), before)
    assert nogemm.layer_config(layer.config.to_dict()) == layer.config


def test_four_bits_take_half_the_room() -> None:
    sizes = {bits: build(bits).eval().pack("int8").get_buffer("packed").numel() for bits in (4, 8, None)}
    assert sizes[8] == sizes[None]
    rows = 6 * 16 * 128  # 70 columns are stored as 128
    assert sizes[8] - sizes[4] == rows // 2
    share = build(4).packed_share("int8")
    assert 0.5 < share < 0.9
    assert build(8).packed_share("int8") == build(4).packed_share("bf16") == 1.0


def test_a_layer_is_trained_through_its_rounding() -> None:
    """What 4 bits cost at first is won back: the rows move until their rounding fits."""
    torch.manual_seed(1)
    x, wanted = torch.randn(64, 24), torch.randn(64, 70)
    layer = build(4)
    optimiser = torch.optim.Adam(layer.parameters(), lr=3e-2)
    losses = []
    for _ in range(60):
        loss = (layer(x) - wanted).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss))
    assert losses[-1] < 0.5 * losses[0]
    packed = layer.eval().pack("int8")
    assert float((packed(x) - wanted).square().mean()) < 0.6 * losses[0]


@pytest.mark.parametrize("bits", [3, 16, True, 4.0, "4"])
def test_other_numbers_of_bits_are_refused(bits: Any) -> None:
    with pytest.raises(nogemm.ConfigError, match="row_bits must be 8, 4 or none"):
        nogemm.LookupConfig(row_bits=bits)
