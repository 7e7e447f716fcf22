"""Packed layers under what a service does to them: threads that come and go, forks, borrowed memory, no memory."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import nogemm
from nogemm import ops
from nogemm.layers import PACK_DTYPES
from nogemm.testing.cases import KINDS

D, TOKENS = 64, 300
NATIVE = ("hire", "lookup", "tree", "yoso")  # whose bits do not depend on threads
natives = pytest.mark.skipif(not ops.native_available(), reason="the native extension is not there")
layers = pytest.mark.parametrize(("kind", "dtype"), [(kind, dtype) for kind in NATIVE for dtype in PACK_DTYPES])


def packed(kind: str, dtype: str) -> Any:
    """Build a layer with weights that answer something, and pack it."""
    layer = KINDS[kind].build(D, D, hidden=96).eval().requires_grad_(False)
    for parameter in layer.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    return layer.pack(dtype, "rows")


@natives
@layers
def test_threads_that_are_changed_between_and_during_calls_change_no_bit(kind: str, dtype: str) -> None:
    layer, x_ND = packed(kind, dtype), torch.randn(TOKENS, D)
    expected = layer(x_ND)
    stop = threading.Event()

    def change() -> None:
        count = 0
        while not stop.is_set():
            count += 1
            torch.set_num_threads(1 + count % 4)

    changer = threading.Thread(target=change)
    changer.start()
    try:
        for count in range(60):
            torch.set_num_threads(1 + count % 3)
            assert layer(x_ND).equal(expected)
    finally:
        stop.set()
        changer.join()
    assert not layer(-x_ND).equal(expected)  # negative control


@natives
@layers
def test_calls_from_a_pool_of_threads_do_not_meet(kind: str, dtype: str) -> None:
    layer = packed(kind, dtype)
    torch.set_num_threads(2)
    inputs = [torch.randn(n, D) for n in (1, 7, 33, TOKENS)]
    expected = [layer(x) for x in inputs]

    def call(n: int) -> bool:
        return layer(inputs[n % 4]).equal(expected[n % 4])

    with ThreadPoolExecutor(5) as pool:
        assert all(pool.map(call, range(120)))


@natives
@layers
def test_memory_that_is_borrowed_read_only_and_misaligned(kind: str, dtype: str, tmp_path: Path) -> None:
    """A mapped file, one number and one byte behind where a number would lie."""
    layer, values = packed(kind, dtype), np.random.default_rng(0).standard_normal((33, D)).astype(np.float32)
    expected = layer(torch.from_numpy(values))
    for offset in (4, 1):
        (tmp_path / "x").write_bytes(bytes(offset) + values.tobytes())
        mapped = np.memmap(tmp_path / "x", np.float32, "r", offset, values.shape)
        assert not mapped.flags.writeable
        x_ND = _borrowed(mapped)
        assert x_ND.data_ptr() % 4 == offset % 4
        assert layer(x_ND).equal(expected)
        assert np.array_equal(mapped, values)


def _borrowed(mapped: np.ndarray) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.from_numpy(mapped)


CODE = """
import os, resource, sys, threading, time, warnings
warnings.simplefilter("ignore")
sys.path[:0] = sys.argv[1:]
import torch
from test_native_stress import D, NATIVE, packed

assert torch.get_num_threads() == 2
torch.set_num_threads(1)  # what is built on two threads starts workers, which a fork loses
LAYERS = [packed(kind, "fp32") for kind in NATIVE]
X = torch.randn(300, D)

def child(work, seconds=60):
    number = os.fork()
    if number == 0:
        try:
            os._exit(0 if work() else 3)
        except BaseException as error:
            print(type(error).__name__, error, flush=True)
            os._exit(4)
    for _ in range(100 * seconds):  # looks, not seconds: a machine that stands still is no child that hangs
        done, status = os.waitpid(number, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(number, 9)
    os.waitpid(number, 0)
    return "hangs"

def call():
    return [layer(X) for layer in LAYERS]

def on_two():
    torch.set_num_threads(2)
    return call()

def same(expected):
    torch.set_num_threads(1)
    return all(a.equal(b) for a, b in zip(call(), expected))

def forks():
    expected = on_two()
    return child(lambda: same(expected))

def loader():
    expected = on_two()
    class Set(torch.utils.data.Dataset):
        def __len__(self): return 4
        def __getitem__(self, n): return LAYERS[n](X)
    found = list(torch.utils.data.DataLoader(Set(), batch_size=None, num_workers=2, multiprocessing_context="fork"))
    return 0 if all(a.equal(b) for a, b in zip(found, expected)) else 3

def amid():
    expected, stop = on_two(), threading.Event()
    def turn():
        while not stop.is_set():
            call()
    turner = threading.Thread(target=turn)
    turner.start()
    found = [child(lambda: same(expected)) for _ in range(10)]
    stop.set()
    turner.join()
    return max(found, key=str)

def memory():
    expected, large = on_two(), torch.randn(400_000, D)
    used = int(open("/proc/self/statm").read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    torch.set_num_threads(1)
    for more in (0, 20, 60, 100):
        resource.setrlimit(resource.RLIMIT_AS, (used + (more << 20), resource.RLIM_INFINITY))
        said = 0
        for layer in LAYERS:
            try:
                layer(large)
            except (RuntimeError, MemoryError) as error:
                if "memory" not in str(error):
                    print(type(layer).__name__, error, flush=True)
                    return False
                said += 1
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        if more == 0 and said != len(LAYERS):  # with more, a small layer may fit
            return False
    return same(expected)

def affinity():
    expected = on_two()
    cores = os.sched_getaffinity(0)
    for taken in ({min(cores)}, {max(cores)}, cores):
        os.sched_setaffinity(0, taken)
        if not all(a.equal(b) for a, b in zip(call(), expected)):
            return False
    return True

def interpreters():
    import _xxsubinterpreters as sub
    number = sub.create()
    try:
        sub.run_string(number, "import nogemm\\nimport torch\\nnogemm.LookupConfig().build(64)(torch.randn(2, 64))")
    except BaseException as error:
        print("subinterpreter:", type(error).__name__, " ".join(str(error).split())[:200], flush=True)
    return True

for name, work in (("affinity", lambda: child(affinity)), ("memory", lambda: child(memory)),
                   ("forks", lambda: child(lambda: forks() == 0)), ("loader", lambda: child(lambda: loader() == 0)),
                   ("amid", lambda: child(lambda: amid() == 0, 200)), ("interpreters", lambda: child(interpreters))):
    print("CASE", name, work(), flush=True)
"""


@natives
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_forks_affinity_memory_and_interpreters() -> None:
    """Cases that could end a process, each in a child of one that has loaded and packed.

    A child of a process that computed must not use its parent's threads: it says torch.set_num_threads(1) first, as
    DataLoader's workers do.
    """
    done = subprocess.run(
        [sys.executable, "-c", CODE, str(Path(__file__).parent)],
        env={
            **os.environ, "PYTHONPATH": str(Path(nogemm.__file__).parent.parent), "OMP_NUM_THREADS": "2",
            "OMP_WAIT_POLICY": "passive",
        },
        capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip
    found = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("CASE")]
    names = ("affinity", "memory", "forks", "loader", "amid", "interpreters")
    assert found == [[name, "0"] for name in names], done.stdout + done.stderr
