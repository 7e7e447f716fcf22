"""Commands on models: `convert`, `distil`, `eval`. Models are transformers directories, before and after."""

from __future__ import annotations

import json as json_format
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from nogemm.cli.common import Json, Trust, finish, print_partial, print_table
from nogemm.cli.options import integers, refuse, words
from nogemm.config import layer_kinds
from nogemm.errors import CheckpointError, ConfigError, NogemmError
from nogemm.running.measured import Keep, Note, end_early, measured
from nogemm.running.partial import Record
from nogemm.running.progress import progress, training_lines

ModelArgument = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help="Directory, GGUF file or name in the local cache of a model; all-MiniLM-L6-v2."
    ),
]
OutputArgument = Annotated[Path, typer.Argument(metavar="OUTPUT", help="Directory to write.")]
Set = Annotated[list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="One choice; may be repeated.")]
Data = Annotated[str, typer.Option(help="Text, JSONL or CSV file (also .gz), or `sample` for the packaged one.")]
Teacher = Annotated[str, typer.Option(help="Directory of the dense model.")]

HEAD_TEXTS = 512
"""Texts that the codes of a head are fitted to, by `convert` and `export`."""
_OF_FFNS = ("set_", "layers", "data", "tables", "faster_at", "speed")


def convert(
    context: typer.Context,
    model: ModelArgument,
    output: OutputArgument,
    method: Annotated[
        str | None,
        typer.Option(help=f"Kind of layer: {', '.join(layer_kinds())}; sums: dense+lookup [lookup; none with --head]."),
    ] = None,
    set_: Set = None,
    layers: Annotated[str, typer.Option(help='"all", indices such as 0,1,5, or globs on module names.')] = "all",
    keep: Annotated[str, typer.Option(help="First leave out all layers of the model but these, such as 0,2,5.")] = "",
    data: Annotated[str | None, typer.Option(help="Texts for layers that can be fitted in closed form.")] = None,
    tables: Annotated[str | None, typer.Option(help="Store tables as int8 or bf16 instead of fp32.")] = None,
    faster_at: Annotated[
        str,
        typer.Option(
            help="Tokens a call: an FFN that is faster dense for such calls here stays dense. none: all are converted. "
            "auto: 1 for layers of decoders that need no training, none for others."
        ),
    ] = "auto",
    speed: Annotated[
        str | None, typer.Option(help="Also time the layers, packed as fp32, bf16 or int8, beside those they replace.")
    ] = None,
    head: Annotated[
        str | None, typer.Option(help="Convert the vocabulary head, too: exact, deferred, high_recall or fast.")
    ] = None,
    head_data: Annotated[
        str, typer.Option(help="Texts that the head's codes are fitted to: a file, or `sample`.")
    ] = "sample",
    trust_remote_code: Trust = False,
    json: Json = None,
) -> None:
    """Replace the FFNs of MODEL, its vocabulary head or both, and write the result to OUTPUT."""
    import nogemm
    from nogemm.config import parse_layer
    from nogemm.models.loading import load_both
    from nogemm.train.sources import texts

    if head is None:
        refuse(context, ["head_data"], "needs --head")
        method = method or "lookup"
    elif method is None:
        refuse(context, _OF_FFNS, "needs --method: --head alone leaves the FFNs dense")
    head_config = None if head is None else head_config_of(head, "--head")
    config = None if method is None else parse_layer(method, set_ or [])
    faster = _tokens_a_call(faster_at)
    loaded, tokenizer = load_both(model, trust_remote_code=trust_remote_code)
    sample = None if data is None else texts(data)
    if keep:
        print(f"hidden_map={list(nogemm.keep_layers(loaded, integers('--keep', keep)))} for nogemm distil")
    report: Any = None
    with progress.watching():
        if head_config is not None:  # before the FFNs: layers that are random yet would spoil its states
            progress(f"fitting the head of {model}")
            fit_head(loaded, head_config, head_data, tokenizer)
        if config is not None:
            progress(f"converting {model}")
            layers_ = parse_layers(layers)
            report = nogemm.convert(loaded, config, layers_, sample, tokenizer=tokenizer, faster_at=faster)
    if tables is not None:
        nogemm.compress(loaded, tables)
    from nogemm.convert.save import save_like

    save_like(loaded, model, output, tokenizer)
    described = {} if head is None else {"head": nogemm.head_report(loaded).to_dict()}
    for line in ([] if report is None else [report]) + ([] if head is None else [nogemm.head_report(loaded)]):
        print(line)
    print(output)
    if report is None:
        finish(described, json)
        return
    _time_conversion(report, described, (str(method), set_ or [], speed), json)


