"""Configs: JSON round trip, command-line words, and errors that name what is wrong."""

import json

import pytest

import nogemm
from nogemm.config import layer_config, parse_set
from nogemm.errors import ConfigError
from nogemm.testing.cases import KINDS, LOOKUP_CASES


@pytest.mark.parametrize("config", [c.config for c in LOOKUP_CASES] + [nogemm.DenseConfig(hidden=5)])
def test_json_round_trip(config: nogemm.LookupConfig) -> None:
    assert layer_config(json.loads(json.dumps(config.to_dict()))) == config


def test_set_words() -> None:
    words = ["tables=64", "projection.block=32", "score=sigmoid", "norm=false", "projection.residual=null"]
    expected = nogemm.LookupConfig(tables=64, score="sigmoid", norm=False, projection=nogemm.BHConfig(block=32))
    assert parse_set(nogemm.LookupConfig, words) == expected
    dense = parse_set(nogemm.LookupConfig, ["projection=dense"])
    assert dense == nogemm.LookupConfig(projection=nogemm.DenseProjectionConfig())
    assert parse_set(nogemm.LookupConfig, ["projection.bias=false", "projection=dense"]) == nogemm.LookupConfig(
        projection=nogemm.DenseProjectionConfig(bias=False)
    )


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"tables": 0}, "LookupConfig.*tables=0"),
        ({"bits": 17}, "1 to 16.*bits=17"),
        ({"bits": 3, "neighbours": 9}, "1 to 8.*neighbours=9"),
        ({"tables": 2.5}, "tables=2.5"),
        ({"tables": True}, "tables=True"),
        ({"score": "softmax"}, "gelu, sigmoid.*score='softmax'"),
        ({"storage": "int4"}, "storage='int4'"),
        ({"norm_eps": -1e-5}, "norm_eps"),
        ({"norm_eps": float("inf")}, "norm_eps must be a finite number, got norm_eps=inf"),
        ({"norm_eps": float("nan")}, "norm_eps=nan"),
        ({"norm": 1}, "norm must be true or false, got norm=1"),
        ({"projection": 3}, "projection.* 3$"),
    ],
)
def test_values_out_of_range_are_named(values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        nogemm.LookupConfig(**values)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"kind": "loookup"}, "'loookup'.*dense, "),
        ({"kind": "lookup", "tabels": 3}, "LookupConfig.*'tabels'"),
        ({"kind": "lookup", "projection": {"kind": "dct"}}, "'dct'"),
        ([1], r"\[1\]"),
    ],
)
def test_hand_edited_json_is_named(data: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        layer_config(data)


def test_set_needs_a_value() -> None:
    with pytest.raises(ConfigError, match="NAME=VALUE"):
        parse_set(nogemm.LookupConfig, ["tables"])


@pytest.mark.parametrize("block", [0, 3, -4])
def test_block_must_be_a_power_of_two(block: int) -> None:
    with pytest.raises(ConfigError, match="block"):
        nogemm.BHConfig(block=block)


def test_block_must_divide_the_padded_width() -> None:
    with pytest.raises(ConfigError, match=r"block=64.* 32 \(d_in=20"):
        nogemm.LookupConfig(tables=2, bits=2).build(20)


def test_numbers_and_switches_of_every_kind_are_checked() -> None:
    for kind, config in KINDS.items():
        for name, value in config.to_dict().items():
            if isinstance(value, float):
                with pytest.raises(ConfigError, match=f"{name}="):
                    layer_config({**config.to_dict(), name: float("nan")})
            elif isinstance(value, bool):
                with pytest.raises(ConfigError, match=f"{name}='yes'"):
                    layer_config({**config.to_dict(), name: "yes"})
        assert layer_config(config.to_dict()).kind == kind


def test_a_number_of_too_many_digits_is_a_word() -> None:
    with pytest.raises(ConfigError, match="tables must be an integer"):
        parse_set(nogemm.LookupConfig, ["tables=" + "9" * 5000])
    with pytest.raises(ConfigError, match="tables must be an integer"):
        parse_set(nogemm.LookupConfig, ["tables=" + "[" * 100_000])
