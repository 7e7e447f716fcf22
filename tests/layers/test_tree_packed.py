"""Packed TreeFFN: equal to the unpacked layer on every instruction set, dtype, batch and number of threads."""

import pytest
import torch

from nogemm import ops
from nogemm.layers import TreeConfig, TreeFFN
from nogemm.layers.tree.packed import PackedTree
from nogemm.ops.packed_tree import packed_tree
from nogemm.testing.cases import BATCHES, TREE_CASES, TreeCase
from nogemm.testing.compare import Mismatch, check_equal
from nogemm.testing.compare_tree import check_tree

by_name = pytest.mark.parametrize("case", TREE_CASES, ids=lambda c: c.name)
DTYPES = ("fp32", "bf16", "int8")
# What one neuron on another way costs is a large part of the output; so few tokens may take another way.
FLIPS = 0.05


def build(case: TreeCase) -> TreeFFN:
    layer = case.config.build(case.d_model, case.d_out)
    for name, tensor in (*layer.named_parameters(), *layer.named_buffers()):
        if name != "steps" and not tensor.any():
            torch.nn.init.normal_(tensor, std=0.3)
    return layer.eval().requires_grad_(False)


@pytest.mark.parametrize("dtype", DTYPES)
@by_name
def test_matches_float64_of_the_rounded_weights(isa: str, case: TreeCase, dtype: str) -> None:
    layer = build(case)
    packed, twin = layer.pack(dtype), layer.rounded(dtype)
    for tokens in BATCHES:
        x = torch.randn(tokens, case.d_model)
        other_way = check_tree(f"{case.name} {dtype}", twin, packed(x), x)
        assert other_way <= max(1e-3, 1.5 / max(tokens, 1))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_tie_goes_left(isa: str, dtype: str) -> None:
    """Every number is exact in every precision, so the root's dot product is exactly 0."""
    layer = TreeConfig(depth=1, bias=False, out_bias=False).build(4).eval().requires_grad_(False)
    layer.weight_in.copy_(torch.tensor([[[1.0, -1.0, 0, 0], [1.0, 0, 0, 0], [0, 2.0, 0, 0]]]))
    layer.weight_out.copy_(torch.tensor([[[0.0] * 4, [1.0, 0, 0, 0], [0, 1.0, 0, 0]]]))
    packed = layer.pack(dtype)
    for tokens in (1, 2, 33):
        x = torch.tensor([1.0, 1.0, 0, 0]).repeat(tokens, 1)
        x[1::2, 1] = 0.5  # z = 0.5: right
        went_right = packed(x)[:, 1] != 0
        assert torch.equal(went_right, torch.arange(tokens) % 2 == 1)


def test_check_would_notice_a_wrong_row_and_a_lost_bias() -> None:
    case = TREE_CASES[0]
    layer, x = build(case), torch.randn(33, case.d_model)
    y = layer.pack("fp32")(x)
    assert layer.bias is not None
    for wrong in (y.roll(1, 0), y - layer.bias, torch.zeros_like(y), y * 1.001, y.flip(-1)):
        with pytest.raises(Mismatch, match="token"):
            check_tree("wrong", layer, wrong, x)


def test_check_accepts_the_other_way_of_a_close_call_alone() -> None:
    layer = TreeConfig(depth=1, bias=False, out_bias=False).build(2).eval().requires_grad_(False)
    layer.weight_in[0, 0], layer.weight_out[0, 0] = torch.tensor([1.0, -1.0]), 0.0
    for x1, accepted in ((1.0 + 2**-23, True), (1.1, False)):
        x = torch.tensor([[1.0, x1]])
        y = layer(x)
        layer.weight_in[0, 0] *= -1  # go the other way; the root adds nothing
        other = layer(x)
        layer.weight_in[0, 0] *= -1
        assert not torch.allclose(other, y)
        if accepted:
            assert check_tree("close", layer, other, x) == 1.0
        else:
            with pytest.raises(Mismatch):
                check_tree("clear", layer, other, x)


