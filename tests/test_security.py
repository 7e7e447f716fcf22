"""What SECURITY.md says of hostile files, where no other test holds it; and that it names tests which exist."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, BertConfig, BertModel

import nogemm
from nogemm.errors import CheckpointError, ConfigError
from nogemm.export.folder import RECORD
from nogemm.export.running import decoder_record
from nogemm.study.reading import read_yaml
from sample_results import demo_result, layer_result, report, train_step_result

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src" / "nogemm"
PICKLES = {"pickle", "cPickle", "dill", "joblib", "marshal", "shelve", "cloudpickle"}
NETWORK = {"socket", "socketserver", "http", "urllib.request", "requests", "httpx", "aiohttp", "ftplib", "asyncio"}
RUNNING = {"eval", "exec", "compile", "os.system", "os.popen", "torch.load", "pickle.loads"}


def imported(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def dangers(tree: ast.AST) -> list[str]:
    """Name what reads pickles, runs text, or hands words to a shell."""
    found = [name for name in imported(tree) if name.split(".")[0] in PICKLES]
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            words = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            wrong = {"shell": "True", "allow_pickle": "True", "weights_only": "False"}
            found += [name] if name in RUNNING else []
            found += [f"{name}({key}={value})" for key, value in words.items() if wrong.get(str(key)) == value]
    return found


def trees() -> dict[str, ast.Module]:
    found = {
        str(path.relative_to(SOURCE)): ast.parse(path.read_text(encoding="utf-8")) for path in SOURCE.rglob("*.py")
    }
    assert len(found) > 200
    return found


def test_no_module_reads_pickles_or_runs_text() -> None:
    assert {name: found for name, tree in trees().items() if (found := dangers(tree))} == {}


def test_nothing_but_serve_knows_the_network() -> None:
    found = {
        name: known
        for name, tree in trees().items()
        if not name.startswith(("serve/", "cli/serve", "bench/serve.py"))  # the last asks servers that it starts
        and (known := [each for each in imported(tree) if each in NETWORK or each.split(".")[0] in NETWORK])
    }
    assert found == {}


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from joblib import load",
        "torch.load(path)",
        "np.load(path, allow_pickle=True)",
        "eval(text)",
        "subprocess.run(words, shell=True)",
    ],
)
def test_the_check_of_dangers_can_fail(code: str) -> None:
    assert dangers(ast.parse(code))
    assert not dangers(ast.parse("import json\nmodel.eval()\nre.compile(text)\nnp.load(path, allow_pickle=False)"))
    assert list(imported(ast.parse("import http.server\nfrom urllib import request")))[-1] == "urllib.request"


def test_converted_weights_in_a_pickle_are_refused(tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"vocab_size": 8, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
    model = BertModel(BertConfig(**sizes, num_hidden_layers=1))
    nogemm.convert(model, nogemm.DenseConfig())
    nogemm.save(model, tmp_path)
    AutoModel.from_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    torch.save(load_file(weights), tmp_path / "pytorch_model.bin")
    weights.unlink()
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin: converted models are stored as safetensors only"):
        AutoModel.from_pretrained(tmp_path)


HOSTILE = "<script>alert(1)</script><a href='http://a.b'>\"&"


def poisoned(value: Any) -> Any:
    """Put markup behind every word of a result that says something, and leave what names its parts."""
    if isinstance(value, dict):
        return {
            key: each if key in ("kind", "batch", "codes", "cache") else poisoned(each) for key, each in value.items()
        }
    if isinstance(value, list):
        return [poisoned(each) for each in value]
    return value + HOSTILE if isinstance(value, str) else value


@pytest.mark.parametrize("make", [demo_result, layer_result, train_step_result])
def test_words_of_a_result_are_only_words(make: Any, tmp_path: Path) -> None:
    page = report(tmp_path, poisoned(make()))
    assert "&lt;script&gt;" in page, "what was put in is shown"
    assert "<script" not in page
    assert "<a " not in page


def test_a_study_file_builds_no_objects(tmp_path: Path) -> None:
    made = tmp_path / "made"
    path = tmp_path / "study.yaml"
    path.write_text(f"rows: !!python/object/apply:pathlib.Path.touch [!!python/object/apply:pathlib.Path ['{made}']]")
    with pytest.raises(ConfigError, match="not YAML"):
        read_yaml(path)
    assert not made.exists()


@pytest.mark.parametrize("key", ["model", "extension"])
def test_a_record_names_files_of_its_own_folder(key: str, tmp_path: Path) -> None:
    inside = tmp_path / "export"
    inside.mkdir()
    for folder in (inside, tmp_path):
        for name in ("a.xml", "a.bin", "b.so"):
            (folder / name).touch()
    record = {"model": "a.xml", "extension": "b.so", "head": "exact", "vocabulary": 3, "positions": 4, "ends": []}
    (inside / RECORD).write_text(json.dumps(record))
    assert decoder_record(inside)["model"] == "a.xml"
    for path in (f"../{record[key]}", str(tmp_path / record[key])):
        (inside / RECORD).write_text(json.dumps(record | {key: path}))
        with pytest.raises(CheckpointError, match="outside of the folder"):
            decoder_record(inside)


def test_every_test_that_is_named_exists() -> None:
    text = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", text)
    assert len(named) > 20
    rows = [line for line in text.splitlines() if line.startswith("| ") and not line.startswith("| it cannot")]
    assert all("::test_" in line for line in rows)
    missing = [
        f"{file}::{name}"
        for file, name in named
        if not (ROOT / file).is_file() or f"def {name}(" not in (ROOT / file).read_text(encoding="utf-8")
    ]
    assert missing == []
