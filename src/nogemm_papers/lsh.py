"""`nogemm bench lsh`: how many of a token's strongest neurons hashes find, how uneven their buckets are, at what cost.

Figure 1 of LookupFFN (Zeng et al., 2023). The paper names neither the weights nor x of its "top x"; here both are
stated. A neuron's strength is its pre-activation, the inner product of [x; 1] and [w; b], which is also what the hashes
see. Sketches of HiRE stand beside the hashes: they rank all neurons, and the first C of the ranking are looked at.

Legend: N tokens, D width, F neurons, T tables, K bits per table, X strongest neurons, C candidates, R rank.
Reading order: `LshBenchArgs`, `run_lsh_bench`, the three searches; what is counted is in `lsh_search.py`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch

from nogemm.bench.engine.result import origin
from nogemm.errors import ConfigError
from nogemm.layers import HireConfig, MongooseConfig, SlideConfig
from nogemm.layers.hire.config import SketchKind
from nogemm.layers.mongoose.layer import MongooseFFN
from nogemm.models.directory import PACKAGED
from nogemm.running.partial import Keep
from nogemm_papers.lsh_cases import Case, gaussian_case, model_case
from nogemm_papers.lsh_search import (
    Search,
    bucket_sizes,
    chance_of_collision,
    found_by_hashes,
    found_by_ranking,
    mean_search,
)

Note = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class LshBenchArgs:
    """Say which layers are searched, and how.

    Attributes:
        model, site: directory of a dense model, and which of its FFNs. The other case is a Gaussian layer of its shape.
        bits, tables: K and T of random hashes, all combinations.
        learned_tables: T of learned hashes, each trained on its own.
        top: X, the sizes of the set of strongest neurons.
        share: C as a share of the neurons, for the sketches.
        tokens: of the test split that are searched for.
        training_tokens: of the training split that hashes and sketches learn from.
        draws: of random hashes, averaged.
        steps, batch, rate: of Adam on the triplet loss, for each learned hash.
        seed: of hashes, training and the Gaussian layer.
    """

    model: str = PACKAGED
    site: int = 3
    bits: tuple[int, ...] = (4, 6, 8)
    tables: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128, 256)
    learned_tables: tuple[int, ...] = (1, 4, 16, 64)
    top: tuple[int, ...] = (1, 16, 77)
    share: tuple[float, ...] = (0.0125, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2)
    tokens: int = 2048
    training_tokens: int = 16_384
    draws: int = 3
    steps: int = 100
    batch: int = 128
    rate: float = 0.05
    seed: int = 0


def run_lsh_bench(args: LshBenchArgs, *, note: Note | None = None, keep: Keep | None = None) -> dict[str, Any]:
    """Search two layers by random hashes (SLIDE), learned hashes (MONGOOSE) and sketches (HiRE).

    `keep` gets the result as it grows.

    Returns:
        `origin` and {"cases"}: each has "case", "d", "hidden", "tokens", "dense" (FLOP and bytes of
        all products), "degrees" (median angle between a token and its X strongest neurons, by X, and "all" neurons),
        "rows" and "buckets". A row has "method" ("random", "learned", "int8", "int4", "low_rank"),
        its parameters ("bits" and "tables", or "candidates" and "rank"), "found" (share by X), "computed" and
        "computed_p95" (shares of the neurons), "flops" and "bytes" (of finding and computing them, per token alone);
        random rows also "expected_found" and "expected_computed", from the angles. "buckets" describes the bucket sizes
        of a hash: "sizes" (sorted, mean over tables), "own" and "hit" (mean size of a neuron's and of a token's
        bucket, relative to even buckets), "empty" (share of the buckets).
    Raises:
        ConfigError: nothing to sweep, values out of range, or a site that the model does not have.
    """
    _check(args)
    say = note or (lambda line: None)
    say(f"activations of {args.model}")
    head = origin(asdict(args))
    real = model_case(args.model, args.site, args.tokens, args.training_tokens, args.seed)
    cases: list[dict[str, Any]] = []

    def kept() -> None:
        if keep is not None:
            keep(head | {"cases": copy.deepcopy(cases)})

    for case in (real, gaussian_case(real, args.seed)):
        if max(args.top) > case.hidden:
            raise ConfigError(f"--top {max(args.top)}: the layer has {case.hidden} neurons")
        rows: list[dict[str, Any]] = []
        buckets: list[dict[str, Any]] = []
        products = 2.0 * case.d * case.hidden
        cases.append(
            {
                "case": case.name,
                "d": case.d,
                "hidden": case.hidden,
                "tokens": len(case.x_ND),
                "dense": {"flops": products, "bytes": 2.0 * products},
                "degrees": _degrees(case, args),
                "rows": rows,
                "buckets": buckets,
            }
        )
        for method, search in (("random", search_by_random_hashes), ("learned", search_by_learned_hashes)):
            for part in search(case, args):
                say(f"{case.name}: {method}, {part['bits']} bits")
                rows += [{"method": method, **row} for row in part["rows"]]
                buckets.append({"method": method, "bits": part["bits"], **part["buckets"]})
                kept()
        for row in search_by_sketches(case, args):
            say(f"{case.name}: {row['method']}")
            rows.append(row)
            kept()
    return head | {"cases": cases}


def _degrees(case: Case, args: LshBenchArgs) -> dict[str, float]:
    degrees_NF = 180.0 * (1.0 - chance_of_collision(case.x_ND, case.weight_FD, case.bias_F))
    top_NX = case.strongest(max(args.top))
    medians = {str(x): float(degrees_NF.gather(1, top_NX[:, :x]).median()) for x in args.top}
    return {**medians, "all": float(degrees_NF.median())}


def _check(args: LshBenchArgs) -> None:
    for name in ("bits", "tables", "learned_tables", "top", "share"):
        values = getattr(args, name)
        if not values or min(values) <= 0:
            given = ", ".join(map(str, values)) or "none"
            raise ConfigError(f"--{name.replace('_', '-')} must name values above 0, got {given}")
    if max(args.bits) > 16:
        raise ConfigError(f"--bits must be at most 16, got {max(args.bits)}")
    if max(args.share) > 1:
        raise ConfigError(f"--share must be at most 1, got {max(args.share)}")
    for name in ("tokens", "training_tokens", "draws", "batch"):
        if getattr(args, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}")
    if args.steps < 0:
        raise ConfigError(f"--steps must be at least 0, got {args.steps}")
    if args.rate <= 0:
        raise ConfigError(f"--rate must be above 0, got {args.rate}")


def search_by_random_hashes(case: Case, args: LshBenchArgs) -> Iterator[dict[str, Any]]:
    """Search by random signs: T tables are the first T of the most."""
    counts = tuple(sorted(set(args.tables)))
    top_NX = case.strongest(max(args.top))
    chance_NF = chance_of_collision(case.x_ND, case.weight_FD, case.bias_F)
    for bits in args.bits:
        draws = []
        for draw in range(args.draws):
            torch.manual_seed(args.seed + 1000 * draw + bits)
            config = SlideConfig(bits=bits, tables=counts[-1])
            layer = config.build(case.d, case.dense.d_out, hidden=case.hidden, gated=case.dense.gate is not None)
            layer.fit_dense(case.dense)
            codes_NT, codes_FT = layer.hashed(case.x_ND), layer.neuron_codes()
            draws.append((found_by_hashes(codes_NT, codes_FT, top_NX, args.top, counts), codes_NT, codes_FT))
        rows = []
        for place, tables in enumerate(counts):
            expected_NF = 1.0 - (1.0 - chance_NF**bits) ** tables
            theory = {
                "expected_found": {str(x): float(expected_NF.gather(1, top_NX[:, :x]).mean()) for x in args.top},
                "expected_computed": float(expected_NF.mean()),
            }
            rows.append(_hash_row(case, bits, tables, mean_search([found[place] for found, _, _ in draws])) | theory)
        yield {"bits": bits, "rows": rows, "buckets": bucket_sizes(draws[0][1], draws[0][2], bits)}


def search_by_learned_hashes(case: Case, args: LshBenchArgs) -> Iterator[dict[str, Any]]:
    """Search by hashes trained with MONGOOSE's triplet loss, anew for each number of tables."""
    top_NX = case.strongest(max(args.top))
    for bits in args.bits:
        rows, sizes = [], {}
        for tables in sorted(set(args.learned_tables)):
            torch.manual_seed(args.seed + bits)
            layer = learn_hashes(case, bits, tables, args)
            codes_NT, codes_FT = layer.hashed(case.x_ND), layer.neuron_codes()
            (search,) = found_by_hashes(codes_NT, codes_FT, top_NX, args.top, (tables,))
            rows.append(_hash_row(case, bits, tables, search))
            sizes = bucket_sizes(codes_NT, codes_FT, bits)
        yield {"bits": bits, "rows": rows, "buckets": sizes}


