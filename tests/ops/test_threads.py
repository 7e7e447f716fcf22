"""Work in passing: what it returns and raises, in the caller's modes, and that its threads are gone afterwards."""

from __future__ import annotations

import os
import threading

import pytest
import torch

from nogemm.ops._threads import in_passing


def threads() -> set[str]:
    return set(os.listdir("/proc/self/task"))


def product() -> torch.Tensor:
    x = torch.randn(400, 400)
    return (x @ x).exp()


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="threads are counted on Linux")
def test_no_thread_is_left() -> None:
    torch.set_num_threads(2)  # a pool that this starts in the process is torch's for good, and survives a fork
    before, during = threads(), set[str]()

    def work() -> None:
        product()
        during.update(threads())

    for _ in range(20):
        in_passing(work)
        assert threads() <= before
    assert len(during - before) > 1  # negative control: the thread itself, and a worker of it


def test_a_thread_of_the_caller_is_not_waited_for() -> None:
    stop = threading.Event()
    other = threading.Thread(target=stop.wait)
    in_passing(other.start)  # starts amid the work, and stays
    assert other.is_alive()
    stop.set()
    other.join()


def test_values_errors_and_modes() -> None:
    assert in_passing(lambda: 3) == 3
    with pytest.raises(ValueError, match="as raised"):
        in_passing(lambda: (_ for _ in ()).throw(ValueError("as raised")))
    assert in_passing(torch.is_grad_enabled)
    with torch.no_grad():
        assert not in_passing(torch.is_grad_enabled)
    with torch.inference_mode():
        assert in_passing(product).is_inference()
    assert not in_passing(product).is_inference()
