"""topk and its kin given things of another kind: errors in the caller's words, and what passes for a number."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import nogemm
from nogemm.errors import ConfigError, DtypeError
from nogemm.ops.topk import approximate_plan
from nogemm.testing.compare import check_equal

X = torch.randn(2, 10, generator=torch.Generator().manual_seed(0))


def run(name: str, *args: Any, **kwargs: Any) -> Any:
    return getattr(nogemm, name)(*args, **kwargs)


@pytest.mark.parametrize(
    ("name", "args", "kwargs", "said"),
    [
        ("topk", (X, 2.0), {}, r"topk: k must be a whole number, got k=2\.0"),
        ("topk", (X, "2"), {}, "topk: k must be a whole number, got k='2'"),
        ("topk", (X, True), {}, "k must be a whole number, got k=True"),
        ("topk", (X, None), {}, "k must be a whole number, got k=None"),
        ("topk", (X, torch.tensor(2.0)), {}, r"k must be a whole number, got k=tensor\(2\.\)"),
        ("topk", (X, 1), {"dim": 0.5}, r"dim must be a whole number, got dim=0\.5"),
        ("topk", (X, 1), {"recall": 0.5}, r'recall=0\.5 is of method="approximate"'),
        ("topk", (X, 1), {"method": "approximate", "recall": "high"}, "recall must be a number, got recall='high'"),
        ("topk", (X.tolist(), 1), {}, r"topk: x must be a torch tensor, got list; torch\.as_tensor\(x\) makes one"),
        ("topk", (X.numpy(), 1), {}, r"x must be a torch tensor, got numpy\.ndarray"),
        ("topk_grouped", (X, 1), {"group": 2.5}, r"topk_grouped: group must be a whole number, got group=2\.5"),
        ("topk_grouped", (X, 1), {"group": "2"}, "topk_grouped: group must be a whole number, got group='2'"),
        ("topk_grouped", (X, 1.5), {"group": 2}, r"topk_grouped: k must be a whole number, got k=1\.5"),
        ("topk_grouped", ([1.0], 1), {"group": 2}, "topk_grouped: x must be a torch tensor, got list"),
        ("topk_threshold", (X, "1"), {}, "a number or a tensor of one for each row, got threshold='1'"),
        ("topk_threshold", (X, [0.0, 1.0]), {}, r"got threshold=\[0\.0, 1\.0\]"),
        ("topk_threshold", (X, None), {}, "got threshold=None"),
        ("topk_threshold", (X.numpy(), 1.0), {}, "topk_threshold: x must be a torch tensor"),
    ],
)
def test_another_kind_is_named(name: str, args: tuple[Any, ...], kwargs: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        run(name, *args, **kwargs)


@pytest.mark.parametrize(("name", "more"), [("topk", {"k": 1}), ("topk_grouped", {"k": 1, "group": 2})])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int64])
def test_dtypes_that_are_not_taken_are_named(name: str, more: dict[str, Any], dtype: torch.dtype) -> None:
    with pytest.raises(DtypeError, match=f"{name}: x must be of a floating dtype, got {dtype}; float64, .* are taken"):
        run(name, X.to(dtype), **more)
    with pytest.raises(DtypeError, match=r"threshold must be real, got torch\.complex64"):
        run("topk_threshold", X, torch.tensor(1j))
    with pytest.raises(DtypeError, match=f"topk_threshold: x must be of a floating dtype, got {dtype}"):
        run("topk_threshold", X.to(dtype), 0.5)


@pytest.mark.parametrize("k", [np.int64(3), torch.tensor(3), np.array(3)])
def test_whole_numbers_of_numpy_and_torch_are_taken(k: Any) -> None:
    found: list[Tensor] = [run("topk", X, k).values, run("topk_grouped", X, k, group=np.int32(2)).values]
    expected = [nogemm.topk(X, 3).values, nogemm.topk_grouped(X, 3, group=2).values]
    for name, one, other in zip(("topk", "grouped"), found, expected, strict=True):
        check_equal(name, one, other)


def test_numbers_of_numpy_and_torch_are_thresholds() -> None:
    expected = nogemm.topk_threshold(X, 0.5)
    for threshold in (np.float32(0.5), np.float64(0.5), torch.tensor(0.5), torch.tensor([0.5, 0.5])):
        check_equal("values", run("topk_threshold", X, threshold).values, expected.values)
    check_equal("whole", nogemm.topk_threshold(X, 1).values, nogemm.topk_threshold(X, 1.0).values)


def test_a_plan_says_so_too() -> None:
    plan: Any = approximate_plan
    with pytest.raises(ConfigError, match=r"n must be a whole number, got n=100\.0"):
        plan(100.0, 3, 0.9)
