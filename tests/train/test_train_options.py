"""Options, presets, the schedule, and what is done to gradients before an update."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import nogemm
from nogemm.train.lm.options import PRESETS, TrainOptions, preset_record, train_options
from nogemm.train.loop.updates import Watch, average_rows, clip, rate_share


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_a_set_of_defaults(name: str) -> None:
    options = train_options(name)
    for field, value in PRESETS[name].items():
        assert getattr(options, field) == value
    changed = train_options(name, lr=0.5, tokens=7)
    record = preset_record(name, changed)
    assert record["preset"] == name
    assert record["preset_options"]["lr"] == PRESETS[name]["lr"]
    assert record["overrides"]["lr"] == 0.5
    assert (changed.tokens, changed.steps, changed.max_seconds) == (7, None, None)  # one budget takes all others' place


def test_the_published_recipe() -> None:
    options = train_options("lookupffn")
    assert options.steps is not None
    assert options.steps * options.batch * options.context == 32_768_000_000
    assert options.steps * options.warmup == 10_000


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "budget"),
        ({"steps": 0}, "steps must lie between"),
        ({"steps": 2.5}, "steps must be a whole number"),
        ({"steps": 1, "task": "nsp"}, "task must be one of mlm, clm"),
        ({"steps": 1, "width": 10, "heads": 3}, "width=10 is not a multiple of heads=3"),
        ({"steps": 1, "ffn": "lookup"}, "ffn must be a layer config"),
        ({"steps": 1, "head": "hire"}, 'task="clm"'),
        ({"steps": 1, "learning_rate": 1.0}, "no option 'learning_rate'"),
        ({"steps": 1, "lr": float("nan")}, "lr must lie between"),
    ],
)
def test_wrong_options_are_named(given: dict[str, Any], said: str) -> None:
    with pytest.raises(nogemm.ConfigError, match=said):
        train_options(**given)


def test_an_unknown_preset_is_refused_with_those_that_are_known() -> None:
    with pytest.raises(nogemm.ConfigError, match="lookupffn, hire, laptop"):
        train_options("large")


def test_a_layer_may_be_given_as_json_values() -> None:
    assert train_options(steps=1, ffn={"kind": "lookup", "tables": 3}).ffn == nogemm.LookupConfig(tables=3)


@pytest.mark.parametrize(
    ("decay", "final", "half", "end"), [("linear", 0, 0.5, 0), ("cosine", 0.1, 0.55, 0.1), ("constant", 0, 1, 1)]
)
def test_rates_rise_and_fall(decay: Any, final: float, half: float, end: float) -> None:
    options = TrainOptions(steps=1, warmup=0.2, decay=decay, final=final)
    found = [rate_share(fraction, options) for fraction in (0.1, 0.2, 0.6, 1.0)]
    assert found == pytest.approx([0.5, 1.0, half, end], abs=1e-6)
    assert rate_share(0.0, options) > 0
    assert rate_share(0.0, TrainOptions(steps=1, warmup=0.0)) == 1.0


def gradients(*values: float) -> list[nn.Parameter]:
    out = []
    for value in values:
        parameter = nn.Parameter(torch.zeros(1))
        parameter.grad = torch.tensor([value])
        out.append(parameter)
    return out


def test_norms_of_groups_are_clipped_together() -> None:
    groups = {"tables": gradients(3.0), "backbone": gradients(0.0, 4.0)}
    norms = Watch().norms(groups)
    assert norms == {"tables": 3.0, "backbone": 4.0}
    assert clip(groups, norms, 0.0) == 5.0
    assert clip(groups, norms, 1.0) == 5.0
    clipped = [p.grad.item() for group in groups.values() for p in group if p.grad is not None]
    assert clipped == pytest.approx([0.6, 0, 0.8])


def test_the_complaint_names_what_had_grown() -> None:
    watch = Watch()
    for norm in (1.0, 1.0, 50.0):
        watch.accept({"tables": norm, "backbone": 2.0})
    groups = {"tables": gradients(float("nan")), "backbone": gradients(1.0)}
    said = str(watch.complaint(watch.norms(groups), 3.0, 6, groups))
    assert "a gradient is not finite at step 7" in said
    assert "not finite: tables" in said
    assert "gradient of tables, to 8.47 times" in said
    assert "weights" not in said


def test_rows_of_two_processes_are_averaged(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = (2, 3, 2)  # two trees of three nodes

    def rows(*entries: tuple[int, int, float]) -> torch.Tensor:
        place = torch.tensor([[k, n] for k, n, _ in entries]).T
        values = torch.tensor([[v, -v] for _, _, v in entries])
        return torch.sparse_coo_tensor(place, values, shape, check_invariants=True).coalesce()

    own, other = rows((0, 1, 2.0), (1, 2, 4.0)), rows((0, 1, 6.0), (1, 0, 8.0), (1, 1, 10.0))
    told = [torch.tensor([3]), other.indices(), other.values()]

    def gather(into: list[torch.Tensor], mine: torch.Tensor) -> None:
        into[0].copy_(mine)
        into[1].copy_(told.pop(0))

    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "all_gather", gather)
    parameter = nn.Parameter(torch.zeros(shape))
    parameter.grad = own
    average_rows(parameter)
    assert parameter.grad is not None
    assert parameter.grad.is_sparse
    assert parameter.grad.to_dense().equal((own.to_dense() + other.to_dense()) / 2)
