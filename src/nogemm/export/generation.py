"""`nogemm.export_decoder`: from a causal model to a directory that OpenVINO generates with, head by our operator.

Legend: B sequences, L tokens, S states, D width, V vocabulary.
"""

from __future__ import annotations

import copy
import importlib.util
import shutil
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nogemm.convert.save import replace_directory
from nogemm.convert.sites import installed
from nogemm.decoding.states import base_of, prove
from nogemm.errors import ConfigError, PackedError
from nogemm.export import decoder_graph as dg
from nogemm.export import openvino_host as host
from nogemm.export.cached import CachedDecoder
from nogemm.export.decoder_check import check_decoder, example_prompt
from nogemm.export.export import HOSTS
from nogemm.export.extension import LIBRARY, extension_path
from nogemm.export.folder import MODEL, check_target, write_record
from nogemm.export.traced import check_layers, pack_layers
from nogemm.heads import HeadConfig, HireHead, deferred_bytes, make_codes, output_embeddings
from nogemm.models.inner import inner_model
from nogemm.ops.packed_head import pack_head

ROWS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
TOKENIZER, DETOKENIZER = "openvino_tokenizer.xml", "openvino_detokenizer.xml"


@dataclass(frozen=True, kw_only=True)
class DecoderExportReport:
    """What was written.

    Attributes:
        to: the host.
        body: precision of attention's and dense FFNs' matrices.
        rows: of the embedding and, unless it is "int8", of the head.
        head: "exact", our operator; "dense", OpenVINO's product.
        layers: names of the sites whose FFN is our operator.
        vocabulary, width, positions: V, D, and how many tokens the model takes (0: not said).
        mode: of `OpenVINODecoder`, unless it is told: "deferred", where the head's config says so, else "exact";
            None: of a dense head.
        verify_every, search_rows: of mode "deferred": tokens between two proofs, and rows that a search computes.
        scale, cap: what the model does to its head's logits, see `nogemm.decoding.states.Scaling`.
        bytes_per_token: weights that one token reads: all matrices, and of an exact head its codes. Rows that a proof
            computes exactly (some dozens) and the cache of keys and values are not counted.
        head_bytes_per_token: of these, the head's.
        deferred_head_bytes_per_token: the head's in mode "deferred": what a search reads, its rows among it, and a
            token's share of a proof; 0: of a dense head.
        proven: tokens that were compared with the argmax of OpenVINO's own dense head, all of them equal.
        near_ties: of these, tokens where two logits are closer than float32 tells apart.
        agreement: mean cosine of the file's states with the torch model's; worst: of the state which agrees least.
        tokenizer: whether OpenVINO's tokenizer models lie beside it, which openvino-genai needs.
        versions: of nogemm and of the host's packages.
    """

    to: str
    body: str
    rows: str
    head: str
    mode: str | None
    verify_every: int
    search_rows: int
    scale: float
    cap: float | None
    layers: tuple[str, ...]
    vocabulary: int
    width: int
    positions: int
    bytes_per_token: int
    head_bytes_per_token: int
    deferred_head_bytes_per_token: int
    proven: int
    near_ties: int
    agreement: float
    worst: float
    tokenizer: bool
    versions: dict[str, str]


