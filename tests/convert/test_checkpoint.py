"""Save and load through plain transformers: equal outputs, every family, every way of loading."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from tiny_models import FAMILIES, SMALL, Family, run_python, train_a_little

import nogemm
from nogemm.convert.checkpoint import is_checkpoint
from nogemm.convert.quantizer import NogemmConfig, NogemmQuantizer
from nogemm.layers import LookupFFN
from nogemm.testing.compare import Mismatch
from nogemm.testing.compare_model import check_answers, check_same_model, check_same_tensors


def saved(model: Any, folder: Path) -> Path:
    train_a_little(model)
    model.save_pretrained(folder)
    return folder


def check_encoder(name: str, loaded: Any, model: Any, family: Family) -> None:
    """Compare two BERTs of which one may have a pooler that the other lacks."""
    check_same_tensors(name, loaded.encoder, model.encoder)
    check_answers(name, family.output(loaded), model, family.output)


def test_round_trip_of_every_family(family: Family, tmp_path: Path) -> None:
    model = family.build()
    nogemm.convert(model, {family.names[0]: SMALL, family.names[1]: nogemm.DenseConfig(hidden=12)})
    path = saved(model, tmp_path)
    loaded, info = family.auto.from_pretrained(path, output_loading_info=True)
    assert type(loaded) is type(model)
    check_same_model("loaded", loaded, model, family.output)
    assert not any(info.values()), info
    assert {n: layer.config for n, layer in nogemm.converted(loaded).items()} == {
        n: layer.config for n, layer in nogemm.converted(model).items()
    }


def test_one_converted_site_leaves_the_others_dense(family: Family, tmp_path: Path) -> None:
    model = family.build()
    nogemm.convert(model, SMALL, layers=[1])
    loaded = family.auto.from_pretrained(saved(model, tmp_path))
    assert list(nogemm.converted(loaded)) == [family.names[1]]
    check_same_model("loaded", loaded, model, family.output)


def test_the_comparison_sees_a_weight_that_changed(converted_bert: Any, bert: Family, tmp_path: Path) -> None:
    converted_bert.save_pretrained(tmp_path)
    loaded = bert.auto.from_pretrained(tmp_path)
    with torch.no_grad():
        loaded.get_parameter("bert.encoder.layer.1.intermediate.tables").mul_(1.001)
    with pytest.raises(Mismatch, match="tables"):
        check_same_model("loaded", loaded, converted_bert, bert.output)
    with pytest.raises(Mismatch, match="off by"):
        check_answers("loaded", bert.output(loaded), converted_bert, bert.output)


def test_base_and_task_models_load_each_others_checkpoint(converted_bert: Any, bert: Family, tmp_path: Path) -> None:
    converted_bert.save_pretrained(tmp_path / "task")
    base = transformers.AutoModel.from_pretrained(tmp_path / "task")
    check_encoder("base", base, converted_bert.bert, bert)
    base.save_pretrained(tmp_path / "base")
    task = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "base")
    check_encoder("task", task.bert, converted_bert.bert, bert)
    assert list(nogemm.converted(base)) == ["encoder.layer.0", "encoder.layer.1"]
    assert list(nogemm.converted(task)) == ["bert.encoder.layer.0", "bert.encoder.layer.1"]


def test_the_encoder_alone_loads_from_a_whole_t5(tmp_path: Path) -> None:
    family = FAMILIES["t5"]
    model = family.build()
    nogemm.convert(model, SMALL)
    encoder = transformers.T5EncoderModel.from_pretrained(saved(model, tmp_path))
    ids = family.inputs()["input_ids"]
    check_same_model("encoder", encoder.encoder, model.encoder, lambda stack: stack(ids)[0])


def test_a_saved_submodule_loads_and_is_guarded(converted_bert: Any, bert: Family, tmp_path: Path) -> None:
    converted_bert.bert.save_pretrained(tmp_path)
    loaded = transformers.AutoModel.from_pretrained(tmp_path)
    check_encoder("loaded", loaded, converted_bert.bert, bert)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.get_slice("encoder.layer.0.intermediate.dense.weight").get_shape() == [0]


def test_resave_of_a_loaded_model(converted_bert: Any, bert: Family, tmp_path: Path) -> None:
    converted_bert.save_pretrained(tmp_path / "a")
    loaded = bert.auto.from_pretrained(tmp_path / "a")
    loaded.save_pretrained(tmp_path / "b")
    loaded.save_pretrained(tmp_path / "a")  # over itself
    for name in "ab":
        check_same_model(name, bert.auto.from_pretrained(tmp_path / name), converted_bert, bert.output)


def test_several_shards(converted_bert: Any, bert: Family, tmp_path: Path) -> None:
    converted_bert.save_pretrained(tmp_path, max_shard_size="8KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    check_same_model("loaded", bert.auto.from_pretrained(tmp_path), converted_bert, bert.output)


def test_casts_after_load(converted_bert: Any, bert: Family, tmp_path: Path) -> None:
    converted_bert.save_pretrained(tmp_path)
    loaded = bert.auto.from_pretrained(tmp_path)
    expected = bert.output(loaded)
    for cast in (lambda m: m.half(), lambda m: m.float(), lambda m: m.to(torch.bfloat16), lambda m: m.to("cpu")):
        loaded = cast(loaded)
        out = bert.output(loaded)
        assert out.dtype == loaded.dtype
        assert torch.isfinite(out).all()
        # Codes of tokens near a boundary may flip in 16 bits, so most of the output agrees, not all.
        assert ((out.float() - expected).abs() < 0.05).float().mean() > 0.9


def test_bfloat16_on_load_equals_a_cast_afterwards(converted_bert: Any, bert: Family, tmp_path: Path) -> None:
    converted_bert.save_pretrained(tmp_path)
    loaded = bert.auto.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    check_same_model("loaded", loaded, copy.deepcopy(converted_bert).to(torch.bfloat16), bert.output)


def test_a_bfloat16_checkpoint_stays_bfloat16(converted_bert: Any, bert: Family, tmp_path: Path) -> None:
    converted_bert.to(torch.bfloat16).save_pretrained(tmp_path)
    loaded = bert.auto.from_pretrained(tmp_path)
    assert loaded.dtype == torch.bfloat16
    check_same_model("loaded", loaded, converted_bert, bert.output)


@pytest.mark.parametrize("tables", ["int8", "bf16"])
def test_compressed_round_trip(tables: str, converted_bert: Any, bert: Family, tmp_path: Path) -> None:
    nogemm.compress(converted_bert, tables)
    converted_bert.save_pretrained(tmp_path)
    loaded = bert.auto.from_pretrained(tmp_path)
    check_same_model("loaded", loaded, converted_bert, bert.output)
    for layer in nogemm.converted(loaded).values():
        assert isinstance(layer, LookupFFN)
        assert layer.tables.dtype == {"int8": torch.int8, "bf16": torch.bfloat16}[tables]
        assert not isinstance(layer.tables, torch.nn.Parameter)


def test_trainer_fine_tunes_a_loaded_model(converted_bert: Any, bert: Family, tmp_path: Path) -> None:
    converted_bert.save_pretrained(tmp_path / "start")
    model = bert.auto.from_pretrained(tmp_path / "start")
    before = copy.deepcopy(nogemm.converted(model)[bert.names[0]].state_dict())
    inputs = bert.inputs(batch=8)
    rows = [{key: value[i] for key, value in {**inputs, "labels": inputs["input_ids"]}.items()} for i in range(8)]
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path / "runs"), max_steps=2, per_device_train_batch_size=4, report_to=[], use_cpu=True,
        save_steps=2, logging_steps=1, disable_tqdm=True,
    )  # fmt: skip
    transformers.Trainer(model=model, args=arguments, train_dataset=rows).train()  # type: ignore[arg-type]
    after = nogemm.converted(model)[bert.names[0]].state_dict()
    assert all(not torch.equal(after[key], before[key]) for key in before if before[key].numel() > 12)
    model.eval()
    reloaded = bert.auto.from_pretrained(tmp_path / "runs" / "checkpoint-2")
    check_same_model("reloaded", reloaded, model, bert.output)


def test_pipeline(tmp_path: Path) -> None:
    family = FAMILIES["vit"]
    model = family.build()
    nogemm.convert(model, SMALL)
    saved(model, tmp_path)
    transformers.ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(tmp_path)
    run = transformers.pipeline("image-classification", model=str(tmp_path), device="cpu")
    check_same_model("pipeline", run.model, model, family.output)


def test_a_dense_checkpoint_is_converted_while_loading(bert: Family, tmp_path: Path) -> None:
    dense = bert.build()
    dense.save_pretrained(tmp_path / "dense")
    wanted = nogemm.NogemmConfig({"*.0": nogemm.DenseConfig(), "*.1": SMALL})
    loaded = bert.auto.from_pretrained(tmp_path / "dense", quantization_config=wanted)
    first, second = nogemm.converted(loaded).values()
    assert (first.fitted, second.fitted) == ("exact", "random")
    for key, value in nogemm.sites(dense)[0].dense().state_dict().items():
        assert torch.equal(first.state_dict()[key], value)
    train_a_little(loaded)
    loaded.save_pretrained(tmp_path / "converted")
    check_same_model("reloaded", bert.auto.from_pretrained(tmp_path / "converted"), loaded, bert.output)


def test_conversion_while_loading_needs_a_config(bert: Family, tmp_path: Path) -> None:
    bert.build().save_pretrained(tmp_path)
    with pytest.raises(nogemm.ConfigError, match="give it a layer config"):
        bert.auto.from_pretrained(tmp_path, quantization_config=NogemmConfig())


def test_user_arguments_are_respected(converted_bert: Any, bert: Family, tmp_path: Path) -> None:
    converted_bert.save_pretrained(tmp_path)
    eager = bert.auto.from_pretrained(tmp_path, attn_implementation="eager")
    assert eager.config._attn_implementation == "eager"
    assert bert.auto.from_pretrained(tmp_path).config._attn_implementation == "sdpa"
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    check_same_model("loaded", bert.auto.from_pretrained(tmp_path, config=config), converted_bert, bert.output)


def test_new_heads_of_another_size_still_load(converted_bert: Any, bert: Family, tmp_path: Path) -> None:
    converted_bert.save_pretrained(tmp_path)
    kwargs = {"num_labels": 5, "ignore_mismatched_sizes": True}
    loaded = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path, **kwargs)
    check_encoder("loaded", loaded.bert, converted_bert.bert, bert)


def test_old_weight_names_are_renamed_on_load_and_on_save(tmp_path: Path) -> None:
    """ViT's layers had other names in older checkpoints; transformers maps them both ways, ours have to come along."""
    family = FAMILIES["vit"]
    model = family.build()
    nogemm.convert(model, SMALL)
    saved(model, tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        names = list(file.keys())
    assert "vit.encoder.layer.0.attention.attention.query.weight" in names  # renamed on save
    loaded = family.auto.from_pretrained(tmp_path)
    check_same_model("loaded", loaded, model, family.output)


def test_the_description_in_config_json(converted_bert: Any, tmp_path: Path) -> None:
    converted_bert.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert stored["quant_method"] == "nogemm"
    assert stored["format"] == 1
    assert stored["sites"]["encoder.layer.1"] == SMALL.to_dict()
    assert set(stored["fitted"].values()) == {"trained"}
    assert is_checkpoint(tmp_path)
    assert not is_checkpoint(tmp_path.parent)


def test_models_inside_models(tmp_path: Path) -> None:
    """CLIP: two models with configs of their own inside one."""
    widths = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.CLIPConfig(
        text_config={**widths, "vocab_size": 64, "bos_token_id": 0, "eos_token_id": 1},
        vision_config={**widths, "image_size": 8, "patch_size": 4},
        projection_dim=16,
    )
    model = transformers.CLIPModel(config).eval()
    nogemm.convert(model, SMALL)
    train_a_little(model)
    model.text_model.save_pretrained(tmp_path / "text")  # must leave no trace in the next save
    model.save_pretrained(tmp_path / "clip")
    ids = torch.arange(2, 9)[None]
    inputs = {"input_ids": ids, "pixel_values": torch.randn(1, 3, 8, 8)}
    loaded = transformers.CLIPModel.from_pretrained(tmp_path / "clip")

    def logits(clip: Any) -> torch.Tensor:
        with torch.no_grad():
            return clip(**inputs | {"pixel_values": inputs["pixel_values"].to(clip.dtype)}).logits_per_text

    check_same_model("loaded", loaded, model, logits)
    for path in ("text", "clip"):
        text = transformers.CLIPTextModel.from_pretrained(tmp_path / path)
        with torch.no_grad():
            check_answers(path, text(ids)[0], model.text_model, lambda tower: tower(ids)[0])


def test_device_maps(converted_bert: Any, bert: Family, tmp_path: Path) -> None:
    converted_bert.save_pretrained(tmp_path)
    loaded = bert.auto.from_pretrained(tmp_path, device_map="cpu")
    check_same_model("loaded", loaded, converted_bert, bert.output)


def test_the_quantizer_travels_with_copies(converted_bert: Any, bert: Family, tmp_path: Path) -> None:
    twin = copy.deepcopy(converted_bert)
    assert isinstance(twin.hf_quantizer, NogemmQuantizer)
    twin.save_pretrained(tmp_path)
    check_same_model("loaded", bert.auto.from_pretrained(tmp_path), converted_bert, bert.output)


FRESH = """
import sys
import torch
import nogemm
assert not {"transformers", "matplotlib", "datasets", "typer"} & set(sys.modules)
hooks = [finder for finder in sys.meta_path if type(finder).__module__ == "nogemm.convert.checkpoint"]
assert len(hooks) == 1
sys.meta_path.remove(hooks[0])
import transformers.quantizers.auto as auto
assert "nogemm" not in auto.AUTO_QUANTIZER_MAPPING
from nogemm.convert.checkpoint import register_with_transformers
before = set(sys.modules)
register_with_transformers()
print(*sorted(set(sys.modules) - before))
import transformers
model = transformers.AutoModel.from_pretrained(sys.argv[1])
print(len(nogemm.converted(model)))
"""


def test_a_fresh_process_loads_and_registration_imports_one_module(converted_bert: Any, tmp_path: Path) -> None:
    """Here transformers' registry comes first; in this very process the import hook met it."""
    converted_bert.save_pretrained(tmp_path)
    done = run_python(FRESH, str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["nogemm.convert.quantizer", "2"]


def test_the_import_hook_registered_us() -> None:
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

    assert AUTO_QUANTIZER_MAPPING["nogemm"] is NogemmQuantizer
    assert AUTO_QUANTIZATION_CONFIG_MAPPING["nogemm"] is NogemmConfig
