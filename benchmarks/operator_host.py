"""What running inside OpenVINO costs our operator: two threads in one call, and conversions around it.

    python benchmarks/operator_host.py --json $RESULTS/operator-openvino.json

One packed LookupFFN of MiniLM's shape. `operator` is a graph of it alone, on one thread and on two. `between` has a
matrix before and after it, `matrices` the same two without it, so between - matrices is what the operator costs
there: if the host converted, copied or waited around it, that is more than the operator alone. The matrices run in
f32, bf16, or int8 (quantised by NNCF). All graphs take turns, round after round, in one process; tokens are fresh.

Legend: N tokens, D width.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import time
from pathlib import Path
from typing import Any

import numpy as np
import openvino
import torch
from openvino import opset15 as ov
from openvino.utils.node_factory import NodeFactory

import nogemm
from nogemm.bench.engine.check import token_errors
from nogemm.bench.engine.measure import summary
from nogemm.bench.engine.result import origin
from nogemm.export.extension import extension_path
from nogemm.export.openvino_host import OPERATOR, quantise, shared_core
from nogemm.hardware.cpu import usable_cores
from nogemm.running.measured import Keep, Note, measured

D = 384
LAYER = nogemm.LookupConfig(tables=64, bits=8, projection=nogemm.BHConfig(block=64))
BATCHES = (64, 512, 4096)
RESTS = ("f32", "bf16", "int8")
COSINES = {"bf16": 0.99, "int8": 0.95}  # at least, with the rest in this precision
# In f32: a token's relative error (the operator rounds tokens to 15 bits, where a step may go either way), the largest
# share of tokens beyond it because a bit flipped, and how near to zero that bit is, in sizes of a usual one.
ROUNDING, FLIPPED, NEAR = 1e-3, 0.1, 1e-3
ROUNDS, SECONDS = 15, 0.03


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=SECONDS, help="aimed at per turn")
    parser.add_argument("--batch", default=",".join(map(str, BATCHES)))
    args = parser.parse_args()
    batches = tuple(int(word) for word in args.batch.split(","))
    threads = usable_cores()
    head = origin({"d": D, "layer": LAYER.to_dict(), "dtype": "int8", "threads": threads, "seconds": args.seconds})
    packed = packed_layer()
    graphs = compiled_graphs(packed, threads)

    def work(note: Note, keep: Keep) -> dict[str, Any]:
        rows: list[dict[str, Any]] = []
        for batch in batches:
            note(f"timing {batch:,} tokens")
            for (what, rest, _), model in graphs.items():
                check(model, packed, what, rest, batch)
            rows += timed(graphs, batch, args.seconds)
            keep(head | {"rows": list(rows), "found": []})
        return head | {"rows": rows, "found": found(rows, threads)}

    measured("operator-host", args.json, work, lambda result: print("\n".join(result["found"])))


@functools.cache
def layer() -> Any:
    """Return the layer, its tables random."""
    torch.manual_seed(0)
    made = LAYER.build(D)
    torch.nn.init.normal_(made.get_parameter("tables"))
    return made.eval().requires_grad_(False)


def packed_layer() -> Any:
    """Return it packed, with int8 rows."""
    return layer().pack("int8")


def compiled_graphs(packed: Any, threads: int) -> dict[tuple[str, str, int], Any]:
    """Compile every graph: {(what, precision of the rest, threads): model}."""
    made: dict[tuple[str, str, int], Any] = {}
    for count in sorted({1, threads}):
        made["operator", "f32", count] = compiled(graph(packed, "operator"), "f32", count)
    for rest in RESTS:
        for what in ("between", "matrices"):
            made[what, rest, threads] = compiled(graph(packed, what), rest, threads)
    return made


def graph(packed: Any, what: str) -> Any:
    """Build x [N, D] -> [matrix ->] [operator ->] [matrix ->] y."""
    factory = NodeFactory()
    factory.add_extension(str(extension_path()))
    before_DD, after_DD = (ov.constant(weight_DD) for weight_DD in matrices())
    x = node = ov.parameter([-1, D], np.float32, name="x")
    if what != "operator":
        node = ov.matmul(node, before_DD, False, True)
    if what != "matrices":
        weights = ov.constant(packed.get_buffer("packed").numpy())
        node = factory.create(OPERATOR, [node.output(0), weights.output(0)], {"d_out": D})
    if what != "operator":
        node = ov.matmul(node, after_DD, False, True)
    return openvino.Model([node.output(0)], [x], what)  # type: ignore[misc]


def matrices() -> np.ndarray:
    """Return the two random matrices, [2, D, D], which keep the scale."""
    return (np.random.default_rng(0).standard_normal((2, D, D)) / D**0.5).astype(np.float32)


def compiled(model: Any, rest: str, threads: int) -> Any:
    """Compile for latency; int8 is calibrated on random tokens."""
    if rest == "int8":
        model = quantise(model, [(torch.randn(64, D),) for _ in range(8)])
    hint = "bf16" if rest == "bf16" else "f32"
    config = {"INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1, "INFERENCE_PRECISION_HINT": hint}
    return shared_core().compile_model(model, "CPU", config)


def check(model: Any, packed: Any, what: str, rest: str, batch: int) -> None:
    """Raise unless a graph computes what torch does; the operator alone gives the same bits.

    The matrix before the operator rounds otherwise, so a bit of the hash flips where it lies that near to zero. In f32
    few tokens may differ by more than rounding, and those must agree with a neighbouring code. Other precisions move
    every token: whole outputs are held by their cosine.
    """
    before_DD, after_DD = torch.from_numpy(matrices())
    x_ND = torch.randn(batch, D)
    seen_ND = x_ND if what == "operator" else x_ND @ before_DD.T
    y_ND = seen_ND if what == "matrices" else packed(seen_ND)
    y_ND = y_ND if what == "operator" else y_ND @ after_DD.T
    found_ND = torch.from_numpy(model([x_ND.numpy()])[0])
    cosine = float(torch.nn.functional.cosine_similarity(found_ND, y_ND, dim=-1).mean())
    if what == "operator":
        right = torch.equal(found_ND, y_ND)
    elif rest == "f32":
        beyond = torch.nonzero(~(token_errors(found_ND, y_ND) <= ROUNDING)).flatten().tolist()
        scale = y_ND.square().sum(-1).mean().sqrt()
        right = len(beyond) <= max(1.0, FLIPPED * batch) and all(
            what == "between" and distance(found_ND[n], packed, seen_ND[n], after_DD) <= ROUNDING * scale
            for n in beyond
        )
    else:
        right = cosine >= COSINES[rest]
    if not right:
        raise AssertionError(f"{what}, {rest}: differs from torch at {batch} tokens, mean cosine {cosine:.6f}")


def distance(found_D: torch.Tensor, packed: Any, seen_D: torch.Tensor, after_DD: torch.Tensor) -> float:
    """Return how far an answer is from the nearest that other signs of the bits closest to zero give.

    A bit's value is z = w.x / s + b, with w a centred row of the projection and s the norm's deviation: at
    x + (t - z) s w / w.w it is t. For a t beyond what rounding does to z, that is the same token with a known sign.
    """
    unpacked = layer()
    matrix_MD = unpacked.projection.dense_matrix()
    matrix_MD = matrix_MD - matrix_MD.mean(1, keepdim=True)
    z_M = unpacked.projection(unpacked.norm(seen_D.unsqueeze(0)))[0]
    edge = NEAR * float(z_M.abs().mean())
    near = [j for j in z_M.abs().argsort()[:4].tolist() if abs(float(z_M[j])) <= edge]
    choices = [seen_D]
    for signs in itertools.product((1, -1), repeat=len(near)):
        moved_D = seen_D.clone()
        for j, sign in zip(near, signs, strict=True):
            step = (sign * edge - z_M[j]) * seen_D.std(correction=0) / matrix_MD[j].square().sum()
            moved_D += step * matrix_MD[j]
        choices.append(moved_D)
    answers_KD = packed(torch.stack(choices)) @ after_DD.T
    return float((answers_KD - found_D).norm(dim=-1).min())


def timed(graphs: dict[tuple[str, str, int], Any], batch: int, seconds: float) -> list[dict[str, Any]]:
    """Time every graph in turn; a row each."""
    pool_ND = np.random.default_rng(1).standard_normal((max(65_536, 2 * batch), D)).astype(np.float32)
    times: dict[tuple[str, str, int], list[float]] = {key: [] for key in graphs}
    requests, at = {key: model.create_infer_request() for key, model in graphs.items()}, 0
    for turn in range(ROUNDS + 1):  # the first is not counted
        for key, request in requests.items():
            end, us = time.perf_counter() + seconds, []
            while not us or time.perf_counter() < end:
                at = at + batch if at + 2 * batch <= len(pool_ND) else 0
                start = time.perf_counter()
                request.infer([pool_ND[at : at + batch]], share_inputs=True, share_outputs=True)
                us.append((time.perf_counter() - start) * 1e6)
            if turn:
                times[key] += us
    return [
        {"graph": what, "rest": rest, "threads": count, "batch": batch, "verified": True, **summary(us)}
        for (what, rest, count), us in times.items()
    ]


def found(rows: list[dict[str, Any]], threads: int) -> list[str]:
    """Say what follows, a line a batch."""
    median = {(row["graph"], row["rest"], row["threads"], row["batch"]): row["us_median"] for row in rows}
    lines = []
    for batch in dict.fromkeys(row["batch"] for row in rows):
        alone = median["operator", "f32", threads, batch]
        speedup = median["operator", "f32", 1, batch] / alone
        inside = ", ".join(
            f"{median['between', rest, threads, batch] - median['matrices', rest, threads, batch]:.0f} between {rest}"
            for rest in RESTS
        )
        lines.append(f"{batch} tokens: {alone:.0f} us alone, {speedup:.2f} times one thread's speed; {inside}")
    return lines


if __name__ == "__main__":
    main()
