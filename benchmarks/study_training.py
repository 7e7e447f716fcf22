"""The training of the study's models: short runs climb to learning rates on the validation split, then one long run."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from study_models import CORPUS, FACTORS, TEACHER, Row, tokenizer
from torch import nn

import nogemm
from nogemm.files import write_json
from nogemm.models.loading import load_encoder
from nogemm.train.sources import load_split

SHORT_TOKENS = 300_000
BATCH_TOKENS = 512  # twice the updates of the default, for every row: the budget is in tokens, not in time
DESIGNS: dict[str, dict[str, Any]] = {  # what else was tried for ours, one change each
    "output's weight 40, not 10": {"output_weight": 40.0},
    "backbone's rate four times": {"lr_backbone": 4.0},  # of the chosen factor's
    "batches of 1,024 tokens": {"batch_tokens": 1024},
    "batches of 256 tokens": {"batch_tokens": 256},
    "four updates per teacher pass, not 2": {"updates_per_batch": 4},
    "tables solved for by conjugate gradients": {"solve_tokens": 60_000},
}
RATES = ("lr_projection", "lr_tables", "lr_other", "lr_backbone")


def tuned(row: Row, args: argparse.Namespace) -> tuple[float, list[dict[str, float]]]:
    """Climb to the factor whose short run agrees best on the validation split; return it and all trials."""
    trials: dict[float, dict[str, float]] = {}

    def agreement(factor: float) -> float:
        if factor not in trials:
            trials[factor] = trial(row, factor, args, args.work / f"tune-{row.tuned_as}-{factor:g}")
        return trials[factor]["agreement"]

    at = FACTORS.index(1.0)
    for direction in (-1, 1):
        while 0 <= at + direction < len(FACTORS) and agreement(FACTORS[at + direction]) > agreement(FACTORS[at]):
            at += direction
    return FACTORS[at], list(trials.values())


def trial(row: Row, factor: float, args: argparse.Namespace, folder: Path) -> dict[str, float]:
    """Return the agreement of a short run, from its file if it ran before."""
    done = folder / "agreement.json"
    if not done.exists():
        say(f"{row.name}: trying learning rates times {factor}")
        _, report = train(row, factor, min(SHORT_TOKENS, args.tokens), 100, folder)
        write_json(done, {"factor": factor, "agreement": report["agreement"], "tokens": report["tokens"]})
    return read_json(done)


def train(row: Row, factor: float, tokens: int, seed: int, folder: Path) -> tuple[nn.Module, dict[str, Any]]:
    """Make a row's model and distil it; goes on from its last checkpoint."""
    torch.manual_seed(seed)
    model = row.make()
    defaults = nogemm.DistilOptions()
    changes: dict[str, Any] = {name: factor * getattr(defaults, name) for name in RATES}
    changes |= {"batch_tokens": BATCH_TOKENS} | row.options
    report = nogemm.distil(
        model,
        load_encoder(TEACHER),
        CORPUS,
        tokenizer=tokenizer(),
        validation=[*load_split(CORPUS, "validation").queries, *load_split(CORPUS, "validation").documents],
        output_dir=folder,
        resume=True,
        options=nogemm.DistilOptions(tokens=tokens, seed=seed, log_seconds=60.0, **changes),
    )
    return model.eval(), report.to_dict()


def try_designs(row: Row, args: argparse.Namespace) -> dict[str, Any]:
    """Return the agreement of short runs that differ from the study's in one thing each."""
    factor, trials = tuned(row, args)
    found: list[dict[str, Any]] = [
        {"design": "as in the study", "options": {}} | next(t for t in trials if t["factor"] == factor)
    ]
    for name, changes in DESIGNS.items():
        options = dict(changes)
        if "lr_backbone" in options:
            options["lr_backbone"] *= factor * nogemm.DistilOptions().lr_backbone
        folder = args.work / f"design-{'-'.join(name.split()).replace(',', '')}"
        result = trial(replace(row, options=options), factor, args, folder)
        found.append({"design": name, "options": options, "agreement": result["agreement"], "tokens": result["tokens"]})
        say(f"{name:42s} agreement {result['agreement']:.4f}")
    return {"rate_factor": factor, "designs": found}


def read_json(file: Path) -> Any:
    """Read a file that `write_json` wrote."""
    return json.loads(file.read_text(encoding="utf-8"))


def say(line: str) -> None:
    """Print one line at once."""
    print(line, flush=True)
