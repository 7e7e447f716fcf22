"""Reading what the simulators write, on recorded samples; running them is tests/extra's."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from nogemm.bench.profile import count_dense, simulate
from nogemm.bench.profile.counting import MOST_TOKENS, plan
from nogemm.bench.profile.simulate import geometry, parse_cachegrind, parse_lackey
from nogemm.errors import NativeError

# Of valgrind 3.19, shortened: a few functions, then the totals.
CACHEGRIND = """desc: I1 cache:         32768 B, 64 B, 8-way associative
desc: D1 cache:         49152 B, 64 B, 12-way associative
desc: LL cache:         2097152 B, 64 B, 16-way associative
cmd: count_calls 0 0 512 1 1 packed tokens
events: Ir I1mr ILmr Dr D1mr DLmr Dw D1mw DLmw
fl=gather.h
fn=gather_tokens
93 300 0 0 200 50 9 40 2 1
summary: 78754741 1759 1724 56873899 3287155 979436 6575939 239110 50242
"""
LACKEY = """==29332== IR-level counts by type:
==29332==    Type        Loads       Stores       AluOps
==29332==    -------------------------------------------
==29332==    I1              0            0    7,310,239
==29332==    I8        131,787    1,048,892      396,030
==29332==    I32     8,925,545       23,506    3,038,933
==29332==    F32     2,359,296            0  138,936,832
==29332==    F64             0            0          512
==29332==    V128        5,671        5,294    1,187,578
==29332==    V256    5,220,560      778,432   10,852,961
"""
CACHES: list[dict[str, Any]] = [
    {"level": "L1d", "bytes": 48 << 10, "shared_by": 1, "ways": 12, "line": 64},
    {"level": "L1i", "bytes": 32 << 10, "shared_by": 1, "ways": 8, "line": 64},
    {"level": "L2", "bytes": 2 << 20, "shared_by": 1, "ways": 16, "line": 64},
    {"level": "L3", "bytes": 260 << 20, "shared_by": 2, "ways": 20, "line": 64},
]


def test_totals_of_a_cachegrind_file() -> None:
    found = parse_cachegrind(CACHEGRIND)
    assert (found["Ir"], found["Dr"], found["Dw"]) == (78754741, 56873899, 6575939)
    assert (found["D1mr"], found["DLmr"], found["D1mw"], found["DLmw"]) == (3287155, 979436, 239110, 50242)


def test_bytes_and_multiply_adds_of_lackeys_table() -> None:
    moved = 131787 + 1048892 + 4 * (8925545 + 23506) + 4 * 2359296 + 16 * (5671 + 5294) + 32 * (5220560 + 778432)
    assert parse_lackey(LACKEY) == {"bytes": moved, "multiply_adds": 138936832, "lane_loads": 2359296}


def test_the_lanes_of_a_multiply_add_are_one_access() -> None:
    near = {"Ir": 9.0, "Dr": 20.0, "Dw": 2.0, "D1mr": 3.0, "D1mw": 1.0, "DLmr": 1.0, "DLmw": 0.0}
    found = simulate._counts([near, near], {"bytes": 90.0, "multiply_adds": 16.0, "lane_loads": 16.0})
    assert (found.accesses, found.l1_misses, found.l2_misses, found.tlb_misses) == (8.0, 4.0, 1.0, None)


@pytest.mark.parametrize("text", ["", "events: Ir Dr\nsummary: 1 2\n", CACHEGRIND.replace("239110 50242", "239110")])
def test_a_file_without_totals_is_refused(text: str) -> None:
    with pytest.raises(NativeError, match="no totals"):
        parse_cachegrind(text)


def test_a_report_without_a_table_is_refused() -> None:
    with pytest.raises(NativeError, match="no table"):
        parse_lackey("==1== Lackey, an example Valgrind tool\n")


def test_a_last_level_that_cachegrind_refuses_is_rounded_and_said() -> None:
    g = geometry(CACHES, (6, 207))
    assert g.l1d == (48 << 10, 12, 64)
    assert g.l2 == (2 << 20, 16, 64)
    assert g.last == (256 << 20, 16, 64)
    assert g.note == f"the last level of {260 << 20} bytes simulated as {256 << 20} bytes, 16 ways"
    assert g.tlb == ((96 * 4096, 6, 4096), (2048 * 4096, 16, 4096))


def test_an_unknown_processor_has_no_tlb() -> None:
    g = geometry(CACHES[:3], (99, 1))
    assert g.tlb is None
    assert g.last == g.l2
    assert "TLBs are not known" in g.note
    with pytest.raises(NativeError, match="how large its caches are"):
        geometry(CACHES[:1], (6, 207))


def test_large_batches_are_simulated_in_part_and_small_ones_go_through_copies() -> None:
    assert plan(32768) == (MOST_TOKENS, 1, 0, 1)
    assert plan(64) == (64, 1, 1, 2)
    tokens, copies, before, calls = plan(1)
    assert (tokens, copies, before) == (1, 12, 12)
    assert calls % copies == 0
    assert calls >= 48


def test_the_dense_program_computes_a_dense_layer() -> None:
    assert 0 < count_dense.dense_calls(8, 16, 4, 1) < 1e-5
    words = [sys.executable, count_dense.__file__, "8", "16", "4", "1"]
    assert subprocess.run(words, check=False, capture_output=True).returncode == 0
