"""OpenMP threads that soon sleep while they wait, instead of spinning on.

A thread that spins keeps its core. Where another process needs that core, the thread that everybody waits for stands in
the queue while its fellows burn time: training falls to a tenth of its speed. The library reads the choice once, when
it is loaded, which importing torch does; so a process that is already running has to start anew.
"""

from __future__ import annotations

import os
import sys

VARIABLES = {"OMP_WAIT_POLICY": "passive", "KMP_BLOCKTIME": "0"}
"""Of what is measured: threads sleep at once, and the contenders of a comparison never meet."""
BRIEF = {"GOMP_SPINCOUNT": "1000", "KMP_BLOCKTIME": "0"}
"""Of training: a thousand turns bridge the gaps between two operators, and cost little where a core is taken away."""
_CHOSEN = (*VARIABLES, "GOMP_SPINCOUNT")


def advice() -> str:
    """Say what would help threads that spin while they wait; "" where the environment has chosen how they wait."""
    if any(name in os.environ for name in _CHOSEN):
        return ""
    return (
        "OpenMP's threads spin while they wait, which takes the core from the one they wait for: training can be ten "
        "times slower than it need be. Start Python with "
        f"GOMP_SPINCOUNT={BRIEF['GOMP_SPINCOUNT']} in the environment, as the commands do"
    )


def sleep_while_waiting() -> None:
    """Start this process anew with threads that spin briefly, once; not where the environment has chosen already."""
    if any(name in os.environ for name in _CHOSEN):
        return
    os.environ.update(BRIEF)
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
