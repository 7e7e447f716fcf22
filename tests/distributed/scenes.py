"""What several ranks do together, and what each of them saw; run by `test_ranks.py` as one process a rank.

python scenes.py FOLDER RANKS                      plays all scenes in order; each rank writes FOLDER/facts-RANK.json
torchrun --nproc-per-node RANKS scenes.py FOLDER   all but the death of a rank
"""

from __future__ import annotations

import copy
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from nogemm import HeadConfig, HireConfig
from nogemm.distributed import join, shard_head, shard_hire
from nogemm.distributed.report import Traffic
from nogemm.heads import Choice, HireHead
from nogemm.layers.hire import HireFFN

V, D, N = 1003, 24, 33  # no multiples of anything
Facts = dict[str, Any]
SCENES: list[Callable[[int, int], Facts]] = []


def scene(play: Callable[[int, int], Facts]) -> Callable[[int, int], Facts]:
    SCENES.append(play)
    return play


def a_head(seed: int = 0, rows: int = V, bias: bool = True) -> HireHead:
    source = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, D, generator=source).bfloat16()
    weight[7] = weight[rows - 1] = 3 * weight[3]  # equal rows, on different ranks more often than not
    biases = (0.1 * torch.randn(rows, generator=source)).bfloat16()
    biases[7] = biases[rows - 1]
    parameters = [torch.nn.Parameter(t, requires_grad=False) for t in (weight, biases)]
    return HireHead(HeadConfig(leading=8), parameters[0], parameters[1] if bias else None).eval()


def states(count: int = N, seed: int = 1) -> torch.Tensor:
    return torch.randn(count, D, generator=torch.Generator().manual_seed(seed))


def an_ffn(**changes: Any) -> HireFFN:
    torch.manual_seed(0)
    config = replace(HireConfig(keep=0.2, oversample=9.0, activation="relu"), **changes)
    layer = config.build(D, 10, hidden=101, activation="relu", gated=changes.get("activation") == "drelu").eval()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_()
        layer.always.copy_(torch.arange(len(layer.always)) * 2 + 1)
    return layer.requires_grad_(False)


