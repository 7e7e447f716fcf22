"""Packed HireFFN: equal to the unpacked layer on every instruction set, dtype, batch and number of threads."""

from typing import Literal

import pytest
import torch
from hire_cases import CASES, HireCase, build_case

from nogemm.layers import HireConfig, HireFFN
from nogemm.layers.hire.packed import PackedHire
from nogemm.ops.packed_hire import packed_hire, packed_hire_chosen
from nogemm.testing.compare import Mismatch, check_equal

DTYPES = ("fp32", "bf16", "int8")
BATCHES = (0, 1, 2, 15, 33, 70)
by_name = pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
# Error of a token as a share of its norm: float32 sums; 16-bit fixed-point tokens beside int8 rows.
CLOSE = {"fp32": 2e-5, "bf16": 2e-5, "int8": 3e-4}


def check_packed(layer: HireFFN, y: torch.Tensor, x: torch.Tensor, close: float) -> float:
    """Hold a packed layer's answers against float64 on its own rounded weights.

    A token that is off must be explained by one neuron whose rank, or whose sketched rank, rounding can change: it may
    be off by no more than the four largest contributions of a kept neuron.

    Returns:
        the share of tokens that are off.
    """
    exact = layer.double()
    with torch.no_grad():
        expected = exact(x.double())
        kept = exact.choose(x.double()).kept_NK
        single = [(exact.at(x.double(), kept[:, j : j + 1]) - exact.bias).norm(dim=-1) for j in range(kept.shape[1])]
    largest = torch.stack(single).amax(0) if single else torch.zeros(len(x))
    error = (y.double() - expected).norm(dim=-1)
    off = ~(error <= close * (expected.norm(dim=-1) + 1))
    if bool((~(error <= 4 * largest + close * (expected.norm(dim=-1) + 1))).any()):
        raise Mismatch(f"a token is off by {float(error.max()):.3g}")
    return float(off.double().mean()) if len(x) else 0.0


@pytest.mark.parametrize("dtype", DTYPES)
@by_name
def test_matches_float64(isa: str, case: HireCase, dtype: str) -> None:
    layer = build_case(case)
    packed = layer.pack(dtype)
    assert isinstance(packed, PackedHire)
    assert packed.native
    for tokens in BATCHES:
        x = torch.randn(tokens, layer.d_model)
        # The sketch is made from weights before they are rounded, so reduced rows may rank otherwise.
        share = check_packed(layer.rounded(dtype), packed(x), x, CLOSE[dtype])
        if tokens > 30:
            assert share <= (0.0 if dtype == "fp32" else 0.35), case.name


def test_check_would_notice_other_answers() -> None:
    layer = build_case(CASES[0])
    x = torch.randn(40, layer.d_model)
    y = layer.pack("fp32")(x)
    for wrong in (y.roll(1, 0), torch.zeros_like(y), y.flip(-1), y * 1.001, y - layer.bias * 0.01):
        try:
            noticed = check_packed(layer.rounded("fp32"), wrong, x, CLOSE["fp32"]) > 0.9
        except Mismatch:
            noticed = True
        assert noticed
    with pytest.raises(Mismatch):
        check_packed(layer.rounded("fp32"), y * 20, x, CLOSE["fp32"])


@pytest.mark.parametrize("dtype", DTYPES)
@by_name
def test_all_neurons_at_once_answer_alike(isa: str, case: HireCase, dtype: str) -> None:
    layer = build_case(case)
    rows, dense = layer.pack(dtype), layer.pack(dtype)
    rows.fix_path("rows")
    dense.fix_path("dense")
    x = torch.randn(37, rows.d_model)
    y = rows(x)
    assert float(((dense(x) - y).norm(dim=1) / (y.norm(dim=1) + 1)).max()) < CLOSE[dtype]
    assert float((dense(x) - y.roll(1, 0)).norm() / y.norm()) > 100 * CLOSE[dtype]
    assert dense(x[:0]).shape == (0, rows.d_out)
    assert dense(x.bfloat16()).dtype == torch.bfloat16
    x[3, -1] = torch.nan
    answers = dense(x)
    assert bool(answers[3].isnan().all())
    assert bool(answers[torch.arange(37) != 3].isfinite().all())


@pytest.mark.parametrize("case", [case for case in CASES if case.config.select == "topk"], ids=lambda c: c.name)
def test_the_kept_neurons_are_those_that_answer(isa: str, case: HireCase) -> None:
    layer = build_case(case)
    packed = layer.pack("fp32")
    assert isinstance(packed, PackedHire)
    x = torch.randn(33, layer.d_model)
    kept = packed_hire_chosen(x, packed.get_buffer("packed"), layer.hidden, True)
    chosen = layer.choose(x).kept_NK.long()
    expected = torch.zeros(33, layer.hidden + 1, dtype=torch.bool)  # a short last group names neuron -1
    expected.scatter_(1, torch.where(chosen < 0, layer.hidden, chosen), True)
    assert bool((kept == expected[:, :-1]).all())
    candidates = packed_hire_chosen(x, packed.get_buffer("packed"), layer.hidden, False)
    assert bool((candidates | ~kept).all())
    assert int(candidates.sum(1).min()) >= min(layer.hidden, layer.candidates * case.config.group - case.config.group)
    with pytest.raises(ValueError, match="neurons, hidden is"):
        packed_hire_chosen(x, packed.get_buffer("packed"), layer.hidden + 1, True)


