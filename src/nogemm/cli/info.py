"""Commands that change nothing: `env`, `info` and `report`."""

from __future__ import annotations

from itertools import chain
from pathlib import Path
from typing import Annotated, Any

import typer

from nogemm.cli.common import Json, Trust, finish, print_table
from nogemm.cli.options import refuse


def env(
    context: typer.Context,
    processor: Annotated[
        bool, typer.Option("--processor", help="Only the processor's name, as folders bear it.")
    ] = False,
    json: Json = None,
) -> None:
    """Say what runs here: instruction set, threads, versions, caches."""
    if processor:
        from nogemm.hardware.cpu import processor as name

        refuse(context, ["json"], "does not go with --processor, which prints a name alone")
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


def info(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Directory of a model, name in the local cache, or GGUF file.")
    ],
    trust_remote_code: Trust = False,
    json: Json = None,
) -> None:
    """Say what MODEL is made of: its FFNs, converted and dense, its vocabulary head, and what they take in memory."""
    import nogemm
    from nogemm.convert.head import find_head
    from nogemm.heads.report import size
    from nogemm.models.loading import load_model

    loaded = load_model(model, trust_remote_code=trust_remote_code)
    ours = nogemm.converted(loaded)
    rows: list[dict[str, Any]] = [
        {"name": name, "kind": layer.config.kind, "bytes": _bytes(layer)} for name, layer in ours.items()
    ]
    rows += [
        {"name": site.name, "kind": "not converted", "bytes": sum(_bytes(part) for part in _matrices(site))}
        for site in nogemm.sites(loaded)
    ]
    print(
        f"{type(loaded).__name__}: {sum(p.numel() for p in loaded.parameters()):,} parameters, {size(_bytes(loaded))}"
    )
    if rows:
        print_table(["FFN", "kind", "bytes"], [[row["name"], row["kind"], f"{row['bytes']:,}"] for row in rows])
    head = None if find_head(loaded) is None else nogemm.head_report(loaded)
    print(head or "vocabulary head: not converted, or none")
    result = {"model": type(loaded).__name__, "bytes": _bytes(loaded), "ffns": rows}
    finish(result | {"head": None if head is None else head.to_dict()}, json)


def _bytes(module: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in chain(module.parameters(), module.buffers()))


def _matrices(site: Any) -> list[Any]:
    return [site.owner.get_submodule(path) for path in site.adapter.matrices]


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
