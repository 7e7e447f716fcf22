"""The sites of a model: every FFN that can be converted, found by class or discovered, and how they are told apart.

A site is one FFN of a model. Its adapter says which attributes hold the dense weights and where our layer goes, so that
dropout, residual and LayerNorm stay the model's own code, in training and in evaluation. Sites are found by the class
of the module that holds them (`_families.py`), or by their form, with a proof (`discover.py`).
Reading order: `Site`, `survey`, `sites`, `refused`, `installed`, `record_sites`, `register_site`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor, nn

from nogemm.convert._candidates import find_experts
from nogemm.convert._families import FAMILIES, REGISTERED, SiteAdapter, listed_adapter
from nogemm.convert._reading import (
    activation_name,
    check_nothing_else_is_lost,
    is_module,
    linear_fault,
    linear_shape,
    look_up,
    read_linear,
)
from nogemm.convert._site import Installed, Site, WithDropout, remember, remembered
from nogemm.convert.discover import Refusal, discover
from nogemm.errors import ConfigError
from nogemm.layers import FFN, PackedFFN
from nogemm.models.inner import inner_model
from nogemm.shape import FFNShape

__all__ = [
    "Installed",
    "Refusal",
    "Site",
    "WithDropout",
    "converted",
    "installed",
    "record_sites",
    "refused",
    "register_site",
    "remember",
    "site_names",
    "sites",
    "survey",
]


@dataclass(frozen=True)
class Survey:
    """What a model has to convert.

    Attributes:
        open: sites that can be converted, in model order.
        blocked: FFNs that count as sites, but not as they are: a matrix is wrapped or quantised, or there are experts.
        refused: what only looks like an FFN, with the reason.
    """

    open: tuple[Site, ...]
    blocked: tuple[Refusal, ...]
    refused: tuple[Refusal, ...]


def survey(model: nn.Module, *, search: bool = True) -> Survey:
    """Look through a model; without `search`, by class and by what is remembered alone, which runs nothing."""
    root = inner_model(model)
    experts = find_experts(root)
    closed = {id(module) for group in experts for module in group.owner.modules()}
    blocked = [
        Refusal(group.name, type(group.owner).__name__, f"a mixture of {group.count} experts, which is no dense FFN")
        for group in experts
    ]
    known: list[nn.Module] = [group.owner for group in experts]
    hits: list[tuple[str, nn.Module, SiteAdapter]] = []
    for name, module in root.named_modules():
        adapter = None if id(module) in closed else _adapter_of(module)
        if adapter is not None:
            known.append(module)
            hits.append((name, module, adapter))
    refusals: list[Refusal] = []
    if search:
        found, refusals = discover(root, known, _install_borrowed)
        hits += [(one.name, one.owner, one.adapter) for one in found]
    order = {path: place for place, (path, _) in enumerate(root.named_modules())}
    hits.sort(key=lambda hit: order[hit[0]])
    places = _places(root)
    opened: dict[tuple[int, ...], Site] = {}
    for name, owner, adapter in hits:
        fault = _fault(owner, adapter)
        if fault is not None:
            blocked.append(Refusal(name, type(owner).__name__, fault))
            continue
        key = tuple(id(owner.get_submodule(path)) for path in adapter.matrices)
        if key in opened:  # other holders of the same matrices: one site
            opened[key].others.append(owner)
            opened[key].places.extend(places.get(id(owner), ()))
        else:
            opened[key] = _make_site(name, owner, places.get(id(owner), ()), adapter)
    blocked.sort(key=lambda refusal: order[refusal.name])
    return Survey(tuple(opened.values()), tuple(blocked), tuple(refusals))


def sites(model: nn.Module) -> list[Site]:
    """List the dense FFNs of a model that can be converted, in model order (encoder before decoder).

    FFNs of classes that nogemm does not know are found by their form, and listed if a proof succeeds: `refused` names
    the others. Cost: a walk over the modules; for unknown classes the first time a few small runs.
    """
    return list(survey(model).open)


def refused(model: nn.Module) -> list[Refusal]:
    """List what looks like an FFN and cannot be converted, each with its name, its class and the reason."""
    found = survey(model)
    return [*found.blocked, *found.refused]


def installed(model: nn.Module) -> dict[str, FFN | PackedFFN]:
    """Return {site name: our layer} for every converted site, packed or not, in model order."""
    found: dict[str, FFN | PackedFFN] = {}
    for path, module in inner_model(model).named_modules():
        if isinstance(module, (FFN, PackedFFN)) and module.site is not None:
            found[module.site.name(path)] = module
    return found


def converted(model: nn.Module) -> dict[str, FFN]:
    """Return {site name: our trainable layer} in model order; packed sites are not among them."""
    return {name: layer for name, layer in installed(model).items() if isinstance(layer, FFN)}


def site_names(model: nn.Module) -> list[str]:
    """List the names of all sites, converted, dense or blocked, in model order: what indices count."""
    model = inner_model(model)
    found = survey(model)
    dense = {site.name for site in found.open} | {refusal.name for refusal in found.blocked}
    names = []
    for path, module in model.named_modules():
        if path in dense:
            names.append(path)
        elif isinstance(module, (FFN, PackedFFN)) and module.site is not None:
            names.append(module.site.name(path))
    return names


@contextmanager
def record_sites(model: nn.Module, names: list[str] | None = None) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """Within the block, keep {site name: (input, output)} of the last forward pass, dense and converted sites alike.

    The output is what the FFN adds before the model's own dropout and residual; of a site that one pass uses several
    times (ALBERT) it is the last use's. Shapes are the model's own:
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
    gate_last: bool = False,
    dropout: str | None = None,
    between: tuple[str, ...] = (),
    put: str = "",
) -> None:
    """Teach `convert` a module class that holds an FFN.

    Args:
        class_name: the class, or its name.
        up, gate, down: paths of its linear layers (nn.Linear or transformers' Conv1D), y = down(act(gate x) * up x).
        activation: path of the activation module or function, or an activation's name if it is hard-coded.
        fused: `up` holds gate and up stacked along its outputs, the activated half first, or second with `gate_last`.
        dropout: path of the dropout that follows `down` inside the class, kept after our layer.
        between: paths of dropouts (modules, or probabilities) between the matrices, which go with them.
        put: where our layer goes. "" replaces the whole module, for a class whose forward is nothing but the FFN (and
            the dropout). Otherwise a path inside it: the class's forward keeps running, and what else it calls of the
            FFN becomes Identity, or 1 in the case of the gate.

    A checkpoint stores what was registered, so loading it needs no registration.

    Raises:
        ConfigError: the name is registered already with another adapter, or our layer's output would be cut in two.
    """
    name = class_name if isinstance(class_name, str) else class_name.__name__
    adapter = SiteAdapter(
        up=up, down=down, activation=activation, gate=gate, fused=fused, gate_last=gate_last, dropout=dropout,
        between=tuple(between), put=put,
    )  # fmt: skip
    if fused and put == up:
        raise ConfigError(
            f"register_site: with put={put!r} the class would cut our layer's output in two, as it is fused"
        )
    if FAMILIES.setdefault(name, adapter) != adapter:
        raise ConfigError(f"register_site: {name!r} is registered already as {FAMILIES[name]}")
    REGISTERED.add(name)


