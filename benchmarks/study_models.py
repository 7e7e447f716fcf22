"""The models of the study: how each is made from the teacher, and what of its training may be chosen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

import nogemm
from nogemm.bench.contenders.model import Encoder
from nogemm.bench.peers import Runner
from nogemm.bench.peers.openvino_engine import OpenVinoEngine
from nogemm.models.loading import load_encoder, load_tokenizer
from nogemm.train.sources import texts

TEACHER = "all-MiniLM-L6-v2"
CORPUS = "data/debian-packages.jsonl.gz"
# What short runs choose, on all learning rates: up and down from 1 for as long as a step agrees better. They cannot
# choose more: half of the budget for the first stage instead of 0.3 agreed better after 300,000 tokens and worse after
# four million, on the validation split (benchmarks/results/intel-6-207/study/design-half-first-stage.json).
FACTORS = (0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
FITTING_TEXTS = 1_000
LOOKUP = nogemm.LookupConfig(tables=56, bits=9, neighbours=4, projection=nogemm.BHConfig(rounds=2, block=64))
EQUAL_FLOP_WIDTH = 213  # 203 would be equal to ours: the rival gets 5 % more
QUARTER_WIDTH = 384  # a quarter of the neurons: the model that is to be fast in OpenVINO int8
QUARTER_MODEL = f"runs/study-models/dense{QUARTER_WIDTH}-0"  # where `study.py --save runs/study-models` writes it
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
    source: str = TEACHER  # what an untrained row's engine runs: the teacher, or where a trained row is saved
    tuned_as: str = ""
    options: dict[str, Any] = field(default_factory=dict)


def all_rows() -> list[Row]:
    """List the study: two seeds of ours and of the nearest rival, the other rivals once."""
    return [
        *(Row(f"lookup-{s}", f"LookupFFN, seed {s}", lookup, seed=s, tuned_as="lookup") for s in (0, 1)),
        *(
            Row(
                f"dense{EQUAL_FLOP_WIDTH}-{s}",
                f"dense, {EQUAL_FLOP_WIDTH} best neurons, seed {s}",
                partial(narrow, EQUAL_FLOP_WIDTH),
                seed=s,
                tuned_as="dense",
            )
            for s in (0, 1)
        ),
        Row(
            f"dense{QUARTER_WIDTH}-0",
            f"dense, {QUARTER_WIDTH} best neurons",
            partial(narrow, QUARTER_WIDTH),
            tuned_as="dense",
        ),
        # A constant is fitted already, so the whole budget goes to the second stage.
        Row("no-ffn", "no FFN", removed, tuned_as="no-ffn", options={"stage1_share": 0.0}),
        Row(
            "three-layers",
            "three of six layers",
            three_layers,
            tuned_as="three",
            options={"hidden_map": tuple(k + 1 for k in KEPT_LAYERS)},
        ),
        Row("dense-int8", "dense, torch int8, no training", dynamic_int8, trained=False),
        Row("dense-int8-openvino", "dense, OpenVINO int8, no training", calibrated_int8, trained=False),
        Row(
            f"dense{QUARTER_WIDTH}-int8-openvino",
            f"dense, {QUARTER_WIDTH} best neurons, then OpenVINO int8",
            partial(calibrated_int8, QUARTER_MODEL),
            trained=False,
            source=QUARTER_MODEL,
        ),
    ]


def lookup() -> nn.Module:
    """Ours: every FFN a LookupFFN."""
    model = load_encoder(TEACHER)
    nogemm.convert(model, LOOKUP)
    return model


def narrow(width: int) -> nn.Module:
    """Rival (b): the best neurons of every FFN, the second matrix refitted by least squares."""
    model = load_encoder(TEACHER)
    nogemm.convert(model, nogemm.DenseConfig(hidden=width), data=fitting_texts(), tokenizer=tokenizer())
    return model


def removed() -> nn.Module:
    """Rival (a): every FFN replaced by the mean of its outputs."""
    model = load_encoder(TEACHER)
    nogemm.convert(model, nogemm.NoConfig(), data=fitting_texts(), tokenizer=tokenizer())
    return model


def three_layers() -> nn.Module:
    """Rival (c): three of the six layers, FFNs and all."""
    model = load_encoder(TEACHER)
    nogemm.keep_layers(model, KEPT_LAYERS)
    return model


def dynamic_int8() -> nn.Module:
    """Rival (d): the dense model with every linear layer in dynamic int8, untrained."""
    return torch.ao.quantization.quantize_dynamic(load_encoder(TEACHER), {nn.Linear}, dtype=torch.qint8)


def calibrated_int8(source: str = TEACHER) -> nn.Module:
    """Rival (d), the other engine: OpenVINO int8, calibrated on training texts."""
    samples = [
        tuple(tokenizer()([text], return_tensors="pt", truncation=True, max_length=128)[name] for name in INPUTS)
        for text in fitting_texts()[:CALIBRATION_TEXTS]
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


def fitting_texts() -> list[str]:
    """Return the training texts that closed-form starts are fitted on."""
    source = texts(CORPUS)
    return [next(source) for _ in range(FITTING_TEXTS)]


def tokenizer() -> Any:
    """Load the teacher's tokenizer."""
    return load_tokenizer(TEACHER)
