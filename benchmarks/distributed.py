"""A vocabulary head on several ranks beside one process, and what DA-TOP-k finds on a decoder's own activations.

    python benchmarks/distributed.py --model MODEL --json $RESULTS/distributed-NAME.json

Ranks are processes of this machine with one thread each, kept on a core each where there are enough. All contenders
take turns, round after round, on fresh states of the model; a contender first has to name the reference's token at
every position (lists: the reference's list). What is measured of recall needs no ranks: rows are dealt as ranks would
deal them, and the lists of all are compared with the true winners, for the head's logits and for the gate activations
of one FFN.

Legend: S states, D width, V vocabulary, P ranks, C copies of the head.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nogemm import HeadConfig
from nogemm.activations import activation
from nogemm.bench.engine.measure import summary
from nogemm.bench.engine.result import origin
from nogemm.bench.head import copies_of, reference_tokens
from nogemm.bench.report.tables import distributed_table
from nogemm.convert.activations import batches_of
from nogemm.convert.head import dense_head, head_states
from nogemm.convert.sites import sites
from nogemm.distributed import Exchange, ShardedHead, join, shard_head
from nogemm.distributed.deal import deal
from nogemm.distributed.report import Traffic
from nogemm.errors import ConfigError
from nogemm.heads import HireHead, second_moment
from nogemm.models.loading import load_model, load_tokenizer
from nogemm.ops import head_logits
from nogemm.ops.topk_recall import expected_recall
from nogemm.running.measured import Keep, Note, measured
from nogemm.train.sources import texts

TOP = 50  # tokens of a list
KEPT_SHARE = 0.05  # of an FFN's neurons
RANKS = (2, 4, 8)  # that rows are dealt to, for recall
DEALS = 8  # at random, whose mean is held against the formula
SIZES = (16, 4096, 65536)  # bytes a rank sends, for the exchange alone
EXCHANGES = 500
CONTENDERS = 4  # heads that stand in memory at once: whole ones, and sharded ones on two ranks
ROUNDS = 7


@dataclass(frozen=True)
class Contender:
    """Something that answers states: called by all ranks, or by rank 0 alone."""

    name: str
    answer: Callable[[int, Tensor], Tensor]
    sharded: ShardedHead | None = None

    @property
    def alone(self) -> bool:
        return self.sharded is None


def main(words: list[str] | None = None) -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a decoder: directory, hub name or GGUF file")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--data", default="sample")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--positions", type=int, default=500, help="states that are verified and timed")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--seconds", type=float, default=0.3, help="aimed at per turn")
    parser.add_argument("--no-times", action="store_true", help="recall alone, which needs no idle machine")
    args = parser.parse_args(words)
    settings = {
        **vars(args),
        "model": Path(args.model).name,
        "data": Path(args.data).name,
        "threads": 1,
        "top": TOP,
        "seed": 0,
    }
    del settings["json"]

    def work(note: Note, keep: Keep) -> dict[str, Any]:
        result = origin(settings)
        with tempfile.TemporaryDirectory(prefix="nogemm-bench-") as folder:
            result |= prepare(args, Path(folder), note)
            if args.no_times:
                return result
            keep(result)
            note(f"timing on {args.ranks} ranks")
            run_ranks(args, Path(folder))
            return result | json.loads((Path(folder) / "rows.json").read_text())

    def show(result: dict[str, Any]) -> None:
        table = distributed_table(result)
        for line in (table.head, *table.rows):
            print("  ".join(f"{cell:>16}" for cell in line))
        for row in result["recall"]:
            found = f"recall {row['recall']:.4f}, expected {row['expected']:.4f}"
            print(f"{row['k']} of {row['n']:,} ({row['of']}), {row['ranks']} ranks, dealt {row['dealt']}: {found}")

    measured("distributed", args.json, work, show)


def prepare(args: argparse.Namespace, folder: Path, note: Note) -> dict[str, Any]:
    """Store the head with states and their tokens, and measure recall; returns the head's size and the recall."""
    from safetensors.torch import save_file

    torch.set_num_threads(max(1, args.ranks))
    model = load_model(args.model, dtype=torch.float32)
    tokenizer, head = load_tokenizer(args.model), dense_head(model)
    if head.bias is not None:
        raise ConfigError(f"the head of {args.model} has a bias, which this measurement leaves out")
    note("states of the model")
    kept: list[Tensor] = []
    with closing(head_states(model, head, texts(args.data), tokenizer)) as seen:
        for states in seen:
            kept.append(states.float())
            if sum(map(len, kept)) >= 2 * args.positions:
                break
    states_SD = torch.cat(kept)[: 2 * args.positions]
    if len(states_SD) < 2 * args.positions:
        raise ConfigError(f"--data: the texts have {len(states_SD)} tokens, {2 * args.positions} are needed")
    order = torch.randperm(len(states_SD), generator=torch.Generator().manual_seed(0))
    fit, held = states_SD[order[args.positions :]], states_SD[order[: args.positions]].contiguous()
    weight_VD = head.weight.detach().to(torch.bfloat16).contiguous()
    note("reference tokens, recall")
    stored = {"weight": weight_VD, "moment": second_moment(fit).float(), "states": held}
    save_file(stored | {"tokens": reference_tokens(held, weight_VD)}, folder / "head.safetensors")
    logits_SV = torch.cat([head_logits(part, weight_VD) for part in held.split(16)])
    recall = recall_rows(logits_SV, top(weight_VD), "head")
    gates_SF = gate_sizes(model, tokenizer, args)
    recall += recall_rows(gates_SF, max(1, round(KEPT_SHARE * gates_SF.shape[1])), "FFN")
    return {"vocabulary": len(weight_VD), "width": weight_VD.shape[1], "recall": recall, "rows": [], "exchange": []}