def _adapter_of(module: nn.Module) -> SiteAdapter | None:
    """Find the adapter by class name, subclasses included as long as they compute the same thing, or by a note."""
    adapter = remembered(module)
    for cls in type(module).__mro__ if adapter is None else ():
        adapter = listed_adapter(cls)
        if adapter is None:
            continue
        same = all(
            getattr(type(module), method, None) is getattr(cls, method, None)
            for method in ("forward", "feed_forward_chunk", "ff_chunk")
        )
        if not same:
            return None
        break
    if adapter is None:
        return None
    there = all(
        is_module(module, path) and linear_shape(module.get_submodule(path)) is not None for path in adapter.matrices
    )
    return adapter if there else None


def _fault(owner: nn.Module, adapter: SiteAdapter) -> str | None:
    """Name the first matrix that is not plain, and what to do about it."""
    for path in adapter.matrices:
        fault = linear_fault(owner.get_submodule(path))
        if fault is not None:
            return f"{path} {fault}"
    return None


def _places(root: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    """Return {id of module: every (parent, attribute) where it hangs}."""
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    for parent in root.modules():
        for attribute, child in parent._modules.items():  # a module may hang at one parent twice
            if child is not None:
                places.setdefault(id(child), []).append((parent, attribute))
    return places


def _install_borrowed(twin: nn.Module, found: list[tuple[str, SiteAdapter]]) -> None:
    """Put dense layers that borrow the model's weights in the place of proven FFNs, to compare with."""
    places = _places(twin)
    done: set[int] = set()
    owners = [(name, twin.get_submodule(name), adapter) for name, adapter in found]
    for name, owner, adapter in owners:
        if id(owner) not in done and _fault(owner, adapter) is None:
            done.add(id(owner))
            site = _make_site(name, owner, places.get(id(owner), ()), adapter)
            site.install(site.borrow())


def _make_site(name: str, owner: nn.Module, places: Sequence[tuple[nn.Module, str]], adapter: SiteAdapter) -> Site:
    check_nothing_else_is_lost(name, owner, adapter)
    up, _ = read_linear(owner.get_submodule(adapter.up))
    down, _ = read_linear(owner.get_submodule(adapter.down))
    d_out, hidden = down.shape
    return Site(
        name=name,
        shape=FFNShape(
            d_in=up.shape[1],
            d_out=d_out,
            hidden=hidden,
            activation=activation_name(owner, adapter.activation),
            gated=adapter.fused or adapter.gate is not None,
            sparsity=0.0 if adapter.sparsity is None else float(look_up(owner, adapter.sparsity)),
        ),
        owner=owner,
        places=list(places),
        adapter=adapter,
    )
