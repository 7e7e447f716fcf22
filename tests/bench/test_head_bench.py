"""`nogemm bench head` on a small decoder: rows, checks that refuse, its table."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import people
from nogemm.bench import head as bench
from nogemm.bench.contenders import head as contenders
from nogemm.bench.head import HeadArgs, reference_tokens, run_head_bench
from nogemm.bench.report.tables import head_table
from nogemm.errors import ConfigError
from nogemm.ops import head_logits

TEXTS = [f"{a} {b} the {c} of a text" for a in people.WORDS for b in people.WORDS for c in people.WORDS]
OURS = ("nogemm-exact", "nogemm-deferred", "nogemm-search", "nogemm-dense")
SMALL = {"positions": 40, "rounds": 1, "seconds": 0.001, "threads": 1}


def test_rows_are_verified_and_timed(tmp_path: Path) -> None:
    model = people.gpt2(tmp_path / "gpt2")
    args = HeadArgs(model=str(model), against=("torch-fp32", "torch-bf16"), batch=(1, 3), **SMALL)  # type: ignore[arg-type]
    kept: list[dict[str, object]] = []
    result = run_head_bench(args, TEXTS, keep=kept.append)
    assert [(row["contender"], row["batch"]) for row in result["rows"]] == [
        (name, batch) for batch in (1, 3) for name in (*OURS, "torch-fp32", "torch-bf16")
    ]
    for row in result["rows"]:
        if row["contender"] != "torch-bf16":
            assert row["verified"], row
            assert row["us_median"] > 0
            assert row["agreement"] == 1
    exact = result["rows"][0]
    assert exact["positions"] == 40
    assert 1 <= exact["rows"] <= 9
    assert all(row["recall"] == 1 for row in result["rows"][1:3])
    assert json.loads(json.dumps(kept[-1]))["rows"]
    table = head_table(result)
    assert len(table.rows) == 12
    assert all(len(row) == len(table.head) for row in table.rows)
    assert str(tmp_path) not in json.dumps(result), "no path of the machine"


def test_a_head_that_names_other_tokens_has_no_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "head.safetensors"
    from safetensors.torch import save_file

    states, weight = torch.randn(40, 16), torch.randn(50, 16)
    tokens = reference_tokens(states, weight)
    save_file({"weight": weight, "moment": torch.eye(16), "states": states, "tokens": (tokens + 1) % 50}, file)
    for cls, name in ((contenders.OurHead, "nogemm-exact"), (contenders.DenseHead, "torch-fp32")):
        made = cls({"file": str(file), "copies": 1, "leading": 8, "sketch": 16, "rows": 4, "engine": name})
        facts = made.prepare({"batch": 1})
        assert not facts["verified"]
        assert "0.0000 of the tokens" in facts["error"]
    monkeypatch.setattr(bench, "head_logits", lambda x, w: -head_logits(x, w))
    with pytest.raises(ArithmeticError, match="otherwise than float64"):
        reference_tokens(states, weight)


def test_large_batches_begin_anew_and_take_fewer_turns(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    file, states, weight = tmp_path / "head.safetensors", torch.randn(40, 16), torch.randn(50, 16)
    tokens = reference_tokens(states, weight)
    save_file({"weight": weight, "moment": torch.eye(16), "states": states, "tokens": tokens}, file)
    settings = {"file": str(file), "copies": 5, "leading": 8, "sketch": 16, "rows": 4}
    for cls, name in ((contenders.OurHead, "nogemm-deferred"), (contenders.DenseHead, "torch-fp32")):
        made, calls = cls({**settings, "engine": name}), 16 if name == "nogemm-deferred" else 1
        for batch, turns in ((1, 5), (16, 5), (32, 2), (64, 2)):
            facts = made.prepare({"batch": batch})
            assert facts["verified"], facts
            assert facts["positions"] == 40
            assert facts["layers"] == turns * calls
            drawn = made._drawn()
            assert [len(x) for x in drawn] == [batch * calls] * turns
            made.place = 39
            assert torch.equal(made._drawn()[0][:2], states[[39, 0]][: batch * calls])
            result = made.run(made._prepare(drawn))
            if name == "nogemm-deferred":
                expected = (drawn[-1] @ weight.T).argmax(1).view(16, batch)
                assert len(result) == turns
                assert torch.equal(result[-1].view(16, batch), expected)


def test_bad_input_is_named(tmp_path: Path) -> None:
    model = str(people.gpt2(tmp_path / "gpt2"))
    with pytest.raises(ConfigError, match="unknown engine 'tpu'"):
        run_head_bench(HeadArgs(model=model, against=("tpu",)), TEXTS)
    with pytest.raises(ConfigError, match="--dtype must be fp32 or bf16, got 'int3'"):
        run_head_bench(HeadArgs(model=model, dtype="int3"), TEXTS)
    with pytest.raises(ConfigError, match=r"the texts have 4 tokens, 80 are needed"):
        run_head_bench(HeadArgs(model=model, against=(), **SMALL), ["a table of text"])  # type: ignore[arg-type]
