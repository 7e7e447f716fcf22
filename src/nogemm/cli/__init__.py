"""The `nogemm` command: thin calls of the library's functions, results as text and, with --json, as a file.

Wrong input ends in one line and exit code 2. Reading order: `main`, then one module per group of commands.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Annotated, NoReturn

import typer

from nogemm.cli import (
    bench,
    bench_decoder,
    bench_generate,
    bench_ops,
    bench_serve,
    export,
    finetune,
    generate,
    info,
    models,
    profile,
    serve,
    study,
    train,
    tune,
)
from nogemm.errors import NogemmError
from nogemm.hardware.waiting import sleep_while_waiting
from nogemm.running.partial import Terminated, exit_code, sigterm_interrupts

app = typer.Typer(
    help="Replace dense feed-forward networks by layers that compute little; train, measure and run them on CPUs.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@app.callback()
def common(
    context: typer.Context,
    isa: Annotated[
        str | None, typer.Option(help="Hold every engine to it: avx2, avx512, avx512_vnni, avx512_bf16.")
    ] = None,
) -> None:
    if isa is None:
        return
    from nogemm.hardware.hold import become, lines, obeyed

    # Libraries read their variables when they load: the command starts anew, without the option.
    words = list(context.obj)
    place = next(i for i, word in enumerate(words) if word.partition("=")[0] == "--isa")
    del words[place : place + (1 if "=" in words[place] else 2)]
    print("\n".join(lines(isa, obeyed(isa))), file=sys.stderr)
    become(isa, [sys.executable, "-m", "nogemm", *words])


app.command("env")(info.env)
app.command("convert")(models.convert)
app.command("distil")(models.distil)
app.command("train")(train.train)
app.command("finetune")(finetune.finetune)
app.command("study")(study.study)
app.command("tune")(tune.tune)
app.command("eval")(models.evaluate)
app.command("export")(export.export)
app.command("generate")(generate.generate)
app.command("serve")(serve.serve)
bench.app.command("decoder")(bench_decoder.decoder)
bench.app.command("generate")(bench_generate.generate)
bench.app.command("serve")(bench_serve.serve)
bench.app.command("topk")(bench_ops.topk)
app.add_typer(bench.app, name="bench")
app.command("profile")(profile.profile)
app.command("info")(info.info)
app.command("report")(info.report)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command and exit: 0 done, 2 wrong input, 130 interrupted, 143 ended by SIGTERM.

    With NOGEMM_TRACEBACK=1 in the environment an error is shown with its whole traceback.
    """
    if arguments is None and sys.argv[1:2] in (["distil"], ["train"], ["finetune"], ["tune"]):
        sleep_while_waiting()
    try:
        with sigterm_interrupts():
            words = sys.argv[1:] if arguments is None else list(arguments)
            app(args=words, prog_name="nogemm", obj=words)
    except SystemExit as ended:
        stop = ended.__context__.__cause__ if isinstance(ended.__context__, typer.Exit) else None
        if not isinstance(stop, KeyboardInterrupt):
            raise
        _stopped(stop)
    except KeyboardInterrupt as stop:
        _stopped(stop)
    except (NogemmError, ValueError, OSError) as error:
        if os.environ.get("NOGEMM_TRACEBACK") == "1":
            raise
        print(f"nogemm: {_one_line(error)}", file=sys.stderr)
        raise SystemExit(2) from None


def _stopped(stop: KeyboardInterrupt) -> NoReturn:
    """End a command that a signal stopped where it had nothing to keep yet, such as in its imports."""
    print(f"nogemm: stopped by {'SIGTERM' if isinstance(stop, Terminated) else 'Ctrl-C'}", file=sys.stderr)
    raise SystemExit(exit_code(stop)) from None


def _one_line(error: Exception) -> str:
    if isinstance(error, FileNotFoundError) and error.filename is not None:
        return f"{error.filename}: no such file or directory"
    return " ".join(str(error).split()) or type(error).__name__
