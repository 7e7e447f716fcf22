"""The parent's side of a run's process; the process's own side is `nogemm.study.worker`."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from nogemm.files import write_json
from nogemm.hardware.waiting import VARIABLES
from nogemm.study.errors import StudyError
from nogemm.study.kinds import Job
from nogemm.study.worker import NO_ROOM, OUTCOME, STOPPED
from nogemm.train import checkpoint as ckpt
from nogemm.train.errors import TrainingError

GRACE = 120.0  # seconds that a run gets to save its state
_PATIENCE = 60.0  # seconds that a run whose parent was killed gets to end
_TICK = 0.2
LOG = "output.txt"


class Stopped(Exception):
    """A run was stopped before its end, its state saved."""


def run_process(
    job: Job, threads: int | None, line: Callable[[str], None], expired: Callable[[], bool]
) -> dict[str, Any]:
    """Run a job in a process of its own, and return its outcome: "figures" and "report", or "error".

    Args:
        threads: of the process; None: as many as there are cores.
        line: gets what the run says last, whenever it says something.
        expired: asked several times a second; true stops the run.
    Raises:
        Stopped: `expired` said so. KeyboardInterrupt: Ctrl-C or SIGTERM; the run was stopped, its state saved.
        StudyError: the disk is full, or another process is at the same run.
    """
    place = job.place()
    place.mkdir(parents=True, exist_ok=True)
    _wait_for(place)
    outcome = place / OUTCOME
    outcome.unlink(missing_ok=True)
    write_json(place / "job.json", asdict(job))
    with open(place / LOG, "ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "nogemm.study", str(place / "job.json")],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            env=environment(threads),
            start_new_session=True,  # Ctrl-C reaches this process alone, which passes it on once
        )
        try:
            _watch(process, place / LOG, line, expired)
        except BaseException:
            _stop(process)
            raise
    if process.stdin is not None:
        process.stdin.close()
    code = process.returncode
    if code == NO_ROOM:
        raise StudyError(f"no room left on the disk of {place}: make room, and call the study again to go on")
    if code == STOPPED:
        raise KeyboardInterrupt("the run was stopped by a signal of its own")
    if outcome.is_file():
        return json.loads(outcome.read_text(encoding="utf-8"))
    return {"status": "failed", "error": _reason(code, place / LOG)}


def clear(place: Path) -> None:
    """Remove what a run that has its result no longer needs: checkpoints and links to tokens. Logs and models stay."""
    for path in place.glob("step-*"):
        shutil.rmtree(path, ignore_errors=True)
    for name in ("tokens", "validation"):
        path = place / name
        if path.is_symlink():
            path.unlink()
        else:
            shutil.rmtree(path, ignore_errors=True)
    for name in ("latest.json", OUTCOME, "job.json", "lock"):
        (place / name).unlink(missing_ok=True)


def environment(threads: int | None) -> dict[str, str]:
    """Return the variables that a run starts with: threads that sleep while they wait, no network."""
    found = dict(os.environ)
    if not any(name in found for name in VARIABLES):
        found |= VARIABLES
    if threads is not None:
        found |= {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    found.setdefault("TOKENIZERS_PARALLELISM", "false")
    return found


def _wait_for(place: Path) -> None:
    """Wait until nobody writes to a run's folder: the process of a study that was killed saves its state and ends."""
    end = time.monotonic() + _PATIENCE
    while True:
        try:
            with ckpt.Lock(place):
                return
        except TrainingError as error:
            if time.monotonic() > end:
                raise StudyError(str(error)) from error
        time.sleep(_TICK)


def _watch(
    process: subprocess.Popen[bytes], log: Path, line: Callable[[str], None], expired: Callable[[], bool]
) -> None:
    last = ""
    while process.poll() is None:
        time.sleep(_TICK)
        said = last_line(log)
        if said and said != last:
            last = said
            line(said)
        if expired():
            raise Stopped


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Ask a process to save its state and end; one that does not, or a second signal meanwhile, ends it at once."""
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(timeout=GRACE)
    except subprocess.TimeoutExpired:
        pass  # it goes on from the checkpoint before
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        if process.stdin is not None:
            process.stdin.close()


def last_line(log: Path) -> str:
    """Return the last whole line of a log."""
    try:
        with open(log, "rb") as file:
            file.seek(0, 2)
            file.seek(max(0, file.tell() - 4096))
            text = file.read().decode(errors="replace")
    except OSError:
        return ""
    lines = text[: text.rfind("\n") + 1].splitlines()
    return lines[-1].strip() if lines else ""


def _reason(code: int, log: Path) -> str:
    """Say why a process ended without an outcome."""
    if code == -signal.SIGKILL:
        return "the process was killed (SIGKILL), as the system does when memory runs out"
    if code < 0:
        return f"the process was ended by {signal.Signals(-code).name}; its last line: {last_line(log) or 'none'}"
    return f"the process ended with code {code}; its last line: {last_line(log) or 'none'}"
