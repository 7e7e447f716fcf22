"""Packed LookupFFN: equal to the unpacked layer on every instruction set, dtype, batch and number of threads."""

import copy

import pytest
import torch

from nogemm import ops
from nogemm.layers import LookupConfig, LookupFFN
from nogemm.layers.lookup.packed import PackedLookup
from nogemm.ops.packed_lookup import packed_lookup
from nogemm.testing.cases import BATCHES, LOOKUP_CASES, LookupCase
from nogemm.testing.compare import Mismatch, check_equal, check_lookup

by_name = pytest.mark.parametrize("case", LOOKUP_CASES, ids=lambda c: c.name)
# Largest rms error of the packed layer, as a share of the output's own rms: rounding of rows and 16-bit hashing.
ROUNDING = {"bf16": 0.05, "int8": 0.06}


def build(case: LookupCase) -> LookupFFN:
    layer = case.config.build(case.d_model, case.d_out)
    for parameter in layer.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.3)
    return layer.eval().requires_grad_(False)


@by_name
def test_fp32_matches_float64(isa: str, case: LookupCase) -> None:
    layer = build(case)
    packed = layer.pack("fp32")
    for tokens in BATCHES:
        x = torch.randn(tokens, case.d_model)
        flipped = check_lookup(case.name, layer, packed(x), x)
        assert flipped <= max(1e-3, 1.5 / max(tokens, 1))


def test_fp32_flips_are_rare(isa: str) -> None:
    case = next(c for c in LOOKUP_CASES if c.name == "minilm")
    layer, x = build(case), torch.randn(4000, 384)
    assert check_lookup("minilm", layer, layer.pack("fp32")(x), x) <= 1e-3


def test_check_would_notice_a_wrong_row_and_a_lost_bias() -> None:
    case = LOOKUP_CASES[0]
    layer, x = build(case), torch.randn(33, case.d_model)
    y = layer.pack("fp32")(x)
    assert layer.bias is not None
    for wrong in (y.roll(1, 0), y - layer.bias, torch.zeros_like(y), y * 1.001, y.flip(-1)):
        with pytest.raises(Mismatch, match="token"):
            check_lookup("wrong", layer, wrong, x)


@pytest.mark.parametrize("dtype", ["bf16", "int8"])
@by_name
def test_reduced_precision_stays_close(isa: str, case: LookupCase, dtype: str) -> None:
    layer = build(case)
    x = torch.randn(129, case.d_model)
    exact, packed = layer(x), layer.pack(dtype)
    y = packed(x)
    error = (y - exact).square().mean().sqrt() / exact.square().mean().sqrt()
    # One wrong bit in 129 tokens moves a layer of one or two tables far; their typical token must still be close.
    typical = (y - exact).square().mean(-1).sqrt().median() / exact.square().mean().sqrt()
    assert float(typical) < ROUNDING[dtype]
    assert float(error) < (4 * ROUNDING[dtype] if case.config.tables >= 8 else 0.7)


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "int8"])
@by_name
def test_threads_give_equal_bits(isa: str, case: LookupCase, dtype: str) -> None:
    layer = build(case)
    packed = layer.pack(dtype)
    assert isinstance(packed, PackedLookup)
    for tokens in (1, 5, 70, 1100):
        x = torch.randn(tokens, case.d_model)
        torch.set_num_threads(1)
        one = packed(x)
        torch.set_num_threads(2)
        two = packed(x)
        if packed.native:
            check_equal(f"{tokens} tokens", two, one)
            continue
        # A projection or neighbours that the kernel does not know: torch multiplies and shares out as it likes.
        twin = rounded(layer, packed)
        for name, y in (("one thread", one), ("two threads", two)):
            assert check_lookup(f"{name}, {tokens} tokens", twin, y, x) <= max(1e-3, 1.5 / tokens)


