"""Times of whole models in engines, by the bench's rules, and an additive model of them.

A candidate whose layers are ordinary torch runs in every engine. One with layers of ours runs packed in torch, or
exported to OpenVINO. Reading order: `Runner`, `entry_of`, `LatencyModel`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from nogemm.bench import peers
from nogemm.bench.engine.measure import Plan, Spec, measure
from nogemm.bench.engine.row import Row
from nogemm.hardware.cpu import usable_cores
from nogemm.tune.options import TuneOptions
from nogemm.tune.search import Costs
from nogemm.tune.space import Candidate, Space

TOGETHER = 5  # workers of a run besides the dense model, which each run times again
_LAYER = "layer "  # of an offer
_MODULE = "nogemm.tune.contender"
Note = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A model to be timed.

    Attributes:
        name: of its row.
        engine: that runs it.
        folder: its directory; None: the dense model.
        plain: nothing but ordinary layers.
        static: files of a static embedding, {"rows", "tokenizer"}.
        scored: whether its agreement is measured, where that is asked for.
    """

    name: str
    engine: str
    folder: Path | None = None
    plain: bool = True
    static: Mapping[str, str] | None = None
    scored: bool = True


@dataclass
class Runner:
    """Time models of one search.

    Attributes:
        dense: directory of the dense model.
        options: of the search.
        texts: JSON file of the texts that are timed and calibrated on.
        score: what a scored contender needs: "score" and "teacher".
        note: takes lines of progress.
    """

    dense: str
    options: TuneOptions
    texts: Path
    score: dict[str, str]
    note: Note

    def time(self, entries: Sequence[Entry], cosines: Path | None = None) -> dict[str, Row]:
        """Verify and time models in one run, contenders in turn; with `cosines`, a folder, they are scored, too.

        Returns:
            {name: row}, as `nogemm.bench.engine.measure` gives it, with "validation" where scored.
        """
        options = self.options
        batch, length = options.shape
        case = {"batch": batch, "length": length, "cache": "fresh", "codes": "trained"}
        plan = Plan(threads=options.threads or usable_cores(), rounds=options.rounds, seconds=options.seconds)
        specs = [self._spec(entry, cosines) for entry in entries]
        rows = measure(specs, [case], plan, note=self.note)
        return {entry.name: row for entry, row in zip(entries, rows, strict=True)}

    def _spec(self, entry: Entry, cosines: Path | None) -> Spec:
        settings: dict[str, Any] = {
            "dense": self.dense, "seed": self.options.seed, "agreement_texts": 0, "texts": str(self.texts)
        }  # fmt: skip
        if cosines is not None and entry.scored:
            settings |= self.score | {"cosines": str(cosines_file(cosines, entry.name))}
        family, _, precision = entry.engine.partition("-")
        missing = None if entry.static is not None else peers.missing(entry.engine)
        if entry.static is not None:
            kind, more = "StaticTuned", dict(entry.static)
        elif entry.plain:
            kind = "DenseTuned"
            more = {"engine": entry.engine} | ({} if entry.folder is None else {"peer": str(entry.folder)})
        else:
            more = {"model": str(entry.folder), "compiled": False}
            if family == "openvino":
                kind = "ExportedTuned"
                more |= {"rest": precision, "dtype": {"f32": "int8"}.get(precision, precision)}
            else:
                kind = "PackedTuned"
                more |= {"dtype": precision, "body": "int8" if precision == "int8" else None}
        return Spec(name=entry.name, factory=f"{_MODULE}:{kind}", settings=settings | more, missing=missing)


def cosines_file(folder: Path, name: str) -> Path:
    """Return where the cosines of a contender's texts are written."""
    return folder / f"{hashlib.sha256(name.encode()).hexdigest()[:12]}.safetensors"


def can_run(engine: str, plain: bool) -> bool:
    """Say whether an engine runs a candidate at all: layers of ours need torch or OpenVINO."""
    return plain or engine.partition("-")[0] in ("torch", "openvino")


