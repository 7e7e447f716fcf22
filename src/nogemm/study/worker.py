"""The process of one run: `python -m nogemm.study JOB.json`, started and watched by `nogemm.study.process`.

It writes what the run came to into `outcome.json` beside the job. It ends with code 0 where it wrote that, with
`STOPPED` where it was asked to stop and saved its state, and with `NO_ROOM` where the disk is full. When its parent is
gone, it stops by itself: the pipe that is its standard input then ends.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

from torch import nn

from nogemm.convert.save import save
from nogemm.files import disk_is_full, write_json
from nogemm.study.kinds import KINDS, Job

STOPPED, NO_ROOM = 130, 28
OUTCOME = "outcome.json"


def main(path: str) -> int:
    """Run the job in a file; return the exit code."""
    job = Job(**json.loads(Path(path).read_text(encoding="utf-8")))
    threading.Thread(target=_watch_parent, name="nogemm study", daemon=True).start()
    logging.basicConfig(format="%(message)s", level=logging.WARNING, stream=sys.stdout)
    logging.getLogger("nogemm.train").setLevel(logging.INFO)
    try:
        outcome = {"status": "done", **KINDS[job.kind].run(job, _saver(job))}
        outcome = finite(outcome)
    except KeyboardInterrupt:
        return STOPPED
    except Exception as error:
        if disk_is_full(error):
            print(error, flush=True)
            return NO_ROOM
        logging.getLogger("nogemm.study").warning("failed", exc_info=True)
        outcome = {"status": "failed", "error": f"{type(error).__name__}: {' '.join(str(error).split())}"}
    try:
        write_json(Path(path).with_name(OUTCOME), outcome)
    except OSError as error:
        print(error, flush=True)
        return NO_ROOM if disk_is_full(error) else 1
    return 0


def _saver(job: Job) -> Any:
    def keep(model: nn.Module, tokenizer: Any) -> None:
        if job.save is not None and not Path(job.save).exists():
            save(model, job.save, tokenizer=tokenizer)

    return keep


def finite(value: Any) -> Any:
    """Return JSON values with None for numbers that JSON does not know: a perplexity may be infinite."""
    if isinstance(value, dict):
        return {name: finite(entry) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(entry) for entry in value]
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return None
    return value


def _watch_parent() -> None:
    while os.read(0, 1024):
        pass
    os.kill(os.getpid(), signal.SIGTERM)  # training saves its state then
