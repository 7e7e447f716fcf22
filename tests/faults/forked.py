"""Children by fork instead of fresh interpreters: a round of the kill harness then costs what its work costs."""

from __future__ import annotations

import inspect
import os
import runpy
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any


def end_with(work: Callable[[], object]) -> None:
    """Do the work in this process, a child, and end it with the code that a command would end with."""
    code = 1
    try:
        work()
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def start(work: Callable[[], object], log: Path) -> int:
    """Begin the work in a child, a session of its own that writes to `log`; return its number."""
    child = os.fork()
    if child:
        return child
    os.setsid()
    with open(log, "ab") as file:
        for number in (1, 2):
            os.dup2(file.fileno(), number)
    end_with(work)
    raise AssertionError("unreachable")


_GIVEN = inspect.signature(subprocess.Popen._execute_child)  # type: ignore[attr-defined]


class ForkedPopen(subprocess.Popen):
    """`Popen` for `python -m MODULE WORDS`, and for nothing else: the child is a fork of this process."""

    def _execute_child(self, *given: Any) -> None:  # type: ignore[override]
        named = _GIVEN.bind(self, *given).arguments
        words = [str(word) for word in named["args"]]
        assert words[:2] == [sys.executable, "-m"], words
        ours = [named[name] for name in ("p2cwrite", "c2pread", "errread")]
        theirs = [named[name] for name in ("p2cread", "c2pwrite", "errwrite")]
        self.pid = os.fork()
        if self.pid:
            self._child_created = True
            close = self._close_pipe_fds  # type: ignore[attr-defined]
            close(*(named[name] for name in ("p2cread", "p2cwrite", "c2pread", "c2pwrite")),
                                 named["errread"], named["errwrite"])  # fmt: skip
            return
        for fd in ours:
            if fd != -1:
                os.close(fd)
        for place, fd in enumerate(theirs):
            if fd != -1:
                os.dup2(fd, place)
        if named["env"] is not None:
            os.environ.update(named["env"])
        if named["process_group"] == 0:
            os.setpgid(0, 0)
        sys.stdin, sys.argv = os.fdopen(0, closefd=False), words[2:]
        sys.stdout, sys.stderr = (os.fdopen(n, "w", closefd=False) for n in (1, 2))
        end_with(lambda: runpy.run_module(words[2], run_name="__main__", alter_sys=False))
