"""Where the families of transformers keep their FFNs: one table, open to users.

A site is one FFN of a model. Its adapter says which attributes hold the dense weights and where our layer goes, so that
dropout, residual and LayerNorm stay the model's own code, in training and in evaluation. Sites are found by the class
of the module that holds them.
Reading order: `SiteAdapter`, `Site`, `sites`, `installed`, `record_sites`, `register_site`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nogemm.convert._families import FAMILIES, SiteAdapter
from nogemm.convert._reading import activation_name, check_nothing_else_is_lost, is_linear, is_module, read_linear
from nogemm.errors import ConfigError
from nogemm.layers import FFN, DenseFFN, PackedFFN
from nogemm.layers.dense import ACTIVATIONS


@dataclass(frozen=True)
class Installed:
    """What a converted site remembers, kept on the layer as `site`.

    Attributes:
        suffix: path of the layer below the site ("" if it took the site's place).
        vanished: dense weights that are gone, as paths below the site.
    """

    suffix: str
    vanished: tuple[str, ...]

    def name(self, layer_path: str) -> str:
        """Return the site's name, given the path of its layer in the model."""
        return layer_path.removesuffix(self.suffix).removesuffix(".") if self.suffix else layer_path


class WithDropout(nn.Module):
    """Our layer followed by the dropout that the model had inside its FFN module."""

    def __init__(self, ffn: FFN, dropout: nn.Module) -> None:
        super().__init__()
        self.ffn = ffn
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        """Return dropout(ffn(x)), [..., d_in] -> [..., d_out]."""
        return self.dropout(self.ffn(x))


@dataclass(frozen=True, eq=False)
class Site:
    """One dense FFN of a model, not converted yet.

    Attributes:
        name: path of the module that holds it: the layer in the split and inline forms (BERT, OPT), else the MLP.
        d_in, d_out, hidden: widths.
        activation: its name as transformers spells it.
        gated: whether the activation multiplies a second branch.
    """

    name: str
    d_in: int
    d_out: int
    hidden: int
    activation: str
    gated: bool
    owner: nn.Module
    parent: nn.Module | None
    adapter: SiteAdapter

    @property
    def up(self) -> nn.Module:
        """The module whose input is the site's input."""
        return self.owner.get_submodule(self.adapter.up)

    @property
    def down(self) -> nn.Module:
        """The module whose output is the site's output, before dropout and residual."""
        return self.owner.get_submodule(self.adapter.down)

    def dense(self) -> DenseFFN:
        """Copy the dense weights into our own dense layer.

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
        if self.adapter.fused:  # the branch that is activated comes first
            gate, up = up.chunk(2)
            if up_bias is not None:
                gate_bias, up_bias = up_bias.chunk(2)
        elif self.adapter.gate is not None:
            gate, gate_bias = read_linear(self.owner.get_submodule(self.adapter.gate))
        down, down_bias = read_linear(self.down)
        dense = DenseFFN.from_weights(up, up_bias, down, down_bias, gate, gate_bias, self.activation)
        return dense.to(up.device).train(self.owner.training)

    def install(self, ffn: FFN) -> None:
        """Put `ffn` in the place of the dense weights."""
        adapter = self.adapter
        dense_paths = [p for p in (adapter.up, adapter.gate, adapter.down) if p is not None]
        suffix = adapter.put
        if adapter.put:
            self.owner.set_submodule(adapter.put, ffn)
            for path in (*dense_paths, adapter.activation):
                if is_module(self.owner, path) and not (path + ".").startswith(adapter.put + "."):
                    self.owner.set_submodule(path, nn.Identity())
        else:
            if self.parent is None:
                raise ConfigError("the model itself is the FFN: convert the module that holds it")
            new: nn.Module = ffn
            if adapter.dropout is not None:
                new, suffix = WithDropout(ffn, self.owner.get_submodule(adapter.dropout)), "ffn"
            setattr(self.parent, self.name.rpartition(".")[2], new)
        mark_installed(ffn, Installed(suffix, tuple(f"{path}.weight" for path in dense_paths)))


def mark_installed(layer: FFN | PackedFFN, record: Installed) -> None:
    """Note on the layer which site it fills; past nn.Module's own __setattr__, which is for parameters."""
    object.__setattr__(layer, "site", record)


def sites(model: nn.Module) -> list[Site]:
    """List the dense FFNs of a model that can be converted, in model order (encoder before decoder)."""
    model = inner_model(model)
    modules = dict(model.named_modules())
    found = []
    for name, module in modules.items():
        adapter = _adapter_of(module)
        if adapter is not None:
            parent = modules[name.rpartition(".")[0]] if name else None
            found.append(_make_site(name, module, parent, adapter))
    return found


def installed(model: nn.Module) -> dict[str, FFN | PackedFFN]:
    """Return {site name: our layer} for every converted site, packed or not, in model order."""
    found: dict[str, FFN | PackedFFN] = {}
    for path, module in inner_model(model).named_modules():
        record = getattr(module, "site", None)
        if isinstance(module, (FFN, PackedFFN)) and isinstance(record, Installed):
            found[record.name(path)] = module
    return found


def converted(model: nn.Module) -> dict[str, FFN]:
    """Return {site name: our trainable layer} in model order; packed sites are not among them."""
    return {name: layer for name, layer in installed(model).items() if isinstance(layer, FFN)}


def site_names(model: nn.Module) -> list[str]:
    """List the names of all sites, converted or not, in model order: what indices count."""
    model = inner_model(model)
    open_sites = {site.name for site in sites(model)}
    names = []
    for path, module in model.named_modules():
        record = getattr(module, "site", None)
        if path in open_sites:
            names.append(path)
        elif isinstance(module, (FFN, PackedFFN)) and isinstance(record, Installed):
            names.append(record.name(path))
    return names


@contextmanager
def record_sites(model: nn.Module, names: list[str] | None = None) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """Within the block, keep {site name: (input, output)} of the last forward pass, dense and converted sites alike.

    The output is what the FFN adds before the model's own dropout and residual. Shapes are the model's own:
    [batch, length, width], or [batch * length, width] in OPT.
    """
    ends: dict[str, tuple[nn.Module, nn.Module]] = {site.name: (site.up, site.down) for site in sites(model)}
    ends.update({name: (layer, layer) for name, layer in installed(model).items()})
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    inputs: dict[str, Tensor] = {}
    handles = []

    def hook(name: str) -> None:
        first, last = ends[name]

        def before(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            inputs[name] = args[0]

        def after(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            seen[name] = (inputs.pop(name), output)

        handles.append(first.register_forward_pre_hook(before))
        handles.append(last.register_forward_hook(after))

    for name in ends if names is None else names:
        hook(name)
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def register_site(
    class_name: str | type[nn.Module],
    *,
    up: str,
    down: str,
    activation: str,
    gate: str | None = None,
    fused: bool = False,
    dropout: str | None = None,
    put: str = "",
) -> None:
    """Teach `convert` a module class that holds an FFN.

    Args:
        class_name: the class, or its name.
        up, gate, down: paths of its linear layers (nn.Linear or transformers' Conv1D), y = down(act(gate x) * up x).
        activation: path of the activation module or function, or an activation's name if it is hard-coded.
        fused: `up` holds gate and up stacked along its outputs, the activated half first.
        dropout: path of the dropout that follows `down` inside the class, kept after our layer.
        put: where our layer goes. "" replaces the whole module, for a class whose forward is nothing but the FFN (and
            the dropout). Otherwise a path inside it: the class's forward keeps running, and what else it calls of the
            FFN becomes Identity.

    Raises:
        ConfigError: the name is registered already with another adapter.
    """
    name = class_name if isinstance(class_name, str) else class_name.__name__
    adapter = SiteAdapter(up=up, down=down, activation=activation, gate=gate, fused=fused, dropout=dropout, put=put)
    if FAMILIES.setdefault(name, adapter) != adapter:
        raise ConfigError(f"register_site: {name!r} is registered already as {FAMILIES[name]}")


def inner_model(model: nn.Module) -> nn.Module:
    """Return the transformers model inside a SentenceTransformer, or the model itself."""
    first = getattr(model, "_first_module", None)
    if callable(first):
        inner = getattr(first(), "auto_model", None)
        if isinstance(inner, nn.Module):
            return inner
    return model


def _adapter_of(module: nn.Module) -> SiteAdapter | None:
    """Find the adapter by class name, subclasses included as long as they compute the same thing."""
    for cls in type(module).__mro__:
        adapter = FAMILIES.get(cls.__name__)
        if adapter is None:
            continue
        same = all(
            getattr(type(module), method, None) is getattr(cls, method, None)
            for method in ("forward", "feed_forward_chunk", "ff_chunk")
        )
        matrices = [path for path in (adapter.up, adapter.gate, adapter.down) if path is not None]
        return adapter if same and all(is_linear(module, path) for path in matrices) else None
    return None


def _make_site(name: str, owner: nn.Module, parent: nn.Module | None, adapter: SiteAdapter) -> Site:
    check_nothing_else_is_lost(name, owner, adapter)
    up, _ = read_linear(owner.get_submodule(adapter.up))
    down, _ = read_linear(owner.get_submodule(adapter.down))
    d_out, hidden = down.shape
    return Site(
        name=name,
        d_in=up.shape[1],
        d_out=d_out,
        hidden=hidden,
        activation=activation_name(owner, adapter.activation),
        gated=adapter.fused or adapter.gate is not None,
        owner=owner,
        parent=parent,
        adapter=adapter,
    )


def placement(site: Site) -> tuple[torch.device, torch.dtype]:
    """Return device and dtype of a site's dense weights, which our layer takes over."""
    weight, _ = read_linear(site.up)
    return weight.device, weight.dtype
