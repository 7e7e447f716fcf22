"""`pack(cache=)`: one file of packed tensors that processes map; what happens to it, and to those who use it."""

from __future__ import annotations

import copy
import dataclasses
import errno
import fcntl
import json
import os
import pickle
import subprocess
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from tiny_models import FAMILIES, SMALL, run_python, train_a_little

import decoders
import nogemm
from nogemm.convert.packed_cache import digest
from nogemm.convert.packed_file import ABANDONED, PackedFile, write_packed
from nogemm.errors import CheckpointError, ConfigError
from nogemm.files import remove_abandoned
from nogemm.layers import PackedFFN
from nogemm.ops import isa, set_isa, supported_isas
from nogemm.testing.cases import KINDS
from nogemm.testing.compare import check_equal

BERT = FAMILIES["bert"]
PLACE = "bert.encoder.layer.0"
METHODS = {**KINDS, "token_table": dataclasses.replace(KINDS["token_table"], vocabulary=64)}  # type: ignore[call-arg]


def model_of(config: Any = SMALL) -> Any:
    """Build the same converted model at every call."""
    model = BERT.build()
    nogemm.convert(model, {PLACE: config, "bert.encoder.layer.1": nogemm.DenseConfig()})
    torch.manual_seed(1)
    train_a_little(model)
    return model.eval()


