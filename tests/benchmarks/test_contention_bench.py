"""benchmarks/contention.py: ways to wait take turns, each with its own variables; rows are medians."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

import benchmark_scripts


def test_rows_are_medians_of_processes_with_their_own_variables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = benchmark_scripts.load("contention")
    calls: list[str | None] = []

    def run(words: list[str], *, env: dict[str, str], **_: Any) -> Any:
        calls.append(env.get("GOMP_SPINCOUNT"))
        rates = {"threads": 2, "alone": 100.0 * len(calls), "beside": 10.0 * len(calls)}
        return subprocess.CompletedProcess(words, 0, json.dumps(rates))

    monkeypatch.setattr(script.subprocess, "run", run)
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")  # what the caller has set does not reach them
    out = tmp_path / "out.json"
    monkeypatch.setattr(
        "sys.argv", ["contention.py", "--only", "default,1000 spins", "--rounds", "3", "--json", str(out)]
    )
    script.main()
    assert calls == [None, "1000"] * 3
    rows = json.loads(out.read_text(encoding="utf-8"))["rows"]
    assert [(row["way"], row["alone"], row["beside"]) for row in rows] == [
        ("default", 300.0, 30.0),
        ("1000 spins", 400.0, 40.0),
    ]
