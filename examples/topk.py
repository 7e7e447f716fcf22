"""Find the k largest of random logits in every way there is, beside torch.topk.

python examples/topk.py --n 50257 --k 50
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch

import nogemm


def microseconds(call: Callable[[], Any], calls: int = 50) -> float:
    times = []
    for _ in range(calls):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return 1e6 * sorted(times)[calls // 2]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--n", type=int, default=50_257)
    parser.add_argument("--k", type=int, default=50)
    parser.add_argument("--rows", type=int, default=1)
    args = parser.parse_args()
    logits = torch.randn(args.rows, args.n, generator=torch.Generator().manual_seed(0))

    exact = nogemm.topk(logits, args.k)  # ties to the lowest index
    print(f"same values: {torch.equal(exact.values, torch.topk(logits, args.k).values)}")
    print(f"torch.topk {microseconds(lambda: torch.topk(logits, args.k)):.0f} us")
    print(f"nogemm.topk {microseconds(lambda: nogemm.topk(logits, args.k)):.0f} us")

    rough = nogemm.topk(logits, args.k, method="approximate", recall=0.95)
    found = [len(set(a) & set(b)) for a, b in zip(exact.indices.tolist(), rough.indices.tolist(), strict=True)]
    print(f"promised recall 0.95, recall: {sum(found) / (args.rows * args.k):.3f}")

    # Neurons in blocks of eight, by the size of their activations; and however many exceed a number.
    blocks = nogemm.topk_grouped(logits.relu(), min(3, args.n // 8), group=8)
    print(f"groups of 8 with the largest sums, first row: {blocks.indices[0].tolist()}")
    above = nogemm.topk_threshold(logits, 3.0)
    print(f"numbers of at least 3 in each row: {above.starts.diff().tolist()}")


if __name__ == "__main__":
    main()
