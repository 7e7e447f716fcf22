"""What needs no second rank: one rank, the deal, merging lists, marks, checksums, counters, arguments."""

from __future__ import annotations

import ctypes
import math
import threading
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
from scenes import a_head, an_ffn, states

import nogemm
from nogemm import ConfigError, DistributedError, NotFiniteError
from nogemm.distributed import Exchange, join, shard_head, shard_hire, shared
from nogemm.distributed.agreement import NOT_FINITE, agree, check_marks, check_mean_marks, direction, marks
from nogemm.distributed.deal import deal
from nogemm.distributed.head import argmax_of_all
from nogemm.distributed.merge import NOBODY, best, from_words, to_words
from nogemm.distributed.report import Traffic
from nogemm.heads import HireHead
from nogemm.ops import head_argmax, native_available
from nogemm.ops._library import native
from nogemm.ops.topk_recall import expected_recall


def test_one_rank_is_one_process() -> None:
    head, x = a_head(), states()
    sharded = shard_head(head)
    found, right = sharded.choose(x), head.choose(x)
    assert torch.equal(found.token, right.token)
    assert torch.equal(sharded.search(x).token, head.search(x).token)
    assert torch.equal(sharded.estimate(x), head.estimate(x))
    assert torch.equal(sharded.logits(x), head.logits(x))
    assert torch.equal(
        sharded.top_k(x, 5).token, head.logits(x).sort(dim=1, descending=True, stable=True).indices[:, :5]
    )
    report = sharded.report()
    assert (report.transport, report.calls, report.bytes_sent) == ("none", 0, 0)
    ffn = an_ffn()
    for mode in ("local", "global"):
        assert torch.allclose(shard_hire(ffn, mode=mode)(x), ffn(x), rtol=1e-5, atol=1e-4)  # type: ignore[arg-type]
    x[4, 0] = torch.nan
    with pytest.raises(NotFiniteError, match="the state at position 4 is not finite"):
        sharded.choose(x)


def test_sharded_modules_of_models(tmp_path: object) -> None:
    import decoders

    model = decoders.make("llama tied")
    nogemm.convert(model, nogemm.HireConfig(keep=1.0))
    nogemm.convert_head(model)
    ids = decoders.prompts()
    right = nogemm.generate(model, ids, 8)
    exchange = join()
    head = shard_head(model, exchange)
    ffns = nogemm.shard_hire(model, exchange)
    assert model.get_output_embeddings() is head
    assert [type(model.get_submodule(path)).__name__ for path in ffns] == ["ShardedHire"] * 2
    assert torch.equal(nogemm.generate(model, ids, 8), right)
    with pytest.raises(ConfigError, match="the head is sharded already"):
        shard_head(model, exchange)
    with pytest.raises(ConfigError, match="the FFNs of this model are sharded already"):
        nogemm.shard_hire(model, exchange)
    with pytest.raises(ConfigError, match="save"):
        model.state_dict()


@pytest.mark.parametrize(
    "how", [{}, {"do_sample": True, "seed": 5, "top_k": 20}, {"do_sample": True, "seed": 5}], ids=str
)
def test_a_deferred_head_of_ranks_takes_back_what_its_search_missed(how: dict[str, Any]) -> None:
    import decoders

    texts, ids, report = [], decoders.prompts(2), nogemm.GenerationReport()
    for config in (nogemm.HeadConfig(), nogemm.HeadConfig(mode="deferred", leading=4, sketch=4, rows=1)):
        model = decoders.make("llama tied")
        nogemm.convert_head(model, config)
        if config.mode == "deferred":
            shard_head(model)
        texts.append(nogemm.generate(model, ids, 20, report=report, **how))
    assert torch.equal(*texts)
    assert report.differences > 0, "the search was wrong, and the text is not"


def test_a_sharded_head_is_described_by_the_rows_that_lie_here() -> None:
    import decoders

    model = decoders.make("llama tied")
    nogemm.convert_head(model)
    head = shard_head(model)
    assert "rank 0 of 1" in str(head)
    assert "codes=" in str(head)
    assert nogemm.head_report(model).rows == len(head.weight)
    for mode in ("high_recall", "fast"):
        other = HireHead(nogemm.HeadConfig(mode=mode), head.weight)  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match=f"only heads of mode .* are sharded, got mode=.{mode}."):
            shard_head(other)


