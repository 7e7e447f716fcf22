"""`nogemm bench head`: a decoder's vocabulary head naming its most likely token, beside dense heads of other engines.

States are the model's own on a text; one half fits our codes, tokens of the other half are verified and timed. Our
tokens must be those of float64 logits at every position, but where two logits are closer than float32 tells apart.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nogemm.bench import peers
from nogemm.bench.contenders.head import DEFERRED, DENSE, EXACT, SEARCH
from nogemm.bench.engine.measure import MIN_ROUNDS, Plan, Spec, add_ratios, measure
from nogemm.bench.engine.result import origin
from nogemm.convert.head import dense_head, find_head, head_states
from nogemm.errors import ConfigError
from nogemm.hardware.cpu import last_level_cache_bytes, machine, usable_cores
from nogemm.heads import HeadConfig, second_moment
from nogemm.models.loading import load_model, load_tokenizer
from nogemm.ops import head_logits
from nogemm.running.measured import Keep, Note

AGAINST = (
    "torch-fp32",
    "torch-bf16",
    "torch-int8",
    "onnxruntime-int8",
    "openvino-f32",
    "openvino-bf16",
    "openvino-int8",
)

# Of a head: a lone small one would sit in a cache that the rest of a model uses.
MOST_COPIES, MOST_OF_OURS = 12, 40
_OUR_SHARE = 0.06  # of the memory, for the heads of one contender of ours


@dataclass(frozen=True, kw_only=True)
class HeadArgs:
    """Say which head is measured.

    Attributes:
        model: a causal language model: directory, hub name or GGUF file.
        dtype: "fp32" or "bf16", of the head's weights.
        leading, sketch, rows: as in `HeadConfig`.
        positions: states that are verified and timed; as many again fit the codes.
        batch: states a call.
        against: dense engines.
        threads, rounds: as in `nogemm bench layer`; seconds: aimed at per turn.
    """

    model: str
    dtype: str = "bf16"
    leading: int = 32
    sketch: int = 128
    rows: int | None = None
    positions: int = 2000
    batch: tuple[int, ...] = (1,)
    against: tuple[str, ...] = AGAINST
    threads: int = 0
    rounds: int = MIN_ROUNDS
    seconds: float = 0.3


def run_head_bench(
    args: HeadArgs, texts: Iterable[str], *, note: Note | None = None, keep: Keep | None = None
) -> dict[str, Any]:
    """Measure; returns `origin` and {"rows", "vocabulary", "width"}.

    Raises:
        ConfigError: an unknown engine, a model without a head, or too few texts.
    """
    if args.dtype not in ("fp32", "bf16"):
        raise ConfigError(f"--dtype must be fp32 or bf16, got {args.dtype!r}")
    unknown = [name for name in args.against if name not in peers.CONTENDERS]
    if unknown:
        raise ConfigError(f"--against: unknown engine {unknown[0]!r}; known: {', '.join(peers.CONTENDERS)}")
    threads = args.threads or usable_cores()
    head = origin(asdict(args) | {"model": Path(args.model).name, "threads": threads})
    with tempfile.TemporaryDirectory(prefix="nogemm-bench-") as folder:
        file = Path(folder) / "head.safetensors"
        weight_VD = _write(args, texts, file, note or (lambda line: None))
        copies = copies_of(weight_VD, 4 + len(args.against))
        settings = {"file": str(file), "copies": copies}
        own = {"copies": copies_of_ours(weight_VD, args, copies)}
        settings |= {"leading": args.leading, "sketch": args.sketch, "rows": args.rows}
        ours = "nogemm.bench.contenders.head:OurHead"
        specs = [
            Spec(name=name, factory=ours, settings=settings | own | {"engine": name})
            for name in (EXACT, DEFERRED, SEARCH, DENSE)
        ]
        dense = "nogemm.bench.contenders.head:DenseHead"
        for name in args.against:
            missing = peers.missing(name)
            specs.append(Spec(name=name, factory=dense, settings=settings | {"engine": name}, missing=missing))
        head |= {"vocabulary": weight_VD.shape[0], "width": weight_VD.shape[1], "copies": copies}
        head["copies_of_ours"] = own["copies"]
        del weight_VD
        cases = [{"batch": batch} for batch in args.batch]
        plan = Plan(threads=threads, rounds=args.rounds, seconds=args.seconds)

        def finished(rows: list[Any]) -> dict[str, Any]:
            add_ratios(rows, EXACT, ("batch",))
            return head | {"rows": rows}

        kept = None if keep is None else lambda rows: keep(finished(rows))
        return finished(measure(specs, cases, plan, note=note, keep=kept))


def copies_of(weight_VD: Tensor, contenders: int) -> int:
    """Return how many heads take turns: twice the last cache, by the least that a contender reads, where memory allows.

    Memory holds each contender's heads twice in float32: a dense engine keeps what it was made from.
    """
    read, held = weight_VD.numel() / 2, 2 * 4 * weight_VD.numel() * contenders
    room = int((machine()["memory_bytes"] or 2**63) // held)
    return max(1, min(MOST_COPIES, room, round(2 * last_level_cache_bytes() / read)))


def copies_of_ours(weight_VD: Tensor, args: HeadArgs, dense: int) -> int:
    """Return how many of our heads take turns, at least as many as dense ones: a search reads far less than they do.

    A head holds its weights, and codes of at most 0.7 bytes a weight.
    """
    rows, width = weight_VD.shape
    computed = HeadConfig(rows=args.rows).rows_of(rows) * width * weight_VD.element_size()
    searched = rows * (args.leading + (args.sketch - args.leading) / 2 + 8) + computed
    held = weight_VD.numel() * (weight_VD.element_size() + 0.7)
    room = int(_OUR_SHARE * (machine()["memory_bytes"] or 2**63) / held)
    return max(dense, min(MOST_OF_OURS, room, round(2 * last_level_cache_bytes() / searched)))


def _write(args: HeadArgs, texts: Iterable[str], file: Path, note: Note) -> Tensor:
    """Run the model over texts; store its head, states, and the tokens that float64 finds; return the weights."""
    from safetensors.torch import save_file

    model = load_model(args.model, dtype=torch.float32)
    dense = find_head(model) or dense_head(model)
    if dense.bias is not None:
        raise ConfigError(f"bench head: the head of {args.model} has a bias, which the dense contenders here have not")
    note(f"states of {Path(args.model).name}")
    states_SD = _states(model, dense, texts, load_tokenizer(args.model), 2 * args.positions)
    weight_VD = dense.weight.detach().to(torch.bfloat16 if args.dtype == "bf16" else torch.float32).contiguous()
    order = torch.randperm(len(states_SD), generator=torch.Generator().manual_seed(0))
    fit, held = states_SD[order[args.positions :]], states_SD[order[: args.positions]].contiguous()
    note("reference tokens")
    stored = {
        "weight": weight_VD,
        "moment": second_moment(fit).float(),
        "states": held,
        "tokens": reference_tokens(held, weight_VD),
    }
    save_file(stored, file)
    return weight_VD


def reference_tokens(states_ND: Tensor, weight_VD: Tensor) -> Tensor:
    """Find the largest logits, accumulated in float32, and hold the two largest of each state against float64.

    Raises:
        ArithmeticError: float64 ranks two logits otherwise that are further apart than float32 can blur.
    """
    tokens = []
    for x_ND in states_ND.split(16):
        logits = head_logits(x_ND, weight_VD)
        for x, index in zip(x_ND.double(), logits.topk(2, 1).indices, strict=True):
            rows = weight_VD[index].double()
            first, second = (rows @ x).tolist()
            blur = 2.0**-23 * len(x) * float((rows.abs() @ x.abs()).max())
            if second - first > blur:
                raise ArithmeticError(f"head_logits ranks rows {index.tolist()} otherwise than float64")
        tokens.append(logits.argmax(1))
    return torch.cat(tokens)


def _states(model: Any, dense: torch.nn.Module, texts: Iterable[str], tokenizer: Any, count: int) -> Tensor:
    kept: list[Tensor] = []
    with closing(head_states(model, dense, texts, tokenizer)) as seen:
        for states in seen:
            kept.append(states.float())
            if sum(map(len, kept)) >= count:
                break
    found = sum(map(len, kept))
    if found < count:
        raise ConfigError(f"--data: the texts have {found} tokens, {count} are needed (--positions, twice)")
    return torch.cat(kept)[:count]