def learn_hashes(case: Case, bits: int, tables: int, args: LshBenchArgs) -> MongooseFFN:
    """Train MONGOOSE's planes alone on the case's training tokens; its own scheduler rebuilds the tables."""
    config = MongooseConfig(bits=bits, tables=tables)
    layer = config.build(case.d, case.dense.d_out, hidden=case.hidden, gated=case.dense.gate is not None)
    layer.fit_dense(case.dense)
    optimiser = torch.optim.Adam([layer.planes], lr=args.rate)
    for _ in range(args.steps):
        chosen = torch.randint(len(case.training_ND), (args.batch,))
        loss = layer.triplet_loss(case.training_ND[chosen])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        layer.rebuild_if_moved()
    layer.build_tables()
    return layer


def _hash_row(case: Case, bits: int, tables: int, search: Search) -> dict[str, Any]:
    """Cost: K T products with [x; 1], the entries of the buckets, the rows of the neurons in them."""
    products = (case.d + 1) * bits * tables
    looked = search.computed * case.hidden
    return {
        "bits": bits,
        "tables": tables,
        **_outcome(search),
        "flops": 2.0 * (products + case.d * looked),
        "bytes": 4.0 * (products + search.entries + case.d * looked),
    }


def search_by_sketches(case: Case, args: LshBenchArgs) -> Iterator[dict[str, Any]]:
    """Search by the rankings of HiRE's sketches; low-rank ones are whitened by the training tokens."""
    top_NX = case.strongest(max(args.top))
    sketches: list[tuple[SketchKind, int | None]] = [("int8", None), ("int4", None)]
    for k in (16, 8, 4):
        sketches.append(("low_rank", case.d // k))
    for kind, rank in sketches:
        config = HireConfig(sketch=kind, rank=rank)
        layer = config.build(
            case.d,
            case.dense.d_out,
            hidden=case.hidden,
            activation=case.dense.activation,
            gated=case.dense.gate is not None,
        )
        layer.fit_dense(case.dense)
        layer.fit_sketch(case.training_ND)
        layer.eval()  # while training, the int4 sketch is an int8 one
        sketch = layer.sketch()
        width = sketch.codes_FR.shape[1]
        scores_NF = sketch.scores(case.x_ND, case.bias_F)
        reduce = 0 if sketch.reduce_RD is None else sketch.reduce_RD.numel()
        stored = case.hidden * width * (0.5 if kind == "int4" else 1.0) + 4.0 * (case.hidden + reduce)
        counts = sorted({max(1, round(share * case.hidden)) for share in args.share})
        for count, search in zip(counts, found_by_ranking(scores_NF, top_NX, args.top, counts), strict=True):
            yield {
                "method": kind,
                "rank": rank,
                "candidates": count,
                **_outcome(search),
                "flops": 2.0 * (reduce + case.hidden * width + case.d * count),
                "bytes": stored + 4.0 * case.d * count,
            }


def _outcome(search: Search) -> dict[str, Any]:
    found = {str(x): share for x, share in search.found.items()}
    return {"found": found, "computed": search.computed, "computed_p95": search.computed_p95}
