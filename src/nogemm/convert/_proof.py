"""Prove what a candidate computes: run a copy of its module on random numbers, and compare with our dense layer.

The copy gets random weights, large enough that every activation shows its form, and is run in fp32 three ways.

1. As it is, with hooks on its matrices. Each must be a plain linear map, y = W x + b, and between them must lie one of
   the activations that DenseFFN computes, h = act(u), or one times a second branch, h = act(g) * u. This says which
   matrix is the gate, and what the activation is, however the class spells it.
2. With our dense layer installed as `Site.install` would, in evaluation mode: what the module returns must be equal,
   so nothing else used the hidden layer, and norms, residuals and dropouts around the FFN are still the module's own.
3. The same in training mode, with every dropout at work: equal seeds give equal outputs only if each dropout after the
   FFN is still there. Dropout between the matrices goes with them.

Equal means: the difference is not above a few times what an error of rounding's size in the FFN's output makes of it.
Reading order: `prove`, `_copy`, `_wired`, `_wiring`, `_ways`.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nogemm.convert._candidates import Candidate
from nogemm.convert._dropouts import Dropouts, find_dropouts, find_knobs, is_dropout_module
from nogemm.convert._families import SiteAdapter
from nogemm.convert._reading import (
    KNOWN_ACTIVATIONS,
    alike,
    computed_name,
    linear_fault,
    linear_shape,
    look_up,
    read_linear,
)
from nogemm.convert._running import Seen, Unproven, first_line, first_that_runs, run_and_watch
from nogemm.convert._tensors import Arguments, without_hooks
from nogemm.convert._trial import Trial, rounding


def prove(candidate: Candidate, calls: list[Arguments], given: SiteAdapter | None = None) -> SiteAdapter:
    """Return the adapter of a candidate, or raise Unproven.

    Args:
        calls: arguments that the candidate's module may accept, tried in turn.
        given: prove this adapter, and look for no other.
    """
    owner = _copy(candidate)
    call = first_that_runs(owner, calls)
    candidate, inside, wiring = _wired(owner, candidate, call)
    knobs = find_knobs(owner)
    reason = ""
    # First as if every dropout were in use, so that what is found holds for each setting; then with those in use.
    for chosen in dict.fromkeys((knobs, tuple(knob for knob in knobs if knob.get(owner) > 0))):
        dropouts = find_dropouts(owner, candidate, call, chosen)
        for adapter in [given] if given else _ways(owner, candidate, wiring, inside, dropouts):
            try:
                Trial(owner, candidate, adapter, call, dropouts).check()
            except Unproven as error:
                reason = str(error)  # the last way asks least of the module, so its reason says most
            else:
                return adapter
    raise Unproven(reason)


def _copy(candidate: Candidate) -> nn.Module:
    """Copy the module in fp32 on the CPU, with random matrices and nothing that is zero by chance of initialisation."""
    try:
        owner = without_hooks(copy.deepcopy(candidate.owner))
        owner = owner.to("cpu", torch.float32).eval().requires_grad_(False)
    except Exception as error:
        raise Unproven(f"its module cannot be copied: {first_line(error)}") from error
    generator = torch.Generator().manual_seed(1)
    for path in candidate.matrices:
        if linear_fault(owner.get_submodule(path)) is not None:  # wrapped or quantised: what would be there without
            out, into = linear_shape(owner.get_submodule(path)) or (0, 0)
            owner.set_submodule(path, nn.Linear(into, out).eval().requires_grad_(False))
    inside = tuple(f"{path}." for path in candidate.matrices)
    for name, parameter in owner.named_parameters():
        if not name.startswith(inside):
            zeros = parameter.abs() < 1e-3  # the scale of a branch, for example, may start there
            if zeros.any():
                noise = torch.rand(parameter.shape, generator=generator) * 0.2 - 0.1
                parameter.copy_(torch.where(zeros, noise, parameter))
    for path in candidate.matrices:
        weight, bias = read_linear(owner.get_submodule(path))
        # A token of length sqrt(d) gives pre-activations of standard deviation 4: some lie where one may be clipped.
        size = (1.0 if path == candidate.leave else 4.0) * (3.0 / weight.shape[1]) ** 0.5
        weight.copy_((torch.rand(weight.shape, generator=generator) * 2.0 - 1.0) * size)
        if bias is not None:
            bias.copy_(torch.rand(bias.shape, generator=generator) * 2.0 - 1.0)
    return owner


def _wired(
    owner: nn.Module, candidate: Candidate, call: Arguments
) -> tuple[Candidate, dict[str, nn.Module], dict[str, Any]]:
    """Find out which matrices of a candidate are its FFN's, what is called between them, and how they are wired."""
    reason = Unproven("")
    chosen = [candidate.enter, *((path,) for path in candidate.enter if len(candidate.enter) > 1)]
    for enter in chosen:  # two that widen are a gated FFN, or one of them serves something else
        part = dataclasses.replace(candidate, enter=enter)
        try:
            seen, inside = run_and_watch(owner, part, call)
            return part, inside, _wiring(owner, part, seen)
        except Unproven as error:
            reason = error if enter == candidate.enter else reason
    raise reason


