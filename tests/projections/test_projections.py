"""Every projection: linear, the written-out map, costs of the paper, initial scale, gradients, bad values."""

import copy
import json
import math

import pytest
import torch
from torch import Tensor

import nogemm
from nogemm.config import LayerConfig, ProjectionConfig, layer_config
from nogemm.errors import ConfigError
from nogemm.ops import dct
from nogemm.ops.hadamard import hadamard_matrix
from nogemm.projections import BHProjection, DiagonalChain, ShuffleProjection
from nogemm.testing.compare_model import answer_to, check_same_model

CONFIGS: list[ProjectionConfig] = [
    nogemm.DenseProjectionConfig(),
    nogemm.BHConfig(rounds=2, block=8),
    nogemm.BHConfig(rounds=2, block=8, pad="hadamard"),
    nogemm.AcdcConfig(depth=2),
    nogemm.HadamardChainConfig(depth=2),
    nogemm.RandomHadamardConfig(),
    nogemm.RandomHadamardConfig(learnable=True),
    nogemm.ShuffleProjectionConfig(block=8),
    nogemm.LowRankConfig(rank=11),
]
every = pytest.mark.parametrize(
    "config", CONFIGS, ids=lambda c: f"{c.kind}-{getattr(c, 'learnable', getattr(c, 'pad', ''))}"
)
SHAPES = [(16, 16), (12, 40), (37, 9), (1, 3), (8, 1)]


def small(config: ProjectionConfig, d_in: int) -> ProjectionConfig:
    """Return the config with a block that fits a narrow input."""
    if isinstance(config, nogemm.BHConfig | nogemm.ShuffleProjectionConfig) and d_in < 8:
        return type(config)(block=1)
    return config


@every
@pytest.mark.parametrize(("d_in", "d_out"), SHAPES)
def test_linear_with_bias(config: ProjectionConfig, d_in: int, d_out: int) -> None:
    projection = small(config, d_in).build(d_in, d_out).double()
    assert projection.bias is not None
    torch.nn.init.normal_(projection.bias)
    x = torch.randn(5, d_in, dtype=torch.float64)
    expected = x @ projection.dense_matrix().T + projection.bias
    torch.testing.assert_close(projection(x), expected, rtol=1e-10, atol=1e-10)
    assert projection(x[:0]).shape == (0, d_out)


def sylvester(width: int) -> Tensor:
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while matrix.shape[0] < width:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    return matrix / math.sqrt(width)


@pytest.mark.parametrize("config", CONFIGS[3:7], ids=lambda c: c.kind)
def test_chains_are_the_products_they_claim(config: ProjectionConfig) -> None:
    projection = config.build(6, 20).double()  # padded to 8, three repeats
    assert isinstance(projection, DiagonalChain)
    with torch.no_grad():
        projection.weight.normal_()
    cosine = dct(torch.eye(8, dtype=torch.float64))  # row vectors: x C = dct(x)
    rows = []
    for diagonals in projection.weight.view(3, -1, 8):
        product = torch.eye(8, dtype=torch.float64)
        for i, diagonal in enumerate(diagonals):
            transform = sylvester(8) if projection.transform == "hadamard" else (cosine, cosine.T)[i % 2]
            product = product @ torch.diag(diagonal) @ transform
        rows.append(product[:6].T)
    torch.testing.assert_close(projection.dense_matrix(), torch.cat(rows)[:20], rtol=1e-10, atol=1e-10)


def test_identity_diagonals_give_the_identity() -> None:
    for config in (nogemm.AcdcConfig(depth=3), nogemm.HadamardChainConfig(depth=3)):
        projection = config.build(16, 16).double()
        with torch.no_grad():
            projection.weight.fill_(1.0)
        torch.testing.assert_close(projection.dense_matrix(), torch.eye(16, dtype=torch.float64))


