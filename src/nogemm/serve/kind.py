"""What a model's files are: a sentence encoder, a reranker or a decoder, and who runs it.

Reading order: `Kind`, `kind_of`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nogemm.errors import ConfigError
from nogemm.export.folder import RECORD, read_record
from nogemm.files import parse_json
from nogemm.models.directory import model_directory, sentence_modules, transformer_directory
from nogemm.models.loading import is_gguf

_DECODERS = ("ForCausalLM", "LMHeadModel")


@dataclass(frozen=True, kw_only=True)
class Kind:
    """What is served.

    Attributes:
        task: "embed", "rerank" or "generate".
        engine: "torch", or "openvino" for an export.
        folder: of the files, or the GGUF file.
        record: what an export says of itself.
    """

    task: str
    engine: str
    folder: str
    record: dict[str, Any]


def kind_of(model: str, task: str = "auto") -> Kind:
    """Read off a model's files what it is.

    Raises:
        ConfigError: there is no model, or it does not do `task`.
        CheckpointError: the record of an export is damaged.
    """
    found = _kind(model, task)
    if task not in ("auto", found.task):
        raise ConfigError(f"serve: --task {task}: {model} is a model to {found.task}")
    return found


def _kind(model: str, task: str) -> Kind:
    if is_gguf(model):
        if not Path(model).is_file():
            raise ConfigError(f"{model}: there is no such file")
        return Kind(task="generate", engine="torch", folder=model, record={})
    if (Path(model) / RECORD).is_file():
        return _exported(model)
    root = model_directory(model)
    names = _architectures(transformer_directory(root))
    if sentence_modules(root) or task == "embed":
        found = "embed"
    elif names[0].endswith("ForSequenceClassification"):
        found = "rerank"
    else:
        found = "generate" if names[0].endswith(_DECODERS) else "embed"
    return Kind(task=found, engine="torch", folder=root, record={})


@contextmanager
def own_code_refused(model: str) -> Iterator[None]:
    """Say of a model that brings its own code that a server does not run it, whatever other commands allow."""
    try:
        yield
    except ConfigError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise ConfigError(f"{model}: the model runs code of its own directory, which a server does not") from error


def _exported(model: str) -> Kind:
    record = read_record(Path(model))
    if "head" in record:
        task = "generate"
    elif record.get("output") == "last_hidden_state":
        task = "embed"
    elif _architectures(model)[0].endswith("ForSequenceClassification"):
        task = "rerank"
    else:
        raise ConfigError(
            f"serve: {model} gives logits of every token; a server takes exports of encoders, of rerankers, and of "
            "decoders by --generate"
        )
    return Kind(task=task, engine="openvino", folder=model, record=record)


def _architectures(folder: str) -> list[str]:
    try:
        config = parse_json((Path(folder) / "config.json").read_text(encoding="utf-8"))
        return [str(name) for name in config.get("architectures") or [""]]
    except (OSError, ValueError, AttributeError) as error:
        raise ConfigError(f"{folder}: config.json is no model's ({error})") from error
