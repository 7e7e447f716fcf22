"""Study files: what YAML means, which keys are known, how grids multiply."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import nogemm
from nogemm.errors import ConfigError
from nogemm.study.reading import check_keys, multiplied, read_layer, read_yaml


def yaml(folder: Path, text: str) -> Any:
    (folder / "a.yaml").write_text(text)
    return read_yaml(folder / "a.yaml")


def test_yaml_is_read_as_version_1_2_says(tmp_path: Path) -> None:
    text = "a: no\nb: 1e-3\nc: 20_000\nd: true\ne: 2.5\nf: 1:30\ng: off\nh: [yes, 5e-4, -3]\ni: 2026-11-30\nj: null"
    assert yaml(tmp_path, text) == {
        "a": "no", "b": 1e-3, "c": 20_000, "d": True, "e": 2.5, "f": "1:30", "g": "off", "h": ["yes", 5e-4, -3],
        "i": "2026-11-30", "j": None,
    }  # fmt: skip
    assert isinstance(yaml(tmp_path, "a: 3")["a"], int)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: 1\nb: 2\na: 3", "'a' stands twice"),
        ("- 1", "mapping with rows"),
        ("a: [1", "not YAML"),
        ("a: !!python/object/apply:os.getcwd []", "not YAML"),
        ("1: 2", "is no word"),
    ],
)
def test_what_is_no_study_file_is_said(text: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=said):
        yaml(tmp_path, text)


def test_an_absent_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"gone\.yaml: no such study file"):
        read_yaml(tmp_path / "gone.yaml")


def test_an_unknown_key_is_named_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"here: unknown key 'seed'; did you mean 'seeds'\?"):
        check_keys({"seed": 1}, ["rows", "seeds"], "here")
    with pytest.raises(ConfigError, match="known: rows, seeds"):
        check_keys({"xyz": 1}, ["rows", "seeds"], "here")


def test_layers_are_read_with_nested_fields() -> None:
    config = read_layer("lookup", {"tables": 4, "projection": {"block": 8}, "projection.rounds": 2}, "here")
    assert config == nogemm.LookupConfig(tables=4, projection=nogemm.BHConfig(block=8, rounds=2))
    config = read_layer("lookup", {"projection": "dense"}, "here")
    assert config == nogemm.LookupConfig(projection=nogemm.DenseProjectionConfig())
    assert read_layer("dense+lookup", {"lookup.tables": 4}, "here") == nogemm.SumConfig(
        terms=(nogemm.DenseConfig(), nogemm.LookupConfig(tables=4))
    )


@pytest.mark.parametrize(
    ("method", "choices", "said"),
    [
        ("lookups", {}, "unknown method 'lookups'; did you mean 'lookup'?"),
        ("lookup", {"table": 3}, "lookup has no field 'table'; did you mean 'tables'?"),
        ("lookup", {"tables": 0}, "tables=0"),
        (False, {}, "method must be the kind of a layer"),
        ("lookup", 3, "set must be a mapping"),
    ],
)
def test_wrong_layers_are_named(method: Any, choices: Any, said: str) -> None:
    with pytest.raises(ConfigError) as error:
        read_layer(method, choices, "row 3")
    assert str(error.value).startswith("row 3: ")
    assert said in str(error.value)


def test_a_grid_is_every_combination() -> None:
    entry = {"method": "lookup", "set": {"tables": [4, 8], "bits": 3, "projection": {"block": [8, 16]}},
             "options": {"lr": [1e-3]}, "name": "L{tables}-{projection.block}-{lr}"}  # fmt: skip
    rows = list(multiplied(entry, "grid"))
    assert [row["name"] for row in rows] == ["L4-8-0.001", "L4-16-0.001", "L8-8-0.001", "L8-16-0.001"]
    assert rows[1]["set"] == {"tables": 4, "bits": 3, "projection.block": 16}
    assert rows[1]["options"] == {"lr": 1e-3}
    plain = list(multiplied({"method": ["no", "dense"]}, "grid"))
    assert [row["name"] for row in plain] == ["no", "dense"]


def test_a_grid_names_only_its_own_lists() -> None:
    with pytest.raises(ConfigError, match=r"names no list of this grid; did you mean 'tables'\?"):
        list(multiplied({"method": "lookup", "set": {"tables": [1]}, "name": "{table}"}, "grid 1"))
    with pytest.raises(ConfigError, match="the list of tables is empty"):
        list(multiplied({"method": "lookup", "set": {"tables": []}}, "grid 1"))
