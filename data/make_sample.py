"""Make the sample that is shipped inside the package: a stable part of `debian-packages.jsonl.gz`.

    python make_sample.py [--out ../src/nogemm/data/sample.jsonl.gz] [--limit 2000000]

Every test row, the validation rows whose names hash lowest, and as many training rows (in the order of their names'
hashes) as fit into the limit; training descriptions are cut at a word, near the length that an encoder reads. Rows are
sorted by split and name, which also makes them compress best. The same input gives the same rows.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import sys
from pathlib import Path

from rebuild import opening, read_rows, write_rows

HERE = Path(__file__).resolve().parent
VALIDATION_ROWS = 500
LONGEST_TRAINING_TEXT = 900
SPLITS = ("test", "validation", "train")


def split_of(text: str) -> str:
    """Return the split that a description belongs to: 5 % test, 5 % validation, the rest training."""
    group = int(hashlib.sha1(opening(text).encode()).hexdigest()[:8], 16) % 100
    return "test" if group < 5 else "validation" if group < 10 else "train"


def cut(text: str, longest: int) -> str:
    """Shorten a text at the last space before the limit."""
    return text if len(text) <= longest else text[: text.rindex(" ", 0, longest)]


def ordered(rows: list[dict[str, object]]) -> list[dict[str, object]]:
    """Sort rows by the hash of their names: an order that says nothing about their content."""
    return sorted(rows, key=lambda row: hashlib.sha1(str(row["name"]).encode()).hexdigest())


def sample(rows: list[dict[str, object]], training: int) -> list[dict[str, object]]:
    """Return the sample's rows with the given number of training rows."""
    by_split: dict[str, list[dict[str, object]]] = {name: [] for name in SPLITS}
    for row in rows:
        by_split[split_of(str(row["long"]))].append(row)
    chosen = {
        "test": by_split["test"],
        "validation": ordered(by_split["validation"])[:VALIDATION_ROWS],
        "train": ordered(by_split["train"])[:training],
    }
    return [
        {
            "split": split,
            "short": row["short"],
            "long": cut(str(row["long"]), LONGEST_TRAINING_TEXT) if split == "train" else row["long"],
        }
        for split, part in chosen.items()
        for row in sorted(part, key=lambda row: str(row["name"]))
    ]


def compressed_size(rows: list[dict[str, object]]) -> int:
    """Return how many bytes the rows take as gzipped JSONL."""
    return len(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode(), 9, mtime=0))


def main() -> int:
    """Write the largest sample that fits."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE.parent / "src/nogemm/data/sample.jsonl.gz")
    parser.add_argument("--limit", type=int, default=2_000_000, help="bytes")
    args = parser.parse_args()
    rows = read_rows(HERE / "debian-packages.jsonl.gz")
    low, high = 0, len(rows)
    while low < high:
        middle = (low + high + 1) // 2
        if compressed_size(sample(rows, middle)) <= args.limit:
            low = middle
        else:
            high = middle - 1
    chosen = sample(rows, low)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_rows(chosen, args.out)
    counts = {split: sum(row["split"] == split for row in chosen) for split in SPLITS}
    sys.stdout.write(f"{args.out.name}: {counts}, {args.out.stat().st_size} bytes\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
