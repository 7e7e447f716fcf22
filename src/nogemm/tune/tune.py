"""Search the model that meets a budget: fewer layers, other FFNs, token tables, engines.

Cheap evidence comes before training.
Reading order: `tune`, `_searched`; the stages are in `stages.py`, `training.py` and `finish.py`.
"""

from __future__ import annotations

import importlib.util
import shutil
import tempfile
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from nogemm.bench.engine.result import origin
from nogemm.errors import ConfigError, NogemmError
from nogemm.files import disk_is_full
from nogemm.models.directory import model_directory
from nogemm.models.loading import load_encoder, load_tokenizer
from nogemm.models.pooling import pooling_of
from nogemm.models.texts import longest_text
from nogemm.running.partial import Terminated
from nogemm.train import checkpoint as ckpt
from nogemm.train.errors import TrainingError, TrainingInterrupted
from nogemm.train.guards import evaluation_mode
from nogemm.train.identity import model_identity
from nogemm.train.sources import describe
from nogemm.tune import stages, training
from nogemm.tune.evidence import QualityModel, judge_of, stored_bytes
from nogemm.tune.finish import choose, clear_of_rivals, measured, on_front, verdict
from nogemm.tune.ledger import Ledger, begin
from nogemm.tune.offers import OFFERS
from nogemm.tune.options import TuneOptions, tune_options
from nogemm.tune.report import Tuned, TuneReport
from nogemm.tune.space import candidate_of, space_of
from nogemm.tune.state import Note, Search
from nogemm.tune.texts import Texts, split_texts

FREE = frozenset({"max_seconds"})
"""An option that may change when a search is resumed."""
CHARACTERS = 4  # of a token, about: how many texts hold the tokens of a fit


def tune(
    model: str | Path,
    data: str | Path | Iterable[Any] = "sample",
    *,
    output_dir: str | Path | None = None,
    resume: bool = False,
    options: TuneOptions | None = None,
    note: Note | None = None,
    keep: Callable[[dict[str, Any]], None] | None = None,
    **changes: Any,
) -> Tuned:
    """Search, among models made of a dense encoder, the one that meets a budget of quality, latency or memory.

    A candidate keeps some layers, has in each of them the dense FFN or one of `offers`, perhaps a token table beside
    it, and runs in an engine. Untrained candidates are judged by closed-form fits, and timed as whole models that
    differ in one part; both add up to a guess for every candidate. A few are distilled for a short time, the winner
    and its rivals in full. Everything measured is verified first. Where the dense model meets the budget best, it is
    the answer.

    Args:
        model: directory of a dense encoder, or a name in the local cache. Decoders are not searched.
        data: "sample", a text, JSONL or CSV file, a `datasets` dataset, or a list of texts like those to be served.
            Texts are held out of it: some choose, others are tested once.
        output_dir: of the run; without it nothing can be resumed.
        resume: go on with the search in `output_dir`, if there is one.
        options, changes: `TuneOptions`, or single fields of it as keywords; one budget is needed: `quality`
            (agreement), `latency_ms` or `memory_mb`.
        note: takes lines of progress.
        keep: takes the results so far, as they grow.
    Returns:
        Tuned(model, tokenizer, report): the chosen model, trained, or the dense one.
    Raises:
        ConfigError: no model, a decoder, no FFN that can be replaced, no or several budgets, one that nothing can meet
            (the message names the nearest), or an engine that is absent.
        DataError: no text, or fewer than 40 different ones.
        TrainingError: a directory in use or with an earlier search, another model, data or budget than the search began
            with, or no room on the disk.
        TrainingInterrupted: Ctrl-C; what was found stays in `output_dir`, and the message says how to go on.
    Example:
        >>> found = nogemm.tune("all-MiniLM-L6-v2", "texts.txt", latency_ms=2.0)  # doctest: +SKIP
    """
    if options is not None and changes:
        raise ConfigError("tune: give options, or single options, not both")
    options = options or tune_options(**changes)
    if importlib.util.find_spec("transformers") is None:
        raise ConfigError("tune needs transformers: pip install 'nogemm[train]'")
    dense = model_directory(model)
    scratch = Path(tempfile.mkdtemp(prefix="nogemm-tune-")) if output_dir is None else None
    folder = Path(output_dir) if output_dir is not None else scratch
    assert folder is not None
    try:
        with ckpt.Lock(folder), _told(folder, scratch is None):
            search = _opened(folder, dense, data, options, resume, note or (lambda line: None))
            with evaluation_mode(search.teacher):
                return _searched(search, str(model), describe(data), keep or (lambda result: None))
    finally:
        if scratch is not None:
            shutil.rmtree(scratch, ignore_errors=True)


