"""Make pairs to match out of descriptions of packages: `python benchmarks/pairs.py OUTPUT.jsonl [--data FILE]`.

Each package gives one row that pairs its short description with a long one: its own (label 1), or that of another
package of the same section and split (label 0), so that the subject alone does not tell. Which of the two is drawn by
the package's name, so rows are the same in every run.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from nogemm.files import write_atomically
from nogemm.train.reader import read
from nogemm.train.sources import split_of

DATA = Path(__file__).resolve().parents[1] / "data" / "debian-packages.jsonl.gz"


def pairs(rows: Iterable[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield {"text", "text2", "label", "split"} of packages; one that is alone in its section and split gives none."""
    found: dict[tuple[str, str], list[Mapping[str, Any]]] = defaultdict(list)
    for row in rows:
        found[str(row["section"]), split_of(row) or "train"].append(row)
    for (_, split), some in sorted(found.items()):
        for place, row in enumerate(some if len(some) > 1 else ()):
            drawn = int.from_bytes(hashlib.sha256(str(row["name"]).encode()).digest()[:8], "little")
            own = drawn % 2 == 1
            other = some[(place + 1 + drawn // 2 % (len(some) - 1)) % len(some)]
            long = row["long"] if own else other["long"]
            yield {"text": row["short"], "text2": long, "label": int(own), "split": split}


def main() -> None:
    """Write the pairs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("output", type=Path)
    parser.add_argument("--data", type=Path, default=DATA)
    given = parser.parse_args()
    lines = [json.dumps(pair, ensure_ascii=False) for pair in pairs(row.fields() for row in read(given.data))]
    write_atomically(given.output, ("\n".join(lines) + "\n").encode())
    print(f"{given.output}: {len(lines):,} pairs")


if __name__ == "__main__":
    main()
