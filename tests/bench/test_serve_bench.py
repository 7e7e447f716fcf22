"""`nogemm bench serve` on a small encoder: verified rows, a server that answers with something else, its table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import people
from nogemm.bench import serve as bench
from nogemm.bench.report.tables import serve_table
from nogemm.errors import ConfigError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A converted sentence encoder and the dense one."""
    found = tmp_path_factory.mktemp("bench")
    people.sentence_encoder(found / "dense")
    assert people.run("convert", found / "dense", found / "ours", *people.SAME) == 0
    return found


def args(folder: Path, *against: str, **more: Any) -> bench.ServeBenchArgs:
    small: dict[str, Any] = {"clients": (1, 4), "texts": 2, "tokens": 12, "threads": 1, "rounds": 1, "seconds": 0.3}
    return bench.ServeBenchArgs(
        model=str(folder / "ours"), dense=str(folder / "dense"), against=against, **(small | more)
    )


def test_servers_are_verified_and_timed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[dict[str, Any]] = []
    result = bench.run_serve_bench(args(folder, "torch-fp32"), keep=kept.append)
    assert [(row["contender"], row["clients"]) for row in result["rows"]] == [("torch-fp32", 1), ("torch-fp32", 4)]
    for row in result["rows"]:
        assert row["verified"], row
        assert row["cosine"] > 0.9999
        assert row["ratio"] == 1
        assert row["us_p99"] >= row["us_median"] > 0
        assert row["texts_per_second"] > 0
    assert len(kept) == 2
    table = serve_table(json.loads(json.dumps(result)))
    assert all(len(line) == len(table.head) for line in table.rows)
    # A server of another model has no time.
    monkeypatch.setattr(bench._Models, "_wanted", lambda self, source: people_of(self))
    (row,) = bench.run_serve_bench(args(folder, "torch-fp32", clients=(1,)))["rows"]
    assert "computes something else" in row["error"]
    assert (row["verified"], row["us_median"]) == (False, None)
    assert "computes something else" in serve_table(result | {"rows": [row]}).rows[0][2]


def people_of(models: Any) -> Any:
    """Return the answers of another order of the texts."""
    from nogemm.models.embed import embed
    from nogemm.models.loading import load_encoder

    return embed(load_encoder(models.args.dense), models.tokenizer, models.texts)[::-1].copy()


def test_what_cannot_be_measured_is_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match="--against 'tgi': choose from nogemm-openvino-int8"):
        bench.run_serve_bench(args(folder, "tgi"))
    with pytest.raises(ConfigError, match="must be above 0"):
        bench.run_serve_bench(args(folder, "torch-fp32", clients=(0,)))


@pytest.mark.slow
def test_the_command_with_exports(folder: Path, tmp_path: Path) -> None:
    names = "nogemm-openvino-int8,nogemm-torch-int8,openvino-int8"
    words = ("--model", folder / "ours", "--dense", folder / "dense", "--against", names, "--clients", "1,8")
    more = (
        "--tokens",
        12,
        "--rounds",
        2,
        "--seconds",
        0.5,
        "--folder",
        tmp_path / "kept",
        "--json",
        tmp_path / "s.json",
    )
    assert people.run("bench", "serve", *words, *more) == 0
    result = json.loads((tmp_path / "s.json").read_text())
    assert [row["contender"] for row in result["rows"]] == [name for name in names.split(",") for _ in range(2)]
    assert all(row["verified"] for row in result["rows"]), result["rows"]
    assert (tmp_path / "kept" / "openvino-int8" / "nogemm_export.json").is_file()
