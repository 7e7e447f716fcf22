"""The demo's steps on all-MiniLM-L6-v2: embed with the teacher, convert, distil, save, reload, compress, score, time.

Everything heavy that must not share a process with something else runs in `child.py`. Reading order: `run_demo`.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from itertools import islice
from pathlib import Path
from typing import Any

import torch

import nogemm
from nogemm.bench.model import ModelBenchArgs, run_model_bench
from nogemm.bench.quality.scores import compare_search
from nogemm.convert.report import ConversionReport
from nogemm.convert.sites import converted
from nogemm.demo.plan import PEERS, SIZES, TEACHER_SECONDS, TOTAL_SECONDS, plan
from nogemm.demo.steps import Steps
from nogemm.errors import NogemmError
from nogemm.files import write_json
from nogemm.hardware import machine, machine_line
from nogemm.hardware.cpu import processor
from nogemm.hardware.load import look
from nogemm.models.directory import PACKAGED, model_directory
from nogemm.models.loading import load_encoder
from nogemm.running.progress import progress, training_lines
from nogemm.train import texts

# Two neighbours and three rounds fit the dense FFNs better than one and four, at fewer FLOP.
CONFIG = nogemm.LookupConfig(tables=64, bits=8, neighbours=2, projection=nogemm.BHConfig(rounds=3, block=64))
TRAINING: dict[str, Any] = {"tokens": 1_500_000, "seed": 0}  # and as many seconds as `plan` gives it
VALIDATION_TEXTS = 300  # a rough agreement while it trains; the test texts are scored in full afterwards
TITLE = "all-MiniLM-L6-v2 with every FFN replaced by a LookupFFN"


def run_demo(folder: Path, recorded: Path) -> dict[str, Any]:
    """Do every step that is not done yet, write `result.json` and return it."""
    quiet_loading()
    settings = {
        "nogemm": nogemm.__version__,
        "config": CONFIG.to_dict(),
        "training": TRAINING,
        "sizes": SIZES,
        "peers": PEERS,
        "seconds": TOTAL_SECONDS,
    }
    steps = Steps(folder / "steps", json.loads(json.dumps(settings)))
    model, small = folder / "model", folder / "model-int8"

    busy = what_else_runs()
    teacher = steps.run(
        "teacher",
        "embed the test texts with the dense teacher",
        lambda: child(teacher_path(), folder / "teacher", seconds=TEACHER_SECONDS),
    )
    pairs = teacher["pairs"]
    sites = steps.run("convert", "replace its FFNs", conversion)
    planned = steps.run("plan", "divide the time", lambda: plan(teacher, steps.spent()))
    notes = [*busy, *planned["notes"]]
    for note in planned["notes"]:
        print(f"     {note}", flush=True)
    training = steps.run(
        "distil",
        "distil the new FFNs on the packaged texts",
        lambda: training_run(folder, model, planned["training_seconds"]),
    )
    ours = steps.run(
        "reload",
        "reload in a fresh process, pack, embed the test texts",
        lambda: child(model, folder / "ours", pairs=pairs, pack="fp32"),
    )
    compressed = steps.run("compress", "store the tables as int8", lambda: compression(model, small))
    tiny = steps.run(
        "reload-int8", "the same with int8 tables", lambda: child(small, folder / "ours-int8", pairs=pairs, pack="int8")
    )
    scores = steps.run("score", "score the embeddings", lambda: scoring(folder))
    times = steps.run("time", "time beside the dense peers", lambda: timing(model, planned))
    result = {
        "kind": "demo",
        "title": TITLE,
        "machine": machine() | {"line": machine_line()},
        "config": CONFIG.to_dict(),
        "training": training,
        "texts": ours["texts"],
        "quality": quality_rows(scores, sites, compressed, (teacher, ours, tiny), model, small),
        "kept": scores["ours"]["kept"],
        "latency": times["rows"],
        "sites": sites["sites"],
        "recorded": recorded_rows(recorded),
        "seconds": steps.seconds,
        "plan": planned,
        "notes": notes,
    }
    write_json(folder / "result.json", result)
    return result


def what_else_runs() -> list[str]:
    """Say, and return, that other processes are in the way: every figure is then worse than the machine's."""
    found = look()
    if not found.busy:
        return []
    note = f"The machine was busy at the start: {found}. Expect less training, lower agreement, longer latencies."
    print(f"     {note}", flush=True)
    return [note]


