"""The worker's side of `nogemm bench topk`: the k largest numbers of fresh rows, verified, then called.

Legend: R rows a call, n numbers a row, k winners.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nogemm.ops import approximate_plan, expected_recall, topk, topk_reference

EXACT, APPROXIMATE, TORCH, NUMPY = "nogemm-exact", "nogemm-approximate", "torch-topk", "numpy-argpartition"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_POOL = 4 << 20  # numbers that rows are drawn from, or two calls' worth
_CHECKED = 1 << 20  # numbers that answers are compared on, or one call's worth
_RECALL_ROWS = 64
PATTERNS = ("normal", "ascending", "descending", "equal", "lowest", "rounded", "together", "apart", "nan")


def rows_of(pattern: str, rows: int, n: int, k: int, seed: int) -> Tensor:
    """Make float32 rows [rows, n]: normal numbers, or a pattern that is hard for one or another way to select.

    "lowest" is -infinity alone, "rounded" full of ties, "together" has its winners side by side, "apart" at a distance
    of 64 from each other, "nan" holds one NaN.
    """
    x = torch.randn(rows, n, generator=torch.Generator().manual_seed(seed))
    if pattern in ("ascending", "descending"):
        return x.sort(-1, descending=pattern == "descending").values
    if pattern in ("equal", "lowest"):
        return torch.full_like(x, 0.25 if pattern == "equal" else -torch.inf)
    if pattern == "rounded":
        return x.round()
    place = torch.arange(n)
    if pattern == "together":
        x[:, n // 2 : n // 2 + k] += 20
    elif pattern == "apart":
        x[:, place % 64 == 5] += 20
    elif pattern == "nan":
        x[:, n // 3] = torch.nan
    return x


class TopkContender:
    """One way to find the k largest numbers.

    Args:
        settings: "engine", one of the four names; "recall" of the approximate form; "dtype"; "seed".
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        self.engine = settings["engine"]
        self.recall = float(settings["recall"])
        self.dtype = DTYPES[settings["dtype"]]
        self.seed = int(settings["seed"])
        self.pool = self.order = torch.zeros(0, 0)
        self.filled: tuple[Any, ...] = ()
        self.batch = self.k = 1
        self.place = 0

    def prepare(self, case: dict[str, Any]) -> dict[str, Any]:
        torch.set_num_threads(case["threads"])
        n, self.batch, self.k = case["n"], case["batch"], case["k"]
        self._fill(case["pattern"], n)
        self.place = 0
        order = self.order[:, : self.k]
        checked = self.pool[: len(order)]
        expected = checked.gather(1, order), order
        got = [self.run(x) for x in checked.split(self.batch)]
        values, indices = (torch.cat([torch.as_tensor(part[i]) for part in got]) for i in (0, 1))
        facts: dict[str, Any] = {
            "bytes_read": float(self.batch * n * self.pool.element_size()),
            "positions": len(checked),
        }
        facts["computes_in"] = "bf16" if self.dtype == torch.bfloat16 else "fp32"
        if self.engine == APPROXIMATE:
            return facts | self._recall(case, indices, expected[1])
        same = torch.equal(values.nan_to_num(nan=torch.inf), expected[0].nan_to_num(nan=torch.inf))
        same = same and torch.equal(
            checked.gather(1, indices).nan_to_num(nan=torch.inf), values.nan_to_num(nan=torch.inf)
        )
        if self.engine == EXACT:
            same = same and torch.equal(indices, expected[1])
        return facts | ({"verified": True} if same else {"verified": False, "error": "does not match a stable sort"})

    def _fill(self, pattern: str, n: int) -> None:
        """Make the pool, and rank the rows that answers are compared on; kept for cases that share them."""
        key = (pattern, n, self.batch, self.k if pattern == "together" else 0)
        if key == self.filled:
            return
        rows = max(2 * self.batch, -(-_POOL // n) // self.batch * self.batch)
        self.pool = rows_of(pattern, rows, n, self.k, self.seed).to(self.dtype)
        checked = max(1, min(rows, _CHECKED // n, _RECALL_ROWS) // self.batch) * self.batch
        self.order = topk_reference(self.pool[:checked], n, True)[1]
        self.filled = key

    def _recall(self, case: dict[str, Any], indices: Tensor, expected: Tensor) -> dict[str, Any]:
        """Hold the share of true winners against what is expected of random places."""
        plan = approximate_plan(case["n"], case["k"], self.recall)
        true = torch.zeros(len(expected), case["n"], dtype=torch.bool).scatter_(1, expected, True)
        shares = true.gather(1, indices).double().mean(1)
        facts: dict[str, Any] = {"recall": float(shares.mean()), "promised": self.recall}
        facts |= {"buckets": plan[0], "kept": plan[1]} if plan else {}
        if case["pattern"] != "normal":
            return facts | {"verified": True}
        # Of one row, the share that is lost differs from row to row about as Poisson's counts do.
        promise = expected_recall(case["n"], case["k"], *plan) if plan else 1.0
        error = ((1 - promise) / (case["k"] * len(shares))) ** 0.5
        if abs(facts["recall"] - promise) <= 5 * error + 1e-9:
            return facts | {"verified": True}
        return facts | {"verified": False, "error": f"recall {facts['recall']:.4f}, expected {promise:.4f}"}

    def draw(self) -> Tensor:
        """Copy the next rows: a call finds them where the product that makes them would have left them."""
        if self.place + self.batch > len(self.pool):
            self.place = 0
        self.place += self.batch
        return self.pool[self.place - self.batch : self.place].clone()

    def run(self, inputs: Tensor) -> Any:
        if self.engine == TORCH:
            return torch.topk(inputs, self.k)
        if self.engine == NUMPY:
            return _argpartition(inputs, self.k)
        if self.engine == APPROXIMATE:
            return topk(inputs, self.k, method="approximate", recall=self.recall)
        return topk(inputs, self.k)


def _argpartition(x: Tensor, k: int) -> tuple[Any, Any]:
    import numpy as np

    rows = x.numpy()
    best = np.argpartition(rows, rows.shape[1] - k, axis=1)[:, rows.shape[1] - k :]
    values = np.take_along_axis(rows, best, 1)
    order = np.argsort(values, axis=1)[:, ::-1]
    return np.take_along_axis(values, order, 1), np.take_along_axis(best, order, 1)
