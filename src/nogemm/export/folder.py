"""What lies beside an exported graph: config, tokenizer, our record, and how to load it all."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from nogemm.errors import CheckpointError
from nogemm.export.extension import LIBRARY
from nogemm.files import parse_json, write_json
from nogemm.models.directory import MODULES, copy_modules, find_directory, root_directory, sentence_modules
from nogemm.models.inner import inner_model

if TYPE_CHECKING:
    from nogemm.export.export import ExportReport

MODEL = "openvino_model.xml"
RECORD = "nogemm_export.json"
FORMAT = 1  # of the record and what it describes; a record without one has 1


def check_target(path: Path) -> None:
    """Refuse a directory that holds something else than an export."""
    if path.is_dir() and any(path.iterdir()) and not (path / RECORD).exists():
        raise CheckpointError(f"export: {path} holds something that is no export; give a new directory")


def describe_pooling(model: nn.Module, folder: Path) -> None:
    """Write how hidden states become an embedding, where sentence-transformers' files or the model itself say so.

    Args:
        model: as the caller gave it: a SentenceTransformer, or a transformers model, which remembers its directory.
    """
    inner = inner_model(model)
    if inner is model:
        source = find_directory(str(getattr(inner.config, "_name_or_path", "") or "."))
        if source is not None and sentence_modules(root := root_directory(source)):
            copy_modules(root, folder)
        return
    listed = []
    for index, (name, module) in enumerate(model.named_children()):
        place = f"{index}_{type(module).__name__}" if index else ""
        kind = f"{type(module).__module__}.{type(module).__name__}"
        listed.append({"idx": index, "name": name, "path": place, "type": kind})
        if index:
            (folder / place).mkdir()
            module.save(str(folder / place))  # type: ignore[operator]
    write_json(folder / MODULES, listed)
    limit = getattr(model, "max_seq_length", None)
    if isinstance(limit, int):
        write_json(folder / "sentence_bert_config.json", {"max_seq_length": limit})


def read_record(folder: Path) -> dict[str, Any]:
    """Return what an export says of itself; the files that it names are there.

    Raises:
        CheckpointError: there is no export, a later release has written it, or a file of it is missing or elsewhere.
    """
    try:
        record = parse_json((folder / RECORD).read_text(encoding="utf-8"))
        number = record.get("format", FORMAT)
        names = [record["model"], str(Path(record["model"]).with_suffix(".bin")), record["extension"]]
        elsewhere = [name for name in names if Path(name).name != name]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{folder}: {RECORD} is no record of an export ({error})") from error
    if isinstance(number, int) and number > FORMAT:
        raise CheckpointError(
            f"the export in {folder} has format {number}, this nogemm reads up to {FORMAT}: upgrade nogemm to run it"
        )
    if elsewhere:
        raise CheckpointError(f"{folder}: {RECORD} names {', '.join(elsewhere)}, outside of the folder")
    if absent := [name for name in names if not (folder / name).is_file()]:
        raise CheckpointError(f"{folder}: {', '.join(absent)} is missing")
    return record


def describe(model: nn.Module, tokenizer: Any, report: ExportReport, folder: Path) -> None:
    """Write config, tokenizer, record and README."""
    config = getattr(model, "config", None)
    if config is not None:
        config.save_pretrained(str(folder))
    if tokenizer is not None:
        tokenizer.save_pretrained(str(folder))
    write_json(folder / RECORD, asdict(report) | {"format": FORMAT, "model": MODEL, "extension": LIBRARY})
    text = _README.format(
        count=len(report.layers),
        dtype=report.dtype,
        rest="int8, calibrated by NNCF" if report.int8 else "float",
        library=LIBRARY,
        model=MODEL,
        feed=", ".join(f'"{name}": {_ARRAYS[name]}' for name in report.inputs),
        what="".join(f"`{name}` {_MEANINGS[name]}; " for name in report.inputs),
        output=report.output,
        openvino=report.versions["openvino"],
    )
    (folder / "README.md").write_text(text, encoding="utf-8")


_ARRAYS = {"input_ids": "ids", "attention_mask": "mask", "token_type_ids": "types"}
_MEANINGS = {
    "input_ids": "are the tokens",
    "attention_mask": "is 1 at tokens and 0 at padding",
    "token_type_ids": "are 0, and 1 in the second text of a pair",
}

_README = """# A model converted by nogemm, for OpenVINO

{count} feed-forward layers run as `nogemm.PackedFFN` ({dtype} rows), the rest is {rest}. No torch is needed:

```python
import openvino

core = openvino.Core()
core.add_extension("{library}")
model = core.compile_model("{model}", "CPU")
{output} = model({{{feed}}})["{output}"]
```

Inputs are int64 arrays [texts, tokens], all of them needed: {what}the tokenizer beside this file makes them.

In C++: `ov::Core core; core.add_extension("{library}"); core.compile_model("{model}", "CPU");`

`{library}` was built against OpenVINO {openvino} and serves that release. For another one, or another operating
system or processor family, take the library that this builds there:
`python -c "from nogemm.export import extension_path; print(extension_path())"`.
`NOGEMM_ISA` (scalar, avx2, avx512, ...) forces an instruction set.
"""
