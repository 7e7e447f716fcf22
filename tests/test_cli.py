"""The command line: its frozen surface, errors in one line, and every command on a tiny model."""

from __future__ import annotations

import importlib.util
import json
import os
import resource
import signal
from pathlib import Path

import pytest
import torch
import typer
from safetensors.torch import load_file
from transformers import AutoModel, BertConfig, BertModel, BertTokenizer

import nogemm
from cli_flags import FLAGS
from nogemm import cli, ops
from nogemm.config import layer_kinds
from nogemm.hardware import machine
from nogemm.hardware.held import held_to

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "fast", "slow", "table", "search", "text", "of", "a", "the"]


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """Save a small BERT with its tokenizer, and a file of texts beside it."""
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS))
    tokenizer = BertTokenizer(str(tmp_path / "vocab.txt"))
    config = BertConfig(
        vocab_size=len(WORDS), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
    )
    model = tmp_path / "dense"
    BertModel(config).save_pretrained(model)
    tokenizer.save_pretrained(model)
    rows = [{"short": f"{a} {b}", "long": f"the {b} of a {a} text"} for a in WORDS[5:9] for b in WORDS[5:9]]
    (tmp_path / "texts.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return model


def run(*words: object) -> int:
    """Run a command as the shell would; return its exit code."""
    with pytest.raises(SystemExit) as ended:
        cli.main([str(word) for word in words])
    return int(ended.value.code or 0)


def failed(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """Run a command that must end in one line on standard error and code 2; return the line."""
    assert run(*words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("nogemm: ")
    assert err.count("\n") == 1
    assert "Traceback" not in err
    return err


def commands() -> dict[str, str]:
    """List every command with its options, as typer built them."""
    found: dict[str, str] = {}

    def walk(group: object, prefix: str) -> None:
        for name, command in getattr(group, "commands", {}).items():
            if getattr(command, "commands", None):
                walk(command, f"{prefix}{name} ")
            else:
                options = [p.opts for p in command.params if p.param_type_name == "option" and p.name != "help"]
                found[prefix + name] = " ".join(flag for flags in options for flag in flags)

    walk(typer.main.get_command(cli.app), "")
    return found


def test_commands_and_flags_are_frozen():
    # A new knob belongs to the config of what it changes (--set); a new flag is a decision, taken here.
    assert commands() == {name: f"{flags} --json" for name, flags in FLAGS.items()}


@pytest.mark.parametrize(
    "words", [("bench", "lsh"), ("bench", "projections"), ("profile", "--d", "32", "--project")], ids=lambda w: w[-1]
)
def test_a_wheel_says_what_only_a_checkout_can(words, monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "nogemm_papers" else find(name))
    assert "checkout" in failed(capsys, *words)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("eval", "m", "--teacher", "m", "--limit=-1"), "--limit"),
        (("eval", "m", "--teacher", "m", "--max-length", "0"), "--max-length"),
        (("eval", "m", "--teacher", "m", "--pack", "int4"), "int4"),
        (("bench", "train-step", "--tokens", "0"), "tokens=0"),
    ],
)
def test_values_out_of_range_are_named_before_any_work(words, said, capsys):
    assert said in failed(capsys, *words)


def test_a_folder_without_a_model_is_not_a_name_of_the_hub(tmp_path, capsys):
    line = failed(capsys, "convert", tmp_path, tmp_path / "out")
    assert "config.json" in line
    assert "hf download" not in line


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_before_there_is_anything_to_keep_ends_in_one_line(number, code, monkeypatch, capsys):
    monkeypatch.setattr("nogemm.models.loading.load_model", lambda *a, **k: os.kill(os.getpid(), number))
    assert run("distil", "m", "out", "--teacher", "t") == code
    assert capsys.readouterr().err.startswith("nogemm: stopped by ")


def test_help_of_convert_names_every_kind_of_layer(capsys):
    assert run("convert", "--help") == 0
    said = " ".join(capsys.readouterr().out.split())
    assert all(kind in said for kind in layer_kinds())


def test_env_names_the_folder_of_its_results(capsys):
    assert run("env", "--processor") == 0
    facts = machine()
    held = held_to()
    ending = f"-{facts['family']}-{facts['model']}" + (f"-{held}" if held else "")
    assert capsys.readouterr().out.strip().endswith(ending)


