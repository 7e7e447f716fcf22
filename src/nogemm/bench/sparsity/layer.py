"""All figures of one FFN: zeros, carriers, energy of the strongest neurons, recall of sketches, unions of tokens.

Legend: N tokens, D width, F neurons.
Reading order: `describe`, then its parts in the order of the call.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, get_args

import torch
from torch import Tensor

from nogemm.bench.sparsity.activity import (
    Activity,
    carriers,
    energy,
    fewest,
    independent_union,
    ranked,
    recall_curve,
    strangers,
    strongest,
    union_of_neighbours,
    union_of_strangers,
)
from nogemm.convert.sites import Site
from nogemm.layers import DenseFFN, HireConfig, HireFFN
from nogemm.layers.hire.config import RELU_TYPES, SketchKind
from nogemm.layers.hire.fit import copy_dense
from nogemm.layers.hire.report import mask_of
from nogemm.ops.sketch_and_select import selection_keys, sketch_and_select

TARGETS = (0.9, 0.95, 0.99)
CARRIED = (0.99, 0.999)
SKETCHES: tuple[SketchKind, ...] = get_args(SketchKind)
_COMPARED = 128  # tokens on which the operator's candidates are held against the ranking
_TIES = 0.005  # share of candidates that may differ: scores that are equal but for an activation's last bits


@dataclass
class Found:
    """One FFN's row of the result, and what timing it needs.

    Attributes:
        row: JSON values, see docs/guides/sparsity.md.
        layer: a HireFFN of the site's weights with the first sketch.
        candidates: {keep: how many candidates that sketch needs for the highest target}.
        touched: {(keep, B): distinct neurons that B unrelated tokens keep, and that are their candidates}.
    """

    row: dict[str, Any]
    layer: HireFFN
    candidates: dict[float, int] = field(default_factory=dict)
    touched: dict[tuple[float, int], tuple[float, float]] = field(default_factory=dict)


def kept_count(neurons: int, keep: float) -> int:
    """Return how many neurons a share is, rounded up as HireFFN rounds."""
    return min(neurons, math.ceil(keep * neurons - 1e-9))


@torch.no_grad()
def describe(
    site: Site,
    x_ND: Tensor,
    lengths: Sequence[int],
    *,
    keep: Sequence[float],
    sketches: Sequence[SketchKind],
    batch: Sequence[int],
    seed: int,
) -> Found:
    """Measure one FFN on the inputs that it gets.

    Args:
        x_ND: float32, texts one after the other; a low-rank sketch is fitted to the first half, recall is taken of the
            second.
        lengths: tokens of each text.
        keep: shares of the neurons that are to answer.
        sketches: which sketches name candidates; the first is the one whose candidates' union is measured.
        batch: tokens of a call.
    Raises:
        ArithmeticError: the operator names other candidates than the ranking from which recall is read.
    """
    dense = site.dense().float().eval()
    activity = Activity.of(dense, x_ND)
    neurons = site.hidden
    masks = {share: strongest(activity.strength_NF, kept_count(neurons, share)) for share in keep}
    row: dict[str, Any] = {"site": site.name, "d_in": site.d_in, "hidden": neurons, "d_out": site.d_out}
    row |= {"activation": site.activation, "gated": site.gated, "tokens": len(x_ND), "texts": len(lengths)}
    row["zeros"] = activity.zeros()
    counts = carriers(activity.added_NF, CARRIED).double().mean(1) / neurons
    row["carriers"] = {f"{share:g}": float(count) for share, count in zip(CARRIED, counts, strict=True)}
    row["energy"] = [_energy_row(activity, share, mask) for share, mask in masks.items()]
    row["recall"], row["union"] = [], []
    drawn = {size: strangers(lengths, size, seed) for size in batch}
    if site.activation in RELU_TYPES:
        row["union"] += _unions(activity.h_NF != 0, lengths, drawn, {"set": "active", "keep": None})
    for share, mask in masks.items():
        row["union"] += _unions(mask, lengths, drawn, {"set": "kept", "keep": share})
    found = Found(row, _sketched(site, dense, x_ND, sketches[0]))
    for kind in sketches:
        layer = found.layer if kind == sketches[0] else _sketched(site, dense, x_ND, kind)
        order_NF = _order(layer, x_ND)
        held = slice(len(x_ND) // 2, None)
        for share, mask in masks.items():
            curve_F = recall_curve(order_NF[held], mask[held])
            counts = {target: fewest(curve_F, target) for target in TARGETS}
            row["recall"] += [_recall_row(kind, share, neurons, target, count) for target, count in counts.items()]
            if kind == sketches[0]:
                found.candidates[share] = counts[TARGETS[-1]]
        if kind == sketches[0]:
            _add_candidates(found, order_NF, lengths, drawn)
    return found


def _energy_row(activity: Activity, share: float, mask_NF: Tensor) -> dict[str, Any]:
    count = kept_count(mask_NF.shape[1], share)
    return {
        "keep": share,
        "count": count,
        "kept": float(mask_NF.double().mean()),
        "energy": energy(activity, mask_NF),
        "best_energy": energy(activity, strongest(activity.added_NF, count)),
    }


def _recall_row(kind: str, share: float, neurons: int, target: float, count: int) -> dict[str, Any]:
    oversample = count / kept_count(neurons, share)
    row = {"sketch": kind, "keep": share, "target": target, "candidates": count}
    return row | {"share": count / neurons, "oversample": oversample}


def _sketched(site: Site, dense: DenseFFN, x_ND: Tensor, kind: SketchKind) -> HireFFN:
    """Make a HireFFN of the dense weights; a low-rank sketch is fitted to the first half of the tokens."""
    layer = HireConfig(sketch=kind).make(site.shape).eval().requires_grad_(False)
    copy_dense(layer, dense)
    layer.fit_sketch(x_ND[: max(1, len(x_ND) // 2)])
    return layer


def _order(layer: HireFFN, x_ND: Tensor) -> Tensor:
    """Rank all neurons of each token by the layer's sketch, and hold the ranking against the operator."""
    sketch, bias_F = layer.sketch(), layer.selector[1]
    order_NF = ranked(selection_keys(sketch.scores(x_ND, bias_F), layer.key))
    count = max(1, layer.hidden // 4)
    few = x_ND[:_COMPARED]
    named_NC = sketch_and_select(
        sketch.reduced(few), sketch.codes_FR, sketch.scale_F, bias_F, count=count, key=layer.key
    )
    expected = mask_of(order_NF[: len(few), :count], layer.hidden)
    missed = float((expected & ~mask_of(named_NC, layer.hidden)).sum()) / max(1, int(expected.sum()))
    if missed > _TIES:
        raise ArithmeticError(f"sketch_and_select names other candidates than the ranking: {missed:.2%} of them")
    return order_NF


def _unions(
    mask_NF: Tensor, lengths: Sequence[int], drawn: Mapping[int, Tensor | None], about: dict[str, Any]
) -> list[dict[str, Any]]:
    """Return one row per batch, all figures as shares of the neurons."""
    neurons = mask_NF.shape[1]
    per_token = float(mask_NF.sum(1).double().mean())
    rows = []
    for size, places in drawn.items():
        near, far = union_of_neighbours(mask_NF, lengths, size), union_of_strangers(mask_NF, places)
        figures = {"neighbours": near, "strangers": far, "independent": independent_union(per_token, neurons, size)}
        shares = {name: None if value is None else value / neurons for name, value in figures.items()}
        rows.append({**about, "batch": size, **shares})
    return rows


def _add_candidates(found: Found, order_NF: Tensor, lengths: Sequence[int], drawn: Mapping[int, Tensor | None]) -> None:
    """Add the unions of candidates, and say what B unrelated tokens touch; of few texts, what is expected of them."""
    neurons = order_NF.shape[1]
    for share, count in found.candidates.items():
        mask_NF = mask_of(order_NF[:, :count], neurons)
        rows = _unions(mask_NF, lengths, drawn, {"set": "candidates", "keep": share})
        found.row["union"] += rows
        kept = {row["batch"]: row for row in found.row["union"] if (row["set"], row["keep"]) == ("kept", share)}
        for row in rows:
            both = (kept[row["batch"]], row)
            shares = [one["independent"] if one["strangers"] is None else one["strangers"] for one in both]
            found.touched[share, row["batch"]] = (shares[0] * neurons, shares[1] * neurons)
