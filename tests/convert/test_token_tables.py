"""Token tables in models: the ids reach them in every way that a model is called, copied, saved and trained."""

from __future__ import annotations

import copy
import pickle
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from tiny_models import BERT, FAMILIES, SMALL, VOCABULARY, Family
from torch import Tensor, nn

import nogemm
import people
from nogemm.convert.sites import record_sites
from nogemm.errors import ConfigError, ShapeError
from nogemm.layers import SumFFN, TokenTableFFN
from nogemm.layers.token_table.ids import running_ids
from nogemm.testing.compare import check_equal

TABLE = nogemm.TokenTableConfig(start="zero")
BESIDE = nogemm.SumConfig(terms=(nogemm.DenseConfig(), TABLE))
TEXT = ("bert", "distilbert", "modernbert", "opt", "llama", "t5", "gpt2")
texts = pytest.mark.parametrize("name", TEXT)


def tables(model: nn.Module) -> list[TokenTableFFN]:
    return [part for part in model.modules() if isinstance(part, TokenTableFFN)]


def build(name: str = "bert", config: Any = BESIDE) -> Any:
    """Convert a tiny model; its tables hold numbers as large as an FFN's answers."""
    model = FAMILIES[name].build()
    nogemm.convert(model, config)
    with torch.no_grad():
        for table in tables(model):
            table.rows.normal_(std=0.5)
    return model


def check_rows(model: Any, call: dict[str, Tensor], ids: dict[str, Tensor]) -> None:
    """See that a call adds the rows of its ids at every site; `ids` by the start of a site's name."""
    with torch.no_grad(), record_sites(model) as seen:
        model(**call)
    layers = nogemm.converted(model)
    assert layers
    for name, layer in layers.items():
        assert isinstance(layer, SumFFN)
        own = next(value for start, value in ids.items() if start in name)
        x, y = seen[name]
        expected = layer.layers[0](x) + layer.layers[1].get_parameter("rows")[own].reshape(y.shape)
        torch.testing.assert_close(y, expected)


@texts
def test_every_token_gets_its_row(name: str) -> None:
    family, model = FAMILIES[name], build(name)
    call = family.inputs(3, 5)
    ids = {"": call["input_ids"]}
    if family.encoder_decoder:
        call["decoder_input_ids"] = call["input_ids"].flip(1)[:, :4]
        ids = {"decoder": call["decoder_input_ids"], **ids}
    check_rows(model, call, ids)
    assert running_ids() is None


def test_a_table_takes_the_models_vocabulary() -> None:
    report = nogemm.convert(FAMILIES["bert"].build(), BESIDE)
    assert {site.config.terms[1].vocabulary for site in report.sites} == {VOCABULARY}  # type: ignore[attr-defined]
    assert {site.fitted for site in report.sites} == {"exact"}


def test_padding_changes_nothing(bert: Family) -> None:
    model, call = build(), bert.inputs(2, 6)
    short = {key: value[:1, :4] for key, value in call.items()}
    call["attention_mask"][0, 4:] = 0
    with torch.no_grad():
        torch.testing.assert_close(model(**call)[0][:1, :4], model(**short)[0])


def test_a_decoder_with_a_cache_reads_the_rows_of_the_new_tokens() -> None:
    model = build("llama")
    ids = FAMILIES["llama"].inputs(2, 6)["input_ids"]
    with torch.no_grad():
        whole = model(input_ids=ids).logits
        cache = model(input_ids=ids[:, :4], use_cache=True).past_key_values
        for place in (4, 5):
            step = model(input_ids=ids[:, place : place + 1], past_key_values=cache, use_cache=True)
            torch.testing.assert_close(step.logits[:, 0], whole[:, place], atol=1e-5, rtol=1e-5)
        found = model.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0)
    nogemm.convert_head(model)
    assert torch.equal(nogemm.generate(model, ids, 3, eos_token_id=[]), found)


def test_embeddings_in_place_of_ids_are_an_error(bert: Family) -> None:
    model, call = build(), bert.inputs()
    embeds = model.get_input_embeddings()(call["input_ids"])
    model(**call)
    with pytest.raises(ConfigError, match=r"this call was given none \(inputs_embeds\?\)"):
        model(inputs_embeds=embeds)
    with pytest.raises(ConfigError, match="no call of its model is running"):
        model.bert.encoder(embeds)
    with torch.no_grad():
        beside = model.forward(**call).logits  # past the hooks of the model, as sentence-transformers does it
        torch.testing.assert_close(beside, model(**call).logits)
    with pytest.raises(ConfigError, match="no call of its model is running"):
        model.bert.forward(inputs_embeds=embeds)
    with pytest.raises(IndexError, match="out of range"):
        model(input_ids=call["input_ids"] + VOCABULARY)
    assert running_ids() is None
    model(**call)