def answer(folder: Path | None, config: Any = SMALL, **options: Any) -> torch.Tensor:
    """Pack a fresh model, and return what it answers."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="pack:")
        return BERT.output(nogemm.pack(model_of(config), cache=folder, **options))


def file_in(folder: Path) -> Path:
    (found,) = folder.iterdir()
    return found


def mappings(path: Path) -> list[tuple[int, int]]:
    """Return the address ranges in which this process has mapped a file."""
    lines = [line.split(maxsplit=5) for line in Path("/proc/self/maps").read_text().splitlines()]
    spans = [line[0].split("-") for line in lines if len(line) == 6 and line[5].removesuffix(" (deleted)") == str(path)]
    return [(int(start, 16), int(end, 16)) for start, end in spans]


def mapped_bytes(model: Any, path: Path) -> int:
    spans = mappings(path)
    tensors = [*model.parameters(), *model.buffers()]
    return sum(t.nbytes for t in tensors if any(start <= t.data_ptr() < end for start, end in spans))


@pytest.mark.parametrize("kind", sorted(METHODS))
def test_every_method_answers_alike_from_the_file(kind: str, tmp_path: Path) -> None:
    for dtype in ("fp32", "int8"):
        expected = answer(None, METHODS[kind], dtype=dtype)
        folder = tmp_path / dtype
        check_equal("written", answer(folder, METHODS[kind], dtype=dtype), expected)
        check_equal("found", answer(folder, METHODS[kind], dtype=dtype), expected)
        assert file_in(folder).name.startswith("packed-")


def test_a_rounded_body_answers_alike_from_the_file(tmp_path: Path) -> None:
    expected = answer(None, dtype="int8", body="int8")
    for _ in range(2):
        check_equal("answers", answer(tmp_path, dtype="int8", body="int8"), expected)


def test_without_kernels_the_file_serves_as_well(tmp_path: Path) -> None:
    code = (
        "import sys, torch, warnings; from tiny_models import *; from test_packed_cache import answer\n"
        "one, two = (answer(Path(sys.argv[1]), dtype='int8') for _ in range(2))\n"
        "print(torch.equal(one, two), torch.equal(one, answer(None, dtype='int8')))"
    )
    here = str(Path(__file__).parent)
    start = f"import os, sys; os.environ['NOGEMM_DISABLE_NATIVE'] = '1'; sys.path[:0] = [{here!r}, {here!r} + '/..']"
    code = f"{start}\n{code}"
    done = run_python(code, str(tmp_path))
    assert done.stdout == "True True\n", done.stderr


def test_all_tensors_lie_in_the_file(tmp_path: Path) -> None:
    for _ in range(2):
        model = nogemm.pack(model_of(), cache=tmp_path)
        large = [t for t in (*model.parameters(), *model.buffers()) if t.nbytes and t.is_contiguous()]
        packed = next(part for part in model.modules() if isinstance(part, PackedFFN)).get_buffer("packed")
        assert any(t is packed for t in large)
        assert mapped_bytes(model, file_in(tmp_path)) >= sum(t.nbytes for t in large)
    assert mapped_bytes(nogemm.pack(model_of()), file_in(tmp_path)) == 0, "the measure can tell"


def test_a_head_and_what_it_is_tied_to_lie_in_the_file_once(tmp_path: Path) -> None:
    def made() -> Any:
        torch.manual_seed(0)
        model = decoders.make("llama tied")
        nogemm.convert_head(model)
        return model

    expected = nogemm.generate(made(), decoders.prompts(2), 5)
    for _ in range(2):
        model: Any = nogemm.pack(made(), cache=tmp_path)
        head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
        assert head.weight is embedding.weight
        spans = mappings(file_in(tmp_path))
        tensors = (head.weight, *head.codes().tensors())
        assert all(any(a <= t.data_ptr() < b for a, b in spans) for t in tensors if t.numel())
        check_equal("tokens", nogemm.generate(model, decoders.prompts(2), 5), expected)


def test_a_write_stays_in_the_process(tmp_path: Path) -> None:
    expected = answer(tmp_path)
    before = file_in(tmp_path).read_bytes()
    model = nogemm.pack(model_of(), cache=tmp_path)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.zero_()
    assert file_in(tmp_path).read_bytes() == before
    check_equal("others", answer(tmp_path), expected)


def test_copies_and_pickles_hold_no_more_than_the_model(tmp_path: Path) -> None:
    model = nogemm.pack(model_of(), cache=tmp_path)
    expected = BERT.output(model)
    whole = pickle.dumps(model)
    assert len(whole) < 1.5 * len(pickle.dumps(nogemm.pack(model_of())))
    for twin in (copy.deepcopy(model), pickle.loads(whole)):
        check_equal("the copy", BERT.output(twin), expected)
        assert mapped_bytes(twin, file_in(tmp_path)) == 0


def test_a_deleted_file_serves_who_has_it_and_is_made_anew(tmp_path: Path) -> None:
    model = nogemm.pack(model_of(), cache=tmp_path)
    expected, first = BERT.output(model), file_in(tmp_path)
    first.unlink()
    check_equal("still", BERT.output(model), expected)
    check_equal("anew", answer(tmp_path), expected)
    assert file_in(tmp_path) == first


def damage(path: Path, how: str) -> None:
    data = bytearray(path.read_bytes())
    length = int.from_bytes(data[:8], "little")
    if how == "truncated":
        del data[-100:]
    elif how == "empty":
        data.clear()
    elif how == "one bit":
        data[-5] ^= 1
    elif how == "header":
        data[8:20] = b"?" * 12
    elif how == "length":
        data[:8] = (2**63).to_bytes(8, "little")
    else:
        header = json.loads(data[8 : 8 + length])
        if how == "format":
            header["__metadata__"]["format"] = "2"
        else:
            index = json.loads(header["__metadata__"]["index"])
            next(iter(index.values()))["at" if how == "outside" else "shape"] = 2**40 if how == "outside" else [-1]
            header["__metadata__"]["index"] = json.dumps(index)
        data[8 : 8 + length] = json.dumps(header).encode().ljust(length)
    path.write_bytes(data)


@pytest.mark.parametrize(
    "how", ["truncated", "empty", "one bit", "header", "length", "format", "outside", "negative shape"]
)
def test_a_damaged_file_is_named_and_made_anew(how: str, tmp_path: Path) -> None:
    expected = answer(tmp_path)
    path = file_in(tmp_path)
    good = path.read_bytes()
    damage(path, how)
    assert path.read_bytes() != good
    with pytest.warns(UserWarning, match=f"pack: the file {path} is not used: .* It is made anew"):
        model = nogemm.pack(model_of(), cache=tmp_path)
    check_equal("answers", BERT.output(model), expected)
    assert path.read_bytes() == good


@pytest.mark.parametrize("mode", [0o664, 0o646])
def test_a_file_that_others_may_write_is_not_trusted(mode: int, tmp_path: Path) -> None:
    expected = answer(tmp_path)
    file_in(tmp_path).chmod(mode)
    with pytest.warns(UserWarning, match="other users may write to it"):
        model = nogemm.pack(model_of(), cache=tmp_path)
    check_equal("answers", BERT.output(model), expected)
    assert file_in(tmp_path).stat().st_mode & 0o777 == 0o644


def test_where_nothing_can_be_written_the_model_stays_in_memory(tmp_path: Path) -> None:
    expected = answer(None)
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match="cannot be shared, and stays in this process's own memory"):
        model = nogemm.pack(model_of(), cache=tmp_path / "file" / "folder")
    check_equal("answers", BERT.output(model), expected)


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    expected = answer(None)
    monkeypatch.setattr("nogemm.files.os.fsync", full)
    with pytest.warns(UserWarning, match="in this process's own memory: .*No space left on device"):
        model = nogemm.pack(model_of(), cache=tmp_path)
    check_equal("answers", BERT.output(model), expected)
    assert not list(tmp_path.iterdir())


def test_what_packed_tensors_follow_from_is_in_the_name(tmp_path: Path) -> None:
    def name(change: str = "", dtype: str = "int8", body: str | None = None) -> str:
        model = model_of()
        if change:
            with torch.no_grad():
                model.get_parameter(change).view(-1)[0] += 1e-6
        return digest(model, dtype, body, None)

    weights = [key for key, _ in model_of().named_parameters()]
    of_ours = next(key for key in weights if key.startswith(PLACE))
    names = [name(), name(of_ours), name(weights[0]), name(dtype="bf16"), name(body="int8")]
    assert len(set(names)) == len(names)
    assert name() == names[0]
    other = nogemm.LookupConfig(tables=4, bits=3, projection=SMALL.projection, score="sigmoid")
    assert digest(model_of(other), "int8", None, None) != names[0]


@pytest.mark.parametrize("kind", sorted(METHODS))
def test_layouts_are_the_same_for_every_instruction_set(kind: str) -> None:
    """So the name needs none, and a machine's file serves another that has its processor's features switched off."""

    def buffers() -> dict[str, torch.Tensor]:
        return dict(nogemm.pack(model_of(METHODS[kind]), "int8").named_buffers())

    before, found = isa(), {}
    try:
        for name in supported_isas():
            set_isa(name)
            found[name] = buffers()
    finally:
        set_isa(before)
    first, *others = found.values()
    assert others, "one instruction set compares nothing"
    for other in others:
        assert first.keys() == other.keys()
        for name, tensor in first.items():
            if tensor.dtype == torch.uint8:
                check_equal(name, other[name], tensor)


WRITER = """
import sys, time
sys.path[:0] = sys.argv[2:]
from test_packed_cache import answer
from pathlib import Path
answer(Path(sys.argv[1] + "/warm"))  # imports done, both go at once
go = Path(sys.argv[1] + "/go")
open(sys.argv[1] + f"/ready-{__import__('os').getpid()}", "w").close()
while not go.exists():
    time.sleep(0.001)
