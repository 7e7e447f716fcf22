"""Hardware counters: what is asked of the kernel, and what is said where it does not answer."""

from __future__ import annotations

import os
import struct

import pytest

from nogemm.errors import NativeError
from nogemm.hardware import counters
from nogemm.hardware.counters import Counters, attribute, why_no_counters


def test_the_attribute_is_laid_out_as_the_kernel_reads_it() -> None:
    data = attribute("llc_misses")
    kind, size, config, period, sample, read_format, flags = struct.unpack("<IIQQQQQ", data[:48])
    # A cache event is cache | operation << 8 | result << 16: last level 2, read 0, miss 1.
    assert (kind, size, config, period, sample, read_format) == (3, 112, 2 | 1 << 16, 0, 0, 3)
    assert flags == 0b1100011
    assert len(data) == 112
    assert not any(data[48:])


def test_a_system_that_does_not_count_says_why() -> None:
    reason = why_no_counters()
    if reason is None:
        found = Counters(("instructions",))
        found.start()
        assert found.stop()["instructions"] > 0
        found.close()
    else:
        assert reason.startswith(("perf event ", "no perf events"))


def test_software_events_are_counted_where_they_are_allowed() -> None:
    reason = why_no_counters(("page_faults",))
    if reason is not None:
        assert "not allowed" in reason or "no perf" in reason
        return
    found = Counters(("page_faults",))
    found.start()
    quiet = found.stop()["page_faults"]
    found.start()
    memory = bytearray(64 << 20)
    memory[:: os.sysconf("SC_PAGE_SIZE")] = b"\1" * len(range(0, len(memory), os.sysconf("SC_PAGE_SIZE")))
    busy = found.stop()["page_faults"]
    found.close()
    assert quiet < busy
    assert busy > 0


def test_other_systems_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(counters.platform, "machine", lambda: "sparc")
    with pytest.raises(NativeError, match="no perf events on"):
        Counters(("cycles",))


def test_counts_are_scaled_to_the_whole_time() -> None:
    assert counters._scaled(struct.pack("<QQQ", 100, 50, 25)) == 200.0
    assert counters._scaled(struct.pack("<QQQ", 100, 50, 50)) == 100.0
    assert counters._scaled(struct.pack("<QQQ", 7, 0, 0)) == 7.0
