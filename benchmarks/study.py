"""The recorded study: all-MiniLM-L6-v2 with its FFNs replaced, beside every rival at equal data and equal tuning.

    python benchmarks/study.py                     # every row that is not recorded yet, then the table
    python benchmarks/study.py --rows lookup-0     # one row
    python benchmarks/study.py --table             # only the table, from the rows recorded so far
    python benchmarks/study.py --rows lookup-0 --save runs/study-models  # the trained model as a directory of its own

`nogemm study benchmarks/studies/minilm.yaml` trains the rows: it searches their learning rates by short runs on the
validation split, and trains each on the full budget. This scores the models once on the test split and on WordNet's
glosses, and adds the rows that are not trained. Every step leaves a file, so the command may be stopped and called
again at any time. Rows go to `benchmarks/results/PROCESSOR/study/` (`nogemm env --processor`), the table to
`study-minilm.json` beside it. The models are in `study_models.py`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save
from study_models import CORPUS, STUDY, TEACHER, Row, all_rows, tokenizer
from torch import nn

import nogemm
from nogemm.bench.quality.scores import bootstrap_difference, compare_search, cosines, reciprocal_ranks, search_ranks
from nogemm.files import write_atomically, write_json
from nogemm.hardware.cpu import machine, machine_line, processor
from nogemm.models.embed import embed
from nogemm.models.loading import load_encoder
from nogemm.running.partial import sigterm_interrupts
from nogemm.running.progress import progress
from nogemm.train.sources import load_split

COMMAND = "python benchmarks/study.py"
OTHER_DOMAIN = "data/wordnet-glosses.jsonl.gz"


def main() -> None:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", help="comma-separated names; default: all")
    parser.add_argument("--table", action="store_true", help="only rebuild the table")
    parser.add_argument("--save", type=Path, help="only write the rows' trained models below this directory")
    parser.add_argument("--work", type=Path, default=Path("runs/study"), help="the study's runs, and embeddings")
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results") / processor())
    args = parser.parse_args()
    rows = {row.name: row for row in all_rows()}
    wanted = args.rows.split(",") if args.rows else list(rows)
    unknown = [name for name in wanted if name not in rows]
    if unknown:
        parser.error(f"unknown row {unknown[0]!r}; the rows are: {', '.join(rows)}")
    if args.save is not None:
        for name in wanted:
            save_trained(rows[name], args.save, args)
        return
    for name in [] if args.table else wanted:
        with sigterm_interrupts(), progress.watching():
            record(rows[name], rows, args)
    table(list(rows.values()), args)


def record(row: Row, rows: dict[str, Row], args: argparse.Namespace) -> None:
    """Do what is not done yet of one row."""
    target = args.results / "study" / f"{row.name}.json"
    if target.exists():
        say(f"{row.name}: recorded already in {target}")
        return
    facts: dict[str, Any] = {"name": row.name, "seed": row.seed}
    if row.trained:
        model, trained = train(row, args.work)
        facts |= trained
    else:
        source = Path(row.source)
        if source.name in rows and not source.exists():  # another row's model, which nobody has saved yet
            save_trained(rows[source.name], source.parent, args)
        model = row.make()
    scores = {}
    for split, (queries, documents) in test_sets().items():
        say(f"{row.name}: scoring on {split}")
        own = (target.parent if split == "test" else args.work) / f"{row.name}-{split}.safetensors"
        scores[split] = score(model, queries, documents, own, args.work / f"teacher-{split}.safetensors")
    test = scores["test"]
    facts |= {"scores": test["ours"], "kept": test["kept"], "teacher": test["teacher"]}
    facts |= {"other_domain": scores["wordnet"], "recorded": time.strftime("%Y-%m-%d"), "command": COMMAND}
    facts |= cost(model if row.trained else load_encoder(row.source))  # an engine's own copy has no parameters to count
    write_json(target, facts | {"machine": machine() | {"line": machine_line()}})


def train(row: Row, work: Path) -> tuple[nn.Module, dict[str, Any]]:
    """Let `nogemm study` search and train what is not trained yet; return the model, and what its training was."""
    report = nogemm.study(STUDY, work / "runs", only=[row.of], note=progress)
    folder, name = report.folder / row.of, f"seed-{row.seed}"
    found = read_json(folder / f"{name}.json")
    if found["status"] != "done":
        raise SystemExit(f"{row.name}: {found['error']}")
    trials = [read_json(path) for path in sorted(folder.glob("factor-*.json"))]
    told = [
        {"factor": t["factor"], "agreement": t["value"], "tokens": t["figures"]["tokens"]}
        for t in sorted(trials, key=lambda t: t["factor"])
        if t["status"] == "done"
    ]
    facts = {"rate_factor": found["factor"], "trials": told}
    facts |= {name: found["report"][name] for name in ("tokens", "seconds", "options")}
    return load_encoder(model_of(row, work)), facts


def model_of(row: Row, work: Path) -> Path:
    """Return the directory of a row's trained model."""
    return work / "runs" / "work" / row.of / f"seed-{row.seed}" / "model"


def save_trained(row: Row, folder: Path, args: argparse.Namespace) -> None:
    """Copy a row's trained model and its tokenizer into a folder of their own."""
    source, target = model_of(row, args.work), folder / row.name
    if not row.trained or not source.exists():
        say(f"{row.name}: no trained model to save")
        return
    shutil.copytree(source, target, dirs_exist_ok=True)
    say(f"{row.name}: saved in {target}")


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
