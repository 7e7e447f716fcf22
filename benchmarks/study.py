"""The recorded study: all-MiniLM-L6-v2 with its FFNs replaced, beside every rival at equal data and equal tuning.

    python benchmarks/study.py                     # every row that is not recorded yet, then the table
    python benchmarks/study.py --rows lookup-0     # one row
    python benchmarks/study.py --table             # only the table, from the rows recorded so far

A row is one model: choose its learning rates and the share of its first stage (short runs, validation split), train it
on the full budget, score it once on the test split and on WordNet's glosses. Every step leaves a file, so the command
may be stopped and called again at any time. Rows go to `benchmarks/results/study/`, the table to
`benchmarks/results/study-minilm.json`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file, save
from torch import nn

import nogemm
from nogemm.bench.embed import embed
from nogemm.bench.model_job import Encoder
from nogemm.bench.models import load_encoder, load_tokenizer
from nogemm.bench.peers import Runner
from nogemm.bench.peers.openvino_engine import OpenVinoEngine
from nogemm.bench.quality import bootstrap_difference, compare_search, cosines, reciprocal_ranks, search_ranks
from nogemm.files import write_atomically, write_json
from nogemm.hardware import machine, machine_line
from nogemm.train.sources import load_split, texts

COMMAND = "python benchmarks/study.py"
TEACHER = "all-MiniLM-L6-v2"
CORPUS = "data/debian-packages.jsonl.gz"
OTHER_DOMAIN = "data/wordnet-glosses.jsonl.gz"
TOKENS, SHORT_TOKENS = 4_000_000, 300_000
BATCH_TOKENS = 512  # twice the updates of the default, for every row: the budget is in tokens, not in time
LADDERS = {  # what short runs choose, knob after knob: up and down from the default for as long as a step agrees better
    "factor": (0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0),  # on all learning rates
    "stage1_share": (0.0, 0.1, 0.3, 0.5),
    "stage2_rate": (0.05, 0.1, 0.2, 0.4),
}
RATES = ("lr_projection", "lr_tables", "lr_other", "lr_backbone")
FITTING_TEXTS = 1_000
LOOKUP = nogemm.LookupConfig(tables=56, bits=9, neighbours=4, projection=nogemm.BHConfig(rounds=2, block=64))
EQUAL_FLOP_WIDTH = 213  # 203 would be equal to ours: the rival gets 5 % more
CALIBRATION_TEXTS = 128
INPUTS = ("input_ids", "attention_mask")
KEPT_LAYERS = (0, 2, 5)


@dataclass(frozen=True, eq=False)
class Row:
    """One model of the table: how it is made from the teacher, and what training it gets."""

    name: str
    title: str
    make: Callable[[], nn.Module]
    seed: int = 0
    trained: bool = True
    tuned_as: str = ""
    knobs: tuple[str, ...] = tuple(LADDERS)
    options: dict[str, Any] = field(default_factory=dict)


def main() -> None:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", help="comma-separated names; default: all")
    parser.add_argument("--table", action="store_true", help="only rebuild the table")
    parser.add_argument("--work", type=Path, default=Path("runs/study"), help="checkpoints and embeddings")
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--tokens", type=int, default=TOKENS, help="budget of a row; a smaller one is another study")
    args = parser.parse_args()
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("nogemm.train").setLevel(logging.INFO)
    rows = {row.name: row for row in all_rows()}
    wanted = args.rows.split(",") if args.rows else list(rows)
    unknown = [name for name in wanted if name not in rows]
    if unknown:
        parser.error(f"unknown row {unknown[0]!r}; the rows are: {', '.join(rows)}")
    for name in [] if args.table else wanted:
        record(rows[name], args)
    table(list(rows.values()), args)


def all_rows() -> list[Row]:
    """List the study: two seeds of ours and of the nearest rival, the other rivals once."""
    return [
        *(Row(f"lookup-{s}", f"LookupFFN, seed {s}", lookup, seed=s, tuned_as="lookup") for s in (0, 1)),
        *(
            Row(
                f"dense{EQUAL_FLOP_WIDTH}-{s}",
                f"dense, {EQUAL_FLOP_WIDTH} best neurons, seed {s}",
                narrow,
                seed=s,
                tuned_as="dense",
            )
            for s in (0, 1)
        ),
        Row("no-ffn", "no FFN", removed, tuned_as="no-ffn"),
        Row(
            "three-layers",
            "three of six layers",
            three_layers,
            tuned_as="three",
            knobs=("factor",),  # no new layer, so no first stage
            options={"hidden_map": tuple(k + 1 for k in KEPT_LAYERS)},
        ),
        Row("dense-int8", "dense, torch int8, no training", dynamic_int8, trained=False),
        Row("dense-int8-openvino", "dense, OpenVINO int8, no training", calibrated_int8, trained=False),
    ]


def lookup() -> nn.Module:
    """Ours: every FFN a LookupFFN."""
    model = load_encoder(TEACHER)
    nogemm.convert(model, LOOKUP)
    return model


def narrow() -> nn.Module:
    """Rival (b): the best neurons of every FFN at equal FLOP, the second matrix refitted by least squares."""
    model = load_encoder(TEACHER)
    nogemm.convert(model, nogemm.DenseConfig(hidden=EQUAL_FLOP_WIDTH), data=fitting_texts(), tokenizer=tokenizer())
    return model


def removed() -> nn.Module:
    """Rival (a): every FFN replaced by the mean of its outputs."""
    model = load_encoder(TEACHER)
    nogemm.convert(model, nogemm.NoConfig(), data=fitting_texts(), tokenizer=tokenizer())
    return model


def three_layers() -> nn.Module:
    """Rival (c): three of the six layers, FFNs and all."""
    model: Any = load_encoder(TEACHER)
    model.encoder.layer = nn.ModuleList(model.encoder.layer[k] for k in KEPT_LAYERS)
    model.config.num_hidden_layers = len(KEPT_LAYERS)
    return model


def dynamic_int8() -> nn.Module:
    """Rival (d): the dense model with every linear layer in dynamic int8, untrained."""
    return torch.ao.quantization.quantize_dynamic(load_encoder(TEACHER), {nn.Linear}, dtype=torch.qint8)


def calibrated_int8() -> nn.Module:
    """Rival (d), the other engine: OpenVINO int8, calibrated on training texts."""
    samples = [
        tuple(tokenizer()([text], return_tensors="pt", truncation=True, max_length=128)[name] for name in INPUTS)
        for text in fitting_texts()[:CALIBRATION_TEXTS]
    ]
    model = Encoder(load_encoder(TEACHER)).eval().requires_grad_(False)
    return EngineEncoder(OpenVinoEngine("int8", static=False).compile(model, samples[0], samples))


class EngineEncoder(nn.Module):
    """An engine's runner behind the interface that `embed` calls."""

    def __init__(self, runner: Runner) -> None:
        super().__init__()
        self.runner = runner

    def forward(self, **inputs: torch.Tensor) -> SimpleNamespace:
        """Return an output with `last_hidden_state` [S, L, D]."""
        prepared = self.runner.prepare(tuple(inputs[name] for name in INPUTS))
        return SimpleNamespace(last_hidden_state=self.runner.result(self.runner.run(prepared))[0])


