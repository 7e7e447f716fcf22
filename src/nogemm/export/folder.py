"""What lies beside an exported graph: config, tokenizer, our record, and how to load it all."""

from __future__ import annotations

import struct
import zlib
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

MODEL, WEIGHTS = "openvino_model.xml", "openvino_model.bin"
RECORD = "nogemm_export.json"
FORMAT = 1  # of the record and what it describes; a record without one has 1
_PART = 1 << 24  # bytes that are read at once


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
        CheckpointError: there is no export, a later release has written it, or a file of it is missing, elsewhere or
            damaged.
    Cost: graph and weights are read once, for their checksums.
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
    known = record.get("checksums", {})  # an older export has none
    if not isinstance(known, dict) or not known.keys() <= set(names):
        raise CheckpointError(f"{folder}: {RECORD} is no record of an export (checksums of other files)")
    if damaged := [name for name, checksum in known.items() if _checksum(folder / name) != checksum]:
        raise CheckpointError(f"{folder}: {', '.join(damaged)} is damaged, or of another export: export again")
    if _is_cut(folder / record["extension"]):
        raise CheckpointError(f"{folder}: {record['extension']} is damaged, its end is missing: export again")
    return record


def write_record(folder: Path, facts: dict[str, Any]) -> None:
    """Write what an export says of itself, with checksums of its graph and weights, which are in the folder.

    The library has none: users put another one there, for another OpenVINO or processor family.
    """
    checksums = {name: _checksum(folder / name) for name in (MODEL, WEIGHTS)}
    own = {"format": FORMAT, "model": MODEL, "extension": LIBRARY, "checksums": checksums}
    write_json(folder / RECORD, facts | own)


def _checksum(path: Path) -> str:
    """Return the CRC-32 of a file's bytes, a second for a gigabyte."""
    found = 0
    with path.open("rb") as file:
        while part := file.read(_PART):
            found = zlib.crc32(part, found)
    return f"{found:08x}"


def _is_cut(library: Path) -> bool:
    """Say whether an ELF file ends before its table of sections, its last part: loading it would end the process."""
    with library.open("rb") as file:
        start = file.read(64)
    if start[:5] != b"\x7fELF\x02" or len(start) < 64:  # another kind of library, or none: OpenVINO says so
        return False
    (at,), (size, count) = struct.unpack_from("<Q", start, 40), struct.unpack_from("<HH", start, 58)
    return library.stat().st_size < at + size * count


def describe(model: nn.Module, tokenizer: Any, report: ExportReport, folder: Path) -> None:
    """Write config, tokenizer, record and README."""
    config = getattr(model, "config", None)
    if config is not None:
        config.save_pretrained(str(folder))
    if tokenizer is not None:
        tokenizer.save_pretrained(str(folder))
    write_record(folder, asdict(report))
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
