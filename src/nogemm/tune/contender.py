"""The worker's side of a search: candidates in an engine, verified, timed, and scored on held-out texts as they run.

Legend: N texts, B texts of a batch, L tokens of each, D width, E width of an embedding, V vocabulary.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors.numpy import load_file, save
from torch import Tensor

from nogemm.bench.contenders.model import DenseModelContender, ExportedModelContender, ModelContender, OurModelContender
from nogemm.bench.models import timed_tokenizer
from nogemm.bench.quality.scores import cosines
from nogemm.files import write_atomically
from nogemm.hardware.memory import peak_memory_bytes
from nogemm.models.embed import MAX_LENGTH
from nogemm.models.pooling import pooled
from nogemm.models.texts import encode, padded

SCORES = ("validation", "test")
_BATCH = 16


class _Scored(ModelContender):
    """Score a verified contender, where the settings name "score": texts and the dense model's embeddings of them.

    Settings: "score": a JSON file {"validation": texts, "test": texts}; "teacher": safetensors of the same names,
    [N, E]; "cosines": the file to write, with the cosine of each text.
    """

    def prepare(self, case: dict[str, Any]) -> dict[str, Any]:
        facts = super().prepare(case)  # type: ignore[misc]
        if facts["verified"] and self.settings.get("score"):
            facts |= scored(self.settings, self._embeddings)
        return facts

    def _embeddings(self, texts: list[str]) -> NDArray[np.float32]:
        """Embed texts by the engine, texts of equal length together, so that nothing is padded."""
        assert self.runner is not None
        tokenizer = timed_tokenizer(self.settings["dense"])
        length = min(MAX_LENGTH, self.pooling.max_length or MAX_LENGTH)
        ids = encode(tokenizer, texts, length, self._model())["input_ids"]
        out: dict[int, Tensor] = {}
        runner = self.runner.any_shape()
        for part in parts_of_length([len(one) for one in ids], _BATCH):
            inputs = padded(tokenizer, [{"input_ids": ids[i]} for i in part])
            both = (inputs["input_ids"], inputs["attention_mask"])
            (hidden,) = runner.result(runner.run(runner.prepare(both)))
            rows = pooled(hidden.float(), both[1], self.pooling)
            out |= dict(zip(part, rows, strict=True))
        return torch.stack([out[i] for i in range(len(texts))]).numpy()

    def _model(self) -> Any:
        return self.reference.model  # type: ignore[attr-defined]


class DenseTuned(_Scored, DenseModelContender):
    """A model of ordinary layers in an engine; "peer" is its directory, absent for the dense model."""


class PackedTuned(_Scored, OurModelContender):
    """A candidate with layers of ours, packed, in torch."""


class ExportedTuned(_Scored, ExportedModelContender):
    """A candidate with layers of ours, exported to OpenVINO."""


class StaticTuned:
    """A static embedding: the mean of its tokens' rows, which `nogemm.tune.static` writes.

    Settings: "rows": safetensors of "rows" [V, E] and "bias" [E]; "tokenizer": its JSON; "texts" and those of a scored
    contender.
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        from tokenizers import Tokenizer

        self.settings = settings
        stored = load_file(settings["rows"])
        self.rows_VE, self.bias_E = torch.from_numpy(stored["rows"]), torch.from_numpy(stored["bias"])
        self.tokenizer = Tokenizer.from_file(settings["tokenizer"])
        texts = json.loads(Path(settings["texts"]).read_text(encoding="utf-8"))
        self.stream = torch.tensor([i for text in texts for i in self._ids(text)])
        self.next = 0
        self.case = (1, 1)

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids[:MAX_LENGTH] or [0]

    def prepare(self, case: dict[str, Any]) -> dict[str, Any]:
        self.case = (case["batch"], case["length"])
        ids_BL = self.draw()
        expected = self.rows_VE.double()[ids_BL].mean(1) + self.bias_E.double()
        error = float(1 - F.cosine_similarity(self.run(ids_BL).double(), expected).min())
        facts = {"verified": error < 1e-5, "max_error": error, "layers": 1, "memory_bytes": peak_memory_bytes()}
        if not facts["verified"]:
            return facts | {"error": f"does not match the reference: a cosine is {error:.1e} below 1"}
        return facts | (scored(self.settings, self._embeddings) if self.settings.get("score") else {})

    def draw(self) -> Tensor:
        batch, length = self.case
        places = (torch.arange(batch * length) + self.next) % len(self.stream)
        self.next += batch * length
        return self.stream[places].reshape(batch, length)

    def run(self, ids_BL: Tensor) -> Tensor:
        return F.embedding_bag(ids_BL, self.rows_VE, mode="mean") + self.bias_E

    def _embeddings(self, texts: list[str]) -> NDArray[np.float32]:
        rows = [self.run(torch.tensor([self._ids(text)])) for text in texts]
        return F.normalize(torch.cat(rows), dim=-1).numpy()


def scored(settings: dict[str, Any], embeddings: Any) -> dict[str, Any]:
    """Write the cosine of every held-out text; return the mean of those that choose, and nothing of the test."""
    texts = json.loads(Path(settings["score"]).read_text(encoding="utf-8"))
    theirs = load_file(settings["teacher"])
    found = {part: cosines(embeddings(texts[part]), theirs[part]) for part in SCORES}
    write_atomically(settings["cosines"], save(found))
    return {"validation": float(found["validation"].mean())}


def parts_of_length(lengths: list[int], most: int) -> list[list[int]]:
    """Return the places of texts of equal length, at most so many together."""
    places: dict[int, list[int]] = {}
    for place, length in enumerate(lengths):
        places.setdefault(length, []).append(place)
    return [same[i : i + most] for same in places.values() for i in range(0, len(same), most)]
