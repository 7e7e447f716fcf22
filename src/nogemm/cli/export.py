"""`nogemm export`: a model as a directory that another engine runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from nogemm.cli.common import Json, Trust, finish
from nogemm.cli.models import HEAD_TEXTS, ModelArgument, OutputArgument, fit_head
from nogemm.cli.options import refuse
from nogemm.errors import ConfigError
from nogemm.running.progress import progress

_OF_DECODERS = ("body", "rows", "head", "mode")
_OF_OTHERS = ("int8", "rest")


def export(
    context: typer.Context,
    model: ModelArgument,
    output: OutputArgument,
    to: Annotated[str, typer.Option(help="The engine that will run it: openvino.")] = "openvino",
    dtype: Annotated[str, typer.Option(help="Of converted FFNs' packed rows: fp32, bf16 or int8.")] = "int8",
    int8: Annotated[bool, typer.Option("--int8", help="The same as --rest int8; not with --generate.")] = False,
    rest: Annotated[
        str,
        typer.Option(
            help="The engine's own part: float, int8, or auto, whichever is faster on this machine; not with "
            "--generate, which has --body."
        ),
    ] = "auto",
    data: Annotated[
        str, typer.Option(help="Texts that int8 is calibrated on, and that a head's codes fit.")
    ] = "sample",
    generate: Annotated[bool, typer.Option("--generate", help="A decoder with its cache, to generate with.")] = False,
    body: Annotated[str, typer.Option(help="With --generate: matrices in float, int8 or int4.")] = "int8",
    rows: Annotated[
        str, typer.Option(help="With --generate: vocabulary in fp16, bf16, fp32; int8, if dense.")
    ] = "fp16",
    head: Annotated[str, typer.Option(help="With --generate: exact, by our kernels, or dense.")] = "exact",
    mode: Annotated[
        str | None, typer.Option(help="With --generate: exact or deferred: how an exact head proves tokens.")
    ] = None,
    trust_remote_code: Trust = False,
    json: Json = None,
) -> None:
    """Write MODEL as a directory that another engine runs, its converted FFNs and its head by our kernels."""
    from dataclasses import asdict
    from itertools import islice

    import nogemm
    from nogemm.models.loading import load_both
    from nogemm.train.sources import texts

    if generate:
        refuse(context, _OF_OTHERS, "does not go with --generate: the precision of a decoder's matrices is --body")
        _check_head(head, mode)
        if head == "dense":
            refuse(context, ["data"], "does not go with --head dense, which has no codes to fit")
    else:
        refuse(context, _OF_DECODERS, "needs --generate")
    loaded, tokenizer = load_both(model, trust_remote_code=trust_remote_code)
    if generate:
        _check_decoder(context, loaded, head)
        choices = {"to": to, "body": body, "rows": rows, "dtype": dtype, "tokenizer": tokenizer}
        _export_decoder(loaded, output, data if head == "exact" else None, mode, choices, json)
        return
    sample = list(islice(texts(data), HEAD_TEXTS))
    with progress.watching():
        progress(f"exporting {model}")
        report = nogemm.export(
            loaded, output, to=to, dtype=dtype, int8=int8 or None, rest=rest, tokenizer=tokenizer, calibration=sample
        )
    chosen, size = "int8" if report.int8 else "float", f"{report.weight_bytes / 2**20:.0f} MiB"
    print(f"{len(report.layers)} layers with {report.dtype} rows, the rest {chosen} ({report.reason}), {size}")
    print(f"agreement with the packed torch model {report.cosine:.5f}, worst text {report.worst:.5f}")
    print(f"inputs {', '.join(report.inputs)}; output {report.output}")
    print(output)
    finish(asdict(report), json)


def _check_head(head: str, mode: str | None) -> None:
    if head not in ("exact", "dense"):
        raise ConfigError(f"--head must be exact or dense, got {head!r}")
    if mode not in (None, "exact", "deferred"):
        raise ConfigError(f"--mode must be exact or deferred, got {mode!r}")
    if head == "dense" and mode is not None:
        raise ConfigError(f"--mode {mode} is of an exact head; leave --head dense out")


def _check_decoder(context: typer.Context, model: Any, head: str) -> None:
    """Refuse what does not go with the model that was loaded."""
    import nogemm
    from nogemm.convert.head import find_head

    if not nogemm.converted(model):
        refuse(context, ["dtype"], "is of converted FFNs, and the model has none; its matrices are --body's")
    if find_head(model) is None:
        return
    if head == "dense":
        raise ConfigError("--head dense: the model's head is converted; export the model that it was converted from")
    refuse(context, ["data"], "is what a dense head's codes are fitted to, and the model's head is converted already")


def _export_decoder(
    model: Any, output: Path, data: str | None, mode: str | None, choices: dict[str, Any], json: Path | None
) -> None:
    """Export a decoder; `data` None leaves a dense head dense."""
    from dataclasses import asdict, replace

    import nogemm
    from nogemm.convert.head import find_head

    with progress.watching():
        if data is not None and find_head(model) is None:
            progress("fitting the head's codes to the texts")
            fit_head(model, nogemm.HeadConfig(), data, choices["tokenizer"])
        if mode is not None and (found := find_head(model)) is not None:
            found.config = replace(found.config, mode=mode)
        progress(f"exporting to {output}")
        report = nogemm.export_decoder(model, output, **choices)
    own, total = report.head_bytes_per_token, report.bytes_per_token
    kind = f"{report.head} head"
    if report.mode == "deferred":
        own, total = report.deferred_head_bytes_per_token, total - own + report.deferred_head_bytes_per_token
        kind += f", proofs of {report.verify_every} tokens together"
    read = f"{total / 2**20:.0f} MiB read a token, {own / 2**20:.0f} of them by the head"
    print(f"body {report.body}, {kind}, {report.rows} rows; {read}")
    print(f"{report.proven} tokens equal to those of OpenVINO's own dense head, {report.near_ties} of them near ties")
    print(f"agreement with the torch model {report.agreement:.5f}, worst state {report.worst:.5f}")
    print(output)
    finish(asdict(report), json)
