"""Cheap evidence of quality: each layer's FFN replaced alone, each layer left out alone, and what that costs.

Agreement is the mean cosine of a text's embedding with the dense model's. Nothing is trained: layers are fitted in
closed form. The losses of single changes are added up to guess that of many (`QualityModel`).

Legend: N texts, E width of an embedding.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from nogemm.bench.quality.scores import cosines
from nogemm.convert.convert import convert
from nogemm.convert.sites import converted
from nogemm.errors import ConfigError
from nogemm.layers import DenseConfig
from nogemm.models.depth import keep_layers
from nogemm.models.embed import embed
from nogemm.models.pooling import Pooling
from nogemm.tune.ledger import Ledger
from nogemm.tune.offers import DENSE
from nogemm.tune.space import Candidate, Space

STAGE = "evidence"
Note = Callable[[str], None]
Save = Callable[[str, nn.Module], None]


@dataclass
class Judge:
    """Measure agreement with the dense model on a few texts.

    Attributes:
        tokenizer: of the dense model.
        texts: that are embedded.
        pooling: how embeddings are made.
        theirs_NE: the dense model's embeddings of them.
    """

    tokenizer: Any
    texts: list[str]
    pooling: Pooling
    theirs_NE: NDArray[np.float32]

    def agreement(self, model: nn.Module) -> float:
        """Return the mean cosine with the dense model's embeddings."""
        return float(cosines(embed(model, self.tokenizer, self.texts, pooling=self.pooling), self.theirs_NE).mean())


def judge_of(teacher: nn.Module, tokenizer: Any, texts: list[str], pooling: Pooling) -> Judge:
    """Embed the texts with the dense model, and judge others by that."""
    return Judge(tokenizer, texts, pooling, embed(teacher, tokenizer, texts, pooling=pooling))


def gather(space: Space, judge: Judge, ledger: Ledger, note: Note, save: Save) -> dict[str, Any]:
    """Measure every single change; an offer that does not suit the model leaves the space with a note.

    Args:
        save: given (offer, model with it everywhere), to be timed later.
    Returns:
        {"offers": {name: {"alone": agreement by layer, "all", "bytes": by layer}}, "dropped": agreement by layer,
        "bytes": of the dense model's layers, "rest_bytes": of what belongs to no layer}.
    """
    found: dict[str, Any] = {"offers": {}, "dropped": [], **_dense_bytes(space)}
    for layer in range(space.depth if space.droppable else 0):
        if space.depth == 1:
            found["dropped"].append(0.0)
            continue
        note(f"leaving out layer {layer}")
        found["dropped"].append(ledger.take(STAGE, f"without {layer}", lambda i=layer: _without(space, judge, i)))
    for name in list(space.offers):
        note(f"fitting {name} to every FFN")
        entry = ledger.take(STAGE, f"offer {name}", lambda n=name: _offer(space, judge, n, save))
        if "error" in entry:
            space.notes.append(f"{name} is not offered: {entry['error']}")
            del space.offers[name]
        else:
            found["offers"][name] = entry
    return found


def _without(space: Space, judge: Judge, layer: int) -> float:
    model = copy.deepcopy(space.teacher)
    keep_layers(model, [i for i in range(space.depth) if i != layer])
    return judge.agreement(model)


def _offer(space: Space, judge: Judge, name: str, save: Save) -> dict[str, Any]:
    start = time.monotonic()
    try:
        model = space.build(space.uniform(name))
        alone = copy.deepcopy(space.teacher)
        convert(alone, DenseConfig())
    except ConfigError as error:
        return {"error": str(error)}
    together = judge.agreement(model)
    save(name, model)
    paths = {id(module): path for path, module in model.named_modules()}
    fitted = {site: (paths[id(layer)], layer) for site, layer in converted(model).items()}
    dense = converted(alone)
    for site, (path, _) in fitted.items():  # in this model, whose hooks note token ids where a layer reads them
        model.set_submodule(path, dense[site])
    single, sizes = [], []
    for names in space.layers:
        for site in names:
            model.set_submodule(*fitted[site])
        single.append(judge.agreement(model) if names else 1.0)
        sizes.append(sum(stored_bytes(fitted[site][1]) for site in names))
        for site in names:
            model.set_submodule(fitted[site][0], dense[site])
    return {"alone": single, "all": together, "bytes": sizes, "seconds": time.monotonic() - start}


