"""The energy of memory accesses, worked by hand."""

from __future__ import annotations

import pytest

from nogemm.bench.profile.counts import Counts
from nogemm_papers.energy import CONSTANTS, energy, energy_rows
from sample_results import ONE


def test_energy_by_hand() -> None:
    # 64 bits are 8 bytes: 1600 + 800 + 320 accesses of 14 pJ, 80 of 300 to 450 pJ, for 4 tokens.
    found = energy(ONE, 4)
    assert found is not None
    assert found["sram_nj"] == pytest.approx(2720 * 14 / 4 * 1e-3)
    assert found["dram_nj_low"] == pytest.approx(80 * 300 / 4 * 1e-3)
    assert found["dram_nj_high"] == pytest.approx(80 * 450 / 4 * 1e-3)
    assert found["nj_low"] == pytest.approx(found["sram_nj"] + found["dram_nj_low"])
    assert found["by_level"]["memory"] == pytest.approx(80 * 375 / 4 * 1e-3)
    assert (found["l1_hit_rate"], found["l1_byte_rate"], found["sram_rate"]) == (0.75, 0.5, 0.975)
    assert energy(Counts(), 4) is None


def test_constants_are_the_papers() -> None:
    assert {name: (entry.low, entry.high) for name, entry in CONSTANTS.items()} == {
        "SRAM": (14.0, 14.0),
        "DRAM": (300.0, 450.0),
    }
    assert all(entry.source for entry in CONSTANTS.values())


def test_dense_is_compared_at_its_own_batch() -> None:
    counted = {
        ("nogemm-fp32", "kernel", 1): ONE,
        ("dense-numpy-fp32", "kernel", 1): ONE.scaled(3.0),
        ("nogemm-fp32", "kernel", 8): ONE,
    }
    rows = {(row["contender"], row["batch"]): row for row in energy_rows(counted)}
    assert rows["nogemm-fp32", 1]["dense_ratio"] == pytest.approx([3.0, 3.0])
    assert "dense_ratio" not in rows["nogemm-fp32", 8]
    assert "dense_ratio" not in rows["dense-numpy-fp32", 1]
