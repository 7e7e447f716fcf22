"""What a fuzz target is, and the property of all: a right answer or an error of ours, in bounded time and memory.

A target takes bytes. Most make a file of them and read it as a command would. `Choices` turns bytes into choices, for
inputs that are edits of a good file; what a fuzzer then varies is which edits are made.
"""

from __future__ import annotations

import contextlib
import json
import resource
import signal
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nogemm.errors import NogemmError

CORPUS = Path(__file__).with_name("corpus")
CPU_SECONDS = 60
SLACK = 96 << 20
"""Bytes that a reader may take whatever the size of its file: buffers, Python objects, modules loaded on first use."""


class Violation(BaseException):
    """The property does not hold. Not an Exception, so that no reader's own `except` swallows it."""


@dataclass(frozen=True)
class Target:
    """One thing that is fuzzed.

    Attributes:
        name: on the command line, and of the folder with kept inputs.
        run: takes one input; raises Violation (or anything else) where the property does not hold.
        seeds: good inputs to start from.
        words: what inputs are made of, for the fuzzer's dictionary.
        longest: input in bytes.
    """

    name: str
    run: Callable[[bytes], None]
    seeds: Callable[[], Sequence[bytes]]
    words: Sequence[str] = field(default=())
    longest: int = 4096


def kept_inputs(name: str) -> list[Path]:
    """Return the files of a target's corpus: former findings, and inputs that reach far."""
    return sorted(path for path in (CORPUS / name).glob("*") if path.is_file())


def answer_or_error(call: Callable[[], Any], *also: type[Exception]) -> Any:
    """Return what `call` gives; None where it raises an error of ours (or one of `also`) that says something.

    Raises:
        Violation: any other exception, or an error without words.
    """
    try:
        return call()
    except (NogemmError, *also) as error:
        if len(str(error)) < 8:
            raise Violation(f"an error without words: {error!r}") from error
        return None
    except Exception as error:
        raise Violation(f"{type(error).__name__} came through: {error}") from error


def expect(ok: bool, what: str) -> None:
    """Raise Violation unless `ok`."""
    if not ok:
        raise Violation(what)


@contextlib.contextmanager
def bounded(size: int) -> Iterator[None]:
    """Hold what runs inside to CPU_SECONDS of processor time, and to twice `size` bytes of memory beside SLACK.

    Processor time, not the clock: a machine may be busy. Memory is the peak of the process, which Linux starts anew.
    """

    def stop(*_: Any) -> None:
        raise Violation(f"more than {CPU_SECONDS} seconds of processor time")

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
    start = _restart_peak()
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
    grown = _status("VmHWM") - start
    expect(grown <= 2 * size + SLACK, f"{grown:,} bytes of memory for an input of {size:,}")


def limit_address_space(more: int = 6 << 30) -> None:
    """Let this process ask for so many bytes more than it has, and no more: reserved without use counts."""
    most = _status("VmSize") + more
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


def _restart_peak() -> int:
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {name}")


@contextlib.contextmanager
def folder() -> Iterator[Path]:
    """Give a folder that is gone afterwards, in memory where there is a file system for it."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(prefix="nogemm-fuzz-", dir=memory if memory.is_dir() else None) as path:
        yield Path(path)


class Choices:
    """Reads choices off bytes; behind their end every choice is the first."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    @property
    def left(self) -> int:
        """Bytes that were not read yet."""
        return max(0, len(self._data) - self._at)

    def take(self, count: int) -> bytes:
        """Return the next bytes, as many as there are."""
        self._at += count
        return self._data[self._at - count : self._at]

    def below(self, end: int) -> int:
        """Return a number from 0 to end - 1."""
        width = (max(end - 1, 1).bit_length() + 7) // 8
        return int.from_bytes(self.take(width), "little") % max(end, 1)

    def of(self, options: Sequence[Any]) -> Any:
        """Return one of the options."""
        return options[self.below(len(options))]

    def rest(self) -> bytes:
        """Return all that is left."""
        return self.take(self.left)


HOSTILE: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2, 3, 7, 2**31 - 1, 2**31, 2**53, 2**63 - 1, 2**64, -(2**63), 10**30, 0.5, -0.0,
    1e-320, 1e308, float("nan"), float("inf"), float("-inf"), "", "x", "no", "0", "nan", "\x00", "../../etc/passwd",
    "<script>alert(1)</script>", "\ud800", "a" * 300, [], [0], [None], [[]], {}, {"kind": "lookup"}, {"": {}}, [1] * 40,
)  # fmt: skip
"""Values to put in the place of any value of a JSON file."""


def edit_json(value: Any, choices: Choices) -> Any:
    """Return a JSON value with one part of it replaced, removed, or put under another name."""
    value = json.loads(json.dumps(value))
    places: list[tuple[Any, Any]] = []

    def walk(node: Any) -> None:
        for key in node if isinstance(node, dict) else range(len(node)):
            places.append((node, key))
            if isinstance(node[key], (dict, list)):
                walk(node[key])

    walk([value] if not isinstance(value, (dict, list)) else value)
    if not places:
        return choices.of(HOSTILE)
    node, key = choices.of(places)
    what = choices.below(8)
    if what == 0:
        del node[key]
    elif what == 1 and isinstance(node, dict):
        node[str(choices.of([name for _, name in places]))] = node.pop(key)
    elif what == 2:
        other, name = choices.of(places)
        node[key] = json.loads(json.dumps(other[name])) if name in other or isinstance(other, list) else None
    elif what == 3 and isinstance(node, list):
        node.insert(key, choices.of(HOSTILE))
    else:
        node[key] = choices.of(HOSTILE)
    return value