def said(work: Callable[[], object]) -> str:
    """Return the error that the work ends in, as text."""
    try:
        work()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def searched(head: Any, x: torch.Tensor, right: Choice, logits: torch.Tensor) -> Facts:
    """Search among all rows, which finds the largest, and among few, which names a row of the whole head, too."""
    own = head.config
    head.config = replace(own, rows=V)
    all_rows, estimates = head.search(x), head.estimate(x)
    head.config = replace(own, rows=9)
    few, some = head.search(x), head.estimate(x)
    head.config = own
    return {
        "search": torch.equal(all_rows.token, right.token) and torch.equal(all_rows.logit, right.logit),
        "few": torch.allclose(few.logit, logits.gather(1, few.token.unsqueeze(1))[:, 0], rtol=1e-5, atol=1e-4),
        "estimates": torch.allclose(estimates, logits, rtol=1e-5, atol=1e-4),
        "some": float((some - logits).abs().mean()) < 0.1 * float(logits.std()),
        "searched rows": few.rows.tolist() == [-(-9 // head.exchange.ranks) * head.exchange.ranks] * len(x),
    }


@scene
def tokens(rank: int, ranks: int) -> Facts:
    facts: Facts = {}
    x = states()
    for bias in (True, False):
        whole = a_head(bias=bias)
        x[0] = whole.weight[7].float()  # rows 7 and V - 1 win together
        right = whole.choose(x)
        for transport in ("shared", "group"):
            for seed in (0, None):
                head = shard_head(whole, join(transport=transport), seed=seed)
                found = head.choose(x)
                facts[f"{transport}, seed {seed}, bias {bias}"] = {
                    "token": torch.equal(found.token, right.token),
                    "logit": torch.equal(found.logit, right.logit),
                    "tie": int(found.token[0]),
                    "one by one": torch.equal(torch.cat([head.choose(s).token for s in x.split(1)]), right.token),
                    "logits": torch.equal(head.logits(x), whole.logits(x)),
                    **searched(head, x, right, whole.logits(x)),
                    "called": torch.allclose(head(x.bfloat16()), whole(x.bfloat16()), rtol=0.02, atol=0.1),
                    "none": list(head.choose(x[:0]).token.shape) == [0],
                    "transport": head.report().transport,
                    "rows": int(found.rows.sum()),
                    "features": head.out_features,
                    "held": len(head.weight),
                }
    return facts


@scene
def lists(rank: int, ranks: int) -> Facts:
    whole, exchange = a_head(), join()
    head = shard_head(whole, exchange)
    x = states(400)
    order = whole.logits(x).sort(dim=1, descending=True, stable=True)
    facts: Facts = {"sizes": head.sizes}
    for k in (1, 30, V):  # the last is more than any shard holds
        found = head.top_k(x, k)
        facts[f"top {k}"] = torch.equal(found.token, order.indices[:, :k])
        facts[f"logits {k}"] = torch.equal(found.logit, order.values[:, :k])
        facts[f"expected {k}"] = head.report().expected_recall
    before = head.report()
    found = head.top_k(x, 40, kept=-(-40 // ranks))
    right = torch.zeros(len(x), V, dtype=torch.bool).scatter_(1, order.indices[:, :40], True)
    facts["recall"] = float(right.gather(1, found.token).double().mean())
    facts["expected"] = head.report().expected_recall
    facts["sent"] = head.report().bytes_sent - before.bytes_sent
    facts["naive"] = head.report().naive_bytes - before.naive_bytes
    found = head.top_k(x, 40, recall=0.999)
    facts["recall asked"] = float(right.gather(1, found.token).double().mean())
    other = a_head()
    start = 2 * D * sum(head.sizes[:rank])  # bytes
    facts["view"] = shard_head(other, exchange, seed=None).weight.data_ptr() == other.weight.data_ptr() + start
    for k, kept in ((V + 1, None), (0, None), (30, 1), (30, 0)):
        facts[f"k {k}, kept {kept}"] = said(lambda k=k, kept=kept: head.top_k(x, k, kept=kept))
    facts["both"] = said(lambda: head.top_k(x, 5, kept=5, recall=0.9))
    facts["too wide"] = said(lambda: head.choose(torch.zeros(2, D + 1)))
    facts["saved"] = said(head.state_dict)
    facts["copied"] = said(lambda: copy.deepcopy(head))
    facts["again"] = said(lambda: shard_head(head, exchange))
    facts["gradient"] = said(lambda: head(x.requires_grad_()))
    return facts


@scene
def some_ranks(rank: int, ranks: int) -> Facts:
    """The last two ranks share a head of their own; the others have nothing to do with it."""
    group: Any = dist.new_group([ranks - 2, ranks - 1])
    if rank < ranks - 2:
        return {"token": "not in the group", "outside": said(lambda: join(group))}
    exchange = join(group)
    head, x = shard_head(a_head(), exchange), states()
    return {
        "token": torch.equal(head.choose(x).token, a_head().choose(x).token),
        "rank": exchange.rank,
        "ranks": exchange.ranks,
        "transport": exchange.transport,
    }


KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "gated": {"activation": "drelu"},
    "groups": {"group": 8, "keep": 0.4},
    "static": {"static": 5, "keep": 0.3},
    "active": {"select": "active", "oversample": 1.5},
    "low rank": {"sketch": "low_rank", "rank": 6},
    "half": {"oversample": 1.0, "keep": 0.5},
}


@scene
def ffns(rank: int, ranks: int) -> Facts:
    facts: Facts = {}
    x = states(50)
    exchange = join()
    for name, changes in KINDS.items():
        whole = an_ffn(**changes)
        facts[name] = {}
        for mode in ("local", "global"):
            sharded = shard_hire(whole, exchange, mode=mode)  # type: ignore[arg-type]
            chosen = sharded.chosen(x)
            y = sharded(x)
            facts[name][mode] = {
                "chosen": [sorted(i for i in row if i >= 0) for row in chosen.tolist()],
                "y": y.tolist(),
                "expected": sharded.report().expected_recall,
                "bytes": sharded.report().bytes_sent,
                "output bytes": sharded.report().output_bytes,
            }
        for dtype in ("fp32", "int8"):
            packed = shard_hire(whole, exchange, dtype=dtype)
            facts[name][dtype] = packed(x).tolist()
    many = torch.randn(9000, D, generator=torch.Generator().manual_seed(2))  # more bytes than a place has
    ffn = shard_hire(an_ffn(), exchange)
    facts["many"] = torch.allclose(ffn(many)[-50:], ffn(many[-50:]), rtol=1e-5, atol=1e-4)
    x[3] = torch.nan
    broken = shard_hire(an_ffn(), exchange)(x)
    facts["nan"] = [bool(broken[3].isnan().all()), bool(broken[[0, 1, 2, 4]].isfinite().all())]
    slack = shard_hire(an_ffn(), exchange, slack=1.5)
    asked = shard_hire(an_ffn(), exchange, recall=0.99)
    facts["slack"] = [slack.report().expected_recall, asked.report().expected_recall]
    facts["bfloat16"] = str(shard_hire(an_ffn(), exchange)(states().bfloat16()).dtype)
    facts["trained"] = said(lambda: slack.train())
    facts["saved"] = said(slack.state_dict)
    facts["gradient"] = said(lambda: slack(states().requires_grad_()))
    facts["too many ranks"] = said(lambda: shard_hire(an_ffn(group=101, keep=1.0), exchange))
    return facts


@scene
def disagreement(rank: int, ranks: int) -> Facts:
    exchange = join()
    last = rank == ranks - 1
    head, ffn = shard_head(a_head(), exchange), shard_hire(an_ffn(), exchange)
    x = states()
    one_broken = x.clone()
    one_broken[5, 2] = torch.nan if last else x[5, 2]
    broken = x.clone()
    broken[5, 2] = torch.inf
    other = a_head()
    if last:
        other.weight[9, 0] += 1
    uneven = an_ffn()  # 101 neurons: drawing weights for 51 and 50 of them would move the ranks' generators apart
    torch.manual_seed(3)
    shard_hire(uneven, exchange)
    drawn = float(torch.rand(()))
    noise = torch.rand(len(x), V, generator=torch.Generator().manual_seed(rank))
    return {
        "drawn": drawn,
        "noise": said(lambda: head.choose(x, noise)),
        "noise, searched": said(lambda: head.search(x, noise)),
        "logits": said(lambda: head.logits(states(seed=7 if last else 1))),
        "called": said(lambda: head(states(seed=7 if last else 1).bfloat16())),
        "calls": said(lambda: head.same_call(prompt=x, sampling={"seed": rank})),
        "same calls": said(lambda: head.same_call(prompt=x, sampling={"seed": 0})),
        "weights": said(lambda: shard_head(other, exchange)),
        "settings": said(lambda: shard_head(a_head(), exchange, seed=rank)),
        "rows": said(lambda: shard_head(a_head(rows=V + last), exchange)),
        "ffn": said(lambda: shard_hire(an_ffn(keep=0.3 if last else 0.2), exchange)),
        "states": said(lambda: head.choose(states(seed=7 if last else 1))),
        "lists": said(lambda: head.top_k(states(seed=7 if last else 1), 3)),
        "tokens": said(lambda: ffn(states(seed=7 if last else 1))),
        "not finite": said(lambda: head.choose(broken)),
        "not finite, lists": said(lambda: head.top_k(broken, 3)),
        "not finite on one": said(lambda: head.choose(one_broken)),
        "after all of it": torch.equal(head.choose(x).token, a_head().choose(x).token),
    }


@scene
def failures(rank: int, ranks: int) -> Facts:
    """Shapes that differ, a rank that is late, one that leaves; each with an exchange of its own."""
    facts: Facts = {}
    exchange = join(transport="shared", timeout=5.0)
    assert exchange._memory is not None
    dist.barrier()
    facts["names left"] = os.fstat(exchange._memory.file.fileno()).st_nlink
    head = shard_head(a_head(), exchange)
    facts["shapes"] = said(lambda: head.choose(states(2 + (rank == 1))))
    facts["afterwards"] = said(lambda: head.choose(states()))
    for transport in ("shared", "group"):
        exchange = join(transport=transport)  # type: ignore[arg-type]
        head = shard_head(a_head(), exchange)
        head.choose(states(1))
        exchange.timeout = 0.2  # the ranks have joined, whatever else the machine does
        if rank == 1:
            time.sleep(0.8)
        start = time.monotonic()
        facts[f"late, {transport}"] = said(lambda head=head: head.choose(states(1)))
        facts[f"waited, {transport}"] = time.monotonic() - start
        dist.barrier()
    exchange = join(transport="shared", timeout=30.0)
    if rank == 1:
        exchange.close()
        return facts | {"left": said(lambda: exchange.gather(torch.zeros(1), Traffic()))}
    start = time.monotonic()
    facts["left"] = said(lambda: exchange.gather(torch.zeros(1), Traffic()))
    facts["noticed"] = time.monotonic() - start
    return facts


@scene
def death(rank: int, ranks: int) -> Facts:
    """Rank 1 is killed in the middle: the last scene."""
    heads = [shard_head(a_head(), join(transport=transport, timeout=20.0)) for transport in ("shared", "group")]  # type: ignore[arg-type]
    dist.barrier()
    if rank == 1:
        os.kill(os.getpid(), 9)
    start = time.monotonic()
    facts = {head.report().transport: said(lambda head=head: head.choose(states(1))) for head in heads}
    return facts | {"seconds": time.monotonic() - start}


def play_all(rank: int, ranks: int, folder: Path, scenes: list[Callable[[int, int], Facts]]) -> None:
    facts: Facts = {}
    for play in scenes:
        facts[play.__name__] = play(rank, ranks)
        (folder / f"facts-{rank}.json").write_text(json.dumps(facts))


def main() -> None:
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    if "RANK" in os.environ:  # torchrun, which ends all ranks when one dies
        dist.init_process_group("gloo")
        play_all(dist.get_rank(), dist.get_world_size(), folder, [play for play in SCENES if play is not death])
        dist.destroy_process_group()
        return
    ranks = int(sys.argv[2])
    children = []
    for rank in range(ranks):  # one import for all; torch has no threads yet
        child = os.fork()
        if child == 0:
            dist.init_process_group("gloo", f"file://{folder / 'store'}", rank=rank, world_size=ranks)
            play_all(rank, ranks, folder, SCENES)
            os._exit(0)  # without torch.distributed's farewell, which would wait for the rank that was killed
        children.append(child)
    print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]))


if __name__ == "__main__":
    main()
