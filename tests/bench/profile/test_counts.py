"""What counts become: rates and bytes per level; all worked by hand."""

from __future__ import annotations

import pytest

from nogemm.bench.profile.counts import Counts, from_dict, from_events, rates
from sample_results import ONE


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