def export_decoder(
    model: nn.Module,
    path: str | Path,
    *,
    to: str = "openvino",
    body: str = "int8",
    rows: str = "fp16",
    dtype: str = "fp32",
    tokenizer: Any = None,
) -> DecoderExportReport:
    """Write a causal model as a directory that OpenVINO generates with: it keeps its keys and values itself.

    A head that `nogemm.convert_head` has converted is our operator: each token is proven to be the argmax of

        logit = x W^T + b,  accumulated in float32 over the rows as written (`rows`)

    from a part of their bytes. A head that is dense stays dense. Converted FFNs are our operators too. The rest is
    OpenVINO's, its matrices compressed by NNCF without data. Run the directory by `OpenVINODecoder`, in mode "deferred"
    if the head is in that mode, or by
    `openvino_genai.LLMPipeline`: there the logits of an exact head are minus infinity but at the proven token, so that
    greedy search gives the dense model's tokens, and sampling gives the greedy ones at any temperature.

    The file is run before it takes its place: its tokens must be those of a dense head that OpenVINO multiplies over
    the same states and rows, and its states those of the torch model within what `body` explains.

    Args:
        model: a causal language model of transformers with a cache of keys and values, in evaluation mode; it is not
            changed.
        path: directory to write; absent, empty, or an earlier export.
        to: the host, "openvino".
        body: "float"; "int8", a scale for each row; "int4", a scale for every 32 weights.
        rows: of embedding and head as written: "fp16", "bf16" or "fp32"; "int8" is for a dense head alone, whose
            embedding is then fp16.
        dtype: of packed FFNs, as in `nogemm.pack`.
        tokenizer: saved into the directory; converted for openvino-genai where openvino-tokenizers is installed.
    Returns:
        DecoderExportReport.
    Raises:
        ConfigError: an unknown host or precision; a model that is not causal, or whose masks, cache or logits are of
            another kind; weights that float16 cannot hold.
        PackedError: training mode, or FFNs packed already.
        NativeError: openvino, nncf or a C++ compiler is absent; the message says what to install.
        CheckpointError: `path` holds something else, or writing failed; what was there is untouched.
        NogemmError: a token is not the dense head's, or states disagree; nothing was written.
    """
    _check_choices(to, body, rows)
    inner: Any = inner_model(model)
    if inner.training:
        raise PackedError("export: the model is in training mode; call model.eval() first")
    layers = check_layers(model, installed(model))
    base_of(inner)
    check_target(Path(path))
    host.check_installed()
    if body != "float":
        host.check_installed("nncf")
    library = extension_path()
    copied: Any = copy.deepcopy(inner).float()
    head = graph_head(copied, rows)
    decoder, graph, body_bytes = _build(copied, head, body, rows, dtype, library)
    reports: list[DecoderExportReport] = []

    def write(folder: Path) -> None:
        shutil.copyfile(library, folder / LIBRARY)
        dg.save_graph(graph, folder / MODEL)
        proof = check_decoder(folder / MODEL, folder / LIBRARY, decoder, head, example_prompt(decoder), body)
        settings = {"to": to, "body": body, "rows": rows, "layers": tuple(layers)}
        report = _report(settings, head, decoder, body_bytes, asdict(proof), write_tokenizer(tokenizer, folder))
        _describe(inner, report, folder)
        reports.append(report)

    needed = 2 * sum(value.numel() * value.element_size() for value in copied.state_dict().values())
    replace_directory(path, write, caller="export", needed=needed, carry_over=False)
    return reports[0]


def _report(
    settings: dict[str, Any],
    head: dg.GraphHead,
    decoder: CachedDecoder,
    body_bytes: int,
    proof: dict[str, Any],
    tokenizer: bool,
) -> DecoderExportReport:
    own = _head_bytes(head, settings["rows"])
    config = HeadConfig() if head.config is None else head.config
    return DecoderExportReport(
        **settings,
        head="dense" if head.codes is None else "exact",
        mode=None if head.config is None else "deferred" if config.mode == "deferred" else "exact",
        verify_every=config.verify_every,
        search_rows=config.rows_of(head.rows.shape[0]),
        scale=head.scale,
        cap=head.cap,
        vocabulary=head.rows.shape[0],
        width=head.rows.shape[1],
        positions=int(getattr(decoder.config, "max_position_embeddings", 0) or 0),
        bytes_per_token=body_bytes + own,
        head_bytes_per_token=own,
        deferred_head_bytes_per_token=head.deferred_bytes,
        **proof,
        tokenizer=tokenizer,
        versions={
            name: version(name) for name in ("nogemm", "openvino", *(() if settings["body"] == "float" else ("nncf",)))
        },
    )


def _build(
    model: Any, head: dg.GraphHead, body: str, rows: str, dtype: str, library: Path
) -> tuple[CachedDecoder, Any, int]:
    """Return the torch model as a host sees it, its graph, and the bytes of the body's constants."""
    embedding = head.rows
    if not head.tied:
        embedding = _stored(model.get_input_embeddings().weight, ROWS.get(rows, torch.float16))
    pack_layers(model, dtype)
    decoder = CachedDecoder(model, embedding).eval()
    factory = dg.Factory(library)
    graph = dg.convert_body(decoder, factory)
    dg.remember(graph, decoder)
    graph = dg.compress_body(graph, body)
    body_bytes = matrix_bytes(graph)
    return decoder, dg.attach_head(graph, head, factory, int8=rows == "int8"), body_bytes


def graph_head(model: Any, rows: str) -> dg.GraphHead:
    """Read a model's head as a graph needs it; make the codes of a converted one for its rows as they are written."""
    found = output_embeddings(model)
    if found is None or not isinstance(getattr(found, "weight", None), Tensor):
        raise ConfigError(f"export: {type(model).__name__} has no vocabulary head")
    exact = isinstance(found, HireHead)
    if exact and rows == "int8":
        raise ConfigError("export: the rows of a converted head are fp16, bf16 or fp32; rows='int8' is for a dense one")
    stored = _stored(found.weight, ROWS.get(rows, torch.float16))
    with torch.inference_mode():
        scaling = prove(model, base_of(model), found, torch.zeros(1, 3, dtype=torch.int64))
    bias = None if found.bias is None else found.bias.detach().float()
    codes, config, deferred = None, None, 0
    if isinstance(found, HireHead):
        config = found.config
        made = make_codes(stored, bias, found.moment, config.leading, config.sketch)
        codes = pack_head(stored, bias, made)
        deferred = deferred_bytes(made, stored, config)
    embedding = model.get_input_embeddings().weight
    return dg.GraphHead(
        rows=stored,
        bias=bias,
        codes=codes,
        config=config,
        deferred_bytes=deferred,
        tied=embedding.data_ptr() == found.weight.data_ptr() and embedding.shape == found.weight.shape,
        scale=scaling.scale,
        cap=scaling.cap,
    )


