"""Find FFNs in classes that nobody listed, and offer those whose working is proven.

    matrices d -> F -> d under one module  ->  proof on a copy of that module  ->  proof on the whole model

The first step reads shapes (`_candidates.py`), the second finds activation and wiring (`_proof.py`), the third runs the
model with our dense layers in place (`_whole.py`). A module's answer is remembered for its class, shapes and settings,
so that twelve equal layers cost one proof. Nothing of the model changes: weights, modes, hooks and the state of random
number generators stay as they are.
Reading order: `discover`, `Found`, `Refusal`.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from nogemm.convert._candidates import Candidate, find_candidates
from nogemm.convert._families import SiteAdapter
from nogemm.convert._proof import prove
from nogemm.convert._running import CannotRun, Unproven, random_calls
from nogemm.convert._whole import differs, record_calls


@dataclass(frozen=True)
class Refusal:
    """Something that looks like an FFN and is left dense.

    Attributes:
        name: path of the module that holds it.
        holder: that module's class.
        reason: why.
    """

    name: str
    holder: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name} ({self.holder}): {self.reason}"


def in_words(refusals: Iterable[Refusal]) -> list[str]:
    """Write refusals out; those of one class with one reason once, with the number of the others."""
    groups: dict[tuple[str, str], list[Refusal]] = {}
    for refusal in refusals:
        groups.setdefault((refusal.holder, refusal.reason), []).append(refusal)
    return [str(g[0]) + (f" (and {len(g) - 1} more like it)" if len(g) > 1 else "") for g in groups.values()]


@dataclass(frozen=True, eq=False)
class Found:
    """A proven FFN: its module's path, the module, and how it is taken out."""

    name: str
    owner: nn.Module
    adapter: SiteAdapter


# Settings that only count layers. A layer that works otherwise for its number is noticed when the whole model runs.
_PLACE = re.compile(r"idx|index|(layer|block)_?(id|num|number)$")
# What was found out in this process, by class, shapes and settings of the module and by the class of the whole model.
_ANSWERS: dict[Hashable, SiteAdapter | str] = {}

Install = Callable[[nn.Module, list[tuple[str, SiteAdapter]]], None]


def discover(root: nn.Module, known: Iterable[nn.Module], install: Install) -> tuple[list[Found], list[Refusal]]:
    """Return the proven FFNs below `root` and the candidates that are refused, in model order.

    Args:
        known: modules that are sites already, or not to be searched.
        install: puts our dense layers, borrowing the weights, at [(path, adapter)] of a model.
    Cost: the first time for a class, a few runs of a copy of its module on six tokens, and two or three runs of the
        whole model on five; afterwards a walk over the modules.
    """
    candidates = find_candidates(root, list(known))
    keys = {id(candidate): _signature(root, candidate) for candidate in candidates}
    new: dict[Hashable, Candidate] = {}
    for candidate in candidates:
        key = keys[id(candidate)]
        if key not in _ANSWERS and not _unloaded(candidate.owner):
            new.setdefault(key, candidate)
    if new:
        with _untouched(), torch.no_grad():
            answers = _prove_all(root, new)
            same = [(c, answers.get(keys[id(c)], "")) for c in candidates]
            proven = [(candidate, answer) for candidate, answer in same if not isinstance(answer, str)]
            _ANSWERS.update(_check_whole(root, answers, proven, install, keys))
    found, refused = [], []
    for candidate in candidates:
        answer = _ANSWERS.get(keys[id(candidate)], "its weights are not in memory, so nothing can be proven")
        if isinstance(answer, str):
            refused.append(Refusal(candidate.name, type(candidate.owner).__name__, answer))
        else:
            found.append(Found(candidate.name, candidate.owner, answer))
    return found, refused


def _prove_all(root: nn.Module, new: dict[Hashable, Candidate]) -> dict[Hashable, SiteAdapter | str]:
    """Prove one candidate of every kind; those that take more than tokens get a call from a run of the model."""
    answers: dict[Hashable, SiteAdapter | str] = {}
    again: dict[Hashable, Candidate] = {}
    for key, candidate in new.items():
        try:
            answers[key] = prove(candidate, random_calls(candidate.d))
        except Unproven as reason:
            answers[key] = str(reason)
            if isinstance(reason, CannotRun):
                again[key] = candidate
    calls = record_calls(root, [candidate.name for candidate in again.values()]) if again else {}
    for key, candidate in again.items():
        if candidate.name in calls:
            try:
                answers[key] = prove(candidate, [calls[candidate.name]])
            except Unproven as reason:
                answers[key] = str(reason)
    return answers


def _check_whole(
    root: nn.Module,
    answers: dict[Hashable, SiteAdapter | str],
    found: list[tuple[Candidate, SiteAdapter]],
    install: Install,
    keys: dict[int, Hashable],
) -> dict[Hashable, SiteAdapter | str]:
    """Withdraw what makes the whole model answer otherwise."""
    places = [(candidate.name, adapter) for candidate, adapter in found]
    if not places or differs(root, lambda twin: install(twin, places)) is None:
        return answers
    for key in {keys[id(candidate)]: None for candidate, _ in found}:
        alone = [(candidate.name, adapter) for candidate, adapter in found if keys[id(candidate)] == key]
        what = differs(root, lambda twin, alone=alone: install(twin, alone))
        if what is not None:
            answers[key] = f"the model reads its hidden layer or its matrices past the module ({what} without it)"
    return answers


def _signature(root: nn.Module, candidate: Candidate) -> Hashable:
    """Describe what decides the answer: classes, shapes and plain settings of the module, but not which layer it is."""
    parts: list[Hashable] = [type(root), candidate.enter, candidate.leave]
    for path, module in candidate.owner.named_modules():
        shapes = tuple((key, tuple(value.shape)) for key, value in module.named_parameters(recurse=False))
        settings = tuple(
            (key, value if isinstance(value, (bool, int, float, str)) else value.__code__)
            for key, value in sorted(vars(module).items())
            if not key.startswith("_")
            and key != "training"
            and not _PLACE.search(key)
            and (isinstance(value, (bool, int, float, str)) or hasattr(value, "__code__"))
        )
        config = getattr(module, "config", None)
        drops = tuple(sorted((k, str(v)) for k, v in getattr(config, "__dict__", {}).items() if "drop" in k))
        parts.append((path, type(module), shapes, settings, drops))
    return tuple(parts)


def _unloaded(owner: nn.Module) -> bool:
    return any(parameter.is_meta for parameter in owner.parameters())


@contextmanager
def _untouched() -> Iterator[None]:
    """Give back the random number generators as they were."""
    python = random.getstate()
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        try:
            yield
        finally:
            random.setstate(python)
