"""`nogemm bench decoder`: a whole ReLU decoder decoding one token at a time, beside dense decoders of other engines.

The model is an OPT with random weights, whose biases let a stated share of its neurons fire: it says what a decoder of
this shape and sparsity costs, not what it would say. Logits of every contender are compared with those of float32
products of the same weights before the clock starts.
"""

from __future__ import annotations

import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from nogemm.bench import peers
from nogemm.bench.contenders.decoder import ALLOWED_BEYOND, make_decoder
from nogemm.bench.engine.measure import MIN_ROUNDS, Plan, Spec, add_ratios, measure
from nogemm.bench.engine.result import origin
from nogemm.errors import ConfigError
from nogemm.hardware.cpu import usable_cores
from nogemm.running.measured import Keep, Note

OURS = "nogemm-int8"
EXPORTED = "nogemm-openvino-int8"
AGAINST = (EXPORTED, "torch-bf16", "torch-int8", "openvino-bf16", "openvino-int8")


@dataclass(frozen=True, kw_only=True)
class DecoderArgs:
    """Say which decoder is measured.

    Attributes:
        d, hidden, layers, heads, vocabulary: its shape.
        active: share of the neurons that fire for a token.
        sketch: of our FFNs, "int8" or "int4".
        prompt: tokens in the cache when decoding begins.
        against: ours in OpenVINO, and dense engines, of AGAINST.
        threads, rounds, seconds, seed: as in `nogemm bench layer`.
    """

    d: int = 2048
    hidden: int = 8192
    layers: int = 24
    heads: int = 32
    vocabulary: int = 50272
    active: float = 0.05
    sketch: str = "int4"
    prompt: int = 32
    against: tuple[str, ...] = AGAINST
    threads: int = 0
    rounds: int = MIN_ROUNDS
    seconds: float = 0.3
    seed: int = 0


def run_decoder_bench(args: DecoderArgs, *, note: Note | None = None, keep: Keep | None = None) -> dict[str, Any]:
    """Measure; returns `origin` and {"rows"}.

    Raises:
        ConfigError: an unknown engine, or a shape that no decoder has.
    """
    _check(args)
    threads = args.threads or usable_cores()
    head = origin(asdict(args) | {"threads": threads})
    shape = {
        k: v for k, v in asdict(args).items() if k in ("d", "hidden", "layers", "heads", "vocabulary", "active", "seed")
    }
    with tempfile.TemporaryDirectory(prefix="nogemm-bench-") as folder:
        file = Path(folder) / "reference.safetensors"
        if note is not None:
            note("reference logits")
        write_reference(shape, args.prompt, file)
        settings = {"shape": shape, "file": str(file), "keep": args.active, "sketch": args.sketch}
        contenders = "nogemm.bench.contenders.decoder:"
        specs = [Spec(name=OURS, factory=contenders + "OurDecoder", settings=settings | {"engine": OURS})]
        for name in args.against:
            kind = "TorchDecoder" if name.startswith("torch") else "OpenVinoDecoder"
            kind = "ExportedDecoder" if name == EXPORTED else kind
            missing = peers.missing(name.removeprefix("nogemm-"))
            specs.append(
                Spec(name=name, factory=contenders + kind, settings=settings | {"engine": name}, missing=missing)
            )

        def finished(rows: list[Any]) -> dict[str, Any]:
            add_ratios(rows, OURS, ("batch",))
            return head | {"rows": rows}

        kept = None if keep is None else lambda rows: keep(finished(rows))
        plan = Plan(threads=threads, rounds=args.rounds, seconds=args.seconds)
        return finished(measure(specs, [{"batch": 1}], plan, note=note, keep=kept))


def write_reference(shape: dict[str, Any], prompt: int, file: Path) -> None:
    """Store a prompt, its keys and values, tokens to decode behind it, and their logits by float32 products."""
    from safetensors.torch import save_file
    from transformers import DynamicCache

    model = make_decoder(shape).float()
    source = torch.Generator().manual_seed(shape["seed"] + 1)
    ids = torch.randint(4, shape["vocabulary"], (1, prompt + ALLOWED_BEYOND), generator=source)
    cache = DynamicCache(config=model.config)
    with torch.inference_mode():
        model(input_ids=ids[:, :prompt], past_key_values=cache, use_cache=True)
        layers: list[Any] = list(cache.layers)
        keys = torch.stack([layer.keys for layer in layers]).clone()
        values = torch.stack([layer.values for layer in layers]).clone()
        logits = [
            model(input_ids=ids[:, place : place + 1], past_key_values=cache, use_cache=True).logits[0, -1]
            for place in range(prompt, ids.shape[1])
        ]
    stored = {
        "prompt": ids[:, :prompt].contiguous(),
        "tokens": ids[0, prompt:].contiguous(),
        "logits": torch.stack(logits),
    }
    save_file(stored | {"keys": keys, "values": values}, file)


def _check(args: DecoderArgs) -> None:
    unknown = [name for name in args.against if name not in AGAINST]
    if unknown:
        raise ConfigError(f"--against: unknown engine {unknown[0]!r}; known: {', '.join(AGAINST)}")
    if args.d % args.heads:
        raise ConfigError(f"--d must be a multiple of --heads, got d={args.d}, heads={args.heads}")
    if not 0 < args.active < 1:
        raise ConfigError(f"--active must be above 0 and below 1, got {args.active}")
    if min(args.layers, args.hidden, args.prompt) < 1 or args.prompt + ALLOWED_BEYOND > 256:
        raise ConfigError(
            f"--layers, --hidden and --prompt must be at least 1, --prompt at most {256 - ALLOWED_BEYOND}"
        )