def _tokens_a_call(word: str) -> Any:
    """Read --faster-at: a number, `auto` or `none`."""
    if word in ("auto", "none"):
        return None if word == "none" else word
    if not word.isdecimal() or int(word) < 1:
        raise ConfigError(f"--faster-at must be a number of tokens from 1, auto or none, got {word!r}")
    return int(word)


def _time_conversion(
    report: Any, described: dict[str, Any], timed: tuple[str, list[str], str | None], json: Path | None
) -> None:
    """Write the report of a conversion; where --speed asks for it, with times of the layers."""
    method, assignments, speed = timed

    def work(note: Note, keep: Keep) -> dict[str, Any]:
        found = report.to_dict() | described
        keep(found)  # the model is converted and written, whatever becomes of the timing
        if speed is None:
            return found
        from nogemm.bench.layer import run_layer_bench
        from nogemm.bench.report.verdict import compare_sites

        def kept(kinds: list[dict[str, Any]]) -> None:
            keep(found | {"speed": kinds})

        run = partial(run_layer_bench, note=note)
        return found | {"speed": compare_sites(report, method, assignments, speed, run=run, keep=kept)}

    def show(result: dict[str, Any]) -> None:
        for kind in result.get("speed", []):
            shape = kind["replaced"]
            print(f"{method}, {speed}, for {shape['d_in']}, {shape['hidden']}: {kind['verdict']}")
        print_partial(result)

    measured(None, json, work, show)


def head_config_of(mode: str, option: str) -> Any:
    """Make the config of a head in this mode; `option` goes into the message."""
    from typing import get_args

    from nogemm.heads import HeadConfig
    from nogemm.heads.config import HeadMode

    if mode not in get_args(HeadMode):
        raise ConfigError(f"{option} must be one of {', '.join(get_args(HeadMode))}, got {mode!r}")
    return HeadConfig(mode=mode)  # type: ignore[arg-type]


def fit_head(model: Any, config: Any, data: str, tokenizer: Any, count: int = HEAD_TEXTS) -> Any:
    """Convert a model's head, its codes fitted to the first `count` texts of `data`; return it."""
    from itertools import islice

    import nogemm
    from nogemm.train.sources import texts

    return nogemm.convert_head(model, config, islice(texts(data), count), tokenizer=tokenizer)


