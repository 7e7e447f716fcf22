"""Sharded heads and FFNs on two ranks (forked) and four (torchrun) against one process; ranks that fail."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from scenes import KINDS, N, V, a_head, an_ffn, states

from nogemm.layers.hire import HireFFN

HERE = Path(__file__).resolve().parent
TOLERANCE = 1e-5  # of the largest output: sums of some dozens of float32 products in another order
INT8 = 0.03
Facts = list[dict[str, Any]]


def play(folder: Path, ranks: int) -> tuple[Facts, str]:
    """Run the scenes, two ranks by forks and more by torchrun; return what each rank saw."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    words = [sys.executable, "scenes.py", str(folder), "2"] if ranks == 2 else [*torchrun, "scenes.py", str(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, cwd=HERE, env=environment, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    files = [folder / f"facts-{rank}.json" for rank in range(ranks)]
    return [json.loads(file.read_text()) for file in files], done.stdout


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Facts:
    facts, said = play(tmp_path_factory.mktemp("two"), 2)
    assert json.loads(said) == [0, -9]
    return facts


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Facts:
    return play(tmp_path_factory.mktemp("four"), 4)[0]


@pytest.fixture(params=[2, 4])
def facts(request: pytest.FixtureRequest) -> Facts:
    return request.getfixturevalue({2: "two", 4: "four"}[request.param])


def seen(facts: Facts, *names: str) -> list[Any]:
    """Return one fact of every rank."""
    found: list[Any] = list(facts)
    for name in names:
        found = [part[name] for part in found]
    return found