def test_many_tokens_of_a_layer_that_keeps_much_go_dense() -> None:
    packed = HireConfig(keep=0.5).build(256, hidden=2048).eval().pack("fp32")
    sparing = HireConfig(keep=0.02).build(256, hidden=2048).eval().pack("fp32")
    assert isinstance(packed, PackedHire)
    assert isinstance(sparing, PackedHire)
    assert 1 < packed.dense_from <= 128
    assert sparing.dense_from > 1 << 16
    packed.fix_path("dense")
    assert packed.dense_from == 0


def test_a_fixed_path_measures_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def measured() -> None:
        raise AssertionError("a speed was asked for")

    monkeypatch.setattr("nogemm.layers.neurons.all.speeds", measured)
    layer = HireConfig(keep=0.5).build(64, hidden=256).eval()
    for path in ("rows", "dense"):
        layer.pack("fp32", path)
    with pytest.raises(AssertionError, match="a speed was asked for"):
        layer.pack("fp32")


@pytest.mark.parametrize("dtype", DTYPES)
@by_name
def test_threads_and_batches_give_equal_bits(isa: str, case: HireCase, dtype: str) -> None:
    packed = build_case(case).pack(dtype)
    packed.fix_path("rows")
    x = torch.randn(70, packed.d_model)
    torch.set_num_threads(1)
    one = packed(x)
    torch.set_num_threads(2)
    check_equal("threads", packed(x), one)
    check_equal("batch", torch.cat([packed(x[:1]), packed(x[1:20]), packed(x[20:])]), one)


def test_int8_answers_are_equal_on_every_isa() -> None:
    from nogemm import ops

    case = CASES[0]
    packed = build_case(case).pack("int8")
    x = torch.randn(30, packed.d_model)
    found = []
    for name in ops.supported_isas():
        with ops.use_isa(name):
            found.append(packed(x))
    for y in found[1:]:
        torch.testing.assert_close(y, found[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sketch", ["int8", "int4"])
@pytest.mark.parametrize("d", [61, 64, 200])
def test_candidates_are_equal_on_every_isa(d: int, sketch: Literal["int8", "int4"]) -> None:
    from nogemm import ops

    layer = build_case(HireCase("", HireConfig(keep=0.2, sketch=sketch), "relu", False, d, d, 333))
    buffer = layer.pack("int8").get_buffer("packed")
    for count in (1, 7):
        x = torch.randn(count, d)
        found = []
        for name in ops.supported_isas():
            with ops.use_isa(name):
                found.append(packed_hire_chosen(x, buffer, layer.hidden, False))
        assert all(bool((chosen == found[0]).all()) for chosen in found[1:])
        other = packed_hire_chosen(-x, buffer, layer.hidden, False)
        assert not bool((other == found[0]).all())


@pytest.mark.parametrize("dtype", DTYPES)
@by_name
def test_not_finite_tokens_stay_alone(isa: str, case: HireCase, dtype: str) -> None:
    packed = build_case(case).pack(dtype)
    x = torch.randn(20, packed.d_model)
    clean = packed(x)
    x[3, 0], x[11, -1], x[19] = float("nan"), float("inf"), -float("inf")
    got = packed(x)
    assert got[[3, 11, 19]].isnan().all()
    keep = [n for n in range(20) if n not in (3, 11, 19)]
    check_equal("others", got[keep], clean[keep])


def test_wrong_buffers_are_errors_not_crashes() -> None:
    layer = build_case(CASES[0])
    packed = layer.pack("int8")
    assert not packed.state_dict()
    buffer = packed.get_buffer("packed")
    with pytest.raises(ValueError, match="takes width"):
        packed_hire(torch.randn(2, 3), buffer, layer.d_out)
    with pytest.raises(ValueError, match="d_out is 1"):
        packed_hire(torch.randn(2, layer.d_model), buffer, 1)
    with pytest.raises(ValueError, match="not a packed HireFFN"):
        packed_hire(torch.randn(2, layer.d_model), torch.zeros(4096, dtype=torch.uint8), layer.d_out)
    with pytest.raises(ValueError, match="damaged"):
        packed_hire(torch.randn(2, layer.d_model), buffer[:-64], layer.d_out)


def test_without_the_extension_the_reference_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    from nogemm.layers.hire import packed as hire_packed

    monkeypatch.setattr(hire_packed, "native_available", lambda: False)
    for dtype in DTYPES:
        layer = build_case(CASES[0])
        packed = layer.pack(dtype)
        assert isinstance(packed, PackedHire)
        assert not packed.native
        x = torch.randn(5, layer.d_model)
        check_equal(dtype, packed(x), layer.rounded(dtype)(x))


def test_one_large_sketch_beside_the_layer() -> None:
    layer = HireConfig(keep=0.05, sketch="int4").build(96, hidden=700, activation="relu").eval()
    x = torch.randn(64, 96)
    assert check_packed(layer.rounded("fp32"), layer.pack("fp32")(x), x, CLOSE["fp32"]) == 0.0