def rounded(layer: LookupFFN, packed: PackedLookup) -> LookupFFN:
    """Return the float32 layer that holds what the portable packed form holds after rounding."""
    twin, portable = copy.deepcopy(layer), packed.portable
    twin.projection.load_state_dict(portable.projection.state_dict())
    scale = portable.row_scale
    rows = portable.get_buffer("tables").float()
    twin.tables.copy_(rows if scale is None else rows * scale.unsqueeze(-1))
    return twin


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "int8"])
def test_not_finite_tokens_stay_alone(isa: str, dtype: str) -> None:
    for case in LOOKUP_CASES:
        packed = build(case).pack(dtype)
        x = torch.randn(40, case.d_model)
        clean = packed(x)
        x[3, 0], x[17, -1], x[20] = float("nan"), float("inf"), -float("inf")
        y = packed(x)
        for n in (3, 17, 20):
            assert y[n].isnan().all(), case.name
        keep = torch.tensor([n for n in range(40) if n not in (3, 17, 20)])
        if packed.native:
            check_equal(case.name, y[keep], clean[keep])
        else:
            torch.testing.assert_close(y[keep], clean[keep])


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_large_outputs_hold_what_small_calls_give(threads: int) -> None:
    # Above 8 MiB y's pages are fetched beforehand, several threads share the blocks of a chunk, and there are chunks.
    layer = LookupConfig(tables=3, bits=4).build(520).eval()
    packed = layer.pack("fp32")
    x_ND = torch.randn(9_001, 520)
    torch.set_num_threads(threads)
    parts_ND = torch.cat([packed(part_ND) for part_ND in x_ND.split(1_500)])
    check_equal(f"{threads} threads", packed(x_ND), parts_ND)


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "int8"])
def test_codes_do_not_depend_on_the_batch(isa: str, dtype: str) -> None:
    """One token alone, a few, a tile, all in one go, and in two phases: another code would be another row."""
    layer = LookupConfig(tables=12, bits=6).build(96).eval()
    packed, x_ND = layer.pack(dtype), torch.randn(1_300, 96)
    whole_ND = packed(x_ND)
    scale = whole_ND.square().mean().sqrt()
    for size in (1, 3, 16, 64, 1_000):
        count = min(len(x_ND), 40 * size)
        parts_ND = torch.cat([packed(part_ND) for part_ND in x_ND[:count].split(size)])
        other = int(((parts_ND - whole_ND[:count]).abs().amax(1) > 1e-3 * scale).sum())
        assert other <= 1, f"{other} of {count} tokens answer otherwise in calls of {size}"
    assert bool(((packed(x_ND + 0.02 * torch.randn_like(x_ND)) - whole_ND).abs().amax(1) > 1e-3 * scale).any()), (
        "the comparison sees nothing"
    )


@pytest.mark.parametrize("storage", ["bf16", "int8"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "int8"])
def test_compressed_layers_pack_as_they_are(dtype: str, storage: str) -> None:
    layer = build(LOOKUP_CASES[0]).compress(storage)
    x = torch.randn(65, layer.d_model)
    error = (layer.pack(dtype)(x) - layer(x)).square().mean().sqrt() / layer(x).square().mean().sqrt()
    assert float(error) < 0.12


def test_portable_form_agrees_with_the_native_one(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = build(LOOKUP_CASES[2])
    x = torch.randn(50, layer.d_model)
    native = layer.pack("fp32")
    monkeypatch.setattr("nogemm.layers.lookup.packed.native_available", lambda: False)
    portable = layer.pack("fp32")
    assert isinstance(native, PackedLookup)
    assert isinstance(portable, PackedLookup)
    assert native.native
    assert not portable.native
    check_lookup("portable", layer, portable(x), x)
    check_lookup("native", layer, native(x), x)


def test_compile_and_export(compiler: str) -> None:
    layer = build(LOOKUP_CASES[0])
    packed = layer.pack("fp32")
    x = torch.randn(6, layer.d_model)
    check_equal("compiled", torch.compile(packed, fullgraph=True, backend=compiler)(x), packed(x))
    exported = torch.export.export(packed, (x,), dynamic_shapes=({0: torch.export.Dim("n")},))
    y = torch.randn(11, layer.d_model)
    check_equal("exported", exported.module()(y), packed(y))
    buffer = packed.get_buffer("packed")
    torch.library.opcheck(torch.ops.nogemm.packed_lookup, (x, buffer, layer.d_out))


def test_unpacked_layer_compiles_and_exports(compiler: str) -> None:
    layer = build(LOOKUP_CASES[0])
    x = torch.randn(6, layer.d_model)
    check_lookup("compiled", layer, torch.compile(layer, fullgraph=True, backend=compiler)(x), x)
    check_lookup("exported", layer, torch.export.export(layer, (x,)).module()(x), x)


def test_wrong_buffers_are_errors_not_crashes() -> None:
    layer = build(LOOKUP_CASES[0])
    packed = layer.pack("fp32")
    buffer, x = packed.get_buffer("packed"), torch.randn(2, layer.d_model)
    for bad in (buffer[:40], torch.zeros_like(buffer), buffer[64:]):
        with pytest.raises(ValueError, match="not a packed LookupFFN"):
            packed_lookup(x, bad, layer.d_out)
    with pytest.raises(ValueError, match="d_out"):
        packed_lookup(x, buffer, layer.d_out + 1)
    assert not packed.state_dict()
    assert ops.native_available()
