"""The worker's side of `nogemm bench model`: whole encoders, dense, converted, or without FFNs.

Legend: B texts, L tokens per text, D width.
"""

from __future__ import annotations

import copy
import json
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nogemm.bench import peers
from nogemm.bench.models import is_published_shape, sample_texts, spread_layers, timed_encoder, timed_tokenizer
from nogemm.bench.peers.eager import EagerRunner
from nogemm.bench.peers.inductor import compile_frozen
from nogemm.bench.peers.openvino_engine import compiled
from nogemm.config import parse_layer
from nogemm.convert.convert import convert
from nogemm.convert.pack import pack
from nogemm.export import export, openvino_host
from nogemm.export.extension import LIBRARY
from nogemm.export.folder import MODEL
from nogemm.hardware.memory import peak_memory_bytes
from nogemm.layers import NoConfig
from nogemm.models.loading import load_encoder
from nogemm.models.pooling import MEAN, Pooling, pooled, pooling_of

# Least cosine between a text's pooled embedding and the reference's. fp32 of a converted model: a bit near zero may
# fall on either side, and reads another row for that token.
DENSE_COSINES = {"fp32": 0.99999, "bf16": 0.995, "int8": 0.90}
OUR_COSINES = {"fp32": 0.999, "bf16": 0.95, "int8": 0.95}
_TEXTS = 2_000
_CALIBRATION = 16


class Encoder(nn.Module):
    """A transformers encoder as engines take it: positional tensors in, the last hidden state [B, L, D] out."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, ...]:
        return (self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state,)


class ModelContender:
    """Draw batches of sample text cut to one length; what all contenders share."""

    def __init__(self, settings: dict[str, Any]) -> None:
        warnings.simplefilter("ignore")
        self.settings = settings
        self.ids = _token_stream(settings)
        self.pooling = MEAN if is_published_shape(settings["dense"]) else pooling_of(settings["dense"])
        # A text starts with this token wherever the stream is cut, for a model whose embedding is that token's.
        self.first = timed_tokenizer(settings["dense"]).cls_token_id if "cls" in self.pooling.modes else None
        self.next = 0
        self.runner: peers.Runner | None = None
        self.teacher: Encoder | None = None

    def _inputs(self, batch: int, length: int) -> tuple[Tensor, Tensor]:
        count = batch * length
        if count > len(self.ids):  # few texts of one's own: they come again
            self.ids = self.ids.repeat(-(-count // len(self.ids)))
        if self.next + count > len(self.ids):
            self.next = 0
        ids = self.ids[self.next : self.next + count].reshape(batch, length)
        self.next += count
        if self.first is not None:
            ids = ids.clone()
            ids[:, 0] = self.first
        return ids, torch.ones_like(ids)

    def _open(self, case: dict[str, Any]) -> None:
        self.case = (case["batch"], case["length"])

    def _verify(self, reference: Encoder, least: float) -> dict[str, Any]:
        """Compare pooled embeddings of one batch with the fp32 eager model's."""
        assert self.runner is not None
        inputs = self._inputs(*self.case)
        (hidden,) = self.runner.result(self.runner.run(self.runner.prepare(inputs)))
        with torch.inference_mode():
            (expected,) = reference(*inputs)
        facts = compare_hidden(hidden, expected, least, self.pooling)
        facts |= {"layers": 1, "memory_bytes": peak_memory_bytes()}
        if facts["verified"] and self.settings.get("agreement_texts", 0):
            facts |= self._agreement(self.settings["agreement_texts"])
        return facts

    def _agreement(self, texts: int) -> dict[str, Any]:
        """Compare with the dense model in fp32 on the first texts of the stream, whatever was drawn before."""
        assert self.runner is not None
        if self.teacher is None:
            model = timed_encoder(self.settings["dense"], self.settings["seed"])
            self.teacher = Encoder(model).eval().requires_grad_(False)
        position, self.next = self.next, 0
        cosines = []
        while len(cosines) * self.case[0] < texts:
            inputs = self._inputs(*self.case)
            (hidden,) = self.runner.result(self.runner.run(self.runner.prepare(inputs)))
            with torch.inference_mode():
                (expected,) = self.teacher(*inputs)
            cosines.append(pooled_cosine(hidden, expected, self.pooling))
        self.next = position
        return {"agreement": float(torch.cat(cosines).mean()), "agreement_texts": len(cosines) * self.case[0]}

    def draw(self) -> Any:
        assert self.runner is not None
        return self.runner.prepare(self._inputs(*self.case))

    def run(self, inputs: Any) -> Any:
        assert self.runner is not None
        return self.runner.run(inputs)


