"""The models of the recorded study: the rows that `studies/minilm.yaml` trains, and those that are not trained."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from nogemm.bench.contenders.model import Encoder
from nogemm.bench.peers import Runner
from nogemm.bench.peers.openvino_engine import OpenVinoEngine
from nogemm.models.loading import load_encoder, load_tokenizer
from nogemm.study.plan import read_study
from nogemm.train.sources import texts

TEACHER = "all-MiniLM-L6-v2"
CORPUS = "data/debian-packages.jsonl.gz"
STUDY = Path(__file__).parent / "studies" / "minilm.yaml"
QUARTER_WIDTH = 384  # a quarter of the neurons: the model that is to be fast in OpenVINO int8
QUARTER_MODEL = f"runs/study-models/dense{QUARTER_WIDTH}-0"  # where `study.py --save runs/study-models` copies it
CALIBRATION_TEXTS = 128
INPUTS = ("input_ids", "attention_mask")


@dataclass(frozen=True, eq=False)
class Row:
    """One model of the table.

    Attributes:
        name, title: of its file, and for readers.
        of, seed: the row of the study file that trains it, and its seed.
        make: makes a row that is not trained; None: the study trains it.
        source: what an untrained row's engine runs: the teacher, or where a trained row is saved.
    """

    name: str
    title: str
    of: str = ""
    seed: int = 0
    make: Callable[[], nn.Module] | None = None
    source: str = TEACHER

    @property
    def trained(self) -> bool:
        """Whether the study trains it."""
        return self.make is None


def all_rows() -> list[Row]:
    """List the table: the rows that the study file trains, seed by seed, then those that are not trained."""
    rows = []
    for row in read_study(STUDY).rows:
        for seed in row.seeds:
            # Recorded names bear a seed where there is a choice of them, and of dense rows always.
            plain = len(row.seeds) == 1 and not row.name.startswith("dense")
            title = f"{row.title}, seed {seed}" if len(row.seeds) > 1 else row.title
            rows.append(Row(row.name if plain else f"{row.name}-{seed}", title, of=row.name, seed=seed))
    return [
        *rows,
        Row("dense-int8", "dense, torch int8, no training", make=dynamic_int8),
        Row("dense-int8-openvino", "dense, OpenVINO int8, no training", make=calibrated_int8),
        Row(
            f"dense{QUARTER_WIDTH}-int8-openvino",
            f"dense, {QUARTER_WIDTH} best neurons, then OpenVINO int8",
            make=partial(calibrated_int8, QUARTER_MODEL),
            source=QUARTER_MODEL,
        ),
    ]


def dynamic_int8() -> nn.Module:
    """Rival (d): the dense model with every linear layer in dynamic int8, untrained."""
    return torch.ao.quantization.quantize_dynamic(load_encoder(TEACHER), {nn.Linear}, dtype=torch.qint8)


def calibrated_int8(source: str = TEACHER) -> nn.Module:
    """Rival (d), the other engine: OpenVINO int8, calibrated on training texts."""
    samples = [
        tuple(tokenizer()([text], return_tensors="pt", truncation=True, max_length=128)[name] for name in INPUTS)
        for text in islice(texts(CORPUS), CALIBRATION_TEXTS)
    ]
    model = Encoder(load_encoder(source)).eval().requires_grad_(False)
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


def tokenizer() -> Any:
    """Load the teacher's tokenizer."""
    return load_tokenizer(TEACHER)
