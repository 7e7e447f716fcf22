"""The two forms of FFF's published "40x": each is its layer, and a wrong one gets no time."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from nogemm.bench.contenders.layer import DenseStack
from nogemm.bench.engine.pool import write_pool
from nogemm_papers.fff_gather import BMM, GATHER, BatchedDense, FFFContender, GatherTree, tree_of


def test_both_forms_of_the_published_comparison_are_their_layers() -> None:
    x = torch.randn(40, 12)
    assert [2 ** (tree_of(n).depth + 1) - 1 for n in (1, 2, 3, 64, 2048, 4095)] == [1, 1, 3, 63, 2047, 4095]
    tree = tree_of(64).build(12).eval()
    stack = DenseStack(12, 64, "gelu", 1, 0)
    with torch.no_grad():
        torch.testing.assert_close(GatherTree(tree)(x), tree(x))
        torch.testing.assert_close(BatchedDense(stack)(x), stack(x)[0])


@pytest.mark.parametrize("form", [GATHER, BMM])
def test_a_wrong_form_is_not_timed(form: str, tmp_path: Path) -> None:
    write_pool(tmp_path / "pool", 256, 12, seed=1, source_ND=None)
    settings = {"form": form, "d": 12, "hidden": 63, "activation": "gelu", "seed": 0, "pool": str(tmp_path / "pool")}
    contender = FFFContender(settings)
    assert contender.prepare({"batch": 16, "cache": "fresh"})["verified"]
    contender.modules[0].requires_grad_(False).load_state_dict(
        {name: -value for name, value in contender.modules[0].state_dict().items()}
    )
    assert not contender.verify()["verified"]