def quiet_loading() -> None:
    """Switch off transformers' bars for loading weights: they would tear the lines of the steps apart."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()


def teacher_path() -> Path:
    """Return where the package keeps the dense model."""
    return Path(model_directory(PACKAGED))


def child(
    model: Path, out: Path, *, pairs: int = 0, seconds: float | None = None, pack: str | None = None
) -> dict[str, Any]:
    """Embed test texts in a fresh process, some `pairs`, or what fits into `seconds`.

    Where the model is ours, it is loaded by SentenceTransformer, too.
    """
    command = [sys.executable, "-m", "nogemm.demo.child", str(model), str(out)]
    command += ["--pack", pack, "--sentence-transformers"] if pack else []
    command += ["--pairs", str(pairs)] if pairs else []
    command += ["--seconds", str(seconds)] if seconds is not None else []
    run_watched(command, model.name)
    found = json.loads(out.with_suffix(".json").read_text())
    said = f"{found['texts']:,} texts in {found['embed_seconds']:.0f} s"
    agreement = found.get("sentence_transformers_agreement")
    if agreement is not None:
        if agreement < 0.999:
            raise NogemmError(f"SentenceTransformer gives other embeddings than transformers (cosine {agreement:.4f})")
        said += f", SentenceTransformer agrees (cosine {agreement:.5f})"
    return found | {"said": said}


def run_watched(command: list[str], name: str) -> None:
    """Run a process to its end, its lines as progress.

    Raises:
        NogemmError: it failed; the message ends in its last words.
    """
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
        assert process.stdout is not None
        try:
            for line in process.stdout:
                progress(f"{name}: {line.strip()}")
        finally:
            if sys.exception() is not None:
                process.kill()
            process.stdout.close()
            code = process.wait()
        if code != 0:
            errors.seek(0)
            lines = errors.read().strip().splitlines() or ["it said nothing"]
            raise NogemmError(f"the fresh process for {name} failed: {lines[-1]}")


def converted_model() -> tuple[Any, ConversionReport]:
    """Load the sentence encoder and convert it; the same numbers every time."""
    from sentence_transformers import SentenceTransformer

    torch.manual_seed(TRAINING["seed"])
    model = SentenceTransformer(str(teacher_path()), device="cpu")
    return model, nogemm.convert(model, CONFIG)


def conversion() -> dict[str, Any]:
    """Convert, and report what changed; training converts again, which takes a second."""
    model, report = converted_model()
    dense = sum(p.numel() for p in model.parameters()) - report.after.parameters + report.before.parameters
    said = f"{len(report.sites)} FFNs, {report.before.flops / report.after.flops:.1f}x fewer FLOP"
    counts = {"parameters_before": dense, "parameters_after": sum(p.numel() for p in model.parameters())}
    return report.to_dict() | counts | {"said": said}


def training_run(folder: Path, target: Path, seconds: float) -> dict[str, Any]:
    """Distil and save; an interrupted run continues from its last checkpoint."""
    model, _ = converted_model()
    with training_lines():
        report = nogemm.distil(
            model,
            load_encoder(teacher_path()),
            "sample",
            tokenizer=model.tokenizer,
            validation=list(islice(texts("sample", split="validation"), VALIDATION_TEXTS)),
            output_dir=folder / "distil",
            resume=True,
            max_seconds=seconds,
            log_seconds=20.0,
            checkpoint_seconds=60.0,
            **TRAINING,
        )
    nogemm.save(model, target)
    agreement = "" if report.agreement is None else f", agreement {report.agreement:.3f} on the validation texts"
    return report.to_dict() | {"said": f"{report.tokens:,} tokens{agreement}"}


def compression(model: Path, target: Path) -> dict[str, Any]:
    """Store the tables as int8 rows with a scale each; what the layers then read for one token."""
    from sentence_transformers import SentenceTransformer

    loaded = SentenceTransformer(str(model), device="cpu")
    nogemm.compress(loaded, tables="int8")
    nogemm.save(loaded, target)
    costs = [layer.cost(1) for layer in converted(loaded).values()]
    said = f"{weight_bytes(target) / 2**20:.0f} MiB instead of {weight_bytes(model) / 2**20:.0f}"
    return {"bytes_read": sum(cost.bytes_read for cost in costs) / len(costs), "said": said}


def scoring(folder: Path) -> dict[str, Any]:
    """Compare both of ours with the teacher on the same queries and documents."""
    from safetensors.numpy import load_file

    teacher = load_file(folder / "teacher")
    scores = {}
    for name in ("ours", "ours-int8"):
        mine = load_file(folder / name)
        groups = compare_search(mine["queries"], mine["documents"], teacher["queries"], teacher["documents"])
        scores[name] = {group: {key: f.to_dict() for key, f in figures.items()} for group, figures in groups.items()}
    agreement = scores["ours"]["ours"]["agreement"]["value"]
    kept = scores["ours"]["kept"]["mrr_at_10"]["value"]
    return scores | {"said": f"agreement {agreement:.3f}, {100 * kept:.1f} % of the teacher's MRR@10"}


def timing(model: Path, planned: dict[str, Any]) -> dict[str, Any]:
    """Time the saved model, packed, beside the dense peers that are installed, as far as the time allows."""
    args = ModelBenchArgs(
        model=str(model),
        dtype=planned["dtype"],
        shape=tuple((batch, length) for batch, length in planned["sizes"]),
        against=tuple(planned["peers"]),
        ceiling=(),
        compiled=False,
        agreement_texts=0,  # quality is measured apart, on whole texts
        seconds=0.05,
        seconds_in_all=planned["timing_seconds"],
    )
    rows = run_model_bench(args, note=progress)["rows"]
    own = [row for row in rows if row["contender"].startswith("nogemm")]
    broken = [row for row in own if "error" in row]
    if broken:
        raise NogemmError(f"{broken[0]['contender']} could not be timed: {broken[0]['error']}")
    timed = [row for row in own if row["us_median"] is not None]
    if not timed:
        return {"rows": rows, "said": "nothing could be timed in the time that was left"}
    largest = max((row["batch"], row["length"]) for row in timed)
    best = min(row["us_median"] for row in timed if (row["batch"], row["length"]) == largest)
    return {"rows": rows, "said": f"{best / 1000:.3g} ms at {largest}"}


def quality_rows(
    scores: dict[str, Any],
    sites: dict[str, Any],
    compressed: dict[str, Any],
    children: tuple[dict[str, Any], ...],
    model: Path,
    small: Path,
) -> list[dict[str, Any]]:
    """Return the teacher's row and our two: scores, cost of one FFN for one token, sizes, memory."""
    count = len(sites["sites"])
    before, after = sites["before"], sites["after"]
    dense = {"flops": before["flops"] / count, "bytes_read": before["bytes_read"] / count}
    dense |= {"parameters": sites["parameters_before"], "file_bytes": weight_bytes(teacher_path())}
    lookup = {"ours": True, "flops": after["flops"] / count, "parameters": sites["parameters_after"]}
    large = lookup | {"bytes_read": after["bytes_read"] / count, "file_bytes": weight_bytes(model)}
    little = lookup | {"bytes_read": compressed["bytes_read"], "file_bytes": weight_bytes(small)}
    memory = [{key: found[key] for key in ("peak_bytes", "model_peak_bytes")} for found in children]
    rows = [{"name": "dense teacher", "scores": scores["ours"]["teacher"]} | dense | memory[0]]
    for name, key, facts, peak in (
        ("LookupFFN", "ours", large, memory[1]),
        ("LookupFFN, int8 tables", "ours-int8", little, memory[2]),
    ):
        rows.append({"name": name, "scores": scores[key]["ours"], "kept": scores[key]["kept"]} | facts | peak)
    return rows


def recorded_searches(folder: Path) -> list[Path]:
    """Return the recorded results of `nogemm tune`, if any lie here; those of this processor first."""
    own = processor()
    files = [file for file in sorted(folder.glob("*/tune*.json")) if _kind(file) == "tune"]
    return sorted(files, key=lambda file: file.parent.name != own)


def _kind(file: Path) -> Any:
    data = json.loads(file.read_text(encoding="utf-8"))
    return data.get("kind") if isinstance(data, dict) else None


def recorded_rows(folder: Path) -> list[dict[str, Any]]:
    """Return the rows of the long study, if its results lie here, below the processor that they were recorded on."""
    rows = []
    for file in sorted(folder.glob("*/*.json")):
        data = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(data, dict) and data.get("kind") == "study":
            rows += data["rows"]
    return rows


def weight_bytes(folder: Path) -> int:
    """Return the size of a model's weight files."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))
