"""Studies of kind "finetune": stored models on several tasks, each compared with the baseline of its task."""

from __future__ import annotations

import importlib
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from small_study import faked, outcome, write

import nogemm
import people
from nogemm.bench.report.runs import read_runs, runs_charts, runs_table
from nogemm.errors import ConfigError
from nogemm.study.kinds import KINDS
from nogemm.study.plan import read_study
from nogemm.study.sources import WORK, kept_model
from nogemm.study.store import Store

TABLE4 = Path(__file__).resolve().parents[2] / "benchmarks" / "studies" / "table4.yaml"
FILE = """
kind: finetune
model: dense
common: {batch: 8, max_length: 16, lr: 5e-3, steps: 4}
seeds: [0]
search: {rates: [5e-3], options: {steps: 2}}
tasks:
  - {name: mood, title: the mood, data: mood.jsonl, options: {task: classify}}
  - {name: match, data: match.jsonl, options: {task: pairs, validation_share: 0.3}}
rows:
  - {name: dense}
  - {name: tables, model: tables}
  - {name: narrow, method: dense, set: {hidden: 4}, keep: [1]}
"""


def models(folder: Path) -> None:
    """Store a small dense model, and one with tables."""
    dense = people.bert(folder / "dense")
    model = tf.AutoModel.from_pretrained(dense)
    nogemm.convert(model, nogemm.LookupConfig(tables=4, bits=3, projection=nogemm.BHConfig(rounds=2, block=8)))
    layers: Any = nogemm.converted(model).values()
    for layer in layers:
        torch.nn.init.normal_(layer.tables, std=0.3)
    nogemm.save(model, folder / "tables", tokenizer=tf.AutoTokenizer.from_pretrained(dense))


def data(folder: Path) -> None:
    """Write labelled texts with test rows, and pairs without."""
    source = random.Random(0)
    moods, pairs = [], []
    for number in range(60):
        good = source.random() < 0.5
        text = " ".join(source.choice(people.WORDS[:3] if good else people.WORDS[3:]) for _ in range(5))
        split = "test" if number % 5 == 0 else "validation" if number % 5 == 1 else "train"
        moods.append({"text": text, "label": "good" if good else "bad", "split": split})
        pairs.append({"text": text, "text2": text if good else "the of", "label": int(good)})
    for name, rows in (("mood", moods), ("match", pairs)):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")


def test_models_are_compared_on_every_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models(tmp_path)
    data(tmp_path)

    def run(job: Any, threads: Any, line: Any, expired: Any) -> dict[str, Any]:
        return {"status": "done", **KINDS["finetune"].run(job, lambda model, tokenizer: None)}

    monkeypatch.setattr(importlib.import_module("nogemm.study.run"), "run_process", run)
    report = nogemm.study(write(tmp_path, FILE), tmp_path / "out")
    assert report.failed == 0, report.table["notes"]
    rows = {row["name"]: row for row in report.table["rows"]}
    assert list(rows) == [f"{task}-{name}" for task in ("mood", "match") for name in ("dense", "tables", "narrow")]
    for task in ("mood", "match"):
        dense, tables = rows[f"{task}-dense"], rows[f"{task}-tables"]
        assert tables["baseline"] == f"{task}-dense"
        assert tables["difference"]["value"] == pytest.approx(tables["mean"]["value"] - dense["mean"]["value"])
        assert rows[f"{task}-narrow"]["figures"]["ffns"] == 1
        assert tables["figures"]["ffn_flops"] != dense["figures"]["ffn_flops"]
    final = json.loads((tmp_path / "out" / "mood-dense" / "seed-0.json").read_text())
    assert final["figures"]["measured_on"] == "test"
    assert final["value"] == final["report"]["test"]["accuracy"]["value"]
    trial = json.loads((tmp_path / "out" / "mood-dense" / "rate-0.005.json").read_text())
    assert (trial["figures"]["measured_on"], trial["report"]["test"]) == ("validation", None)
    assert trial["value"] == trial["report"]["best"]["value"]
    (note,) = [note for note in report.table["notes"] if note.startswith("Measured on the validation rows")]
    assert "match: dense" in note
    assert "mood" not in note
    table = runs_table(read_runs(tmp_path / "out"))
    assert "less that of the baseline" in table.head
    assert [row[table.head.index("fewer")] for row in table.rows if row[0].startswith("the mood: dense")] == ["1.00"]
    assert {caption.rpartition(", ")[2] for caption, _ in runs_charts(report.table)} == {"mood", "match"}


def test_a_front_is_of_one_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models(tmp_path)
    data(tmp_path)

    def value(job: Any) -> dict[str, Any]:
        task = job.options["task"]
        return outcome(0.0, accuracy=0.9 if task == "classify" else 0.5, ffn_flops=1.0 if task == "classify" else 2.0)

    faked(monkeypatch, value)
    text = FILE.replace("search: {rates: [5e-3], options: {steps: 2}}\n", "")
    table = nogemm.study(write(tmp_path, text), tmp_path / "out").table
    assert {row["group"] for row in table["rows"] if row["front"]} == {"mood", "match"}


def test_files_are_given_by_task(tmp_path: Path) -> None:
    models(tmp_path)
    data(tmp_path)
    file = write(tmp_path, FILE.replace("mood.jsonl", "gone.jsonl"))
    with pytest.raises(ConfigError, match=r"task 1 'mood': data: no such file: gone\.jsonl"):
        read_study(file)
    given = str(tmp_path / "mood.jsonl")
    plan = read_study(file, {"mood": given})
    assert [row.source.data for row in plan.rows] == [given] * 3 + [str(tmp_path / "match.jsonl")] * 3
    with pytest.raises(ConfigError, match=r"no task 'moood'; did you mean 'mood'"):
        read_study(file, {"mood": given, "moood": given})
    with pytest.raises(ConfigError, match=r"has the tasks mood, match: name the one that .* is for, as TASK="):
        read_study(write(tmp_path, FILE), given)
    job = Store(plan, tmp_path / "out").job(Store(plan, tmp_path / "out").final(plan.row("match-tables"), 3))
    assert (job.model, job.options["seed"], job.trial) == (str(tmp_path / "tables"), 3, False)


def test_the_fourth_table_can_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = ("dense", "dense-176", "lookup-64", "lookup-128", "hire-10")
    people.bert(tmp_path / "model")
    for name in rows:
        kept = kept_model(tmp_path / "runs" / "table1-long" / WORK, name, 0)
        kept.parent.mkdir(parents=True)
        kept.symlink_to(tmp_path / "model")
    for name in ("reviews", "pairs"):
        (tmp_path / f"{name}.jsonl").write_text("")
    monkeypatch.chdir(tmp_path)
    plan = read_study(TABLE4, {"reviews": "reviews.jsonl", "pairs": "pairs.jsonl"})
    assert [row.name for row in plan.rows] == [f"{t}-{n}" for t in ("reviews", "sections", "pairs") for n in rows]
    assert plan.metric.name == "accuracy"
    assert plan.baselines["pairs"] == "pairs-dense"
