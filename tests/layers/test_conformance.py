"""What holds of every registered layer, unpacked and packed: a new kind joins by itself (`nogemm.testing.cases.KINDS`).

What a method adds to this stands in its own file.
"""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nogemm.bench.engine.rounding import check_packed
from nogemm.config import LayerConfig, layer_config
from nogemm.errors import ConfigError, DtypeError, PackedError, ShapeError
from nogemm.layers import FFN, PACK_DTYPES, PackedFFN
from nogemm.testing.cases import KINDS
from nogemm.testing.compare import check_equal
from nogemm.testing.compare_model import check_same_model

D, OUT, HIDDEN = 32, 24, 48
# Layers whose every product is a native kernel's: their bits do not depend on threads.
NATIVE = ("hire", "lookup", "tree", "yoso")
kinds = pytest.mark.parametrize("kind", KINDS)
packings = pytest.mark.parametrize("dtype", PACK_DTYPES)


def build(kind: str, out: int = OUT) -> FFN:
    layer = KINDS[kind].build(D, out, hidden=HIDDEN).eval().requires_grad_(False)
    for parameter in layer.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    return layer


def typical(y: Tensor, expected: Tensor) -> float:
    """Return the median over tokens of |y - expected| / |expected|: a code bit of a token may fall otherwise."""
    return float(((y - expected).norm(dim=-1) / expected.norm(dim=-1).clamp_min(1e-30)).median())


@kinds
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_any_leading_dimensions_and_dtypes(kind: str, x_dtype: torch.dtype) -> None:
    layer = build(kind)
    for run in (layer, layer.pack("fp32"), layer.pack("int8")):
        for shape in ((D,), (0, D), (2, 0, D), (2, 3, D)):
            y = run(torch.randn(shape).to(x_dtype))
            assert y.shape == (*shape[:-1], OUT)
            assert y.dtype == x_dtype
    assert layer.to(x_dtype)(torch.randn(3, D)).dtype == torch.float32


@kinds
def test_bad_input_is_named(kind: str) -> None:
    layer = build(kind)
    for run in (layer, layer.pack("fp32")):
        name = type(run).__name__
        with pytest.raises(ShapeError, match=rf"{name}: expected last dim 32, got x of shape \(2, 9\)"):
            run(torch.randn(2, 9))
        with pytest.raises(DtypeError, match=r"floating-point x, got torch\.int64"):
            run(torch.ones(2, D, dtype=torch.int64))
    with pytest.raises(ConfigError, match="widths must be positive"):
        KINDS[kind].build(0)


@kinds
@pytest.mark.parametrize("broken", [float("nan"), float("inf"), -float("inf")])
def test_broken_tokens_stay_alone(kind: str, broken: float) -> None:
    layer = build(kind)
    for run in (layer, layer.pack("fp32"), layer.pack("bf16")):
        x = torch.randn(40, D)
        clean = run(x)
        x[3, 0], x[17, -1], x[20] = broken, broken, broken
        y = run(x)
        for n in (3, 17, 20):
            assert y[n].isnan().all(), type(run).__name__
        whole = [n for n in range(40) if n not in (3, 17, 20)]
        torch.testing.assert_close(y[whole], clean[whole])


@kinds
@packings
def test_a_token_alone_is_answered_as_in_company(isa: str, kind: str, dtype: str) -> None:
    layer = build(kind)
    packed = layer.pack(dtype)
    x = torch.randn(70, D)
    alone = torch.cat([packed(token.unsqueeze(0)) for token in x])
    # Dynamic int8 has one step for the activations of a call.
    # Int8 rows stand beside tokens of 16 bits where they are read one by one, beside float32 where all are multiplied.
    bounds = {"fp32": 1e-5, "bf16": 1e-2, "int8": 0.05 if layer.dynamic_int8 else 1e-3}
    bound = bounds[dtype]
    assert typical(alone, packed(x)) < bound
    assert typical(alone.roll(1, 0), packed(x)) > 10 * bound or kind == "no"


@kinds
@packings
def test_threads_do_not_matter(isa: str, kind: str, dtype: str) -> None:
    packed = build(kind).pack(dtype, path="rows")
    for tokens in (1, 70, 600):
        x = torch.randn(tokens, D)
        torch.set_num_threads(1)
        one = packed(x)
        torch.set_num_threads(2)
        two = packed(x)
        if kind in NATIVE and packed.native:
            check_equal(f"{tokens} tokens", two, one)
        else:
            assert typical(two, one) < 1e-5


