"""`nogemm.export`: from a converted model to a directory that a host loads."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nogemm.convert.save import replace_directory
from nogemm.convert.sites import inner_model
from nogemm.errors import CheckpointError, ConfigError, NogemmError
from nogemm.export.extension import LIBRARY, extension_path
from nogemm.export.traced import HostModel, check_exportable, host_model
from nogemm.files import write_json

HOSTS = ("openvino",)
MODEL = "openvino_model.xml"
RECORD = "nogemm_export.json"
# Texts and tokens that activation ranges are chosen on, and that the file is compared with torch on.
_CALIBRATION_TEXTS = 64
_CALIBRATION_TOKENS = 128
_LEAST_COSINE = {False: 0.99, True: 0.8}


@dataclass(frozen=True, kw_only=True)
class ExportReport:
    """What was written.

    Attributes:
        to: the host.
        dtype: of the packed rows: "fp32", "bf16" or "int8".
        int8: whether the host computes the rest in int8.
        layers: names of the sites that run our operator.
        inputs, output: names of the model's tensors.
        cosine: mean cosine between the file's output vectors and the packed torch model's, on the calibration texts or
            on random tokens.
        weight_bytes: size of the weight file.
        versions: of nogemm and of the host's packages.
    """

    to: str
    dtype: str
    int8: bool
    layers: tuple[str, ...]
    inputs: tuple[str, ...]
    output: str
    cosine: float
    weight_bytes: int
    versions: dict[str, str]


def export(
    model: nn.Module,
    path: str | Path,
    *,
    to: str = "openvino",
    dtype: str = "fp32",
    int8: bool = False,
    tokenizer: Any = None,
    calibration: Sequence[str] | None = None,
) -> ExportReport:
    """Write a converted model as a directory that OpenVINO runs, FFNs by our kernels, the rest by its own.

    The directory holds openvino_model.xml and .bin, the extension library that the operator needs, the model's config,
    the tokenizer, nogemm_export.json and a README. Batch and length stay dynamic. Weights are portable: the packed
    layers are laid out alike for every instruction set, and the library picks the kernels when it is loaded. The file
    is run once and compared with the packed torch model before it takes its place; an export of the same path is
    replaced in one step.

    Args:
        model: a transformers model or SentenceTransformer that takes input_ids and attention_mask, converted, in
            evaluation mode; it is not changed. Layers: LookupFFN, TreeFFN, HireFFN, and sites
            left dense.
        path: directory to write; absent, empty, or an earlier export.
        to: the host, "openvino".
        dtype: of the packed rows, "fp32", "bf16" or "int8", as in `nogemm.pack`.
        int8: quantise the rest (attention, embeddings stay float) by NNCF on `calibration`.
        tokenizer: saved into the directory; needed with `int8`.
        calibration: texts like those the model will see; needed with `int8`, the first 64 are used.
    Returns:
        ExportReport.
    Raises:
        ConfigError: an unknown host or dtype, a layer that the host cannot run, int8 without texts.
        PackedError: training mode, or packed already.
        NativeError: openvino, nncf or a C++ compiler is absent; the message says what to install.
        CheckpointError: `path` holds something else, or writing failed; what was there is untouched.
    """
    if to not in HOSTS:
        raise ConfigError(f"export: to must be one of {', '.join(HOSTS)}, got to={to!r}")
    if int8 and (tokenizer is None or not calibration):
        raise ConfigError("export: int8=True is calibrated on texts: give tokenizer=... and calibration=[texts]")
    layers = check_exportable(model, dtype)
    _check_target(Path(path))
    from nogemm.export import openvino_host as host

    host.check_installed(int8)
    library = extension_path()
    traced = host_model(copy.deepcopy(inner_model(model)), dtype)
    samples = _samples(traced, tokenizer, calibration)
    graph = host.convert(traced, samples[0], library)
    if int8:
        graph = host.quantise(graph, samples)
    reports: list[ExportReport] = []

    def write(folder: Path) -> None:
        shutil.copyfile(library, folder / LIBRARY)
        host.save(graph, folder / MODEL)
        cosine = host.compare(folder / MODEL, folder / LIBRARY, traced, samples[0])
        _check_cosine(cosine, int8)
        report = ExportReport(
            to=to,
            dtype=dtype,
            int8=int8,
            layers=tuple(layers),
            inputs=traced.input_names,
            output=traced.output_name,
            cosine=cosine,
            weight_bytes=(folder / MODEL).with_suffix(".bin").stat().st_size,
            versions={name: version(name) for name in ("nogemm", "openvino", *(("nncf",) if int8 else ()))},
        )
        _describe(inner_model(model), tokenizer, report, folder)
        reports.append(report)

    needed = sum(value.numel() * value.element_size() for value in traced.state_dict().values())
    replace_directory(path, write, caller="export", needed=needed, carry_over=False)
    return reports[0]


def _check_target(path: Path) -> None:
    if path.is_dir() and any(path.iterdir()) and not (path / RECORD).exists():
        raise CheckpointError(f"export: {path} holds something that is no export; give a new directory")


def _samples(traced: HostModel, tokenizer: Any, texts: Sequence[str] | None) -> list[tuple[Tensor, ...]]:
    """Return batches of tokens: of the texts, or random ones."""
    if tokenizer is None or not texts:
        ids = torch.randint(0, traced.vocabulary, (2, 16), generator=torch.Generator().manual_seed(0))
        return [(ids, torch.ones_like(ids))]
    batches = []
    texts = list(texts[:_CALIBRATION_TEXTS])
    for start in range(0, len(texts), 8):
        found = tokenizer(
            texts[start : start + 8],
            padding=True,
            truncation=True,
            max_length=min(_CALIBRATION_TOKENS, traced.longest),
            return_tensors="pt",
        )
        batches.append((found["input_ids"], found["attention_mask"]))
    return batches


def _check_cosine(cosine: float, int8: bool) -> None:
    if not cosine >= _LEAST_COSINE[int8]:
        raise NogemmError(
            f"export: the file computes something else than the packed torch model (mean cosine {cosine:.4f}, needed "
            f"{_LEAST_COSINE[int8]}); nothing was written"
        )


def _describe(model: nn.Module, tokenizer: Any, report: ExportReport, folder: Path) -> None:
    """Write what belongs beside the graph: config, tokenizer, our record, and how to load it all."""
    config = getattr(model, "config", None)
    if config is not None:
        config.save_pretrained(str(folder))
    if tokenizer is not None:
        tokenizer.save_pretrained(str(folder))
    write_json(folder / RECORD, asdict(report) | {"model": MODEL, "extension": LIBRARY})
    rest = "int8, calibrated by NNCF" if report.int8 else "float"
    text = _README.format(
        count=len(report.layers),
        dtype=report.dtype,
        rest=rest,
        library=LIBRARY,
        model=MODEL,
        output=report.output,
        openvino=report.versions["openvino"],
    )
    (folder / "README.md").write_text(text, encoding="utf-8")


_README = """# A model converted by nogemm, for OpenVINO

{count} feed-forward layers run as `nogemm.PackedFFN` ({dtype} rows), the rest is {rest}. No torch is needed:

```python
import openvino

core = openvino.Core()
core.add_extension("{library}")
model = core.compile_model("{model}", "CPU")
hidden = model({{"input_ids": ids, "attention_mask": mask}})["{output}"]  # int64 arrays [texts, tokens]
```

In C++: `ov::Core core; core.add_extension("{library}"); core.compile_model("{model}", "CPU");`

`{library}` was built against OpenVINO {openvino} and serves that release. For another one, or another operating
system or processor family, take the library that this builds there:
`python -c "from nogemm.export import extension_path; print(extension_path())"`.
`NOGEMM_ISA` (scalar, avx2, avx512, ...) forces an instruction set.
"""
