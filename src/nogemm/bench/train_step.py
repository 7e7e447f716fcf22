"""`nogemm bench train-step`: one training step of a layer, forward, backward and update, beside the dense FFN's.

A TreeFFN stands beside the dense-masked form of the same layer, and takes its step twice: with dense gradients and
AdamW, and by rows with LazyAdam. All get tokens that need a gradient themselves, as inside a model, and a given
gradient of their output. Codes are "uniform" (random weights and tokens), "skewed" (tokens around a few centres of
unequal weight: many tokens read the same row, as trained layers do) or "trained" (a layer of a distilled checkpoint, on
activations it really sees).

Legend: N tokens, D width.
Reading order: `TrainStepArgs`, `run_train_step`, the contenders.
"""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nogemm.bench.contenders.layer import DenseStack, our_layer
from nogemm.bench.contenders.masked_topk import MaskedTopK
from nogemm.bench.contenders.masked_tree import MaskedTree
from nogemm.bench.engine.check import Bound, compare
from nogemm.bench.engine.measure import MIN_ROUNDS, Plan, Spec, add_ratios, measure
from nogemm.bench.engine.pool import TokenPool, write_pool
from nogemm.bench.engine.result import origin
from nogemm.bench.engine.row import Row
from nogemm.bench.models import site_inputs
from nogemm.errors import ConfigError
from nogemm.hardware.cpu import usable_cores
from nogemm.running.partial import Keep
from nogemm.train import LazyAdam
from nogemm.train.memory import keep_freed_memory

OURS = "nogemm"
DENSE = ("dense-fused", "dense-foreach")
_CODES = ("uniform", "skewed")
_CENTRES = 64
_DEFAULTS = {
    "lookup": ("tables=170", "bits=9", "projection.block=64"),
    "tree": ("trees=1", "depth=11"),
    "hire": ("keep=0.05",),
}
# The same layer as a dense one whose neurons are masked.
MASKED: dict[str, Callable[[Any], nn.Module]] = {"tree": MaskedTree, "hire": MaskedTopK}
_CHECKED = 64
# Gradients sum over tokens in float32; a token whose bit is nearly zero may read another row than in float64.
_GRADIENTS = Bound(rms=2e-2, token=5e-2, share=2e-2, outlier=2.0)


@dataclass(frozen=True, kw_only=True)
class TrainStepArgs:
    """Say which layer takes the step.

    Attributes:
        method: "lookup", "tree" or "hire".
        d, hidden, activation: of the dense layer.
        set: fields of our layer.
        tokens: per step.
        codes: "uniform" and "skewed"; with `checkpoint` "trained" instead, and d and hidden are that model's.
        checkpoint, site: a distilled model's directory and one of its layers.
        threads, rounds, seed: as in `nogemm bench layer`.
    """

    method: str = "lookup"
    d: int = 768
    hidden: int = 3072
    activation: str = "gelu"
    set: tuple[str, ...] | None = None
    tokens: int = 4096
    codes: tuple[str, ...] = _CODES
    checkpoint: str | None = None
    site: int = 0
    threads: int = 0
    rounds: int = MIN_ROUNDS
    seed: int = 0


