"""A sparsity profile of small models: figures worked by hand, the model left as it was, bad input."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nogemm
import people
from decoders import make
from nogemm.bench.sparsity import SparsityOptions, profile_sparsity
from nogemm.bench.sparsity import layer as one_layer
from nogemm.bench.sparsity.layer import describe
from nogemm.bench.sparsity.samples import as_it_was, read_samples
from nogemm.errors import ConfigError, NotFiniteError
from nogemm.hardware.roofline import Roofline
from nogemm.layers import HireConfig
from nogemm.train import DataError

WIDTH, NEURONS = 16, 32
QUICK = SparsityOptions(tokens=24, keep=(0.25, 0.5), batch=(1, 2, 4), timed=())


@pytest.fixture(autouse=True)
def known_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spare the tests the seconds in which a machine is measured."""
    machine = Roofline(threads=1, gflops={"fp32": 100.0}, gb_per_s={"L1": 400.0, "memory": 10.0})
    monkeypatch.setattr("nogemm.bench.sparsity.profile.measure_roofline", lambda threads: machine)


def tiny(kind: str = "opt") -> Any:
    """Make a small model: OPT with ReLU, or one of the decoders."""
    import transformers as tf

    if kind != "opt":
        return make(kind)
    torch.manual_seed(0)
    config = tf.OPTConfig(
        hidden_size=WIDTH,
        word_embed_proj_dim=WIDTH,
        ffn_dim=NEURONS,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=40,
        max_position_embeddings=40,
        init_std=0.5,
    )
    return tf.OPTForCausalLM(config).eval()


