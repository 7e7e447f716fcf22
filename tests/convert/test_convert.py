"""convert(): choosing sites, mixed configs, closed-form fits, the report, and what is refused."""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest
import torch
import transformers
from tiny_models import FAMILIES, SMALL, Family
from torch import nn

import nogemm
from nogemm.convert.activations import collect_inputs
from nogemm.convert.convert import select_sites
from nogemm.layers import DenseFFN, LookupFFN, NoFFN

NAMES = ["encoder.layer.0", "encoder.layer.1", "encoder.layer.10", "decoder.layer.0"]


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ("all", NAMES),
        (0, NAMES[:1]),
        ([3, 0], [NAMES[0], NAMES[3]]),
        ([-1], NAMES[3:]),
        ("encoder.*", NAMES[:3]),
        (["*.0"], [NAMES[0], NAMES[3]]),
        (["encoder.layer.1", 3], [NAMES[1], NAMES[3]]),
    ],
)
def test_layers_are_chosen_in_model_order(layers: Any, expected: list[str]) -> None:
    assert select_sites(NAMES, layers) == expected


@pytest.mark.parametrize("layers", ["encoder.layer.7", ["*.0", "nothing"]])
def test_a_name_that_matches_nothing_lists_the_names(layers: Any) -> None:
    with pytest.raises(nogemm.ConfigError, match=r"matches no site .* encoder\.layer\.0, encoder\.layer\.1, "):
        select_sites(NAMES, layers)


@pytest.mark.parametrize("layers", [4, [-5], [True], [1.5], []])
def test_bad_indices_are_refused(layers: Any) -> None:
    with pytest.raises(nogemm.ConfigError, match="layers"):
        select_sites(NAMES, layers)


def test_configs_by_glob_first_match_counts(bert: Family) -> None:
    model = bert.build()
    report = nogemm.convert(model, {"*.layer.0": nogemm.NoConfig(), "*": SMALL})
    assert [type(layer) for layer in nogemm.converted(model).values()] == [NoFFN, LookupFFN]
    assert [site.config.kind for site in report.sites] == ["no", "lookup"]


def test_globs_leave_other_sites_dense(bert: Family) -> None:
    model = bert.build()
    nogemm.convert(model, {"*.1": SMALL})
    assert list(nogemm.converted(model)) == [bert.names[1]]
    nogemm.convert(model, nogemm.DenseConfig(hidden=8), layers=0)
    assert list(nogemm.converted(model)) == list(bert.names)


def test_a_config_glob_that_matches_nothing_is_refused(bert: Family) -> None:
    model = bert.build()
    with pytest.raises(nogemm.ConfigError, match=r"'\*\.9' matches no site .*bert\.encoder\.layer\.0"):
        nogemm.convert(model, {"*": SMALL, "*.9": SMALL})
    assert not nogemm.converted(model)


def test_the_same_site_twice_is_refused_and_changes_nothing(bert: Family) -> None:
    model = bert.build()
    nogemm.convert(model, SMALL, layers=[0])
    before = nogemm.converted(model)
    with pytest.raises(
        nogemm.ConfigError, match=r"converted already: bert\.encoder\.layer\.0.*Still dense: .*layer\.1"
    ):
        nogemm.convert(model, SMALL)
    assert nogemm.converted(model) == before


def test_a_family_without_a_site_says_how_to_register_one() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wide, self.narrow = nn.Linear(4, 8), nn.Linear(8, 4)

    with pytest.raises(nogemm.ConfigError, match=r"refused: 0 \(Odd\): .*nogemm\.register_site"):
        nogemm.convert(nn.Sequential(Odd()), SMALL)


def test_something_else_than_a_config_is_refused(bert: Family) -> None:
    with pytest.raises(nogemm.ConfigError, match="expected a layer config"):
        nogemm.convert(bert.build(), "lookup")  # type: ignore[arg-type]


def test_nothing_to_convert_and_a_name_in_a_models_place_are_refused(bert: Family) -> None:
    with pytest.raises(nogemm.ConfigError, match="empty"):
        nogemm.convert(bert.build(), {})
    name: Any = "all-MiniLM-L6-v2"
    with pytest.raises(nogemm.ConfigError, match=name):
        nogemm.convert(name, SMALL)


def test_report_counts_what_was_there_and_what_is(bert: Family) -> None:
    model = bert.build()
    dense = sum(p.numel() for p in nogemm.sites(model)[0].dense().parameters())
    report = nogemm.convert(model, SMALL)
    first = report.sites[0]
    assert first.parameters_before == dense == 16 * 32 * 2 + 32 + 16
    assert first.parameters_after == sum(p.numel() for p in nogemm.converted(model)[bert.names[0]].parameters())
    assert first.before.flops == 4 * 16 * 32
    assert report.after.flops == 2 * first.after.flops
    assert json.loads(json.dumps(report.to_dict()))["sites"][0]["config"]["kind"] == "lookup"


