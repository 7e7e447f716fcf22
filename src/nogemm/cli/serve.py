"""`nogemm serve`: a model behind HTTP."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from nogemm.cli.common import Json, finish
from nogemm.cli.models import parse_choice
from nogemm.cli.options import refuse
from nogemm.errors import ConfigError

KEY = "NOGEMM_API_KEY"


def serve(
    context: typer.Context,
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL", help="Directory, converted or not; an export; GGUF file; name in the cache."),
    ],
    host: Annotated[str, typer.Option(help="Address to listen on; any but this machine's own needs an API key.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(help="0: a free one.")] = 8000,
    api_key_file: Annotated[
        Path | None, typer.Option(help=f"File whose first line requests have to bring; or {KEY} in the environment.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="What answers call the model [the last part of MODEL].")] = None,
    task: Annotated[str, typer.Option(help="embed, rerank or generate; auto: what the model's files say.")] = "auto",
    workers: Annotated[int, typer.Option(help="Processes, each with a model.")] = 1,
    threads: Annotated[int, typer.Option(help="Of each worker; 0: the usable cores, dealt out.")] = 0,
    dtype: Annotated[str, typer.Option(help="Rows of converted FFNs in torch: fp32, bf16 or int8.")] = "int8",
    body: Annotated[str | None, typer.Option(help="int8: round torch's other linear layers.")] = None,
    max_length: Annotated[int | None, typer.Option(help="Tokens of a text [what the model allows].")] = None,
    limit: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=VALUE", help="Another limit, such as request_texts=64; the guide lists them."),
    ] = None,
    json: Json = None,
) -> None:
    """Serve embeddings, reranking scores or completions of MODEL over HTTP, by OpenAI's paths.

    SIGTERM and Ctrl-C end it once everything that it took is answered. --json is written when it listens.
    """
    for package in ("starlette", "uvicorn", "prometheus_client", "orjson"):
        if importlib.util.find_spec(package) is None:
            raise ConfigError(f"serve: {package} is not installed: pip install 'nogemm[serve]'")
    from nogemm.export.folder import RECORD
    from nogemm.serve import ServeOptions, run_server

    given = {field: value for field, value in locals().items() if field in ServeOptions.__dataclass_fields__}
    options = ServeOptions(**given, **_limits(limit or []), api_key=_key(api_key_file))
    if (Path(model) / RECORD).is_file():
        refuse(context, ["dtype", "body"], "does not go with an export, which has its own precision")

    def ready(url: str) -> None:
        print(f"{options.served_name} at {url}, {options.workers} worker{'s' * (options.workers > 1)}", file=sys.stderr)
        finish({"url": url, "model": options.served_name, "limits": options.limits()}, json)

    run_server(options, ready)


def _limits(words: list[str]) -> dict[str, Any]:
    """Read NAME=VALUE of every --limit."""
    from nogemm.serve.options import LIMITS

    found = dict(parse_choice(word, "--limit") for word in words)
    for name in found:
        if name not in LIMITS:
            raise ConfigError(f"--limit {name}: a server has no such limit; it has: {', '.join(LIMITS)}")
    return found


def _key(file: Path | None) -> str | None:
    """Return the key that requests have to bring: the file's first line, or what the environment holds."""
    if file is None:
        return os.environ.get(KEY) or None
    lines = file.read_text(encoding="utf-8").splitlines()
    if not lines or not lines[0].strip():
        raise ConfigError(f"--api-key-file {file}: the first line is empty")
    return lines[0].strip()
