"""`nogemm eval`: the quality of a model beside its teacher's, every figure with its interval.

Reading order: `EvalArgs`, `run_eval`, `evaluate` (search), the masked-token and label tasks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from nogemm.bench.engine.result import origin
from nogemm.bench.quality.scores import Figure, bootstrap_difference, bootstrap_mean, bootstrap_ratio, compare_search
from nogemm.convert.pack import pack
from nogemm.errors import ConfigError
from nogemm.layers import PACK_DTYPES
from nogemm.models.embed import MAX_LENGTH, embed, logits, masked_losses
from nogemm.models.loading import load_encoder, load_model, load_tokenizer
from nogemm.models.pooling import pooling_of
from nogemm.running.partial import Keep
from nogemm.train.sources import load_labels, load_split, texts

if TYPE_CHECKING:
    from nogemm.train.sources import Labelled

Note = Callable[[str], None]
TASKS = ("search", "mlm", "classify")


@dataclass(frozen=True, kw_only=True)
class EvalArgs:
    """Say what is evaluated.

    Attributes:
        model, teacher: directories of transformers models; without a teacher the model's own figures alone are given
            ("search" needs one: agreement is measured against it).
        task: "search" (pairs), "mlm" (texts), "classify" (rows with "text" and "label").
        data: "sample", or a JSONL or CSV file; for "mlm" also a text file with one text a line (each also .gz).
        split: of the data, where it has splits.
        limit: at most so many pairs, texts or rows; 0 means all.
        pack: evaluate the packed model, "fp32", "bf16" or "int8"; None as it is.
        max_length: tokens per text.
        seed: of the resampling and of the masks.
        trust_remote_code: run the code that a directory brings for its model.
    """

    model: str
    teacher: str | None = None
    task: str = "search"
    data: str = "sample"
    split: str = "test"
    limit: int = 0
    pack: str | None = None
    max_length: int = MAX_LENGTH
    seed: int = 0
    trust_remote_code: bool = False


def run_eval(args: EvalArgs, *, note: Note | None = None, keep: Keep | None = None) -> dict[str, Any]:
    """Evaluate a model directory against its teacher's; `keep` gets the result as it grows.

    Returns:
        `origin` and {"samples", "teacher": {figure}, "ours": {figure}, "kept" or
        "difference"}; a figure is {"value", "low", "high", "samples"}.
    Raises:
        ConfigError: an unknown task, no teacher for a search, a directory without a model, or one class for labels.
        DataError: a file, a row or a label that does not fit; the message names file, line and field.
        ValueError: a non-finite embedding or loss.
    """
    if args.task not in TASKS:
        raise ConfigError(f"--task must be one of {', '.join(TASKS)}, got {args.task!r}")
    if args.limit < 0:
        raise ConfigError(f"--limit must be at least 0 (all), got {args.limit}")
    if args.max_length < 1:
        raise ConfigError(f"--max-length must be at least 1, got {args.max_length}")
    if args.pack not in (None, *PACK_DTYPES):
        raise ConfigError(f"--pack must be one of {', '.join(PACK_DTYPES)}, got {args.pack!r}")
    run = {"search": _search, "mlm": _mlm, "classify": _classify}[args.task]
    head = origin(asdict(args))

    def kept(found: dict[str, Any]) -> None:
        if keep is not None:
            keep(head | found)

    kept({"samples": 0})
    return head | run(args, note or (lambda line: None), kept)


def evaluate(
    model: nn.Module | str | Path,
    teacher: nn.Module | str | Path,
    pairs: Sequence[tuple[str, str]],
    *,
    tokenizer: Any = None,
    max_length: int = MAX_LENGTH,
    seed: int = 0,
    note: Note | None = None,
) -> dict[str, Any]:
    """Search the pairs' documents by their queries with model and teacher, and compare.

    Each is pooled as its own `modules.json` says; one without takes the other's, and without either it is the mean.

    Args:
        model, teacher: modules or directories; equal texts go to both, through the teacher's tokenizer.
        pairs: (query, document); document i is the right one for query i.
        tokenizer: needed if the teacher is a module.
    Returns:
        {"samples", "teacher": {"mrr_at_10", "recall_at_10"}, "ours": the same with "agreement" and
        "old_index_mrr_at_10", "kept": ours / teacher's}, every figure as {"value", "low", "high", "samples"}.
    Raises:
        ConfigError: no tokenizer. ValueError: no pair, or a non-finite embedding.
    """
    if tokenizer is None:
        if isinstance(teacher, nn.Module):
            raise ConfigError("evaluate: give the tokenizer when the teacher is a module")
        tokenizer = load_tokenizer(teacher)
    poolings = pooling_of(teacher, model), pooling_of(model, teacher)
    texts = [query for query, _ in pairs] + [document for _, document in pairs]
    found: list[NDArray[np.float32]] = []
    for whose, source, pooling in zip(("the teacher", "ours"), (teacher, model), poolings, strict=True):
        loaded = source if isinstance(source, nn.Module) else load_encoder(source)
        told = _progress(note, f"embedding with {whose}")
        found.append(embed(loaded, tokenizer, texts, pooling=pooling, max_length=max_length, progress=told))
        del loaded
    theirs, ours = found
    count = len(pairs)
    figures = compare_search(ours[:count], ours[count:], theirs[:count], theirs[count:], seed=seed)
    return {"samples": count} | {group: _plain(figures[group]) for group in ("teacher", "ours", "kept")}


def _search(args: EvalArgs, note: Note, keep: Keep) -> dict[str, Any]:
    if args.teacher is None:
        raise ConfigError("--task search compares with the dense teacher: give --teacher DIRECTORY")
    split = load_split(args.data, args.split)
    pairs = list(zip(split.queries, split.documents, strict=True))[: args.limit or None]
    keep({"samples": len(pairs)})  # no figure is known before both have embedded everything
    return evaluate(
        _packed(_load(args, args.model, "search"), args.pack),
        _load(args, args.teacher, "search"),
        pairs,
        tokenizer=load_tokenizer(args.teacher, trust_remote_code=args.trust_remote_code),
        max_length=args.max_length,
        seed=args.seed,
        note=note,
    )


def _mlm(args: EvalArgs, note: Note, keep: Keep) -> dict[str, Any]:
    sample = list(texts(args.data, split=args.split))[: args.limit or None]
    found: dict[str, Any] = {"samples": len(sample)}
    sums: dict[str, tuple[NDArray[np.float64], NDArray[np.float64]]] = {}
    for whose, path in _both(args):
        model = _load(args, path, "mlm")
        sums[whose] = masked_losses(
            _packed(model, args.pack if whose == "ours" else None),
            load_tokenizer(args.teacher or args.model, trust_remote_code=args.trust_remote_code),
            sample,
            seed=args.seed,
            max_length=args.max_length,
            progress=_progress(note, f"masked tokens, {whose}"),
        )
        found[whose] = _plain({"mlm_loss": bootstrap_ratio(*sums[whose], seed=args.seed)})
        keep(dict(found))
    if "teacher" in sums:
        (ours, count), (theirs, _) = sums["ours"], sums["teacher"]
        found["difference"] = _plain({"mlm_loss": bootstrap_ratio(ours - theirs, count, seed=args.seed)})
    return found


def _classify(args: EvalArgs, note: Note, keep: Keep) -> dict[str, Any]:
    rows = load_labels(args.data, args.split)[: args.limit or None]
    found: dict[str, Any] = {"samples": len(rows)}
    right: dict[str, NDArray[np.bool_]] = {}
    for whose, path in _both(args):
        model = _load(args, path, "classify")
        labels = _class_ids(model, rows)  # before the minutes that the logits take
        score = logits(
            _packed(model, args.pack if whose == "ours" else None),
            load_tokenizer(path, trust_remote_code=args.trust_remote_code),
            [row.text for row in rows],
            max_length=args.max_length,
            progress=_progress(note, f"labels, {whose}"),
        )
        right[whose] = correct(score, labels)
        found[whose] = _plain({"accuracy": bootstrap_mean(right[whose], seed=args.seed)})
        keep(dict(found))
    if "teacher" in right:
        difference = bootstrap_difference(right["ours"], right["teacher"], seed=args.seed)
        found["difference"] = _plain({"accuracy": difference})
    return found


def correct(logits_NC: NDArray[np.floating], labels: Sequence[int]) -> NDArray[np.bool_]:
    """Say for each row whether its label alone has the largest logit: ties count against.

    Raises:
        ValueError: a logit is not finite, or rows and labels differ in number.
    """
    score = np.asarray(logits_NC)
    if not np.isfinite(score).all():
        raise ValueError(
            f"{int((~np.isfinite(score)).any(axis=1).sum())} of {len(score)} rows of logits are not finite"
        )
    if len(score) != len(labels):
        raise ValueError(f"{len(score)} rows of logits but {len(labels)} labels")
    mine = score[np.arange(len(score)), np.asarray(labels)]
    return (score >= mine[:, None]).sum(axis=1) == 1


def _class_ids(model: nn.Module, rows: Sequence[Labelled]) -> list[int]:
    config: Any = model.config
    classes = int(config.num_labels)
    if classes < 2:
        raise ConfigError(
            f"--task classify needs a model with two classes or more; {type(model).__name__} has {classes}"
        )
    return [row.class_of(classes, getattr(config, "label2id", None) or {}) for row in rows]


def _both(args: EvalArgs) -> list[tuple[str, str]]:
    teacher = [("teacher", args.teacher)] if args.teacher is not None else []
    return [*teacher, ("ours", args.model)]


def _load(args: EvalArgs, path: str, head: str) -> nn.Module:
    return load_model(path, head, dtype=torch.float32, trust_remote_code=args.trust_remote_code)


def _packed(model: nn.Module, dtype: str | None) -> nn.Module:
    if dtype is None:
        return model
    return pack(model, dtype)


def _progress(note: Note | None, what: str) -> Callable[[int, int], None] | None:
    return None if note is None else lambda done, total: note(f"{what}: {done} of {total} texts")


def _plain(figures: dict[str, Figure]) -> dict[str, dict[str, Any]]:
    return {name: figure.to_dict() for name, figure in figures.items()}
