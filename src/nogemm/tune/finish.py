"""The end of a search: everything measured in one run, the choice, and what it means.

Validation chooses, the test texts are looked at once, and every agreement has its 95 % interval.
Reading order: `measured`, `choose`, `verdict`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.numpy import load_file

from nogemm.bench.quality.scores import bootstrap_mean
from nogemm.tune import static
from nogemm.tune.evidence import stored_bytes
from nogemm.tune.offers import DENSE
from nogemm.tune.options import TuneOptions
from nogemm.tune.space import Candidate
from nogemm.tune.stages import Known, dense_name
from nogemm.tune.state import Search
from nogemm.tune.timing import Entry, cosines_file, entry_of
from nogemm.tune.training import Run

EQUAL = 0.002  # of agreement: among models that are as good but for so little, the fastest is chosen
SHORT = 3  # runners-up of the short runs that are measured beside the rest
Row = dict[str, Any]


def measured(
    search: Search, known: Known, winner: Run | None, against: Mapping[str, Run], short: Sequence[Run]
) -> list[Row]:
    """Time the winner, its rivals, the dense model and the best short runs in one run, and score them.

    Returns:
        rows {"name", "kind", "engine", "candidate", "tokens", "training", "bytes", "validation", "agreement": figure or
        None, and those of a timed contender}. `kind` is "dense", "candidate", "rival" or "static".
    """
    trained: list[tuple[str, str, Run, str]] = []
    if winner is not None:
        trained.append((winner.candidate.name, "candidate", winner, "full"))
    trained += [(f"{name}: {run.candidate.name}", "rival", run, "full") for name, run in against.items()]
    there = {run.candidate for _, _, run, _ in trained}
    others = [run for run in short if run.candidate not in there][:SHORT]
    trained += [(f"{run.candidate.name}, short", "candidate", run, "short") for run in others]
    facts: dict[str, Row] = {}
    entries: list[Entry] = []
    for engine in _dense_engines(known):
        name = dense_name(engine)
        entries.append(Entry(name=name, engine=engine, scored=False))
        facts[name] = {"kind": "dense", "engine": engine, "bytes": stored_bytes(search.teacher), "training": "none"}
    for name, kind, run, training in trained:
        found = known.engine_for(search, run.candidate)
        assert found is not None
        folder = search.model_folder(run.candidate, run.tokens)
        entries.append(entry_of(search.space, run.candidate, found[0], folder, name))
        facts[name] = {
            "kind": kind, "engine": found[0], "candidate": run.candidate.to_dict(), "tokens": run.tokens,
            "training": training, "predicted_us": found[1], "bytes": weight_bytes(folder),
            "rival_form": is_rival(run.candidate),
        }  # fmt: skip
    facts |= _static_entry(search, entries)
    search.keep_models([entry.folder for entry in entries if entry.folder is not None])
    key = "rows" if winner is not None else "dense alone"
    rows = search.time("final", key, entries, scored=True)
    for entry in facts.values():
        if entry.get("predicted_us"):  # guessed in times of the first run: what changed about the machine falls out
            first, now = (rows_of[dense_name(entry["engine"])] for rows_of in (search.first_rows(), rows))
            entry["predicted_us"] *= (now.get("us_median") or first["us_median"]) / first["us_median"]
    where = search.folder / "cosines"
    found = [_row(search, name, {**rows[name], **facts[name]}, where / "final") for name in rows]
    for row in found:
        if row["kind"] == "dense":
            row |= _scored(search, known.dense[row["engine"]], cosines_file(where / "dense", row["name"]))
    slower = [engine for engine in known.dense if engine not in _dense_engines(known)]
    for engine in slower:
        own = {"kind": "dense", "engine": engine, "bytes": stored_bytes(search.teacher), "training": "none"}
        found.append(_row(search, dense_name(engine), {**known.dense[engine], **own}, where / "dense"))
    skipped = static.missing() if search.options.static else None
    if skipped is not None:
        found.append(_row(search, static.NAME, {"kind": "static", "missing": skipped, "engine": ""}, where / "final"))
    return found


def _dense_engines(known: Known) -> list[str]:
    """Return the engines that run the dense model beside the candidates: those searched, and the fastest other."""
    timed = {name: row["us_median"] for name, row in known.dense.items() if row.get("us_median") is not None}
    others = sorted((name for name in timed if name not in known.engines), key=lambda name: timed[name])
    return [*known.engines, *others[:1]]


def _static_entry(search: Search, entries: list[Entry]) -> dict[str, Row]:
    """Make the static embedding, if it is asked for and can be made; add its entry."""
    if not search.options.static or static.missing() is not None:
        return {}

    def work() -> dict[str, Any]:
        search.note("making a static embedding")
        folder = search.folder / "static"
        try:
            return static.make_static(
                search.teacher, search.space.tokenizer, search.texts.train, search.pooling, folder
            )
        except Exception as error:  # another library's way of failing must not cost the search
            return {"error": f"model2vec failed: {type(error).__name__}: {' '.join(str(error).split())[:200]}"}

    made = search.ledger.take("static", "files", work)
    if "error" in made:
        search.notes.append(f"No static embedding: {made['error']}.")
        return {}
    files = {name: made[name] for name in ("rows", "tokenizer")}
    entries.append(Entry(name=static.NAME, engine="torch-fp32", static=files))
    return {static.NAME: {"kind": "static", "engine": "torch-fp32", "bytes": made["bytes"], "training": "closed form"}}


def _row(search: Search, name: str, facts: Row, folder: Path) -> Row:
    row = {"name": name, "candidate": None, "tokens": 0, "training": "none", "bytes": None, "us_median": None} | facts
    row.pop("contender", None)
    return row | _scored(search, row, cosines_file(folder, name))


def _scored(search: Search, row: Mapping[str, Any], file: Path) -> Row:
    """Return the agreement on the test texts with its interval, and that on those that choose."""
    if row.get("validation") is None or not file.is_file():
        return {"validation": None, "agreement": None}
    figure = bootstrap_mean(load_file(file)["test"], seed=search.options.seed)
    return {"validation": row["validation"], "agreement": figure.to_dict()}


def weight_bytes(folder: Path) -> int:
    """Return the bytes of a directory's weights."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def choose(rows: Sequence[Row], options: TuneOptions) -> tuple[Row, bool]:
    """Choose by validation among what can be written: the dense model and the candidates; say whether it meets.

    A quality budget takes the fastest that reaches it. The others take the best within them; of those that are as good
    but for `EQUAL`, the fastest.
    """
    name, value = options.budget
    rows = [row for row in rows if row["us_median"] is not None and row["validation"] is not None]
    rows = [row for row in rows if row["kind"] != "static"]
    if name == "quality":
        meeting = [row for row in rows if row["validation"] >= value]
        if meeting:
            return min(meeting, key=lambda row: row["us_median"]), True
        return max(rows, key=lambda row: row["validation"]), False
    measure = _measure(name)
    meeting = [row for row in rows if measure(row) <= value]
    if not meeting:
        return min(rows, key=measure), False
    best = max(row["validation"] for row in meeting)
    return min((r for r in meeting if r["validation"] >= best - EQUAL), key=lambda r: r["us_median"]), True


