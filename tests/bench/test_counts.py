"""What counts become: rates, bytes per level, energy; all worked by hand."""

from __future__ import annotations

import pytest

from nogemm.bench.papers.energy import CONSTANTS, energy, energy_rows
from nogemm.bench.profile.counts import Counts, from_dict, from_events, rates

ONE = Counts(
    instructions=5000.0,
    multiply_adds=1000.0,
    accesses=400.0,
    access_bytes=12800.0,
    l1_misses=100.0,
    l2_misses=40.0,
    llc_misses=10.0,
    tlb_misses=8.0,
    page_walks=1.0,
)


def test_each_level_hands_inwards_what_the_one_before_misses() -> None:
    assert ONE.served() == {"L1": 12800.0, "L2": 6400.0, "L3": 2560.0, "memory": 640.0}
    assert Counts(l1_misses=1.0).served() is None


def test_rates_by_hand() -> None:
    # 2000 FLOP in 0.5 us are 4 GFLOP/s; 12800 bytes in 0.5 us are 25.6 GB/s.
    found = rates(ONE, 0.5, 16.0)
    assert found == {
        "fma_utilisation": pytest.approx(0.25),
        "l1_gb_per_s": pytest.approx(25.6),
        "l2_gb_per_s": pytest.approx(12.8),
        "llc_gb_per_s": pytest.approx(5.12),
        "dram_gb_per_s": pytest.approx(1.28),
        "l1_miss_rate": 0.25,
        "llc_miss_rate": 0.25,
        "tlb_miss_rate": 0.02,
    }
    assert rates(ONE, 1.0, 16.0) != found


def test_what_is_not_known_is_none() -> None:
    assert set(rates(None, 1.0, 16.0).values()) == {None}
    assert rates(ONE, 0.0, 16.0)["l1_gb_per_s"] is None
    assert rates(ONE, 1.0, None)["fma_utilisation"] is None
    hardware = from_events(
        {
            "instructions": 10.0,
            "l1_loads": 8.0,
            "l1_misses": 4.0,
            "llc_loads": 2.0,
            "llc_misses": 1.0,
            "tlb_misses": 2.0,
        },
        2.0,
    )
    assert (hardware.accesses, hardware.l1_misses, hardware.access_bytes) == (4.0, 2.0, None)
    found = rates(hardware, 1.0, 16.0)
    assert (found["l1_gb_per_s"], found["fma_utilisation"]) == (None, None)
    assert found["l2_gb_per_s"] == pytest.approx(2.0 * 64 * 1e-3)
    assert found["llc_miss_rate"] == 0.5


def test_differences_stop_at_zero_and_keep_the_unknown() -> None:
    assert (ONE - Counts(accesses=100.0)).accesses == 300.0
    assert (ONE - Counts(accesses=100.0)).l1_misses is None
    assert (Counts(accesses=1.0) - ONE).accesses == 0.0
    assert ONE.scaled(2.0).accesses == 800.0
    assert from_dict(ONE.to_dict()) == ONE


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