def texts(rows: int = 4, length: int = 8, vocabulary: int = 40) -> list[dict[str, Tensor]]:
    """Return samples of random tokens."""
    ids = torch.randint(3, vocabulary, (rows, length), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": row.unsqueeze(0), "attention_mask": torch.ones(1, length)} for row in ids]


def set_active(model: Any, fires: dict[int, dict[int, float]]) -> Any:
    """Let input number d of the first FFN fire these neurons so strongly, and no other; return the site."""
    site = nogemm.sites(model)[0]
    weights = site.weights()  # views: the model's own numbers are written
    weights["up.weight"].zero_()
    weights["up.bias"].fill_(-1.0)
    weights["down.weight"].copy_(torch.eye(NEURONS)[:WIDTH])
    for d, neurons in fires.items():
        for f, strength in neurons.items():
            weights["up.weight"][f, d] = strength + 1.0
    return site


def test_known_active_sets_give_exact_figures() -> None:
    fires = {0: {0: 8.0, 1: 4.0, 2: 2.0, 3: 1.0}, 1: {2: 1.0, 3: 2.0, 4: 4.0, 5: 8.0}, 2: {8: 1.0}, 3: {}}
    site = set_active(tiny(), fires)
    order = [0, 1, 2, 0, 3, 3, 1, 2]  # e0 e1 e2 e0 | e3 e3 | e1 e2
    x = torch.eye(WIDTH)[order]
    keep = 2 / NEURONS
    found = describe(site, x, [4, 2, 2], keep=(keep,), sketches=("int8", "int4"), batch=(1, 2, 4, 8), seed=0)
    row = found.row
    active = sum(len(fires[d]) for d in order)
    assert active == 18
    assert row["zeros"] == 1 - active / (8 * NEURONS)
    # Squares 64, 16, 4, 1 of 85: 99 % is 84.15, so all four; a lone neuron carries itself, and none carries nothing.
    assert row["carriers"] == dict.fromkeys(("0.99", "0.999"), (4 * 4 + 2 * 1) / 8 / NEURONS)
    (energy,) = row["energy"]
    assert energy["count"] == 2
    assert energy["kept"] == (4 * 2 + 2 * 1) / 8 / NEURONS
    assert energy["energy"] == energy["best_energy"] == pytest.approx(1 - 4 * 5 / (4 * 85 + 2 * 1))
    union = {(one["set"], one["batch"]): one for one in row["union"]}
    near = {key: None if one["neighbours"] is None else one["neighbours"] * NEURONS for key, one in union.items()}
    # {0..5}, {8, 0..3} | {} | {2..5, 8}; of four: {0..5, 8}.
    assert [near["active", size] for size in (1, 2, 4, 8)] == [18 / 8, (6 + 5 + 0 + 5) / 4, 7, None]
    # Kept are {0, 1}, {4, 5}, {8} and {}.
    assert [near["kept", size] for size in (1, 2, 4, 8)] == [10 / 8, (4 + 3 + 0 + 3) / 4, 5, None]
    assert union["active", 1]["independent"] == pytest.approx(active / 8 / NEURONS)
    assert union["active", 4]["strangers"] is None  # there are three texts
    # Recall is taken of the second half, {}, {}, {4, 5}, {8}, and both sketches rank these weights without a fault.
    counts = {(one["sketch"], one["target"]): one["candidates"] for one in row["recall"]}
    assert counts == {
        (kind, target): 1 if target < 0.9 else 2 for kind in ("int8", "int4") for target in (0.9, 0.95, 0.99)
    }
    assert found.candidates == {keep: 2}


def test_recall_needs_more_where_the_sketch_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    site = set_active(tiny(), {0: {0: 8.0, 1: 4.0, 2: 2.0, 3: 1.0}})
    x = torch.eye(WIDTH)[[0] * 8]
    ranking = torch.tensor([7, 0, 9, 1, *(f for f in range(NEURONS) if f not in (7, 0, 9, 1))])
    monkeypatch.setattr(one_layer, "_order", lambda layer, x_ND: ranking.expand(len(x_ND), -1))
    found = describe(site, x, [8], keep=(2 / NEURONS,), sketches=("int8",), batch=(1,), seed=0)
    assert [one["candidates"] for one in found.row["recall"]] == [4, 4, 4]
    assert [one["oversample"] for one in found.row["recall"]] == [2, 2, 2]


def test_a_ranking_that_the_operator_does_not_share_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    site = nogemm.sites(tiny())[0]
    monkeypatch.setattr(one_layer, "ranked", lambda keys: keys.sort(dim=1).indices)
    with pytest.raises(ArithmeticError, match="other candidates"):
        describe(site, torch.randn(16, WIDTH), [16], keep=(0.1,), sketches=("int8",), batch=(1,), seed=0)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("sketch", ["int4", "low_rank"])
def test_recall_is_that_of_the_layer(kind: str, sketch: Any) -> None:
    torch.manual_seed(3)
    site = nogemm.sites(make(kind))[0]
    x = torch.randn(400, site.d_in)
    found = describe(site, x, [400], keep=(0.2,), sketches=(sketch,), batch=(1,), seed=0)
    counts = [(one["target"], one["candidates"]) for one in found.row["recall"]]

    kept = math.ceil(0.2 * site.hidden)

    def recall(candidates: int) -> float:
        layer = HireConfig(keep=0.2, sketch=sketch, oversample=candidates / kept).make(site.shape).eval()
        layer.load_state_dict(found.layer.state_dict())
        assert layer.candidates == candidates
        return layer.measure(x[200:]).recall

    possible = [(target, candidates) for target, candidates in counts if candidates > kept]
    assert possible  # the others are fewer than are kept, which a layer does not take
    for target, candidates in possible:
        assert recall(candidates) >= target - 2e-3
        assert recall(candidates - 1) < target + 2e-3


def state_of(model: nn.Module) -> dict[str, Any]:
    """Note all of a model that a measurement might leave changed."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
    return {
        "modules": [name for name, _ in model.named_modules()],
        "modes": [module.training for module in model.modules()],
        "hooks": sum(len(getattr(module, name)) for module in model.modules() for name in hooks),
        "weights": {name: value.clone() for name, value in model.state_dict().items()},
        "grads": [parameter.requires_grad for parameter in model.parameters()],
        "config": model.config.to_dict(),  # type: ignore[operator, union-attr]
        "random": torch.get_rng_state(),
        "threads": torch.get_num_threads(),
    }


def assert_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    weights, now = one.pop("weights"), other.pop("weights")
    assert weights.keys() == now.keys()
    assert all(torch.equal(value, now[name]) for name, value in weights.items())
    assert torch.equal(one.pop("random"), other.pop("random"))
    assert one == other


def half_training(kind: str = "opt") -> Any:
    """Make a model in training mode with one part in evaluation mode, as in partial fine-tuning."""
    model = tiny(kind).train()
    next(module for module in model.modules() if isinstance(module, nn.Embedding)).eval()
    return model


@pytest.mark.parametrize("kind", ["opt", "llama"])
def test_the_model_is_left_as_it_was(kind: str) -> None:
    model = half_training(kind)
    before = state_of(model)
    profile_sparsity(model, texts(), QUICK)
    assert_same(before, state_of(model))


@pytest.mark.parametrize("at", ["inputs of", "layers.1: neurons", "perplexity with 50%", "cutting"])
def test_the_model_is_left_as_it_was_when_interrupted(at: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = half_training()
    kept: list[dict[str, Any]] = []

    def note(line: str) -> None:
        if at in line:
            raise KeyboardInterrupt

    if at == "cutting":  # in the middle of a pass whose neurons are being cut
        from nogemm.bench.sparsity import quality

        def stop(*_: object) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(quality, "strongest", stop)
    before = state_of(model)
    with pytest.raises(KeyboardInterrupt):
        profile_sparsity(model, texts(), QUICK, note=note, keep=kept.append)
    assert_same(before, state_of(model))
    assert [len(one["layers"]) for one in kept[:2]] == {"inputs of": [], "layers.1: neurons": [1]}.get(at, [1, 2])


def test_the_model_is_left_as_it_was_after_an_error() -> None:
    model = half_training()
    with torch.no_grad():
        model.get_input_embeddings().weight[5] = torch.nan
    ids = torch.tensor([[4, 5, 6, 7] * 8])
    before = state_of(model)
    for value in before["weights"].values():
        value.nan_to_num_()
    with pytest.raises(NotFiniteError, match=r"layers\.0"):
        profile_sparsity(model, [{"input_ids": ids}], QUICK)
    after = state_of(model)
    for value in after["weights"].values():
        value.nan_to_num_()
    assert_same(before, after)


def test_the_check_of_a_model_left_alone_can_fail() -> None:
    model = tiny()
    before = state_of(model)
    model.lm_head.register_forward_pre_hook(lambda *_: None)
    with pytest.raises(AssertionError):
        assert_same(before, state_of(model))
    model = tiny()
    before = state_of(model)
    model.lm_head.train()
    with pytest.raises(AssertionError):
        assert_same(before, state_of(model))


def test_weights_that_are_read_otherwise_than_the_model_computes_are_noticed() -> None:
    model = tiny()
    nogemm.sites(model)[0].down.register_forward_hook(lambda _, args, y: y.add(1.0))  # type: ignore[union-attr, attr-defined]
    with pytest.raises(ArithmeticError, match="answer otherwise"):
        profile_sparsity(model, texts(), QUICK)


def test_a_result_is_json_and_repeats() -> None:
    model = tiny()
    one, two = (profile_sparsity(model, texts(), QUICK) for _ in range(2))
    assert json.loads(json.dumps(one["layers"])) == two["layers"]
    assert one["settings"]["seed"] == 0
    assert one["machine"]["versions"]["torch"]
    assert [layer["site"] for layer in one["layers"]] == [site.name for site in nogemm.sites(model)]
    assert one["tokens"] == 24


def test_padding_is_not_measured_and_texts_stay_apart(tmp_path: Path) -> None:
    import transformers as tf

    folder = people.gpt2(tmp_path / "gpt2")
    model = tf.AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = tf.AutoTokenizer.from_pretrained(folder)
    sample = read_samples(model, people.TEXTS, tokenizer, 18)
    counts = [len(tokenizer(text)["input_ids"]) for text in people.TEXTS]
    assert sample.tokens == sum(counts[: len(sample.texts)]) == 18
    assert tokenizer.pad_token is None
    (batch,) = sample.batches
    assert batch["attention_mask"].sum(1).tolist() == counts
    found = profile_sparsity(model, people.TEXTS, SparsityOptions(tokens=18, timed=(), quality=False))
    assert {(layer["tokens"], layer["texts"]) for layer in found["layers"]} == {(sum(counts), len(counts))}


@pytest.mark.parametrize(
    ("data", "error", "said"),
    [
        ("absent.txt", DataError, "absent.txt"),
        ("empty.txt", DataError, "empty.txt"),
        ("short.txt", ConfigError, "8 tokens, 24 are needed"),
        ([], ConfigError, "0 tokens, 24 are needed"),
        ([3], ConfigError, "3"),
        ({"input_ids": 1}, ConfigError, "a list of texts"),
        (7, ConfigError, "a list of texts"),
    ],
)
def test_data_that_cannot_be_used(data: Any, error: type[Exception], said: str, tmp_path: Path) -> None:
    import transformers as tf

    folder = people.gpt2(tmp_path / "gpt2")
    (tmp_path / "empty.txt").write_text("\n\n")
    (tmp_path / "short.txt").write_text("a fast table\n\nslow search of the text\n")
    model = tf.AutoModelForCausalLM.from_pretrained(folder)
    source = tmp_path / data if isinstance(data, str) else data
    with pytest.raises(error, match=said):
        profile_sparsity(model, source, QUICK)


def test_texts_without_a_tokenizer_and_models_without_ffns() -> None:
    with pytest.raises(ConfigError, match="tokenizer="):
        profile_sparsity(tiny(), ["a text"], QUICK)
    with pytest.raises(ConfigError, match="expected a model"):
        profile_sparsity("model", ["a text"], QUICK)  # type: ignore[arg-type]
    model = tiny()
    nogemm.convert(model, nogemm.HireConfig(keep=0.5))
    with pytest.raises(ConfigError, match="no dense FFN"):
        profile_sparsity(model, texts(), QUICK)
    with pytest.raises(ConfigError, match="cannot run on the data"):
        profile_sparsity(tiny(), [{"input_ids": torch.full((1, 30), 400)}], QUICK)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"keep": (0.0,)}, "keep"),
        ({"keep": (1.5,)}, "1.5"),
        ({"keep": (math.nan,)}, "nan"),
        ({"keep": ()}, "keep is empty"),
        ({"keep": 0.1}, "tuple"),
        ({"keep": (0.1, 0.1)}, "twice"),
        ({"sketches": ("int2",)}, "int2"),
        ({"sketches": ()}, "sketches is empty"),
        ({"batch": (0,)}, "batch"),
        ({"timed": (1.5,)}, "timed"),
        ({"tokens": 0}, "tokens"),
        ({"dtype": "fp16"}, "fp16"),
    ],
)
def test_options_that_cannot_be_used(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        SparsityOptions(**options)


def test_modes_come_back_one_by_one() -> None:
    model = nn.Sequential(nn.Dropout(), nn.Dropout()).train()
    model[1].eval()
    modes: list[bool] = []

    def fail() -> None:
        with as_it_was(model):
            modes.extend(module.training for module in model.modules())
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert modes == [False, False, False]
    assert [module.training for module in model.modules()] == [True, True, False]
