"""What fuzzing found, one case of each kind, with what is right."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import fuzz_checkpoints
import pytest
import torch

from nogemm import BHConfig, HireConfig, LookupConfig, TreeConfig
from nogemm.bench.report.write import write_report
from nogemm.config import LayerConfig
from nogemm.errors import CheckpointError, ConfigError
from nogemm.files import parse_json
from nogemm.models.loading import load_model
from nogemm.ops.packed_hire import _fields, packed_hire
from nogemm.study.plan import read_study
from nogemm.study.reading import MOST_ROWS, read_yaml
from nogemm.train import sources
from nogemm.train.errors import DataError
from sample_results import demo_result, layer_result

DEEP = "[" * 100_000
BOMB = "a0: &a0 [1, 2]\n" + "".join(f"a{i + 1}: &a{i + 1} [{', '.join([f'*a{i}'] * 9)}]\n" for i in range(9))


def test_json_that_is_nested_too_deeply(tmp_path: Path) -> None:
    assert parse_json("[[1]]") == [[1]]
    with pytest.raises(ValueError, match="nested too deeply"):
        parse_json(DEEP)
    (tmp_path / "rows.jsonl").write_text(DEEP)
    with pytest.raises(DataError, match=r"line 1 is not JSON .*nested too deeply"):
        list(sources.texts(tmp_path / "rows.jsonl"))
    (tmp_path / "result.json").write_text(DEEP)
    with pytest.raises(ConfigError, match=r"result\.json: not JSON .*nested too deeply"):
        write_report([tmp_path / "result.json"], tmp_path / "report.html")


def study(tmp_path: Path, text: str) -> Path:
    (tmp_path / "study.yaml").write_text(text)
    return tmp_path / "study.yaml"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("rows: !!int many", "not YAML"),
        ("rows: !!timestamp soon", "not YAML"),
        ("rows: !!bool perhaps", "not YAML"),
        (f"seeds: [{'9' * 5000}]", "not YAML"),
        ("[" * 5000, "not YAML"),
        ("rows: &a [*a]", "more than 100,000 values"),
        (BOMB, "more than 100,000 values"),
        ("rows: [{name: " + 201 * "a" + "}]", "200 at most"),
    ],
)  # fmt: skip
def test_study_files_that_are_no_plain_values(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=rf"study\.yaml.*{said}"):
        read_study(study(tmp_path, text))


def test_aliases_are_read(tmp_path: Path) -> None:
    assert read_yaml(study(tmp_path, "a: &a [1]\nb: [*a, *a]")) == {"a": [1], "b": [[1], [1]]}


def test_a_grid_has_an_end(tmp_path: Path) -> None:
    many = list(range(1, 200))
    with pytest.raises(ConfigError, match=f"grid 1: its lists make 7,880,599 rows, more than {MOST_ROWS:,}"):
        read_study(
            study(tmp_path, f"grid: [{{method: lookup, set: {{tables: {many}, bits: {many}, neighbours: {many}}}}}]")
        )


def change(result: dict[str, Any], path: list[Any], value: Any) -> dict[str, Any]:
    *parents, last = path
    node: Any = result
    for name in parents:
        node = node[name]
    node[last] = value
    return result


@pytest.mark.parametrize(
    "bad",
    [
        change(layer_result(), ["rows", 0, "us_median"], "3"),
        change(layer_result(), ["rows", 0, "us_median"], 0.0),
        change(layer_result(), ["rows", 0, "us_median"], {}),
        change(layer_result(), ["rows", 0, "contender"], "nogemm \ud800"),
        change(layer_result(), ["kind"], []),
        change(demo_result(), ["machine"], 0.5),
        change(demo_result(), ["quality", 0, "scores", "mrr_at_10", "value"], "high"),
        change(demo_result(), ["sites", 0, "before", "parameters"], "many"),
    ],
)
def test_results_that_cannot_be_drawn_are_named(tmp_path: Path, bad: dict[str, Any]) -> None:
    """Beside a good one, which is not to blame; nothing is written."""
    (tmp_path / "good.json").write_text(json.dumps(demo_result()))
    (tmp_path / "bad.json").write_text(json.dumps(bad))
    with pytest.raises(ConfigError, match=r"bad\.json: not a"):
        write_report([tmp_path / "good.json", tmp_path / "bad.json"], tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()
    assert write_report([tmp_path / "good.json"], tmp_path / "report.html").is_file()


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (["hidden_act"], 7),
        (["num_hidden_layers"], None),
        (["quantization_config", "checksums"], 0.5),
        (["quantization_config", "checksums", "encoder.layer.0"], [1]),
        (["quantization_config", "fitted"], "trained"),
        (["quantization_config", "head"], 3),
        (["quantization_config", "holders"], {"encoder.layer.0": 1}),
    ],
)
def test_damaged_config_json_is_named(tmp_path: Path, path: list[Any], value: Any) -> None:
    config, weights = fuzz_checkpoints.good()
    (tmp_path / "model.safetensors").write_bytes(weights)
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert load_model(tmp_path) is not None
    (tmp_path / "config.json").write_text(json.dumps(change(json.loads(json.dumps(config)), path, value)))
    with pytest.raises((CheckpointError, ValueError)):
        load_model(tmp_path)


LAYERS: dict[str, LayerConfig] = {
    "packed_lookup": LookupConfig(tables=4, bits=3, projection=BHConfig(block=8)),
    "packed_tree": TreeConfig(depth=3),
    "packed_hire": HireConfig(keep=0.2, static=3),
}


@pytest.mark.parametrize("op", LAYERS)
def test_every_word_of_a_packed_header_is_checked(op: str) -> None:
    """A size, an offset or a count that the packer did not write would send a kernel out of its buffer."""
    layer = LAYERS[op].build(24, 20, hidden=40).eval().pack("int8", "rows")
    packed, x = layer.get_buffer("packed"), torch.randn(3, 24)
    run = getattr(torch.ops.nogemm, op)
    right = run(x, packed, 20)
    words = {"packed_lookup": 26, "packed_tree": 14, "packed_hire": 38}[op]
    for at in range(words):
        for value in (0, -1, 2**62, 2**31):
            bad = packed.clone()
            bad[8 * at : 8 * at + 8] = torch.tensor([value]).view(torch.uint8)
            if torch.equal(bad, packed):
                continue
            try:
                y = run(x, bad, 20)
            except (ValueError, RuntimeError):
                continue
            assert y.shape == right.shape, at


def test_neurons_that_are_not_there_are_refused() -> None:
    layer = LAYERS["packed_hire"].build(24, 20, hidden=40).eval().pack("fp32", "rows")
    packed = layer.get_buffer("packed").clone()
    assert packed_hire(torch.randn(1, 24), packed, 20).shape == (1, 20)
    at = int(packed[8 * list(_fields()).index("always") :][:8].view(torch.int64))
    packed[at : at + 4] = torch.tensor([10**6], dtype=torch.int32).view(torch.uint8)
    with pytest.raises((ValueError, RuntimeError), match="neurons that are not there"):
        packed_hire(torch.randn(1, 24), packed, 20)


@pytest.mark.parametrize("op", LAYERS)
@pytest.mark.parametrize("scale", [2.0**-126, 2.0**-140, 2.0**-149])
def test_numbers_next_to_zero_in_eight_bits(op: str, scale: float) -> None:
    """Their steps, or the inverse of those, are no normal numbers: neither inf nor NaN may come of it."""
    torch.manual_seed(0)
    layer = LAYERS[op].build(24, 20, hidden=40).eval()
    x = torch.randn(5, 24) * scale
    for run in (layer.pack("int8", "rows"), layer.pack("fp32", "rows")):
        torch.testing.assert_close(run(x), run(torch.zeros_like(x)), atol=1e-30, rtol=0)
    with torch.no_grad():
        for value in layer.parameters():
            value.mul_(scale)
    torch.testing.assert_close(layer.pack("int8", "rows")(torch.randn(5, 24)), torch.zeros(5, 20), atol=1e-30, rtol=0)


@pytest.mark.parametrize("text", ["rows: [{name: a, set: 3}]", "rows: [{name: a, kind: [1]}]", "options: 7\nrows: [{}]",
                                  "kind: {a: 1}\nrows: [{}]", "grid: [{set: [1]}]", "rows: [[1]]", "grid: 3",
                                  "options: {train: 3}\nrows: [{}]", "seeds: {a: 1}\nrows: [{}]"])  # fmt: skip
def test_study_values_of_another_kind_are_named(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match=r"study\.yaml"):
        read_study(study(tmp_path, text))
