"""nogemm.save: the path holds the old checkpoint or the new one, whatever happens."""

from __future__ import annotations

import fcntl
import multiprocessing
import random
import resource
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny_models import FAMILIES, train_a_little

import nogemm
from nogemm.convert import exchange as exchange_module
from nogemm.convert import save as save_function
from nogemm.testing.compare import Mismatch
from nogemm.testing.compare_model import check_same_model

save_module = sys.modules[save_function.__module__]


def model_at(path: Path) -> Any:
    return FAMILIES["bert"].auto.from_pretrained(path)


def check_at(path: Path, expected: Any) -> None:
    check_same_model(path.name, model_at(path), expected, FAMILIES["bert"].output)


def names(folder: Path) -> set[str]:
    return {entry.name for entry in folder.iterdir()}


def test_a_new_path_and_an_old_one(converted_bert: Any, tmp_path: Path) -> None:
    nogemm.save(converted_bert, tmp_path / "deep" / "model")
    train_a_little(converted_bert)
    nogemm.save(converted_bert, tmp_path / "deep" / "model")
    check_at(tmp_path / "deep" / "model", converted_bert)
    assert names(tmp_path / "deep") == {"model"}  # no lock, no temporary


def test_other_files_stay_and_old_weights_go(converted_bert: Any, tmp_path: Path) -> None:
    path = tmp_path / "model"
    converted_bert.save_pretrained(path, max_shard_size="8KB")
    (path / "notes.txt").write_text("mine")
    (path / "1_Pooling").mkdir()
    (path / "1_Pooling" / "config.json").write_text("{}")
    nogemm.save(converted_bert, path)
    assert names(path) == {"config.json", "model.safetensors", "notes.txt", "1_Pooling"}
    assert (path / "notes.txt").read_text() == "mine"
    check_at(path, converted_bert)


def test_a_tokenizer_goes_along(converted_bert: Any, tmp_path: Path) -> None:
    class Tokenizer:
        def save_pretrained(self, folder: str) -> None:
            (Path(folder) / "vocab.txt").write_text("a\n")

    nogemm.save(converted_bert, tmp_path / "model", tokenizer=Tokenizer())
    assert "vocab.txt" in names(tmp_path / "model")


