"""One FFN of a model: how its dense weights are read, and how a layer takes their place.

Reading order: `Installed`, `WithDropout`, `One`, `Borrowed`, `Site`.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from numbers import Number
from typing import Any

import torch
from torch import Tensor, nn

from nogemm.activations import ACTIVATIONS
from nogemm.config import LayerConfig
from nogemm.convert._families import SiteAdapter
from nogemm.convert._reading import is_module, look_up, read_linear
from nogemm.errors import ConfigError
from nogemm.layers import FFN, DenseFFN
from nogemm.layers.dense.config import DenseConfig
from nogemm.shape import FFNShape

_REMEMBERED = "nogemm_adapter"


@dataclass(frozen=True)
class Installed:
    """What a converted site remembers, kept on the layer as `site`.

    Attributes:
        suffix: path of the layer below the site ("" if it took the site's place).
        vanished: dense weights that are gone, as paths below the site.
        holder: class of the module that held the FFN.
        adapter: how it was taken out, which a checkpoint stores for a class that is not listed.
    """

    suffix: str
    vanished: tuple[str, ...]
    holder: str = ""
    adapter: SiteAdapter | None = None

    def name(self, layer_path: str) -> str:
        """Return the site's name, given the path of its layer in the model."""
        return layer_path.removesuffix(self.suffix).removesuffix(".") if self.suffix else layer_path


class WithDropout(nn.Module):
    """Our layer followed by the dropout that the model had inside its FFN module."""

    def __init__(self, ffn: FFN | Borrowed, dropout: nn.Module) -> None:
        super().__init__()
        self.ffn = ffn
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        """Return dropout(ffn(x)), [..., d_in] -> [..., d_out]."""
        return self.dropout(self.ffn(x))


class One(nn.Module):
    """What is left of a gate whose model still multiplies by it."""

    def forward(self, x: Tensor) -> Tensor:
        """Return 1 in x's dtype, [..., d_in] -> []."""
        return torch.ones((), dtype=x.dtype, device=x.device)


class Borrowed(nn.Module):
    """A dense layer that shows nothing of its matrices: whoever reads them past it is noticed."""

    def __init__(self, dense: DenseFFN) -> None:
        super().__init__()
        self._dense = (dense,)
        self.site: Any = None

    def forward(self, x: Tensor) -> Tensor:
        """Return the dense layer's answer, [..., d_in] -> [..., d_out]."""
        return self._dense[0](x)


@dataclass(frozen=True, eq=False)
class Site:
    """One dense FFN of a model, not converted yet.

    Attributes:
        name: path of the module that holds it: the layer in the split and inline forms (BERT, OPT), else the MLP.
        shape: its widths, its activation as transformers spells it, and whether that multiplies a second branch; each
            is an attribute of the site too.
        places: (module, attribute) of every place where the holder stands; several if the model shares it.
        others: further holders of the same matrices.
    """

    name: str
    shape: FFNShape
    owner: nn.Module
    places: list[tuple[nn.Module, str]]
    adapter: SiteAdapter
    others: list[nn.Module] = field(default_factory=list)

    @property
    def d_in(self) -> int:
        """Width of its input."""
        return self.shape.d_in

    @property
    def d_out(self) -> int:
        """Width of its output."""
        return self.shape.d_out

    @property
    def hidden(self) -> int:
        """Its neurons."""
        return self.shape.neurons()

    @property
    def activation(self) -> str:
        """Name of its activation."""
        return self.shape.activation

    @property
    def gated(self) -> bool:
        """Whether the activation multiplies a second branch."""
        return self.shape.gated

    @property
    def up(self) -> nn.Module:
        """The module whose input is the site's input."""
        return self.owner.get_submodule(self.adapter.up)

    @property
    def down(self) -> nn.Module:
        """The module whose output is the site's output, before dropout and residual."""
        return self.owner.get_submodule(self.adapter.down)

    def weights(self) -> dict[str, Tensor]:
        """Return the dense weights as DenseFFN names them, all [out, in]; views, no copies.

        Raises:
            ConfigError: the activation is not one that DenseFFN computes.
        """
        if self.activation not in ACTIVATIONS:
            raise ConfigError(
                f"site {self.name!r} uses the activation {self.activation!r}, which nogemm cannot compute; known: "
                f"{', '.join(ACTIVATIONS)}"
            )
        up, up_bias = read_linear(self.up)
        gate, gate_bias = None, None
        if self.adapter.fused:
            gate, up = up.chunk(2)
            if up_bias is not None:
                gate_bias, up_bias = up_bias.chunk(2)
            if self.adapter.gate_last:
                gate, gate_bias, up, up_bias = up, up_bias, gate, gate_bias
        elif self.adapter.gate is not None:
            gate, gate_bias = read_linear(self.owner.get_submodule(self.adapter.gate))
        down, down_bias = read_linear(self.down)
        found = {"up.weight": up, "up.bias": up_bias, "down.weight": down, "down.bias": down_bias}
        found |= {"gate.weight": gate, "gate.bias": gate_bias}
        return {key: value for key, value in found.items() if value is not None}

    def dense(self) -> DenseFFN:
        """Copy the dense weights into our own dense layer.

        Raises:
            ConfigError: the activation is not one that DenseFFN computes.
        """
        w = self.weights()
        matrices = (w["up.weight"], w.get("up.bias"), w["down.weight"], w.get("down.bias"))
        gate = w.get("gate.weight"), w.get("gate.bias")
        dense = DenseFFN.from_weights(*matrices, *gate, self.activation, self.shape.sparsity)
        return dense.to(matrices[0].device).train(self.owner.training)

    def borrow(self) -> Borrowed:
        """Return our dense layer around the model's own weights, without a copy: to compare with, not to keep."""
        w = self.weights()
        with torch.device("meta"):
            dense = DenseConfig().make(self.shape)
        like = w["up.weight"]
        zeros = {key: like.new_zeros(value.shape) for key, value in dense.state_dict().items() if key not in w}
        dense.load_state_dict({**w, **zeros}, assign=True)
        return Borrowed(dense.requires_grad_(False).eval())

    def placement(self) -> tuple[torch.device, torch.dtype]:
        """Return device and dtype of the dense weights, which our layer takes over."""
        weight, _ = read_linear(self.up)
        return weight.device, weight.dtype

    def empty_layer(self, config: LayerConfig) -> FFN:
        """Build the layer that `config` puts here, on the site's device and in its dtype, not fitted."""
        device, dtype = self.placement()
        known = self.activation in ACTIVATIONS
        with torch.device(device):
            layer = config.make(self.shape if known else replace(self.shape, activation="gelu"))
        layer.train(self.owner.training)
        for parameter in layer.parameters():
            parameter.data = parameter.data.to(dtype)
        return layer

    def install(self, ffn: FFN | Borrowed) -> None:
        """Put `ffn` in the place of the dense weights."""
        adapter = self.adapter
        suffix = adapter.put
        if adapter.put:
            for owner in (self.owner, *self.others):
                owner.set_submodule(adapter.put, ffn)
                for path in (*adapter.matrices, adapter.activation, *adapter.between):
                    if not (path + ".").startswith(adapter.put + "."):
                        _neutralise(owner, path, One() if path == adapter.gate else nn.Identity())
        else:
            if not self.places:
                raise ConfigError("the model itself is the FFN: convert the module that holds it")
            new: nn.Module = ffn
            if adapter.dropout is not None:
                new, suffix = WithDropout(ffn, self.owner.get_submodule(adapter.dropout)), "ffn"
            for parent, attribute in self.places:
                setattr(parent, attribute, new)
        vanished = tuple(f"{path}.weight" for path in adapter.matrices)
        ffn.site = Installed(suffix, vanished, type(self.owner).__name__, adapter)


def remember(owner: nn.Module, adapter: SiteAdapter) -> None:
    """Note on a module that holds an FFN how it is taken out; copies and pickles of the module keep the note."""
    object.__setattr__(owner, _REMEMBERED, adapter)


def remembered(owner: nn.Module) -> SiteAdapter | None:
    """Return what `remember` noted."""
    adapter = owner.__dict__.get(_REMEMBERED)
    return adapter if isinstance(adapter, SiteAdapter) else None


def _neutralise(owner: nn.Module, path: str, nothing: nn.Module) -> None:
    """Let what stands at `path` do nothing: a module or function becomes Identity, a probability 0."""
    head, _, attribute = path.rpartition(".")
    if is_module(owner, path):
        owner.set_submodule(path, nothing)
        return
    value = look_up(owner, path)
    if callable(value):
        setattr(owner.get_submodule(head), attribute, nothing)
    elif isinstance(value, Number):
        setattr(owner.get_submodule(head), attribute, 0.0)
