"""What `nogemm bench lsh` counts: neurons found by buckets or by a ranking, chances of collision, bucket sizes.

Legend: N tokens, D width, F neurons, T tables, K bits per table, B buckets, X strongest neurons, C candidates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nogemm.ops import bucket_union


@dataclass(frozen=True)
class Search:
    """What looking at some neurons per token brings and takes.

    Attributes:
        found: {X: share of the X strongest neurons that are looked at}, mean over tokens.
        computed, computed_p95: neurons looked at as a share of all: mean over tokens, and 95th percentile.
        entries: entries of buckets read per token, repetitions included.
    """

    found: dict[int, float]
    computed: float
    computed_p95: float
    entries: float = 0.0


def mean_search(searches: Sequence[Search]) -> Search:
    """Average searches of the same tokens by different draws."""

    def average(values: Sequence[float]) -> float:
        return sum(values) / len(values)

    first = searches[0]
    return replace(
        first,
        found={x: average([s.found[x] for s in searches]) for x in first.found},
        computed=average([s.computed for s in searches]),
        computed_p95=average([s.computed_p95 for s in searches]),
        entries=average([s.entries for s in searches]),
    )


def found_by_hashes(
    codes_NT: Tensor, codes_FT: Tensor, top_NX: Tensor, sizes: Sequence[int], counts: Sequence[int]
) -> list[Search]:
    """Look at the neurons that share a bucket with the token in the first T tables, for each T of `counts` (rising)."""
    seen_NF = torch.zeros(len(codes_NT), len(codes_FT), dtype=torch.bool)
    entries, done, out = 0.0, 0, []
    for count in counts:
        for t in range(done, count):
            filled = torch.bincount(codes_FT[:, t].long(), minlength=int(codes_NT[:, t].max()) + 1)
            entries += float(filled[codes_NT[:, t].long()].double().mean())
        seen_NF |= bucket_union(codes_NT[:, done:count], codes_FT[:, done:count].T)
        done = count
        out.append(replace(_search(seen_NF, top_NX, sizes), entries=entries))
    return out


def found_by_ranking(scores_NF: Tensor, top_NX: Tensor, sizes: Sequence[int], counts: Sequence[int]) -> list[Search]:
    """Look at the C neurons of largest score, for each C of `counts`."""
    order_NF = scores_NF.argsort(dim=1, descending=True, stable=True)
    place_NF = torch.empty_like(order_NF).scatter_(1, order_NF, torch.arange(order_NF.shape[1]).expand_as(order_NF))
    return [_search(place_NF < count, top_NX, sizes) for count in counts]


def _search(seen_NF: Tensor, top_NX: Tensor, sizes: Sequence[int]) -> Search:
    share_N = seen_NF.float().mean(1)
    hit_NX = seen_NF.gather(1, top_NX).float()
    found = {x: float(hit_NX[:, :x].mean()) for x in sizes}
    return Search(found, float(share_N.mean()), float(share_N.quantile(0.95)))


def chance_of_collision(x_ND: Tensor, weight_FD: Tensor, bias_F: Tensor) -> Tensor:
    """Return 1 - angle / pi of every [x; 1] and [w; b], [N, F]: how often a random plane has both on one side."""
    tokens = F.normalize(F.pad(x_ND, (0, 1), value=1.0).double(), dim=1)
    neurons = F.normalize(torch.cat([weight_FD, bias_F.unsqueeze(1)], 1).double(), dim=1)
    return 1.0 - (tokens @ neurons.T).clamp(-1.0, 1.0).arccos() / torch.pi


def bucket_sizes(codes_NT: Tensor, codes_FT: Tensor, bits: int) -> dict[str, Any]:
    """Describe how unevenly neurons fill the 2^K buckets of each table."""
    count = 2**bits
    sizes_TB = torch.stack([torch.bincount(column.long(), minlength=count) for column in codes_FT.T]).double()
    hidden = len(codes_FT)
    even_own = 1.0 + (hidden - 1) / count  # a neuron is in its own bucket, the others fall evenly
    hit_NT = sizes_TB.T.gather(0, codes_NT.long())
    return {
        "tables": len(sizes_TB),
        "sizes": sizes_TB.sort(1, descending=True).values.mean(0).mul(100).round().div(100).tolist(),
        "own": float((sizes_TB.square().sum(1) / hidden).mean() / even_own),
        "hit": float(hit_NT.mean() / (hidden / count)),
        "empty": float((sizes_TB == 0).double().mean()),
    }