def test_a_symbolic_link_is_followed(converted_bert: Any, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    nogemm.save(converted_bert, tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    check_at(tmp_path / "real", converted_bert)


def test_an_error_while_writing_leaves_the_old_checkpoint(
    converted_bert: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model"
    nogemm.save(converted_bert, path)
    expected = model_at(path)
    train_a_little(converted_bert)

    def broken(folder: Path) -> None:
        raise RuntimeError("power cut")

    monkeypatch.setattr(save_module, "flush", broken)
    with pytest.raises(nogemm.CheckpointError, match=r"power cut.*untouched"):
        nogemm.save(converted_bert, path)
    check_at(path, expected)
    with pytest.raises(Mismatch):
        check_at(path, converted_bert)
    assert names(tmp_path) == {"model"}


@pytest.mark.parametrize("limit", [10, 700, 20_000])
def test_a_full_disk_leaves_the_old_checkpoint(converted_bert: Any, tmp_path: Path, limit: int) -> None:
    path = tmp_path / "model"
    nogemm.save(converted_bert, path)
    expected = model_at(path)
    train_a_little(converted_bert)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with pytest.raises(nogemm.CheckpointError, match="untouched"):
            nogemm.save(converted_bert, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    check_at(path, expected)
    with pytest.raises(Mismatch):
        check_at(path, converted_bert)
    assert names(tmp_path) == {"model"}


def test_too_little_space_is_seen_before_writing(
    converted_bert: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nogemm.save(converted_bert, tmp_path / "model")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(nogemm.CheckpointError, match=r"needs 0\.\d MB, .* has 0\.0 MB free.*untouched"):
        nogemm.save(converted_bert, tmp_path / "model")
    assert names(tmp_path) == {"model"}


def test_two_writers_exclude_each_other(converted_bert: Any, tmp_path: Path) -> None:
    with (tmp_path / ".model.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(nogemm.CheckpointError, match="another process is saving"):
            nogemm.save(converted_bert, tmp_path / "model")
        nogemm.save(converted_bert, tmp_path / "another")
    nogemm.save(converted_bert, tmp_path / "model")  # a lock file without a holder does not matter
    assert names(tmp_path) == {"model", "another"}


def test_a_file_system_without_exchange(converted_bert: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchange_module, "rename_exchange", lambda a, b: False)
    path = tmp_path / "model"
    nogemm.save(converted_bert, path)
    train_a_little(converted_bert)
    nogemm.save(converted_bert, path)
    check_at(path, converted_bert)
    # Killed between its two renames: the next save finds the old checkpoint and puts it back first.
    path.rename(tmp_path / ".model.former")
    monkeypatch.setattr(save_module, "_write", lambda *args: (_ for _ in ()).throw(OSError("disk gone")))
    with pytest.raises(nogemm.CheckpointError, match="disk gone"):
        nogemm.save(converted_bert, path)
    check_at(path, converted_bert)


def test_leftovers_of_killed_saves_are_removed(converted_bert: Any, tmp_path: Path) -> None:
    for name in (".model.saving-1", ".model.saving-99999", ".models.saving-1"):
        (tmp_path / name).mkdir()
    nogemm.save(converted_bert, tmp_path / "model")
    assert names(tmp_path) == {"model", ".models.saving-1"}


def test_a_file_in_the_way_and_a_model_that_cannot_be_saved(converted_bert: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(nogemm.CheckpointError, match="is a file"):
        nogemm.save(converted_bert, tmp_path / "file")
    with pytest.raises(nogemm.CheckpointError, match="no save_pretrained"):
        nogemm.save(torch.nn.Linear(2, 2), tmp_path / "linear")
    assert not (tmp_path / "linear").exists()


def save_for_ever(model: Any, path: Path, write: Callable[[Any, Path], None]) -> None:
    """Child process: save step after step, both layers of each save marked with the step's number."""
    torch.set_num_threads(1)
    # A progress bar takes a lock that forked processes share: killed while holding it, a child would stop the parent.
    transformers.logging.disable_progress_bar()
    for step in range(10**6):
        with torch.no_grad():
            for layer in nogemm.converted(model).values():
                layer.get_parameter("bias").fill_(float(step))
        write(model, path)


def kill_a_writer(model: Any, path: Path, write: Callable[[Any, Path], None], seconds: float) -> None:
    child = multiprocessing.get_context("fork").Process(target=save_for_ever, args=(model, path, write))
    child.start()
    time.sleep(seconds)
    child.kill()
    child.join()


def test_kill_9_at_random_moments_leaves_a_complete_checkpoint(converted_bert: Any, tmp_path: Path) -> None:
    source, path = tmp_path / "source", tmp_path / "model"
    converted_bert.save_pretrained(source)
    reference = FAMILIES["bert"].auto.from_pretrained(source)
    nogemm.save(reference, path)
    chance = random.Random(0)
    interrupted = 0
    for _ in range(25):
        kill_a_writer(converted_bert, path, nogemm.save, chance.uniform(0.02, 0.2))
        interrupted += len(names(tmp_path)) > 2  # a lock or a temporary was left: the kill came during a save
        check_complete(path, reference)
    assert interrupted > 5  # negative control: the kills do hit saves
    nogemm.save(converted_bert, path)  # the dead writers' locks and leftovers are no obstacle
    assert names(tmp_path) == {"source", "model"}


def test_kill_9_during_plain_save_pretrained_never_half_loads(converted_bert: Any, tmp_path: Path) -> None:
    converted_bert.save_pretrained(tmp_path, max_shard_size="8KB")
    reference = FAMILIES["bert"].auto.from_pretrained(tmp_path)
    chance = random.Random(1)
    failures = 0

    def write(model: Any, path: Path) -> None:
        model.save_pretrained(path, max_shard_size="8KB")

    for _ in range(25):
        kill_a_writer(converted_bert, tmp_path, write, chance.uniform(0.02, 0.1))
        try:
            check_complete(tmp_path, reference)
        except (nogemm.CheckpointError, OSError, ValueError):  # ValueError: transformers, on half an index file
            failures += 1
        converted_bert.save_pretrained(tmp_path, max_shard_size="8KB")  # in place: repair it for the next round
    assert failures > 0  # the kills do leave broken directories, and loading says so


def check_complete(path: Path, reference: Any) -> None:
    """Load, and see that both layers come from the same step and the rest from the source."""
    loaded = FAMILIES["bert"].auto.from_pretrained(path)
    first, second = (layer.get_parameter("bias") for layer in nogemm.converted(loaded).values())
    whole = torch.equal(first, second) and len(first.unique()) == 1
    start = dict(reference.named_parameters())
    assert whole or all(torch.equal(p, start[k]) for k, p in loaded.named_parameters())
    for (key, value), (other, expected) in zip(
        loaded.state_dict().items(), reference.state_dict().items(), strict=True
    ):
        assert key == other
        assert key.endswith("intermediate.bias") or torch.equal(value, expected)


def test_the_completeness_check_sees_a_mixture(converted_bert: Any, tmp_path: Path) -> None:
    converted_bert.save_pretrained(tmp_path)
    reference = FAMILIES["bert"].auto.from_pretrained(tmp_path)
    with torch.no_grad():
        nogemm.converted(converted_bert)["bert.encoder.layer.0"].get_parameter("bias").fill_(3.0)
    converted_bert.save_pretrained(tmp_path)
    with pytest.raises(AssertionError):
        check_complete(tmp_path, reference)
