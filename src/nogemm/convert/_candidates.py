"""Find by shape alone what may be an FFN: matrices d -> F -> d under one module, and mixtures of experts.

Nothing here is believed: `discover.py` offers a candidate only after `_proof.py` has shown what it computes.
Reading order: `Candidate`, `find_candidates`, `find_experts`.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass

from torch import nn

from nogemm.convert._reading import linear_shape
from nogemm.layers import FFN, PackedFFN

# Matrices of attention by name: with heads wider than the model, d -> heads -> d has an FFN's shape.
_ATTENTION = re.compile(r"(^|_)(w?qkv|[qkv]|kv|query|key|value)(_|$)|attn", re.IGNORECASE)
_EXPERTS = re.compile("expert|moe", re.IGNORECASE)
_DEPTH = 3  # a matrix lies at most this many names below the module that holds the FFN
_CONTAINERS = (nn.ModuleList, nn.ModuleDict)


@dataclass(frozen=True, eq=False)
class Candidate:
    """Matrices that have the shapes of an FFN.

    Attributes:
        name: path of the smallest module that holds them all.
        enter: paths below it of the one matrix d -> F (or d -> 2 F), or of a gated FFN's two, in the model's order.
        leave: path of the matrix F -> d.
        d, hidden: widths.
    """

    name: str
    owner: nn.Module
    enter: tuple[str, ...]
    leave: str
    d: int
    hidden: int

    @property
    def matrices(self) -> tuple[str, ...]:
        """All paths."""
        return (*self.enter, self.leave)


@dataclass(frozen=True, eq=False)
class Experts:
    """A mixture of experts.

    Attributes:
        name: path of the module that chooses among the experts and adds them up, or of the experts themselves.
        count: number of experts.
    """

    name: str
    owner: nn.Module
    count: int


def find_candidates(root: nn.Module, known: Collection[nn.Module]) -> list[Candidate]:
    """List candidates in model order, each held by the smallest module that has all its matrices.

    Args:
        known: modules that are not searched: sites already, or mixtures of experts.
    """
    skip = {id(module) for module in known}
    seen: set[int] = set()
    found: list[Candidate] = []

    def free_matrices(module: nn.Module, path: str) -> dict[str, nn.Module] | None:
        """Search below `module`; return its matrices by path below it, or None if something below is an FFN already."""
        free: dict[str, nn.Module] = {}
        settled = False
        for name, child in module.named_children():
            if linear_shape(child) is not None:
                free[name] = child
            elif id(child) in seen or id(child) in skip or isinstance(child, (FFN, PackedFFN)):
                settled = True
            else:
                seen.add(id(child))
                below = free_matrices(child, f"{path}.{name}" if path else name)
                settled = settled or below is None
                free.update({f"{name}.{key}": matrix for key, matrix in (below or {}).items()})
        if settled:  # a layer that holds an FFN, or a stack of layers: its other matrices are none
            return None
        free = {key: matrix for key, matrix in free.items() if key.count(".") < _DEPTH}
        if isinstance(module, _CONTAINERS):  # what single layers of a stack have left over does not belong together
            return {key: matrix for key, matrix in free.items() if "." not in key}
        pairs = _match(free)
        for enter, leave in pairs:
            d, hidden = linear_shape(free[leave]) or (0, 0)
            found.append(Candidate(path, module, enter, leave, d, hidden))
        return None if pairs else free

    if id(root) not in skip:
        free_matrices(root, "")
    order = {id(module): place for place, module in enumerate(root.modules())}
    return sorted(found, key=lambda candidate: order[id(candidate.owner)])


def find_experts(root: nn.Module) -> list[Experts]:
    """List the mixtures of experts: lists of modules called experts, and experts stacked in tensors of three axes."""
    found: dict[int, Experts] = {}
    parents: dict[str, nn.Module] = {}
    ours: list[str] = []
    for path, module in root.named_modules():
        parents[path] = module
        if isinstance(module, (FFN, PackedFFN)):
            ours.append(f"{path}.")
        if path.startswith(tuple(ours)):
            continue
        attribute = path.rpartition(".")[2]
        count = _expert_count(attribute, module)
        if count and not any(path.startswith(f"{other.name}.") for other in found.values() if other.name):
            outer = path.rpartition(".")[0]
            # The list alone knows no router: the block around it does, and its shared expert goes with it.
            named = outer if outer and "expert" in (attribute + type(module).__name__).lower() else path
            found.setdefault(id(parents[named]), Experts(named, parents[named], count))
    return list(found.values())


def _expert_count(attribute: str, module: nn.Module) -> int:
    if isinstance(module, FFN):
        return 0
    if isinstance(module, _CONTAINERS):
        return len(module) if "expert" in attribute.lower() and len(module) > 1 else 0
    if not _EXPERTS.search(attribute + type(module).__name__):
        return 0  # attention, too, is kept in tensors of three axes somewhere
    return next((p.shape[0] for p in module.parameters(recurse=False) if p.dim() == 3 and p.shape[0] > 1), 0)


def _match(free: dict[str, nn.Module]) -> list[tuple[tuple[str, ...], str]]:
    """Pair matrices that widen with one that narrows back, in the model's order."""
    named = {key: matrix for key, matrix in free.items() if not _ATTENTION.search(key.rpartition(".")[2])}
    shapes = {key: linear_shape(matrix) or (0, 0) for key, matrix in named.items()}
    used: set[str] = set()
    out: list[tuple[tuple[str, ...], str]] = []
    for leave, (d, hidden) in shapes.items():
        if leave in used or d == hidden:
            continue
        inner = [key for key in named if key not in used and key != leave]
        enter = tuple(key for key in inner if shapes[key] == (hidden, d))
        others = [key for key in inner if shapes[key] == (d, hidden)]
        if len(enter) == len(others) + 1:  # as many out as in: FFNs side by side, each in the model's order
            enter = enter[:1]
        if not enter:
            enter = tuple(key for key in inner if shapes[key] == (2 * hidden, d))[:1]
        elif len(enter) == 1 and hidden < d:
            enter = ()  # a bottleneck
        if 1 <= len(enter) <= 2:
            used.update((*enter, leave))
            out.append((enter, leave))
    return out
