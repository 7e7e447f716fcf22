"""What the machine says about itself, and the arithmetic of the roofline."""

from __future__ import annotations

import getpass
import json
import platform
from pathlib import Path

import pytest

from nogemm.hardware import machine, machine_line
from nogemm.hardware import roofline as roofline_module
from nogemm.hardware.cpu import _count, caches, size
from nogemm.hardware.roofline import Roofline, level_sizes, measure_roofline, measure_rooflines
from nogemm.ops import isa, native_available, supported_isas


def test_machine_names_no_host_and_no_path() -> None:
    text = json.dumps(machine()) + machine_line()
    for secret in (platform.node(), str(Path.home()), str(Path.cwd())):
        assert secret not in text
    assert f"/{getpass.getuser()}" not in text


def test_machine_knows_what_ran() -> None:
    facts = machine()
    assert facts["usable_cores"] >= 1
    assert facts["versions"]["python"] == platform.python_version()
    assert facts["versions"]["torch"] is not None
    assert machine_line().startswith(facts["cpu"])


def test_sizes_and_core_lists_are_read_right() -> None:
    assert [size(n) for n in (17, 49152, 3 << 20, 5 << 30)] == ["17 B", "48 KiB", "3 MiB", "5 GiB"]
    assert [_count(text) for text in ("0", "0-3", "0-1,8", "0,2,4-6")] == [1, 4, 3, 5]


def test_caches_grow_outwards() -> None:
    sizes = [cache["bytes"] for cache in caches() if cache["level"] != "L1i"]
    assert sizes == sorted(sizes)


def test_bound_is_the_slowest_part() -> None:
    roofline = Roofline(threads=1, gflops={"fp32": 100.0, "int8": 400.0}, gb_per_s={"L2": 50.0, "memory": 10.0})
    # 1e6 FLOP at 100 GFLOP/s: 10 us; 1e6 bytes at 50 GB/s: 20 us; 1e5 bytes at 10 GB/s: 10 us.
    assert roofline.bound({"fp32": 1e6}, {"L2": 1e6, "memory": 1e5}) == (pytest.approx(20.0), "L2")
    assert roofline.bound({"int8": 1e7}, {"L2": 1e6}) == (pytest.approx(25.0), "int8 compute")
    assert roofline.bound({"bf16": 1e7}, {}) == (pytest.approx(100.0), "bf16 compute")


def test_a_caches_geometry_multiplies_to_its_size() -> None:
    for cache in caches():
        if cache["ways"] and cache["line"]:
            assert cache["bytes"] % (cache["ways"] * cache["line"]) == 0


def test_every_instruction_set_has_a_roofline_and_the_one_in_force_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roofline_module, "_SECONDS", 1e-4)
    monkeypatch.setattr(roofline_module, "level_sizes", lambda threads: {"L1": 16 << 10, "memory": 1 << 20})
    before = isa()
    found = measure_rooflines(1)
    assert isa() == before
    assert tuple(found) == supported_isas()
    for measured in found.values():
        assert measured.gflops["fp32"] > 0
        assert measured.gb_per_s["L1"] > 0


def test_measured_roofline_is_ordered() -> None:
    roofline = measure_roofline(1)
    if not native_available():
        assert roofline is None
        return
    assert roofline is not None
    assert roofline.gflops["fp32"] > 0
    assert set(roofline.gb_per_s) == set(level_sizes(1))
    assert roofline.gb_per_s["L1"] > roofline.gb_per_s["memory"]