def gate_sizes(model: Any, tokenizer: Any, args: argparse.Namespace) -> Tensor:
    """Return the sizes of the activations of the model's middle FFN (of its gate) on its texts, [S, F]."""
    found = sites(model)
    site = found[len(found) // 2]
    dense = site.dense()
    first = dense.up if dense.gate is None else dense.gate
    seen: list[Tensor] = []
    hook = site.up.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach().flatten(0, -2).float()))
    try:
        with torch.no_grad():
            for batch in batches_of(model, texts(args.data), tokenizer):
                model(**batch)
                if sum(map(len, seen)) >= args.positions:
                    break
    finally:
        hook.remove()
    with torch.no_grad():
        return activation(dense.activation).function(first(torch.cat(seen)[: args.positions])).abs()


def recall_rows(scores_SN: Tensor, k: int, what: str) -> list[dict[str, Any]]:
    """Deal rows to ranks, let each keep its ceil(k / P) best, and count which of the true k are among them.

    The formula is a mean over deals. Where the same rows win for most states, one deal may lie off by some hundredths:
    so the mean over DEALS of them is given, and the least and the most of any.
    """
    rows = []
    n = scores_SN.shape[1]
    winners_SN = torch.zeros_like(scores_SN, dtype=torch.bool).scatter_(1, scores_SN.topk(k, 1).indices, True)
    for ranks in RANKS:
        kept = -(-k // ranks)
        for dealt, seeds in (("at random", range(DEALS)), ("contiguous", (None,))):
            shares = []
            for seed in seeds:
                parts = deal(n, ranks, seed, "rows")
                found = [
                    winners_SN[:, part].gather(1, scores_SN[:, part].topk(min(kept, len(part)), 1).indices).sum()
                    for part in parts
                ]
                shares.append(float(sum(found)) / winners_SN.sum().item())
            row = {"of": what, "n": n, "k": k, "ranks": ranks, "kept": kept, "dealt": dealt, "states": len(scores_SN)}
            row |= {"expected": expected_recall(n, k, ranks, kept), "recall": sum(shares) / len(shares)}
            rows.append(row | {"deals": len(shares), "least": min(shares), "most": max(shares)})
    return rows


def top(weight_VD: Tensor) -> int:
    """Return the length of lists: of a small head, half of its rows."""
    return min(TOP, len(weight_VD) // 2)


def run_ranks(args: argparse.Namespace, folder: Path) -> None:
    """Start the ranks and wait for them."""
    start = multiprocessing.get_context("spawn")
    settings = (args.ranks, folder, args.rounds, args.seconds)
    # Daemons end with this process: ranks that outlive it would be in the way of what is measured next.
    ranks = [start.Process(target=on_rank, args=(rank, *settings), daemon=True) for rank in range(args.ranks)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    if any(rank.exitcode for rank in ranks):
        raise RuntimeError(f"ranks ended with {[rank.exitcode for rank in ranks]}")


def on_rank(rank: int, ranks: int, folder: Path, rounds: int, seconds: float) -> None:
    """Verify and time everything that the ranks do; rank 0 writes the rows."""
    from safetensors.torch import load_file

    torch.set_num_threads(1)
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) >= ranks:  # a rank that the system moves leaves its cache behind, and all wait for the slowest
        os.sched_setaffinity(0, {cores[rank]})
    dist.init_process_group("gloo", f"file://{folder / 'store'}", rank=rank, world_size=ranks)
    # Rank 0 first runs the whole head alone on all states, which takes minutes where that is large.
    shared, group = join(transport="auto", timeout=1800), join(transport="group", timeout=1800)
    stored = load_file(folder / "head.safetensors")
    exchange = [row for size in SIZES for carrier in (shared, group) for row in exchange_rows(carrier, size)]
    contenders = make_contenders(stored, shared, group)
    with torch.inference_mode():
        rows = verified(contenders, stored, rank)
        timed(contenders, rows, stored["states"], rounds, seconds, rank)
    if rank == 0:
        (folder / "rows.json").write_text(json.dumps({"rows": rows, "exchange": exchange}))
    dist.barrier()
    dist.destroy_process_group()


def exchange_rows(carrier: Exchange, size: int) -> list[dict[str, Any]]:
    """Time the exchange of so many bytes of each rank, gathered and added up."""
    x, rows = torch.zeros(size // 4), []
    for name, work in (("gather", carrier.gather), ("sum", carrier.total)):
        us = []
        for _ in range(EXCHANGES):
            start = time.perf_counter()
            work(x, Traffic())
            us.append((time.perf_counter() - start) * 1e6)
        rows.append({"exchange": name, "transport": carrier.transport, "bytes": size} | summary(us[50:]))
    return rows


def make_contenders(stored: dict[str, Tensor], shared: Exchange, group: Exchange) -> list[Contender]:
    """Make C copies of the head, whole (used on rank 0) and sharded: a lone small one would sit in a cache."""
    weight_VD, moment_DD = stored["weight"], stored["moment"]
    copies = copies_of(weight_VD, CONTENDERS)

    def head() -> HireHead:
        weight = torch.nn.Parameter(weight_VD.clone(), requires_grad=False)
        return HireHead(HeadConfig(), weight, None, moment_DD).eval()

    # Only rank 0 runs whole heads; the others need one, to take their shards of it.
    wholes = [head() for _ in range(copies if shared.rank == 0 else 1)]
    shards = [shard_head(wholes[0], shared) for _ in range(copies)]
    k = top(weight_VD)
    kept = -(-k // shared.ranks)
    for one in (*(wholes if shared.rank == 0 else ()), *shards):
        one.codes()

    def by(carrier: Exchange, answer: Callable[[ShardedHead, Tensor], Tensor]) -> Callable[[int, Tensor], Tensor]:
        def ask(call: int, x: Tensor) -> Tensor:
            shard = shards[call % copies]
            shard.exchange = carrier
            return answer(shard, x)

        return ask

    def dense(call: int, x: Tensor) -> Tensor:
        return head_logits(x, wholes[call % copies].weight)

    found = [
        Contender("one process, proven", lambda call, x: wholes[call % copies].choose(x).token),
        Contender("one process, all logits", lambda call, x: dense(call, x).argmax(1)),
        Contender("one process, top k", lambda call, x: dense(call, x).topk(k, 1).indices),
    ]
    for carrier in (shared, group):
        for name, answer in (
            ("proven", lambda h, x: h.choose(x).token),
            ("all logits", lambda h, x: h.logits(x).argmax(1)),
            ("top k", lambda h, x: h.top_k(x, k).token),
            ("da top k", lambda h, x: h.top_k(x, k, kept=kept).token),
        ):
            found.append(Contender(f"{carrier.transport}, {name}", by(carrier, answer), shards[0]))
    return found


def verified(contenders: list[Contender], stored: dict[str, Tensor], rank: int) -> list[dict[str, Any]]:
    """Hold every contender against the reference at every position; a row each, with the bytes that a state sends."""
    states_SD, tokens_S = stored["states"], stored["tokens"]
    wanted: dict[bool, Tensor] = {False: tokens_S.unsqueeze(1)}
    if rank == 0:
        k = top(stored["weight"])
        logits = [head_logits(x, stored["weight"]) for x in states_SD.split(16)]
        wanted[True] = torch.cat([part.sort(dim=1, descending=True, stable=True).indices[:, :k] for part in logits])
    rows = []
    for one in contenders:
        row: dict[str, Any] = {"contender": one.name, "ranks": 1 if one.alone else dist.get_world_size()}
        rows.append(row)
        if one.alone and rank:
            continue
        before = None if one.sharded is None else one.sharded.report()
        found = torch.cat([one.answer(0, x) for x in states_SD.split(1)])
        if before is not None and one.sharded is not None:
            after = one.sharded.report()
            row |= {"bytes_sent": (after.bytes_sent - before.bytes_sent) / len(states_SD)}
            row |= {"naive_bytes": (after.naive_bytes - before.naive_bytes) / len(states_SD)}
            row |= {"expected_recall": after.expected_recall} if "top k" in one.name else {}
        if rank == 0:
            right = wanted[found.dim() == 2]
            found = found if found.dim() == 2 else found.unsqueeze(1)
            hits = (found.unsqueeze(2) == right.unsqueeze(1)).any(2).double().mean()
            least = 1.0 if "da top k" not in one.name else row["expected_recall"] - 0.01
            row |= {"recall": float(hits), "positions": len(found), "verified": float(hits) >= least}
            if not row["verified"]:
                row |= {"error": f"does not match the reference: {float(hits):.4f} of its tokens"}
    return rows


def timed(
    contenders: list[Contender], rows: list[dict[str, Any]], states_SD: Tensor, rounds: int, seconds: float, rank: int
) -> None:
    """Let the contenders take turns, and write the medians of all calls into their rows."""
    times: list[list[float]] = [[] for _ in contenders]
    at = 0
    for turn in range(rounds + 1):  # the first warms up, and says how long a call takes
        for place in range(len(contenders)):
            number = (place + turn) % len(contenders)
            one = contenders[number]
            guess = sum(times[number][-20:]) / max(1, len(times[number][-20:])) / 1e6
            calls = torch.tensor([20 if not guess else min(20_000, max(5, round(seconds / guess)))])
            dist.broadcast(calls, 0)
            us = []
            for call in range(at, at + (0 if one.alone and rank else int(calls))):
                x = states_SD[call % len(states_SD)].unsqueeze(0)
                start = time.perf_counter()
                one.answer(call, x)
                us.append((time.perf_counter() - start) * 1e6)
            at += int(calls)  # on all ranks, so that they go on with the same state
            times[number] = us if turn == 0 else times[number] + us
    for row, us in zip(rows, times, strict=True):
        if us and row.get("verified"):
            row |= summary(us[20:])
    base = rows[0].get("us_median")
    for row in rows:
        row["ratio"] = base / row["us_median"] if base and row.get("us_median") else None


if __name__ == "__main__":
    main()
