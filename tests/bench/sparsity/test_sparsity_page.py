"""The command, its tables, and the report's page: every figure of a result stands where a reader looks for it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import people
from nogemm.bench.report.sparsity import sparsity_charts
from nogemm.bench.report.write import write_report
from nogemm.bench.sparsity.tables import sparsity_tables
from nogemm.errors import ConfigError


def result() -> dict[str, Any]:
    """Return a small result of two FFNs."""
    shares = {"neighbours": 0.3, "strangers": None, "independent": 0.4}

    def layer(number: int) -> dict[str, Any]:
        return {
            "site": f"layers.{number}",
            "hidden": 2048,
            "zeros": 0.901,
            "carriers": {"0.99": 0.123, "0.999": 0.234},
            "energy": [{"keep": 0.05, "count": 103, "kept": 0.05, "energy": 0.345, "best_energy": 0.456}],
            "recall": [
                {
                    "sketch": "int8",
                    "keep": 0.05,
                    "target": target,
                    "candidates": 1,
                    "share": share,
                    "oversample": 1 + share,
                }
                for target, share in ((0.9, 0.05), (0.99, 0.07 + number / 100))
            ],
            "union": [{"set": "kept", "keep": 0.05, "batch": size, **shares} for size in (1, 8)],
            "alone": 21.5,
        }

    predicted = {"keep": 0.05, "batch": 1, "dense_us": 700.0, "us": 100.0, "speed_up": 7.0, "bound": "memory"}
    timed = [
        {"contender": "nogemm-fp32 keep 0.05", "batch": 1, "keep": 0.05, "us_median": 151.0, "speed_up": 6.51},
        {"contender": "torch-fp32", "batch": 1, "keep": None, "us_median": 983.0, "speed_up": 1.0},
    ]
    about = {"site": "layers.1", "sites": 2}
    return {
        "kind": "sparsity",
        "machine_line": "a machine",
        "model": "OPTForCausalLM",
        "settings": {"keep": [0.05], "sketches": ["int8"], "batch": [1, 8], "dtype": "fp32"},
        "tokens": 1024,
        "layers": [layer(0), layer(1)],
        "quality": {
            "measure": "perplexity",
            "higher": False,
            "tokens": 1000,
            "dense": 20.25,
            "cut": [{"keep": 0.05, "value": 1234.0, "best": 567.0}],
        },
        "predicted": [{**about, "rows": [predicted, {**predicted, "batch": 8}]}],
        "speed": [{**about, "rows": timed}],
    }


def text_of(data: dict[str, Any]) -> dict[str, list[list[str]]]:
    tables = sparsity_tables(data)
    for table in tables:
        assert all(len(row) == len(table.head) for row in table.rows), table.title
    return {table.title: [list(row) for row in table.rows] for table in tables}


def test_tables_hold_the_figures() -> None:
    tables = text_of(result())
    layers = tables["Sparsity: OPTForCausalLM"]
    shares = ["90.1%", "12.3%", "23.4%", "34.5%", "45.6%"]
    assert layers[1] == ["layers.1", "2,048", *shares, "1.05", "1.08", "30%", "", "21.5"]
    assert tables["Quality of the cut model"] == [["all", "20.25", ""], ["5%", "1,234", "567"]]
    assert tables["Candidates for a recall"] == [["int8", "5%", "5% (5%)", "7.5% (8%)"]]
    assert tables["Neurons of several tokens together"][0] == ["kept, 5%", "neighbours", "30%", "30%"]
    first, second = tables["Time of HiRE beside the dense layer"]
    assert first[-3:] == ["983", "151", "6.51"]
    assert second[-3:] == ["", "", ""]


def test_what_was_not_measured_leaves_no_table() -> None:
    data = result() | {"quality": None, "predicted": [], "speed": []}
    assert set(text_of(data)) == {
        "Sparsity: OPTForCausalLM",
        "Candidates for a recall",
        "Neurons of several tokens together",
    }
    data["quality"] = {"measure": None, "why_not": "it is no language model"}
    assert text_of(data)["Quality of the cut model"] == [["not judged", "it is no language model", ""]]
    assert text_of(data | {"layers": [], "quality": None}) == {}
    assert sparsity_charts(data | {"layers": [], "quality": None}) == []


def test_a_page_draws_it(tmp_path: Path) -> None:
    (tmp_path / "s.json").write_text(json.dumps(result()))
    page = write_report([tmp_path / "s.json"], tmp_path / "page.html").read_text()
    for text in (
        "Which layers are sparse: OPTForCausalLM",
        "perplexity against neurons that answer, %",
        "as HireFFN ranks: 1,234 at 5.00",
        "int8: 7.50 at 5.00",
        "one text: 30.0 at 8.00",
        "nogemm-fp32 keep 0.05: 151 at 1.00",
        "layers.1",
        "a machine",
    ):
        assert text in page, text
    (tmp_path / "broken.json").write_text(json.dumps({"kind": "sparsity", "settings": {}}))
    with pytest.raises(ConfigError, match="not a complete sparsity result"):
        write_report([tmp_path / "broken.json"], tmp_path / "page.html")


def test_a_perplexity_beyond_all_numbers_is_not_drawn() -> None:
    data = result()
    data["quality"]["cut"][0]["value"] = float("inf")
    assert "What the model is worth with fewer neurons" not in dict(sparsity_charts(data))
    assert "What the model is worth with fewer neurons" in dict(sparsity_charts(result()))


def test_the_command_prints_and_writes_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    timed: list[tuple[Any, ...]] = []

    def no_time(site: Any, found: Any, x_ND: Any, **chosen: Any) -> list[dict[str, Any]]:
        timed.append((chosen["dtype"], chosen["batch"], chosen["plan"].rounds))
        return []

    monkeypatch.setattr("nogemm.bench.sparsity.profile.measure_speed", no_time)
    monkeypatch.setattr("nogemm.bench.sparsity.profile.measure_roofline", lambda threads: None)
    model, target = people.gpt2(tmp_path / "gpt2"), tmp_path / "s.json"
    (tmp_path / "texts.txt").write_text("\n".join(people.TEXTS * 2))
    words = ["profile", "--sparsity", model, "--data", tmp_path / "texts.txt", "--tokens", 30, "--keep", "0.25"]
    assert people.run(*words, "--dtype", "bf16", "--rounds", 9, "--layerwise", "--json", target) == 0
    said = capsys.readouterr().out
    found = json.loads(target.read_text())
    assert found["kind"] == "sparsity"
    assert found["settings"]["model"] == "gpt2"
    assert found["settings"]["data"] == "texts.txt"
    assert str(tmp_path) not in target.read_text()  # where a model lies is nobody's business
    assert [layer["site"] for layer in found["layers"]] == ["transformer.h.0.mlp", "transformer.h.1.mlp"]
    assert all(layer["alone"] > 1 for layer in found["layers"])
    assert found["quality"]["alone"]["dense"] == found["quality"]["dense"]  # of so few tokens both take all
    assert timed == [("bf16", (1, 2, 4, 8, 16, 32), 9)]
    assert "Sparsity: gpt2" in said
    assert f"{found['quality']['dense']:,.4g}" in said
    assert people.run("report", target, "-o", tmp_path / "page.html") == 0
    assert "Which layers are sparse: gpt2" in (tmp_path / "page.html").read_text()


def test_a_command_that_is_stopped_leaves_what_it_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("nogemm.bench.sparsity.profile.judge_of", stop)
    model, target = people.gpt2(tmp_path / "gpt2"), tmp_path / "s.json"
    (tmp_path / "texts.txt").write_text("\n".join(people.TEXTS * 2))
    words = ["--data", tmp_path / "texts.txt", "--tokens", 30, "--keep", "0.25", "--json", target]
    assert people.run("profile", "--sparsity", model, *words) == 130
    found = json.loads(target.read_text())
    assert found["partial"] is True
    assert len(found["layers"]) == 2
    assert found["quality"] is None