def distil(
    model: ModelArgument,
    output: OutputArgument,
    teacher: Teacher,
    data: Data = "sample",
    field: Annotated[str | None, typer.Option(help="Field of JSONL or CSV rows that holds the text.")] = None,
    pair: Annotated[str | None, typer.Option(help="Two fields read together, such as query,document.")] = None,
    validation: Annotated[str | None, typer.Option(help="Texts to measure agreement on while training.")] = None,
    run: Annotated[Path | None, typer.Option(help="Directory of checkpoints [OUTPUT with `-run` added].")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the last checkpoint of the run.")] = False,
    tokens: Annotated[int | None, typer.Option(help="Budget in tokens.")] = None,
    max_seconds: Annotated[float | None, typer.Option(help="Budget in seconds.")] = None,
    seed: Annotated[int | None, typer.Option(help="Order of the data.")] = None,
    optimizer: Annotated[str | None, typer.Option(help="adamw, or lazy-adam for trees.")] = None,
    set_: Set = None,
    trust_remote_code: Trust = False,
    json: Json = None,
) -> None:
    """Train the replaced FFNs of MODEL against the dense TEACHER and write the result to OUTPUT."""
    import nogemm
    from nogemm.models.loading import load_both, load_model
    from nogemm.models.texts import prepare_tokenizer

    choices: dict[str, Any] = dict(parse_choice(word) for word in set_ or [])
    named = {"tokens": tokens, "max_seconds": max_seconds, "seed": seed, "field": field, "optimizer": optimizer}
    named |= {"pair": None if pair is None else tuple(words(pair))}
    choices |= {name: value for name, value in named.items() if value is not None}
    run = run or output.with_name(output.name + "-run")
    loaded = load_model(model, trust_remote_code=trust_remote_code)
    dense, tokenizer = load_both(teacher, trust_remote_code=trust_remote_code)
    prepare_tokenizer(tokenizer, loaded)
    options = distil_options(choices)
    sources = {"tokenizer": tokenizer, "validation": validation}
    record = Record(json)
    try:
        with progress.watching(), training_lines():
            report = nogemm.distil(loaded, dense, data, **sources, output_dir=run, resume=resume, options=options)
    except KeyboardInterrupt as stopped:
        record.keep({"options": options.to_dict(), "run": str(run)})
        end_early(record, stopped, print_partial)
    from nogemm.convert.save import save_like

    try:
        save_like(loaded, model, output, tokenizer)
    except (NogemmError, OSError) as error:
        raise CheckpointError(
            f"{error}. The trained weights are in {run}: the same command with --resume, --run {run} and another "
            "OUTPUT saves them there, and trains nothing anew"
        ) from error
    agreement = "" if report.agreement is None else f", agreement {report.agreement:.4f}"
    print(f"{report.tokens:,} tokens in {report.seconds:.0f} s ({report.stopped}){agreement}")
    print(output)
    finish(report.to_dict(), json)


def evaluate(
    model: ModelArgument,
    teacher: Annotated[str | None, typer.Option(help="Directory of the dense model to compare with.")] = None,
    task: Annotated[str, typer.Option(help="search, mlm or classify.")] = "search",
    data: Data = "sample",
    split: Annotated[str, typer.Option(help="Of the data, where it has splits.")] = "test",
    limit: Annotated[int, typer.Option(help="At most so many pairs, texts or rows; 0: all.")] = 0,
    pack: Annotated[str | None, typer.Option(help="Evaluate it packed: fp32, bf16 or int8.")] = None,
    max_length: Annotated[int, typer.Option(help="Tokens per text.")] = 256,
    seed: Annotated[int, typer.Option(help="Of the resampling and of the masks.")] = 0,
    trust_remote_code: Trust = False,
    json: Json = None,
) -> None:
    """Score MODEL beside its teacher: every figure with its 95 % interval."""
    from nogemm.bench.quality.evaluate import EvalArgs, run_eval

    args = EvalArgs(
        model=model,
        teacher=teacher,
        task=task,
        data=data,
        split=split,
        limit=limit,
        pack=pack,
        max_length=max_length,
        seed=seed,
        trust_remote_code=trust_remote_code,
    )

    def show(result: dict[str, Any]) -> None:
        rows = [
            [name, group, f"{figure['value']:.4f}", f"{figure['low']:.4f}", f"{figure['high']:.4f}"]
            for group in ("teacher", "ours", "kept", "difference")
            for name, figure in result.get(group, {}).items()
        ]
        print_table(["figure", "of", "value", "low", "high"], rows)
        print_partial(result)

    measured("quality", json, lambda note, keep: run_eval(args, note=note, keep=keep), show)


def distil_options(choices: dict[str, Any]) -> Any:
    """Make DistilOptions, or say which option does not exist."""
    from dataclasses import fields

    from nogemm.train.options import DistilOptions

    known = [field.name for field in fields(DistilOptions)]
    for name in choices:
        if name not in known:
            raise ConfigError(f"--set {name}: distil has no such option; it has: {', '.join(known)}")
    return DistilOptions(**choices)


def parse_choice(word: str, option: str = "--set") -> tuple[str, Any]:
    """Read NAME=VALUE of an option; the value as JSON where that works, as a plain word otherwise."""
    name, equals, text = word.partition("=")
    if not name or not equals:
        raise ConfigError(f"{option} {word!r}: expected NAME=VALUE, for example tokens=1000000")
    try:
        return name, json_format.loads(text)
    except ValueError:
        return name, text


def parse_layers(text: str) -> str | list[int] | list[str]:
    """Read `all`, indices, or globs, separated by commas."""
    words = [word.strip() for word in text.split(",") if word.strip()]
    if words == ["all"]:
        return "all"
    if not words:
        raise ConfigError('--layers: expected "all", indices such as 0,1,5, or globs on module names')
    return [int(word) for word in words] if all(word.isdecimal() for word in words) else words
