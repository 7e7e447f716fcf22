"""The model that a run trains: a classifier, a regressor or a sentence encoder, its FFNs converted or dense.

Reading order: `Prepared`, `prepare`, `classifier`, `encoder`, `make_groups`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from nogemm.convert import converted, decompress
from nogemm.convert.sites import installed
from nogemm.errors import ConfigError, PackedError
from nogemm.layers import PackedFFN
from nogemm.models.directory import model_directory, sentence_modules, transformer_directory
from nogemm.models.loading import has_classifier, load_model, load_tokenizer, load_with_new_head
from nogemm.models.texts import longest_text, prepare_tokenizer
from nogemm.train.loop.updates import all_groups, with_rates
from nogemm.train.task.data import Examples, Labels
from nogemm.train.task.options import FinetuneOptions

EMBEDDING = "sentence_embedding"
NEW_HEAD = 'head="new" (--option head=new) gives it a new one'


@dataclass(frozen=True)
class Prepared:
    """What a run trains.

    Attributes:
        model: a transformers model with a classification head, or a SentenceTransformer.
        tokenizer: the model's.
        labels: the classes; None where there are none.
        fresh: whether the head was drawn.
        max_length: of a text in tokens.
    """

    model: Any
    tokenizer: Any
    labels: Labels | None
    fresh: bool
    max_length: int


def prepare(
    options: FinetuneOptions,
    source: nn.Module | str | Path,
    tokenizer: Any,
    examples: Mapping[str, Examples],
    *,
    trust_remote_code: bool = False,
) -> Prepared:
    """Load the model, or take the one that is given, and see to it that its head fits the data.

    Raises:
        ConfigError: no model there, one of another task, or a head of other labels.
        CheckpointError: the files lack weights. PackedError: the model is packed.
        DataError: rows with one label alone.
    """
    if options.task == "embed":
        model = encoder(options, source, trust_remote_code)
        labels, fresh, tokenizer = None, False, prepare_tokenizer(tokenizer or model.tokenizer)
        own = model.max_seq_length
    else:
        if tokenizer is None:
            name = getattr(source.config, "_name_or_path", "") if isinstance(source, nn.Module) else source
            if not name:
                raise ConfigError("finetune: the model does not say where it was loaded from: give its tokenizer")
            tokenizer = load_tokenizer(name, trust_remote_code=trust_remote_code)
        model, labels, fresh = classifier(options, source, examples, trust_remote_code)
        prepare_tokenizer(tokenizer, model)
        own = None
    if any(isinstance(layer, PackedFFN) for layer in installed(model).values()):
        raise PackedError("finetune: the model is packed, for evaluation only; load it unpacked, or unpack it first")
    if any(layer.storage not in (None, "fp32") for layer in converted(model).values()):
        decompress(model)  # compressed tables are no parameters; what was rounded stays rounded
    limit = longest_text(options.max_length, tokenizer, model)
    return Prepared(model, tokenizer, labels, fresh, min(limit, own or limit))


def classifier(
    options: FinetuneOptions, source: nn.Module | str | Path, examples: Mapping[str, Examples], trusted: bool
) -> tuple[Any, Labels | None, bool]:
    """Return a model with a classification head, its classes, and whether the head was drawn."""
    rows, regress = examples["train"], options.task == "regress"
    module = isinstance(source, nn.Module)
    if module and options.head == "new":
        raise ConfigError('finetune: head="new" needs a directory or a name; a module brings its own head')
    if module or (options.head == "auto" and has_classifier(source, trust_remote_code=trusted)):
        model: Any = (
            source if module else load_model(source, "classify", dtype=torch.float32, trust_remote_code=trusted)
        )
        if not hasattr(getattr(model, "config", None), "num_labels") or not _has_head(model):
            raise ConfigError(
                f"finetune: {type(model).__name__} has no classification head: give its directory, or load it with "
                "AutoModelForSequenceClassification"
            )
        labels = _fitted(model, rows, regress)
        fresh = False
    else:
        labels = None if regress else Labels.of(rows)
        assert not isinstance(source, nn.Module)
        settings = {"num_labels": 1 if labels is None else len(labels.names)}
        model = load_with_new_head(source, settings, seed=options.seed, trust_remote_code=trusted)
        fresh = True
        if regress:
            _start_at(model, float(np.mean(np.array(rows.labels, np.float64))))
    if labels is not None:
        model.config.id2label = dict(enumerate(labels.names))
        model.config.label2id = {name: number for number, name in enumerate(labels.names)}
    model.config.problem_type = "regression" if regress else "single_label_classification"
    return model, labels, fresh


def encoder(options: FinetuneOptions, source: nn.Module | str | Path, trusted: bool) -> Any:
    """Return a SentenceTransformer: the one that is given, that of a directory, or a model with a pooling.

    Raises:
        ConfigError: a module of another class, or a pooling for a directory that has one of its own.
    """
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    if isinstance(source, nn.Module):
        if not isinstance(source, SentenceTransformer):
            raise ConfigError(
                f'finetune: task="embed" trains a SentenceTransformer or a directory, got a {type(source).__name__}'
            )
        return source
    root = model_directory(source)
    if sentence_modules(root):
        if options.pooling is not None:
            raise ConfigError(
                f"finetune: {source} says itself how embeddings are pooled (modules.json); leave out "
                f"pooling={options.pooling!r}"
            )
        return SentenceTransformer(root, device="cpu", local_files_only=True, trust_remote_code=trusted).float()
    common = {"local_files_only": True, "trust_remote_code": trusted}
    base = Transformer(
        transformer_directory(root),
        model_kwargs={**common, "dtype": torch.float32}, processor_kwargs=dict(common), config_kwargs=dict(common),
    )  # fmt: skip
    pooling = Pooling(base.get_embedding_dimension(), pooling_mode=options.pooling or "mean")  # type: ignore[arg-type]
    return SentenceTransformer(modules=[base, pooling], device="cpu", local_files_only=True)


def make_groups(model: nn.Module, options: FinetuneOptions) -> dict[str, list[nn.Parameter]]:
    """Sort what is trained: "projection", "tables" and "other" of the converted FFNs, "head", and "backbone".

    Parameters that are frozen and groups with a rate of 0 are left out.
    """
    inside = {id(parameter) for parameter in getattr(model, "base_model", model).parameters()}
    groups = all_groups(model)
    rest = groups.pop("backbone", [])
    groups["head"] = [parameter for parameter in rest if id(parameter) not in inside]
    groups["backbone"] = [parameter for parameter in rest if id(parameter) in inside]
    return with_rates(groups, options)


def _has_head(model: Any) -> bool:
    base = {id(parameter) for parameter in model.base_model.parameters()}
    return any(id(parameter) not in base for parameter in model.parameters())


def _fitted(model: Any, rows: Examples, regress: bool) -> Labels | None:
    """Return the classes of a head that is there, if it is one for the data."""
    count = int(model.config.num_labels)
    if regress and count != 1:
        raise ConfigError(
            f"finetune: the model's head has {count} classes, and task='regress' wants one number. {NEW_HEAD}"
        )
    if regress:
        return None
    if count < 2:
        raise ConfigError(f"finetune: the model's head gives one number, and the rows have labels. {NEW_HEAD}")
    return Labels.of_model(model.config, rows)


def _start_at(model: Any, mean: float) -> None:
    """Let a fresh head of one number answer the mean of the rows at first, which may be far from zero."""
    base = {id(module) for module in model.base_model.modules()}
    linear = [m for m in model.modules() if isinstance(m, nn.Linear) and m.out_features == 1 and id(m) not in base]
    if linear and linear[-1].bias is not None:
        nn.init.constant_(linear[-1].bias, mean)