def matrix_bytes(graph: Any) -> int:
    """Count the bytes of constants that a token reads; those of which it reads one row, and unread ones, count none."""
    total, seen = 0, set()
    for node in graph.get_ordered_ops():
        rows = {"EmbedRows": 1, "Gather": 0}.get(node.get_type_name())
        if rows is not None:
            seen.add(node.input_value(rows).get_node().get_friendly_name())
    for node in graph.get_ordered_ops():
        if node.get_type_name() == "Constant" and node.get_friendly_name() not in seen:
            total += node.get_byte_size()
    return total


def write_tokenizer(tokenizer: Any, folder: Path) -> bool:
    """Save a tokenizer, and OpenVINO's models of it where openvino-tokenizers can make them; say whether it could."""
    if tokenizer is None:
        return False
    tokenizer.save_pretrained(str(folder))
    if importlib.util.find_spec("openvino_tokenizers") is None:
        return False
    import openvino

    try:
        with host.quiet():
            from openvino_tokenizers import convert_tokenizer  # pyright: ignore[reportMissingImports]

            models = convert_tokenizer(tokenizer, with_detokenizer=True)
            for made, name in zip(models, (TOKENIZER, DETOKENIZER), strict=True):
                openvino.save_model(made, str(folder / name))
    except Exception:  # of many kinds, by the tokenizer's; the directory works without
        for name in (TOKENIZER, DETOKENIZER):
            (folder / name).unlink(missing_ok=True)
            (folder / name).with_suffix(".bin").unlink(missing_ok=True)
        return False
    return True


def _check_choices(to: str, body: str, rows: str) -> None:
    for name, value, choices in (("to", to, HOSTS), ("body", body, dg.BODIES), ("rows", rows, (*ROWS, "int8"))):
        if value not in choices:
            raise ConfigError(f"export: {name} must be one of {', '.join(choices)}, got {name}={value!r}")


def _stored(weight_VD: Tensor, dtype: torch.dtype) -> Tensor:
    stored = weight_VD.detach().to(dtype).contiguous()
    if not bool(stored.isfinite().all()):
        raise ConfigError(f"export: the vocabulary's rows are not finite in {dtype}; use rows='bf16' or 'fp32'")
    return stored


def _head_bytes(head: dg.GraphHead, rows: str) -> int:
    if head.codes is not None:
        return head.codes.numel()
    items = head.rows.numel()
    return items + 4 * len(head.rows) if rows == "int8" else 4 * items  # a float head is multiplied in float32


def _describe(model: Any, report: DecoderExportReport, folder: Path) -> None:
    """Write config, generation config, record and README."""
    model.config.save_pretrained(str(folder))
    generation = getattr(model, "generation_config", None)
    ends: list[int] = []
    if generation is not None:
        generation.save_pretrained(str(folder))
        own = generation.eos_token_id
        ends = [] if own is None else [own] if isinstance(own, int) else list(own)
    write_record(folder, asdict(report) | {"ends": ends})
    text = _README.format(
        body=report.body, rows=report.rows, head=report.head, library=LIBRARY, openvino=report.versions["openvino"]
    )
    (folder / "README.md").write_text(text, encoding="utf-8")


_README = """# A decoder for OpenVINO

Body {body}, vocabulary rows {rows}, head {head}. Made by nogemm for OpenVINO {openvino}.

    from nogemm.export import OpenVINODecoder

    decoder = OpenVINODecoder("this directory")  # mode="exact" or "deferred": the same tokens
    ids = decoder.generate(prompt_ids, max_new_tokens=64)

In openvino-genai, where the tokenizer's models lie here too:

    import openvino_genai  # pyright: ignore[reportMissingImports]

    pipe = openvino_genai.LLMPipeline("this directory", "CPU", ATTENTION_BACKEND="SDPA", extensions=["{library}"])
    pipe.generate("...", max_new_tokens=64)

An exact head gives logits that are minus infinity but at the most likely token: greedy search is exact, sampling gives
the greedy tokens, and scores say nothing.
"""
