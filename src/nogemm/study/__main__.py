"""The process of one run, `python -m nogemm.study JOB.json`: see `nogemm.study.worker`."""

from __future__ import annotations

import os
import sys

from nogemm.study.worker import main

if __name__ == "__main__":
    code = main(sys.argv[1])
    sys.stdout.flush()
    os._exit(code)  # libraries' threads have nothing left to say
