"""The parent's side of a worker process; the worker's own is `nogemm.bench.engine.worker`."""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
import tempfile
from typing import Any

from nogemm.hardware.waiting import VARIABLES


class WorkerProcess:
    """Speak with one worker process, a JSON line each way.

    Args:
        first: its first line: "factory", "settings", "threads".
        patience: seconds it may take to answer.
    """

    def __init__(self, first: dict[str, Any], patience: float) -> None:
        self.first, self.patience = first, patience
        self._process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        """Let it begin to build its contender, if it has not yet."""
        if self._process is not None:
            return
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 (lives as long as the worker)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "nogemm.bench.engine.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=os.environ | _environment(self.first["threads"]),
            text=True,
            process_group=0,  # a signal to the whole group must not end it in the middle of an answer: `close` does
        )
        self._send(self.first)

    def ask(self, message: dict[str, Any]) -> dict[str, Any]:
        """Send a message and return the answer; a dead or silent worker answers with its error."""
        self.start()
        assert self._process is not None
        assert self._process.stdout is not None
        if self._process.poll() is None:
            self._send(message)
        ready, _, _ = select.select([self._process.stdout], [], [], self.patience)
        line = self._process.stdout.readline() if ready else ""
        if line:
            return json.loads(line)
        if not ready:
            self._process.kill()
            return {"error": f"no answer within {self.patience:.0f} s"}
        code = self._process.wait()
        return {"error": f"the worker ended with code {code}: {self._last_words()}"}

    def close(self, grace: float = 5.0) -> None:
        """End the worker, if it was started, and wait for it; after `grace` seconds it is killed."""
        if self._process is None or self._log.closed:
            return
        if self._process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()
        try:
            self._process.wait(timeout=grace)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._log.close()

    def _send(self, message: dict[str, Any]) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # the worker has died; the read that follows says so
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()

    def _last_words(self) -> str:
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else "it said nothing"


def _environment(threads: int) -> dict[str, str]:
    """Return the settings every worker starts with: equal threads, and no thread that spins while it waits."""
    return {
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        **VARIABLES,
        "TOKENIZERS_PARALLELISM": "false",
        # Inductor's own pool of compiler processes would outlive the compilation and wake up between rounds.
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
    }