class DenseModelContender(ModelContender):
    """The dense model in one of the engines, or what rivals it there.

    "removed": without its FFNs, which no FFN could beat; "layers": with some of its layers; "peer": another model.
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__(settings)
        self.engine = peers.engine(settings["engine"])
        peer = settings.get("peer")
        model = load_encoder(peer) if peer else timed_encoder(settings["dense"], settings["seed"])
        if settings.get("removed"):
            convert(model, NoConfig())
        if settings.get("layers"):
            spread_layers(model, settings["layers"])
        self.reference = Encoder(model).eval().requires_grad_(False)
        if not (peer or settings.get("removed") or settings.get("layers")):
            self.teacher = self.reference
        self.compiled = False

    def prepare(self, case: dict[str, Any]) -> dict[str, Any]:
        self._open(case)
        if not self.compiled or self.engine.static:
            self.runner = None
            samples = [self._inputs(8, 64) for _ in range(_CALIBRATION)]
            self.runner = self.engine.compile(copy.deepcopy(self.reference), self._inputs(*self.case), samples)
            self.compiled = True
        return self._verify(self.reference, DENSE_COSINES[self.engine.precision])


class OurModelContender(ModelContender):
    """The converted model, packed, in torch; `compiled` lets inductor fuse what lies around the packed layers."""

    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__(settings)
        model = our_model(settings)
        self.reference = Encoder(model).eval().requires_grad_(False)
        self.packed = Encoder(pack(copy.deepcopy(model), settings["dtype"], body=settings.get("body")))

    def prepare(self, case: dict[str, Any]) -> dict[str, Any]:
        self._open(case)
        if self.settings["compiled"]:
            self.runner = compile_frozen(self.packed, self._inputs(*self.case))
        else:
            self.runner = EagerRunner(self.packed)
        return self._verify(self.reference, OUR_COSINES[self.settings["dtype"]])


class WithMore(peers.Runner):
    """A runner that is given some inputs more, always the same."""

    def __init__(self, runner: peers.Runner, more: tuple[Tensor, ...]) -> None:
        self.runner, self.more = runner, more

    def prepare(self, inputs: tuple[Tensor, ...]) -> Any:
        return self.runner.prepare((*inputs, *self.more))

    def any_shape(self) -> peers.Runner:
        """Return a runner whose inputs more are zeros, as many as there are tokens."""
        return _WithZeros(self.runner.any_shape(), self.more)

    def run(self, prepared: Any) -> Any:
        return self.runner.run(prepared)

    def result(self, outputs: Any) -> tuple[Tensor, ...]:
        return self.runner.result(outputs)


class _WithZeros(WithMore):
    """The same with zeros of the inputs' own shape."""

    def prepare(self, inputs: tuple[Tensor, ...]) -> Any:
        return self.runner.prepare((*inputs, *(torch.zeros_like(inputs[0]) for _ in self.more)))


class ExportedModelContender(ModelContender):
    """The converted model as `nogemm export` writes it, read back and run by OpenVINO in the precision "rest"."""

    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__(settings)
        model = our_model(settings)
        self.reference = Encoder(model).eval().requires_grad_(False)
        self.rest = settings["rest"]
        self.folder = tempfile.TemporaryDirectory(prefix="nogemm-export-")
        export(
            model,
            Path(self.folder.name) / "model",
            dtype=settings["dtype"],
            int8=self.rest == "int8",
            tokenizer=timed_tokenizer(settings["dense"]),
            calibration=_texts(settings),
        )

    def prepare(self, case: dict[str, Any]) -> dict[str, Any]:
        self._open(case)
        folder = Path(self.folder.name) / "model"
        graph = openvino_host.load(folder / MODEL, folder / LIBRARY)
        inputs = self._inputs(*self.case)
        types = tuple(torch.zeros_like(inputs[0]) for _ in graph.inputs[len(inputs) :])  # single texts: all of type 0
        self.runner = WithMore(compiled(graph, self.rest, (*inputs, *types)), types)
        rest = "fp32" if self.rest == "f32" else self.rest
        return self._verify(self.reference, min(OUR_COSINES[self.settings["dtype"]], DENSE_COSINES[rest]))


def our_model(settings: dict[str, Any]) -> nn.Module:
    """Load the converted model, or convert the dense one with random weights, which run as fast."""
    if settings["model"] is not None:
        return load_encoder(settings["model"])
    torch.manual_seed(settings["seed"])
    model = timed_encoder(settings["dense"], settings["seed"])
    convert(model, parse_layer(settings["method"], settings["set"]), faster_at=None)
    return model.eval()


def pooled_cosine(hidden_BLD: Tensor, expected_BLD: Tensor, pooling: Pooling = MEAN) -> Tensor:
    """Return the cosine of each text's embeddings, texts without padding, float64 [B]."""
    mask = torch.ones(hidden_BLD.shape[:2], dtype=torch.long)
    return (pooled(hidden_BLD.double(), mask, pooling) * pooled(expected_BLD.double(), mask, pooling)).sum(-1)


def compare_hidden(hidden_BLD: Tensor, expected_BLD: Tensor, least: float, pooling: Pooling = MEAN) -> dict[str, Any]:
    """Compare embeddings by cosine.

    Returns:
        {"verified", "max_error": 1 - the least cosine, "cosine": their mean}; "error" if the least is below `least`.
    """
    if hidden_BLD.shape != expected_BLD.shape:
        reason = f"output has shape {tuple(hidden_BLD.shape)}, the reference {tuple(expected_BLD.shape)}"
        return {"verified": False, "error": f"does not match the reference: {reason}"}
    cosine = pooled_cosine(hidden_BLD, expected_BLD, pooling)
    lowest = float(cosine.min())
    facts: dict[str, Any] = {"verified": lowest >= least}  # false for NaN too
    if not facts["verified"]:
        facts["error"] = f"does not match the reference: least cosine of an embedding {lowest:.5f}, needed {least}"
    if torch.isfinite(cosine).all():
        facts |= {"max_error": 1 - lowest, "cosine": float(cosine.mean())}
    return facts


def _texts(settings: dict[str, Any]) -> list[str]:
    """Return the texts that are timed: those of the file "texts", a JSON list, or the sample's."""
    own = settings.get("texts")
    return sample_texts(_TEXTS) if own is None else json.loads(Path(own).read_text(encoding="utf-8"))


def _token_stream(settings: dict[str, Any]) -> Tensor:
    """Return the token ids of the timed texts, one after the other."""
    tokenizer = timed_tokenizer(settings["dense"])
    encoded = tokenizer(_texts(settings), add_special_tokens=True, truncation=False, verbose=False)
    return torch.tensor([token for ids in encoded["input_ids"] for token in ids])
