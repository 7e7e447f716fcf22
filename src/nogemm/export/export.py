"""`nogemm.export`: from a converted model to a directory that a host loads."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from nogemm.convert.save import replace_directory
from nogemm.errors import ConfigError
from nogemm.export import openvino_host as host
from nogemm.export.agreement import Agreement, check_agreement
from nogemm.export.extension import LIBRARY, extension_path
from nogemm.export.folder import MODEL, check_target, describe, describe_pooling
from nogemm.export.rest import Rest, choose_rest
from nogemm.export.samples import graph_inputs, random_batch, text_batches
from nogemm.export.traced import HostModel, check_exportable, host_model
from nogemm.models.inner import inner_model
from nogemm.models.texts import positions, prepare_tokenizer

HOSTS = ("openvino",)


@dataclass(frozen=True, kw_only=True)
class ExportReport:
    """What was written.

    Attributes:
        to: the host.
        dtype: of the packed rows: "fp32", "bf16" or "int8".
        int8: whether the host computes the rest in int8.
        reason: why it does, or does not.
        layers: names of the sites that run our operator.
        inputs, output: names of the model's tensors.
        positions: tokens that a text may have; None: the model does not say.
        cosine: mean agreement of the file's outputs with the packed torch model's, on calibration texts and pairs of
            them or on random tokens: their cosine, for vectors of one length (`nogemm.export.agreement`).
        worst: that of the text which agrees least.
        weight_bytes: size of the weight file.
        versions: of nogemm and of the host's packages.
    """

    to: str
    dtype: str
    int8: bool
    reason: str
    layers: tuple[str, ...]
    inputs: tuple[str, ...]
    output: str
    positions: int | None
    cosine: float
    worst: float
    weight_bytes: int
    versions: dict[str, str]


def export(
    model: nn.Module,
    path: str | Path,
    *,
    to: str = "openvino",
    dtype: str = "fp32",
    int8: bool | None = None,
    rest: str = "auto",
    tokenizer: Any = None,
    calibration: Sequence[str] | None = None,
) -> ExportReport:
    """Write a converted model as a directory that OpenVINO runs, FFNs by our kernels, the rest by its own.

    The directory holds openvino_model.xml and .bin, the extension library that the operator needs, the model's config,
    the tokenizer, sentence-transformers' description of the pooling, nogemm_export.json and a README. Batch and length
    stay dynamic, inputs are what the tokenizer makes, outputs are float32, whatever the model's dtype. Weights are
    portable: the packed layers are laid out alike for every instruction set, the library picks the kernels when it is
    loaded, and int8 products overflow on no processor.
    The file is run once, pairs of texts included, and compared with the packed torch model before it takes its place;
    an export of the same path is replaced in one step.

    Args:
        model: a transformers model or SentenceTransformer that takes input_ids, attention_mask and perhaps
            token_type_ids, converted, in evaluation mode; it is not changed. Layers: LookupFFN, TreeFFN, HireFFN,
            sums of them and of dense layers, and sites left dense.
        path: directory to write; absent, empty, or an earlier export.
        to: the host, "openvino".
        dtype: of the packed rows, "fp32", "bf16" or "int8", as in `nogemm.pack`.
        int8: True is rest="int8", False rest="float".
        rest: precision of what the host computes itself: "float"; "int8", quantised by NNCF on `calibration`; "auto",
            whichever is faster on this machine (measured once, seconds), float where there is nothing to calibrate on.
        tokenizer: saved into the directory; names the inputs; needed for int8.
        calibration: texts like those the model will see; needed for int8, the first 64 are used.
    Returns:
        ExportReport.
    Raises:
        ConfigError: an unknown host or precision, a layer or an input that the host cannot run, int8 without texts.
        PackedError: training mode, or packed already.
        NativeError: openvino, nncf or a C++ compiler is absent; the message says what to install.
        CheckpointError: `path` holds something else, or writing failed; what was there is untouched.
        NogemmError: the file disagrees with the torch model by more than the precisions explain; nothing was written.
    """
    if to not in HOSTS:
        raise ConfigError(f"export: to must be one of {', '.join(HOSTS)}, got to={to!r}")
    calibrated = tokenizer is not None and bool(calibration)
    layers = check_exportable(model, dtype)
    names = graph_inputs(inner_model(model), tokenizer)
    check_target(Path(path))
    host.check_installed()
    chosen = choose_rest(rest, int8, calibrated)
    if chosen.precision == "int8":
        host.check_installed("nncf")
    library = extension_path()
    copied = copy.deepcopy(inner_model(model)).float()  # what every host computes in
    if tokenizer is not None:
        tokenizer = prepare_tokenizer(copy.deepcopy(tokenizer), copied)
    traced = host_model(copied, dtype, names)
    singles, pairs = _batches(traced, tokenizer, calibration if calibrated else None)
    graph = host.convert(traced, singles[0], library)
    if chosen.precision == "int8":
        graph = host.quantise(graph, [*singles, *pairs])
    reports: list[ExportReport] = []

    def write(folder: Path) -> None:
        shutil.copyfile(library, folder / LIBRARY)
        host.save(graph, folder / MODEL)
        found = host.compare(folder / MODEL, folder / LIBRARY, traced, [singles[0], *pairs[:1]])
        check_agreement(found, chosen.precision, dtype)
        report = _report(to, dtype, chosen, layers, traced, found, folder)
        describe(traced.model, tokenizer, report, folder)
        if report.output == "last_hidden_state":
            describe_pooling(model, folder)
        reports.append(report)

    needed = sum(value.numel() * value.element_size() for value in traced.state_dict().values())
    replace_directory(path, write, caller="export", needed=needed, carry_over=False)
    return reports[0]


def _report(
    to: str, dtype: str, chosen: Rest, layers: Sequence[str], traced: HostModel, found: Agreement, folder: Path
) -> ExportReport:
    int8 = chosen.precision == "int8"
    return ExportReport(
        to=to,
        dtype=dtype,
        int8=int8,
        reason=chosen.reason,
        layers=tuple(layers),
        inputs=traced.input_names,
        output=traced.output_name,
        positions=positions(traced.model),
        cosine=found.mean,
        worst=found.worst,
        weight_bytes=(folder / MODEL).with_suffix(".bin").stat().st_size,
        versions={name: version(name) for name in ("nogemm", "openvino", *(("nncf",) if int8 else ()))},
    )


def _batches(
    traced: HostModel, tokenizer: Any, texts: Sequence[str] | None
) -> tuple[list[tuple[Tensor, ...]], list[tuple[Tensor, ...]]]:
    """Return batches of single texts and of pairs; of random tokens, in two shapes, without texts."""
    if texts is None:
        one, other = (
            random_batch(traced.input_names, traced.vocabulary, traced.types, shape) for shape in ((2, 16), (3, 9))
        )
        return [one], [other]
    return text_batches(traced.input_names, tokenizer, texts, traced.model)
