"""What `nogemm profile --sparsity` measured as tables of text: FFNs, quality, sketches, unions, time."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean
from typing import Any

from nogemm.bench.engine.result import why_not
from nogemm.bench.report.tables import TextTable


def sparsity_tables(result: Mapping[str, Any]) -> list[TextTable]:
    """Lay out a result; tables without rows are left out."""
    tables = [layers_table(result), quality_table(result), sketches_table(result), unions_table(result)]
    return [table for table in (*tables, speed_table(result)) if table.rows]


def layers_table(result: Mapping[str, Any]) -> TextTable:
    """Lay out a line per FFN, at the first share that is kept."""
    keep, sketch, most = _first(result)
    quality = result.get("quality") or {}
    rows = []
    for layer in result["layers"]:
        energy = next(row for row in layer["energy"] if row["keep"] == keep)
        needed = [row["oversample"] for row in layer["recall"] if (row["sketch"], row["keep"]) == (sketch, keep)]
        union = _unions(layer, "kept", keep).get(most, {})
        cells = [f"{layer['hidden']:,}", _percent(layer["zeros"])]
        cells += [_percent(share) for share in layer["carriers"].values()]
        cells += [_percent(energy["energy"]), _percent(energy["best_energy"])]
        cells += [f"{factor:.2f}" for factor in needed]
        cells += [_percent(union.get(name)) for name in ("neighbours", "strangers")]
        alone = layer.get("alone")
        rows.append([layer["site"], *cells, "" if alone is None else _value(alone)])
    shares = list(result["layers"][0]["carriers"]) if result["layers"] else []
    targets = _targets(result)
    head = ["FFN", "neurons", "zero", *(f"carry {_percent(float(share))}" for share in shares)]
    head += [f"energy of {keep:.0%}", "at best", *(f"k'/k {target:g}" for target in targets)]
    head += [f"{most} neighbours", "strangers", "cut alone"]
    hint = (
        f"{model_name(result)}, {result['tokens']:,} tokens. Zero: exact zeros. Carry: fewest neurons of a token that "
        f"make up so much of the energy. Energy of {keep:.0%}: of the output, by its strongest neurons as HireFFN "
        f"ranks them; at best: by what they add. k'/k: candidates of the {sketch} sketch for a recall. Then the "
        f"distinct neurons of {most} tokens of one text, and of as many texts."
    )
    if "alone" in quality:
        dense = _value(quality["alone"]["dense"])
        hint += f" Cut alone: {quality['measure']} with this FFN cut to {keep:.0%}; dense, on the same tokens: {dense}."
    return TextTable(title=f"Sparsity: {model_name(result)}", head=head, rows=rows, hint=hint)


def quality_table(result: Mapping[str, Any]) -> TextTable:
    """Lay out what the model is worth with all its neurons, and with fewer."""
    quality = result.get("quality") or {}
    if not quality.get("measure"):
        rows = [["not judged", quality["why_not"], ""]] if quality.get("why_not") else []
        return TextTable(title="Quality of the cut model", head=["neurons", "why", ""], rows=rows, hint="")
    rows = [["all", _value(quality["dense"]), ""]]
    rows += [[_percent(row["keep"]), _value(row["value"]), _value(row["best"])] for row in quality["cut"]]
    better = "higher" if quality["higher"] else "lower"
    hint = (
        f"Every FFN answers by its strongest neurons alone, nothing is trained; {better} is better, over "
        f"{quality['tokens']:,} {'texts' if quality['higher'] else 'tokens'}. At best: ranked by what a neuron adds, "
        "which only a layer that computes all of them knows."
    )
    head = ["neurons that answer", quality["measure"], "at best"]
    return TextTable(title="Quality of the cut model", head=head, rows=rows, hint=hint)


def sketches_table(result: Mapping[str, Any]) -> TextTable:
    """Lay out how many candidates each sketch needs, the mean over the FFNs and the most."""
    found: dict[tuple[Any, ...], dict[float, list[float]]] = {}
    for layer in result["layers"]:
        for row in layer["recall"]:
            found.setdefault((row["sketch"], row["keep"]), {}).setdefault(row["target"], []).append(row["share"])
    rows = [
        [sketch, _percent(keep), *(f"{_percent(fmean(shares))} ({_percent(max(shares))})" for shares in by.values())]
        for (sketch, keep), by in found.items()
    ]
    head = ["sketch", "neurons kept", *(f"recall {target:g}" for target in _targets(result))]
    hint = "Candidates k' as a share of the neurons: the mean over the FFNs, and the most that one needs in brackets."
    return TextTable(title="Candidates for a recall", head=head, rows=rows, hint=hint)


def unions_table(result: Mapping[str, Any]) -> TextTable:
    """Lay out the distinct neurons of B tokens, the mean over the FFNs."""
    batches = result["settings"]["batch"]
    means = mean_unions(result)
    rows = []
    for (kind, keep), by in means.items():
        name = kind if keep is None else f"{kind}, {_percent(keep)}"
        for which in ("neighbours", "strangers", "independent"):
            cells = [_percent(by[size][which]) if size in by else "" for size in batches]
            rows.append([name if which == "neighbours" else "", which, *cells])
    hint = (
        "Distinct neurons that B tokens touch together, mean over the FFNs. Neighbours: consecutive tokens of one "
        "text; strangers: a token each of B texts; independent: expected if each token chose at random."
    )
    head = ["neurons", "tokens", *(f"B {size}" for size in batches)]
    return TextTable(title="Neurons of several tokens together", head=head, rows=rows, hint=hint)


def mean_unions(result: Mapping[str, Any]) -> dict[tuple[str, float | None], dict[int, dict[str, float | None]]]:
    """Return {(set, keep): {B: {"neighbours", "strangers", "independent"}}}, means over the FFNs that have one."""
    found: dict[tuple[str, float | None], dict[int, dict[str, list[float]]]] = {}
    for layer in result["layers"]:
        for row in layer["union"]:
            by = found.setdefault((row["set"], row["keep"]), {}).setdefault(row["batch"], {})
            for which in ("neighbours", "strangers", "independent"):
                by.setdefault(which, []).extend([] if row[which] is None else [row[which]])
    return {
        key: {
            size: {which: fmean(values) if values else None for which, values in by.items()}
            for size, by in sizes.items()
        }
        for key, sizes in found.items()
    }


def speed_table(result: Mapping[str, Any]) -> TextTable:
    """Lay out predicted and measured times, a line per shape, share and batch."""
    timed = {
        (part["site"], row["keep"], row["batch"]): row
        for part in result["speed"]
        for row in part["rows"]
    }  # fmt: skip
    rows = []
    for part in result["predicted"]:
        for row in part["rows"]:
            ours = timed.get((part["site"], row["keep"], row["batch"]))
            dense = timed.get((part["site"], None, row["batch"]))
            cells = [f"{row['dense_us']:.4g}", f"{row['us']:.4g}", f"{row['speed_up']:.2f}", row["bound"]]
            cells += [_us(dense), _us(ours), "" if not ours or ours["speed_up"] is None else f"{ours['speed_up']:.2f}"]
            rows.append([f"{part['site']} ({part['sites']})", _percent(row["keep"]), f"{row['batch']}", *cells])
    head = ["FFN (as many)", "neurons", "tokens", "dense us", "HiRE us", "dense / HiRE", "bound"]
    head += ["measured: dense", "HiRE", "dense / HiRE"]
    hint = (
        f"Microseconds a call of one layer in {result['settings']['dtype']}, its tokens of as many texts. Predicted: "
        "the least time by this machine's roofline, of the bytes that the tokens' union touches. Measured: packed "
        "layers and torch's, 12 copies in turn."
    )
    return TextTable(title="Time of HiRE beside the dense layer", head=head, rows=rows, hint=hint)


def model_name(result: Mapping[str, Any]) -> str:
    """Name the model: what a command was given, else its class."""
    return str(result["settings"].get("model", result["model"]))


def _first(result: Mapping[str, Any]) -> tuple[float, str, int]:
    settings = result["settings"]
    return settings["keep"][0], settings["sketches"][0], max(settings["batch"])


def _targets(result: Mapping[str, Any]) -> list[float]:
    return list(dict.fromkeys(row["target"] for layer in result["layers"] for row in layer["recall"]))


def _unions(layer: Mapping[str, Any], kind: str, keep: float) -> dict[int, Mapping[str, Any]]:
    return {row["batch"]: row for row in layer["union"] if (row["set"], row["keep"]) == (kind, keep)}


def _us(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return ""
    return (why_not(row) or "not run") if row["us_median"] is None else f"{row['us_median']:.4g}"


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.3g}%"


def _value(value: float) -> str:
    return f"{value:,.4g}"
