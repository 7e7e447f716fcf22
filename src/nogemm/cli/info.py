"""Commands that change nothing: `env` and `report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nogemm.cli.common import Json, finish


def env(
    processor: Annotated[
        bool, typer.Option("--processor", help="Only the processor's name, as folders bear it.")
    ] = False,
    json: Json = None,
) -> None:
    """Say what runs here: instruction set, threads, versions, caches."""
    if processor:
        from nogemm.hardware.cpu import processor as name

        print(name())
        return
    from nogemm.hardware.environment import env as environment

    result = environment()
    native = f"native, {result['isa']} of {' '.join(result['isas'])}" if result["native"] else "PyTorch reference only"
    print(f"nogemm {result['nogemm']}: {native}, {result['threads']} threads")
    print(result["line"])
    versions = {name: version for name, version in result["machine"]["versions"].items() if version is not None}
    print(", ".join(f"{name} {version}" for name, version in versions.items()))
    if result["paths"]:
        print(
            "layers of neurons read the rows of those that a token names, up to this share of all, else multiply all:"
        )
        for dtype, shares in result["paths"].items():
            print(f"  {dtype}: " + ", ".join(f"{share:.0%} at {n} tokens" for n, share in shares.items()))
    finish(result, json)


def report(
    results: Annotated[
        list[Path],
        typer.Argument(help="Result files, as --json of the other commands writes them, or folders of studies."),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The page to write.")] = Path("report.html"),
    title: Annotated[str | None, typer.Option(help="Heading of the page.")] = None,
    json: Json = None,
) -> None:
    """Write results as one self-contained HTML page."""
    from nogemm.bench.report.write import write_report

    path = write_report(results, output, title=title)
    print(path)
    finish({"report": str(path), "results": [str(file) for file in results]}, json)
