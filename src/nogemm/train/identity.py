"""What token files depend on, told apart by content: data that was corrected under the same name is other data."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from nogemm.models.directory import model_directory, transformer_directory
from nogemm.train.reader import SAMPLE, sample_file
from nogemm.train.sources import describe

WHOLE = 2**28
"""Bytes up to which a file is hashed whole, well under a second; it may then be copied or touched."""
END = 2**20
"""Bytes hashed at either end of a larger file, whose size and time of change count, too."""


def data_identity(data: Any, rows: Callable[[], Iterable[Any]]) -> dict[str, Any]:
    """Return JSON values that differ where the data differs.

    A file goes by its content, a list or tuple by what `rows` reads from it, a `datasets` dataset by its own
    fingerprint. Any other iterable can be read once only and goes by its type.
    """
    name = describe(data)
    if data == SAMPLE and isinstance(data, str):
        with sample_file() as path:
            return {"data": name, "content": file_identity(path)}
    if isinstance(data, (str, Path)):
        # A missing file is the reader's to report.
        return {"data": name, "content": file_identity(Path(data)) if Path(data).is_file() else {}}
    if isinstance(data, (list, tuple)):
        digest = hashlib.sha256()
        for row in rows():
            digest.update(json.dumps(row).encode())
        return {"data": name, "content": {"sha256": digest.hexdigest()}}
    return {"data": name, "content": {}}


def file_identity(path: Path, whole: int = WHOLE, end: int = END) -> dict[str, Any]:
    """Return a file's size and hash; of one larger than `whole`, its time of change and the hash of its ends."""
    status = path.stat()
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        if status.st_size <= whole:
            while part := file.read(END):
                digest.update(part)
            return {"bytes": status.st_size, "sha256": digest.hexdigest()}
        digest.update(file.read(end))
        file.seek(-end, 2)
        digest.update(file.read(end))
    return {"bytes": status.st_size, "changed_ns": status.st_mtime_ns, "sha256_of_ends": digest.hexdigest()}


def model_identity(model: str | Path) -> dict[str, Any]:
    """Return {file: identity} of the weights and settings in a stored model's directory.

    Raises:
        ConfigError: there is no model.
    """
    folder = Path(transformer_directory(model_directory(model)))
    files = sorted(file for file in folder.iterdir() if file.suffix in (".safetensors", ".bin", ".json"))
    return {file.name: file_identity(file) for file in files if file.stat().st_size}


def tokenizer_identity(tokenizer: Any) -> dict[str, Any]:
    """Return JSON values that differ where two tokenizers may give other tokens; other tokenizers go by class and size.

    What a call leaves behind in a tokenizer (how it last cut and padded) does not count.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    parts: list[Any] = [getattr(tokenizer, "truncation_side", None)]
    if backend is not None:
        content = json.loads(backend.to_str())
        parts.append({name: value for name, value in content.items() if name not in ("truncation", "padding")})
    elif hasattr(tokenizer, "get_vocab"):
        parts += [tokenizer.get_vocab(), list(getattr(tokenizer, "all_special_ids", ()))]
        files = [getattr(tokenizer, name, None) for name in getattr(tokenizer, "vocab_files_names", ())]
        parts += [file_identity(Path(file)) for file in files if file and Path(file).is_file()]
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode())
    return {"class": type(tokenizer).__name__, "vocabulary": len(tokenizer), "sha256": digest.hexdigest()}
