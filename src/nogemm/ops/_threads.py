"""Work that leaves no thread behind, for what may run before a process forks."""

from __future__ import annotations

import contextvars
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

_PATIENCE = 0.5  # seconds
ResultT = TypeVar("ResultT")


def in_passing(work: Callable[[], ResultT]) -> ResultT:
    """Do the work in a thread of its own, in the caller's context, and return what it returns or raise what it raises.

    torch computes in parallel by workers that belong to the thread that first asked for them, and keeps them. A process
    that forks afterwards, as gunicorn with --preload and DataLoader do, gives the child a thread that waits for workers
    which no longer exist: its first parallel computation never ends. The workers of a passing thread end with it.
    """
    gradients, inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    before, passing = _threads(), set[str]()

    def alike() -> ResultT:
        try:
            with torch.inference_mode(inference), torch.set_grad_enabled(gradients):
                return work()
        finally:
            passing.update(_threads() - before)

    with ThreadPoolExecutor(1, thread_name_prefix="nogemm") as pool:
        result = pool.submit(contextvars.copy_context().run, alike)
    # Python calls a thread ended a little before it is, and workers go after it. MKL takes a thread out of its lists of
    # memory as it goes: a fork amid that gives the child broken lists, in which it turns for ever. (A caller's library
    # may have started a thread of its own meanwhile, so there is an end to waiting.)
    patience = time.monotonic() + _PATIENCE
    while _left(passing) and time.monotonic() < patience:
        time.sleep(1e-4)
    return result.result()


def _left(passing: set[str]) -> set[str]:
    """Return which of these threads are still there, Python's own others apart."""
    return passing & _threads() - {str(thread.native_id) for thread in threading.enumerate()}


def _threads() -> set[str]:
    """Return the numbers of this process's threads; none where the system does not say."""
    try:
        return set(os.listdir("/proc/self/task"))
    except OSError:
        return set()
