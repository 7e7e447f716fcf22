"""Freed memory stays in the process while it trains, and only then. Each case has a process of its own: the settings
are the C library's, and other threads' blocks would blur the count."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

_PROGRAM = """
import contextlib, json, resource, sys
import torch
from nogemm.train import keep_freed_memory

def faults_of_touching():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.empty(48 << 20, dtype=torch.uint8).fill_(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

torch.set_num_threads(1)
context = keep_freed_memory() if sys.argv[1] == "keep" else contextlib.nullcontext()
with context as taken:
    # small blocks settle between the first few large ones, which then no longer fit where they were
    settled = [faults_of_touching() for _ in range(25)][16:]
print(json.dumps({"taken": taken, "inside": sorted(settled)[4], "after": faults_of_touching()}))
"""


def run(mode: str) -> dict[str, int]:
    done = subprocess.run([sys.executable, "-c", _PROGRAM, mode], capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="mallopt is glibc's")
def test_repeated_allocations_cost_no_page_faults() -> None:
    facts = run("keep")
    if facts["taken"]:  # another C library changes nothing, and says so
        assert facts["inside"] < 10, facts
        assert facts["after"] > 20, "the memory was not given back"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="mallopt is glibc's")
def test_without_it_every_allocation_faults() -> None:
    facts = run("plain")
    assert min(facts["inside"], facts["after"]) > 20, facts