def test_env_says_what_runs(tmp_path, capsys):
    assert run("env", "--json", tmp_path / "env.json") == 0
    out = capsys.readouterr().out
    assert nogemm.__version__ in out
    written = json.loads((tmp_path / "env.json").read_text())
    assert set(written["paths"] or {}) == ({"fp32", "bf16", "int8"} if ops.native_available() else set())
    for dtype, shares in (written["paths"] or {}).items():
        line = next(line for line in out.splitlines() if line.startswith(f"  {dtype}: "))
        assert all(f"{share:.0%} at {tokens} tokens" in line for tokens, share in shares.items())
    assert written["isa"] == ops.isa()
    assert written["threads"] == torch.get_num_threads()


@pytest.mark.slow
def test_convert_says_where_dense_was_faster(tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("nogemm.bench.engine.pool.last_level_cache_bytes", lambda: 1 << 18)  # a small file of tokens
    small = ["--set", "tables=4", "--set", "bits=3", "--set", "projection.block=8"]
    with pytest.warns(UserWarning, match="random"):
        assert run("convert", tiny, tmp_path / "out", *small, "--speed", "fp32", "--json", tmp_path / "c.json") == 0
    (kind,) = json.loads((tmp_path / "c.json").read_text())["speed"]
    assert kind["sites"] == 2
    assert {row["contender"] for row in kind["rows"]} == {"nogemm-fp32", "torch-fp32", "torch-bf16", "torch-int8"}
    assert all(row["verified"] for row in kind["rows"])
    shape = kind["replaced"]
    assert f"lookup, fp32, for {shape['d_in']}, {shape['hidden']}: {kind['verdict']}" in capsys.readouterr().out


def test_convert_distil_eval_report(tiny, tmp_path, capsys):
    converted, distilled, texts = tmp_path / "converted", tmp_path / "distilled", tmp_path / "texts.jsonl"
    small = ["--set", "tables=4", "--set", "bits=3", "--set", "projection.block=8"]
    with pytest.warns(UserWarning, match="random"):
        assert run("convert", tiny, converted, *small, "--json", tmp_path / "c.json") == 0
    report = json.loads((tmp_path / "c.json").read_text())
    assert [site["config"]["tables"] for site in report["sites"]] == [4, 4]

    budget = ["--tokens", 400, "--set", "batch_tokens=64", "--run", tmp_path / "run"]
    assert run("distil", converted, distilled, "--teacher", tiny, "--data", texts, *budget) == 0
    model = AutoModel.from_pretrained(distilled)
    assert all(layer.fitted == "distilled" for layer in nogemm.converted(model).values())

    scores = tmp_path / "eval.json"
    assert run("eval", distilled, "--teacher", tiny, "--data", texts, "--pack", "fp32", "--json", scores) == 0
    assert json.loads(scores.read_text())["ours"]["agreement"]["samples"] == 32
    assert "agreement" in capsys.readouterr().out

    page = tmp_path / "report.html"
    assert run("report", scores, "-o", page, "--title", "a <title>") == 0
    assert "a &lt;title&gt;" in page.read_text()


def test_convert_only_some_layers_and_store_int8(tiny, tmp_path):
    target = tmp_path / "converted"
    small = ["--set", "tables=4", "--set", "bits=3", "--set", "projection=dense"]
    with pytest.warns(UserWarning, match="random"):
        assert run("convert", tiny, target, *small, "--layers", "1", "--tables", "int8") == 0
    layers = nogemm.converted(AutoModel.from_pretrained(target))
    assert len(layers) == 1
    assert layers["encoder.layer.1"].state_dict()["tables"].dtype == torch.int8


def test_sentence_transformers_files_belong_to_the_same_replacement(tiny, tmp_path, capsys):
    target, words = tmp_path / "converted", ["--set", "tables=4", "--set", "bits=3", "--set", "projection.block=8"]
    modules = [{"path": "", "type": "sentence_transformers.models.Transformer"}]
    modules += [{"path": "1_Pooling", "type": "sentence_transformers.models.Pooling"}]
    (tiny / "modules.json").write_text(json.dumps(modules))
    (tiny / "1_Pooling").mkdir()
    (tiny / "1_Pooling" / "config.json").write_text("{}")

    def convert() -> int:
        with pytest.warns(UserWarning, match="random"):
            return run("convert", tiny, target, *words)

    def content() -> dict[str, bytes]:
        return {str(path.relative_to(target)): path.read_bytes() for path in target.rglob("*") if path.is_file()}

    assert convert() == 0
    before = content()
    assert before.keys() >= {"modules.json", "1_Pooling/config.json", "model.safetensors", "config.json"}

    # The disk is full after the weights, within the pooling configuration.
    (tiny / "1_Pooling" / "config.json").write_text("{}" + " " * 1_000_000)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, limits[1]))
    try:
        assert convert() == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "untouched" in capsys.readouterr().err
    assert content() == before
    assert [path.name for path in tmp_path.glob(".converted*")] == []
    assert convert() == 0  # with room for it, the same conversion goes through
    assert len(content()["1_Pooling/config.json"]) > 1_000_000