@pytest.mark.parametrize("block", [1, 8, 16])
@pytest.mark.parametrize(("d_in", "width", "order"), [(180, 192, 12), (384, 384, 12), (300, 320, 20)])
def test_bh_of_other_orders_is_the_product_it_claims(d_in: int, width: int, order: int, block: int) -> None:
    projection = nogemm.BHConfig(rounds=2, block=block, pad="hadamard").build(d_in, width + 50).double()
    assert isinstance(projection, BHProjection)
    assert projection.width == width
    transform = torch.kron(hadamard_matrix(order) / math.sqrt(order), sylvester(width // order))
    rows = []
    for blocks in projection.weight:
        product = torch.eye(width, dtype=torch.float64)
        for blocks_nBB in blocks:  # rows of a block are outputs
            product = product @ torch.block_diag(*blocks_nBB.mT) @ transform
        rows.append(product[:d_in].T)
    torch.testing.assert_close(projection.dense_matrix(), torch.cat(rows)[: width + 50], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("d_in", "block", "width"),
    [
        *((d, 64, d) for d in (64, 512, 768, 1280, 1536, 3072, 5120)),
        (640, 32, 640),
        (640, 64, 768),  # 20 * 32 has no room for a block of 64
        (384, 64, 512),
        (384, 32, 384),
        (700, 64, 768),
        (769, 64, 1024),
        (1025, 64, 1280),
        (90, 1, 128),  # 12 * 8 is too narrow for the packed kernel
        (1, 1, 1),
    ],
)
def test_widths_that_hadamard_matrices_have(d_in: int, block: int, width: int) -> None:
    with torch.device("meta"):
        assert nogemm.BHConfig(rounds=1, block=block, pad="hadamard").build(d_in, 1).width == width


def test_cost_of_bh_at_768() -> None:
    bias_free = {"rounds": 4, "block": 64, "bias": False}
    wide, narrow = (nogemm.BHConfig(pad=pad, **bias_free).build(768, 1530) for pad in ("power_of_two", "hadamard"))
    assert wide.cost(4).flops == 2 * 4 * (2 * 1024 * 64 + 1024 * 10)
    assert narrow.cost(4).flops == 2 * 4 * (2 * 768 * 64 + 64 * 68 + 768 * 6)
    assert narrow.cost(4).parameters == narrow.weight.numel() == 2 * 4 * 768 * 64


def test_a_config_without_pad_is_the_published_one() -> None:
    data = nogemm.LookupConfig(tables=5, bits=3).to_dict()
    del data["projection"]["pad"]
    read = layer_config(data)
    assert isinstance(read, nogemm.LookupConfig)
    assert read.projection == nogemm.BHConfig(pad="power_of_two")


def test_shuffle_by_hand() -> None:
    projection = nogemm.ShuffleProjectionConfig(block=2).build(4, 4)
    assert isinstance(projection, ShuffleProjection)
    with torch.no_grad():
        projection.weight.copy_(torch.tensor([[[[1.0, 0.0], [0.0, 2.0]], [[3.0, 0.0], [0.0, 4.0]]]]))
    # Blocks give (1, 2), (3, 4); dealt round: 1, 3, 2, 4.
    assert projection(torch.ones(1, 4)).tolist() == [[1.0, 3.0, 2.0, 4.0]]


@pytest.mark.parametrize(
    ("config", "flops", "parameters"),
    [
        (nogemm.DenseProjectionConfig(), 524_288, 262_144),
        (nogemm.BHConfig(rounds=1, block=64), 70_144, 32_768),
        (nogemm.BHConfig(rounds=2, block=64), 140_288, 65_536),
        (nogemm.BHConfig(rounds=4, block=64), 280_576, 131_072),
        (nogemm.BHConfig(rounds=4, block=32), 149_504, 65_536),
        (nogemm.BHConfig(rounds=4, block=16), 83_968, 32_768),
        (nogemm.ShuffleProjectionConfig(block=64), 65_536, 32_768),
        (nogemm.ShuffleProjectionConfig(block=128), 131_072, 65_536),
        (nogemm.ShuffleProjectionConfig(block=256), 262_144, 131_072),
        (nogemm.HadamardChainConfig(depth=1), 10_240, 1_024),
        (nogemm.HadamardChainConfig(depth=8), 81_920, 8_192),
        (nogemm.HadamardChainConfig(depth=32), 327_680, 32_768),
        (nogemm.AcdcConfig(depth=1), 24_064, 1_024),
        (nogemm.AcdcConfig(depth=8), 192_512, 8_192),
        (nogemm.RandomHadamardConfig(), 13_824, 0),
        (nogemm.RandomHadamardConfig(learnable=True), 15_360, 1_536),
        (nogemm.LowRankConfig(rank=64), 131_072, 65_536),
    ],
)
def test_costs_at_512(config: ProjectionConfig, flops: int, parameters: int) -> None:
    plain = type(config)(**{**_fields(config), "bias": False}).build(512, 512)
    cost = plain.cost(4)
    assert cost.flops == flops
    assert cost.parameters == parameters == sum(p.numel() for p in plain.parameters())
    assert cost.bytes_read == 4 * plain.weight.numel() + (4 * 64 * 512 if config.kind == "low_rank" else 0)
    assert config.build(512, 512).cost(4).parameters == parameters + 512  # the bias


def _fields(config: ProjectionConfig) -> dict[str, object]:
    return {name: value for name, value in config.to_dict().items() if name != "kind"}


def test_costs_grow_with_repeats() -> None:
    for config in CONFIGS:
        one, three = config.build(64, 64).cost(4), config.build(64, 192).cost(4)
        if config.kind != "low_rank":
            assert three.flops == 3 * one.flops


@every
@pytest.mark.parametrize(("d_in", "d_out"), [(384, 512), (512, 512), (300, 1024)])
def test_initial_outputs_have_unit_scale(config: ProjectionConfig, d_in: int, d_out: int) -> None:
    if isinstance(config, nogemm.LowRankConfig):
        config = nogemm.LowRankConfig(rank=128)
    z = config.build(d_in, d_out)(torch.randn(400, d_in))
    assert float(z.std()) == pytest.approx(1.0, rel=0.08)
    assert float(z.std(0).min()) > 0.4  # no output is dead, padded or not


def test_reference_initialisation() -> None:
    chain = nogemm.AcdcConfig(depth=2).build(64, 64)
    chain.reset_parameters("reference")
    assert float(chain.weight.mean()) == pytest.approx(1.0, abs=0.01)
    assert float(chain.weight.std()) == pytest.approx(0.01, rel=0.3)
    signs = nogemm.RandomHadamardConfig().build(48, 64)
    signs.reset_parameters("reference")
    assert set(signs.weight.unique().tolist()) == {-1.0, 1.0}


@every
def test_gradients_against_float64(config: ProjectionConfig) -> None:
    projection = config.build(24, 50)
    wide = copy.deepcopy(projection).double()
    x, g = torch.randn(9, 24), torch.randn(9, 50)
    for module, dtype in ((projection, torch.float32), (wide, torch.float64)):
        (module(x.to(dtype)) * g.to(dtype)).sum().backward()
    for p, q in zip(projection.parameters(), wide.parameters(), strict=True):
        assert p.grad is not None
        assert q.grad is not None
        assert bool(q.grad.any())
        assert float((p.grad - q.grad).norm() / q.grad.norm()) < 1e-5
    weights = projection.weights()
    fixed = isinstance(config, nogemm.RandomHadamardConfig) and not config.learnable
    assert bool(weights) is not fixed
    assert all(p is not projection.bias for p in weights)


def test_diagonals_are_vectors_to_an_optimiser() -> None:
    for config in CONFIGS[3:7]:
        assert config.build(16, 40).weight.dim() == 1


@every
def test_survives_json_and_a_state_dict(config: ProjectionConfig) -> None:
    layer = nogemm.LookupConfig(tables=5, bits=3, projection=config)
    read: LayerConfig = layer_config(json.loads(json.dumps(layer.to_dict())))
    assert read == layer
    first, second = layer.build(24).eval(), read.build(24).eval()
    x = torch.randn(6, 24)
    second.load_state_dict(first.state_dict())
    check_same_model("read", second, first, answer_to(x))


@every
def test_lower_precision_models_run(config: ProjectionConfig) -> None:
    layer = nogemm.LookupConfig(tables=5, bits=3, projection=config).build(24)
    for parameter in layer.parameters():  # as conversion casts: buffers stay float32
        parameter.data = parameter.data.bfloat16()
    y = layer(torch.randn(4, 24, dtype=torch.bfloat16))
    assert y.dtype == torch.bfloat16
    assert y.isfinite().all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nogemm.AcdcConfig(depth=0), "AcdcConfig.*depth=0"),
        (lambda: nogemm.HadamardChainConfig(depth=1.5), "depth=1.5"),  # type: ignore[arg-type]
        (lambda: nogemm.LowRankConfig(rank=0), "rank=0"),
        (
            lambda: nogemm.BHConfig(pad="none"),  # type: ignore[arg-type]
            "BHConfig.*power_of_two, hadamard.*pad='none'",
        ),
        (
            lambda: nogemm.BHConfig(pad="hadamard").build(20, 20),
            r" 32 \(d_in=20.*pad='hadamard'",
        ),
        (lambda: nogemm.ShuffleProjectionConfig(block=0), "block=0"),
        (lambda: nogemm.ShuffleProjectionConfig(block=64).build(20, 20), "block=64.*d_in=20"),
        (lambda: nogemm.RandomHadamardConfig(learnable="yes"), "learnable='yes'"),  # type: ignore[arg-type]
    ],
)
def test_values_out_of_range_are_named(make, message) -> None:
    with pytest.raises(ConfigError, match=message):
        make()