def test_the_token_is_one_process_s(facts: Facts) -> None:
    held = [-(-(V - rank) // len(facts)) for rank in range(len(facts))]
    for name, first in facts[0]["tokens"].items():
        for rank, fact in enumerate(seen(facts, "tokens", name)):
            right = ("token", "logit", "one by one", "logits", "called", "none")
            right += ("search", "few", "estimates", "some", "searched rows")
            assert [key for key in right if not fact[key]] == [], (name, rank)
            assert fact["tie"] == 7, "rows 7 and V - 1 are equal: the lower one wins, whoever holds it"
            assert fact["transport"] == ("shared memory" if name.startswith("shared") else "gloo")
            assert fact["features"] == V
            assert fact["held"] == held[rank]
            assert fact["rows"] == first["rows"]
            assert N <= fact["rows"] < N * V


def test_some_ranks_share_a_head(facts: Facts) -> None:
    inside = [{"token": True, "rank": rank, "ranks": 2, "transport": "shared memory"} for rank in range(2)]
    assert seen(facts, "some_ranks")[-2:] == inside
    for fact in seen(facts, "some_ranks")[:-2]:
        assert "ConfigError: join: this process is not in the group" in fact["outside"]


def test_lists_are_merged(facts: Facts) -> None:
    for fact in seen(facts, "lists"):
        assert [k for k in (1, 30, V) if not (fact[f"top {k}"] and fact[f"logits {k}"])] == []
        assert [fact[f"expected {k}"] for k in (1, 30, V)] == [1, 1, 1]
        assert fact["sizes"] == [-(-(V - rank) // len(facts)) for rank in range(len(facts))]
        assert fact["view"]


def test_recall_is_the_formula_s(facts: Facts) -> None:
    """Each rank keeps its share of 40; the mean over 400 states has a standard deviation of 0.003."""
    for fact in seen(facts, "lists"):
        assert 0.85 < fact["expected"] < 0.95
        assert abs(fact["recall"] - fact["expected"]) < 0.01
        assert fact["recall asked"] >= 0.998
        assert fact["sent"] == 400 * (4 + 8 * -(-40 // len(facts)))
        assert fact["naive"] == 400 * 4 * fact["sizes"][facts.index(next(f for f in facts if f["lists"] is fact))]


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("k 1004, kept None", "ConfigError: top_k: k=1004 is more than the 1003 rows of the head"),
        ("k 0, kept None", "ConfigError: top_k: k must be an integer at least 1, got k=0"),
        ("k 30, kept 1", "fewer than k=30; keep at least"),
        ("k 30, kept 0", "ConfigError: top_k: kept must be an integer at least 1, got kept=0"),
        ("both", "give kept or recall, not both; got kept=5 and recall=0.9"),
        ("too wide", "ShapeError: ShardedHead: the head takes width 24, x has shape (2, 25)"),
        ("saved", "save the model before shard_head"),
        ("copied", "ConfigError: an exchange between ranks cannot be copied"),
        ("again", "ConfigError: shard_head: the head is sharded already"),
        ("gradient", "ConfigError: a sharded head has no gradient"),
    ],
)
def test_bad_input_to_a_head_is_named(facts: Facts, name: str, part: str) -> None:
    assert [part in text for text in seen(facts, "lists", name)] == [True] * len(facts)


def mask_of(facts: Facts, kind: str, mode: str, hidden: int) -> torch.Tensor:
    """Return which neurons answered on any rank; none may on two."""
    mask = torch.zeros(50, hidden, dtype=torch.int64)
    for rows in seen(facts, "ffns", kind, mode, "chosen"):
        for token, row in enumerate(rows):
            mask[token, row] += 1
    assert int(mask.max()) == 1
    return mask.bool()


def answer(layer: HireFFN, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    lists = [row.nonzero().flatten() for row in mask]
    index = torch.nn.utils.rnn.pad_sequence(lists, batch_first=True, padding_value=-1)
    return layer.at(x, index.to(torch.int32))


@pytest.mark.parametrize("kind", KINDS)
def test_an_ffn_of_ranks_is_one_process_s(facts: Facts, kind: str) -> None:
    whole, x, ranks = an_ffn(**KINDS[kind]), states(50), len(facts)
    groups = -(-whole.hidden // whole.config.group)
    right = torch.zeros(50, whole.hidden, dtype=torch.bool)
    for row, kept in zip(right, whole.choose(x).kept_NK, strict=True):
        row[kept[kept >= 0].long()] = True
    size = float(answer(whole, x, right).abs().max())
    for mode in ("local", "global"):
        mask = mask_of(facts, kind, mode, whole.hidden)
        y = answer(whole, x, mask)
        for found in seen(facts, "ffns", kind, mode, "y"):
            assert float((torch.tensor(found) - y).abs().max()) <= TOLERANCE * size
        assert float((answer(whole, x, ~mask) - y).abs().max()) > 100 * TOLERANCE * size, "the control"
        if kind != "half" and (
            mode == "global" or kind == "active"
        ):  # "half": a sketch chooses, of each rank's weights
            assert torch.equal(mask, right)
        sent = seen(facts, "ffns", kind, mode, "bytes")
        width = min(whole.kept, -(-groups // ranks)) if mode == "global" and kind != "active" else -1
        assert sent == [50 * (8 * width + 4) * 2 if width > 0 else 0] * ranks  # named once, answered once
        assert seen(facts, "ffns", kind, mode, "output bytes") == [50 * 4 * 11] * ranks
    local = torch.tensor(facts[0]["ffns"][kind]["local"]["y"])
    for dtype, bound in (("fp32", TOLERANCE), ("int8", INT8)):
        packed = torch.tensor(facts[0]["ffns"][kind][dtype])
        assert float((packed - local).norm() / local.norm()) <= 10 * bound


def test_recall_of_an_ffn_is_the_formula_s(facts: Facts) -> None:
    whole, x = an_ffn(), states(50)
    mask = mask_of(facts, "plain", "local", whole.hidden)
    found = [float(mask[n, kept.long()].double().mean()) for n, kept in enumerate(whole.choose(x).kept_NK)]
    expected = facts[0]["ffns"]["plain"]["local"]["expected"]
    assert 0.8 < expected < 0.99
    assert abs(sum(found) / 50 - expected) < 0.03  # 50 tokens: three standard deviations
    slack, asked = facts[0]["ffns"]["slack"]
    assert slack > expected
    assert asked >= 0.99


def test_an_ffn_of_ranks_keeps_the_rules_of_layers(facts: Facts) -> None:
    for fact in seen(facts, "ffns"):
        assert fact["nan"] == [True, True], "a broken token answers NaN, and the others their own"
        assert fact["many"], "a token's answer does not depend on the batch"
        assert fact["bfloat16"] == "torch.bfloat16"
        assert "evaluation only" in fact["trained"]
        assert "save before shard_hire" in fact["saved"] or "save the model before shard_hire" in fact["saved"]
        assert "no gradient" in fact["gradient"]
        assert f"1 groups of neurons cannot be dealt to {len(facts)} ranks" in fact["too many ranks"]


def test_ranks_that_disagree_are_told_so_on_every_rank(facts: Facts) -> None:
    last = len(facts) - 1
    others = f"rank {last}"
    for fact in seen(facts, "disagreement"):
        assert fact["weights"] == f"ConfigError: the head's weights: those of {others} differ from those of rank 0"
        assert "shard_head's settings: those of rank" in fact["settings"]
        assert fact["rows"].startswith(f"ConfigError: shard_head's settings: those of {others} differ")
        assert fact["ffn"].startswith(f"ConfigError: shard_hire's settings for the FFN: those of {others} differ")
        for name in ("states", "lists", "logits", "called", "not finite on one"):
            assert fact[name].startswith(f"ConfigError: {others} got another state at position "), name
        assert "did not get the same token at position" in fact["tokens"]
        for name in ("noise", "noise, searched"):
            assert "got other noise than rank 0; all ranks must draw by one seed" in fact[name]
        assert "ConfigError: sampling: those of rank" in fact["calls"]
        assert fact["same calls"] == "no error"
        assert fact["drawn"] == facts[0]["disagreement"]["drawn"], "torch's generator is where it was on every rank"
        assert fact["not finite"] == fact["not finite, lists"]
        assert fact["not finite"].startswith("NotFiniteError: the state at position 5 is not finite")
        assert fact["after all of it"], "none of these errors breaks the exchange"


def test_calls_that_differ_are_an_error(facts: Facts) -> None:
    for fact in seen(facts, "failures"):
        assert fact["names left"] == 0, "the memory's file has no name any more"
        assert "sent 48" in fact["shapes"]
        assert "cannot be used any more" in fact["afterwards"]


def test_a_late_rank_is_an_error_within_the_timeout(facts: Facts) -> None:
    for rank, fact in enumerate(seen(facts, "failures")):
        if rank != 1:
            assert "DistributedError: rank 1 did not answer within 0.2 seconds" in fact["late, shared"]
            assert "DistributedError" in fact["late, group"]
            assert "did not answer within 0.2 seconds" in fact["late, group"]
            assert fact["left"] == "DistributedError: rank 1 has ended"


def test_a_killed_rank_is_an_error_not_a_hang(two: Facts) -> None:
    assert "death" not in two[1]
    assert two[0]["death"]["shared memory"] == "DistributedError: rank 1 has ended"
    assert "DistributedError: rank 0: another rank ended" in two[0]["death"]["gloo"]


def test_heads_of_other_weights_are_told_apart() -> None:
    """The control of every comparison above: another head has other tokens."""
    assert not torch.equal(a_head(0).choose(states()).token, a_head(1).choose(states()).token)
