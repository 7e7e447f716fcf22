"""Check what valgrind counted for small layers: `profile_counts.py RESULT [OTHER RESULTS]`.

The first is a LookupFFN, held against counts worked out by hand: 64 wide, with 16 tables of 4 bits and blocks of 16, so
one repeat of four rounds of 64 x 16 multiply-adds a token in the hash, 16 rows of 64 in the gather. Other results, of
any layer and dtype, must at least have read every token and written every output.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def check(result: dict[str, Any]) -> list[str]:
    """Return what is wrong with the counts."""
    counts = {(entry["contender"], entry["phase"], entry["batch"]): entry for entry in result["counts"]}
    found = []
    for batch in (1, 64):
        hashed, gathered = (counts["nogemm-fp32", phase, batch] for phase in ("hash", "gather"))
        least = batch * 4 * 64 * 16  # besides these: polynomials, LayerNorm
        if not least <= hashed["multiply_adds"] <= 1.8 * least:
            found.append(f"batch {batch}: {hashed['multiply_adds']} multiply-adds in the hash, at least {least} wanted")
        rows = batch * 16 * 64
        if not rows <= gathered["multiply_adds"] <= 2.2 * rows:  # a slice of 128 columns is half padding
            found.append(f"batch {batch}: {gathered['multiply_adds']} multiply-adds in the gather, {rows} wanted")
        if not 4 * rows <= gathered["access_bytes"] <= 12 * rows:
            found.append(f"batch {batch}: {gathered['access_bytes']} bytes in the gather, at least {4 * rows} wanted")
        dense = counts["dense-numpy-fp32", "kernel", batch]
        products = batch * 2 * 64 * 256
        if not products <= dense["multiply_adds"] <= 1.3 * products:
            found.append(f"batch {batch}: {dense['multiply_adds']} multiply-adds in the dense layer, {products} wanted")
    return found


def check_other(result: dict[str, Any]) -> list[str]:
    """Return what is wrong with the counts of the whole kernel."""
    settings = result["settings"]
    counts = {entry["batch"]: entry for entry in result["counts"] if entry["phase"] == "kernel"}
    found = []
    for batch in settings["batch"]:
        least = batch * 2 * 4 * settings["d"]
        moved = counts[batch]["access_bytes"] if batch in counts else 0.0
        if moved < least:
            found.append(f"{settings['method']} {settings['dtype']}: {moved} bytes, at least {least} wanted")
    return found


if __name__ == "__main__":
    data = json.loads(Path(sys.argv[1]).read_text())
    wrong = check(data)
    for entry in data["counts"]:
        entry["multiply_adds"] = 0.0
    if not check(data):
        wrong.append("control: no multiply-adds at all passed")
    for name in sys.argv[2:]:
        wrong += check_other(json.loads(Path(name).read_text()))
    print("\n".join(wrong) or "simulated counts are as worked out by hand")
    sys.exit(bool(wrong))
