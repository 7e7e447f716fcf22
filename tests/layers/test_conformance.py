"""What holds of every registered layer, unpacked and packed: a new kind joins by itself (`nogemm.testing.cases.KINDS`).

What a method adds to this stands in its own file. Widths are odd, so that no vector of any instruction set and no
block divides them.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from nogemm.bench.engine.rounding import check_packed
from nogemm.config import LayerConfig, layer_config
from nogemm.errors import ConfigError, DtypeError, PackedError, ShapeError
from nogemm.layers import FFN, PACK_DTYPES, PackedFFN
from nogemm.layers.token_table.layer import make_ids_up
from nogemm.ops.hadamard import hadamard_flops
from nogemm.testing.cases import KINDS
from nogemm.testing.compare import check_equal
from nogemm.testing.compare_model import check_same_model

D, OUT, HIDDEN = 37, 43, 51
# Layers whose every product is a native kernel's: their bits do not depend on threads.
NATIVE = ("hire", "lookup", "tree", "yoso")
# Of those, the ones that answer a token alone and one of many by the same sums in the same order.
ROW_BY_ROW = ("hire", "tree")
kinds = pytest.mark.parametrize("kind", KINDS)
packings = pytest.mark.parametrize("dtype", PACK_DTYPES)
forms = pytest.mark.parametrize("form", ["unpacked", *PACK_DTYPES])


def build(kind: str, out: int = OUT) -> FFN:
    layer = KINDS[kind].build(D, out, hidden=HIDDEN).eval().requires_grad_(False)
    make_ids_up(layer)
    for parameter in layer.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    return layer


def build_form(kind: str, form: str, path: str = "auto") -> FFN | PackedFFN:
    layer = build(kind)
    return layer if form == "unpacked" else layer.pack(form, path)


def is_native(kind: str, run: nn.Module) -> bool:
    return kind in NATIVE and isinstance(run, PackedFFN) and bool(run.native)


def typical(y: Tensor, expected: Tensor) -> float:
    """Return the median over tokens of |y - expected| / |expected|: a code bit of a token may fall otherwise."""
    y, expected = y.float(), expected.float()
    return float(((y - expected).norm(dim=-1) / expected.norm(dim=-1).clamp_min(1e-30)).median())


@kinds
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_any_leading_dimensions_and_dtypes(kind: str, x_dtype: torch.dtype) -> None:
    layer = build(kind)
    for run in (layer, *(layer.pack(dtype) for dtype in PACK_DTYPES)):
        for shape in ((D,), (0, D), (2, 0, D), (2, 3, D)):
            y = run(torch.randn(shape).to(x_dtype))
            assert y.shape == (*shape[:-1], OUT)
            assert y.dtype == x_dtype
    assert layer.to(x_dtype)(torch.randn(3, D)).dtype == torch.float32


def layouts(x: Tensor) -> dict[str, Tensor]:
    """Return the numbers of x [N, M, D] in other layouts: tokens in another order, rows apart, every second number."""
    rows, columns = (torch.randn(*x.shape[:2], 2 * x.shape[2]).to(x.dtype) for _ in range(2))
    rows[..., : x.shape[2]], columns[..., ::2] = x, x
    turned = x.transpose(0, 1).contiguous().transpose(0, 1)
    return {"leading": x, "turned": turned, "rows": rows[..., : x.shape[2]], "columns": columns[..., ::2]}


@kinds
@forms
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_layout_and_dtype_of_x_do_not_matter(isa: str, kind: str, form: str, x_dtype: torch.dtype) -> None:
    run, x = build_form(kind, form, "rows"), torch.randn(2, 30, D).to(x_dtype)
    flat = run(x.reshape(60, D)).reshape(2, 30, OUT)
    for name, same in layouts(x).items():
        if is_native(kind, run):
            check_equal(name, run(same), flat)
        else:
            # What is rounded to the tokens' dtype in the end may be rounded the other way.
            assert typical(run(same), flat) < max(1e-5, torch.finfo(x_dtype).eps), name
    wide = run(x.float())
    assert typical(flat, wide) < max(1e-5, torch.finfo(x_dtype).eps)
    assert typical(flat.roll(1, 1), wide) > 0.05 or kind == "no"


@kinds
def test_bad_input_is_named(kind: str) -> None:
    layer = build(kind)
    for run in (layer, layer.pack("fp32")):
        with pytest.raises(ShapeError, match=rf"{type(run).__name__}.* {D},.*\(2, 9\)"):
            run(torch.randn(2, 9))
        with pytest.raises(DtypeError, match=r"torch\.int64"):
            run(torch.ones(2, D, dtype=torch.int64))
    with pytest.raises(ConfigError, match="widths"):
        KINDS[kind].build(0)
    with pytest.raises(ConfigError, match="dtype='fp8'"):
        layer.pack("fp8")
    with pytest.raises(ConfigError, match="path='quick'"):
        layer.pack("fp32", "quick")


@kinds
@forms
def test_broken_tokens_stay_alone(isa: str, kind: str, form: str) -> None:
    run, broken = build_form(kind, form), [3, 17, 20]
    whole = [n for n in range(40) if n not in broken]
    for first in (float("nan"), float("inf"), -float("inf")):
        x = torch.randn(40, D)
        x[broken] = 0.0  # as they count for the step of dynamic int8
        clean = run(x)
        assert clean.isfinite().all()
        x[3, 0], x[17, -1], x[20] = first, -first, first
        y = run(x)
        assert y[broken].isnan().all()
        if is_native(kind, run):
            check_equal(str(first), y[whole], clean[whole])
        else:
            torch.testing.assert_close(y[whole], clean[whole])


@kinds
@forms
def test_a_token_alone_is_answered_as_in_company(isa: str, kind: str, form: str) -> None:
    run, x = build_form(kind, form, "rows"), torch.randn(70, D)
    company, alone = run(x), torch.cat([run(token) for token in x.split(1)])
    # Dynamic int8 has one step for the activations of a call.
    # Int8 rows stand beside tokens of 16 bits where they are read one by one, beside float32 where all are multiplied.
    bounds = {"unpacked": 1e-5, "fp32": 1e-5, "bf16": 1e-2, "int8": 0.05 if build(kind).dynamic_int8 else 1e-3}
    if kind in ROW_BY_ROW and is_native(kind, run):
        check_equal("alone", alone, company)
    assert typical(alone, company) < bounds[form]
    assert typical(alone.roll(1, 0), company) > 10 * bounds[form] or kind == "no"


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
        if is_native(kind, packed):
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
    make_ids_up(twin)
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
    assert packed.eval() is packed
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
    assert (one.flops > 0) == (kind not in ("no", "token_table"))


def named(index: Tensor, rows: Tensor) -> float:
    return 2.0 * float((index >= 0).sum()) * rows.shape[-1]


def descended(x: Tensor, rows_KMD: Tensor) -> float:
    return 2.0 * x.numel() * len(rows_KMD) * rows_KMD.shape[1].bit_length()


# FLOP of the ops from their arguments, where biases, scores and choices count nothing.
OPS: dict[str, Callable[..., float]] = {
    "block_product": lambda x, weight: 2.0 * len(x) * weight.numel(),
    "bucket_sum": lambda *_: 0.0,
    "bucket_union": lambda *_: 0.0,
    "gather_accumulate": lambda codes, scores, tables, *_: 2.0 * codes.numel() * tables.shape[-1],
    "hadamard": lambda x: x.numel() / x.shape[-1] * hadamard_flops(x.shape[-1]),
    "hash_codes": lambda *_: 0.0,
    "neuron_dot": lambda x, index, rows, *_: named(index, rows),
    "neuron_sum": lambda weight, index, rows, *_: named(index, rows),
    "sketch_and_select": lambda x, codes, *_: 2.0 * len(x) * codes.numel(),
    "top_indices": lambda *_: 0.0,
    "tree_descend": lambda x, rows, *_: descended(x, rows),
}


class Counting(TorchDispatchMode):
    """Add up the FLOP of what runs inside; an op that `OPS` does not know is an error."""

    flops = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        y = func(*args, **(kwargs or {}))
        if func.namespace == "nogemm":
            self.flops += OPS[func._schema.name.removeprefix("nogemm::")](*args)
        elif func._overloadpacket in flop_registry:
            self.flops += flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=y)
        return y


@torch.no_grad()
def counted(layer: FFN, x: Tensor) -> float:
    """Count the FLOP of a token: of all of x less those of a half, since what a call does once is no token's."""
    found = []
    for tokens in (x[: len(x) // 2], x):
        with Counting() as counting:
            layer(tokens)
        found.append(counting.flops)
    return (found[1] - found[0]) / (len(x) - len(x) // 2)


@kinds
def test_cost_is_what_is_counted(kind: str) -> None:
    layer, x = build(kind), torch.randn(400, D)
    flops = counted(layer, x)
    neurons = layer.counted_neurons(x[200:]) if layer.retrieves else None
    if neurons is None:
        assert flops == pytest.approx(layer.cost(1).flops)
    else:  # the unpacked layer computes all neurons and masks those that are not found
        each = 2.0 * (D + OUT)
        assert flops + each * (neurons["mean"] - HIDDEN) == pytest.approx(neurons["flops"], rel=0.02)
        assert neurons["mean"] == pytest.approx(neurons["expected"], rel=0.2)


def test_the_count_sees_another_layer() -> None:
    narrow, wide = (KINDS["dense"].build(D, OUT, hidden=hidden).eval() for hidden in (HIDDEN - 1, HIDDEN))
    assert counted(narrow, torch.randn(400, D)) != pytest.approx(wide.cost(1).flops)


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
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


@kinds
def test_from_zero_a_layer_learns(kind: str) -> None:
    layer, x = build(kind).requires_grad_(True), torch.randn(20, D)
    assert layer(x).any()
    layer.start_at_zero()
    assert not layer(x).any()
    optimiser = torch.optim.SGD(layer.parameters(), lr=0.1)
    (layer(x) - 1.0).square().sum().backward()
    optimiser.step()
    assert layer(x).any(1).all()


def gradients(layer: FFN, x: Tensor, pull: Tensor) -> dict[str, Tensor | None]:
    x = x.to(layer.compute_dtype(), copy=True).requires_grad_()
    (layer(x) * pull.to(x.dtype)).sum().backward()
    return {"x": x.grad, **{name: parameter.grad for name, parameter in layer.named_parameters()}}


def apart(ours: Tensor | None, exact: Tensor | None) -> float:
    """Return how far two gradients lie apart as a share of the second; no gradient is one of zeros."""
    if exact is None or not exact.any():
        return 0.0 if ours is None or not ours.any() else float("inf")
    return float("inf") if ours is None else float((ours.double() - exact).norm() / exact.norm())


@kinds
@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
def test_gradients_agree_with_float64(kind: str, training: bool) -> None:
    layer = build(kind).requires_grad_(True).train(training)
    wide, x, pull = copy.deepcopy(layer).double(), torch.randn(50, D), torch.randn(50, OUT)
    twin = copy.deepcopy(wide)
    ours, exact = gradients(layer, x, pull), gradients(wide, x, pull)
    far = {name: apart(ours[name], gradient) for name, gradient in exact.items()}
    assert max(far.values()) < 1e-5, far
    wrong = gradients(twin, x, pull + 0.2 * pull.roll(1, 0))
    assert max(apart(ours[name], gradient) for name, gradient in wrong.items() if gradient is not None) > 0.1
