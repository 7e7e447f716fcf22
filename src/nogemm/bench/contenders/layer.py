"""The worker's side of `nogemm bench layer`: dense contenders and our packed layer, verified, then called.

Legend: N tokens, D width, F hidden width, T tables, C copies of the layer.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nogemm.activations import ACTIVATIONS
from nogemm.bench import peers
from nogemm.bench.engine.check import DENSE_BOUNDS, Bound, compare, some_rows
from nogemm.bench.engine.pool import TokenPool
from nogemm.bench.engine.rounding import check_packed
from nogemm.bench.flips import flip_rate
from nogemm.config import parse_layer
from nogemm.convert import converted
from nogemm.layers import FFN
from nogemm.layers._base import PackedFFN
from nogemm.layers.token_table.layer import TokenTableFFN, make_ids_up
from nogemm.models.loading import load_encoder

# As many as a small model has layers: a lone layer would sit in a cache that a model's layers share.
COPIES = 12
COPIED_BATCH = 8
VOCABULARY = 30_522  # BERT's: of a token table that is timed outside a model and not told how many rows it has
_CALIBRATION = 16
_MEASURED = 256  # tokens whose recall is measured
_ITEMSIZE = {"fp32": 4, "bf16": 2, "int8": 1}


class DenseStack(nn.Module):
    """C dense layers of their own weights; copy c maps input c, so one call passes through all."""

    def __init__(self, width: int, hidden: int, activation: str, copies: int, seed: int, gated: bool = False) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.gate = nn.ModuleList(_linear(width, hidden, generator) for _ in range(copies if gated else 0))
        self.up = nn.ModuleList(_linear(width, hidden, generator) for _ in range(copies))
        self.down = nn.ModuleList(_linear(hidden, width, generator) for _ in range(copies))
        self.activation = ACTIVATIONS[activation]
        self.eval().requires_grad_(False)

    def forward(self, *x_ND: Tensor) -> tuple[Tensor, ...]:
        if self.gate:
            gated = zip(self.gate, self.up, self.down, x_ND, strict=True)
            return tuple(down(self.activation(gate(x)) * up(x)) for gate, up, down, x in gated)
        layers = zip(self.up, self.down, x_ND, strict=True)
        return tuple(down(self.activation(up(x))) for up, down, x in layers)


class LayerContender:
    """Draw tokens for C copies of a layer, fresh or warm; what both kinds of contender share."""

    copied_batch = COPIED_BATCH

    def __init__(self, settings: dict[str, Any]) -> None:
        self.settings = settings
        self.pool: TokenPool | None = None
        self.fresh = True
        self.repeated: Any = None
        self.batch = self.copies = 0

    def _open(self, case: dict[str, Any], dtype: torch.dtype) -> None:
        self.batch = case["batch"]
        self.fresh, self.repeated = case["cache"] == "fresh", None
        self.copies = COPIES if self.fresh and self.batch <= self.copied_batch else 1
        if self.pool is None or self.pool.tokens_ND.dtype != dtype:
            self.pool = TokenPool(Path(self.settings["pool"]), self.settings["d"], dtype)

    def _tokens(self) -> tuple[Tensor, ...]:
        assert self.pool is not None
        return tuple(self.pool.draw(self.batch) for _ in range(self.copies))

    def draw(self) -> Any:
        if self.fresh:
            return self._prepare(self._tokens())
        if self.repeated is None:  # not before the contender is compiled for this case
            self.repeated = self._prepare(self._tokens())
        return self.repeated

    def _prepare(self, tokens: tuple[Tensor, ...]) -> Any:
        return tokens


class DenseContender(LayerContender):
    """A dense layer in one of the engines, held against float64."""

    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__(settings)
        self.engine = peers.engine(settings["engine"])
        self.runner: peers.Runner | None = None
        self.compiled: tuple[int, int] | None = None

    def prepare(self, case: dict[str, Any]) -> dict[str, Any]:
        s = self.settings
        precision = self.engine.precision
        self._open(case, torch.bfloat16 if s["engine"] in ("torch-bf16", "inductor-bf16") else torch.float32)
        stack = DenseStack(s["d"], s["hidden"], s["activation"], self.copies, s["seed"], s.get("gated", False))
        key = (self.copies, self.batch if self.engine.static else 0)
        if key != self.compiled:
            self.runner = None
            example = tuple(x.float() for x in self._tokens())
            self.runner = self.engine.compile(stack, example, self._samples())
            self.compiled = key
        flops, size = dense_work(s["d"], s["hidden"], self.batch, precision, s.get("gated", False))
        facts = {
            "layers": self.copies,
            "flops": flops,
            "bytes_read": size,
            "weight_bytes": size * self.copies,
            "computes_in": precision,
            "token_bytes": s["d"] * self._tokens()[0].element_size(),
        }
        return facts | self._verify(stack, DENSE_BOUNDS[precision])

    def _verify(self, stack: DenseStack, bound: Bound) -> dict[str, Any]:
        assert self.runner is not None
        tokens = self._tokens()
        outputs = self.runner.result(self.runner.run(self.runner.prepare(tokens)))
        rows = some_rows(self.batch)
        exact = copy.deepcopy(stack).double()  # engines may share the float32 weights
        reference = exact(*(x[rows].double() for x in tokens))
        return compare(torch.cat([y[rows] for y in outputs]), torch.cat(reference), bound)

    def _samples(self) -> list[tuple[Tensor, ...]]:
        assert self.pool is not None
        return [tuple(self.pool.draw(64).float() for _ in range(self.copies)) for _ in range(_CALIBRATION)]

    def _prepare(self, tokens: tuple[Tensor, ...]) -> Any:
        return self.runner.prepare(tokens) if self.runner is not None else tokens

    def run(self, inputs: Any) -> Any:
        assert self.runner is not None
        return self.runner.run(inputs)


class OurContender(LayerContender):
    """Our packed layer, held against the unpacked one in float64."""

    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__(settings)
        self.layer = self._made(settings)
        self.packed: list[PackedFFN] = []

    def _made(self, settings: dict[str, Any]) -> FFN:
        return our_layer(settings)

    def prepare(self, case: dict[str, Any]) -> dict[str, Any]:
        dtype = self.settings["dtype"]
        self._open(case, torch.float32)
        if len(self.packed) != self.copies:
            self.packed = []  # freed first: the copies are the memory
            self.packed = [self._pack() for _ in range(self.copies)]
        twin = self.layer.rounded(dtype)
        cost = twin.cost(self.batch)
        weight_bytes = sum(p.numel() * p.element_size() for p in (*twin.parameters(), *twin.buffers()))
        share = self.layer.packed_share(dtype)
        facts = {
            "layers": self.copies,
            "flops": cost.flops,
            "bytes_read": cost.bytes_read * share,
            "row_bytes": twin.row_bytes(self.batch) * share,
            "weight_bytes": weight_bytes * self.copies * share,
            "computes_in": self.layer.computes_in(dtype),
            "token_bytes": 4 * self.settings["d"],
            "native": self.packed[0].native,
        }
        assert self.pool is not None
        own = self.layer.measured(self.pool.draw(_MEASURED), self.batch, dtype)
        if "weight_bytes" in own:
            own["weight_bytes"] *= self.copies
        return facts | own | self._verify(twin)

    def _pack(self) -> PackedFFN:
        return self.layer.pack(self.settings["dtype"], self.settings.get("path", "auto"))

    def _verify(self, twin: FFN) -> dict[str, Any]:
        # Tokens of a chunk share their neurons, so the reference must see calls as they were.
        whole = self.layer.shares_calls
        rows = some_rows(self.batch)
        inputs, outputs = [], []
        for _ in range(1 if self.batch * self.copies >= 64 else -(-64 // (self.batch * self.copies))):
            tokens = self._tokens()
            inputs += [x.clone() if whole else x[rows].clone() for x in tokens]
            outputs += [y[rows] for y in self.run(self._prepare(tokens))]
        x_ND, y_ND = torch.cat(inputs)[:1024], torch.cat(outputs)[:1024]

        def answer(module: nn.Module, dtype: torch.dtype) -> Tensor:
            if whole:
                return torch.cat([module(x.to(dtype))[rows] for x in inputs])[:1024]
            return module(x_ND.to(dtype))

        with torch.inference_mode():
            facts = check_packed(self.layer, twin, y_ND, self.settings["dtype"], answer)
            if self.layer.in_turn:
                way = (self.layer.route(x_ND).rows != twin.route(x_ND).rows).any(-1).double().mean()
                facts |= {"other_way": float(way)}
        return facts | self._flips(x_ND)

    def _flips(self, x_ND: Tensor) -> dict[str, Any]:
        """Return how many of the decisions on these tokens rounding turns over; nothing where none are discrete."""
        if self.layer.decisions(x_ND[:1]) is None:
            return {}
        return {"flip_rate": flip_rate(self.layer, self.packed[0], x_ND, self.batch)}

    def run(self, inputs: Any) -> Any:
        with torch.inference_mode():
            return [layer(x) for layer, x in zip(self.packed, inputs, strict=True)]


def our_layer(settings: dict[str, Any]) -> FFN:
    """Build the layer of random weights, or take one site of a distilled checkpoint."""
    layer: FFN
    if settings.get("checkpoint") is None:
        config = parse_layer(settings["method"], settings["set"]).for_vocabulary(VOCABULARY)
        torch.manual_seed(settings["seed"])
        gated = settings.get("gated", False)
        layer = config.build(settings["d"], hidden=settings["hidden"], activation=settings["activation"], gated=gated)
        layer.fit_own_weights()
    else:
        layer = list(converted(load_encoder(Path(settings["checkpoint"]))).values())[settings["site"]]
    make_ids_up(layer)
    for part in layer.modules():
        if isinstance(part, TokenTableFFN) and not part.rows.any():  # of zeros, a wrong row would be as right
            nn.init.normal_(part.rows)
    return layer.eval().requires_grad_(False)


def dense_work(width: int, hidden: int, tokens: int, precision: str, gated: bool = False) -> tuple[float, float]:
    """Return FLOP and weight bytes of a dense layer with biases, 2 FLOP a multiply-add."""
    weights = (3 if gated else 2) * width * hidden
    return 2.0 * weights * tokens, float(weights * _ITEMSIZE[precision] + 4 * (width + hidden))


def _linear(width: int, out: int, generator: torch.Generator) -> nn.Linear:
    layer = nn.Linear(width, out)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(out, width, generator=generator) / width**0.5)
        layer.bias.copy_(0.1 * torch.randn(out, generator=generator))
    return layer