@kinds
def test_config_and_state_round_trip(kind: str) -> None:
    config: LayerConfig[Any] = KINDS[kind]
    layer = build(kind)
    again = layer_config(json.loads(json.dumps(config.to_dict())))
    assert again == config
    twin = again.build(D, OUT, hidden=HIDDEN).eval()
    twin.load_state_dict(layer.state_dict())
    x = torch.randn(9, D)
    check_same_model(kind, twin, layer, lambda module: module(x.to(next(module.parameters(), x).dtype)))


@kinds
@packings
def test_packed_is_the_unpacked_layer_within_rounding(isa: str, kind: str, dtype: str) -> None:
    layer, x = build(kind), torch.randn(200, D)

    def answer(module: nn.Module, computed_in: torch.dtype) -> Tensor:
        return module(x.to(computed_in))

    with torch.inference_mode():
        packed = layer.pack(dtype)
        facts = check_packed(layer, layer.rounded(dtype), packed(x), dtype, answer)
        assert facts["verified"], facts
        wrong = check_packed(layer, layer.rounded(dtype), -packed(x), dtype, answer)
        assert not wrong["verified"]


@kinds
def test_packed_layers_are_for_evaluation(kind: str) -> None:
    layer = build(kind).requires_grad_(True)
    with pytest.raises(PackedError, match="training mode"):
        copy.deepcopy(layer).train().pack()
    packed = layer.pack()
    assert isinstance(packed, PackedFFN)
    assert not any(parameter.requires_grad for parameter in packed.parameters())
    with pytest.raises(PackedError, match="evaluation only"):
        packed.train()
    x = torch.randn(3, D, requires_grad=True)
    with pytest.raises(PackedError, match="no gradient"):
        packed(x).sum().backward()


@kinds
def test_cost_counts_parameters_and_adds_up(kind: str) -> None:
    layer = build(kind)
    one, none = layer.cost(1), layer.cost(0)
    assert one.parameters == sum(p.numel() for p in layer.parameters())
    assert layer.cost(6).flops == pytest.approx(6 * one.flops)
    assert none.flops == none.bytes_read == 0
    assert layer.cost(6).bytes_read <= 6 * one.bytes_read + 1e-6
    assert layer.cost(6).bytes_read >= one.bytes_read
    assert (one.flops > 0) == (kind != "no")


@kinds
def test_optimiser_groups_hold_every_parameter_once(kind: str) -> None:
    layer = build(kind).requires_grad_(True)
    grouped = [p for group in layer.optimiser_groups().values() for p in group]
    assert sorted(map(id, grouped)) == sorted(id(p) for p in layer.parameters() if p.requires_grad)


@kinds
def test_training_lowers_the_loss(kind: str) -> None:
    layer = build(kind).requires_grad_(True).train()
    x = torch.randn(256, D)
    goal = torch.tanh(x @ torch.randn(D, OUT) / D**0.5) + 0.5
    optimiser = torch.optim.AdamW(layer.parameters(), lr=1e-2)
    losses = []
    for _ in range(40):
        optimiser.zero_grad()
        loss = (layer(x) - goal).square().mean()
        loss.backward()
        losses.append(loss.item())
        optimiser.step()
    assert losses[-1] < 0.9 * losses[0]


@kinds
def test_gradients_agree_with_float64(kind: str) -> None:
    layer = build(kind).requires_grad_(True)
    wide, x = copy.deepcopy(layer).double(), torch.randn(50, D)
    pull = torch.randn(50, OUT)
    (layer(x) * pull).sum().backward()
    (wide(x.double()) * pull.double()).sum().backward()
    for (name, ours), theirs in zip(layer.named_parameters(), wide.parameters(), strict=True):
        if theirs.grad is None or not theirs.grad.any():
            assert ours.grad is None or not ours.grad.any(), name
            continue
        assert ours.grad is not None, name
        apart = float((ours.grad.double() - theirs.grad).norm() / theirs.grad.norm())
        assert apart < 1e-3, (name, apart)