def fitting_texts() -> list[str]:
    """Return the training texts that closed-form starts are fitted on."""
    source = texts(CORPUS)
    return [next(source) for _ in range(FITTING_TEXTS)]


def tokenizer() -> Any:
    """Load the teacher's tokenizer."""
    return load_tokenizer(TEACHER)


def record(row: Row, args: argparse.Namespace) -> None:
    """Do what is not done yet of one row."""
    target = args.results / "study" / f"{row.name}.json"
    if target.exists():
        say(f"{row.name}: recorded already in {target}")
        return
    facts: dict[str, Any] = {"name": row.name, "seed": row.seed}
    if row.trained:
        choice, trials = tuned(row, args)
        facts |= {"choice": choice, "trials": trials}
        model, report = train(row, choice, args.tokens, row.seed, args.work / row.name)
        facts |= {"tokens": report["tokens"], "seconds": report["seconds"], "options": report["options"]}
    else:
        model = row.make()
    scores = {}
    for split, (queries, documents) in test_sets().items():
        say(f"{row.name}: scoring on {split}")
        own = (target.parent if split == "test" else args.work / row.name) / f"{row.name}-{split}.safetensors"
        scores[split] = score(model, queries, documents, own, args.work / f"teacher-{split}.safetensors")
    test = scores["test"]
    facts |= {"scores": test["ours"], "kept": test["kept"], "teacher": test["teacher"]}
    facts |= {"other_domain": scores["wordnet"], "recorded": time.strftime("%Y-%m-%d"), "command": COMMAND}
    facts |= cost(model if row.trained else load_encoder(TEACHER))  # an engine's own copy has no parameters to count
    write_json(target, facts | {"machine": machine() | {"line": machine_line()}})


