"""nogemm.save where a directory cannot be renamed: mount points (Docker volumes), and folders that take no new file."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from test_save import check_at, names
from tiny_models import train_a_little

import nogemm
from nogemm.convert import exchange as exchange_module
from nogemm.convert import save as save_function

save_module = sys.modules[save_function.__module__]


@pytest.fixture(params=["mounted", "not renamed", "other device", "closed parent", "read-only parent"])
def place(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory that cannot be replaced by a rename: a real mount where this user may mount, else by the errors."""
    path = tmp_path / "model"
    path.mkdir()
    if request.param == "mounted":
        if subprocess.run(["mount", "-t", "tmpfs", "tmpfs", path], capture_output=True, check=False).returncode:
            pytest.skip("this user may not mount")
        yield path
        subprocess.run(["umount", path], check=True)
        return
    if request.param in ("not renamed", "other device"):
        code = errno.EBUSY if request.param == "not renamed" else errno.EXDEV

        def fixed(a: Path, b: Path) -> bool:
            raise OSError(code, os.strerror(code), str(b))

        monkeypatch.setattr(exchange_module, "rename_exchange", fixed)
    else:
        code = errno.EACCES if request.param == "closed parent" else errno.EROFS
        close(tmp_path, code, monkeypatch)
    yield path


def close(folder: Path, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let nothing new be made in a folder; by hand, because no folder is closed to root."""
    real = os.open

    def refusing(path: Any, *args: Any, **kwargs: Any) -> int:
        if Path(path).parent == folder and Path(path).name.endswith(".lock"):
            raise OSError(code, os.strerror(code), str(path))
        return real(path, *args, **kwargs)

    monkeypatch.setattr(os, "open", refusing)


def test_saving_again_and_again(converted_bert: Any, place: Path) -> None:
    (place / "notes.txt").write_text("mine")
    converted_bert.save_pretrained(place, max_shard_size="8KB")
    for _ in range(2):
        train_a_little(converted_bert)
        nogemm.save(converted_bert, place)
        check_at(place, converted_bert)
        assert names(place) == {"config.json", "model.safetensors", "notes.txt"}
        assert names(place.parent) == {"model"}


NEW = {"config.json": "new", "model.safetensors": "new", "extra": "new"}
OLD = {"config.json": "old", "model.safetensors.index.json": "old", "model.safetensors": "old", "notes.txt": "mine"}


def write_all(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).write_text(text)


def replace(path: Path, files: dict[str, str] | None = None, **options: Any) -> None:
    """Replace what `replace_directory` replaces, with files that say which save they are of; None: fail."""

    def write(folder: Path) -> None:
        if files is None:
            raise OSError("disk gone")
        write_all(folder, files)

    save_module.replace_directory(path, write, caller="save", needed=0, **options)


def found(path: Path) -> dict[str, str]:
    return {entry.name: entry.read_text() for entry in path.iterdir() if entry.is_file()}


def after(steps: int, act: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the renames of files inside a directory do something else once so many have been done."""
    real, left = Path.rename, [steps]

    def rename(source: Path, place: Path) -> Path:
        if exchange_module.STAGES in f"{source} {place}" and source.name != "ready.part":
            left[0] -= 1
            if left[0] < 0:
                act()
        return real(source, place)

    monkeypatch.setattr(Path, "rename", rename)


def fail() -> None:
    raise OSError(errno.EIO, "disk gone")


@pytest.fixture
def fixed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory that cannot be renamed, with files in it, as a volume has them."""
    path = tmp_path / "model"
    path.mkdir()
    write_all(path, OLD)
    (path / "lost+found").mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda target: Path(target) == path)
    return path


@pytest.mark.parametrize("carry_over", [True, False])
def test_what_stays_and_what_goes(fixed: Path, carry_over: bool) -> None:
    replace(fixed, NEW, carry_over=carry_over)
    assert found(fixed) == {**NEW, **({"notes.txt": "mine"} if carry_over else {})}
    assert names(fixed) == {*found(fixed), "lost+found"}


@pytest.mark.parametrize("steps", range(6))
def test_an_error_at_any_rename_leaves_the_old_files(fixed: Path, steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        failed: list[int] = []

        def once() -> None:
            if not failed:
                failed.append(1)
                fail()

        after(steps, once, patch)
        with pytest.raises(nogemm.CheckpointError, match=r"save: could not write .*disk gone.*untouched"):
            replace(fixed, NEW)
    assert found(fixed) == OLD
    assert names(fixed) == {*OLD, "lost+found"}


def test_what_cannot_be_put_back_is_named_and_finished_later(fixed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        after(4, fail, patch)
        with pytest.raises(
            nogemm.CheckpointError, match=r"half-way .*disk gone.*New files .* are in .*new, old ones in"
        ):
            replace(fixed, NEW)
    assert "config.json" not in found(fixed)
    with pytest.raises(nogemm.CheckpointError, match="disk gone"):
        replace(fixed)
    assert found(fixed) == {**NEW, "notes.txt": "mine"}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_kill_at_any_rename_never_leaves_a_mixture(fixed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outcomes = []
    for steps in range(8):
        child = os.fork()
        if child == 0:
            after(steps, lambda: os._exit(9), monkeypatch)
            replace(fixed, NEW)
            os._exit(0)
        killed = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
        seen = found(fixed)
        kinds = {text for name, text in seen.items() if name in NEW or name in OLD} - {"mine"}
        outcomes.append("config.json" in seen)
        assert not outcomes[-1] or len(kinds) == 1  # who finds a config finds files of one save
        with pytest.raises(nogemm.CheckpointError, match="disk gone"):
            replace(fixed)  # the next save brings the killed one to its end, and fails itself
        assert found(fixed) == {**NEW, "notes.txt": "mine"}
        assert names(fixed) == {*NEW, "notes.txt", "lost+found"}
        replace(fixed, {name: text for name, text in OLD.items() if name != "notes.txt"})
        (fixed / "extra").unlink()
        assert found(fixed) == OLD
        if not killed:
            break
    assert outcomes == [True, False, False, False, False, False, True]  # config.json first out, and last in


def test_a_kill_before_all_is_written_leaves_the_old_files(fixed: Path) -> None:
    stage = fixed / f"{exchange_module.STAGES}1"
    (stage / "new").mkdir(parents=True)
    write_all(stage / "new", NEW)
    with pytest.raises(nogemm.CheckpointError, match="disk gone"):
        replace(fixed)
    assert found(fixed) == OLD
    assert names(fixed) == {*OLD, "lost+found"}


def test_two_writers_inside_exclude_each_other(fixed: Path) -> None:
    with (fixed / exchange_module.LOCK).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(nogemm.CheckpointError, match="another process is saving"):
            replace(fixed, NEW)


def test_nothing_can_be_written_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    close(tmp_path, errno.EROFS, monkeypatch)
    with pytest.raises(nogemm.CheckpointError, match=r"save: could not write .*model: .*Read-only .* one in a folder"):
        replace(tmp_path / "model", NEW)