def test_export_writes_a_directory_for_openvino(tiny, tmp_path, capsys):
    converted, target = tmp_path / "converted", tmp_path / "out"
    small = ["--set", "tables=4", "--set", "bits=3", "--set", "projection.block=8"]
    with pytest.warns(UserWarning, match="random"):
        assert run("convert", tiny, converted, *small) == 0
    with pytest.warns(UserWarning, match="random"):
        assert (
            run("export", converted, target, "--dtype", "bf16", "--rest", "float", "--json", tmp_path / "e.json") == 0
        )
    assert json.loads((tmp_path / "e.json").read_text())["dtype"] == "bf16"
    assert (target / "openvino_model.bin").is_file()
    assert (target / "tokenizer.json").is_file()
    said = capsys.readouterr().out
    assert "2 layers with bf16 rows, the rest float (as asked)" in said
    assert "inputs input_ids, attention_mask, token_type_ids; output last_hidden_state" in said
    with pytest.warns(UserWarning, match="random"):
        assert "contradict" in failed(capsys, "export", converted, target, "--int8", "--rest", "float")
    assert "to='tvm'" in failed(capsys, "export", converted, target, "--to", "tvm")
    assert "no converted FFN" in failed(capsys, "export", tiny, tmp_path / "other")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--method", "bush"], "'bush'"),
        (["--set", "tables"], "NAME=VALUE"),
        (["--set", "tabels=4"], "tabels"),
        (["--set", "bits=17"], "bits=17"),
        (["--set", "projection.block=7"], "block"),
        (["--layers", "nowhere*"], "nowhere"),
        (["--layers", "7"], "7"),
        (["--layers", ","], "--layers"),
        (["--data", "absent.txt"], "absent.txt"),
    ],
)
def test_wrong_choices_of_convert_are_one_line(tiny, tmp_path, capsys, words, said):
    capsys.readouterr()  # what the fixture's own saving printed
    assert said in failed(capsys, "convert", tiny, tmp_path / "out", *words)
    assert not (tmp_path / "out").exists()