def tuned(row: Row, args: argparse.Namespace) -> tuple[dict[str, float], list[dict[str, float]]]:
    """Climb every ladder to the step whose short run agrees best on the validation split; return it and all trials."""
    options = nogemm.DistilOptions()
    best = {"factor": 1.0, "stage1_share": options.stage1_share, "stage2_rate": options.stage2_rate}
    trials: dict[str, dict[str, float]] = {}

    def agreement(choice: dict[str, float]) -> float:
        name = f"tune-{row.tuned_as}-" + "-".join(f"{value:g}" for value in choice.values())
        if name not in trials:
            trials[name] = trial(row, choice, args, args.work / name)
        return trials[name]["agreement"]

    for knob in row.knobs:
        if knob == "stage2_rate" and best["stage1_share"] == 0:
            continue  # the only stage runs at full rates
        ladder, at = LADDERS[knob], LADDERS[knob].index(best[knob])
        for direction in (-1, 1):
            while 0 <= at + direction < len(ladder):
                higher = best | {knob: ladder[at + direction]}
                if agreement(higher) <= agreement(best):
                    break
                best, at = higher, at + direction
    return best, list(trials.values())


def trial(row: Row, choice: dict[str, float], args: argparse.Namespace, folder: Path) -> dict[str, float]:
    """Return the agreement of a short run, from its file if it ran before."""
    done = folder / "agreement.json"
    if not done.exists():
        say(f"{row.name}: trying {choice}")
        _, report = train(row, choice, min(SHORT_TOKENS, args.tokens), 100, folder)
        write_json(done, choice | {"agreement": report["agreement"], "tokens": report["tokens"]})
    return read_json(done)


def train(row: Row, choice: dict[str, float], tokens: int, seed: int, folder: Path) -> tuple[nn.Module, dict[str, Any]]:
    """Make a row's model and distil it; goes on from its last checkpoint."""
    torch.manual_seed(seed)
    model = row.make()
    defaults = nogemm.DistilOptions()
    changes: dict[str, Any] = {name: choice["factor"] * getattr(defaults, name) for name in RATES}
    changes |= {name: value for name, value in choice.items() if name != "factor"} | row.options
    report = nogemm.distil(
        model,
        load_encoder(TEACHER),
        CORPUS,
        tokenizer=tokenizer(),
        validation=[*load_split(CORPUS, "validation").queries, *load_split(CORPUS, "validation").documents],
        output_dir=folder,
        resume=True,
        options=nogemm.DistilOptions(tokens=tokens, seed=seed, batch_tokens=BATCH_TOKENS, log_seconds=60.0, **changes),
    )
    return model.eval(), report.to_dict()


def test_sets() -> dict[str, tuple[list[str], list[str]]]:
    """Return queries and documents of the corpus's test split and of the other domain."""
    found = {}
    for name, path in (("test", CORPUS), ("wordnet", OTHER_DOMAIN)):
        split = load_split(path, "test")
        found[name] = (split.queries, split.documents)
    return found


def score(model: nn.Module, queries: list[str], documents: list[str], file: Path, teacher: Path) -> dict[str, Any]:
    """Score a model against the teacher; keep every text's own figures for paired comparisons between rows."""
    theirs = teacher_embeddings(queries, documents, teacher)
    ours = embed(model, tokenizer(), [*queries, *documents])
    count = len(queries)
    own = reciprocal_ranks(search_ranks(ours[:count], ours[count:]))
    figures_of_texts = {"agreement": cosines(ours, theirs), "mrr_at_10": own}
    write_atomically(file, save({name: values.astype(np.float32) for name, values in figures_of_texts.items()}))
    figures = compare_search(ours[:count], ours[count:], theirs[:count], theirs[count:])
    plain = {group: {name: f.to_dict() for name, f in values.items()} for group, values in figures.items()}
    return {group: plain[group] for group in ("ours", "teacher", "kept")}