@pytest.mark.parametrize("dtype", ["bf16", "int8"])
@by_name
def test_reduced_precision_stays_close(isa: str, case: TreeCase, dtype: str) -> None:
    layer = build(case)
    x = torch.randn(400, case.d_model)
    exact, y = layer(x), layer.pack(dtype)(x)
    errors = (y - exact).square().mean(-1).sqrt() / exact.square().mean().sqrt()
    assert float(errors.median()) < 0.02
    visits = case.config.trees * (case.config.depth + 1)
    assert float((errors > 0.1).float().mean()) < min(FLIPS, 0.01 * visits + 0.005)


@pytest.mark.parametrize("dtype", DTYPES)
@by_name
def test_threads_and_batches_give_equal_bits(isa: str, case: TreeCase, dtype: str) -> None:
    packed = build(case).pack(dtype)
    for tokens in (1, 5, 700):
        x = torch.randn(tokens, case.d_model)
        torch.set_num_threads(1)
        one = packed(x)
        torch.set_num_threads(2)
        check_equal(f"{tokens} tokens", packed(x), one)
        check_equal("alone", packed(x[-1:]), one[-1:])


@pytest.mark.parametrize("dtype", DTYPES)
def test_not_finite_tokens_stay_alone(isa: str, dtype: str) -> None:
    for case in TREE_CASES:
        packed = build(case).pack(dtype)
        x = torch.randn(40, case.d_model)
        clean = packed(x)
        x[3, 0], x[17, -1], x[20] = float("nan"), float("inf"), -float("inf")
        y = packed(x)
        for n in (3, 17, 20):
            assert y[n].isnan().all(), case.name
        keep = torch.tensor([n for n in range(40) if n not in (3, 17, 20)])
        check_equal(case.name, y[keep], clean[keep])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@by_name
def test_input_dtypes(isa: str, case: TreeCase, dtype: torch.dtype) -> None:
    packed = build(case).pack("fp32")
    x = torch.randn(9, case.d_model).to(dtype)
    check_equal("rounded at the end", packed(x), packed(x.float()).to(dtype))


def test_many_trees_are_shared_among_threads(isa: str) -> None:
    layer = TreeConfig(trees=130, depth=3, core=3).build(384).eval().requires_grad_(False)
    packed = layer.pack("bf16")
    x = torch.randn(1, 384)
    torch.set_num_threads(2)
    shared = packed(x)
    check_equal("one token in a batch of many", packed(x.expand(40, 384))[:1], shared)
    torch.testing.assert_close(shared, layer.rounded("bf16")(x), rtol=1e-4, atol=1e-4)


def test_without_the_extension_the_answer_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    for case in TREE_CASES:
        layer, x = build(case), torch.randn(20, case.d_model)
        native = [layer.pack(dtype)(x) for dtype in DTYPES]
        monkeypatch.setattr("nogemm.layers.tree.packed.native_available", lambda: False)
        for dtype, y in zip(DTYPES, native, strict=True):
            packed = layer.pack(dtype)
            assert isinstance(packed, PackedTree)
            assert not packed.native
            torch.testing.assert_close(packed(x), y, rtol=1e-4, atol=1e-5)
        monkeypatch.undo()


def test_wrong_buffers_are_errors_not_crashes() -> None:
    layer = build(TREE_CASES[0])
    packed = layer.pack("fp32")
    buffer, x = packed.get_buffer("packed"), torch.randn(2, layer.d_model)
    for bad in (buffer[:40], torch.zeros_like(buffer), buffer[64:], buffer[:-64]):
        with pytest.raises(ValueError, match="not a packed TreeFFN"):
            packed_tree(x, bad, layer.d_out)
    with pytest.raises(ValueError, match="d_out"):
        packed_tree(x, buffer, layer.d_out + 1)
    assert not packed.state_dict()
    assert ops.native_available()
