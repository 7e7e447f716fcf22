"""A converted model as a host takes it: token tensors in, one tensor out, a bare op in place of each packed FFN.

Legend: B texts, L tokens per text.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nogemm.convert.fitted import warn_if_random
from nogemm.convert.sites import installed
from nogemm.errors import ConfigError, PackedError
from nogemm.export.samples import random_batch
from nogemm.layers import (
    FFN,
    PACK_DTYPES,
    DenseFFN,
    HireFFN,
    LinearFFN,
    LookupFFN,
    NoFFN,
    PackedFFN,
    SumFFN,
    TokenTableFFN,
    TreeFFN,
)
from nogemm.layers.token_table.ids import running_ids
from nogemm.layers.token_table.packed import halves, packed_rows
from nogemm.models.inner import inner_model

# Layers that a host's operator runs, and the torch op that stands for it while the model is traced.
OPERATORS: dict[type[FFN], str] = {
    LookupFFN: "packed_lookup",
    TreeFFN: "packed_tree",
    HireFFN: "packed_hire",
}
# Layers that are plain torch and need no operator.
_PLAIN = (DenseFFN, LinearFFN, NoFFN, TokenTableFFN)
_OUTPUTS = ("logits", "last_hidden_state")


class Operator(nn.Module):
    """A packed layer without its checks, which a trace would record."""

    def __init__(self, op: str, packed: Tensor, d_out: int) -> None:
        super().__init__()
        self.register_buffer("packed", packed, persistent=True)
        self.op = getattr(torch.ops.nogemm, op)
        self.d_out = d_out

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x, self.packed, self.d_out)


class Added(nn.Module):
    """The terms of a sum, each as a host runs it."""

    def __init__(self, terms: Sequence[nn.Module]) -> None:
        super().__init__()
        self.terms = nn.ModuleList(terms)

    def forward(self, x: Tensor) -> Tensor:
        y = self.terms[0](x)
        for term in self.terms[1:]:
            y = y + term(x)
        return y


class Rows(nn.Module):
    """A token table as a host runs it: rows gathered by the graph's own input_ids, widened and scaled."""

    def __init__(self, layer: TokenTableFFN, dtype: str) -> None:
        super().__init__()
        rows, scale = packed_rows(layer, dtype)
        rows = halves(rows, layer.d_out) if rows.dtype == torch.uint8 else rows  # graphs hold no half bytes of ours
        self.register_buffer("rows", rows)
        self.register_buffer("scale", None if scale is None else scale.unsqueeze(1))

    def forward(self, x: Tensor) -> Tensor:
        ids = running_ids()
        assert ids is not None  # the model that is traced notes them
        y = F.embedding(ids, self.get_buffer("rows")).float()
        if (scale := self._buffers["scale"]) is not None:
            y = y * F.embedding(ids, scale)
        return y if y.dim() == x.dim() else y.flatten(0, -2)


class HostModel(nn.Module):
    """A model with positional inputs and one output tensor, its packed layers as bare ops.

    Attributes:
        input_names, output_name: what the host's tensors are called.
        vocabulary, types: token ids are below the first, their types below the second.
    """

    def __init__(self, model: nn.Module, input_names: tuple[str, ...], output_name: str) -> None:
        super().__init__()
        self.model = model
        self.input_names = input_names
        self.output_name = output_name
        config: Any = model.config
        self.vocabulary = int(config.vocab_size)
        self.types = int(getattr(config, "type_vocab_size", None) or 1)

    def forward(self, *inputs: Tensor) -> Tensor:
        return getattr(_call(self.model, self.input_names, inputs), self.output_name)


