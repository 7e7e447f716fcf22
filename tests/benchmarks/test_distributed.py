"""The measurement of heads on several ranks runs on one, checks tokens first, and its recall is the formula's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import people
from benchmark_scripts import load
from nogemm.bench.report.data import read_results

distributed = load("distributed")
TEXTS = [f"{a} {b} the {c} of a text" for a in people.WORDS for b in people.WORDS for c in people.WORDS]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Measure a small decoder on one rank, here."""
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS))
    monkeypatch.setattr(distributed, "EXCHANGES", 60)
    monkeypatch.setattr(distributed, "copies_of", lambda weight_VD, contenders: 1)

    def in_this_process(args: Any, folder: Path) -> None:
        distributed.on_rank(0, 1, folder, args.rounds, args.seconds)

    monkeypatch.setattr(distributed, "run_ranks", in_this_process)
    words = ["--model", str(people.gpt2(tmp_path / "gpt2")), "--data", str(tmp_path / "texts.txt"), "--ranks", "1"]
    words += ["--positions", "40", "--rounds", "1", "--seconds", "0.001", "--json", str(tmp_path / "out.json")]

    def measure(*more: str) -> dict[str, Any]:
        distributed.main([*words, *more])
        return json.loads((tmp_path / "out.json").read_text())

    return measure


def test_a_short_run(run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = run()
    assert [row["contender"] for row in result["rows"][:3]] == [
        "one process, proven", "one process, all logits", "one process, top k"
    ]  # fmt: skip
    assert len(result["rows"]) == 11
    for row in result["rows"]:
        assert row["verified"], row
        assert row["us_median"] > 0
        assert row["recall"] == 1
    assert {row["exchange"] for row in result["exchange"]} == {"gather", "sum"}
    assert {(row["of"], row["dealt"]) for row in result["recall"]} == {
        (of, dealt) for of in ("head", "FFN") for dealt in ("at random", "contiguous")
    }
    assert "one process, proven" in capsys.readouterr().out
    assert read_results([tmp_path / "out.json"]).tables[0].title == "Vocabulary heads on several ranks"
    assert str(tmp_path) not in json.dumps(result), "no path of the machine"


def test_a_head_that_names_other_tokens_has_no_time(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    right = distributed.reference_tokens
    monkeypatch.setattr(distributed, "reference_tokens", lambda x, w: (right(x, w) + 1) % len(w))
    for row in run()["rows"]:
        if "top k" not in row["contender"]:
            assert not row["verified"]
            assert "does not match the reference" in row["error"]
            assert "us_median" not in row


def test_recall_alone(run: Any) -> None:
    result = run("--no-times")
    assert result["rows"] == []
    assert len(result["recall"]) == 12


def test_recall_is_counted() -> None:
    rows = distributed.recall_rows(torch.randn(300, 400), 20, "noise")
    assert len(rows) == 6
    assert all(abs(row["recall"] - row["expected"]) < 0.02 for row in rows)
    sorted_rows = distributed.recall_rows(-torch.arange(400.0).expand(3, -1), 20, "sorted")
    assert [row["recall"] for row in sorted_rows if row["dealt"] == "contiguous"] == [0.5, 0.25, pytest.approx(0.15)]