def test_models_without_what_is_sharded_are_refused() -> None:
    import decoders

    model = decoders.make("llama")
    with pytest.raises(ConfigError, match=r"there is no converted head; call nogemm\.convert_head"):
        shard_head(model)
    with pytest.raises(ConfigError, match=r"there is no HireFFN; call nogemm\.convert with a HireConfig first"):
        shard_hire(model)
    nogemm.pack(nogemm.convert(model, nogemm.HireConfig(keep=1.0)) and model)
    with pytest.raises(ConfigError, match="the model is packed; shard it first"):
        shard_hire(model)


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"mode": "exact"}, "mode must be one of local, global, got mode='exact'"),
        ({"slack": 0.5}, "slack must be a number of at least 1, got 0.5"),
        ({"slack": math.inf}, "slack must be a number of at least 1, got inf"),
        ({"slack": 2.0, "recall": 0.9}, "give slack or recall, not both; got slack=2.0 and recall=0.9"),
        ({"recall": 1.5}, "recall must be from 0 to 1, got recall=1.5"),
        ({"mode": "global", "dtype": "int8"}, 'slack, recall and dtype are for mode="local"'),
        ({"dtype": "int3"}, "int3"),
    ],
)
def test_arguments_of_an_ffn_are_checked(changes: dict[str, object], part: str) -> None:
    with pytest.raises(ConfigError, match=part.replace("(", r"\(")):
        shard_hire(an_ffn(), **changes)  # type: ignore[call-overload]


def test_layers_that_cannot_be_sharded_are_refused() -> None:
    with pytest.raises(ConfigError, match="training mode"):
        shard_hire(an_ffn().train())
    with pytest.raises(ConfigError, match='got select="statistical"'):
        shard_hire(an_ffn(select="statistical"), mode="global")
    assert shard_hire(an_ffn(select="statistical"))(states()).isfinite().all()


def test_joining_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    for timeout in (0, -1.0, math.inf, math.nan, "60", True):
        with pytest.raises(ConfigError, match="timeout must be a number of seconds above 0"):
            join(timeout=timeout)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="transport must be one of auto, shared, group, got transport='mpi'"):
        join(transport="mpi")  # type: ignore[arg-type]
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=r"2 processes were started, but torch\.distributed does not know"):
        join()


@pytest.mark.parametrize("seed", [0, None])
def test_rows_are_dealt_once(seed: int | None) -> None:
    parts = deal(103, 4, seed, "rows")
    assert [len(part) for part in parts] == [26, 26, 26, 25]
    assert torch.equal(torch.cat(parts).sort().values, torch.arange(103))
    assert all(bool((part.diff() > 0).all()) for part in parts)
    assert torch.equal(torch.cat(parts), torch.arange(103)) == (seed is None)
    with pytest.raises(ConfigError, match="3 rows cannot be dealt to 4 ranks"):
        deal(3, 4, seed, "rows")


