"""A worker's model for texts: embeddings of an encoder, scores of a reranker, in torch or from an export in OpenVINO.

Legend: S texts, L tokens of the longest, D width of the answer: of an embedding, or 1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from nogemm.convert.head import find_head
from nogemm.convert.pack import pack
from nogemm.convert.sites import installed
from nogemm.errors import ConfigError
from nogemm.export import openvino_host as host
from nogemm.models.loading import load_encoder, load_model, load_tokenizer
from nogemm.models.pooling import Pooling, pooled, pooling_of
from nogemm.models.texts import accepted, last_hidden, longest_text, padded, prepare_tokenizer
from nogemm.serve.kind import Kind

Inputs = dict[str, Tensor]
_SIGMOID, _IDENTITY = "Sigmoid", "Identity"


class TextEngine:
    """Answer tokenised texts with a row of numbers each.

    An encoder's row is its embedding, pooled as the model's directory says and of length one. A reranker's is one
    score: its logit behind the activation that sentence-transformers' settings in config.json name, else a sigmoid.

    Args:
        kind: what is loaded.
        dtype: rows of converted FFNs, where torch runs them.
        body: of `nogemm.pack`, where torch runs the model.
        threads: of the engine.
        max_length: None: what tokenizer, model and pooling allow.
        share: whether workers beside this one pack the same model: then all map one copy from a file.
    Raises:
        ConfigError: a reranker with more than one logit, an activation that is none of the two, a pooling that cannot
            be followed.

    Attributes:
        max_length: tokens that a text may have.
        width: D.
    """

    def __init__(
        self, kind: Kind, dtype: str, body: str | None, threads: int, max_length: int | None, share: bool = False
    ) -> None:
        torch.set_num_threads(threads)
        self.tokenizer = load_tokenizer(kind.folder)
        self.scores = kind.task == "rerank"
        self.pooling = Pooling() if self.scores else pooling_of(kind.folder)
        limits = [limit for limit in (max_length, self.pooling.max_length) if limit]
        if kind.engine == "openvino":
            config = _config(kind.folder)
            self._run = _exported(kind, threads)
            wanted = min([*limits, *_positions(kind, config)], default=_MOST)
            self.max_length = longest_text(wanted, self.tokenizer)
        else:
            model = load_model(kind.folder, "classify") if self.scores else load_encoder(kind.folder)
            prepare_tokenizer(self.tokenizer, model)
            config = model.config
            self._run = _torch(packed_for_serving(model, dtype, body, share), self.scores)
            self.max_length = longest_text(min(limits, default=_MOST), self.tokenizer, model)
        self._activation = _activation(config) if self.scores else None
        self.width = self.run([self.tokenizer("a", "a") if self.scores else self.tokenizer("a")]).shape[1]

    def run(self, rows: Sequence[Mapping[str, Any]]) -> NDArray[np.float32]:
        """Return the answers of tokenised texts, float32 [S, D]; numbers that are not finite are passed on."""
        with torch.inference_mode():
            inputs = padded(self.tokenizer, rows)
            found = self._run(inputs).float()
            if self._activation is None:
                return pooled(found, inputs["attention_mask"], self.pooling).numpy()
            if found.dim() != 2 or found.shape[1] != 1:
                raise ConfigError(
                    f"serve: a reranker has one logit for a pair of texts, this model has {found.shape[-1]}"
                )
            return self._activation(found).numpy()


_MOST = 8192  # tokens of a text where neither tokenizer nor model says


def packed_for_serving(model: nn.Module, dtype: str, body: str | None, share: bool) -> nn.Module:
    """Pack what can be packed; with `share` into nogemm's cache folder, which all workers map."""
    if body is not None or installed(model) or find_head(model) is not None:
        pack(model, dtype, body=body, cache=share or None)
    return model


def _torch(model: nn.Module, scores: bool) -> Callable[[Inputs], Tensor]:
    if scores:
        return lambda inputs: model(**accepted(model, inputs)).logits
    return lambda inputs: last_hidden(model, inputs)


def _exported(kind: Kind, threads: int) -> Callable[[Inputs], Tensor]:
    """Compile an export for batches one after the other. OpenVINO maps the weights' file: workers share its pages."""
    host.check_installed()
    folder = Path(kind.folder)
    graph = host.load(folder / kind.record["model"], folder / kind.record["extension"])
    settings = {"INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1, "PERFORMANCE_HINT": "LATENCY"}
    compiled: Any = host.shared_core().compile_model(graph, "CPU", settings)
    request, names = compiled.create_infer_request(), kind.record["inputs"]

    def run(inputs: Inputs) -> Tensor:
        inputs = {"token_type_ids": torch.zeros_like(inputs["input_ids"]), **inputs}
        given = [inputs[name].numpy() for name in names]
        return torch.from_numpy(request.infer(given, share_inputs=True, share_outputs=True)[0])

    return run


def _config(folder: str) -> Any:
    import transformers

    return transformers.AutoConfig.from_pretrained(folder, local_files_only=True)


def _positions(kind: Kind, config: Any) -> list[int]:
    """Return an export's positions, if it has them; an old record does not say, and some families skip the first."""
    if "positions" in kind.record:
        return [kind.record["positions"]] if kind.record["positions"] else []
    rows = getattr(config, "max_position_embeddings", None)
    return [rows - 1 - (config.pad_token_id or 0)] if isinstance(rows, int) and rows > 0 else []


def _activation(config: Any) -> Callable[[Tensor], Tensor]:
    known = getattr(config, "sentence_transformers", None) or {}
    named = known.get("activation_fn") or getattr(config, "sbert_ce_default_activation_function", None) or _SIGMOID
    short = str(named).rpartition(".")[2]
    if short not in (_SIGMOID, _IDENTITY):
        raise ConfigError(f"serve: the activation {named!r} of config.json is neither {_SIGMOID} nor {_IDENTITY}")
    return torch.sigmoid if short == _SIGMOID else lambda logits: logits