def test_embeddings_made_of_the_ids_by_the_model_around_are_none(bert: Family) -> None:
    class Around(tf.BertPreTrainedModel):
        def __init__(self, inner: Any) -> None:
            super().__init__(inner.config)
            self.inner = inner

        def get_input_embeddings(self) -> nn.Module:
            return self.inner.get_input_embeddings()

        def forward(self, input_ids: Tensor) -> Any:
            return self.inner(inputs_embeds=self.get_input_embeddings()(input_ids))

    plain = bert.build()
    model = Around(plain.bert)
    nogemm.convert(model, BESIDE)
    check_rows(model, {"input_ids": bert.inputs()["input_ids"]}, {"": bert.inputs()["input_ids"]})


def test_inside_a_sentence_transformer(tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer

    folder = people.sentence_encoder(tmp_path / "encoder")
    model = SentenceTransformer(str(folder), device="cpu", local_files_only=True)
    first, second = (set(model.tokenizer(text)["input_ids"]) for text in people.TEXTS[:2])
    before = model.encode(people.TEXTS[:2])
    nogemm.convert(model, BESIDE)
    assert abs(model.encode(people.TEXTS[:2]) - before).max() < 1e-5
    with torch.no_grad():
        for table in tables(model):
            table.rows[min(first - second)] += torch.randn(16)
    changed = abs(model.encode(people.TEXTS[:2]) - before).max(1)
    assert changed[0] > 1e-3
    assert changed[1] < 1e-5
    unpacked = model.encode(people.TEXTS)
    nogemm.pack(model.eval())
    assert abs(model.encode(people.TEXTS) - unpacked).max() < 1e-4
    assert running_ids() is None


def test_a_decoder_given_embeddings_does_not_read_the_encoders_ids() -> None:
    model, ids = build("t5"), FAMILIES["t5"].inputs(2, 5)["input_ids"]
    embeds = model.get_input_embeddings()(ids)
    with pytest.raises(ConfigError, match=r"this call was given none"):
        model(input_ids=ids, decoder_inputs_embeds=embeds)
    model(input_ids=ids, decoder_input_ids=ids)


def test_resized_embeddings_are_an_error(bert: Family) -> None:
    model = build()
    model.resize_token_embeddings(VOCABULARY + 8)
    with pytest.raises(ConfigError, match="beyond the 64 rows"):
        model(input_ids=torch.tensor([[VOCABULARY + 1]]))


@pytest.mark.parametrize("packed", [False, True], ids=["unpacked", "packed"])
def test_copies_pickles_and_checkpoints_read_ids_too(bert: Family, packed: bool, tmp_path: Path) -> None:
    model = build()
    expected = bert.output(model)
    if packed:
        nogemm.pack(model, keep=True)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(bert.output(twin), expected)
    if packed:
        nogemm.unpack(model)
    nogemm.save(model, tmp_path / "model")
    loaded = bert.auto.from_pretrained(tmp_path / "model")
    torch.testing.assert_close(bert.output(loaded), expected)
    check_rows(loaded, bert.inputs(), {"": bert.inputs()["input_ids"]})
    base = tf.AutoModel.from_pretrained(tmp_path / "model")
    check_rows(base, bert.inputs(), {"": bert.inputs()["input_ids"]})
    assert not torch.allclose(bert.output(bert.build()), expected)


def test_models_in_one_process_keep_their_ids_apart(bert: Family) -> None:
    first, second = build(), build("llama")
    ids = bert.inputs(2, 5)["input_ids"]
    alone = bert.output(first), FAMILIES["llama"].output(second)
    together = threading.Barrier(2)
    found: dict[int, Tensor] = {}

    def work(place: int, model: Any, family: Family) -> None:
        layer = nogemm.converted(model)[family.names[0]]
        handle = layer.register_forward_pre_hook(lambda *_: together.wait() * 0 or None)
        found[place] = family.output(model)
        handle.remove()

    pairs = ((first, bert), (second, FAMILIES["llama"]))
    threads = [threading.Thread(target=work, args=(i, *pair)) for i, pair in enumerate(pairs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for place, y in enumerate(alone):
        torch.testing.assert_close(found[place], y)
    check_rows(first, {"input_ids": ids.flip(1)}, {"": ids.flip(1)})


def trained(model: Any, calls: list[dict[str, Tensor]], reentrant: bool | None) -> dict[str, Tensor]:
    """Run all calls, then go back through all of them; return the gradients."""
    model.train()
    if reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
    sum(model(**call)[0].square().mean() for call in calls).backward()  # type: ignore[union-attr]
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("reentrant", [False, True], ids=["hooks", "reentrant"])
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_what_checkpointing_computes_again_has_its_own_ids(name: str, reentrant: bool) -> None:
    model = build(name)
    for part in model.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
    ids = FAMILIES[name].inputs(2, 5)["input_ids"]
    calls = [{"input_ids": ids}, {"input_ids": ids.flip(1)}]  # the second is the last that was noted
    expected = trained(copy.deepcopy(model), calls, None)
    found = trained(copy.deepcopy(model), calls, reentrant)
    rows = [key for key in expected if key.endswith("rows")]
    assert len(rows) == 2
    for key in expected:
        torch.testing.assert_close(found[key], expected[key])
    other = trained(copy.deepcopy(model), calls[:1] * 2, reentrant)
    assert not torch.allclose(other[rows[0]], expected[rows[0]])


def test_rows_start_from_the_answers_to_each_token_alone(bert: Family) -> None:
    dense = bert.build()
    model = copy.deepcopy(dense)
    config = nogemm.TokenTableConfig(start="alone")
    both = nogemm.SumConfig(terms=(nogemm.DenseConfig(hidden=5), config))
    report = nogemm.convert(model, {"*.0": config, "*.1": both})
    assert {site.fitted for site in report.sites} == {"closed-form"}
    with torch.no_grad(), record_sites(dense) as seen:
        dense(input_ids=torch.tensor([[7]]))
    alone, beside = nogemm.converted(model).values()
    torch.testing.assert_close(alone.get_parameter("rows")[7], seen[bert.names[0]][1][0, 0])
    assert isinstance(beside, SumFFN)
    x, y = seen[bert.names[1]]
    core = beside.layers[0](x)[0, 0]
    torch.testing.assert_close(beside.layers[1].get_parameter("rows")[7] + core, y[0, 0])
    assert not torch.allclose(core, y[0, 0])


def test_rows_start_from_means_over_texts(bert: Family) -> None:
    dense, call = bert.build(), bert.inputs(4, 6)
    call["attention_mask"][0, 3:] = 0
    model = copy.deepcopy(dense)
    nogemm.convert(model, nogemm.TokenTableConfig(prior=0.0), layers=1, data=[call])
    with torch.no_grad(), record_sites(dense) as seen:
        dense(**call)
    real = call["attention_mask"].bool()
    y, ids = seen[bert.names[1]][1][real], call["input_ids"][real]
    (table,) = nogemm.converted(model).values()
    token = int(ids[0])
    torch.testing.assert_close(table.get_parameter("rows")[token], y[ids == token].mean(0))
    torch.testing.assert_close(table.get_parameter("rows")[0], y.mean(0))  # an id that no text has


def test_what_takes_no_ids_is_refused(bert: Family) -> None:
    vision = FAMILIES["vit"].build()
    with pytest.raises(ConfigError, match="takes no input_ids"):
        nogemm.convert(vision, TABLE)

    class Turned(tf.BertModel):
        """Its layers see tokens of all texts by place, not by text."""

        def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: Any) -> Tensor:
            x = self.embeddings(input_ids).transpose(0, 1)
            layers: Any = self.encoder.layer
            for layer in layers:
                x = x + layer.output.dense(layer.intermediate(x))
            return x.transpose(0, 1)

    with pytest.raises(ConfigError, match="in another order than input_ids"):
        nogemm.convert(Turned(tf.BertConfig(**BERT)).eval(), TABLE)


def test_padding_left_out_is_an_error(bert: Family) -> None:
    model = build()
    layer = next(iter(nogemm.converted(model).values()))
    layer.register_forward_pre_hook(lambda _, args: (args[0].flatten(0, 1)[1:],))
    with pytest.raises(ShapeError, match="Does the model leave padding out"):
        model(**bert.inputs())


def test_a_model_without_tables_has_no_hooks(bert: Family) -> None:
    model = bert.build()
    nogemm.convert(model, SMALL)
    assert not any(part._forward_pre_hooks for part in model.modules())
    again = build()
    before = sum(len(part._forward_pre_hooks) for part in again.modules())
    nogemm.pack(again.eval(), keep=True)
    nogemm.unpack(again)
    assert sum(len(part._forward_pre_hooks) for part in again.modules()) == before


def test_fewer_layers_with_tables_beside_them(tmp_path: Path) -> None:
    family = FAMILIES["llama"]
    torch.manual_seed(0)
    config = family.make().config
    config.num_hidden_layers = 4
    if getattr(config, "layer_types", None):
        config.layer_types = ["full_attention"] * 4
    teacher: Any = tf.LlamaForCausalLM(config).eval()
    model: Any = copy.deepcopy(teacher)
    assert nogemm.keep_layers(model, [0, 3]) == (1, 4)
    assert [layer.self_attn.layer_idx for layer in model.model.layers] == [0, 1]
    check_equal("last", model.model.layers[1].mlp.up_proj.weight, teacher.model.layers[3].mlp.up_proj.weight)
    nogemm.convert(model, BESIDE)
    check_rows(model, {"input_ids": family.inputs()["input_ids"]}, {"": family.inputs()["input_ids"]})
    nogemm.save(model, tmp_path / "model")
    loaded = family.auto.from_pretrained(tmp_path / "model").eval()
    torch.testing.assert_close(family.output(loaded), family.output(model))
    for wrong in ([], [0, 4], [3, 0], [1, 1], [-5]):
        with pytest.raises(ConfigError, match="numbers from 0 to 3 in rising order"):
            nogemm.keep_layers(copy.deepcopy(teacher), wrong)
    check_equal("negative", torch.tensor(nogemm.keep_layers(copy.deepcopy(teacher), [0, -1])), torch.tensor([1, 4]))