def teacher_embeddings(queries: list[str], documents: list[str], file: Path) -> Any:
    """Embed with the teacher, once for all rows."""
    if not file.exists():
        write_atomically(file, save({"embeddings": embed(load_encoder(TEACHER), tokenizer(), [*queries, *documents])}))
    return load_file(file)["embeddings"]


def cost(model: nn.Module) -> dict[str, Any]:
    """Return parameters, and what the mean FFN of the six costs for one token."""
    layers = list(nogemm.converted(model).values())
    found: dict[str, Any] = {"parameters": sum(p.numel() for p in model.parameters())}
    if layers:
        found["flops"] = sum(layer.cost(1).flops for layer in layers) / len(layers)
        found["bytes_read"] = sum(layer.cost(1).bytes_read for layer in layers) / len(layers)
    return found


def table(rows: list[Row], args: argparse.Namespace) -> None:
    """Write the recorded rows as one file, with the paired differences of all pairs of models, and print them."""
    files = {row: args.results / "study" / f"{row.name}.json" for row in rows}
    found = [read_json(file) | {"title": row.title} for row, file in files.items() if file.exists()]
    if not found:
        say("no row is recorded yet")
        return
    folder = args.results / "study"
    texts_of = {entry["name"]: load_file(folder / f"{entry['name']}-test.safetensors") for entry in found}
    pairs = differences(texts_of)
    note = beyond(pairs, "agreement") + " " + beyond(pairs, "mrr_at_10")
    result = {"kind": "study", "command": COMMAND, "rows": found, "differences": pairs, "note": note}
    write_json(args.results / "study-minilm.json", result)
    for entry in found:
        agreement, kept = entry["scores"]["agreement"]["value"], entry["kept"]["mrr_at_10"]["value"]
        other = entry["other_domain"]["kept"]["mrr_at_10"]["value"]
        say(f"{entry['name']:14s} agreement {agreement:.4f}  MRR@10 kept {kept:.4f}  WordNet kept {other:.4f}")
    say(note)


def differences(texts_of: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Compare every two models on the same texts; seeds of one model count as their mean."""
    seeds: dict[str, list[str]] = {}
    for name in texts_of:
        model, _, seed = name.rpartition("-")
        seeds.setdefault(model if seed.isdigit() else name, []).append(name)
    mean = {
        model: {key: np.mean([texts_of[name][key] for name in names], axis=0) for key in texts_of[names[0]]}
        for model, names in seeds.items()
    }
    pairs = []
    for first, second in itertools.combinations(mean, 2):
        pair: dict[str, Any] = {"first": first, "second": second}
        for key in mean[first]:
            figure = bootstrap_difference(mean[first][key], mean[second][key]).to_dict()
            pair[key] = figure | {"exceeds_interval": not figure["low"] <= 0.0 <= figure["high"]}
        pairs.append(pair)
    return pairs


def beyond(pairs: list[dict[str, Any]], key: str) -> str:
    """Say in a sentence which differences are larger than their interval and which are not."""
    within = [f"{pair['first']} and {pair['second']}" for pair in pairs if not pair[key]["exceeds_interval"]]
    word = {"agreement": "agreement", "mrr_at_10": "MRR@10"}[key]
    if not within:
        return f"All differences of {word} exceed their 95 % interval."
    if len(within) == len(pairs):
        return f"No difference of {word} exceeds its 95 % interval."
    return f"Differences of {word} exceed their 95 % interval, but for {', '.join(within)}."


def read_json(file: Path) -> Any:
    """Read a file that `write_json` wrote."""
    return json.loads(file.read_text(encoding="utf-8"))


def say(line: str) -> None:
    """Print one line at once."""
    print(line, flush=True)


if __name__ == "__main__":
    np.seterr(all="raise", under="ignore")
    main()