def test_wrong_input_elsewhere_is_one_line(tiny, tmp_path, capsys):
    broken = tmp_path / "broken.json"
    broken.write_text("{")
    other = tmp_path / "other.json"
    other.write_text("[1]")
    capsys.readouterr()  # what the fixture's own saving printed
    assert "config.json" in failed(capsys, "convert", tmp_path / "nowhere", tmp_path / "out")
    assert "no such option" in failed(capsys, "distil", tiny, "out", "--teacher", tiny, "--set", "rate=1")
    assert "--teacher" in failed(capsys, "eval", tiny)
    assert "nowhere.json" in failed(capsys, "report", tmp_path / "nowhere.json")
    assert "not JSON" in failed(capsys, "report", broken)
    assert "not a result" in failed(capsys, "report", other)
    assert "--batch" in failed(capsys, "bench", "layer", "--batch", "1,many")
    assert "--shape" in failed(capsys, "bench", "model", "--shape", "12")
    assert "nonsense" in failed(capsys, "bench", "layer", "--against", "nonsense")
    assert "--counters" in failed(capsys, "profile", "--counters", "guess")
    assert "--project" in failed(capsys, "profile", "--method", "tree", "--project")
    assert "--keep needs --sparsity" in failed(capsys, "profile", "--keep", "0.1")
    assert "--d does not go with --sparsity" in failed(capsys, "profile", "--sparsity", tiny, "--d", "8")
    assert "'few'" in failed(capsys, "profile", "--sparsity", tiny, "--keep", "few")
    assert "1.5" in failed(capsys, "profile", "--sparsity", tiny, "--keep", "1.5")
    assert "absent.txt" in failed(capsys, "profile", "--sparsity", tiny, "--data", tmp_path / "absent.txt")
    assert "are needed" in failed(capsys, "profile", "--sparsity", tiny, "--data", tmp_path / "texts.jsonl")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            "methods --d 16 --hidden 32 --method tree --against torch-fp32 --batch 4096 --threads 1 --seconds 0.001",
            "published as 40x: ",
        ),
        ("projections --d 16 --matrices 1 --evaluations 2 --restarts 1", "a Gaussian matrix of width 16"),
    ],
)
def test_bench_prints_the_table_and_writes_it(words, said, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("nogemm.bench.engine.pool.last_level_cache_bytes", lambda: 1 << 18)  # a small file of tokens
    target = tmp_path / "result.json"
    assert run("bench", *words.split(), "--json", target) == 0
    out = capsys.readouterr().out
    assert said in out
    found = json.loads(target.read_text())
    assert found["kind"] == words.split()[0]
    assert found["rows"]
    assert run("report", target, "--output", tmp_path / "report.html") == 0
    assert said in (tmp_path / "report.html").read_text()


def test_a_misspelt_flag_is_refused(capsys):
    assert run("env", "--jsn", "x") == 2
    assert "--jsn" in capsys.readouterr().err


def test_interrupted_distil_ends_with_130_and_says_how_to_go_on(monkeypatch, capsys, tmp_path, tiny):
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt("its state was saved: --resume continues")

    monkeypatch.setattr(nogemm, "distil", stop)
    assert run("distil", tiny, tmp_path / "out", "--teacher", tiny) == 130
    assert "--resume" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_distil_to_where_nothing_can_be_written_says_where_the_weights_are(tiny, tmp_path, capsys):
    converted, blocked = tmp_path / "converted", tmp_path / "a file"
    model = AutoModel.from_pretrained(tiny)
    nogemm.convert(model, nogemm.LookupConfig(tables=4, bits=3, projection=nogemm.BHConfig(block=8)))
    with pytest.warns(UserWarning, match="random"):
        model.save_pretrained(converted)
    blocked.write_text("")
    asked = ["--teacher", tiny, "--data", tmp_path / "texts.jsonl", "--tokens", 400, "--run", tmp_path / "run"]
    assert run("distil", converted, blocked, *asked) == 2
    said = capsys.readouterr().err
    assert f"{blocked} is a file" in said
    assert f"The trained weights are in {tmp_path / 'run'}: the same command with --resume" in said
    (checkpoint,) = (tmp_path / "run").glob("step-*")
    trained = load_file(checkpoint / "model.safetensors")
    assert run("distil", converted, tmp_path / "out", *asked, "--resume") == 0
    saved = AutoModel.from_pretrained(tmp_path / "out").state_dict()
    assert all(torch.equal(value, trained[name]) for name, value in saved.items())


def test_distil_without_a_place_for_checkpoints_stops_before_it_trains(tiny, tmp_path, capsys):
    (tmp_path / "a file").write_text("")
    said = failed(capsys, "distil", tiny, tmp_path / "out", "--teacher", tiny, "--run", tmp_path / "a file" / "run")
    assert "no checkpoint can be kept in" in said
    assert "choose another directory with output_dir (--run on the command line)" in said


@pytest.mark.parametrize(
    ("text", "layers"), [("all", "all"), ("0, 2", [0, 2]), ("*.1,*.2", ["*.1", "*.2"]), ("*.1", ["*.1"])]
)
def test_layers_are_read(text, layers):
    assert cli.models.parse_layers(text) == layers
