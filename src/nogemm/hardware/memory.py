"""Say how much memory this process has held at most."""

from __future__ import annotations

import re
import resource
import sys
from pathlib import Path


def peak_memory_bytes() -> int:
    """Return the largest memory this process has held.

    Linux's getrusage also counts what the parent held before it started this process, so the process's own page is read
    there.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text())
        if found is not None:
            return int(found.group(1)) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
