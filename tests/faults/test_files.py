"""Files written atomically: what killed writers leave is removed, live ones are left alone, threads do not mix."""

from __future__ import annotations

import fcntl
import json
import os
import threading
from pathlib import Path

import pytest

from nogemm.files import disk_is_full, write_atomically, write_json


def test_what_a_killed_writer_left_is_removed_and_a_live_one_is_not(tmp_path: Path) -> None:
    file = tmp_path / "result[1].json"
    dead, live, other = (
        tmp_path / f".{name}.new" for name in ("result[1].json.1", "result[1].json.2", "result1.json.1")
    )
    for sibling in (dead, live, other):
        sibling.write_text("half")
    with live.open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        write_json(file, {"a": 1})
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([file.name, live.name, other.name])
    assert json.loads(file.read_text()) == {"a": 1}


def test_threads_that_write_one_file_take_turns(tmp_path: Path) -> None:
    file = tmp_path / "file"
    contents = [bytes([65 + n]) * (200_000 + n) for n in range(4)]
    faults: list[BaseException] = []

    def write(content: bytes) -> None:
        try:
            for _ in range(10):
                write_atomically(file, content)
                assert file.read_bytes() in contents
        except BaseException as error:
            faults.append(error)

    threads = [threading.Thread(target=write, args=(content,)) for content in contents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert faults == []
    assert os.listdir(tmp_path) == ["file"]


def test_a_failed_write_keeps_the_old_content_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "file"
    write_atomically(file, b"old")

    def full(handle: int) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left") as caught:
        write_atomically(file, b"new")
    assert disk_is_full(caught.value)
    assert file.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]