def check_exportable(model: nn.Module, dtype: str) -> list[str]:
    """Return the names of the sites that will run our operator, or say what cannot be exported.

    Raises:
        ConfigError: no converted FFN, a layer that no host runs, an unknown dtype.
        PackedError: packed already, or in training mode.
    """
    if dtype not in PACK_DTYPES:
        raise ConfigError(f"export: dtype must be one of {', '.join(PACK_DTYPES)}, got dtype={dtype!r}")
    layers = installed(model)
    if not layers:
        raise ConfigError("export: the model has no converted FFN; run nogemm.convert first")
    return check_layers(model, layers)


def check_layers(model: nn.Module, layers: Mapping[str, Any]) -> list[str]:
    """Return the names of those layers that will run our operator; raises as `check_exportable`."""
    if any(isinstance(layer, PackedFFN) for layer in layers.values()):
        raise PackedError("export: the model is packed; export the unpacked model, it is packed on the way")
    inner = inner_model(model)
    if inner.training or any(layer.training for layer in layers.values()):
        raise PackedError("export: the model is in training mode; call model.eval() first")
    known = ", ".join(kind.__name__ for kind in (*OPERATORS, *_PLAIN))
    for name, layer in layers.items():
        for part in _parts(layer):
            if not isinstance(part, (*OPERATORS, *_PLAIN)):
                raise ConfigError(f"export: {name} is a {type(part).__name__}; the host runs {known}, and sums of them")
    warn_if_random(model, "export")
    return [name for name, layer in layers.items() if any(isinstance(part, tuple(OPERATORS)) for part in _parts(layer))]


def _parts(layer: nn.Module) -> list[Any]:
    return list(layer.layers) if isinstance(layer, SumFFN) else [layer]


def host_model(model: nn.Module, dtype: str, input_names: tuple[str, ...]) -> HostModel:
    """Pack the layers of a model in place, one at a time, and wrap it.

    Raises:
        ConfigError: a layer without a native kernel, or a model that answers with no one tensor or takes no batches.
    """
    pack_layers(model, dtype)
    kind = type(model).__name__
    try:
        with torch.inference_mode():
            found = _call(model, input_names, random_batch(input_names, 2, 1))
    except ValueError as error:  # a decoder's classifier finds the last token of a text by the padding behind it
        if getattr(model.config, "pad_token_id", None) is None:
            raise ConfigError(
                f"export: {kind} takes batches only with a padding token ({error}); set model.config.pad_token_id, or "
                "give tokenizer=... that has one"
            ) from error
        raise
    names = [name for name in _OUTPUTS if isinstance(getattr(found, name, None), Tensor)]
    if not names:
        raise ConfigError(f"export: {kind} returns neither {' nor '.join(_OUTPUTS)}")
    return HostModel(model, input_names, names[0]).eval()


def pack_layers(model: nn.Module, dtype: str) -> None:
    """Put a bare operator in place of each converted layer; raises ConfigError for one without a native kernel."""
    paths = {id(module): path for path, module in model.named_modules()}
    for name, layer in installed(model).items():
        assert isinstance(layer, FFN)
        model.set_submodule(paths[id(layer)], _host_form(name, layer, dtype))
    model.requires_grad_(False)


def _host_form(name: str, layer: FFN, dtype: str) -> nn.Module:
    if isinstance(layer, SumFFN):
        return Added([_host_form(name, term, dtype) for term in layer.layers])
    if isinstance(layer, TokenTableFFN):
        return Rows(layer, dtype)
    if isinstance(layer, _PLAIN):
        return layer
    packed = layer.pack(dtype, path="rows")  # an operator knows no other
    if not packed.native:
        raise ConfigError(f"export: {name} has no native kernel: {layer}; a host runs native kernels alone")
    return Operator(OPERATORS[type(layer)], packed.get_buffer("packed"), layer.d_out)


def _call(model: nn.Module, names: Sequence[str], inputs: Sequence[Tensor]) -> Any:
    caches = "use_cache" in inspect.signature(model.forward).parameters
    more = {"use_cache": False} if caches else {}
    return model(**dict(zip(names, inputs, strict=True)), return_dict=True, **more)