def run_train_step(
    args: TrainStepArgs,
    *,
    note: Callable[[str], None] | None = None,
    keep: Keep | None = None,
) -> dict[str, Any]:
    """Verify and time training steps, ours with fused AdamW, the dense layer's with fused and with foreach AdamW.

    Outputs and gradients of inputs and weights are compared with float64 before a clock starts. `keep` gets the result
    as it grows.

    Returns:
        `origin` and {"rows"}; a row has "contender", "tokens", "codes", "verified", "max_error",
        "us_median", "us_p10", "us_p90", "ratio" (its median / ours), and "parts": microseconds of forward, backward
        and update.
    Raises:
        ConfigError: unknown codes. ValueError: fewer than seven rounds.
    """
    if args.checkpoint is None and (not args.codes or not set(args.codes) <= set(_CODES)):
        raise ConfigError(f"--codes must be uniform, skewed or both, got {', '.join(args.codes) or 'nothing'}")
    if args.method not in _DEFAULTS:
        raise ConfigError(f"--method must be one of {', '.join(_DEFAULTS)}, got {args.method}")
    if min(args.tokens, args.d, args.hidden) < 1:
        sizes = f"tokens={args.tokens}, d={args.d}, hidden={args.hidden}"
        raise ConfigError(f"--tokens, --d and --hidden must be positive, got {sizes}")
    chosen = _DEFAULTS[args.method] if args.set is None else args.set
    args = replace(args, threads=args.threads or usable_cores(), set=chosen)
    args = args if args.checkpoint is None else replace(args, codes=("trained",))
    head = origin(asdict(args))

    def finished(rows: list[Row]) -> dict[str, Any]:
        add_ratios(rows, OURS, ("tokens", "codes"))
        return head | {"rows": rows}

    def kept(rows: list[Row]) -> None:
        if keep is not None:
            keep(finished(rows))

    with tempfile.TemporaryDirectory(prefix="nogemm-train-step-") as folder:
        cases = []
        for codes in args.codes:
            pool = Path(folder) / codes
            write_pool(pool, 8 * args.tokens, args.d, seed=args.seed + 1, source_ND=_source(args, codes))
            cases.append({"tokens": args.tokens, "codes": codes})
        plan = Plan(threads=args.threads, rounds=args.rounds, seconds=0.0)
        rows = measure(_specs(args, folder), cases, plan, note=note, keep=kept)
    return finished(rows)


def _specs(args: TrainStepArgs, folder: str) -> list[Spec]:
    shape = {"d": args.d, "hidden": args.hidden, "activation": args.activation, "seed": args.seed, "folder": folder}
    ours = {"method": args.method, "set": list(args.set or ()), "checkpoint": args.checkpoint, "site": args.site}
    factory = "nogemm.bench.train_step:StepContender"
    specs = [Spec(name=OURS, factory=factory, settings=shape | ours | {"kind": "ours", "update": "fused"})]
    if args.method == "tree":
        for name, kind in (("nogemm-rows", "rows"), ("masked-fused", "masked"), ("masked-foreach", "masked")):
            settings = shape | ours | {"kind": kind, "update": name.partition("-")[2]}
            specs.append(Spec(name=name, factory=factory, settings=settings))
        return specs
    if args.method == "hire":
        masked = shape | ours | {"kind": "masked", "update": "fused"}
        specs.append(Spec(name="masked-fused", factory=factory, settings=masked))
    for name in DENSE:
        settings = shape | {"kind": "dense", "update": name.partition("-")[2]}
        specs.append(Spec(name=name, factory=factory, settings=settings))
    return specs


def _source(args: TrainStepArgs, codes: str) -> Tensor | None:
    if codes == "trained":
        assert args.checkpoint is not None
        return site_inputs(args.checkpoint, args.site, seed=args.seed)
    return None if codes == "uniform" else skewed_tokens(8 * args.tokens, args.d, args.seed)


