"""What is killed: commands on tiny models, what must hold of their files at any moment, and what they come to.

A job does its work in a place (a folder), resuming what lies there. `whole` looks at the place after a kill and raises
AssertionError where a file under its final name is not whole. `outcome` gives the figures of a finished job.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tiny_finetuning
import tiny_tune
import torch
import transformers as tf
from forked import ForkedPopen
from safetensors.torch import load_file
from small_study import TEXT as STUDY
from tiny_export import build

import nogemm
import people
from nogemm import cli
from nogemm.bench.engine import worker_process
from nogemm.bench.engine.measure import trial_runs
from nogemm.running.partial import sigterm_interrupts
from nogemm.study import process as study_process
from nogemm.train import checkpoint as ckpt
from nogemm.tune import timing

__all__ = ["JOBS", "Job", "apart", "prepare"]
SMALL = ["--layers", 1, "--width", 16, "--heads", 2, "--context", 16, "--batch", 4, "--vocabulary", 290, "--steps", 6]
SAVING = importlib.import_module("nogemm.convert.save")  # `nogemm.convert.save` itself names the function
ALWAYS = ["--device", "cpu", "--option", "checkpoint_steps=1", "--option", "log_steps=1"]


@dataclass(frozen=True)
class Job:
    """One command.

    Attributes:
        work: does it, in a place; gets the folder of inputs first.
        whole: checks the files of a place, whatever moment left them.
        outcome: figures and texts that a finished place holds.
        closeness: relative; products are torch's, so a resumed run need not end with equal bits.
    """

    work: Callable[[Path, Path], object]
    whole: Callable[[Path, Path], None]
    outcome: Callable[[Path], Any]
    closeness: float = 1e-4


def prepare(inputs: Path) -> None:
    """Write what the jobs read: models, texts, rows, a study."""
    people.bert(inputs / "dense")
    model = tf.AutoModel.from_pretrained(inputs / "dense")
    torch.manual_seed(1)
    nogemm.convert(model, nogemm.LookupConfig(tables=4, bits=3, projection=nogemm.BHConfig(rounds=2, block=8)))
    nogemm.save(model, inputs / "random", tokenizer=people.tokenizer(inputs / "words"))
    tiny_finetuning.converted(inputs / "converted")
    rows = [{"text": f"{a} {b} of the {a} {c}"} for a in people.WORDS for b in people.WORDS for c in people.WORDS[:3]]
    (inputs / "texts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (inputs / "rows.jsonl").write_text("\n".join(map(json.dumps, tiny_finetuning.ROWS)))
    tiny_tune.dense(inputs / "searched")
    study = STUDY + "rows: [{name: dense, method: dense}, {name: lookup, method: lookup, set: {tables: 4, bits: 3, "
    (inputs / "small.yaml").write_text(study.replace("[0, 1]", "[0]") + "projection.block: 8}}]")
    for name, seed in (("old", 3), ("new", 4)):
        made = build()
        torch.manual_seed(seed)
        for layer in nogemm.converted(made).values():
            torch.nn.init.normal_(layer.tables, std=0.3)  # type: ignore[union-attr]
        nogemm.save(made, inputs / name)


def command(*words: object) -> None:
    """Run a command as the shell would; it ends with its exit code."""
    cli.main([str(word) for word in words])


# -- what is whole


def readable(place: Path) -> None:
    """Read every file of a final name as what it claims to be; temporary siblings may be anything."""
    for file in sorted(place.rglob("*")):
        parts = file.relative_to(place).parts
        if not file.is_file() or any(".tmp-" in p or p.startswith(".") for p in parts):
            continue
        if file.suffix == ".json":
            json.loads(file.read_text())
        elif file.suffix == ".safetensors":
            load_file(file)
    for pointer in place.rglob("latest.json"):
        latest = ckpt.latest(pointer.parent)
        assert latest is not None
        ckpt.read_checkpoint(latest)


def _training(name: str) -> Callable[[Path, Path], None]:
    def whole(inputs: Path, place: Path) -> None:
        readable(place)
        if (place / "out").exists():
            getattr(tf, name).from_pretrained(place / "out")

    return whole


def _old_or_new(absent: bool) -> Callable[[Path, Path], None]:
    """A saved model is one of the two, or, where files change places one by one, absent for a moment."""

    def whole(inputs: Path, place: Path) -> None:
        if absent and not (place / "out" / "config.json").exists():
            return
        found = load_file(place / "out" / "model.safetensors")
        kinds = [name for name in ("old", "new") if _equal(found, load_file(inputs / name / "model.safetensors"))]
        assert kinds, "the saved model is neither the old nor the new one"
        tf.AutoModel.from_pretrained(place / "out")

    return whole


def _equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[name].equal(b[name]) for name in a)


def _exported(inputs: Path, place: Path) -> None:
    import openvino

    out = place / "out"
    if out.exists():
        record = json.loads((out / "nogemm_export.json").read_text())
        assert (out / "openvino_model.bin").stat().st_size == record["weight_bytes"]
        core = openvino.Core()
        core.add_extension(str(out / record["extension"]))
        core.read_model(out / record["model"])


# -- what a job comes to


def weights(folder: Path) -> dict[str, Any]:
    """Return the norm of every tensor of a saved model: what two equal runs agree in."""
    return {name: float(value.double().norm()) for name, value in load_file(folder / "model.safetensors").items()}


def losses(place: Path) -> dict[str, Any]:
    """Return what a training wrote: weights, and the log without its seconds."""
    log = place / "run" / "log.jsonl"
    rows = [json.loads(line) for line in log.read_text().splitlines()] if log.is_file() else []
    return {"weights": weights(place / "out"), "log": [row | {"seconds": None} for row in rows]}


def _study(place: Path) -> dict[str, Any]:
    found = {file.parent.name: json.loads(file.read_text()) for file in place.glob("out/*/seed-*.json")}
    return {name: [row["value"], row["figures"]["history"]] for name, row in sorted(found.items())}


def _tuned(place: Path) -> list[Any]:
    names = ("name", "us_median", "validation", "agreement", "tokens")
    return [[row[name] for name in names] for row in json.loads((place / "facts.json").read_text())["rows"]]


def _bench(place: Path) -> dict[str, Any]:
    result = json.loads((place / "result.json").read_text())
    rows = [[row["contender"], row["batch"], row["verified"]] for row in result["rows"]]
    return {"rows": rows, "partial": result.get("partial", False)}


# -- the work


def _tune(inputs: Path, place: Path) -> None:
    timing.measure = tiny_tune.MadeUp()  # type: ignore[assignment]
    try:
        with sigterm_interrupts():
            found = tiny_tune.tune(inputs / "searched", place / "run", latency_ms=0.7, resume=True)
    except KeyboardInterrupt as stop:
        raise SystemExit(143) from stop
    from nogemm.files import write_json

    write_json(place / "facts.json", found.report.to_dict())


def _study_work(inputs: Path, place: Path) -> None:
    study_process.subprocess.Popen = ForkedPopen  # type: ignore[misc]
    command("study", inputs / "small.yaml", "-o", place / "out", "--data", inputs / "texts.jsonl")


def _bench_work(inputs: Path, place: Path) -> None:
    worker_process.subprocess.Popen = ForkedPopen  # type: ignore[misc]
    with trial_runs():
        command(
            "bench", "layer", "--d", 16, "--hidden", 32, "--set", "tables=4", "--set", "bits=3", "--set",
            "projection.block=8", "--batch", "1,4", "--against", "torch-fp32", "--threads", 1, "--json",
            place / "result.json",
        )  # fmt: skip


def _save(inside: bool) -> Callable[[Path, Path], None]:
    def work(inputs: Path, place: Path) -> None:
        if inside:
            SAVING._closed = lambda target: target.exists()  # type: ignore[attr-defined]
        if not (place / "out").exists():
            nogemm.save(tf.AutoModel.from_pretrained(inputs / "old"), place / "out")
        nogemm.save(tf.AutoModel.from_pretrained(inputs / "new"), place / "out")

    return work


def _export(inputs: Path, place: Path) -> None:
    with contextlib.redirect_stdout(io.StringIO()):
        nogemm.export(tf.AutoModel.from_pretrained(inputs / "new").eval(), place / "out")


def _distil(inputs: Path, place: Path) -> None:
    command(
        "distil", inputs / "random", place / "out", "--teacher", inputs / "dense", "--data", inputs / "texts.jsonl",
        "--run", place / "run", "--resume", "--tokens", 1500, "--set", "batch_tokens=128",
        "--set", "checkpoint_seconds=0", "--json", place / "facts.json",
    )  # fmt: skip


def _train(inputs: Path, place: Path) -> None:
    words = ["--data", inputs / "texts.jsonl", "--run", place / "run", "--resume", "--json", place / "facts.json"]
    command("train", place / "out", *SMALL, *ALWAYS, *words)


def _finetune(inputs: Path, place: Path) -> None:
    words = ["--data", inputs / "rows.jsonl", "--run", place / "run", "--resume", "--json", place / "facts.json"]
    command("finetune", inputs / "converted", place / "out", "--batch", 8, "--steps", 6, *ALWAYS, *words)


def _readable(inputs: Path, place: Path) -> None:
    readable(place)


def _saved(place: Path) -> dict[str, Any]:
    return weights(place / "out")


def _names(place: Path) -> list[str]:
    return sorted(file.name for file in (place / "out").iterdir())


JOBS = {
    "distil": Job(_distil, _training("AutoModel"), losses),
    "train": Job(_train, _training("AutoModelForMaskedLM"), losses),
    "finetune": Job(_finetune, _training("AutoModelForSequenceClassification"), losses),
    "tune": Job(_tune, _readable, _tuned),
    "study": Job(_study_work, _readable, _study),
    "save": Job(_save(False), _old_or_new(False), _saved),
    "save-inside": Job(_save(True), _old_or_new(True), _saved),
    "export": Job(_export, _exported, _names),
    "bench": Job(_bench_work, _readable, _bench),
}


def apart(left: Any, right: Any, closeness: float, at: str = "") -> str:
    """Say where two outcomes differ; "" where they do not."""
    if isinstance(left, dict) and isinstance(right, dict) and left.keys() == right.keys():
        return next(filter(None, (apart(left[k], right[k], closeness, f"{at}.{k}") for k in left)), "")
    if isinstance(left, list) and isinstance(right, list) and len(left) == len(right):
        found = (apart(a, b, closeness, f"{at}[{i}]") for i, (a, b) in enumerate(zip(left, right, strict=True)))
        return next(filter(None, found), "")
    if isinstance(left, float) and isinstance(right, float):
        same = math.isclose(left, right, rel_tol=closeness, abs_tol=1e-6)
        return "" if same else f"{at}: {left!r} and {right!r}"
    return "" if left == right else f"{at}: {str(left)[:200]} and {str(right)[:200]}"