def _wiring(owner: nn.Module, candidate: Candidate, seen: dict[str, Seen]) -> dict[str, Any]:
    """Find how the hidden layer follows from the matrices' outputs; return the part of an adapter that says it."""
    for path, one in seen.items():
        linear = owner.get_submodule(path)
        for x, y in zip(one.inputs, one.outputs, strict=True):
            limit = rounding(linear, x)
            if y.shape != limit.shape or ((F.linear(x, *read_linear(linear)) - y).abs() > limit).any():
                raise Unproven(f"{path} is not a plain linear map")
    first = candidate.enter[0]
    if any(not torch.equal(a, b) for p in candidate.enter for a, b in _pairs(seen[first].inputs, seen[p].inputs)):
        raise Unproven(f"{' and '.join(candidate.enter)} read different inputs")
    hidden = seen[candidate.leave].inputs
    outs = [seen[path].outputs for path in candidate.enter]
    for name, act in KNOWN_ACTIVATIONS.items():
        if len(outs) == 2:
            for gate, up in ((0, 1), (1, 0)):
                if _gated(act, hidden, _pairs(outs[gate], outs[up])):
                    return {"activation": name, "gate": candidate.enter[gate], "up": candidate.enter[up]}
        elif outs[0][0].shape[-1] == 2 * candidate.hidden:
            halves = [out.chunk(2, dim=-1) for out in outs[0]]
            for last in (False, True):
                pairs = [(b, a) if last else (a, b) for a, b in halves]
                if _gated(act, hidden, pairs):
                    return {"activation": name, "up": first, "fused": True, "gate_last": last}
        elif all(alike(h, act(u)) for h, u in _pairs(hidden, outs[0])):
            return {"activation": name, "up": first}
    raise Unproven(
        f"what lies between {', '.join(candidate.enter)} and {candidate.leave} is none of the activations that "
        f"nogemm computes ({', '.join(KNOWN_ACTIVATIONS)}), alone or times a second branch: a norm, a residual or "
        "another activation"
    )


def _pairs(a: list[Tensor], b: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
    return list(zip(a, b, strict=True))


def _gated(act: Callable[[Tensor], Tensor], hidden: list[Tensor], pairs: list[tuple[Tensor, Tensor]]) -> bool:
    return all(alike(h, act(g) * u, u) for h, (g, u) in zip(hidden, pairs, strict=True))


def _ways(
    owner: nn.Module,
    candidate: Candidate,
    wiring: dict[str, Any],
    inside: dict[str, nn.Module],
    dropouts: Dropouts,
) -> Iterator[SiteAdapter]:
    """Yield adapters to try: our layer in the place of the module, with the dropout that ends it; of one matrix; or of
    the part that holds the first matrix. What is left of the module runs on, so the later ways do for more classes.
    But in the second our tensors have a matrix's name, which transformers may rename.
    """
    paths = {**wiring, "down": candidate.leave}
    between = dropouts.paths
    only_between = {knob.target for knob in dropouts.between if knob not in dropouts.both}
    activation = _activation_path(owner, candidate, inside, between, wiring["activation"])
    whole = {**paths, "activation": activation or wiring["activation"]}
    yield SiteAdapter(**whole)
    for path, module in owner.named_modules():
        if path and path not in only_between and is_dropout_module(module):
            yield SiteAdapter(**whole, dropout=path)
    if activation is not None and not wiring.get("fused"):
        yield SiteAdapter(**{**paths, "activation": activation}, between=between, put=paths["up"])
    parts = paths["up"].split(".")[:-1]
    for depth in range(len(parts), 0, -1):  # the first of two modules, activation and all
        part = ".".join(parts[:depth])
        if not candidate.leave.startswith(f"{part}."):
            yield SiteAdapter(**whole, between=between, put=part)


def _activation_path(
    owner: nn.Module, candidate: Candidate, inside: dict[str, nn.Module], between: tuple[str, ...], name: str
) -> str | None:
    """Return where the activation hangs as a module or function that can be replaced; None if forward spells it out."""
    paths = [path for path in inside if path not in between]
    homes = {path.rpartition(".")[0]: None for path in candidate.matrices} | {"": None}
    for home in homes:
        holder = owner.get_submodule(home)
        plain = [k for k, v in vars(holder).items() if not k.startswith("_") and callable(v) and k not in ("forward",)]
        paths += [f"{home}.{key}" if home else key for key in plain]
    return next((path for path in paths if computed_name(look_up(owner, path)) == name), None)
