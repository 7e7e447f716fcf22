"""Checkpoints that must not load: truncated, corrupted, edited, mixed, too new, or opened without nogemm."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_models import FAMILIES, SMALL, Family, run_python, train_a_little
from transformers import AutoConfig, AutoModelForMaskedLM

import nogemm


@pytest.fixture
def path(converted_bert: Any, tmp_path: Path) -> Path:
    converted_bert.save_pretrained(tmp_path / "good")
    return tmp_path / "good"


def edit_config(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    file = path / "config.json"
    config = json.loads(file.read_text())
    change(config["quantization_config"])
    file.write_text(json.dumps(config))


def edit_weights(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Change tensors but keep the file's metadata, as a careful editor would."""
    file = path / "model.safetensors"
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata=metadata)


def load(path: Path, **kwargs: Any) -> Any:
    return FAMILIES["bert"].auto.from_pretrained(path, **kwargs)


def test_the_untouched_checkpoint_loads(path: Path) -> None:
    """Negative control for every test below."""
    load(path)
    edit_weights(path, lambda tensors: None)
    edit_config(path, lambda stored: None)
    load(path)


@pytest.mark.parametrize("keep", [0, 5, 200, 0.5, 0.999])
def test_truncated_weights(path: Path, keep: float) -> None:
    file = path / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[: int(keep * len(data)) if isinstance(keep, float) else keep])
    with pytest.raises(Exception, match=r"(?i)truncated|header|deserializ|safetensor"):
        load(path)


@pytest.mark.parametrize("keep", [0, 30, 300])
def test_truncated_config(path: Path, keep: int) -> None:
    file = path / "config.json"
    file.write_text(file.read_text()[:keep])
    with pytest.raises(OSError, match=r"not a valid JSON|valid JSON"):
        load(path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("key", ["tables", "projection.weight", "norm.bias", "bias"])
def test_one_flipped_bit_in_a_tensor_of_ours(path: Path, key: str, dtype: torch.dtype) -> None:
    file = path / "model.safetensors"
    data = bytearray(file.read_bytes())
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    at = 8 + size + header[f"bert.encoder.layer.1.intermediate.{key}"]["data_offsets"][0]
    data[at] ^= 1
    file.write_bytes(data)
    with pytest.raises(nogemm.CheckpointError, match=rf"encoder\.layer\.1' \({key}\).*corrupted"):
        load(path, dtype=dtype)


@pytest.mark.parametrize("ignore", [False, True])
def test_a_missing_tensor(path: Path, ignore: bool) -> None:
    edit_weights(path, lambda tensors: tensors.pop("bert.encoder.layer.0.intermediate.tables"))
    edit_config(path, lambda stored: stored.pop("save_id"))  # the seal is broken on purpose: the next check answers
    with pytest.raises(nogemm.CheckpointError, match=r"lacks weights of FFNs.*layer\.0: tables"):
        load(path, ignore_mismatched_sizes=ignore)


def test_a_tensor_of_another_shape_is_never_ignored(path: Path) -> None:
    name = "bert.encoder.layer.0.intermediate.tables"
    edit_weights(path, lambda tensors: tensors.update({name: tensors[name][:2].clone()}))
    edit_config(path, lambda stored: stored.pop("save_id"))
    with pytest.raises(nogemm.CheckpointError, match=r"another shape.*layer\.0: tables"):
        load(path, ignore_mismatched_sizes=True)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        load(path)


def test_a_newer_format_says_upgrade(path: Path) -> None:
    edit_config(path, lambda stored: stored.update(format=2, something="new"))
    with pytest.raises(nogemm.CheckpointError, match=r"format 2, this nogemm reads up to 1: upgrade"):
        load(path)


@pytest.mark.parametrize(
    "change",
    [
        lambda stored: stored.pop("format"),
        lambda stored: stored.update(format="one"),
        lambda stored: stored.pop("sites"),
        lambda stored: stored.update(sites={}),
    ],
)
def test_an_incomplete_description(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    edit_config(path, change)
    with pytest.raises(nogemm.CheckpointError, match="not a complete nogemm description"):
        load(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(tables=8), "ignore_mismatched_sizes|another shape"),
        (lambda c: c.update(bits=17), r"site 'encoder\.layer\.0'.*bits"),
        (lambda c: c.update(kind="magic"), r"site 'encoder\.layer\.0'.*'magic'"),
        (lambda c: c.update(colour="red"), r"site 'encoder\.layer\.0'.*'colour'"),
        (lambda c: c.update(norm=False), None),
    ],
)
def test_an_edited_layer_config(path: Path, change: Callable[[dict[str, Any]], None], message: str | None) -> None:
    edit_config(path, lambda stored: change(stored["sites"]["encoder.layer.0"]))
    if message is None:
        # A value that changes no shape cannot be told from a wish; the tensors it leaves over are reported.
        _, info = load(path, output_loading_info=True)
        assert "bert.encoder.layer.0.intermediate.norm.weight" in info["unexpected_keys"]
        return
    with pytest.raises(RuntimeError, match=message):
        load(path)


@pytest.mark.parametrize("ignore", [False, True])
def test_a_site_removed_from_the_config(path: Path, ignore: bool) -> None:
    edit_config(path, lambda stored: stored["sites"].pop("encoder.layer.0"))
    with pytest.raises(RuntimeError, match=r"layer\.0 \(dense\)|ignore_mismatched_sizes"):
        load(path, ignore_mismatched_sizes=ignore)


def test_a_renamed_site(path: Path) -> None:
    edit_config(path, lambda stored: stored["sites"].update({"encoder.layer.9": stored["sites"]["encoder.layer.0"]}))
    with pytest.raises(nogemm.CheckpointError, match=r"does not have: encoder\.layer\.9\. It has: encoder\.layer\.0, "):
        load(path)