def test_report_reads_as_a_table(bert: Family) -> None:
    lines = str(nogemm.convert(bert.build(), SMALL)).splitlines()
    assert lines[0].split() == ["site", "layer", "kFLOP/token", "KiB", "read/token", "parameters", "fitted"]
    assert lines[1].startswith("bert.encoder.layer.0  lookup")
    assert lines[-1].startswith("total")


def _batches(family: Family, count: int = 6) -> list[dict[str, torch.Tensor]]:
    torch.manual_seed(7)
    if family.image:
        return [{"pixel_values": torch.randn(2, 3, 8, 8)} for _ in range(count)]
    batches = []
    for _ in range(count):
        ids = torch.randint(3, 64, (2, 9))
        mask = torch.ones_like(ids)
        mask[0, 5:] = 0
        batches.append({"input_ids": ids, "attention_mask": mask})
        if family.encoder_decoder:
            batches[-1]["decoder_input_ids"] = ids
    return batches


def test_closed_form_fit_comes_closer_than_random(family: Family) -> None:
    batches = _batches(family, count=60)
    expected = family.output(family.build())
    errors = {}
    for data in (None, batches):
        model = family.build()
        torch.manual_seed(5)
        report = nogemm.convert(model, SMALL, data=data)
        errors[data is not None] = (family.output(model) - expected).square().mean().item()
        assert {site.fitted for site in report.sites} == {"random" if data is None else "closed-form"}
        assert model.training is False
    assert errors[True] < errors[False]


def test_padding_is_left_out(bert: Family) -> None:
    model = bert.build()
    sites = nogemm.sites(model)
    rows = collect_inputs(model, sites, _batches(bert, count=3))
    assert {tuple(x.shape) for x in rows.values()} == {(3 * (5 + 9), 16)}


def test_collection_is_bounded(bert: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["nogemm.convert.activations"], "MAX_TOKENS", 20)
    served = []

    def endless() -> Any:
        while True:
            served.append(1)
            yield _batches(bert, count=1)[0]

    model = bert.build()
    rows = collect_inputs(model, nogemm.sites(model), endless())
    assert {len(x) for x in rows.values()} == {20}
    assert len(served) < 40


def test_data_that_cannot_be_used_is_refused(bert: Family) -> None:
    model = bert.build()
    with pytest.raises(nogemm.ConfigError, match="is it empty"):
        nogemm.convert(model, SMALL, data=[])
    with pytest.raises(nogemm.ConfigError, match="not one text"):
        nogemm.convert(model, SMALL, data="a text")
    with pytest.raises(nogemm.ConfigError, match="pass tokenizer="):
        nogemm.convert(model, SMALL, data=["a text"])
    assert not nogemm.converted(model)


def test_constant_layer_learns_the_mean(bert: Family) -> None:
    model = bert.build()
    dense = nogemm.sites(model)[0].dense()
    rows = collect_inputs(model, nogemm.sites(model), _batches(bert))
    nogemm.convert(model, nogemm.NoConfig(), layers=0, data=_batches(bert))
    layer = nogemm.converted(model)[bert.names[0]]
    assert isinstance(layer, NoFFN)
    torch.testing.assert_close(layer.bias, dense(rows[bert.names[0]]).mean(0))


def test_dtype_of_the_model_is_kept(bert: Family) -> None:
    model = bert.build().to(torch.bfloat16)
    nogemm.convert(model, {"*.0": nogemm.DenseConfig(), "*.1": SMALL}, data=_batches(bert))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert torch.isfinite(bert.output(model)).all()


def test_a_frozen_copy_shares_nothing_with_the_dense_model() -> None:
    model = FAMILIES["llama"].build()
    weight = model.model.layers[0].mlp.down_proj.weight
    nogemm.convert(model, nogemm.DenseConfig(), layers=0)
    layer = nogemm.converted(model)["model.layers.0.mlp"]
    assert isinstance(layer, DenseFFN)
    assert layer.down.weight.data_ptr() != weight.data_ptr()


def test_generation_runs_on_a_converted_decoder() -> None:
    model = FAMILIES["gpt2"].build()
    nogemm.convert(model, SMALL)
    ids = torch.arange(5)[None]
    tokens = model.generate(ids, max_new_tokens=3, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert tokens.shape == (1, 8)


def test_composite_models_are_searched_whole() -> None:
    config = transformers.CLIPConfig(
        text_config={"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
                     "vocab_size": 64},
        vision_config={"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
                       "image_size": 8, "patch_size": 4},
    )  # fmt: skip
    names = [site.name for site in nogemm.sites(transformers.CLIPModel(config))]
    assert len(names) == 2
    assert {site.activation for site in nogemm.sites(transformers.CLIPModel(config))} == {"quick_gelu"}