def _measure(budget: str) -> Any:
    if budget == "latency_ms":
        return lambda row: row["us_median"] / 1e3
    return lambda row: math.inf if row["bytes"] is None else row["bytes"] / 1e6


def is_rival(candidate: Candidate) -> bool:
    """Say whether a candidate is no more than fewer layers, or narrow FFNs everywhere."""
    kinds = set(candidate.ffns)
    return not candidate.tables and len(kinds) == 1 and (kinds == {DENSE} or min(kinds).startswith("narrow"))


def on_front(rows: Sequence[Row]) -> list[str]:
    """Name the rows that no other beats in both, time and agreement."""
    whole = [row for row in rows if row["us_median"] is not None and row["agreement"] is not None]

    def beaten(row: Row) -> bool:
        return any(
            other["us_median"] <= row["us_median"]
            and other["agreement"]["value"] >= row["agreement"]["value"]
            and (other["us_median"], -other["agreement"]["value"]) != (row["us_median"], -row["agreement"]["value"])
            for other in whole
        )

    return [row["name"] for row in sorted(whole, key=lambda row: row["us_median"]) if not beaten(row)]


def clear_of_rivals(rows: Sequence[Row]) -> list[str]:
    """Name our candidates that every rival of equal or lower time misses by more than the intervals of agreement."""
    whole = [row for row in rows if row["us_median"] is not None and row["agreement"] is not None]
    ours = [row for row in whole if row["kind"] == "candidate" and not row.get("rival_form")]
    found = []
    for row in ours:
        faster = [other for other in whole if other not in ours and other["us_median"] <= row["us_median"]]
        if faster and all(other["agreement"]["high"] < row["agreement"]["low"] for other in faster):
            found.append(row["name"])
    return found


def verdict(rows: Sequence[Row], chosen: Row, met: bool, options: TuneOptions) -> str:
    """Say in a sentence or two what came out."""
    shape = f"{options.shape[0]}x{options.shape[1]}"
    figures = f"{chosen['us_median'] / 1e3:.3g} ms at {shape} in {chosen['engine']}"
    if chosen["agreement"] is not None:
        low, high = chosen["agreement"]["low"], chosen["agreement"]["high"]
        figures += f", agreement {chosen['agreement']['value']:.4f} ({low:.4f} to {high:.4f})"
    if not met:
        return f"Nothing meets {options.budget_words}: the nearest is {chosen['name']} ({figures})."
    if chosen["kind"] == "dense":
        ours = [r for r in rows if r["kind"] == "candidate" and r["us_median"] is not None]
        faster = [r for r in ours if r["us_median"] < chosen["us_median"]]
        why = "it meets the budget as it is" if not ours else "no candidate that meets the budget is better"
        if options.quality is not None and ours:
            why = "no faster candidate reaches the budget" if faster else "no candidate is faster"
        return f"Staying dense is the answer to {options.budget_words}: {figures}; {why}."
    dense = [r for r in rows if r["kind"] == "dense" and r["us_median"] is not None]
    fastest = min(dense, key=lambda r: r["us_median"]) if dense else None
    beside = ""
    if fastest is not None:
        beside = f" It is {fastest['us_median'] / chosen['us_median']:.2f}x as fast as {fastest['name']}."
    return f"{chosen['name']} meets {options.budget_words}: {figures}.{beside}"