def test_winners_that_stand_together_need_the_random_deal() -> None:
    """Words that are frequent have low numbers: what the formula expects is found by a random deal alone."""
    tokens, n, k, ranks = 400, 2000, 40, 4
    scores = torch.randn(tokens, n) - torch.arange(n) / 300  # the first rows win most often
    winners = torch.zeros(tokens, n, dtype=torch.bool).scatter_(1, scores.topk(k, 1).indices, True)
    recall = {}
    for seed in (0, None):
        found = [winners[:, part].gather(1, scores[:, part].topk(k // ranks, 1).indices).sum()
                 for part in deal(n, ranks, seed, "rows")]  # fmt: skip
        recall[seed] = float(sum(found)) / (tokens * k)
    expected = expected_recall(n, k, ranks, k // ranks)
    assert abs(recall[0] - expected) < 0.01
    assert recall[None] < 0.6 < expected


def test_lists_are_laid_out_and_merged() -> None:
    one = to_words(torch.tensor([1.5]), torch.tensor([[3.0, -1.0]]), torch.tensor([[4, 9]]), 3)
    two = to_words(torch.tensor([2.5]), torch.tensor([[3.0, -torch.inf, 2.0]]), torch.tensor([[2, 5, 0]]), 3)
    marks_PN, values, numbers = from_words(torch.stack((one, two)))
    assert marks_PN.tolist() == [[1.5], [2.5]]
    assert values.tolist() == [[3.0, -1.0, -torch.inf, 3.0, -torch.inf, 2.0]]
    assert numbers.tolist() == [[4, 9, NOBODY, 2, 5, 0]]
    found = best(values, numbers, 5)
    assert found[1].tolist() == [[2, 4, 0, 9, 5]]  # ties to the lowest number; nobody comes last
    assert found[0].tolist() == [[3.0, 3.0, 2.0, -1.0, -torch.inf]]


def test_marks_tell_states_apart_and_forgive_rounding() -> None:
    x, along = states(200), direction(24)
    own = marks(x, along)
    check_marks(torch.stack((own, marks(x.bfloat16(), along), marks(1e15 * x, along))))
    check_mean_marks(own, own, 4)
    other = marks(states(200, seed=5), along)
    assert int(((own - other).abs() < 0.05).sum()) < 20  # of 200 single states; a text has more than one
    with pytest.raises(ConfigError, match="rank 1 got another state at position"):
        check_marks(torch.stack((own, other)))
    x[7, 0] = -torch.inf
    assert marks(x, along)[7] == NOT_FINITE
    assert marks(torch.zeros(1, 24), along).tolist() == [0.0]
    with pytest.raises(ConfigError, match="did not get the same token at position 7"):
        check_mean_marks((own + marks(x, along)) / 2, own, 2)


class OtherRank(Exchange):
    """An exchange with a rank 1 that says something else."""

    def __init__(self, change: int) -> None:
        super().__init__(None, 1.0)
        self.change = change

    def gather(self, x: torch.Tensor, traffic: Traffic) -> torch.Tensor:
        other = x.clone()
        other[self.change] += 1
        return torch.stack((x, other))


def test_a_checksum_that_differs_is_named() -> None:
    parts = {"config": ("a", 1), "weights": torch.arange(5), "biases": None}
    agree(join(), torch.device("cpu"), parts)
    with pytest.raises(ConfigError, match="weights: those of rank 1 differ from those of rank 0"):
        agree(OtherRank(1), torch.device("cpu"), parts)
    with pytest.raises(ConfigError, match="biases: those of rank 1"):
        agree(OtherRank(2), torch.device("cpu"), parts)


def test_all_logits_name_the_token_that_the_proof_names() -> None:
    """What a GPU would do, on a CPU."""
    head, x = a_head(), states()
    x[2, 1] = torch.nan
    x[0] = head.weight[7].float()
    bias = None if head.bias is None else head.bias.float()
    index, value, rows = head_argmax(x, head.weight, bias, head.codes())
    found = argmax_of_all(x, head.weight, bias)
    assert torch.equal(found[0], index)
    assert torch.equal(found[1].nan_to_num(7.0), value.nan_to_num(7.0))
    assert found[2].tolist() == [0 if n == 2 else len(head.weight) for n in range(len(x))]
    assert int(index[2]) == -1
    assert int(rows[2]) == 0


@pytest.mark.skipif(not native_available(), reason="counters are native")
def test_counters_are_waited_for() -> None:
    counters = torch.zeros(3, 16, dtype=torch.int64)
    library, address = native(), counters.data_ptr()
    library.nogemm_shared_wait.restype = ctypes.c_int64
    counters[0, 0] = counters[2, 0] = 5

    def wait(value: int, seconds: float) -> int:
        return library.nogemm_shared_wait(
            ctypes.c_void_p(address), ctypes.c_int64(3), ctypes.c_int64(128), ctypes.c_uint64(value),
            ctypes.c_int64(100), ctypes.c_double(seconds),
        )  # fmt: skip

    assert wait(0, 0.0) == 3
    assert wait(5, 0.01) == 1, "the first that is still below"
    assert wait(6, 0.0) == 0

    def publish() -> None:
        time.sleep(0.02)
        library.nogemm_shared_publish(ctypes.c_void_p(address + 128), ctypes.c_uint64(9))

    other = threading.Thread(target=publish)
    other.start()
    assert wait(5, 20.0) == 3
    other.join()
    assert int(counters[1, 0]) == 9


def test_without_shared_memory_the_group_carries(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared, "native_available", lambda: False)
    assert shared.unusable() == "the native extension is not loaded"
    monkeypatch.undo()
    monkeypatch.setattr(shared, "FOLDER", shared.Path("nowhere"))
    assert shared.unusable() == "this system has no nowhere"
    with pytest.raises(OSError, match="nowhere"):
        shared.create(2)


def test_an_exchange_that_was_closed_says_so() -> None:
    exchange = join()
    exchange.close()
    assert not dist.is_initialized()
    alone = Exchange(None, 1.0)
    alone.group = object()  # type: ignore[assignment]
    alone.close()
    with pytest.raises(DistributedError, match="cannot be used any more: it was closed"):
        alone.gather(torch.zeros(1), Traffic())