def skewed_tokens(count: int, width: int, seed: int) -> Tensor:
    """Draw tokens around 64 centres, centre k with weight 1 / (k + 1), a third of the centres' spread around each."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(_CENTRES, width, generator=generator)
    weights = 1.0 / torch.arange(1, _CENTRES + 1)
    chosen = torch.multinomial(weights, count, replacement=True, generator=generator)
    return centres[chosen] + 0.33 * torch.randn(count, width, generator=generator)


class StepContender:
    """Take training steps with one layer and one kind of AdamW (see `nogemm.bench.engine.worker.Contender`)."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.settings = settings
        self.memory = keep_freed_memory()  # as `distil` trains, for the dense layer too, as long as the process lives
        self.memory.__enter__()
        self.layer = self._layer().requires_grad_(True)
        self.optimiser = self._optimiser()
        self.tokens = 0

    def _optimiser(self) -> torch.optim.Optimizer:
        parameters = self.layer.parameters()
        if self.settings["kind"] == "rows":
            return LazyAdam(parameters, lr=1e-4)
        fused = self.settings["update"] == "fused"
        return torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.0, fused=fused, foreach=not fused)

    def _layer(self) -> nn.Module:
        s = self.settings
        if s["kind"] != "dense":
            layer = our_layer(s).train()
            layer.row_sparse = s["kind"] == "rows"
            return MASKED[s["method"]](layer) if s["kind"] == "masked" else layer
        stack = DenseStack(s["d"], s["hidden"], s["activation"], 1, s["seed"])
        return nn.Sequential(stack.up[0], {"gelu": nn.GELU(), "relu": nn.ReLU()}[s["activation"]], stack.down[0])

    def prepare(self, case: dict[str, Any]) -> dict[str, Any]:
        self.tokens = case["tokens"]
        self.pool = TokenPool(Path(self.settings["folder"]) / case["codes"], self.settings["d"])
        self.gradient = torch.randn(self.tokens, self.settings["d"], generator=torch.Generator().manual_seed(7))
        return self._verify() | {"parts": self._parts()}

    def draw(self) -> Tensor:
        return self.pool.draw(self.tokens).detach().requires_grad_()

    def run(self, x_ND: Tensor) -> None:
        self.optimiser.zero_grad(set_to_none=True)
        self.layer(x_ND).backward(self.gradient)
        self.optimiser.step()

    def _verify(self) -> dict[str, Any]:
        """Compare output and gradients of 64 tokens with float64."""
        x_ND = self.draw().detach()[:_CHECKED]
        found = gradients(self.layer, x_ND, self.gradient[:_CHECKED])
        exact = gradients(copy.deepcopy(self.layer).double(), x_ND.double(), self.gradient[:_CHECKED].double())
        facts: dict[str, Any] = {"verified": True, "max_error": 0.0}
        for name, value in found.items():
            rows, expected = value.reshape(len(value), -1), exact[name].reshape(len(value), -1)
            one = compare(rows, expected, _GRADIENTS)
            facts["max_error"] = max(facts["max_error"], one.get("max_error", 0.0))
            if not one["verified"]:
                return facts | {"verified": False, "error": f"gradient of {name} {one['error']}"}
        return facts

    def _parts(self) -> dict[str, float]:
        """Time forward, backward and update apart: medians of three steps, microseconds."""
        times: dict[str, list[float]] = {"forward": [], "backward": [], "update": []}
        for _ in range(3):
            x_ND = self.draw()
            self.optimiser.zero_grad(set_to_none=True)
            marks = [time.perf_counter()]
            y_ND = self.layer(x_ND)
            marks.append(time.perf_counter())
            y_ND.backward(self.gradient)
            marks.append(time.perf_counter())
            self.optimiser.step()
            marks.append(time.perf_counter())
            for name, start, end in zip(times, marks, marks[1:], strict=False):
                times[name].append(1e6 * (end - start))
        return {name: sorted(values)[1] for name, values in times.items()}


def gradients(layer: nn.Module, x_ND: Tensor, gradient_ND: Tensor) -> dict[str, Tensor]:
    """Return output and gradients {"output", "input", parameter name: ...} of one backward pass."""
    layer.zero_grad(set_to_none=True)
    x_ND = x_ND.detach().clone().requires_grad_()
    y_ND = layer(x_ND)
    y_ND.backward(gradient_ND)
    found = {"output": y_ND.detach(), "input": x_ND.grad}
    for name, parameter in layer.named_parameters():
        gradient = parameter.grad
        found[name] = gradient.to_dense() if gradient is not None and gradient.is_sparse else gradient
    layer.zero_grad(set_to_none=True)
    return {name: value for name, value in found.items() if value is not None}