def _dense_bytes(space: Space) -> dict[str, Any]:
    """Return the stored bytes of each layer without its FFN and of its FFN, and of all the rest."""
    twin = copy.deepcopy(space.teacher)
    convert(twin, DenseConfig())
    ffns = {site: stored_bytes(layer) for site, layer in converted(twin).items()}
    of_ffns = [sum(ffns[site] for site in names) for names in space.layers]
    whole = stored_bytes(space.teacher)
    if not space.droppable:
        return {"ffn_bytes": of_ffns, "layer_bytes": [0] * space.depth, "rest_bytes": whole - sum(of_ffns)}
    model = copy.deepcopy(space.teacher)
    layers = []
    for i in range(space.depth):
        if space.depth == 1:
            layers.append(0)
            break
        cut = copy.deepcopy(model)
        keep_layers(cut, [j for j in range(space.depth) if j != i])
        layers.append(whole - stored_bytes(cut) - of_ffns[i])
    return {"ffn_bytes": of_ffns, "layer_bytes": layers, "rest_bytes": whole - sum(layers) - sum(of_ffns)}


def stored_bytes(model: nn.Module) -> int:
    """Return the bytes of a module's weights as a checkpoint stores them, shared ones once."""
    seen: dict[int, int] = {}
    for value in model.state_dict(keep_vars=True).values():
        seen[id(value)] = value.numel() * value.element_size()
    return sum(seen.values())


@dataclass
class QualityModel:
    """Guess a candidate's loss, 1 - agreement, from those of its single changes.

        loss = drop * sum over layers left out of (1 - agreement without it)
             + ffn * sum over layers that stay of (1 - agreement with its FFN replaced alone)

    `drop` and `ffn` are 1 for candidates that are not trained, and learnt from those that were, because training makes
    up for the two unequally. `tables` is what token tables leave of the loss.

    Attributes:
        dropped: agreement without each layer.
        alone: {offer: agreement with it in each layer alone}.
    """

    dropped: Sequence[float]
    alone: Mapping[str, Sequence[float]]
    drop: float = 1.0
    ffn: float = 1.0
    tables: float = 1.0

    def parts(self, candidate: Candidate) -> tuple[float, float]:
        """Return the two sums, of layers left out and of FFNs replaced."""
        left_out = sum(1 - self.dropped[i] for i in range(len(self.dropped)) if i not in candidate.kept)
        pairs = zip(candidate.kept, candidate.ffns, strict=True)
        return left_out, sum(1 - self.alone[offer][layer] for layer, offer in pairs if offer != DENSE)

    def loss(self, candidate: Candidate) -> float:
        """Return the guess."""
        left_out, replaced = self.parts(candidate)
        return (self.drop * left_out + self.ffn * replaced) * (self.tables if candidate.tables else 1.0)

    def learn(self, points: Iterable[tuple[Candidate, float]]) -> None:
        """Fit the factors to measured losses of trained candidates, by least squares on their logarithms' scale."""
        points = [(candidate, loss) for candidate, loss in points if loss > 0]
        plain = [(self.parts(c), loss) for c, loss in points if not c.tables]
        plain = [(parts, loss) for parts, loss in plain if sum(parts) > 0]
        if plain:
            # Relative errors count: a candidate of a small loss is as much worth as one of a large.
            rows = np.array([[part / loss for part in parts] for parts, loss in plain])
            self.drop, self.ffn = _positive(rows, self.drop, self.ffn)
        ratios = []
        for candidate, loss in points:
            guess = self.loss(Candidate(candidate.kept, candidate.ffns))
            if candidate.tables and guess > 0:
                ratios.append(loss / guess)
        if ratios:
            self.tables = float(np.median(ratios))

    def to_dict(self) -> dict[str, float]:
        """Return the factors."""
        return {"drop": self.drop, "ffn": self.ffn, "tables": self.tables}


def _positive(rows: NDArray[np.float64], drop: float, ffn: float) -> tuple[float, float]:
    """Solve rows @ factors = 1 for two factors that are not negative; one that no row speaks of keeps its ratio."""
    ones = np.ones(len(rows))
    used = rows.any(axis=0)
    if used.all() and np.linalg.matrix_rank(rows) == 2:
        found, *_ = np.linalg.lstsq(rows, ones, rcond=None)
        if (found > 0).all():
            return float(found[0]), float(found[1])
    together = rows @ np.array([drop, ffn])
    factor = float((together @ ones) / max(together @ together, 1e-30))
    return drop * factor, ffn * factor


def check(model: QualityModel, pairs: Sequence[tuple[Candidate, float]]) -> dict[str, Any]:
    """Hold the untrained guesses against whole candidates: rows, and the largest absolute error of an agreement."""
    rows = [
        {"candidate": c.name, "predicted": 1 - model.loss(c), "measured": value, "error": 1 - model.loss(c) - value}
        for c, value in pairs
    ]
    return {"rows": rows, "worst": max((abs(row["error"]) for row in rows), default=None)}