def entry_of(space: Space, candidate: Candidate, engine: str, folder: Path, name: str | None = None) -> Entry:
    """Return the entry of a candidate whose model lies in a folder."""
    return Entry(name=name or candidate.name, engine=engine, folder=folder, plain=space.plain(candidate))


@dataclass
class LatencyModel:
    """The time of a call as a sum: what belongs to no layer, each layer that stays, each token table.

        us = base + sum over layers that stay of (layer[offer] + table)

    The parts are those that fit the measured whole models best, by least squares of relative errors. Layers of one
    model are alike here: a layer's time depends on what stands in its FFN, and not on its number.

    Attributes:
        parts: {"base", "table", "layer dense", "layer OFFER": us}.
        timed: what they were fitted to, measured (candidate, us).
    """

    parts: dict[str, float] = field(default_factory=dict)
    timed: list[tuple[Candidate, float]] = field(default_factory=list)

    def fit(self, timed: Sequence[tuple[Candidate, float]]) -> None:
        """Fit the parts to measured (candidate, us)."""
        names = sorted({part for candidate, _ in timed for part in _counts(candidate)})
        rows = np.array([[_counts(c).get(name, 0.0) / us for name in names] for c, us in timed])
        # A hair of ridge: where depths were not varied, base and layers cannot be told apart, and share the time.
        scale = np.abs(rows).max(axis=0)
        ridge = 1e-4 * np.eye(len(names))
        left = np.vstack([rows / scale, ridge])
        found, *_ = np.linalg.lstsq(left, np.concatenate([np.ones(len(rows)), np.zeros(len(names))]), rcond=None)
        self.parts = {name: float(value) for name, value in zip(names, found / scale, strict=True)}
        self.timed = list(timed)

    def us(self, candidate: Candidate) -> float:
        """Return the guessed microseconds of a call."""
        return sum(count * self.parts[name] for name, count in _counts(candidate).items())

    def knows(self, candidate: Candidate) -> bool:
        """Say whether all parts of a candidate were measured in this engine."""
        return all(name in self.parts for name in _counts(candidate))

    def to_dict(self) -> dict[str, Any]:
        """Return the parts, and the models behind them, {"candidate", "us", "fitted"}, as JSON values."""
        rows = [{"candidate": c.name, "us": us, "fitted": self.us(c)} for c, us in self.timed]
        return {"parts": self.parts, "rows": rows}

    def costs(self, space: Space) -> Costs:
        """Return the parts as the search takes them."""
        known = [name.removeprefix(_LAYER) for name in self.parts if name.startswith(_LAYER)]
        each = {name: [self.parts[_LAYER + name]] * space.depth for name in known}
        table = self.parts.get("table", float("inf"))
        return Costs(self.parts.get("base", 0.0), [0.0] * space.depth, each, [table] * space.depth)


def _counts(candidate: Candidate) -> dict[str, float]:
    """Count the parts of a candidate."""
    found = {"base": 1.0}
    for offer in candidate.ffns:
        found[_LAYER + offer] = found.get(_LAYER + offer, 0.0) + 1.0
    if candidate.tables:
        found["table"] = float(len(candidate.kept))
    return found


def memory_costs(space: Space, evidence: Mapping[str, Any], table_bytes: int) -> Costs:
    """Return stored bytes as the search takes them."""
    ffn = {name: [float(size) for size in entry["bytes"]] for name, entry in evidence["offers"].items()}
    ffn["dense"] = [float(size) for size in evidence["ffn_bytes"]]
    layer = [float(size) for size in evidence["layer_bytes"]]
    return Costs(float(evidence["rest_bytes"]), layer, ffn, [float(table_bytes)] * space.depth)


def errors(model: LatencyModel, timed: Sequence[tuple[Candidate, float]]) -> dict[str, Any]:
    """Hold guesses against models that were not fitted to: rows, and the worst share that one is off."""
    rows = [
        {"candidate": c.name, "predicted_us": model.us(c), "us": us, "error": model.us(c) / us - 1}
        for c, us in timed
        if model.knows(c)
    ]
    return {"rows": rows, "worst": max((abs(row["error"]) for row in rows), default=None)}