def _opened(folder: Path, dense: str, data: Any, options: TuneOptions, resume: bool, note: Note) -> Search:
    """Load the dense model, read the texts, and see that an earlier search was the same."""
    note("reading the texts")
    texts = split_texts(data, options.field, validation=options.validation_texts, test=options.test_texts)
    note("loading the dense model")
    teacher, tokenizer = load_encoder(dense), load_tokenizer(dense)
    _check_encoder(dense, teacher, tokenizer, options)
    space = space_of(teacher, tokenizer, _for_fits(texts, options), options.offered() or OFFERS, seed=options.seed)
    name, value = options.budget
    kept = {key: item for key, item in options.to_dict().items() if key not in FREE and item is not None}
    settings = {
        "model": model_identity(dense),
        "data": texts.to_dict(),
        "budget": {name: value},
        "options": {key: item for key, item in kept.items() if key != name},
    }
    begin(folder, settings, resume)
    pooling = pooling_of(dense)
    judge = judge_of(teacher, tokenizer, texts.validation[: options.evidence_texts], pooling)
    ledger = Ledger(folder, options.max_seconds)
    return Search(folder, dense, options, texts, pooling, space, ledger, judge, note, space.notes)


def _check_encoder(dense: str, teacher: Any, tokenizer: Any, options: TuneOptions) -> None:
    """Raise ConfigError for a decoder, and for a call that the model cannot take."""
    names = " ".join(getattr(teacher.config, "architectures", None) or [])
    if "CausalLM" in names or "ConditionalGeneration" in names or "LMHead" in names or _decodes(teacher.config):
        raise ConfigError(
            f"tune: {Path(dense).name} is a {names or type(teacher).__name__}, and tune searches encoders alone: "
            "quality is the agreement of embeddings"
        )
    most = longest_text(options.shape[1], tokenizer, teacher)
    if most < options.shape[1]:
        raise ConfigError(f"tune: shape {options.shape}: the model takes texts of {most} tokens at most")


def _decodes(config: Any) -> bool:
    return bool(getattr(config, "is_decoder", False) or getattr(config, "is_encoder_decoder", False))


def _for_fits(texts: Texts, options: TuneOptions) -> list[str]:
    """Return as many training texts as hold about the tokens of a fit."""
    found: list[str] = []
    characters = 0
    for text in texts.train:
        found.append(text)
        characters += len(text)
        if characters >= CHARACTERS * options.fit_tokens:
            break
    return found


