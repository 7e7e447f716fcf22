"""Put a freshly written directory in the place of another, also where the place itself cannot be renamed.

`save.py` says what is written, this file how it becomes visible. A mount point (a Docker volume)
cannot be exchanged, and beside a directory in a read-only folder nothing can be written. There, the new files are
written into a folder inside, and files change places one by one: first every old one goes out, `config.json` before
all others, then every new one comes in, `config.json` last. So a reader finds the old checkpoint, none, or the new
one, and never a mixture.

    TARGET/.nogemm-saving-PID/new     what is written
    TARGET/.nogemm-saving-PID/old     what has gone out
    TARGET/.nogemm-saving-PID/ready   names of the new files, once all are on disk: from here on, forward only
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from nogemm.files import parse_json

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_FIRST_OUT = "config.json"
STAGES = ".nogemm-saving-"
LOCK = ".nogemm-lock"
# Of the file system, at the top of a volume; nobody's data.
_FOREIGN = frozenset({"lost+found"})
# What a rename says where the target is a mount point, or lies on another one than its sibling.
FIXED = frozenset({errno.EBUSY, errno.EXDEV})
# What making a file says in a folder that takes none.
CLOSED = frozenset({errno.EACCES, errno.EPERM, errno.EROFS})


class HalfWayError(Exception):
    """Files are neither all in their new places nor back in their old ones."""


def exchange(fresh: Path, target: Path) -> None:
    """Make `target` the new directory; what was there, if anything, is at `fresh` afterwards.

    Raises:
        OSError: with a number of `FIXED`, if `target` cannot be renamed; nothing has changed then.
    """
    if not target.exists():
        fresh.rename(target)
    elif not rename_exchange(fresh, target):
        # No exchange on this file system: for an instant the path is absent, and the next save repairs a kill there.
        former = former_of(target)
        target.rename(former)
        fresh.rename(target)
        shutil.rmtree(former, ignore_errors=True)
    sync(target.parent)


def former_of(target: Path) -> Path:
    """Return where the old directory is for an instant, on a file system without an exchange."""
    return target.with_name(f".{target.name}.former")


def rename_exchange(a: Path, b: Path) -> bool:
    """Swap two paths atomically (Linux renameat2); return False where the system or file system cannot."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    done = renameat2(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), _RENAME_EXCHANGE)
    if done == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.EPERM, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code), str(b))


def stage_inside(target: Path) -> Path:
    """Make the folder inside `target` that new files are written to, and return it."""
    fresh = target / f"{STAGES}{os.getpid()}" / "new"
    fresh.mkdir(parents=True)
    return fresh


def change_inside(fresh: Path, target: Path, goes: Callable[[Path], bool]) -> None:
    """Let the files of `fresh`, made by `stage_inside`, take the places of those of `target`, one by one.

    Args:
        goes: says of an old entry without a new one of its name whether it goes out, too.
    Raises:
        OSError: a rename failed; the old files are back in their places.
        HalfWayError: they are not; the message says where all files are.
    """
    stage = fresh.parent
    old = stage / "old"
    old.mkdir()
    names = sorted(entry.name for entry in fresh.iterdir())
    leaving = [entry.name for entry in _entries(target) if entry.name in names or goes(entry)]
    (stage / "ready.part").write_text(json.dumps({"new": names, "old": leaving}), encoding="utf-8")
    sync(stage / "ready.part")
    (stage / "ready.part").rename(stage / "ready")
    sync(stage)
    moved: list[tuple[Path, Path]] = []
    try:
        for source, place in _moves(fresh, target, old, names, leaving):
            source.rename(place)
            moved.append((source, place))
        sync(target)
    except BaseException as error:
        try:
            for source, place in reversed(moved):
                place.rename(source)
        except OSError as second:
            raise HalfWayError(
                f"{error}, and then {second}. New files that are not in their places are in {fresh}, old ones "
                f"in {old}; the next save puts the new ones there"
            ) from error
        raise


def finish_inside(target: Path) -> None:
    """Bring to an end what a killed save left inside `target`: forward where its new files were complete, else away."""
    for stage in sorted(target.glob(f"{STAGES}*")):
        ready = stage / "ready"
        if ready.exists():
            plan = parse_json(ready.read_text(encoding="utf-8"))
            waiting = {name for name in plan["new"] if (stage / "new" / name).exists()}
            # An old entry is one that is to go and has not been followed by a new one of its name.
            stale = waiting | (set(plan["old"]) - set(plan["new"]))
            leaving = [name for name in plan["old"] if name in stale and (target / name).exists()]
            for source, place in _moves(stage / "new", target, stage / "old", sorted(waiting), leaving):
                source.rename(place)
            sync(target)
        discard(stage)


def discard(stage: Path) -> None:
    """Remove a folder made by `stage_inside`; first the mark that would let a later save go on from what is left."""
    (stage / "ready").unlink(missing_ok=True)
    shutil.rmtree(stage, ignore_errors=True)


def _moves(fresh: Path, target: Path, old: Path, names: list[str], leaving: list[str]) -> list[tuple[Path, Path]]:
    """List the renames in their order: a checkpoint without its config is none."""
    out = sorted(leaving, key=lambda name: name != _FIRST_OUT)
    into = sorted(names, key=lambda name: name == _FIRST_OUT)
    return [(target / name, old / name) for name in out] + [(fresh / name, target / name) for name in into]


def _entries(target: Path) -> list[Path]:
    ours = (STAGES, LOCK)
    return [entry for entry in target.iterdir() if not entry.name.startswith(ours) and entry.name not in _FOREIGN]


def flush(folder: Path) -> None:
    """Write files and folder entries to disk: a rename must not reach it before the content does."""
    for root, _, files in os.walk(folder):
        for name in (*files, "."):
            path = os.path.join(root, name)
            if not os.path.islink(path):
                sync(path)


def sync(path: str | Path) -> None:
    """Write one file, or the entries of one folder, to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