print(float(answer(Path(sys.argv[1] + "/shared")).double().sum()))
"""


def test_readers_find_a_whole_file_whoever_writes(tmp_path: Path) -> None:
    path = tmp_path / "packed-one"
    write_packed(path, {"a": torch.full((50_000,), 0.0)})
    with ThreadPoolExecutor(2) as pool:
        writers = [
            pool.submit(lambda n=n: [write_packed(path, {"a": torch.full((50_000,), float(n))}) for _ in range(10)])
            for n in (1, 2)
        ]
        looks = 0
        while looks < 10 or not all(writer.done() for writer in writers):
            found = PackedFile(path).tensor("a")
            assert torch.equal(found, found[:1].expand(50_000))
            looks += 1
    assert [len(writer.result()) for writer in writers] == [10, 10]
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.slow
def test_two_processes_that_write_at_once_leave_one_file(tmp_path: Path) -> None:
    here = Path(__file__).parent
    command = [sys.executable, "-c", WRITER, str(tmp_path), str(here), str(here.parent)]
    writers = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    while len(list(tmp_path.glob("ready-*"))) < 2:
        assert all(writer.poll() is None for writer in writers)
        time.sleep(0.01)
    (tmp_path / "go").touch()
    said = [writer.communicate()[0] for writer in writers]
    assert [writer.returncode for writer in writers] == [0, 0]
    assert said[0] == said[1] == f"{float(answer(tmp_path / 'shared').double().sum())}\n"
    assert file_in(tmp_path / "shared").suffix == ".safetensors"


def test_what_a_killed_writer_left_is_removed_and_a_living_one_kept(tmp_path: Path) -> None:
    dead, alive = tmp_path / ".packed-1.new", tmp_path / ".packed-2.new"
    dead.touch()
    with alive.open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        remove_abandoned(tmp_path, ABANDONED)
        assert not dead.exists()
        assert alive.exists()
    remove_abandoned(tmp_path, ABANDONED)
    assert not alive.exists()


def test_safetensors_reads_the_file_and_every_tensor_is_aligned(tmp_path: Path) -> None:
    tensors = {
        "a": torch.arange(5, dtype=torch.int8),
        "b": torch.randn(3, 2048).bfloat16(),
        "none": torch.zeros(0, 4),
        "c": torch.tensor([[True, False]]),
        "d": torch.randn(7).double(),
    }
    path = tmp_path / "one"
    write_packed(path, tensors)
    found = PackedFile(path)
    assert found.names == list(tensors)
    for name, tensor in tensors.items():
        check_equal(name, found.tensor(name), tensor)
        assert found.tensor(name).data_ptr() % (4096 if tensor.nbytes >= 4096 else 64) == 0
    with safe_open(path, framework="pt") as file:
        assert file.get_tensor("packed").numel() == path.stat().st_size - 4096
    with pytest.raises(KeyError):
        found.tensor("e")


def test_a_file_of_another_user_is_refused(tmp_path: Path) -> None:
    if os.geteuid():
        pytest.skip("only root can give files away")
    path = tmp_path / "one"
    write_packed(path, {"a": torch.ones(3)})
    os.chown(path, 12345, -1)
    with pytest.raises(CheckpointError, match="another user"):
        PackedFile(path)


def test_bad_arguments_change_nothing(tmp_path: Path) -> None:
    model = model_of()
    expected = BERT.output(model)
    with pytest.raises(ConfigError, match="cache must be True, a folder or None, got cache=7"):
        nogemm.pack(model, cache=7)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="keep=True keeps the unpacked weights"):
        nogemm.pack(model, keep=True, cache=tmp_path)
    with pytest.raises(ConfigError, match="body and cache are of a model"):
        nogemm.pack(nogemm.converted(model)[PLACE], cache=tmp_path)  # type: ignore[call-overload]
    check_equal("untouched", BERT.output(model), expected)
    assert not list(tmp_path.iterdir())


def test_true_means_the_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOGEMM_CACHE", str(tmp_path))
    nogemm.pack(model_of(), cache=True)
    assert file_in(tmp_path / "packed").suffix == ".safetensors"