def _searched(search: Search, model: str, data: str, keep: Callable[[dict[str, Any]], None]) -> Tuned:
    """Do what is left of the search, and report."""
    dense, engines = stages.race(search)
    quality = QualityModel([], {})
    known = stages.Known(dense, engines, {"offers": {}}, quality, {}, {}, {})
    head = origin({"model": Path(model).name, "data": Path(data).name, **search.options.to_dict()})
    keep({**head, "dense": dense})
    runs: list[training.Run] = []
    winner, against = None, {}
    if not _dense_meets(search, dense):
        known.evidence, known.quality = stages.evidence(search)
        keep({**head, "dense": dense, "evidence": known.evidence})
        known.latency = stages.latencies(search, engines)
        stages.refuse_what_nothing_meets(search, known)
        stages.whole_candidates(search, known)
        keep({**head, "dense": dense, "evidence": known.evidence, "checks": _checks(known, [])})
        runs = training.short_runs(search, known)
        if runs:
            winner, against = training.full_runs(search, known, runs)
    rows = measured(search, known, winner, against, runs)
    chosen, met = choose(rows, search.options)
    report = _report(search, known, head, rows, chosen, met, runs)
    return Tuned(_chosen_model(search, chosen), search.space.tokenizer, report)


def _dense_meets(search: Search, dense: dict[str, Any]) -> bool:
    """Say whether the dense model is within a latency or memory budget: nothing agrees with it better."""
    name, value = search.options.budget
    times = [row["us_median"] / 1e3 for row in dense.values() if row.get("us_median") is not None]
    if name == "latency_ms":
        return bool(times) and min(times) <= value
    return name == "memory_mb" and stored_bytes(search.teacher) / 1e6 <= value


def _chosen_model(search: Search, chosen: dict[str, Any]) -> Any:
    if chosen["candidate"] is None:
        return search.teacher
    return load_encoder(search.model_folder(candidate_of(chosen["candidate"]), chosen["tokens"]))


def _checks(known: stages.Known, rows: list[dict[str, Any]]) -> dict[str, Any]:
    final = [
        {"candidate": r["name"], "predicted_us": r["predicted_us"], "us": r["us_median"], "error": error}
        for r in rows
        if r.get("predicted_us") and r["us_median"] and (error := r["predicted_us"] / r["us_median"] - 1) is not None
    ]
    worst = max((abs(row["error"]) for row in final), default=None)
    return {"quality": known.quality_check, "latency": known.latency_check, "final": {"rows": final, "worst": worst}}


def _report(
    search: Search,
    known: stages.Known,
    head: dict[str, Any],
    rows: list[dict[str, Any]],
    chosen: dict[str, Any],
    met: bool,
    runs: list[training.Run],
) -> TuneReport:
    name, value = search.options.budget
    space = search.space
    search.ledger.note_time("final")
    return TuneReport(
        verdict=verdict(rows, chosen, met, search.options),
        chosen=chosen["name"],
        met=met,
        stay_dense=met and chosen["kind"] == "dense",
        budget={"name": name, "value": value},
        shape=search.options.shape,
        front=on_front(rows),
        clear=clear_of_rivals(rows),
        rows=rows,
        space={
            "layers": space.depth,
            "offers": {key: next(iter(table.values())).to_dict() for key, table in space.offers.items()},
            "engines": known.engines,
            "size": float(space.size(len(known.engines))),
        },
        evidence=known.evidence,
        latency={engine: found.to_dict() for engine, found in known.latency.items()},
        checks=_checks(known, rows),
        short=training.as_rows(runs),
        factors=known.quality.to_dict(),
        texts=search.texts.to_dict(),
        seconds=search.ledger.stages,
        notes=list(dict.fromkeys(search.notes)),
        origin=head,
    )


@contextmanager
def _told(folder: Path, kept: bool) -> Any:
    """Say how to go on where a search is stopped, or the disk is full."""
    how = (
        f"what was found is in {folder}. Call it again with the same arguments and resume=True (--resume on the "
        "command line) to go on"
        if kept
        else "nothing is kept because no output_dir was given"
    )
    try:
        yield
    except KeyboardInterrupt as stop:
        kind = Terminated if isinstance(stop, Terminated) else TrainingInterrupted
        raise kind(f"tune was interrupted; {how}") from stop
    except (OSError, SafetensorError, NogemmError) as error:
        if not disk_is_full(error):
            raise
        raise TrainingError(f"tune: no room to write: {error}; {how}, once there is room") from error