def test_an_interrupted_save_over_a_dense_checkpoint(converted_bert: Any, bert: Family, tmp_path: Path) -> None:
    """save_pretrained writes config.json first: stopped there, the new config meets the old dense weights."""
    bert.build().save_pretrained(tmp_path / "old")
    converted_bert.save_pretrained(tmp_path / "new")
    shutil.copy(tmp_path / "new" / "config.json", tmp_path / "old" / "config.json")
    with pytest.raises(nogemm.CheckpointError, match="different saves"):
        load(tmp_path / "old")


def test_an_interrupted_save_over_an_earlier_save(path: Path, converted_bert: Any, tmp_path: Path) -> None:
    train_a_little(converted_bert)
    converted_bert.save_pretrained(tmp_path / "later")
    shutil.copy(tmp_path / "later" / "config.json", path / "config.json")
    with pytest.raises(nogemm.CheckpointError, match=r"model\.safetensors and config\.json come from different saves"):
        load(path)


def test_an_interrupted_dense_save_over_a_converted_one(path: Path, bert: Family, tmp_path: Path) -> None:
    bert.build().save_pretrained(tmp_path / "dense")
    shutil.copy(tmp_path / "dense" / "config.json", path / "config.json")
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):  # the sentinels have no elements
        load(path)


def test_an_interrupted_save_in_shards(converted_bert: Any, tmp_path: Path) -> None:
    converted_bert.save_pretrained(tmp_path / "a", max_shard_size="8KB")
    train_a_little(converted_bert)
    converted_bert.save_pretrained(tmp_path / "b", max_shard_size="8KB")
    shards = sorted(tmp_path.glob("b/model-*.safetensors"))
    for half in (*shards[: len(shards) // 2], tmp_path / "b" / "config.json"):
        shutil.copy(half, tmp_path / "a" / half.name)
    with pytest.raises(nogemm.CheckpointError, match="different saves"):
        load(tmp_path / "a")
    shards[-1].unlink()
    with pytest.raises(nogemm.CheckpointError, match=f"{shards[-1].name} is missing"):
        load(tmp_path / "b")


def test_an_interrupted_first_save(path: Path) -> None:
    (path / "model.safetensors").unlink()
    with pytest.raises(OSError, match=r"no file named model\.safetensors"):
        load(path)


WITHOUT = """
import json, sys
import transformers
answers = {}
for path in sys.argv[1:]:
    for auto in ("AutoModel", "AutoModelForMaskedLM", "AutoModelForImageClassification"):
        if auto == ("AutoModelForMaskedLM" if path.endswith("vit") else "AutoModelForImageClassification"):
            continue
        for extra in ({}, {"ignore_mismatched_sizes": True},
                      {"ignore_mismatched_sizes": True, "attn_implementation": "eager"},
                      {"attn_implementation": "eager", "experts_implementation": "eager"}):
            key = " ".join([path, auto, *extra])
            try:
                getattr(transformers, auto).from_pretrained(path, **extra)
                answers[key] = "LOADED"
            except Exception as error:
                answers[key] = str(error)
assert "nogemm" not in sys.modules
print(json.dumps(answers))
"""


def test_loading_without_nogemm_is_an_error_that_says_to_import_it(
    path: Path, converted_bert: Any, bert: Family, tmp_path: Path
) -> None:
    """Whole model, saved submodule, a family whose weights are renamed; the dense model shows that loading works."""
    converted_bert.bert.save_pretrained(tmp_path / "submodule")
    vit = FAMILIES["vit"].build()
    nogemm.convert(vit, SMALL)
    train_a_little(vit)
    vit.save_pretrained(tmp_path / "vit")
    bert.build().save_pretrained(tmp_path / "dense")
    done = run_python(WITHOUT, *(str(tmp_path / name) for name in ("good", "submodule", "vit", "dense")))
    assert done.returncode == 0, done.stderr
    answers: dict[str, str] = json.loads(done.stdout)
    assert len(answers) == 4 * 2 * 4
    for key, answer in answers.items():
        if "/dense " in key:
            assert answer == "LOADED"
        elif "experts_implementation" in key:  # both guards overridden by name: the sentinels answer
            assert "ignore_mismatched_sizes" in answer
        else:
            assert "import nogemm" in answer, (key, answer)


def test_sentinels_stop_a_reader_without_the_guard(path: Path) -> None:
    """If the guard is taken out of config.json, the dense weights still have the wrong shape."""
    file = path / "config.json"
    config = json.loads(file.read_text())
    for key in ("attn_implementation", "experts_implementation", "quantization_config"):
        del config[key]
    file.write_text(json.dumps(config))
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        load(path)


def test_a_config_alone_gives_no_model(path: Path) -> None:
    config = AutoConfig.from_pretrained(path)
    with pytest.raises(ValueError, match="import nogemm"):
        AutoModelForMaskedLM.from_config(config)


def test_plain_state_dicts_need_strict_false(path: Path, converted_bert: Any) -> None:
    tensors = load_file(path / "model.safetensors")
    with pytest.raises(RuntimeError, match=r"Unexpected key.*intermediate\.dense\.weight"):
        converted_bert.load_state_dict(tensors)
    assert converted_bert.load_state_dict(tensors, strict=False).unexpected_keys


def test_saving_a_random_model_warns(bert: Family, tmp_path: Path) -> None:
    model = bert.build()
    nogemm.convert(model, SMALL)
    with pytest.warns(UserWarning, match=r"2 converted FFNs are still random.*run nogemm\.distil"):
        model.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    with pytest.warns(UserWarning, match="still random"):  # the checkpoint remembers
        loaded.save_pretrained(tmp_path)
